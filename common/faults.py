"""What a user can fix, in one sentence, whatever torch makes of it. Imported where something goes wrong."""

from __future__ import annotations

import os
import re

from common.files import UserError

CLOSED_PIPE, INTERRUPTED = 128 + 13, 128 + 2                     # exit status after SIGPIPE and SIGINT, as of a shell


def explain(error: BaseException) -> tuple[str, int]:
    """What is printed after the script's name, and the exit status; status 0 for what the user can neither fix nor wants."""
    process = f" (process {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
    if isinstance(error, KeyboardInterrupt):
        return f"{process}: stopped; what was saved is kept", INTERRUPTED
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        return "", CLOSED_PIPE
    sentence = _sentence(error)
    return f"{process}: error: {sentence}", 2 if sentence else 0


def _sentence(error: BaseException) -> str:
    """A process that loads images and is killed raises anywhere: torch says so, or the pipe from it breaks."""
    text = str(error)
    if re.search(r"Bus error|shared memory|unable to \w+ .*/torch_", text):
        return ("the shared memory (/dev/shm) in which processes hand over images is full, as a container has little of it: "
                "start the container with --shm-size 8g, or use --workers 0")
    if isinstance(error, EOFError | ConnectionError) or re.search(r"DataLoader worker \(pid|Pin memory thread", text):
        return "a process that loads images was killed, perhaps for lack of memory: try fewer --workers, then start again"
    if isinstance(error, UserError):                             # of a worker process, torch gives the traceback as text
        return re.sub(r"^Caught [\s\S]*\n[\w.]*UserError: ", "", text).strip()
    if type(error).__name__ == "OutOfMemoryError":
        return "the accelerator's memory is full: try a smaller --batch-size or --crop, or --amp bf16; what was saved is kept"
    if re.search(r"[Cc]onnection closed|[Cc]onnection reset|Broken pipe|remote process exited", text):
        return "another process of this run ended; see its message, then start all again to resume"
    return ""


def _nobody_reads() -> bool:
    """Whether what is printed goes into a closed pipe (`| head`); if so, the rest of it goes nowhere."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False
