"""Your own data set with your own classes, in every script, from the example in docs/data.md."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import noise, write_png
from test_scripts import SCRIPTS, STAGES, arguments

import sim
from common import layouts
from common.data import read_label
from common.files import UserError
from common.run import Options, Run

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1]
COMMAND = shlex.split(re.search(r"```sh\npython fada.py (.*?)```", PAGE, re.DOTALL)[1])
FILES = re.findall(r"data/((?:rendered|camera)/(?:images|labels)/\S+)", PAGE)
IDS = np.array([0, 1, 2, 3, 10, 11, 12, 4, 255])                 # in the example: soil twice, crop, weed, sky, machine twice
INDICES = np.array([0, 0, 1, 2, 3, 4, 4, 255, 255])


def make(root: Path) -> Path:
    """Write the example's layout with more images, and its classes file. Returns: the folder above data/."""
    (root / "classes.json").write_text(EXAMPLE)
    for name in FILES:
        stem = Path(name)
        for k in range(8 if "train" in name else 3):
            path = root / "data" / stem.with_name(f"{int(stem.stem) + k:04}{stem.suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = IDS[noise(4, 8, k)[..., 0] % 9].repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
            if stem.suffix == ".png":
                write_png(path, ids, 0)
            else:
                Image.fromarray(np.stack([20 * ids] * 3, -1) // 2 + noise(32, 64, k) // 4).save(path)
    return root


def test_the_page_shows_where_the_files_lie():
    assert len(FILES) == 5 and {name.rsplit("/", 1)[0].split("/field1")[0] for name in FILES} == {
        "rendered/images/train", "rendered/labels/train", "camera/images/train", "camera/images/val", "camera/labels/val"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_own_set_of_five_classes_trains_in_every_script(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make(tmp_path))
    module = importlib.import_module(script)
    small = arguments(script, Path("data"), tmp_path / "runs")
    module.main([*COMMAND, *small, "--source-size", "64x32", "--target-size", "64x32"])
    folder = tmp_path / "runs" / f"{script}-rendered"
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == STAGES[script]
    for tests in results.values():
        for result in tests.values():
            assert list(result["iou"]) == ["soil", "crop", "weed", "sky", "machine"] and np.shape(result["matrix"]) == (5, 5)
            assert result["mIoU plants"] == pytest.approx(np.mean([result["iou"]["crop"], result["iou"]["weed"]]))
            assert sum(map(sum, result["matrix"])) == sum(                                     # all labelled pixels, no others
                int((INDICES[noise(4, 8, k)[..., 0] % 9] < 255).sum()) * 64 for k in range(3))
    assert "source train (rendered): % in 8 labels: " in capsys.readouterr().out

    (tmp_path / "classes.json").unlink()                         # the run knows its classes without the file
    stored = json.loads(json.loads((folder / "config.json").read_text())["classes"])
    assert stored["names"] == ["soil", "crop", "weed", "sky", "machine"] and stored["stuff"] == ["soil", "sky"]
    last = STAGES[script][-1]
    module.main(["--source", "rendered", "--target", "camera", "--runs", str(tmp_path / "runs"), "--eval", "--workers", "0",
                 "--source-size", "64x32", "--target-size", "64x32"])
    assert f"{100 * next(iter(results[last].values()))['mIoU plants']:.1f}" in capsys.readouterr().out


def test_the_content_of_a_classes_file_defines_the_run_and_its_name_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(make(tmp_path))
    argv = [*COMMAND, *arguments("sim", Path("data"), tmp_path / "runs"), "--source-size", "64x32", "--target-size", "64x32",
            "--stage", "step1"]
    sim.main(argv)
    Path("renamed.json").write_text(json.dumps(json.loads(EXAMPLE), indent=4))
    sim.main([*argv, "--classes", "renamed.json"])
    assert "step1: finished before" in capsys.readouterr().out
    Path("classes.json").write_text(EXAMPLE.replace('"ignore": [4]', '"ignore": [4, 5]'))
    with pytest.raises(SystemExit):
        sim.main(argv)
    assert "holds a run with other settings: --classes (" in capsys.readouterr().err


def test_stuff_comes_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path))
    names = ["soil", "crop", "weed", "sky", "machine"]
    for stuff, expected in ((["soil", "sky"], [0, 3]), ([], [])):
        Path("classes.json").write_text(json.dumps({**json.loads(EXAMPLE), "stuff": stuff}))
        classes = layouts.classes_of(Options(source="rendered", target="camera", classes="classes.json"))
        run = type("Run", (), {"classes": classes, "device": "cpu"})
        banks = sim.make_banks(run, sim.Config(), 4)
        assert [bank.classes for bank in banks] == [expected, [k for k in range(5) if k not in expected]]
        assert classes.names == tuple(names)


def test_file_ids_in_both_forms_and_in_known_data_sets(tmp_path):
    path = write_png(tmp_path / "x.png", IDS[None].astype(np.uint8), 0)
    as_object = {"0": 0, "1": 0, "2": 1, "3": 2, "10": 3, "11": 4, "12": 4, "4": 255}
    for content in (json.loads(EXAMPLE), {**json.loads(EXAMPLE), "ids": as_object, "ignore": []}):
        (tmp_path / "c.json").write_text(json.dumps(content))
        classes = layouts.classes_of(Options(source="a", target="b", classes=str(tmp_path / "c.json")))
        assert read_label(path, "a", classes)[0].tolist() == INDICES.tolist()
        assert classes.means == {"mIoU": (0, 1, 2, 3, 4), "mIoU plants": (1, 2)} and len(classes) == 5
    write_png(path, np.array([[7, 0]], np.uint8), 0)
    with pytest.raises(UserError, match='x.png has ids that a does not define: 7; add them to "ids" or "ignore"'):
        read_label(path, "a", classes)
    del content["ids"], content["ignore"]                        # without them, the index is the id
    (tmp_path / "c.json").write_text(json.dumps(content))
    classes = layouts.classes_of(Options(source="a", target="b", classes=str(tmp_path / "c.json")))
    assert read_label(write_png(path, np.array([[4, 0, 255]], np.uint8), 0), "a", classes).tolist() == [[4, 0, 255]]


def test_known_sets_with_own_classes(city, tmp_path, monkeypatch):
    """GTA5 and Cityscapes with two classes: ids that the file does not name get no class."""
    content = {"names": ["ground", "car"], "colors": [[1, 2, 3], [0, 0, 142]], "ids": [[7, 8], [26]]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    options = Options(data=str(city), runs=str(tmp_path), classes=str(tmp_path / "c.json"), workers=0)
    run = Run("x", Options(), options, {"one": 1})
    for domain, split in (("source", "train"), ("target", "val")):
        images = run.images(domain, split)
        for k, pair in enumerate(images.pairs):
            ids = np.array(Image.open(pair.label))
            assert np.array_equal(images[k][1].numpy(), np.select([(ids == 7) | (ids == 8), ids == 26], [0, 1], 255))


@pytest.mark.parametrize("change, words", [
    ("names = ['a']", '"names" must list two'), ("names = ['soil'] * 5", "different names"), ("colors = [[1]]", "5 different"),
    ("colors[0] = [0, 0, 256]", "0..255"), ("colors[0] = colors[1]", "different colours"), ("ids = [[1]]", "5 lists of file"),
    ("ids[0] = [300]", "has|have 300"), ("ids[1] = [0]", "file id 0 occurs twice"), ("ids = {'0': 7}", "index 7"),
    ("ids = {'road': 0}", "'road'"), ("ids[2] = []", "no file id for weed"), ("ignore = 4", '"ignore" must list'),
    ("stuff = ['sea']", '"stuff" must list'), ("means = {'plants': ['crop']}", '"means" must be an object with "mIoU"'),
    ("means['mIoU'] = ['sea']", '"means"'), ("colours = 1", "colours is none of names, colors"), ("ids[0] = [True]", "True"),
])
def test_invalid_classes_files_are_refused(tmp_path, change, words):
    content = copy.deepcopy(json.loads(EXAMPLE))
    space = {**content}
    exec(change, {}, space)                                      # noqa: S102 (text of this file)
    (tmp_path / "c.json").write_text(json.dumps(space))
    with pytest.raises(UserError, match=words) as error:
        layouts.classes_of(Options(source="a", target="b", classes=str(tmp_path / "c.json")))
    assert "docs/data.md" in str(error.value) and str(tmp_path / "c.json") in str(error.value)


def test_unreadable_classes_files_and_wrong_combinations_are_refused(tmp_path):
    for text in ("", "[]", "{"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match="c.json.*docs/data.md has an example"):
            layouts.classes_of(Options(source="a", target="b", classes=str(tmp_path / "c.json")))
    with pytest.raises(UserError, match="missing.json cannot be read"):
        layouts.classes_of(Options(source="a", target="b", classes=str(tmp_path / "missing.json")))
    (tmp_path / "c.json").write_text(EXAMPLE)
    for given, words in (({"label_ids": "train"}, "--label-ids train is for Cityscapes' classes"),
                         ({"source": "synthia", "target": "cityscapes"}, "SYNTHIA's ids differ from those of cityscapes"),
                         ({"source": "../a"}, "--source ../a is none of")):
        with pytest.raises(UserError, match=re.escape(words)):
            layouts.classes_of(Options(**{"source": "a", "target": "b", "classes": str(tmp_path / "c.json"), **given}))
