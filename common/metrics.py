"""Confusion matrix, per-class IoU and its means over 19, 16 or 13 classes, evaluation of a model over a loader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data import IGNORE, ClassList
from common.deeplab import upsample


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each (label, prediction) pair of classes.

    Args:
        prediction: (..) integer, classes 0..K-1 wherever the label is not 255 (elsewhere any value).
        label: (..) integer, classes 0..K-1 or 255, which is ignored.
    Returns: (K,K) int64 on the label's device, rows = label, columns = prediction.
    Raises: ValueError if the shapes differ, a tensor is not integer, or a value is out of range.
    """
    shapes = f"prediction {tuple(prediction.shape)}, label {tuple(label.shape)}"
    return _matrix(_pair_counts(prediction, label, num_classes), num_classes, shapes)


def _pair_counts(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(K*K + 2,) counts: the matrix row by row, then ignored pixels, then pixels with an impossible value."""
    if prediction.shape != label.shape or prediction.is_floating_point() or label.is_floating_point():
        raise ValueError(f"prediction {tuple(prediction.shape)} {prediction.dtype} and label {tuple(label.shape)} "
                         f"{label.dtype} must be integer tensors of the same shape")
    # Nothing here waits for a GPU: impossible values are counted, and bincount would read its maximum back.
    K = num_classes
    prediction, label = prediction.to(label.device).long(), label.long()
    possible = (prediction >= 0) & (prediction < K) & (label >= 0) & (label < K)
    bins = torch.where(possible, label * K + prediction, K * K + 1).masked_fill_(label == IGNORE, K * K).flatten()
    return bins.new_zeros(K * K + 2).scatter_add_(0, bins, bins.new_ones(1).expand_as(bins))


def _matrix(counts: Tensor, num_classes: int, what: str) -> Tensor:
    if impossible := int(counts[-1]):
        raise ValueError(f"{impossible} labelled pixels have a prediction or a label outside 0..{num_classes - 1} "
                         f"({IGNORE} = ignored, labels only): {what}")
    return counts[:-2].view(num_classes, num_classes)


def iou(matrix: Tensor) -> Tensor:
    """TP / (TP + FP + FN) of each class: (K,) float64 in [0, 1] on the CPU, NaN where the denominator is 0."""
    matrix = matrix.cpu().double()
    hit = matrix.diagonal()
    return hit / (matrix.sum(dim=0) + matrix.sum(dim=1) - hit)


def mean_iou(matrix: Tensor, indices: Sequence[int] | None = None) -> float:
    """Mean IoU in [0, 1] over the given classes (default: all) that have an IoU; NaN if none has one."""
    scores = iou(matrix)
    return float((scores if indices is None else scores[list(indices)]).nanmean())


def mean_iou_present(matrix: Tensor, indices: Sequence[int] | None = None) -> float:
    """Mean IoU in [0, 1] over those of the given classes (default: all) that occur in the labels; NaN if none does.

    In a small set that lacks a class, one stray pixel predicted as it costs `mean_iou` a whole share; this mean not.
    """
    scores = torch.where(matrix.cpu().sum(dim=1) > 0, iou(matrix), torch.nan)
    return float((scores if indices is None else scores[list(indices)]).nanmean())


LOG_BINS = 1280                                                       # 32 an octave, from 2^-20 to 2^20


def log_histogram(values: Tensor) -> Tensor:
    """Counts of values >= 0 in bins of equal ratio, so that quantiles of any scale need no data set in memory.

    Returns: (LOG_BINS,) int64; values outside the range are in the outermost bins, those that are not finite in none.
    """
    values = values[values.isfinite()]
    return ((values.log2() + 20) * 32).clamp(0, LOG_BINS - 1).long().bincount(minlength=LOG_BINS)


def log_quantiles(histogram: Tensor, shares: Sequence[float]) -> list[float]:
    """Quantiles, for shares in [0, 1], from a sum of `log_histogram`s, within 1.1 percent; NaN where nothing was counted."""
    if histogram.sum() == 0:
        return [math.nan] * len(shares)
    below = histogram.cumsum(0) / histogram.sum()
    return [2 ** ((int((below < share).sum()) + 0.5) / 32 - 20) for share in shares]


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, size: tuple[int, int], scales: Sequence[float] = (1.0,),
            flip: bool = False) -> Tensor:
    """Predict the classes of images at a size of one's choice, with the model in the mode that it is in.

    With several views (scales, each also mirrored with `flip`) the mean of the softmaxes of their upsampled
    logits decides.

    Args:
        model: returns (feat, logits (N,K,h',w')).
        image: (N,3,h,w) float32, normalised.
        size: (H, W) of the result.
        scales: factors of the image's size, > 0.
    Returns: (N,H,W) int64, classes 0..K-1.
    """
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


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, num_classes: int, device: torch.device | str,
             scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
    """Confusion matrix of a model over a loader, compared at the labels' own resolution.

    Args:
        model: as for `predict`; in eval mode meanwhile, each module's mode is restored afterwards.
        loader: yields (image (N,3,h,w) float32, label (N,H,W) integer, ...); the rest is not looked at.
    Returns: (K,K) int64 on the CPU, as `confusion_matrix`; summed over processes it is that of all their images.
    Raises: ValueError as `confusion_matrix`.
    """
    modes = [(module, module.training) for module in model.modules()]
    counts = torch.zeros(num_classes ** 2 + 2, dtype=torch.int64, device=device)
    model.eval()
    try:
        for image, label, *_ in loader:
            image, label = image.to(device, non_blocking=True), label.to(device, non_blocking=True)
            prediction = predict(model, image, tuple(label.shape[-2:]), scales, flip)
            counts += _pair_counts(prediction, label, num_classes)
    finally:
        for module, training in modes:
            module.training = training
    return _matrix(counts.cpu(), num_classes, "over the whole loader")


def score_table(matrices: dict[str, Tensor], classes: ClassList) -> str:
    """Plain-text table of IoUs in percent: a row a class and a mean, a column a model; "-" where there is none.

    Args:
        matrices: column title -> (K,K) confusion matrix.
    Returns: lines without a final newline; each of `classes.means`, then the same over the classes present.
    """
    scores = {name: [float(m[k]) for m in map(iou, matrices.values())] for k, name in enumerate(classes.names)}
    for suffix, mean in ("", mean_iou), (" present", mean_iou_present):
        for name, indices in classes.means.items():
            scores[name + suffix] = [mean(m, indices) for m in matrices.values()]
    rows = [["class", *matrices]]
    rows += [[name, *("-" if math.isnan(x) else f"{100 * x:.1f}" for x in row)] for name, row in scores.items()]
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows]
    for position in (len(classes.names) + 1, 1):                      # a rule above the means and below the head
        lines.insert(position, "-" * len(lines[0]))
    return "\n".join(lines)
