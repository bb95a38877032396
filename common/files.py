"""Atomic writes, reading of files without running code from them, errors of one sentence, progress lines."""

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
    """Something the user can fix. Its message is one sentence: what is wrong, and the way out."""


def progress(what: str, items: Iterable, count: int) -> Iterator:
    """Yield the `count` items; every half minute print how many are done, in a log file too."""
    printed = time.monotonic()
    for k, item in enumerate(items, 1):
        yield item
        if time.monotonic() > printed + 30:
            printed = time.monotonic()
            print(f"{what} {k} of {count}", flush=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike):
    """Turn an error of the disk inside this block into a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:                     # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; make room or choose another folder, then start again") from error


def write_atomically(path: str | os.PathLike, save: Callable[[BinaryIO], object]) -> None:
    """Write a file through `save(file)`; a reader sees the old file or the complete new one. Raises UserError on failure."""
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
    """Load what torch.save wrote (tensors and plain values) onto the CPU. Runs no code from the file; verifies its checksums,
    which torch.load does not. Raises UserError that names the file; if the file may be intact, the message says to keep it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no {what} {path}") from error
    except Exception as error:                               # a damaged file can raise any exception
        if isinstance(error, OSError | MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path} cannot be read now ({error or 'out of memory'}); it may be intact: keep it, start again"
                            ) from error
        raise UserError(f"{path} is damaged or not a {what} ({type(error).__name__}); {remedy}") from error


def write_json(path: Path, content: dict) -> None:
    """Write a dictionary as a JSON file, atomically. Raises UserError if writing fails."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path: Path) -> dict:
    """Read a JSON file that holds a dictionary; {} if there is no file. Raises UserError that names the file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read or is damaged; repair it, or delete the folder to start again") from error


def read_log(folder: Path) -> list[dict]:
    """Read the records of a run's log.jsonl; skip lines that are cut short or damaged."""
    log, records = folder / "log.jsonl", []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("stage"), str) and isinstance(record.get("iteration"), int):
                records.append(record)
    return records


def lock(folder: Path):
    """Lock a folder while the returned file is open; delete half-written files. Raises UserError if it is locked."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock_file = open(folder / ".lock", "a")                                  # open until the process ends
    try:
        if fcntl:
            fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another process: wait until it ends, or give this run another --tag") from error
    except OSError:                                                          # a file system without locks
        pass
    for temporary in folder.rglob(".*.tmp"):
        temporary.unlink()
    return lock_file
