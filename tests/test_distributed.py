"""Two processes under torchrun take the same steps as one process with twice the batch size, and end together.

As a program, `torchrun test_distributed.py DATA RUNS "SCRIPT [FLAGS]"...` runs the scripts with a total batch of two."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from starts import assert_same_end, children, tensors

from common.layouts import find_pairs

ROOT = Path(__file__).parents[1]
SMALL = ("--backbone resnet18 --init none --freeze-bn all --source-size 64x32 --target-size 64x32 --workers 0 --log-every 1 "
         "--save-every 5").split()
FLAGS = {                                              # {b}: images per process, {b2}: twice that
    "bismap": "--warmup-iterations 2 --selftrain-iterations 2 --distill-iterations 2 --warmup-batch-size {b} --batch-size {b} "
              "--crop 64x32 --stm-backbone warmup --samples 300 --stm-samples 300 --components 2 --J 3 --pl-ratio 0.6 "
              "--test-scales 1.0 --lr 1e-4 --adapt-lr 1e-4",
    "c2f": "--step0-iterations 2 --step-iterations 2 --K 1 --crop 64x32 --batch-size {b} --lr 1e-2 --triplet-target",
    "cag": "--source-iterations 2 --warmup-epochs 0.5 --stage-epochs 0.5 --K 1 --crop 64x32 --margin 0.05 --batch-size {b} "
           "--lr 1e-3 --terms ce_t ce_tP dis_s dis_t dis_tP --threshold 0.1",
    "fada": "--source-iterations 2 --adversarial-iterations 2 --distill-iterations 2 --batch-size {b2} --test-scales 1.0 "
            "--lr 1e-2",
    "sim": "--iterations 2 --batch-size {b} --lr 1e-2 --lambda-ci 0.1",
}


def main(data: str, runs: str, *scripts: str) -> None:
    torch.set_num_threads(1)
    batch_size = 2 // int(os.environ.get("WORLD_SIZE", "1"))
    for script, *more in map(str.split, scripts):
        flags = FLAGS[script].format(b=batch_size, b2=2 * batch_size).split()
        importlib.import_module(script).main(["--data", data, "--runs", runs, *SMALL, *flags, *more])


def start(processes: int, *arguments: str | Path) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, __file__, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_two_processes_take_the_steps_of_one(city, tmp_path):
    both = [start(n, city, tmp_path / f"{n}", *FLAGS) for n in (1, 2)]
    for process in both:
        printed, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors
    assert printed.count("\nsim.py, commit") == 1 == printed.count("\nsim")                  # one process prints for both
    assert printed.count("step1 1/2") == 2                                                    # C2F's and SIM's
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.pt"))
    assert len(files) == len(list((tmp_path / "2").rglob("*.pt"))) >= 20
    for file in files:
        one, two = ({key: value.double() for key, value in tensors(torch.load(tmp_path / n / file, weights_only=True))}
                    for n in "12")
        assert one.keys() == two.keys()
        for key in one:
            difference = (one[key] - two[key]).abs()
            if "-" in file.stem and one[key].frac().count_nonzero() == 0:          # counts: pixels at the edge of a bin
                moved = (one[key].flatten().cumsum(0) - two[key].flatten().cumsum(0)).abs()
                assert moved[-1] == 0 and moved.max() <= 0.005 * one[key].sum(), (file, key, moved.max())
            else:
                close = torch.isclose(one[key], two[key], rtol=1e-3, atol=2e-5, equal_nan=True)
                assert close.float().mean() > 0.999, (file, key, difference.max())
    for script in FLAGS:
        one, two = ((tmp_path / n / f"{script}-gta5") for n in "12")
        lines = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
        assert len(lines[0]) == len(lines[1])                                    # one process writes
        for a, b in zip(*lines):
            numbers = [key for key, value in a.items() if isinstance(value, float) and key != "seconds"]
            assert [a[key] for key in numbers] == pytest.approx([b[key] for key in numbers], rel=1e-3, abs=1e-4), (script, a, b)
        pictures = [sorted(path.relative_to(folder) for path in folder.rglob("*.png")) for folder in (one, two)]
        assert pictures[0] == pictures[1]                                        # every label and map exists
        matrices = [[test["matrix"] for tests in json.loads((folder / "results.json").read_text()).values()
                     for test in tests.values()] for folder in (one, two)]
        for a, b in zip(*map(torch.tensor, matrices)):
            assert a.sum() == b.sum() and (a - b).abs().sum() <= 0.01 * a.sum()


def test_a_process_that_fails_ends_the_run(city, tmp_path):
    """With its message and without a hang, whichever process fails."""
    shutil.copytree(city, tmp_path / "data")
    image = find_pairs(tmp_path / "data", "cityscapes", "val")[1].image           # evaluated by the second process
    image.write_bytes(image.read_bytes()[:100])
    process = start(2, tmp_path / "data", tmp_path / "runs", "fada")
    printed, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and f"(process 1): error: cannot read {image}" in errors, errors
    assert (tmp_path / "runs/fada-gta5/source.pt").exists()                       # the finished stage is kept


def test_sigterm_to_all_processes_leaves_a_checkpoint(city, tmp_path):
    """As when a scheduler ends a job and torchrun forwards the signal: both processes stop after the same iteration."""
    process = start(2, city, tmp_path, "fada --source-iterations 5000 --save-every 5000")
    for line in process.stdout:
        if line.startswith("source 2/5000"):
            break
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "source.pt" not in os.listdir(tmp_path / "fada-gta5"), errors
    stopped = torch.load(tmp_path / "fada-gta5/last.pt", weights_only=True)
    assert stopped["stage"] == "source" and 2 <= stopped["iteration"] < 5000
    assert f"source {stopped['iteration']}/5000" in printed and "stopped; resume with" in printed, (printed, errors)


@pytest.mark.parametrize("script", FLAGS)
def test_two_processes_killed_at_random_moments(script, city, tmp_path, soak):
    """SIGTERM to torchrun, or kill -9 of it and of both processes: restarted, they end bit for bit as undisturbed ones."""
    if not soak:
        pytest.skip("takes minutes: --soak")
    begin, undisturbed = time.monotonic(), start(2, city, tmp_path / "undisturbed", f"{script} --save-every 1")
    printed, errors = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, errors
    seconds, rng = time.monotonic() - begin, random.Random(script)
    for number in [signal.SIGTERM, signal.SIGKILL] * 4:
        process = start(2, city, tmp_path / "killed", f"{script} --save-every 1")
        time.sleep(rng.uniform(0.3, 0.9) * seconds)
        family = [process.pid, *children(process.pid)]
        for pid in family if number == signal.SIGKILL else family[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        process.communicate(timeout=120)
    process = start(2, city, tmp_path / "killed", f"{script} --save-every 1")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_end(tmp_path / f"killed/{script}-gta5", tmp_path / f"undisturbed/{script}-gta5")


if __name__ == "__main__":
    main(*sys.argv[1:])
