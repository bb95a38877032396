"""A process that imports torch and the scripts once, and forks a child per start: a start then takes 0.1 seconds instead
of five. `Starts` is the test's side of it; children are real processes that can be killed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import scipy.ndimage  # noqa: F401 (what scripts import when they run, once for all starts)
import torch
import torchvision  # noqa: F401

ROOT = Path(__file__).parents[1]


def link_checkpoints(source: str, target: str) -> None:
    """For shutil.copytree: link checkpoints, which are only replaced as whole files, and copy all other files."""
    os.link(source, target) if source.endswith(".pt") else shutil.copy(source, target)


def tensors(content, name=""):
    if isinstance(content, dict):
        for key, value in content.items():
            yield from tensors(value, f"{name}/{key}")
    elif isinstance(content, torch.Tensor):
        yield name, content


def assert_same_end(folder: Path, reference: Path) -> None:
    """Checkpoints, labels, maps, pictures, results and logs (but for seconds) are equal bit for bit; no other file is left."""
    files = sorted(path.relative_to(reference) for path in reference.rglob("*") if path.suffix in (".pt", ".png", ".json")
                   and path.name != "config.json")
    assert files and not (folder / "last.pt").exists() and not list(folder.rglob("*.tmp"))
    logs = [[{**json.loads(line), "seconds": 0} for line in (root / "log.jsonl").read_text().splitlines()]
            for root in (folder, reference)]
    assert logs[0] == logs[1]
    for file in files:
        if file.suffix == ".pt":
            one, other = (dict(tensors(torch.load(root / file, weights_only=True))) for root in (folder, reference))
            assert one.keys() == other.keys() and all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num())
                                                      for key in other), file
        else:
            assert (folder / file).read_bytes() == (reference / file).read_bytes(), file


def children(pid: int) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


class Start:
    """One start of a script. `text`: its output so far; `wait`: its exit status, or minus the number of the signal."""

    def __init__(self, starts: Starts, pid: int, output: Path):
        self.starts, self.pid, self.output = starts, pid, output

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, timeout: float = 120) -> int:
        end = time.monotonic() + timeout
        while self.pid not in self.starts.ended:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s:\n{self.text}")
            self.starts.listen(0.005)
        return self.starts.ended[self.pid]

    def until(self, words: str, timeout: float = 60) -> None:
        """Wait until it has printed these words."""
        end = time.monotonic() + timeout
        while words not in self.text:
            self.starts.listen(0.005)
            assert self.pid not in self.starts.ended and time.monotonic() < end, f"no {words!r} in\n{self.text}"

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Starts:
    """`start(script, argv)` starts a script; `file_limit` bounds the bytes of a file, like a full disk; `nan_at`: number of the
    data set access that returns a NaN image; `slow_at`: `(number, seconds)` of an access that is slow."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.ended = folder, 0, {}
        self.server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        os.set_blocking(self.server.stdout.fileno(), False)
        self.buffer, self.pids = b"", []

    def start(self, script: str, argv: list[str], file_limit: int | None = None, nan_at: int | None = None,
              slow_at: tuple[int, float] = (-1, 0)) -> Start:
        self.count += 1
        output = self.folder / f"output-{self.count}"
        output.touch()
        job = {"script": script, "argv": argv, "output": str(output), "file_limit": file_limit, "nan_at": nan_at,
               "slow_at": slow_at}
        self.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.server.stdin.flush()
        known, end = len(self.pids), time.monotonic() + 120
        while len(self.pids) == known:
            self.listen(0.001)
            assert self.server.poll() is None and time.monotonic() < end, "the process that forks is gone"
        return Start(self, self.pids[-1], output)

    def run(self, script: str, argv: list[str], timeout: float = 120, **how) -> tuple[int, str]:
        """Start and wait. Returns: exit status, and output."""
        start = self.start(script, argv, **how)
        return start.wait(timeout), start.text

    def listen(self, seconds: float) -> None:
        time.sleep(seconds)
        self.buffer += self.server.stdout.read() or b""
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            event, pid, status = line.split()
            if event == b"started":
                self.pids.append(int(pid))
            else:
                self.ended[int(pid)] = int(status)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


def child(job: dict, output: int) -> None:
    """Run a job in a forked process. It prints into a pipe, which `file_limit` does not bound."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    if job["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], resource.RLIM_INFINITY))
    if job["nan_at"] is not None or job["slow_at"][1]:
        from common.data import SegmentationDataset
        count, item = iter(range(10**9)), SegmentationDataset.__getitem__

        def poisoned(self, key):
            image, *rest = item(self, key)
            number = next(count)
            time.sleep(job["slow_at"][1] * (number == job["slow_at"][0]))
            return (image * float("nan") if number == job["nan_at"] else image), *rest
        SegmentationDataset.__getitem__ = poisoned
    importlib.import_module(job["script"]).main(job["argv"])


def serve() -> None:
    """Fork per line of standard input; report starts and ends on standard output."""
    torch.set_num_threads(1)
    running: dict[int, tuple[int, str]] = {}                     # pid -> its output's pipe and file
    os.set_blocking(0, False)
    pending = b""
    while True:
        with contextlib.suppress(BlockingIOError):
            received = os.read(0, 1 << 20)
            if not received:
                return
            pending += received
        *lines, pending = pending.split(b"\n")
        for line in lines:
            job = json.loads(line)
            importlib.import_module(job["script"])               # once, for all its starts
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    child(job, writer)
                    status = 0
                except SystemExit as stop:
                    status = stop.code or 0
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    os._exit(status)
            os.close(writer)
            os.set_blocking(reader, False)
            running[pid] = reader, job["output"]
            os.write(1, b"started %d 0\n" % pid)
        for pid, (reader, output) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            with open(output, "ab") as file, contextlib.suppress(BlockingIOError):
                while printed := os.read(reader, 1 << 16):
                    file.write(printed)
            if ended:
                os.close(reader)
                del running[pid]
                os.write(1, b"ended %d %d\n" % (pid, os.waitstatus_to_exitcode(status)))
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
