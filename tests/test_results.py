"""The table of results: runs of a stand-in script, finished ones not repeated, the arithmetic of the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common import results

SCRIPT = '''
import json, pathlib, sys

if __name__ == "__main__":
    argv = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if "--from" in argv:
        assert pathlib.Path(argv["--from"]).exists(), argv
    if argv["--score"] == "0.2" and argv["--seed"] == "7":
        sys.exit(2)
    folder = pathlib.Path(argv["--runs"]) / f"stand_in-{argv.get('--source', 'gta5')}-{argv['--tag']}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "one.pt").touch()
    score = {"mIoU present": float(argv["--score"]) + 0.01 * int(argv["--seed"])}
    stages = {name: {"single-scale": score} for name in ("one", "two")}
    stages["three"] = {"single-scale": {"mIoU present": score["mIoU present"] + 0.05}}
    (folder / "results.json").write_text(json.dumps(stages))
    with open(folder / "started", "a") as file:
        file.write("x")
    sys.exit(0)                                                  # before torch is imported

import dataclasses
from common.cli import option

@dataclasses.dataclass
class Config:
    score: float = option(0.0, "score")

TOY = {}
'''
ROWS = {"low": ("one", "--score 0.2"), "middle (x)": ("two", "--score 0.3 --from {low}/one.pt"),
        "middle, later": ("three", "--score 0.3 --from {low}/one.pt"), "high": ("one", "--score 0.4")}


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_rows_seeds_and_table(tmp_path, monkeypatch, capsys, jobs):
    (tmp_path / "stand_in.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(results.__file__).parents[1]))
    monkeypatch.delitem(sys.modules, "stand_in", raising=False)
    monkeypatch.setitem(results.RESULTS, "stand_in", ROWS)
    argv = ["stand_in", "--seeds", "0", "2", "--name", "t", "--jobs", jobs, "--", "--source", "synthia"]
    for times in (1, 2):                                         # the script itself ends at once where a run is finished
        results.main(argv)
        assert capsys.readouterr().out.splitlines() == [
            "| | mIoU present | each seed | gap closed |", "|---|---|---|---|", "| low | 21.0 ± 1.4 | 20.0 22.0 | 0 % |",
            "| middle (x) | 31.0 ± 1.4 | 30.0 32.0 | 50 % |",
            "| middle, later | 36.0 ± 1.4 | 35.0 37.0 | 75 % |", "| high | 41.0 ± 1.4 | 40.0 42.0 | 100 % |"]
        assert (tmp_path / "runs/stand_in-synthia-t-middle-x-2/started").read_text() == times * "x"    # one run, two rows
    assert not (tmp_path / "runs/stand_in-synthia-t-middle-later-2").exists()
    results.main([*argv[:8], "--rows", "middle, later"])         # the run is named by a row that is not wanted
    assert capsys.readouterr().out.splitlines()[2:] == ["| middle, later | 36.0 ± 1.4 | 35.0 37.0 | - |"]
    results.main([*argv[:8], "--rows", "middle (x)"])            # needs "low"; the gap has no meaning
    assert capsys.readouterr().out.splitlines()[2:] == ["| middle (x) | 31.0 ± 1.4 | 30.0 32.0 | - |"]
    for wrong, words in ((["stand_in", "--rows", "lowest"], "unknown row 'lowest'"), (["stand_on"], "no script stand_on.py"),
                         (["stand_in", "--seeds", "7"], "'low' with seed 7 failed")):
        with pytest.raises(SystemExit) as stop:
            results.main(wrong)
        assert stop.value.code == 2 and words in capsys.readouterr().err
