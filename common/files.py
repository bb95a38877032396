"""Files that are there whole or not at all, read without running code from them; errors of one sentence; progress."""

from __future__ import annotations

import contextlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

try:
    import fcntl
except ImportError:                                              # Windows has no such locks
    fcntl = None


class UserError(Exception):
    """Something the user can fix. Its message is one sentence that says what is wrong and the way out."""


def progress(what: str, items: Iterable, count: int) -> Iterator:
    """Yield the items, `count` in number; each half minute a line says how far it is, also in a log file."""
    shown = time.monotonic()
    for k, item in enumerate(items, 1):
        yield item
        if time.monotonic() > shown + 30:
            shown = time.monotonic()
            print(f"{what} {k} of {count}", flush=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike):
    """What goes wrong with the disk meanwhile becomes a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:                     # torch.save reports a full disk as RuntimeError
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {why}; make room or choose another folder, then start again") from error


def write_atomically(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Write a file through `save(file)`; a reader sees the old file or the whole new one. Raises UserError if it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load(path: str | Path, what: str = "checkpoint", remedy: str = "give another file"):
    """What torch.save wrote: tensors and plain values, on the CPU. Runs no code from the file; checks its checksums, which
    torch.load does not. Raises: UserError that names the file and, where it may be whole, says to keep it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise ValueError(f"checksum of {broken}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no {what} {path}") from error
    except Exception as error:                               # a damaged file raises almost anything
        if isinstance(error, OSError | MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path} cannot be read now ({error or 'out of memory'}); it may be whole: keep it, start again"
                            ) from error
        raise UserError(f"{path} is damaged or not a {what} ({type(error).__name__}); {remedy}") from error


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary as a JSON file, atomically. Raises UserError if it cannot."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path: Path) -> dict:
    """A JSON file that holds a dictionary; {} if it is not there. Raises UserError naming the file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read or is damaged; repair it, or delete the folder to start again") from error


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log.jsonl, without lines that a kill has cut or a disk has damaged."""
    log, records = folder / "log.jsonl", []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("stage"), str) and isinstance(record.get("iteration"), int):
                records.append(record)
    return records


def lock(folder: Path):
    """Lock a folder while the returned file is open; remove half-written files. Raises UserError if another process has it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / ".lock", "a")                                       # for the rest of the process
    try:
        if fcntl:
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another process: wait until it ends, or give this run another --tag") from error
    except OSError:                                                          # a file system without locks
        pass
    for half in folder.rglob(".*.tmp"):
        half.unlink()
    return held
