"""A dataclass becomes a command line: one flag per field, with its help, the paper's value and its bounds.

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
import inspect
import math
import os
import re
import shlex
import sys
import traceback
import types
import typing
from pathlib import Path

from common.files import UserError


class Size(typing.NamedTuple):
    """An image size, width first as in the papers: "1280x720"."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @staticmethod
    def parse(text: str) -> Size:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, for example 1280x720")
        return Size(*map(int, text.split("x")))


def option(default, help: str, *, paper=None, section: str = "", choices: tuple = (), low=None, high=None, defines_run=True):
    """A dataclass field that is a flag; `default` None stands for "chosen from other flags".

    `paper`, `section`: the paper's value, and where it stands; None if it gives none (shown as †). `low`, `high`: the smallest
    and largest value allowed. `defines_run`: whether a run cannot continue with another value."""
    return dataclasses.field(default=default, metadata={"help": help, "paper": paper, "section": section, "choices": choices,
                                                        "low": low, "high": high, "defines_run": defines_run})


def flag(name: str) -> str:
    """`lambda_adv` -> `--lambda-adv`, `from_` -> `--from`."""
    return "--" + name.rstrip("_").replace("_", "-")


def parse(prog: str, doc: str, classes: tuple[type, ...], argv: list[str] | None = None, toy: dict | None = None) -> tuple:
    """Read the command line into one instance of each dataclass in `classes`, the method's first.

    A field of two classes is one flag, described by the first class: so a Config gives a common option its paper's value.
    `toy`: the defaults with --toy. A field `command` receives a shell line that repeats this start from any folder.
    Raises: SystemExit(2) after one sentence."""
    argv = list(sys.argv[1:] if argv is None else argv)
    fields = {field.name: (field, kind) for cls in reversed(classes) for field, kind in flags(cls)}    # the method's overrule
    defaults = {name: field.default for name, (field, _) in fields.items()} | (toy if toy and "--toy" in argv else {})
    if help_flags := {"-h", "--help", "--help-all"} & set(argv):
        from common import usage  # only --help needs it
        print(usage.text(prog, doc, classes, defaults, everything="--help-all" in help_flags))
        raise SystemExit(0)
    parser = _Parser(prog=prog, add_help=False, allow_abbrev=False)
    for field, kind in fields.values():
        arguments: dict = {"dest": field.name, "default": argparse.SUPPRESS}
        kinds = typing.get_args(kind)
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments |= {"type": _reader(field, (kinds or (kind,))[0]), "choices": field.metadata["choices"] or None,
                    "metavar": "X", "nargs": None if not kinds else "+" if kinds[-1] is ... else len(kinds)}
        parser.add_argument(flag(field.name), **arguments)
    values = defaults | vars(parser.parse_args(argv))
    if values.get("eval") or values.get("predict"):
        from common import start  # only --eval needs it: typed flags replace those of the evaluated run
        defining = {name for name, (field, _) in fields.items() if field.metadata["defines_run"]}
        values |= vars(parser.parse_args([*start.trained_with(prog.removesuffix(".py"), values, defining), *argv]))
    script = str(Path(__file__).resolve().parents[1] / prog)
    values["command"] = f"cd {shlex.quote(os.getcwd())} && {shlex.join([sys.executable, script, *argv])}"
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return tuple(cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)}) for cls in classes)


def to_json(instance, defining_only: bool = False) -> dict:
    """The flags of a dataclass instance as JSON-ready values; with `defining_only` only those that define a run."""
    names = [field.name for field, _ in flags(type(instance)) if field.metadata["defines_run"] or not defining_only]
    plain = {Size: str, tuple: list}                             # the types that JSON lacks
    return {name: plain.get(type(value := getattr(instance, name)), lambda x: x)(value) for name in names}


def command(main):
    """Decorate `main(argv=None)`: an error that the user can fix gives one line on stderr and status 2; a closed pipe none."""
    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):                   # a terminal shows ? for a letter that it lacks
                stream.reconfigure(errors="replace")
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()                               # a pipe closed by its reader is reported here
        except (UserError, RuntimeError, EOFError, ConnectionError, KeyboardInterrupt) as error:
            from common import faults  # only errors need it
            message, status = faults.explain(error)
            if not status:
                raise
            traceback.clear_frames(error.__traceback__)          # and with them the loaders and their worker processes
        if message:
            print(f"{Path(inspect.getfile(main)).name}{message}", file=sys.stderr)
        raise SystemExit(status)
    return wrapped


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += f" (did you mean {near[0]}?)" if near else " (see --help)"
        self.exit(2, f"{self.prog}: error: {message}\n")


def flags(cls: type):
    """(field, type) of every field made by `option`; `X | None` counts as X."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata:
            kind = hints[field.name]
            yield field, typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


def _reader(field: dataclasses.Field, kind):
    """The function that argparse calls on a flag's text: it converts the text and checks the bounds."""
    low, high = field.metadata["low"], field.metadata["high"]

    def read(text: str):
        value = Size.parse(text) if kind is Size else os.path.expanduser(text) if kind is str else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is below the smallest possible value {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is above the largest possible value {high}")
        return value

    read.__name__ = kind.__name__                                # argparse: "invalid float value: 'abc'"
    return read
