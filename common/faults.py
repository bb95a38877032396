"""Turns errors that a user can fix, also torch's own, into one sentence. Imported only when an error occurs."""

from __future__ import annotations

import os
import re

from common.files import UserError

CLOSED_PIPE, INTERRUPTED = 128 + 13, 128 + 2                     # exit status after SIGPIPE and SIGINT, as in a shell


def explain(error: BaseException) -> tuple[str, int]:
    """The text to print after the script's name, and the exit status; status 0: no such error, the traceback is needed."""
    process = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
    if isinstance(error, KeyboardInterrupt):
        return f"{process}: stopped; saved files are kept", INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return "", CLOSED_PIPE
    sentence = _sentence(error)
    return f"{process}: error: {sentence}", 2 if sentence else 0


def _sentence(error: BaseException) -> str:
    """One sentence, or "". A killed worker can raise anywhere: torch reports it, or its pipe breaks."""
    text = str(error)
    if re.search(r"Bus error|shared memory|unable to \w+ .*/torch_", text):
        return ("the shared memory (/dev/shm) through which workers pass images is full; containers have little of it: start "
                "the container with --shm-size 8g, or use --workers 0")
    if isinstance(error, EOFError | ConnectionError) or re.search(r"DataLoader worker \(pid|Pin memory thread", text):
        return "a worker process was killed, perhaps for lack of memory: use fewer --workers, then start again"
    if isinstance(error, UserError):                             # torch adds the traceback of a worker process as text
        return re.sub(r"^Caught [\s\S]*\n[\w.]*UserError: ", "", text).strip()
    if type(error).__name__ == "OutOfMemoryError":
        return "the accelerator's memory is full: try a smaller --batch-size or --crop, or --amp bf16; saved files are kept"
    if re.search(r"[Cc]onnection closed|[Cc]onnection reset|Broken pipe|remote process exited", text):
        return "another process of this run ended; see its message, then start all processes again to resume"
    return ""


def _nobody_reads() -> bool:
    """Whether standard output is a closed pipe (`| head`); if so, further output is discarded."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False
