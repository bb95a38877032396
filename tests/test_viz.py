from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import UserError
from common.viz import GAP, SERIES_COLORS, colorize, contact_sheet, curves, denormalise, overlay

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
    head = sheet.shape[0] - 2 * GAP - 32 - 64                           # rows of 32 and 64 pixels: the tallest counts
    assert sheet.shape == (head + 32 + 64 + 2 * GAP, 3 * GAP + 2 * 64, 3) and 20 <= head <= 40
    left, right = slice(GAP, GAP + 64), slice(2 * GAP + 64, 2 * GAP + 128)
    top, bottom = head, head + 32 + GAP
    assert np.array_equal(sheet[top:top + 32, left], small.repeat(8, 0).repeat(8, 1))
    assert np.array_equal(sheet[top:top + 32, right], other.repeat(8, 0).repeat(8, 1))
    assert np.array_equal(sheet[bottom:bottom + 32, left], other.repeat(8, 0).repeat(8, 1))
    assert count(sheet[bottom:bottom + 64, right], (0, 0, 255)) == 64 * 32
    ink = (sheet[:head] < 200).any(axis=(0, 2))
    assert ink[left].any() and ink[right].any()                         # both titles, and neither beside its column
    assert not ink[:GAP].any() and not ink[GAP + 64:2 * GAP + 64].any() and not ink[-GAP:].any()


def test_contact_sheet_refuses_ragged_rows(tmp_path):
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    for rows in ([], [[picture]], [[picture, picture], [picture]]):
        with pytest.raises(ValueError, match="2 titles"):
            contact_sheet(tmp_path / "x.png", rows, ["image", "label"])
    assert not list(tmp_path.iterdir())


def test_curves_draw_each_series_in_its_color(tmp_path):
    path = tmp_path / "curves.png"
    curves(path, {"falling": [(x, 100 - x) for x in range(101)],
                  "gap": [(0, 50), (40, 50), (50, math.nan), (60, 50), (100, 50)],
                  "point": [(20, 10)], "empty": [], "nothing": [(1, math.nan), (2, math.inf)]}, "losses", ylabel="loss")
    chart = read(path)
    swatch = count(chart, SERIES_COLORS[3])                             # an empty series: only its mark in the legend
    assert swatch == count(chart, SERIES_COLORS[4]) > 50
    assert swatch + 20 < count(chart, SERIES_COLORS[2]) < swatch + 150  # and a dot
    rows, columns = np.nonzero((chart == SERIES_COLORS[0]).all(axis=-1))
    line = columns < columns.max() - 20                                 # without the legend, which is to the right
    rows, columns = rows[line], columns[line]
    assert rows[columns.argmin()] < rows[columns.argmax()] - 300        # a falling series falls
    middle = (rows.min() + rows.max()) // 2
    flat = np.nonzero((chart[middle] == SERIES_COLORS[1]).all(axis=-1))[0]
    jump = np.diff(flat).max()                                          # the line is open where the value is NaN,
    assert 0.15 < jump / (columns.max() - columns.min()) < 0.25         # from x = 40 to x = 60


@pytest.mark.parametrize("series", [
    {}, {"a": []}, {"a": [(0, math.nan), (1, 2), (2, 3)]}, {"a": [(5, 0)]}, {"a": [(0, 3), (9, 3)]},
    {"a": [(0, 0), (0, 1)]}, {"a": [(0, -1e12), (1, 1e12)]}, {"long name " * 20: [(0, 1e-9), (1, 2e-9)]},
    {str(n): [(0, n), (1, 0)] for n in range(len(SERIES_COLORS) + 2)},
])
@pytest.mark.parametrize("log", [False, True])
def test_curves_of_odd_series(tmp_path, series, log):
    curves(tmp_path / "c.png", series, "title " * 60, log=log)
    chart = read(tmp_path / "c.png")
    assert chart.shape == (540, 960, 3)
    assert (chart[:, :5] == 255).all() and (chart[:, -5:] == 255).all() and (chart[:3] == 255).all()   # nothing clips
    if any(y > 0 or not log for points in series.values() for _, y in points):
        assert count(chart, SERIES_COLORS[0]) > 200                     # more than its mark in the legend


def test_curves_on_a_logarithmic_axis(tmp_path):
    curves(tmp_path / "c.png", {"a": [(0, 0.01), (1, 1)], "b": [(1.1, 1), (2, 100)], "c": [(1, 0), (2, -3)]}, "", log=True)
    chart = read(tmp_path / "c.png")
    ends = []
    for color in SERIES_COLORS[:2]:
        rows, columns = np.nonzero((chart == color).all(axis=-1))
        rows, columns = rows[columns < 890], columns[columns < 890]     # without the legend
        ends.append((rows[columns.argmin()], rows[columns.argmax()]))
    (a0, a1), (b0, b1) = ends
    assert a0 - a1 == pytest.approx(b0 - b1, abs=4) and a0 - a1 > 150   # a factor of 100 is as high everywhere
    assert count(chart, SERIES_COLORS[2]) < 250                         # only the mark in the legend


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    curves(path, {"a": [(0, 1)]}, "first")
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()

    def cut_short(self, file, **_):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(UserError, match=r"c\.png: No space left"):
        curves(path, {"a": [(0, 2)]}, "second")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
