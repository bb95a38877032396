"""Confusion matrix, IoU, the evaluation of a model over a loader."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data import IGNORE, ClassList
from common.deeplab import upsample
from common.distributed import sum_over_processes


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each (label, prediction) pair of classes: (K,K) int64 on the CPU, rows = label.

    Args: prediction (..) integer, 0..K-1 wherever there is a label; label (..) integer, 0..K-1, or 255, which is ignored.
    Raises: ValueError for another value, for tensors of two shapes, and for floats."""
    if prediction.shape != label.shape or prediction.is_floating_point() or label.is_floating_point():
        raise ValueError(f"prediction {tuple(prediction.shape)} {prediction.dtype} and label {tuple(label.shape)} "
                         f"{label.dtype} must be integer tensors of one shape")
    label, prediction = (x if x.dtype == torch.uint8 else x.byte().where(x.long() == x.byte(), 254)      # 254 is no class
                         for x in (label, prediction.to(label.device)))
    pair = label.int().mul_(256).add_(prediction).flatten()
    counts = pair.cpu().bincount(minlength=2 ** 16).view(256, 256)   # on the CPU: on a GPU, bincount waits twice
    matrix = counts[:num_classes, :num_classes].clone()
    if wrong := int(counts[:IGNORE].sum() - matrix.sum()):
        raise ValueError(f"{wrong} labelled pixels have a label or a prediction outside 0..{num_classes - 1}")
    return matrix


def iou(matrix: Tensor) -> Tensor:
    """TP / (TP + FP + FN) of each class: (K,) float64 in [0, 1] on the CPU, NaN where the denominator is 0."""
    matrix = matrix.cpu().double()
    hit = matrix.diagonal()
    return hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)


def mean_iou(matrix: Tensor, indices: Sequence[int] | None = None, present: bool = False) -> float:
    """Mean IoU in [0, 1] over the given classes (default: all) that have an IoU; NaN if none has one. With `present`, over
    those that occur in the labels: then a stray pixel predicted as an absent class adds no class with IoU 0."""
    scores = torch.where(matrix.cpu().sum(dim=1) > 0, iou(matrix), torch.nan) if present else iou(matrix)
    return float((scores if indices is None else scores[list(indices)]).nanmean())


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, size: tuple[int, int], scales: Sequence[float] = (1.0,),
            flip: bool = False) -> Tensor:
    """Predict the classes of images at any size. The mode of the model is not changed.

    With several views (scales, each also mirrored with `flip`) the mean of the softmaxes of their upsampled logits decides.
    Args: model returns (feat, logits (N,K,h',w')); image (N,3,h,w) float32, normalised; size (H, W) of the result.
    Returns: (N,H,W) int64, classes 0..K-1."""
    views = []                                                        # logits (N, K, h', w') of each
    for scale in scales:
        scaled = image if scale == 1 else F.interpolate(
            image, [max(1, round(n * scale)) for n in image.shape[-2:]], mode="bilinear", antialias=True)
        views.append(model(scaled)[1].float().contiguous())           # dense: a softmax over strided classes is slow
        if flip:
            views.append(model(scaled.flip(-1))[1].flip(-1).float().contiguous())
    predictions = []
    for n in range(len(image)):                                       # one (1, K, H, W) at a time bounds the memory
        score = upsample(views[0][n:n + 1], size)
        if len(views) > 1:
            score = score.softmax(dim=1)
            for logits in views[1:]:
                score += upsample(logits[n:n + 1], size).softmax(dim=1)
        predictions.append(score.max(dim=1).indices)                  # on a CPU several times faster than argmax
    return torch.cat(predictions)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """The model in evaluation mode; afterwards each of its modules has its previous mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, num_classes: int, device: torch.device | str,
             scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
    """Confusion matrix of a model over the (image, label, ...) of all processes, at the labels' own resolution, on the CPU."""
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    with evaluation_mode(model):
        for image, label, *_ in loader:
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            matrix += confusion_matrix(predict(model, image, tuple(label.shape[-2:]), scales, flip), label, num_classes)
    sum_over_processes(matrix)
    return matrix


def summary(matrix: Tensor, classes: ClassList) -> dict:
    """A confusion matrix as the entry of results.json: means, per-class IoU, the matrix; None for undefined values."""
    means = {f"{name}{' present' * present}": mean_iou(matrix, indices, present)
             for present in (False, True) for name, indices in classes.means.items()}
    scores, means = ({name: None if math.isnan(score) else score for name, score in values}
                     for values in (zip(classes.names, iou(matrix).tolist()), means.items()))
    return {**means, "iou": scores, "matrix": matrix.tolist()}


def percent(result: dict) -> dict[str, float]:
    """The means of a `summary` that are defined, in percent."""
    return {name: round(100 * value, 2) for name, value in result.items() if isinstance(value, float)}


def table(columns: dict[str, Sequence[float | None]], names: Sequence[str], digits: int = 1) -> str:
    """Plain text: one row per name, one column per entry of `columns`; "-" for None and NaN."""
    rows = [["", *columns]]
    rows += [[name, *("-" if x is None or math.isnan(x) else f"{x:.{digits}f}" for x in row)]
             for name, row in zip(names, zip(*columns.values()))]
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def print_table(title: str, columns: dict[str, Sequence[float | None]], names: Sequence[str], digits: int = 1) -> None:
    """Print a `table` below its title."""
    print(f"\n{title}\n{table(columns, names, digits)}", flush=True)


def print_scores(title: str, results: dict[str, dict]) -> None:
    """Print a `summary` per column, in percent: the IoU of each class, then the means."""
    scores = [{**r["iou"], **{name: r[name] for name in r if name not in ("iou", "matrix")}} for r in results.values()]
    columns = {name: [x if x is None else 100 * x for x in column.values()] for name, column in zip(results, scores)}
    print_table(title, columns, list(scores[0]))
