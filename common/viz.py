"""Coloured label maps, overlays and contact sheets, drawn by Pillow. Pictures in memory are (h,w,3) uint8 arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common.data import IGNORE, IMAGENET_MEAN, IMAGENET_STD, ClassList
from common.deeplab import resize_label
from common.files import write_atomically
from common.metrics import evaluation_mode, predict

GAP, LEGEND = 10, 130                                                 # pixels: between two elements; width of a legend entry


def _array(x: Tensor | np.ndarray) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def colorize(label: Tensor | np.ndarray, classes: ClassList) -> np.ndarray:
    """(h,w) integer class indices -> (h,w,3) uint8 in the classes' colours; black for 255 and other non-classes."""
    label = _array(label).astype(np.int64)
    palette = np.array([*classes.colors, (0, 0, 0)], dtype=np.uint8)
    return palette[np.where((label >= 0) & (label < len(classes.colors)), label, -1)]


def denormalise(image: Tensor | np.ndarray) -> np.ndarray:
    """(3,h,w) float, ImageNet-normalised -> (h,w,3) uint8, clipped to 0..255."""
    image = _array(image).astype(np.float64).transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def overlay(image: np.ndarray, label: Tensor | np.ndarray, classes: ClassList, alpha: float = 0.5) -> np.ndarray:
    """(1 - alpha) * image + alpha * colour of the class, rounded; where the label is 255, the image is unchanged.
    image (h,w,3) uint8; label (h,w) integer; alpha: 0 (image only) to 1 (colours only).  Returns: (h,w,3) uint8."""
    label = _array(label)
    if label.shape != image.shape[:2]:
        raise ValueError(f"an image of shape {image.shape} does not match a label of shape {label.shape}")
    blend = ((1 - alpha) * image + alpha * colorize(label, classes)).round().astype(np.uint8)
    return np.where((label == IGNORE)[..., None], image, blend)


def prediction_rows(model: nn.Module, dataset, classes: ClassList, place: Callable) -> list[list[np.ndarray]]:
    """Image, overlay, prediction and label of four images spread over a data set; `place` moves an image to the device."""
    rows = []
    for image, label, *_ in (dataset[k] for k in range(0, len(dataset), max(1, len(dataset) // 4))[:4]):
        size, photo = tuple(image.shape[1:]), denormalise(image)
        with evaluation_mode(model):
            maps = [predict(model, place(image[None]), size)[0], resize_label(label[None], size)[0]]
        rows.append([photo, overlay(photo, maps[0], classes), *(colorize(labels, classes) for labels in maps)])
    return rows


def contact_sheet(path: str | os.PathLike, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str],
                  legend: ClassList | None = None, width: int = 400) -> None:
    """Write a sheet of pictures: titles above the columns (image | prediction | label), a legend of the classes below.

    Args: rows: in each, one (h,w,3) uint8 array per title; width: largest width of a picture, in pixels. A smaller picture is
        enlarged by the largest integer factor that fits. A black picture, such as an empty pseudo label, is marked "0 %".
    Raises: ValueError if there are no rows or a row does not match the titles; UserError if the file cannot be written.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"rows of {[len(row) for row in rows]} pictures do not match {len(titles)} titles")
    # A box filter repeats pixels when enlarging (label maps keep their colours) and averages when shrinking.
    scales = [[width // p.shape[1] or width / p.shape[1] for p in row] for row in rows]
    panels = [[Image.fromarray(p).resize((round(scale * p.shape[1]), max(1, round(scale * p.shape[0]))), Image.Resampling.BOX)
               for p, scale in zip(*pair)] for pair in zip(rows, scales)]
    heights, font = [max(panel.height for panel in row) for row in panels], ImageFont.load_default
    head = top = 30
    total_width = GAP + len(titles) * (width + GAP)
    names = list(zip(legend.names, legend.colors)) if legend else []
    per_line = max((total_width - GAP) // LEGEND, 1)                  # names per row of the legend
    legend_height = 22 * -(-len(names) // per_line)
    sheet = Image.new("RGB", (total_width, head + sum(heights) + GAP * len(rows) + legend_height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        panel = Image.new("RGB", (width, head), "white")              # cuts off a title that is too long
        ImageDraw.Draw(panel).text((width / 2, head / 2), title, (40, 40, 40), font(18), anchor="mm")
        sheet.paste(panel, (GAP + column * (width + GAP), 0))
    for row, height in zip(panels, heights):
        for column, panel in enumerate(row):
            left = GAP + column * (width + GAP)
            sheet.paste(panel, (left, top))
            if not np.any(panel):
                pen.text((left + panel.width / 2, top + panel.height / 2), "0 %", "white", font(18), anchor="mm")
        top += height + GAP
    for k, (name, color) in enumerate(names):
        left, line = GAP + k % per_line * LEGEND, top + k // per_line * 22
        pen.rectangle((left, line, left + 14, line + 14), color)
        pen.text((left + 20, line + 7), name, (40, 40, 40), font(13), anchor="lm")
    write_atomically(path, lambda file: sheet.save(file, format="PNG"))
