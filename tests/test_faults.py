"""Faults of long runs, caused in real processes: kills, a full disk, damaged files, NaN, a second process.

--soak (`make soak`) runs the long versions: 200 kills over all five scripts."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from PIL import Image
from starts import Starts, assert_same_end, children, tensors

import fada
from common.data import batch_order, derive_seed
from common.layouts import find_pairs

ROOT = Path(__file__).parents[1]
SMALL = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --workers 0 --log-every 1 --save-every 2 "
         "--channels-last").split()
FLAGS = {
    "bismap": "--warmup-iterations 3 --selftrain-iterations 3 --distill-iterations 3 --warmup-batch-size 1 --batch-size 1 "
              "--crop 64x32 --stm-backbone warmup --samples 300 --stm-samples 300 --components 2 --J 3 --pl-ratio 0.6 "
              "--test-scales 1.0",
    "c2f": "--step0-iterations 3 --step-iterations 3 --K 1 --crop 64x32 --batch-size 1",
    "cag": "--source-iterations 3 --warmup-epochs 0.375 --stage-epochs 0.375 --K 1 --crop 64x32 --margin 0.05",
    "fada": "--source-iterations 3 --adversarial-iterations 3 --distill-iterations 3 --batch-size 2 --test-scales 1.0",
    "sim": "--iterations 3",
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    starts = Starts(tmp_path_factory.mktemp("starts"))
    yield starts
    starts.close()


def arguments(script: str, city: Path, runs: Path, *more: str) -> list[str]:
    return ["--data", str(city), "--runs", str(runs), *SMALL, *FLAGS[script].split(), *more]


@pytest.fixture(scope="module")
def undisturbed(starts, city, tmp_path_factory):
    """script -> the folder of an undisturbed run, and its duration in seconds."""
    root, done = tmp_path_factory.mktemp("undisturbed"), {}

    def run(script: str) -> tuple[Path, float]:
        if script not in done:
            begin = time.monotonic()
            status, text = starts.run(script, arguments(script, city, root))
            assert status == 0, text
            done[script] = root / f"{script}-gta5", time.monotonic() - begin
        return done[script]
    return run


@pytest.mark.parametrize("script", FLAGS)
def test_killed_at_random_moments(script, starts, city, tmp_path, undisturbed, soak):
    """kill -9 many times: the restarted run ends bit for bit where an undisturbed run ends."""
    if not soak and script != "fada":
        pytest.skip("takes minutes: --soak")
    (reference, seconds), required = undisturbed(script), 40 if soak else 5
    kills, rng = 0, random.Random(script)
    for repetition in range(200):
        argv = arguments(script, city, tmp_path / f"{repetition}")
        for _ in range(5):
            start, begin = starts.start(script, argv), time.monotonic()
            end = begin + rng.uniform(0, 0.6 * seconds)
            while time.monotonic() < end and start.pid not in starts.ended:
                starts.listen(0.001)
            start.kill()
            if start.wait() != -signal.SIGKILL:
                seconds = min(seconds, time.monotonic() - begin)             # the machine was slower before
                break
            kills += 1
        status, text = starts.run(script, argv)
        assert status == 0, text
        assert_same_end(tmp_path / f"{repetition}/{script}-gta5", reference)
        shutil.rmtree(tmp_path / f"{repetition}")
        if kills >= required:
            break
    print(f"{script}: {kills} kills")
    assert kills >= required


def test_full_disk(starts, city, tmp_path, undisturbed):
    """While a checkpoint or a pseudo label is written: one sentence, no finished stage is lost, and the run resumes."""
    reference, _ = undisturbed("fada")
    argv = arguments("fada", city, tmp_path)
    status, text = starts.run("fada", argv, file_limit=1_000_000)
    assert status == 2 and "cannot write" in text and "last.pt" in text and "make room" in text, text
    assert "Traceback" not in text
    assert starts.run("fada", [*argv, "--stage", "source"])[0] == starts.run("fada", [*argv, "--stage", "adversarial"])[0] == 0
    status, text = starts.run("fada", argv, file_limit=64)
    assert status == 2 and "cannot write" in text and "pseudo_labels" in text and "Traceback" not in text, text
    assert not [path for path in tmp_path.rglob("*.tmp")]
    assert starts.run("fada", argv)[0] == 0
    assert_same_end(tmp_path / "fada-gta5", reference)


def stopped_in(starts, script, argv, words, number=signal.SIGTERM):
    start = starts.start(script, argv)
    start.until(words)
    start.kill(number)
    start.wait()
    return start


def test_checkpoints_that_are_damaged_or_of_another_run(starts, city, tmp_path, undisturbed):
    reference, _ = undisturbed("fada")
    other, _ = undisturbed("cag")
    argv, folder = arguments("fada", city, tmp_path), tmp_path / "fada-gta5"
    shutil.copytree(reference, folder)
    for name in ("adversarial.pt", "distill-labels.pt", "distill.pt", "results.json"):
        (folder / name).unlink()
    intact = (folder / "source.pt").read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1                                # one bit of a weight, which torch.load does not notice
    for content, more, words in [
        (intact[:len(intact) // 2], [], "source.pt is damaged"), (bytes(flipped), [], "source.pt is damaged"),
        ((other / "source.pt").read_bytes(), [], "does not fit"), (intact, ["--lr", "1e-3"], "--lr (0.00025 -> 0.001)"),
        (intact, ["--source", "synthia", "--from", str(reference / "source.pt")], "does not fit"),
        (b"", [], "source.pt is damaged"),
    ]:
        (folder / "source.pt").write_bytes(content)
        status, text = starts.run("fada", [*argv, *more])
        assert status == 2 and words in text and text.strip().splitlines()[-1].startswith("fada.py: error: "), text
        assert "Traceback" not in text
    (folder / "source.pt").write_bytes(intact)
    for name in ("config.json", "results.json"):
        original = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_bytes(b'{"cut": ')
        status, text = starts.run("fada", argv)
        assert status == 2 and name in text and "damaged" in text and "Traceback" not in text, text
        (folder / name).write_bytes(original)
    assert starts.run("fada", argv)[0] == 0


def test_a_pseudo_label_of_another_size(starts, city, tmp_path, undisturbed):
    """Changed between two starts: the file is named, not resized; with the old file the run resumes."""
    reference, _ = undisturbed("fada")
    argv, folder = arguments("fada", city, tmp_path, "--workers", "1"), tmp_path / "fada-gta5"
    shutil.copytree(reference, folder)
    (folder / "distill.pt").unlink()
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({stage: results[stage] for stage in ("source", "adversarial")}))
    stopped_in(starts, "fada", argv, "distill 1/3")
    assert (folder / "last.pt").exists()
    for label in folder.glob("pseudo_labels/**/*.png"):                       # any of them may come next
        Image.open(label).resize((32, 16)).save(label)
    status, text = starts.run("fada", argv)
    assert status == 2 and "pseudo_labels" in text and "32x16" in text and "Traceback" not in text, text
    shutil.rmtree(folder / "pseudo_labels")
    shutil.copytree(reference / "pseudo_labels", folder / "pseudo_labels")
    assert starts.run("fada", argv)[0] == 0
    assert_same_end(folder, reference)


def test_an_image_that_becomes_unreadable_and_a_worker_that_is_killed(starts, city, tmp_path, undisturbed):
    reference, _ = undisturbed("fada")
    data = tmp_path / "data"
    shutil.copytree(city, data)
    argv = arguments("fada", data, tmp_path, "--workers", "1")
    third = list(batch_order(8, 2, 3, derive_seed(0, "source", 0)))[2]
    image = find_pairs(data, "gta5")[third[0][0]].image
    content = image.read_bytes()
    image.write_bytes(content[:len(content) // 2])
    status, text = starts.run("fada", [*argv, "--save-every", "1000"])
    assert status == 2 and str(image) in text and "damaged" in text and "Traceback" not in text, text
    assert torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)["iteration"] == 2
    image.write_bytes(content)

    start = starts.start("fada", [*argv, "--tag", "long", "--source-iterations", "5000"])
    start.until("source 3/5000")
    os.kill(children(start.pid)[0], signal.SIGKILL)
    assert start.wait() == 2 and "Traceback" not in start.text, start.text
    assert "error: a worker process was killed" in start.text.strip().splitlines()[-1], start.text
    assert (tmp_path / "fada-gta5-long/last.pt").exists()
    assert starts.run("fada", argv)[0] == 0
    assert_same_end(tmp_path / "fada-gta5", reference)


@pytest.mark.parametrize("broken", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_worker_that_is_killed_while_it_hands_over_a_batch(broken, city, tmp_path, monkeypatch, capsys):
    """Its pipe breaks shortly before its parent learns that it is dead, which must not cut the message short."""
    receive, clear, parent, count = Connection.recv_bytes, traceback.clear_frames, os.getpid(), itertools.count(1)

    def received(self, *size):
        if os.getpid() == parent and next(count) == 3:
            raise broken
        return receive(self, *size)

    def learn_of_the_death(error):
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            worker.kill()
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        clear(error)

    monkeypatch.setattr(Connection, "recv_bytes", received)
    monkeypatch.setattr(traceback, "clear_frames", learn_of_the_death)
    with pytest.raises(SystemExit) as stop:
        fada.main(arguments("fada", city, tmp_path, "--workers", "1", "--source-iterations", "50"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("fada.py: error: a worker process was killed"), error
    assert error.count("\n") == 1


def test_a_worker_that_is_killed_while_a_checkpoint_is_written(city, tmp_path, monkeypatch, capsys):
    """The checkpoint is complete, and the message names the worker, not the disk."""
    save, kills = torch.save, []

    def killed(content, file):
        if not kills:
            kills.extend(multiprocessing.active_children())
            for worker in kills:
                worker.kill()
                os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        save(content, file)

    monkeypatch.setattr(torch, "save", killed)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1, raising=False)
    with pytest.raises(SystemExit) as stop:
        fada.main(arguments("fada", city, tmp_path, "--workers", "1", "--source-iterations", "50"))
    error = capsys.readouterr().err
    assert kills and stop.value.code == 2 and "error: a worker process was killed" in error, error
    assert torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)["iteration"] >= 2


LONG = ("--source-iterations", "5000", "--save-every", "1000")


def test_a_second_ctrl_c_ends_at_once_and_the_first_says_so(starts, city, tmp_path):
    """During an iteration of one minute: the message comes before the iteration ends, and there is no traceback."""
    start = starts.start("fada", arguments("fada", city, tmp_path, *LONG), slow_at=(4, 60))
    start.until("source 2/5000")
    start.kill(signal.SIGINT)
    start.until("stopping after this iteration; once more: stop now, losing 3 iterations")
    time.sleep(2.1)                                               # an earlier signal is a scheduler's repetition
    start.kill(signal.SIGINT)
    assert start.wait(20) == -signal.SIGINT and "Traceback" not in start.text and "KeyboardInterrupt" not in start.text
    assert not (tmp_path / "fada-gta5/last.pt").exists()


def test_a_signal_that_comes_twice_at_once_is_one(starts, city, tmp_path):
    start = starts.start("fada", arguments("fada", city, tmp_path, *LONG), slow_at=(4, 3))
    start.until("source 2/5000")
    start.kill(signal.SIGTERM)
    start.until("stopping after this iteration")
    start.kill(signal.SIGTERM)
    assert start.wait() == 128 + signal.SIGTERM and start.text.count("stopping after") == 1
    assert torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)["iteration"] == 3


def test_a_terminal_that_is_closed(city, tmp_path):
    """As when an ssh session ends: SIGHUP, and printing fails."""
    line = [sys.executable, str(ROOT / "fada.py"), *arguments("fada", city, tmp_path, *LONG)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, line)
    printed = b""
    while b"source 2/5000" not in printed:
        printed += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)["iteration"] >= 2


def test_a_pipe_that_is_closed(city, tmp_path):
    """`| head`: no traceback, and a checkpoint is kept."""
    for more, words, statuses in (["--help"], "", {0, 141}), (LONG, "source 2/5000", {128 + signal.SIGPIPE}):
        line = [sys.executable, str(ROOT / "fada.py"), *arguments("fada", city, tmp_path, *more)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while words and words not in process.stdout.readline():
            pass
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) in statuses
    assert torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)["iteration"] >= 2


def test_the_line_that_resumes_works_from_another_folder(starts, city, tmp_path):
    """Even if --data and --runs are relative."""
    argv = arguments("fada", Path(os.path.relpath(city, ROOT)), Path(os.path.relpath(tmp_path, ROOT)), "--stage", "source")
    start = starts.start("fada", argv, slow_at=(2, 3))
    start.until("source 1/3")
    start.kill(signal.SIGINT)
    assert start.wait() == 128 + signal.SIGINT, start.text
    line = start.text.split("stopped; resume with: ")[1].strip()
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming at iteration 2" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == ["fada-gta5"]


def test_shared_memory_that_is_full(city, tmp_path):
    """Two megabytes of it, as in a container: in a separate namespace, if the system allows one."""
    line = shlex.join([sys.executable, str(ROOT / "fada.py"), *arguments("fada", city, tmp_path, "--workers", "1"),
                       "--source-size", "512x256", "--batch-size", "4"])
    small = "mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 77"
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c", f"{small}; {line}"]
    done = subprocess.run(inside, capture_output=True, text=True) if shutil.which("unshare") else None
    if done is None or done.returncode in (1, 77) and "error: the shared" not in done.stderr:
        pytest.skip("no namespaces here")
    assert done.returncode == 2 and "start the container with --shm-size 8g, or use --workers 0" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_where_the_system_has_neither_process_groups_nor_alarms(city, tmp_path, monkeypatch):
    """As on Windows, which has no SIGHUP either."""
    for module, name in ((os, "setpgid"), (signal, "alarm"), (signal, "SIGHUP")):
        monkeypatch.delattr(module, name)
    fada.main(arguments("fada", city, tmp_path, "--workers", "1", "--stage", "source"))
    assert (tmp_path / "fada-gta5/source.pt").exists()


def test_nan_in_a_batch(starts, city, tmp_path):
    """The run ends, names the loss, and the checkpoint from before stays valid."""
    argv = arguments("fada", city, tmp_path)
    status, text = starts.run("fada", argv, nan_at=4)             # the third batch of two
    assert status == 2 and "loss 'seg' became nan at iteration 3" in text and "last.pt from before it is kept" in text, text
    saved = torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)
    assert saved["iteration"] == 2 and all(x.isfinite().all() for _, x in tensors(saved["state"]))


def test_training_leaks_nothing(starts, city, tmp_path, soak):
    """Resident memory after 500 iterations and after 2,000."""
    if not soak:
        pytest.skip("takes minutes: --soak")
    start = starts.start("fada", arguments("fada", city, tmp_path, "--source-iterations", "2000", "--log-every", "50",
                                           "--save-every", "100"))
    resident = []
    for iteration in (500, 2000):
        start.until(f"source {iteration}/2000", timeout=600)
        status = Path(f"/proc/{start.pid}/status").read_text()
        resident.append(int(status.split("VmRSS:")[1].split()[0]))
    start.kill()
    start.wait()
    print(f"{resident} kB")
    assert resident[1] < 1.02 * resident[0]


def test_a_second_process_in_the_same_folder_is_refused(starts, city, tmp_path):
    argv = arguments("fada", city, tmp_path, "--source-iterations", "100000")
    first = starts.start("fada", argv)
    first.until("source 5/")                                  # with a checkpoint
    status, text = starts.run("fada", argv)
    assert status == 2 and "is in use by another process" in text and "--tag" in text, text
    assert starts.run("fada", [*argv, "--eval"])[0] in (0, 2)     # only reads
    first.kill()                                                  # this frees the lock
    first.wait()
    third = stopped_in(starts, "fada", argv, "resuming")
    assert "in use" not in third.text


def test_a_folder_that_cannot_be_written(starts, city, tmp_path):
    (tmp_path / "file").touch()
    status, text = starts.run("fada", arguments("fada", city, tmp_path / "file"))
    assert status == 2 and "cannot write" in text and "Traceback" not in text and text.count("error:") == 1, text
