from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import curves
from common.files import UserError
from common.viz import GAP, colorize, contact_sheet, denormalise, overlay, prediction_rows

CLASSES = SimpleNamespace(names=("road", "sidewalk", "building"),
                          colors=((128, 64, 128), (244, 35, 232), (70, 70, 70)))


def read(path):
    return np.asarray(Image.open(path))


def count(picture, color):
    return int((picture == color).all(axis=-1).sum())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_colorize(dtype):
    picture = colorize(torch.tensor([[0, 1, 2], [255, 3, 0]], dtype=dtype), CLASSES)
    assert picture.dtype == np.uint8 and picture.shape == (2, 3, 3)
    assert picture.tolist() == [[[128, 64, 128], [244, 35, 232], [70, 70, 70]],
                                [[0, 0, 0], [0, 0, 0], [128, 64, 128]]]
    assert not colorize(np.array([[-1, 1000]]), CLASSES).any()


def test_denormalise_undoes_the_normalisation():
    pixels = torch.randint(0, 256, (3, 5, 7))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    assert np.array_equal(denormalise(image), pixels.permute(1, 2, 0).numpy())
    assert denormalise(torch.tensor([9.0, -9.0, 9.0])[:, None, None]).tolist() == [[[255, 0, 255]]]


def test_overlay_arithmetic():
    image = np.array([[[100, 200, 30], [7, 8, 9]]], dtype=np.uint8)
    label = torch.tensor([[1, 255]])
    result = overlay(image, label, CLASSES, alpha=0.25)                 # 75 + 61, 150 + 8.75, 22.5 + 58
    assert result.dtype == np.uint8 and result.tolist() == [[[136, 159, 80], [7, 8, 9]]]
    assert overlay(image, label, CLASSES, alpha=1)[0, 0].tolist() == [244, 35, 232]
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(2, 1\)"):
        overlay(image, label.T, CLASSES)


def test_contact_sheet_size_and_pixels(tmp_path):
    rng = np.random.default_rng(0)
    small, other = (rng.integers(0, 256, (4, 8, 3), dtype=np.uint8) for _ in range(2))
    half = np.full((6, 6, 3), (0, 0, 255), dtype=np.uint8)
    half[:, 3:] = (255, 0, 0)
    path = tmp_path / "new" / "sheet.png"
    contact_sheet(path, [[small, other], [other, half]], ["image", "a title much too long for its column"], width=64)
    sheet = read(path)
    head = sheet.shape[0] - 2 * GAP - 32 - 60                           # rows of 32 and 60 pixels: the tallest counts
    assert sheet.shape == (head + 32 + 60 + 2 * GAP, 3 * GAP + 2 * 64, 3) and 20 <= head <= 40
    left, right = slice(GAP, GAP + 64), slice(2 * GAP + 64, 2 * GAP + 128)
    top, bottom = head, head + 32 + GAP
    assert np.array_equal(sheet[top:top + 32, left], small.repeat(8, 0).repeat(8, 1))
    assert np.array_equal(sheet[top:top + 32, right], other.repeat(8, 0).repeat(8, 1))
    assert np.array_equal(sheet[bottom:bottom + 32, left], other.repeat(8, 0).repeat(8, 1))
    assert count(sheet[bottom:bottom + 60, right], (0, 0, 255)) == 60 * 30    # ten times as large, not 10.67
    ink = (sheet[:head] < 200).any(axis=(0, 2))
    assert ink[left].any() and ink[right].any()                         # both titles, each inside its column
    assert not ink[:GAP].any() and not ink[GAP + 64:2 * GAP + 64].any() and not ink[-GAP:].any()


def test_a_sheet_has_a_legend_and_an_empty_label_says_so(tmp_path):
    label = np.full((8, 16, 3), CLASSES.colors[1], dtype=np.uint8)
    empty = np.zeros_like(label)
    contact_sheet(tmp_path / "without.png", [[label, empty]], ["image", "pseudo label"], width=200)
    contact_sheet(tmp_path / "with.png", [[label, empty]], ["image", "pseudo label"], CLASSES, width=200)
    without, sheet = read(tmp_path / "without.png"), read(tmp_path / "with.png")
    assert np.array_equal(sheet[:len(without)], without) and len(sheet) > len(without)
    legend = sheet[len(without):]
    swatches = [np.argwhere((legend == color).all(axis=-1)) for color in CLASSES.colors[:2]]      # the third is grey, like text
    assert all(len(swatch) == 15 * 15 for swatch in swatches)
    assert sorted(swatch[0].tolist() for swatch in swatches) == [swatch[0].tolist() for swatch in swatches]
    for swatch in swatches:                                             # a name beside each
        assert (legend[swatch[0, 0]:swatch[-1, 0], swatch[-1, 1] + 3:swatch[-1, 1] + 40] < 100).any()
    panels = without[30:30 + 96, GAP:GAP + 192], without[30:30 + 96, 2 * GAP + 200:2 * GAP + 392]
    assert (panels[0] == CLASSES.colors[1]).all()                       # enlarged twelve times
    ink = (panels[1] > 200).all(axis=-1)
    assert 10 < ink.sum() < 400 and not ink[:30].any() and not ink[:, :60].any() and not ink[:, -60:].any()


def test_contact_sheet_refuses_ragged_rows(tmp_path):
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    for rows in ([], [[picture]], [[picture, picture], [picture]]):
        with pytest.raises(ValueError, match="2 titles"):
            contact_sheet(tmp_path / "x.png", rows, ["image", "label"])
    assert not list(tmp_path.iterdir())


def test_rows_of_predictions_are_spread_over_the_set_and_keep_the_models_modes(tmp_path):
    """A model that predicts class 1 where red is above its mean, on images whose left part is red."""
    class Red(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()

        def forward(self, x):
            assert not self.bn.training
            return x, torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], dim=1)

    def item(k):
        image = torch.full((3, 4, 8), -1.0)
        image[0, :, :k + 1] = 1.0
        return image, torch.full((8, 16), k % 3), f"{k}"                # the label has its own resolution

    model, placed = Red(), []
    rows = prediction_rows(model, [item(k) for k in range(9)], CLASSES, lambda x: placed.append(x) or x)
    assert [x.shape for x in placed] == [(1, 3, 4, 8)] * 4 and [(x[0, 0, 0] == 1).sum().item() for x in placed] == [1, 3, 5, 7]
    for k, (photo, mixed, prediction, label) in zip((0, 2, 4, 6), rows, strict=True):
        assert np.array_equal(photo, denormalise(item(k)[0]))
        assert np.array_equal(prediction, colorize((item(k)[0][0] > 0).long(), CLASSES)) and label.shape == (4, 8, 3)
        assert np.array_equal(mixed, overlay(photo, (item(k)[0][0] > 0).long(), CLASSES))
        assert (label == CLASSES.colors[k % 3]).all()
    assert model.training and model.bn.training and not model.frozen.training
    assert len(prediction_rows(model, [item(0)], CLASSES, lambda x: x)) == 1


def log(folder, *records):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_series_of_stages_follow_one_another(tmp_path):
    run = log(tmp_path / "run", {"stage": "one", "iteration": 0, "note": 3.0},
              {"stage": "one", "iteration": 2, "rate": 0.1, "seconds": 1.0, "seg": 2.0},
              {"stage": "one", "iteration": 4, "rate": 0.1, "seconds": 1.0, "seg": 1.0},
              {"stage": "one", "iteration": 4, "miou": {"mIoU": 40.0}},
              {"stage": "two", "iteration": 3, "rate": 0.1, "seconds": 1.0, "seg": 0.5, "adv": 7.0})
    points, starts = curves.series(run)
    assert starts == {"one": 0, "two": 4}
    assert points == {"seg": [(2, 2.0), (4, 1.0), (7, 0.5)], "mIoU": [(4, 40.0)], "adv": [(7, 7.0)]}
    assert curves.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert curves.smooth([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)    # the weights are 0.09 and 0.1


def test_charts_and_differences_of_two_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    line = {"stage": "one", "rate": 0.1, "seconds": 1.0}
    runs = [log(tmp_path / name, {**line, "iteration": 5, "seg": loss}, {**line, "iteration": 9, "seg": loss / 2})
            for name, loss in (("a", 1.0), ("b", 3.0))]
    for run, score in zip(runs, (0.25, 0.375)):
        iou = {"road": score, "sky": None}
        (run / "results.json").write_text(json.dumps({"one": {"single-scale": {"mIoU": score, "iou": iou}}}))
    out = tmp_path / "new" / "c.png"
    curves.main([*map(str, runs), "--out", str(out)])
    text = capsys.readouterr().out
    picture = read(out)[..., :3].reshape(-1, 3)
    assert picture.min() == 0 and len(np.unique(picture, axis=0)) > 20
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert lines["road"] == lines["mIoU"] == ["25.0", "37.5", "(+12.5)"] and lines["sky"] == ["-", "-"]
    curves.draw(runs[:1], tmp_path / "one.png")
    assert read(tmp_path / "one.png").shape != read(out).shape or not np.array_equal(read(tmp_path / "one.png"), read(out))


def test_charts_without_logs_results_or_matplotlib_are_refused(tmp_path, capsys, monkeypatch):
    run, other = log(tmp_path / "run", {"stage": "one", "iteration": 1, "rate": 0.1, "seg": 1.0}), tmp_path / "other"
    other.mkdir()
    for argv, words in (([other], "other has no log.jsonl: give the folder of a run"),
                        ([run, run], "run has no results.json with scores")):
        with pytest.raises(SystemExit) as stop:
            curves.main([*map(str, argv), "--out", str(tmp_path / "c.png")])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)         # as if it were not installed
    with pytest.raises(SystemExit) as stop:
        curves.main([str(run)])
    assert stop.value.code == 2 and "matplotlib is not installed" in capsys.readouterr().err


def test_files_are_replaced_atomically(tmp_path, monkeypatch):
    path, picture = tmp_path / "c.png", np.zeros((2, 2, 3), dtype=np.uint8)
    contact_sheet(path, [[picture]], ["first"])
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()

    def cut_short(self, file, **_):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(UserError, match=r"c\.png: No space left"):
        contact_sheet(path, [[picture]], ["second"])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
