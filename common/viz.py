"""Coloured label maps, overlays, contact sheets and curves, by Pillow. Pictures in memory are (h,w,3) uint8 arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.cli import write_atomically
from common.data import IGNORE, IMAGENET_MEAN, IMAGENET_STD, ClassList

SERIES_COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189),
                 (23, 190, 207), (140, 86, 75), (227, 119, 194))
INK, GRID, PAPER = (40, 40, 40), (222, 222, 222), (255, 255, 255)
GAP = 10                                                              # pixels between things


def _array(x: Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def colorize(label: Tensor | np.ndarray, classes: ClassList) -> np.ndarray:
    """(h,w) integer class indices -> (h,w,3) uint8 in the classes' colours; 255 and all that is no class is black."""
    label = _array(label).astype(np.int64)
    palette = np.array([*classes.colors, (0, 0, 0)], dtype=np.uint8)
    return palette[np.where((label >= 0) & (label < len(classes.colors)), label, -1)]


def denormalise(image: Tensor | np.ndarray) -> np.ndarray:
    """(3,h,w) float, ImageNet-normalised -> (h,w,3) uint8, values outside the range cut off."""
    image = _array(image).astype(np.float64).transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def overlay(image: np.ndarray, label: Tensor | np.ndarray, classes: ClassList, alpha: float = 0.5) -> np.ndarray:
    """(1 - alpha) * image + alpha * colour of the class, rounded; the image shows unchanged where the label is 255.

    Args:
        image: (h,w,3) uint8.  label: (h,w) integer.  alpha: 0 (image only) to 1 (colours only).
    Returns: (h,w,3) uint8. Raises: ValueError if the sizes differ.
    """
    label = _array(label)
    if image.shape[:2] != label.shape:
        raise ValueError(f"image {image.shape} and label {label.shape} differ in size")
    blend = ((1 - alpha) * image + alpha * colorize(label, classes)).round().astype(np.uint8)
    return np.where((label == IGNORE)[..., None], image, blend)


def _fit(text: str, width: float, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and the font in which it is at most `width` pixels wide: first smaller letters, then fewer of them."""
    while (font := ImageFont.load_default(size=size)).getlength(text) > width and size > 11:
        size -= 1
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    return text, font


def contact_sheet(path: str | os.PathLike, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str],
                  width: int = 400) -> None:
    """Write a sheet of pictures, a title above each column (image | prediction | label).

    Args:
        rows: rows of equally many (h,w,3) uint8 arrays of any size.
        titles: one for each column.
        width: of each picture on the sheet, in pixels; its height follows. A whole multiple of a picture's own
            width keeps its pixels exact.
    Raises: ValueError if there is no row or the columns do not match; UserError if the file cannot be written.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"rows of {[len(row) for row in rows]} pictures do not match {len(titles)} titles")
    # A box filter repeats pixels when enlarging (label maps keep their colours) and averages when shrinking.
    panels = [[Image.fromarray(p).resize((width, max(1, round(width * p.shape[0] / p.shape[1]))), Image.Resampling.BOX)
               for p in row] for row in rows]
    heights = [max(panel.height for panel in row) for row in panels]
    head = 30
    sheet = Image.new("RGB", (GAP + len(titles) * (width + GAP), head + sum(heights) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        text, font = _fit(title, width, 18)
        draw.text((GAP + column * (width + GAP) + width / 2, head / 2), text, INK, font, anchor="mm")
    top = head
    for row, height in zip(panels, heights):
        for column, panel in enumerate(row):
            sheet.paste(panel, (GAP + column * (width + GAP), top))
        top += height + GAP
    write_atomically(path, lambda file: sheet.save(file, format="PNG"))


def _ticks(values: list[float]) -> tuple[float, float, list[float]]:
    """Range of an axis that holds the values, and about five round numbers in it."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):            # a single value: some room around it
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= (high - low) / 5 * 0.999)
    return low, high, [n * step for n in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def curves(path: str | os.PathLike, series: dict[str, Sequence[tuple[float, float]]], title: str,
           xlabel: str = "iteration", ylabel: str = "", log: bool = False) -> None:
    """Write a line chart of 960 x 540 pixels with axes, ticks and a legend; `log`: a logarithmic y axis.

    Args:
        series: name -> points (x, y) in the order in which they are joined. A point that is not finite (with `log`, not
            positive) interrupts the line; a point without neighbours is a dot; an empty series stands in the legend only.
    Raises: UserError if the file cannot be written.
    """
    chart = Image.new("RGB", (960, 540), PAPER)
    draw, font = ImageDraw.Draw(chart), ImageFont.load_default(size=16)
    if log:
        series = {name: [(x, math.log10(y) if y > 0 else math.nan) for x, y in points] for name, points in series.items()}
    finite = {name: [(x, y) if math.isfinite(x) and math.isfinite(y) else None for x, y in points]
              for name, points in series.items()}
    points = [p for line in finite.values() for p in line if p]
    (x0, x1, xticks), (y0, y1, yticks) = _ticks([p[0] for p in points]), _ticks([p[1] for p in points])
    if log:
        between = [k + math.log10(m) for k in range(math.floor(y0), math.ceil(y1) + 1) for m in (1, 2, 5)]
        yticks = [y for y in between if y0 <= y <= y1 and (y1 - y0 < 2.5 or y == round(y))] or [y0, y1]
    ylabels = [f"{10 ** y:.3g}" if log else f"{y:.6g}" for y in yticks]
    margin = 0.04 * (y1 - y0)                                         # so that no line lies on the frame
    y0, y1 = y0 - margin, y1 + margin
    legend = min(240, 44 + max((font.getlength(name) for name in series), default=0))
    left = 2 * GAP + max(map(font.getlength, ylabels))
    right, top, bottom = 960 - 2 * GAP - legend, 70, 540 - 60

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    text, big = _fit(title, 960 - 2 * GAP, 22)
    draw.text((480, 24), text, INK, big, anchor="mm")
    draw.text((GAP, top - 16), ylabel, INK, font, anchor="lm")
    draw.text(((left + right) / 2, 540 - 18), xlabel, INK, font, anchor="mm")
    for x in xticks:
        draw.line([at(x, y0), at(x, y1)], GRID)
        draw.text((at(x, y0)[0], bottom + 16), f"{x:.6g}", INK, font, anchor="mm")
    for y, label in zip(yticks, ylabels):
        draw.line([at(x0, y), at(x1, y)], GRID)
        draw.text((left - GAP / 2, at(x0, y)[1]), label, INK, font, anchor="rm")
    draw.rectangle([left, top, right, bottom], outline=INK)

    for number, (name, line) in enumerate(finite.items()):
        color = SERIES_COLORS[number % len(SERIES_COLORS)]
        runs: list[list[tuple[float, float]]] = [[]]
        for point in line:
            if point is None:
                runs.append([])
            else:
                runs[-1].append(at(*point))
        for run in runs:
            if len(run) == 1:
                draw.circle(run[0], 4, fill=color)
            elif run:
                draw.line(run, color, width=3, joint="curve")
        y = top + 10 + 26 * number
        draw.rectangle([right + 2 * GAP, y - 6, right + 2 * GAP + 14, y + 6], fill=color)
        text, small = _fit(name, 960 - GAP - (right + 2 * GAP + 22), 16)
        draw.text((right + 2 * GAP + 22, y), text, INK, small, anchor="lm")
    write_atomically(path, lambda file: chart.save(file, format="PNG"))
