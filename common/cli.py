"""A dataclass becomes a command line: one flag a field, with its help, the paper's value and its bounds.

    @dataclass
    class Config:
        lambda_adv: float = option(0.001, "weight of L_adv in Eq. (2)", paper=0.001, section="Sec. 4.3", low=0)

    cfg, options = parse("fada.py", __doc__, (Config, Options), argv)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import gc
import inspect
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class UserError(Exception):
    """Something the user can put right. Its message is one sentence that says what is wrong and the way out."""


def write_atomically(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Write a file through `save(file)`: under its name there is always a whole file or none.

    Raises: UserError naming the file if it cannot be written (a full disk, a folder without permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:                 # torch.save reports a full disk as RuntimeError
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {why}; make room or choose another folder, then start again") from error


class Size(NamedTuple):
    """An image size, width first as in the papers: "1280x720"."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @staticmethod
    def parse(text: str) -> Size:
        """Read "1280x720"; an ArgumentTypeError otherwise."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 1280x720")
        return Size(int(match[1]), int(match[2]))


def option(default, help: str, *, paper=None, section: str = "", choices: tuple = (), low=None, high=None,
           identity: bool = True):
    """A dataclass field that is a flag.

    Args:
        default: the value used when the flag is absent; `None` stands for "chosen from other flags".
        help: one line, in the paper's terms.
        paper: the value the paper gives; None if it gives none (shown as †).
        section: where the paper gives it.
        choices, low, high: the values allowed (bounds are inclusive).
        identity: whether a run continued with another value would be another run.
    """
    metadata = {"help": help, "paper": paper, "section": section, "choices": choices, "low": low, "high": high,
                "identity": identity}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """`lambda_adv` -> `--lambda-adv`, `from_` -> `--from`."""
    return "--" + name.rstrip("_").replace("_", "-")


def parse(prog: str, doc: str, classes: tuple[type, ...], argv: list[str] | None = None, toy: dict | None = None) -> tuple:
    """Read the command line into one instance of each dataclass in `classes`.

    Args:
        prog: the script's name.
        doc: its docstring, shown by --help.
        classes: dataclasses whose fields are made by `option`, the method's first; a field named `command` receives the
            command line.
        argv: arguments without the program's name; None means sys.argv.
        toy: values that become the defaults when --toy is among the arguments.
    Raises: SystemExit(2) after one sentence on stderr for anything that cannot be meant.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=prog, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for cls in classes:
        group = parser.add_argument_group(f"{cls.__name__} ({(cls.__doc__ or '').strip().splitlines()[0]})")
        for field, kind in _flags(cls):
            _add(group, field, kind, cls is classes[0])
    if toy is not None and "--toy" in argv:
        parser.set_defaults(**toy)
    values = vars(parser.parse_args(argv))
    command = shlex.join([sys.executable, prog, *argv])
    instances = []
    for cls in classes:
        chosen = {field.name: values[field.name] for field, _ in _flags(cls)}
        if "command" in {field.name for field in dataclasses.fields(cls)}:
            chosen["command"] = command
        instances.append(cls(**chosen))
    return tuple(instances)


def to_json(instance, identity_only: bool = False) -> dict[str, Any]:
    """The flags of a dataclass instance as JSON-ready values; with `identity_only` just those that make a run what it is."""
    plain = {}
    for field, _ in _flags(type(instance)):
        if field.metadata["identity"] or not identity_only:
            value = getattr(instance, field.name)
            plain[field.name] = str(value) if isinstance(value, Size) else list(value) if isinstance(value, tuple) else value
    return plain


def defaults_table(cls: type) -> str:
    """The Markdown table of a Config: flag, default, the paper's value and where the paper gives it."""
    lines = ["| flag | default | paper | meaning |", "|---|---|---|---|"]
    for field, _ in _flags(cls):
        lines.append(f"| `{flag(field.name)}` | {_show(field.default)} | {_paper(field)} | {field.metadata['help']} |")
    return "\n".join(lines)


def command(main):
    """Decorate `main(argv=None)`: what the user can put right becomes one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except RuntimeError as error:
            message = _explain(error)
            if not message:
                raise
        gc.collect()    # only now do the loaders go that the exception's frames kept alive, and their worker processes
        rank = os.environ.get("RANK", "0")
        print(f"{Path(inspect.getfile(main)).name}{f' (process {rank})' * (rank != '0')}: error: {message}", file=sys.stderr)
        raise SystemExit(2)
    return wrapped


def _explain(error: RuntimeError) -> str:
    """One sentence for what torch reports as a RuntimeError though nothing is wrong with the code; "" for the others."""
    if type(error).__name__ == "OutOfMemoryError":
        return ("the accelerator's memory is full: try a smaller --batch-size or --crop, or --amp bf16; what was saved is kept")
    if re.search(r"[Cc]onnection closed|[Cc]onnection reset|Broken pipe|remote process exited", str(error)):
        return "another process of this run ended; see its message, then start all again to resume"
    if "DataLoader worker (pid" in str(error):                   # torch raises it wherever the program is at that moment
        return ("a process that loads images was killed, perhaps for lack of memory: try fewer --workers, then start again to "
                "resume")
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _flags(cls: type):
    """(field, type) of every field made by `option`; `X | None` counts as X."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            kind = hints[field.name]
            if isinstance(kind, types.UnionType):
                kind = next(k for k in kind.__args__ if k is not type(None))
            yield field, kind


def _add(group, field: dataclasses.Field, kind, with_paper: bool) -> None:
    paper = f"; paper: {_paper(field)}" if with_paper else ""
    text = f"{field.metadata['help']} [{_show(field.default)}{paper}]".replace("%", "%%")
    if kind is bool:
        group.add_argument(flag(field.name), dest=field.name, default=field.default, help=text,
                           action=argparse.BooleanOptionalAction)
    elif typing.get_origin(kind) is tuple:
        group.add_argument(flag(field.name), dest=field.name, default=field.default, help=text, nargs="+",
                           choices=field.metadata["choices"] or None, type=_reader(field, typing.get_args(kind)[0]),
                           action=_Tuple, metavar="X")
    else:
        group.add_argument(flag(field.name), dest=field.name, default=field.default, help=text,
                           choices=field.metadata["choices"] or None, type=_reader(field, kind),
                           metavar=None if field.metadata["choices"] else getattr(kind, "__name__", "X").upper())


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _reader(field: dataclasses.Field, kind):
    """The function that argparse calls on the text of a flag: converts, then checks the bounds."""
    low, high = field.metadata["low"], field.metadata["high"]

    def read(text: str):
        value = Size.parse(text) if kind is Size else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is below the smallest possible value {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is above the largest possible value {high}")
        return value

    read.__name__ = kind.__name__                            # argparse: "invalid float value: 'abc'"
    return read


def _show(value) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) and not isinstance(value, Size) else str(value)


def _paper(field: dataclasses.Field) -> str:
    if field.metadata["paper"] is None:
        return "†"                                           # not in the paper
    return f"{_show(field.metadata['paper'])} ({field.metadata['section']})"
