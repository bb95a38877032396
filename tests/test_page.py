"""The results page: the arithmetic by hand, what is collected from a run, the committed page against the committed files."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from common import page
from common.files import UserError

ROOT = Path(page.__file__).parents[1]


def test_paired_differences_and_the_share_of_the_gap():
    method, control, target = {0: 30.0, 2: 36.0, 1: 33.0}, {0: 28.0, 1: 34.0, 2: 32.0, 3: 90.0}, {0: 48.0, 1: 44.0, 2: 42.0}
    assert page.paired(method, control) == [2.0, -1.0, 4.0]                 # in the order of the seeds, those of both
    assert page.gap_share(method, control, target) == pytest.approx(5 / 40)   # not the mean of 2/20, -1/10 and 4/10
    assert page.gap_share(method, control, {0: 47.0}) == pytest.approx(5 / 47)                  # of the target one seed
    assert page.gap_share(method, control, {}) is None and page.gap_share(method, control, {0: 28.0}) is None
    assert page.mean_and_range([2.0, -1.0, 4.0]) == "+1.7 (-1.0 to +4.0)" and page.mean_and_range([]) == "-"
    assert page.mean_and_range([0.5], 2) == "+0.50" and page.mean_and_range([1.0, 2.0], sign="") == "1.5 (1.0 to 2.0)"
    assert page.mean_and_range([-0.04]) == "+0.0"


def test_scores_are_over_the_classes_that_the_labels_have():
    matrix = [[6, 2, 0], [1, 3, 1], [0, 0, 0]]                              # class 2 is only ever predicted
    assert page.class_scores(matrix) == pytest.approx([100 * 6 / 9, 100 * 3 / 7, None])
    assert page.mean_score(matrix) == pytest.approx(50 * (6 / 9 + 3 / 7))


def test_accuracy_and_coverage_of_pseudo_labels():
    accuracy, coverage, classes = page.label_quality([[6, 2, 0, 2], [1, 3, 1, 5], [0, 0, 0, 0]])
    assert (accuracy, coverage) == (100 * 9 / 13, 100 * 13 / 20)
    assert classes == [[100 * 6 / 7, 80.0], [60.0, 50.0], [0.0, None]]
    assert page.label_quality([[0, 0, 4], [0, 0, 1]]) == (0.0, 0.0, [[None, 0.0], [None, 0.0]])


def matrix(right: int) -> list[list[int]]:
    """Two classes of 100 pixels each, `right` of each predicted right: IoU right / (200 - right) in both."""
    return [[right, 100 - right], [100 - right, right]]


def run(script: str, variant: str, seed: int, **stages: int) -> dict:
    return {"script": script, "pair": "toy", "variant": variant, "seed": seed, "classes": ["road", "sky"], "log": [],
            "stages": {stage: {"single-scale": {"matrix": matrix(right)}} for stage, right in stages.items()}}


@pytest.fixture
def pairs() -> dict:
    runs = [run("fada", "source", 0, source=40), run("fada", "control", 0, adversarial=50),
            run("fada", "fada", 0, adversarial=80), run("fada", "control", 1, adversarial=40),
            run("fada", "fada", 1, adversarial=50), run("fada", "target", 0, source=100),
            run("fada", "target", 1, source=100), run("sim", "control", 0, step1=50), run("sim", "sim", 0, step1=40, step2=50)]
    features = {"class center distance": {"source": 1.0, "target": 3.0, "both": 2.0},
                "discriminator": {"source": 0.75, "target": 0.5},
                "stage1, before": {"own": 2.0, "other": 4.0, "right": 0.9}}
    runs[2]["diagnosis"] = {"labels": {"a/b": [[6, 2, 2], [1, 3, 6]]}, "features": {"adversarial": features}}
    runs[4]["diagnosis"] = {"labels": {"a/b": [[8, 0, 2], [0, 2, 8]]}, "features": {"adversarial": features}}
    runs[1]["diagnosis"] = {"labels": {"a/b": [[1, 0, 1], [0, 1, 1]]}}
    return {"toy": {(r["script"], r["variant"], r["seed"]): r for r in runs}}


def test_tables(pairs):
    # IoU in percent: 40 -> 25.0, 50 -> 33.3, 80 -> 66.7, 100 -> 100
    assert page.gains(pairs).splitlines() == [
        "| method | gain, toy city | gap closed |", "| --- | --- | --- |",
        "| FADA, adversarial | +20.8 (+8.3 to +33.3) | 29 % |",             # 41.67 of 66.67 + 75
        "| CAG, stage 2 | - | - |", "| C2F, alignment | - | - |", "| C2F, step 2 | - | - |",
        "| BiSMAP, self-training | - | - |", "| SIM, step 2 | +0.0 | 0 % |"]
    no_target = {key: run for key, run in pairs["toy"].items() if key[1] != "target"}
    assert [row.count("|") for row in page.gains({"i2v": no_target, **pairs}).splitlines()] == [5] * 8
    assert page.gains({"i2v": no_target}).splitlines()[2] == "| FADA, adversarial | +20.8 (+8.3 to +33.3) |"
    rows = page.all_rows(pairs, "toy").splitlines()                         # no row for a run that is not there
    assert rows[2:] == ["| **source only**, v2 | 25.0 | 25.0 |  |  |",
                         "| FADA: control, as long as adversarial | 29.2 | 33.3 25.0 |  |  |",
                         "| **FADA**, adversarial | 50.0 | 66.7 33.3 | +20.8 (+8.3 to +33.3) | 29 % |",
                         "| SIM: control, as long as step 1 | 33.3 | 33.3 |  |  |",
                         "| **SIM**, step 1 | 25.0 | 25.0 | -8.3 | -12 % |", "| **SIM**, step 2 | 33.3 | 33.3 | +0.0 | 0 % |",
                         "| target only, v2 | 100.0 | 100.0 100.0 |  |  |"]
    head, _, *rows = page.per_class(pairs, "toy", "FADA").splitlines()
    assert head == "| class | source only | control, adversarial | adversarial | gain |"     # no second setting was run
    assert rows == [f"| {name} | 25.0 | 29.2 | 50.0 | +20.8 (+8.3 to +33.3) |" for name in ("road", "sky")]
    assert page.labels(pairs, "toy").splitlines()[2:] == [                  # 9 of 12 and 10 of 10; 12 and 10 of 20
        "| FADA control, a/b | 100.0 | 50.0 | 100.0 |",
        "| FADA, a/b | 87.5 (75.0 to 100.0) | 55.0 (50.0 to 60.0) | 86.4 (72.9 to 100.0) |"]
    assert page.label_classes(pairs, "toy").splitlines()[2:] == ["| road | 92.9 / 80.0 |", "| sky | 80.0 / 30.0 |"]
    assert page.features(pairs, "toy").splitlines()[2:] == [
        "| FADA, adversarial | 1.00 (1.00 to 1.00) | 3.00 (3.00 to 3.00) | 2.00 (2.00 to 2.00) | 75.0 | 50.0 |"]
    assert page.distances(pairs, "toy").splitlines()[2:] == [
        "| FADA, stage1, before: adversarial | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) | 0.50 (0.50 to 0.50) | "
        "90.0 (90.0 to 90.0) |"]


def test_only_the_tables_of_a_page_change(pairs, tmp_path):
    text = ("before\n\n<!-- table: gains -->\n| old |\n| row |\n\nbetween\n<!-- table: classes toy SIM -->\nafter | bar\n"
            "<!-- results: begin -->\nold\n<!-- results: end -->\nend\n")
    new = page.filled(text, pairs)
    assert new == ("before\n\n<!-- table: gains -->\n" + page.gains(pairs) + "\nbetween\n<!-- table: classes toy SIM -->\n"
                   + page.per_class(pairs, "toy", "SIM") + "after | bar\n<!-- results: begin -->\n\n" + page.gains(pairs)
                   + "\n<!-- results: end -->\nend\n")
    assert page.filled(new, pairs) == new
    with pytest.raises(UserError, match="no table 'gain'; the tables are gains, rows"):
        page.filled("<!-- table: gain toy -->\n", pairs)
    page.draw(pairs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def run_folder(root: Path, name: str, images: str = "a", **more) -> Path:
    folder = root / name
    folder.mkdir()
    config = {"method": "cag", "source": "gta5", "seed": 2, "margin": 2.3, "init": "/home/me/net.pth",
              "from_": "/home/me/runs/c2f-gta5-toy-source-2/step0.pt", "lengths": {"warmup": 3},
              "images": {"target val": {"images": 4, "names": images}},
              "made": {"torch": "2", "torchvision": "0", "commit": "c", "date": "d", "host": "mine", "data": "/home/me/data"}}
    (folder / "config.json").write_text(json.dumps(config))
    entry = {"mIoU": 0.25, "mIoU present": 0.25, "iou": {"road": 0.25, "sky": 0.25}, "matrix": matrix(40)}
    (folder / "results.json").write_text(json.dumps({"warmup": {"single-scale": entry}}))
    lines = [{"stage": "warmup", "iteration": 0, "margin": 2.3}, {"stage": "warmup", "iteration": 1, "rate": 1.0, "ce": 3.0},
             {"stage": "warmup", "iteration": 2, "miou": {"mIoU present": 20.0}},
             {"stage": "warmup", "iteration": 3, "rate": 0.5, "ce": 2.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_collect(tmp_path):
    results = tmp_path / "docs/results"
    path = page.collect(run_folder(tmp_path, "cag-gta5-toy-cag-wide-2"), results)
    assert path == results / "toy/cag-cag-wide-2.json"
    content, text = json.loads(path.read_text()), path.read_text()
    assert "/home" not in text and "mine" not in text
    assert content["settings"] == {"source": "gta5", "margin": 2.3, "init": "net.pth",
                                   "from_": "c2f-gta5-toy-source-2/step0.pt"}
    assert content["stages"] == {"warmup": {"single-scale": {"mIoU": 0.25, "mIoU present": 0.25, "matrix": matrix(40)}}}
    assert [line["iteration"] for line in content["log"]] == [0, 2, 3] and content["classes"] == ["road", "sky"]
    pairs = page.read(results)
    assert page.scores(pairs["toy"], "cag cag-wide warmup") == {2: pytest.approx(25.0)}
    assert page.curve(pairs, "toy") == "| iteration | cag cag-wide, seed 2 |\n| --- | --- |\n| 2 | 20.0 |\n"
    with pytest.raises(UserError, match="tested on other images"):
        page.collect(run_folder(tmp_path, "cag-gta5-toy-control-2", images="b"), results)
    assert page.collect(tmp_path / "cag-gta5-toy-control-2", results, "other").parent.name == "other"
    for name in ("cag-gta5-toy-2", "cag-gta5-toy-cag-1", "fada-gta5-toy-fada-2"):        # no variant; another seed, script
        with pytest.raises(UserError, match="no run folder named SCRIPT-SOURCE"):
            page.collect(run_folder(tmp_path, name), results)
    folder = run_folder(tmp_path, "cag-gta5-toy-begun-2")
    (folder / "results.json").unlink()
    assert page.collect(folder, results) is None


def test_main_collects_and_writes(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("<!-- table: rows toy -->\n")
    argv = ["--root", str(tmp_path), str(run_folder(tmp_path, "cag-gta5-toy-cag-2"))]
    page.main(argv)
    assert "| **CAG**, warm-up | 25.0 | 25.0 | - | - |" in (tmp_path / "docs/results.md").read_text()
    assert (tmp_path / ".github/results.png").exists() and "tables:" in capsys.readouterr().out
    page.main(argv)
    assert "tables:" not in capsys.readouterr().out                         # nothing is new


# ------------------------------------------------------------------------------------- what is committed


def test_the_committed_page_is_what_the_committed_files_say():
    pairs = page.read(ROOT / "docs/results")
    for path in (ROOT / "docs/results.md", ROOT / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert page.filled(text, pairs) == text, f"{path}: python -m common.page writes it again"


def test_the_committed_scores_follow_from_their_matrices():
    """By numpy alone, without the code that wrote them."""
    for path in (ROOT / "docs/results").glob("*/*-*.json"):
        content = json.loads(path.read_text())
        assert path == ROOT / f"docs/results/{content['pair']}/{content['script']}-{content['variant']}-{content['seed']}.json"
        for stage, tests in content["stages"].items():
            for entry in tests.values():
                counts = np.array(entry["matrix"], dtype=float)
                hit, occurs = counts.diagonal(), counts.sum(axis=1) > 0
                miou = (hit / np.maximum(1, counts.sum(axis=0) + counts.sum(axis=1) - hit))[occurs].mean()
                assert miou == pytest.approx(entry["mIoU present"], abs=1e-12), (path, stage)
                assert occurs.sum() == (19 if "toy" in content["pair"] else 11), path   # classes of both domains


def test_the_committed_gains_by_hand():
    """The cells of the first table, from the stored means and numpy."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    scores = {}
    for path in (ROOT / "docs/results/i2c").glob("*-*.json"):
        content = json.loads(path.read_text())
        for stage, tests in content["stages"].items():
            scores[content["script"], content["variant"], content["seed"], stage] = 100 * tests["single-scale"]["mIoU present"]
    rows = (("FADA, adversarial", "fada", "adversarial", "adversarial"), ("CAG, stage 2", "cag", "stage2", "stage2"),
            ("C2F, step 2", "c2f", "step2", "step2"), ("BiSMAP, self-training", "bismap", "selftrain", "selftrain"),
            ("SIM, step 2", "sim", "step2", "step1"))
    for row, script, stage, reference in rows:
        gains = [scores[script, script, seed, stage] - scores[script, "control", seed, reference] for seed in range(3)
                 if {(script, script, seed, stage), (script, "control", seed, reference)} <= scores.keys()]
        cell = re.search(rf"^\| {row} \| ([^|]*) \|", text, re.MULTILINE)
        if gains:
            shown = [float(number) for number in re.findall(r"[+-]\d+\.\d+", cell[1])]
            expected = [statistics.fmean(gains), min(gains), max(gains)] if len(gains) > 1 else gains
            assert shown == pytest.approx(expected, abs=0.051), row


def test_the_committed_files_are_small_and_name_no_machine():
    files = [path for path in (ROOT / "docs/results").rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) < 1_500_000
    for path in files:
        assert path.suffix == ".json" and not re.search(r"\"/|[A-Z]:\\|/(?:root|home|work|tmp)/", path.read_text()), path
