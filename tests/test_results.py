"""The table of results: runs of a stand-in script, finished ones not repeated, the arithmetic of the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cag
from common import results
from common.cli import parse
from common.run import Options

SCRIPT = r'''
import json, pathlib, sys

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--toy"]
    argv = dict(zip(words[::2], words[1::2]))
    if "--from" in argv:
        assert pathlib.Path(argv["--from"]).exists(), argv
    if argv["--score"] == "0.2" and argv["--seed"] == "7":
        sys.exit(2)
    folder = pathlib.Path(argv["--runs"]) / f"stand_in-{argv.get('--source', 'gta5')}-{argv['--tag']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "one.pt").touch()
    (folder / "config.json").write_text(json.dumps({"score": float(argv["--score"]), "seed": int(argv["--seed"]),
                                                    "source": argv.get("--source", "gta5"), "from_": argv.get("--from"),
                                                    "toy": "--toy" in sys.argv}))
    score = float(argv["--score"]) + 0.01 * int(argv["--seed"]) + 0.05 * (argv["--stage"] == "three")
    file = folder / "results.json"
    finished = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(finished | {argv["--stage"]: {"single-scale": {"mIoU present": score}}}))
    with open(folder / "log.jsonl", "a") as file:
        file.write("".join(json.dumps({"stage": argv["--stage"], "iteration": it, "seconds": 3}) + "\n" for it in (10, 30)))
    with open(folder / "started", "a") as file:
        file.write(argv["--stage"][:2])
    sys.exit(0)                                                  # before torch is imported

import dataclasses
from common.cli import option

@dataclasses.dataclass
class Config:
    score: float = option(0.0, "score")

TOY = {}
'''
ROWS = {"low": ("one", "--score 0.2"), "middle (x)": ("two", "--score 0.3 --from {low}/one.pt"),
        "middle, later": ("one three", "--score 0.3 --from {low}/one.pt"), "high": ("one", "--score 0.4")}


HEAD = ["| | mIoU present | each seed | gap closed |", "|---|---|---|---|"]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(results.__file__).parents[1]))
    monkeypatch.delitem(sys.modules, "stand_in", raising=False)
    monkeypatch.setitem(results.RESULTS, "stand_in", ROWS)
    return tmp_path / "runs"


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_rows_seeds_and_table(stand_in, capfd, jobs):
    argv = ["stand_in", "--seeds", "0", "2", "--name", "t", "--jobs", jobs, "--", "--source", "synthia"]
    for times in (1, 2):
        results.main(argv)
        out, log = capfd.readouterr()
        assert log.count("finished") == (6 if times == 1 else 0)           # finished runs are not repeated
        assert out.splitlines() == [
            *HEAD, "| low | 21.0 ± 1.4 | 20.0 22.0 | 0 % |", "| middle (x) | 31.0 ± 1.4 | 30.0 32.0 | 50 % |",
            "| middle, later, one | 31.0 ± 1.4 | 30.0 32.0 | 50 % |",
            "| middle, later, three | 36.0 ± 1.4 | 35.0 37.0 | 75 % |",
            "| high | 41.0 ± 1.4 | 40.0 42.0 | 100 % |"]
        assert (stand_in / "stand_in-synthia-t-middle-x-2/started").read_text() == "twonth"    # one run, three stages
    assert not (stand_in / "stand_in-synthia-t-middle-later-2").exists()
    results.main([*argv[:8], "--rows", "middle, later"])         # the run is named by a row that is not chosen
    assert capfd.readouterr().out.splitlines()[3:] == ["| middle, later, three | 36.0 ± 1.4 | 35.0 37.0 | - |"]
    results.main([*argv[:8], "--rows", "middle (x)"])            # needs "low"; the gap has no meaning
    assert capfd.readouterr().out.splitlines()[2:] == ["| middle (x) | 31.0 ± 1.4 | 30.0 32.0 | - |"]


def test_what_is_refused(stand_in, monkeypatch, capsys):
    for wrong, words in ((["stand_in", "--rows", "lowest"], "unknown row 'lowest'"), (["stand_on"], "no script stand_on.py"),
                         (["pair", "--", "--data", "x"], "'bismap control' needs --init FILE behind --")):
        with pytest.raises(SystemExit) as stop:
            results.main(wrong)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    results.main(["stand_in", "--seeds", "0", "--rows", "low"])
    monkeypatch.setitem(results.RESULTS, "stand_in", {"low": ("one", "--score 0.9")})
    with pytest.raises(SystemExit):                              # not the score of other settings
        results.main(["stand_in", "--seeds", "0"])
    assert "stand_in-gta5-toy-low-0 holds a run with other settings: --score (0.2 -> 0.9)" in capsys.readouterr().err


def test_a_failed_run_stops_only_runs_that_need_it(stand_in, capfd):
    argv = ["stand_in", "--seeds", "7", "0", "--name", "t"]
    results.main([*argv, "--show"])
    assert [line.split() for line in capfd.readouterr().out.splitlines()[::5]] == [
        ["open", "0.0", "min", "stand_in-gta5-t-low-7"], ["open", "0.0", "min", "stand_in-gta5-t-high-0"]]
    assert not stand_in.exists()
    with pytest.raises(SystemExit) as stop:
        results.main(argv)
    log = capfd.readouterr().err
    assert stop.value.code == 2 and "stand_in-gta5-t-low-7 failed; fix it" in log and "run 1 of 6 FAILED: open" in log
    assert "run 4 of 6: finished     4.5 min  stand_in-gta5-t-middle-x-0" in log     # 3 stages of 30 iterations, 3 s each
    assert {path.name for path in stand_in.iterdir()} == {f"stand_in-gta5-t-{run}" for run in (
        "low-0", "middle-x-0", "high-7", "high-0")}
    (stand_in / "stand_in-gta5-t-middle-x-0/results.json").write_text('{"one": {}, "two": {}}')    # killed in its last
    results.main([*argv, "--show"])
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [
        "open", "finished", "open", "begun", "finished", "finished"]
    with pytest.raises(SystemExit):
        results.main(argv)
    assert (stand_in / "stand_in-gta5-t-middle-x-0/started").read_text() == "twonthth"
    assert (stand_in / "stand_in-gta5-t-low-0/started").read_text() == "on"


def test_without_arguments_the_toy_city_and_fada(monkeypatch, capsys):
    results.main(["--show", "--runs", "nowhere", "--seeds", "5"])
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        f"fada-gta5-toy-{row}-5" for row in ("source-only", "source-only-as-long", "fada", "target-only-upper-bound")]


def test_the_rows_of_a_pair_are_what_the_scripts_take(capsys):
    rows = results.RESULTS["pair"]
    argv = ["pair", "--name", "p", "--runs", "nowhere", "--seeds", "1", "--margin", "2.5", "--epochs", "3", "--",
            "--data", "d", "--init", "i", "--target-size", "192x144"]
    jobs = results.queue(*parsed(argv))
    for (row, _), job in jobs.items():
        control, source = row.split()[1] == "control", [need[0] for need in job.needs]
        stage_names = {"fada": ("source",), "c2f": ("step0",)}.get(source[0].split()[0]) if source else ()
        assert all(flag in job.argv for flag in ("--source-size", "--amp", "--init")) and job.stages, row
        assert [f"nowhere/{need.split()[0]}-gta5-p-{need.split()[1]}-1/{stage_names[0]}.pt" for need in source] == [
            job.argv[k + 1] for k, flag in enumerate(job.argv) if flag == "--from"]
        if control:                                              # differs from the method in weights and terms alone
            method = jobs[f"{job.script} {job.script}", 1]
            assert set(job.stages) <= set(method.stages)
            extra = set(job.argv) - set(method.argv) - {"0", "none", "p-control-1"}
            assert extra <= {"--lambda-adv", "--lambda1", "--lambda2", "--lambda-pseudo", "--lambda-triplet",
                             "--lambda-consist", "--lambda-ci", "--no-ssl", "--no-stm", "--no-distill", "--assign"}, row
    cfg, options = parse("cag.py", "", (cag.Config, Options), jobs["cag control", 1].argv, {})
    assert (cfg.margin, cfg.warmup_epochs, cfg.stage_epochs, cfg.lambda1) == (2.5, 3, 3, 0)
    assert str(options.target_size) == "192x144"                # the flags behind -- come after the first pair's
    assert len(jobs) == len(rows) == 16 and not Path("nowhere").exists()


def parsed(argv):
    """The arguments that `results.main` passes to `results.queue`."""
    seen = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(results, "queue", lambda *args: seen.append(args) or next(iter(())))
        results.main(argv)
    return seen[0]
