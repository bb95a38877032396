"""Imperfect data sets through the real command line: what trains, what is refused, and what is printed."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CITY_19, noise, palette_png, write_png

import fada
from common import checks, curves
from common.cli import Size
from common.data import Pair, SegmentationDataset, class_list
from common.files import UserError, load

SMALL = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --workers 0 --log-every 1 --batch-size 2 "
         "--source-iterations 2 --stage source --device cpu").split()
TRAIN_IDS = {i: k for i, k in CITY_19.items()}


@pytest.fixture
def own(city, tmp_path):
    """A copy of the toy city that a test may change."""
    shutil.copytree(city, tmp_path / "data")
    return tmp_path / "data"


def start(capsys, data, *flags, expect=0) -> str:
    """Run `python fada.py`; returns what it prints. expect: its exit status."""
    argv = ["--data", str(data), "--runs", str(data.parent / "runs"), *SMALL, *flags]
    if expect:
        with pytest.raises(SystemExit) as stopped:
            fada.main(argv)
        assert stopped.value.code == expect
    else:
        fada.main(argv)
    done = capsys.readouterr()
    return done.out + done.err


def rewrite(files, change):
    """Replace the ids of label files by change(ids), without a palette."""
    for path in files:
        write_png(path, change(np.array(Image.open(path))), 0)


def to_train_ids(ids: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda i: TRAIN_IDS.get(i, 255))(ids).astype(np.uint8)


def results(data, folder="fada-gta5") -> dict:
    return json.loads((data.parent / "runs" / folder / "results.json").read_text(), parse_constant=pytest.fail)


def trained(data, folder="fada-gta5") -> dict:
    return load(data.parent / "runs" / folder / "source.pt")["state"]["model"]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a | b)


def test_the_shares_of_classes_are_printed_once_per_set(own, capsys):
    printed = start(capsys, own)
    for name in ("source train (gta5)", "target val (cityscapes)"):
        line, = (line for line in printed.splitlines() if line.startswith(f"{name}: % in "))
        shares = [float(part.split()[-1]) for part in line.split(": ", 2)[2].split(", ")]
        assert abs(sum(shares) - 100) < 1 and len(shares) > 5 and "road " in line and "no class " in line
    assert "target train (cityscapes): labels are not used" in printed
    assert printed.index("% in 8 labels") < printed.index("source 1/2")
    assert "differ in size" not in printed
    assert "% in" not in start(capsys, own)                      # finished: nothing to train, nothing to check


@pytest.mark.parametrize("domain", ["source", "target"])
def test_labels_without_a_class_are_refused_before_training(own, capsys, domain):
    folder = own / ("gta5/labels" if domain == "source" else "cityscapes/gtFine/val")
    rewrite(folder.rglob("*.png"), lambda ids: 0 * ids)
    printed = start(capsys, own, expect=2)
    name = "source train" if domain == "source" else "target val"
    assert f"{name}: no pixel of {8 if domain == 'source' else 3} labels has a class; their ids are 0 (" in printed
    assert ("or remove the labels to train without eval" in printed) == (domain == "target") and "source 1/2" not in printed
    assert not list((own.parent / "runs").rglob("*.pt"))


def test_train_ids_instead_of_ids_are_refused_and_the_flag_reads_them(own, capsys, monkeypatch):
    start(capsys, own)
    expected, scores = trained(own), results(own)
    rewrite((own / "gta5/labels").glob("*.png"), to_train_ids)
    monkeypatch.setattr(checks, "ENOUGH", 8 * 64 * 32)           # the number of pixels in these labels
    printed = start(capsys, own, "--tag", "b", expect=2)
    assert "8 labels have ids up to 18 only" in printed and "look like train ids" in printed
    assert "add --label-ids source-train" in printed and "source 1/2" not in printed
    start(capsys, own, "--tag", "c", "--label-ids", "source-train")
    assert same(trained(own, "fada-gta5-c"), expected) and results(own, "fada-gta5-c") == scores
    printed = start(capsys, own, "--tag", "d", "--label-ids", "train", expect=2)       # Cityscapes' are ids
    assert "does not define: " in printed and "omit --label-ids, or use it for one domain only" in printed


def test_train_id_files_beside_the_labels(own, capsys):
    start(capsys, own)
    for path in [*(own / "gta5/labels").glob("*.png"), *(own / "synthia/GT/LABELS").glob("*.png"),
                 *(own / "cityscapes/gtFine").rglob("*_labelIds.png")]:
        ids = own / "gta5/labels" / f"{int(path.stem) + 1:05}.png" if "synthia" in path.parts else path
        train = to_train_ids(np.array(Image.open(ids)))
        write_png(path.with_name(path.name.replace("_labelIds", "").replace(".png", "_labelTrainIds.png")), train, 0)
        write_png(path.with_name(path.stem.replace("_labelIds", "") + "_color.png"), noise(*train.shape), 2)
    start(capsys, own, "--tag", "b", "--label-ids", "train")
    assert same(trained(own, "fada-gta5-b"), trained(own)) and results(own, "fada-gta5-b") == results(own)
    start(capsys, own, "--tag", "c")                             # without the flag they change nothing
    assert same(trained(own, "fada-gta5-c"), trained(own))
    start(capsys, own, "--source", "synthia")
    start(capsys, own, "--source", "synthia", "--tag", "b", "--label-ids", "train")
    assert results(own, "fada-synthia-b").keys() == {"source"}
    for path in (own / "synthia/GT/LABELS").glob("*[0-9].png"):  # 8-bit files of the usual names
        path.with_name(f"{path.stem}_labelTrainIds.png").replace(path)
    assert "must be a 16-bit RGB PNG" in start(capsys, own, "--source", "synthia", "--tag", "c", expect=2)
    start(capsys, own, "--source", "synthia", "--tag", "c", "--label-ids", "source-train")
    assert same(trained(own, "fada-synthia-c"), trained(own, "fada-synthia-b"))


def test_shrunk_png_files_train_the_same(own, capsys):
    """A lossless optimiser makes palette files of grey ones and sorts the palettes."""
    start(capsys, own)
    greys, used = {i: (i, i, i) for i in range(256)}, set()
    for path in (own / "cityscapes/gtFine/val").rglob("*.png"):
        ids = np.array(Image.open(path))
        used |= set(np.unique(ids).tolist())
        order = {i: k for k, i in enumerate(sorted(np.unique(ids).tolist(), reverse=True))}
        palette_png(path, ids, order, greys)
    for path in (own / "gta5/labels").glob("*.png"):
        with Image.open(path) as file:
            ids, palette = np.array(file), np.array(file.getpalette()).reshape(-1, 3)
        order = {i: k for k, i in enumerate(sorted(np.unique(ids).tolist(), reverse=True))}
        palette_png(path, ids, order, {i: palette[i] for i in order})
    printed = start(capsys, own, "--tag", "b")
    assert same(trained(own, "fada-gta5-b"), trained(own)) and results(own, "fada-gta5-b") == results(own)
    assert "the palette's greys are the ids (as in" in printed and "the palette's colours tell the classes (as in" in printed


@pytest.mark.parametrize("fault, words", [
    ("colours", "gtFine_labelIds.png must be an 8-bit PNG with one channel, but Pillow calls it RGB: colours are no ids"),
    ("16 bits", "must be an 8-bit PNG with one channel, but Pillow calls it I;16"),
    ("size", "gtFine_labelIds.png is 32x32, its image "),
])
def test_faults_of_the_validation_set_are_found_before_the_source_stage(own, capsys, fault, words):
    for path in (own / "cityscapes/gtFine/val").rglob("*_labelIds.png"):
        ids = np.array(Image.open(path))
        pixels = {"colours": noise(*ids.shape), "16 bits": ids.astype(np.uint16), "size": ids[:, ::2]}[fault]
        write_png(path, pixels, 2 if fault == "colours" else 0)
    printed = start(capsys, own, expect=2)
    assert words in printed and "source 1/2" not in printed


def test_an_empty_image_file_among_the_checked_ones_is_named(own, capsys):
    path = sorted((own / "gta5/images").glob("*.png"))[-1]
    path.write_bytes(b"")
    assert f"cannot read {path}: it is empty" in start(capsys, own, expect=2)


def test_labels_of_another_size_are_reported_once(own, capsys, recwarn):
    for path in [*(own / "gta5/labels").glob("*.png"), *(own / "cityscapes/gtFine/val").rglob("*_labelIds.png")]:
        write_png(path, np.kron(np.array(Image.open(path)), np.ones((2, 2), np.uint8)), 0)
    printed = start(capsys, own, "--source-iterations", "4")
    line, = (line for line in printed.splitlines() if "differ in size" in line)
    assert "source train (00001.png: 128x64, image 64x32)" in line and "target val (" in line
    assert not [warning for warning in recwarn if ".png" in str(warning.message)]
    assert sum(map(sum, results(own)["source"]["single-scale"]["matrix"])) > 64 * 32 * 3       # at the labels' own 128x64


def test_a_target_without_labels_trains_and_draws_and_reports_that_nothing_is_evaluated(own, capsys):
    shutil.rmtree(own / "cityscapes/gtFine")
    printed = start(capsys, own, "--eval-every", "1")
    assert "target val (cityscapes): no labels: there is nothing to evaluate" in printed
    assert "nothing to evaluate: the target has no labels" in printed and results(own) == {"source": None}
    with Image.open(own.parent / "runs/fada-gta5/source.png") as sheet:
        assert sheet.width < 3.5 * 410                           # image, overlay, prediction
    log = [json.loads(line) for line in (own.parent / "runs/fada-gta5/log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and not any("miou" in line for line in log)
    again = start(capsys, own)
    assert "source: finished before" in again and "nothing to evaluate" in again and "source 1/2" not in again
    assert "nothing to evaluate" in start(capsys, own, "--eval", "--stage", "source")
    assert "has no cityscapes files" in start(capsys, own, "--target-labels", "--tag", "u", expect=2)
    folder = own.parent / "runs/fada-gta5"
    with pytest.raises(UserError, match="fada-gta5 has no results.json with scores"):
        curves.differences([folder, folder])


def test_source_and_target_from_the_same_data_set(own, capsys):
    other = own.parent / "foggy"
    for split in ("train", "val"):
        for path in (own / f"cityscapes/leftImg8bit/{split}").rglob("*.png"):
            new = other / "cityscapes/leftImg8bit_foggy" / path.relative_to(own / "cityscapes/leftImg8bit")
            new.parent.mkdir(parents=True, exist_ok=True)
            write_png(new.with_name(f"{new.stem}_foggy_beta_0.02.PNG"), np.array(Image.open(path)) // 2 + 100, 2)
    (other / "cityscapes/gtFine").symlink_to(own / "cityscapes/gtFine", target_is_directory=True)
    flags = "--source cityscapes --target cityscapes".split()
    printed = start(capsys, own, *flags, expect=2)
    assert "--source and --target are both cityscapes: add --target-data FOLDER" in printed
    assert "both cityscapes" in start(capsys, own, *flags, "--target-data", str(own), expect=2)
    printed = start(capsys, own, *flags, "--target-data", str(other))
    assert "source train (cityscapes): % in" in printed and "target val (cityscapes): % in" in printed
    foggy = results(own, "fada-cityscapes")["source"]
    evaluated = start(capsys, own, *flags, "--eval", "--data", str(own.parent / "empty"), "--target-data", str(other))
    assert "mIoU" in evaluated
    shutil.copytree(own, own.parent / "clear")
    start(capsys, own, *flags, "--target-data", str(own.parent / "clear"), "--tag", "clear")
    clear = results(own, "fada-cityscapes-clear")["source"]
    assert same(trained(own, "fada-cityscapes"), trained(own, "fada-cityscapes-clear"))        # the source is --data's
    assert foggy["single-scale"]["matrix"] != clear["single-scale"]["matrix"]                  # the target is not
    assert "--ccd needs two" in start(capsys, own, *flags, "--target-data", str(other), "--ccd", expect=2)


def test_weights_that_are_not_finite_are_not_evaluated(own, capsys):
    start(capsys, own)
    path = own.parent / "runs/fada-gta5/source.pt"
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state"]["model"] if name.endswith("bias"))
    content["state"]["model"][name][0] = torch.nan
    torch.save(content, path)
    printed = start(capsys, own, "--eval", expect=2)
    assert f"{path}: its weights are not finite ({name})" in printed and "mIoU" not in printed
    path.replace(own.parent / "nan.pt")
    printed = start(capsys, own, "--eval", "--from", str(own.parent / "nan.pt"), expect=2)
    assert f"{own.parent / 'nan.pt'}: its weights are not finite" in printed


@pytest.mark.parametrize("flags, words", [
    ("--source gta", "--source gta is none of gta5, synthia, cityscapes; a data set of your own is a folder"),
    ("--target farm", "--target farm is none of cityscapes, crosscity; a data set"),
    ("--target gta5", "--target gta5 is none of"), ("--source crosscity", "--source crosscity is none of"),
])
def test_unknown_data_sets_are_refused(own, capsys, flags, words):
    assert words in start(capsys, own, *flags.split(), expect=2)
    with pytest.raises(SystemExit):
        fada.main(flags.replace("gta5", "gta").split())          # without sizes: the script knows them for its data sets
    assert "error: " in capsys.readouterr().err


def test_a_sample_is_spread_over_the_set_and_pixels_are_counted(tmp_path, capsys):
    """Thirty labels, of which eight are read: each has 5 road pixels of 100, and the last also has 50 car pixels."""
    pairs = []
    for k in range(30):
        ids = np.full((10, 10), 0, np.uint8)
        ids[0, :5] = 7
        if k == 29:
            ids[5:] = 26
        image, label = (write_png(tmp_path / f"{kind}/{k}.png", noise(10, 10) if kind == "i" else ids, 2 if kind == "i" else 0)
                        for kind in "il")
        pairs.append(Pair(image, label, str(k)))
    (tmp_path / "l/3.png").write_text("damaged, and not in the sample")
    images = SegmentationDataset(pairs, "cityscapes", class_list("gta5"), Size(10, 10))
    checks.inspect(SimpleNamespace(sets={"target val": images}, inspected=set(), rank=0))
    assert capsys.readouterr().out == "target val (cityscapes): % in 8 labels: car 6.2, road 5.0, no class 88.8\n"
    with pytest.raises(UserError, match="damaged"):
        images[3]


def test_two_sets_with_the_same_number_of_images_differ_in_their_names():
    sets = [SegmentationDataset([Pair(None, None, name) for name in names], "gta5", class_list("gta5"), None)
            for names in (("a", "b"), ("a", "c"), ("ab",), ("a", "b"))]
    one, other, short, again = map(checks.identity, sets)
    assert one == again and one["images"] == other["images"] == 2 and one["names"] != other["names"] != short["names"]
