"""Coarse-to-Fine Domain Adaptive Semantic Segmentation with Photometric Alignment and Category-Center Regularization (C2F).

Ma, Lin, Wu, Yu. CVPR 2021. arXiv:2103.13041

Coarse: each source image takes the colours and the lightness of a random target image (global photometric alignment). Fine,
in K steps: a triplet loss holds source features near the centre of their category. The target, also augmented, learns from
valid pseudo labels of the previous step's model. There is no published code. Stages: step0 -> step1 .. stepK.

    Sec. 3.2       rgb_to_lab, lab_to_rgb, match_histogram, photometric_align
    Eqs. (1), (2)  solve_gamma
    Sec. 3.1       category_thresholds            t_c = min(P_h, P_s,c)
    Eq. (3)        category_centers               from class_sums over the aligned source
    Eq. (4)        triplet_loss
    Eq. (5)        consistency_loss
    Step 0         train_step0                    T_0 on tau(M') by L_seg
    Steps 1 to K   train_step                     T_i from T_{i-1} by L_seg + L_triplet + L_consist

    M, M', N   source images, aligned source images, target images      tau    colour jitter
    T_i        model of step i                                          f_c    centre of category c, (C, D), unit length
    P_h, P_s,c limits of t_c: `--P-h`; p percent of c lie above P_s,c    G      L2 normalisation
    alpha      `--margin` of Eq. (4)                                     beta   weight in Eq. (2)
    K, U       steps after step 0, iterations of each                    C, c   categories

    python c2f.py --align SOURCE.png REFERENCE.png OUT.png              align one picture
    python c2f.py --toy                                      the toy city, some minutes on two cores
    python c2f.py --source gta5                              the paper's GTA5 -> Cityscapes; again to resume
    torchrun --nproc_per_node=4 c2f.py --source gta5 --batch-size 1           four GPUs, each with its own batch norm
    python c2f.py --source gta5 --alignment none --tag no-gpa                                           Table 3
    python c2f.py --source gta5 --from runs/c2f-gta5/step0.pt --lambda-triplet 0 --tag no-ctl           Table 3
    python c2f.py --source gta5 --alignment frequency --tag fda                                         Table 4
    python c2f.py --source gta5 --eval                       only evaluate what the run has reached

Departures:
 1. L_seg, Eqs. (4), (5): the paper sums over pixels; here each loss is a mean over the labelled pixels of its domain.
 2. Eqs. (1), (2): "sum_L L p(L^gamma)" is the mean of L^gamma over the source image. Sec. 4.1's "beta in (5)" is Eq. (2)'s.
 3. Eq. (2): the objective is not convex for every histogram. A grid search over [0.05, 6] in four passes, each around the
    best value so far, gives gamma. The histograms have 1,024 levels.
 4. Eq. (4): "other category centers" is the nearest other centre (`--negatives nearest`) or the sum over all others (`all`).
 5. Eqs. (3), (4): a category without source pixels has no centre. It is no negative, and its pixels do not enter the loss.
 6. Eq. (3): the features come from one aligned version per source image. Labels are resized to their grid (nearest pixel).
 7. Sec. 3.1: confidences are counted in 250 bins. P_s,c is the lower edge of a bin. If P_h lies between two edges, it
    counts as the upper one. A category that is never predicted has t_c = P_h.
 8. Sec. 3.1: a pseudo label is valid from t_c on (">=", as in Eq. (5)); the text says "higher than".
 9. Sec. 3.1: pseudo labels are made once per step, from clean images at `target_size`. L_seg on the target trains on images
    without tau, L_consist on the same images with tau.
10. Sec. 4.1: p is 10, as the paper says ("as in [14]"). The published code of [14] keeps 50 % of each category.
11. Sec. 4.1: tau's strength and image sizes are not given. Resize, crop and batch norm are CAG's, which the paper follows.
12. Sec. 4.1: each step has its own optimizer and learning rate schedule. There is no dropout. Steps 1 to K take 120k of the
    paper's 140k iterations (K U), so step 0 has 20k.
13. Sec. 3.2: f_match has no threshold for small differences. The a and b of a grey image differ only by rounding, but they
    take the reference's colours.
14. Table 4: "gamma on all" scales a and b from [-128, 128] to [0, 1]. Frequency alignment [33] works on RGB; its window reaches
    `--window` of the shorter side from frequency 0, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import isnan
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset

from common import data
from common.cli import Size, command, option, parse
from common.data import IGNORE, Augment, SegmentationDataset, derive_seed, fixed_version, read_resized, save_label
from common.deeplab import at_least_float32, resize_label, upsample
from common.distributed import labelled_mean, parallel, sum_over_processes
from common.files import write_atomically
from common.metrics import print_table
from common.run import Options, Run
from common.viz import denormalise

BINS = 250                                             # of confidence; 0.9 is a bin's edge


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    backbone: str = option("resnet101", "encoder of DeepLab v3+", paper="resnet101", section="Sec. 4.1",
                           choices=("resnet101", "resnet50", "resnet18"))
    adapt_freeze_bn: str = option("all", "frozen batch norm in steps 1 to K", choices=("all", "encoder", "none"))
    K: int = option(6, "steps after step 0", paper=6, section="Sec. 4.1", low=1)
    alignment: str = option("gpa", "gpa: gamma for L, histograms for a and b; gamma or histogram: for L, a and b",
                            paper="gpa", section="Sec. 3.2", choices=("gpa", "gamma", "histogram", "frequency", "none"))
    beta: float = option(0.01, "weight of (gamma - 1)^2, Eq. (2)", paper=0.01, section="Sec. 4.1", low=0.0)
    window: float = option(0.01, "half width of the frequency window, of the shorter side", low=0.0, high=0.5)
    P_h: float = option(0.9, "upper limit of the confidence thresholds", paper=0.9, section="Sec. 4.1", low=0.0, high=1.0)
    p: float = option(10.0, "percent of a category's pixels above P_s,c", paper=10.0, section="Sec. 4.1", low=0.0, high=100.0)
    margin: float = option(0.2, "alpha, margin of the triplet loss", paper=0.2, section="Sec. 4.1", low=0.0)
    negatives: str = option("nearest", "other centres in Eq. (4): the nearest, or the sum over all", choices=("nearest", "all"))
    triplet_target: bool = option(False, "triplet loss also with pseudo labels on the target", paper=False, section="Table 4")
    lambda_pseudo: float = option(1.0, "weight of L_seg on the target", paper=1.0, section="Sec. 3.1", low=0.0)
    lambda_triplet: float = option(1.0, "weight of L_triplet; 0: without CTL", paper=1.0, section="Sec. 3.1", low=0.0)
    lambda_consist: float = option(1.0, "weight of L_consist; 0: without TCR", paper=1.0, section="Sec. 3.1", low=0.0)
    jitter: float = option(0.5, "tau: brightness, contrast, saturation by this, hue by 0.4 of it", low=0.0, high=1.0)
    lr: float = option(5e-4, "SGD's initial rate in step 0", paper=5e-4, section="Sec. 4.1", low=0.0)
    step_lr: float = option(2.5e-4, "SGD's initial rate in steps 1 to K", paper=2.5e-4, section="Sec. 4.1", low=0.0)
    encoder_rate: float = option(1.0, "the encoder's rate as a multiple of the others'", low=0.0)
    momentum: float = option(0.9, "SGD's momentum", paper=0.9, section="Sec. 4.1", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "SGD's weight decay", paper=1e-4, section="Sec. 4.1", low=0.0)
    step0_iterations: int = option(20_000, "iterations of step 0", paper=20_000, section="Sec. 4.1", low=1)
    step_iterations: int = option(20_000, "U, iterations of each further step", paper=20_000, section="Sec. 4.1", low=1)
    batch_size: int = option(4, "images per batch, of each domain and in each process", paper=4, section="Sec. 4.1", low=1)
    scale: tuple[float, float] = option((1.0, 1.5), "range of the random resize in training", low=0.1)
    crop: Size = option(Size(1280, 640), "random crop in training")
    align: tuple[str, str, str] | None = option(None, "SOURCE REFERENCE OUT: only align this image", defines_run=False)


TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           crop=Size(128, 64), batch_size=2, K=2, lr=5e-3, step_lr=2.5e-3, step0_iterations=720, step_iterations=240,
           workers=0, amp="auto", channels_last=True)

RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)                        # sRGB's D65; both as in scikit-image
TO_LINEAR, TO_SRGB, LAB_CURVE = (                      # for values in [0, 1]; the loader uses tables (`by_table`)
    lambda v: torch.where(v > 0.04045, ((v + 0.055) / 1.055).pow(2.4), v / 12.92),
    lambda v: torch.where(v > 0.0031308, 1.055 * v.clamp(min=0.0031308).pow(1 / 2.4) - 0.055, 12.92 * v),
    lambda v: torch.where(v > 0.008856, v.clamp(min=0.008856).pow(1 / 3), 7.787 * v + 16 / 116))


def rgb_to_lab(rgb: Tensor, evaluate: Callable = lambda curve, x: curve(x)) -> Tensor:
    """sRGB (..., 3, H, W) float in [0, 1] to CIE Lab (..., 3, H, W): L in 0..100, a and b within -128..128."""
    to_xyz = rgb.new_tensor(RGB_TO_XYZ) / rgb.new_tensor(WHITE)[:, None]
    xyz = (to_xyz @ evaluate(TO_LINEAR, rgb).flatten(-2)).unflatten(-1, rgb.shape[-2:])
    x, y, z = evaluate(LAB_CURVE, xyz).unbind(dim=-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def lab_to_rgb(lab: Tensor, evaluate: Callable = lambda curve, x: curve(x)) -> Tensor:
    """CIE Lab (..., 3, H, W) float, L in 0..100, to sRGB (..., 3, H, W), clamped to [0, 1]."""
    L, a, b = lab.unbind(dim=-3)
    y = (L + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], dim=-3)
    xyz = f.clamp(min=0.2068966).pow(3) + (f.clamp(max=0.2068966) - 0.2068966) / 7.787        # cubic above, linear below
    from_xyz = torch.linalg.inv(lab.new_tensor(RGB_TO_XYZ).double()).to(lab) * lab.new_tensor(WHITE)
    linear = (from_xyz @ xyz.flatten(-2)).unflatten(-1, lab.shape[-2:])
    return evaluate(TO_SRGB, linear).clamp(0, 1)


def match_histogram(source: Tensor, reference: Tensor, count: Tensor | None = None,
                    reference_count: Tensor | None = None) -> Tensor:
    """Give a channel the value distribution of a reference.

    Sec. 3.2, f_match: each source value becomes the reference value with the same CDF, by linear interpolation between the
    reference's unique values. Equal source values stay equal.

    Args: source (H, W), reference (H', W') float; counts, of the same shapes: how often each value occurs.
    Returns: (H, W)."""
    (_, index, cdf), (values_n, _, cdf_n) = distribution(source, count), distribution(reference, reference_count)
    right = torch.searchsorted(cdf_n, cdf).clamp(max=len(values_n) - 1)                       # linear interpolation
    left = (right - 1).clamp(min=0)
    share = ((cdf - cdf_n[left]) / (cdf_n[right] - cdf_n[left]).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(values_n[left].double(), values_n[right].double(), share).to(source.dtype)[index]


def distribution(x: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns: the unique values of x (U,), ascending; each pixel's index (H, W) into them; their CDF (U,) float64."""
    values, index = x.unique(return_inverse=True)
    occurs = index.flatten().bincount(None if count is None else count.flatten().double()).double()
    return values, index, occurs.cumsum(0) / occurs.sum()


def solve_gamma(lightness: Tensor, reference_lightness: Tensor, beta: float = 0.01, count: Tensor | None = None,
                reference_count: Tensor | None = None) -> float:
    """The exponent that gives the source the mean lightness of the reference; beta holds it near 1.

    Eq. (2):  gamma* = argmin_gamma (sum_L L^gamma p_s(L) - sum_L L p_t(L))^2 + beta (gamma - 1)^2

    Args: lightness, reference_lightness float in [0, 1], of any shapes; beta >= 0; counts as for `match_histogram`.
    Returns: gamma in [0.05, 6], the optimum for histograms of 1,024 levels to 1e-4; exactly 1 if both histograms are equal."""
    L = torch.linspace(0, 1, 1024, dtype=torch.float64)
    p_s, p_t = (histogram(x, n, len(L)) for x, n in ((lightness, count), (reference_lightness, reference_count)))
    reference_mean = (L * p_t).sum()                                                          # sum_L L p_t(L)

    def best(gammas: Tensor) -> int:
        mean = (L ** gammas[:, None] * p_s).sum(dim=1)                                        # sum_L L^gamma p_s(L)
        cost = (mean - reference_mean) ** 2 + beta * (gammas - 1) ** 2
        ties = (cost == cost.min()).nonzero()[:, 0]
        return int(ties[(gammas[ties] - 1).abs().argmin()])

    gammas = torch.cat([torch.linspace(0.05, 1, 40), torch.linspace(1, 6, 101)[1:]]).double()
    k = best(gammas)
    for _ in range(3):                                                                        # each pass is 25 times finer
        between = torch.linspace(float(gammas[max(0, k - 1)]), float(gammas[min(len(gammas) - 1, k + 1)]), 51).double()
        gammas = torch.cat([between, gammas[k:k + 1]]).unique()                               # keeps an exact 1
        k = best(gammas)
    return float(gammas[k])


def histogram(x: Tensor, count: Tensor | None, levels: int) -> Tensor:
    """(levels,) float64 shares of the values of x, rounded to equally spaced levels of [0, 1] and weighted by count."""
    index = (x.clamp(0, 1).float() * (levels - 1)).round().long().flatten()
    total = index.bincount(None if count is None else count.flatten().double(), minlength=levels).double().cpu()
    return total / total.sum()


def distinct_colors(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The colours of an image. Alignment is a function of the colour, and a photo has ten times more pixels than colours.

    Args: image (3, H, W) in [0, 1]; without 256 levels per channel, each pixel counts as a colour.
    Returns: colours (3, 1, U); each pixel's index (H, W) into them; the number of pixels per colour (1, U)."""
    levels = (image * 255).round()
    if (image * 255 - levels).abs().max() > 1e-3:
        index = torch.arange(image[0].numel(), device=image.device).view_as(image[0])
        return image.flatten(1)[:, None], index, torch.ones_like(index).view(1, -1)
    r, g, b = levels.int()
    packed, index, count = (r * 65536 + g * 256 + b).unique(return_inverse=True, return_counts=True)
    colors = torch.stack([packed // 65536, packed // 256 % 256, packed % 256]).to(image.dtype) / 255
    return colors[:, None], index, count[None]


def align_lab(source: list, reference: list, beta: float = 0.01, kind: str = "gpa") -> Tensor:
    """New values of L, a and b. Sec. 3.2: (f_gamma(L_m), f_match(a_m), f_match(b_m)); Table 4: all by "gamma" or "histogram".

    Args: source, reference: per channel, the values and how often each occurs, in one shape (...).  Returns: (3, ...)."""
    changed = []
    for (x, n), (x_n, n_n), low, span in zip(source, reference, (0, -128, -128), (100, 256, 256), strict=True):
        if kind == "gamma" or (kind == "gpa" and not changed):
            gamma = solve_gamma((x - low) / span, (x_n - low) / span, beta, n, n_n)
            changed.append(low + span * ((x - low) / span).clamp(0, 1) ** gamma)              # f_gamma
        else:
            changed.append(match_histogram(x, x_n, n, n_n))                                   # f_match
    return torch.stack(changed)


def photometric_align(source: Tensor, reference: Tensor, beta: float = 0.01, kind: str = "gpa") -> Tensor:
    """Global photometric alignment, Sec. 3.2, exact. Its cost grows with the number of colours. Call it outside autocast.

    Args: source (3, H, W), reference (3, H', W') RGB in [0, 1]; beta, of Eq. (2); kind, of `align_lab`.  Returns: as source."""
    (colors, index, n), (colors_n, _, n_n) = distinct_colors(source), distinct_colors(reference)
    lab, lab_n = ([(x, count) for x in rgb_to_lab(c)] for c, count in ((colors, n), (colors_n, n_n)))
    return lab_to_rgb(align_lab(lab, lab_n, beta, kind))[:, 0, index]                         # (3, H, W)


def photometric_fit(source: Tensor, reference: Path, size: Size | None, beta: float = 0.01, kind: str = "gpa") -> Callable:
    """`photometric_align` for the loader: aligns a crop by its whole image; 99 % of the values are exact to 1/255.

    Args: source (3, H, W) uint8; reference: an image file, resized to `size`; beta, kind as in `photometric_align`.
    Returns: a function that aligns a crop, (3, h, w) float32 in [0, 1]."""
    from common.pixels import by_table, histograms, look_up, sample  # only the loader needs it
    x, n = histograms(rgb_to_lab(sample(source) / 255, by_table), 4096)
    values = align_lab(list(zip(x, n)), reference_histograms(reference, size), beta, kind)    # (3, 4096)

    def align(crop: Tensor) -> Tensor:
        lab = zip(rgb_to_lab(crop, by_table), values, x[:, 0].tolist(), x[:, -1].tolist())
        return lab_to_rgb(torch.stack([look_up(new, old, low, high) for old, new, low, high in lab]), by_table)
    return align


@lru_cache(maxsize=4096)
def reference_histograms(path: Path, size: Size | None) -> list[tuple[Tensor, Tensor]]:
    """L, a and b of an image file: per channel, the values and how often each occurs. Cached: 20 KB per image."""
    from common.pixels import by_table, histograms, sample  # only the loader needs it
    lab = rgb_to_lab(sample(data.resize(data.read_image(path), size)) / 255, by_table)
    return [(x[n > 0], n[n > 0]) for x, n in zip(*histograms(lab, 1024))]


def align_by_frequency(source: Tensor, reference: Tensor, window: float = 0.01) -> Tensor:
    """Table 4's frequency alignment [33]: the source takes the reference's amplitude at the lowest frequencies, up to `window`
    of the shorter side. Its phase stays. Arguments as for `photometric_align`."""
    reference = F.interpolate(reference[None], source.shape[-2:], mode="bilinear", antialias=True)[0]
    spectrum, other = torch.fft.fft2(source), torch.fft.fft2(reference)
    half = int(window * min(source.shape[-2:]))
    low_y, low_x = (torch.fft.fftfreq(n, 1 / n, device=source.device).abs() <= half for n in source.shape[-2:])
    amplitude = torch.where(low_y[:, None] & low_x, other.abs(), spectrum.abs())
    return torch.fft.ifft2(torch.polar(amplitude, spectrum.angle())).real.clamp(0, 1)


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """L_seg: cross entropy on the labelled pixels, at the labels' size.

    Args: logits (N, C, h, w); label (N, H, W) int64, 255 ignored.  Returns: 0-d, mean over the labelled pixels;
    exactly 0 if there are none."""
    logits = upsample(logits, label.shape[-2:])                                               # (N, C, H, W)
    return labelled_mean(F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none"), label != IGNORE)


def category_thresholds(histogram: Tensor, P_h: float = 0.9, p: float = 10.0) -> Tensor:
    """Per category, the lowest confidence of a valid pseudo label.

    Sec. 3.1:  t_c = min(P_h, P_s,c);  p percent of the pixels of category c have confidence above P_s,c

    Args: histogram (C, B) int64: per predicted category, confidences in B equal bins of [0, 1]; p in percent.
    Returns: (C,) float64. P_s,c: the highest lower edge with >= p percent at or above it; P_h for a category without pixels."""
    at_or_above = histogram.flip(1).cumsum(1).flip(1)                                         # (C, B)
    enough = 100 * at_or_above >= p * at_or_above[:, :1]                                      # true, then false
    P_s = (enough.sum(dim=1) - 1).double() / histogram.shape[1]
    return torch.where(at_or_above[:, 0] > 0, P_s, 1.0).clamp(max=P_h)


def class_sums(feat: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """A batch's part of Eq. (3): feat (N, D, h, w), label (N, h, w), 255 ignored -> sum (C, D) float64, count (C,) int64."""
    feat, label = feat.movedim(1, -1)[label != IGNORE], label[label != IGNORE]                # (M, D), (M,)
    one_hot = label == torch.arange(num_classes, device=label.device)[:, None]                # (C, M)
    return one_hot.double() @ feat.double(), one_hot.sum(dim=1)


def category_centers(sum: Tensor, count: Tensor) -> Tensor:  # noqa: A002
    """The category centres, on the unit sphere.

    Eq. (3):  f_c = G(1 / N_c sum_s sum_i sum_j 1(y_ij = c) x_ij),  G: L2 normalisation

    Args: sum (C, D), count (C,), from `class_sums`.  Returns: (C, D), rows of length 1; NaN for a category without pixels."""
    mean = sum / count[:, None]
    return mean / mean.norm(dim=1, keepdim=True)


def triplet_loss(feat: Tensor, label: Tensor, centers: Tensor, margin: float = 0.2, negatives: str = "nearest") -> Tensor:
    """Hold each feature closer to its category's centre than to other centres.

    Eq. (4):  L_triplet = sum max(||G(x_ij) - f_c=C|| - ||G(x_ij) - f_c!=C|| + alpha, 0)

    Args:
        feat: (N, D, h, w) float; label: (N, h, w) int64 on the feature's grid, 255 ignored.
        centers: (C, D), fixed; NaN: no centre.  margin: alpha.  negatives: the "nearest" other centre, or the sum over "all".
    Returns: 0-d, mean over the labelled pixels whose category has a centre; exactly 0 if there are none."""
    if negatives not in ("nearest", "all"):
        raise ValueError(f'negatives is "nearest" or "all", not {negatives!r}')
    absent = centers.isnan().any(dim=1)                                                       # (C,)
    valid = (label != IGNORE) & ~absent[label.clamp(max=len(centers) - 1)]                    # (N, h, w)
    x = F.normalize(at_least_float32(feat), dim=1, eps=1e-4)                                  # (N, D, h, w), G(x)
    centers = centers.nan_to_num().to(x.dtype)
    dot = (centers @ x.flatten(2)).unflatten(2, x.shape[2:])                                  # (N, C, h, w)
    square = x.square().sum(dim=1, keepdim=True) + centers.square().sum(dim=1)[:, None, None] - 2 * dot
    distance = square.clamp(min=1e-12).sqrt()                                                 # (N, C, h, w)
    category = torch.where(valid, label, 0)[:, None]                                          # (N, 1, h, w)
    classes = torch.arange(len(centers), device=label.device)[:, None, None]
    violation = (distance.gather(1, category) - distance + margin).clamp(min=0)               # (N, C, h, w)
    violation = violation.masked_fill((classes == category) | absent[:, None, None], 0)
    loss = violation.amax(dim=1) if negatives == "nearest" else violation.sum(dim=1)          # the nearest: the largest
    return labelled_mean(loss, valid)


def consistency_loss(logits_augmented: Tensor, pseudo_label: Tensor) -> Tensor:
    """Predict on the augmented image what the previous step's model predicted on the clean image.

    Eq. (5):  L_cst = sum_j 1(max T_{i-1}(n)|_j >= t_c) CE(y^_j, p_j),  p = T_i(n')

    Args: logits_augmented (N, C, h, w), of T_i on tau(n); pseudo_label (N, H, W) int64, of T_{i-1} on n, 255 below t_c.
    Returns: 0-d, mean over the valid pixels (the paper sums); exactly 0 if there are none."""
    return segmentation_loss(logits_augmented, pseudo_label)


@dataclass
class Alignment:
    """The loader's transform of a source image (3, H, W) uint8: align it to a target image chosen by the item's seed.
    Returns: the image, and a function that aligns the part which a crop needs; by frequency, the aligned image and None."""
    cfg: Config
    references: list[Path]
    size: Size | None                                  # references are resized to it

    def __call__(self, image: Tensor, seed: int, name: str) -> tuple[Tensor, Callable | None]:
        reference, kind = self.references[derive_seed(seed, "reference") % len(self.references)], self.cfg.alignment
        if kind != "frequency":
            from common.pixels import change_window  # only the loader needs it
            return image, partial(change_window, photometric_fit(image, reference, self.size, self.cfg.beta, kind))
        aligned = align_by_frequency(image / 255, read_resized(reference, self.size), self.cfg.window)
        return (255 * aligned).round().byte(), None


def tau(images: Tensor, strength: float, seeds: list[int]) -> Tensor:
    """Colour jitter of normalised images (N, 3, H, W); each result depends only on its image and seed."""
    from common.pixels import jitter  # needs torchvision
    mean, std = torch.tensor((data.IMAGENET_MEAN, data.IMAGENET_STD)).to(images, non_blocking=True)[..., None, None]
    jittered = (images * std + mean).clamp(0, 1)
    for image, seed in zip(jittered, seeds, strict=True):
        image.copy_(jitter(image, strength, torch.Generator().manual_seed(seed)))
    return (jittered - mean) / std


def first_valid_bin(thresholds: Tensor) -> Tensor:
    """(C,) t_c -> (C,) int64: per category, the first of BINS confidence bins whose lower edge is at least t_c."""
    return (thresholds * BINS - 1e-3).ceil().long()


def valid_labels(label: Tensor, confidence_bin: Tensor, thresholds: Tensor) -> Tensor:
    """Predicted labels, int64 in 0..C-1, with 255 where the confidence (a bin in 0..BINS-1) is below t_c."""
    return label.masked_fill(confidence_bin < first_valid_bin(thresholds).to(label.device)[label], IGNORE)


@torch.no_grad()
def source_centers(run: Run, model: nn.Module, aligned: Subset) -> Tensor:
    """Eq. (3) over the aligned source set, in one pass: (C, D) float32."""
    C, device = len(run.classes), run.float64_device
    total = torch.zeros(C, model.feat_channels, dtype=torch.float64, device=device)
    count = torch.zeros(C, dtype=torch.int64, device=device)
    model.eval()
    for x, y, _ in run.sweep("centres", aligned):
        with run.autocast():
            feat, _ = model(x)                                                                # (1, D, h, w)
        part, pixels = class_sums(feat.to(device), resize_label(y, feat.shape[-2:]).to(device), C)
        total, count = total + part, count + pixels
    model.train()
    sum_over_processes(total, count)
    return category_centers(total, count).float()


@torch.no_grad()
def predictions(run: Run, model: nn.Module, what: str, target: SegmentationDataset) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Per target image: T_{i-1}'s label (H, W), its confidence as a bin in 0..BINS-1 (H, W), and the image's name."""
    model.eval()
    for x, _, (name,) in run.sweep(what, target):
        with run.autocast():
            _, logits = model(x)                                                              # (1, C, h, w)
        confidence, label = upsample(logits, x.shape[-2:]).softmax(dim=1).max(dim=1)          # (1, H, W) each
        yield label[0], (confidence[0] * BINS).long().clamp(max=BINS - 1), name
    model.train()


def label_target(run: Run, cfg: Config, model: nn.Module, target: SegmentationDataset, folder: Path) -> tuple[Tensor, Tensor]:
    """One pass computes t_c, a second writes the valid labels. Returns: t_c (C,), histogram of confidences (C, BINS)."""
    histogram = torch.zeros(len(run.classes) * BINS, dtype=torch.int64, device=run.device)
    for label, confidence_bin, _ in predictions(run, model, "thresholds", target):
        histogram += (label * BINS + confidence_bin).flatten().bincount(minlength=len(histogram))
    sum_over_processes(histogram)
    histogram = histogram.view(-1, BINS).cpu()
    thresholds = category_thresholds(histogram, cfg.P_h, cfg.p)
    for label, confidence_bin, name in predictions(run, model, "pseudo labels", target):
        save_label(folder / f"{name}.png", valid_labels(label, confidence_bin, thresholds))
    return thresholds, histogram


def prepare_step(run: Run, cfg: Config, i: int, model: nn.Module, aligned: Subset,
                 target: SegmentationDataset) -> tuple[Tensor, SegmentationDataset, dict]:
    """Computed once from T_{i-1}: the centres (C, D), the target with valid pseudo labels, and values for the log."""
    step, folder = f"step{i}", run.folder / f"step{i}" / "labels"
    centers = run.once(step, "centers", lambda: {"centers": source_centers(run, model, aligned)})["centers"]
    note = run.once(step, "labels", lambda: report_labels(run, step, centers, *label_target(run, cfg, model, target, folder)))
    return centers.to(run.device), target.with_maps(folder), note


def sgd(model: nn.Module, cfg: Config, lr: float) -> torch.optim.SGD:
    """Sec. 4.1's optimizer."""
    return torch.optim.SGD(model.parameter_groups(lr, cfg.encoder_rate), lr=lr, momentum=cfg.momentum,
                           weight_decay=cfg.weight_decay)


def train_step0(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, iterations: int) -> None:
    """Step 0: T_0 on tau(M') by L_seg."""
    optimizer = sgd(model, cfg, cfg.lr)
    state = {"model": model, "optimizer": optimizer}
    model = parallel(model)
    for _, (x, y) in run.stage("step0", iterations, state, source, batch_size=cfg.batch_size):
        with run.autocast():
            _, logits = model(x)                                                              # (N, C, h, w)
        loss = segmentation_loss(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg_s=loss)


def train_step(run: Run, cfg: Config, i: int, model: nn.Module, centers: Tensor, source: SegmentationDataset,
               target: SegmentationDataset, note: dict | None = None) -> None:
    """Steps 1 to K: from T_{i-1} to T_i by L_seg + L_triplet + L_consist, with fixed centres and fixed pseudo labels."""
    optimizer = sgd(model, cfg, cfg.step_lr)
    state = {"model": model, "optimizer": optimizer}
    model = parallel(model)
    for it, (x_s, y_s), (x_t, _, y_t) in run.stage(f"step{i}", cfg.step_iterations, state, source, target,
                                                   batch_size=cfg.batch_size, note=note):
        x_tau = tau(x_t, cfg.jitter, run.item_seeds(len(x_t), "tau", i, it))
        with run.autocast():
            feat_s, logits_s = model(x_s)                                                     # (N, D, h, w), (N, C, h, w)
            feat_t, logits_t = model(x_t)
            _, logits_tau = model(x_tau)
        seg_s, seg_t = segmentation_loss(logits_s, y_s), segmentation_loss(logits_t, y_t)
        y_grid = resize_label(y_s, feat_s.shape[-2:])                                         # (N, h, w)
        triplet = triplet_loss(feat_s, y_grid, centers, cfg.margin, cfg.negatives)            # Eq. (4)
        if cfg.triplet_target:
            y_grid = resize_label(y_t, feat_t.shape[-2:])
            triplet = triplet + triplet_loss(feat_t, y_grid, centers, cfg.margin, cfg.negatives)
        consist = consistency_loss(logits_tau, y_t)                                           # Eq. (5)
        loss = seg_s + cfg.lambda_pseudo * seg_t + cfg.lambda_triplet * triplet + cfg.lambda_consist * consist

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg_s=seg_s, seg_t=seg_t, triplet=triplet, consist=consist)


def align_files(cfg: Config) -> None:
    """--align SOURCE REFERENCE OUT: align one image exactly and write a PNG."""
    source, reference = (read_resized(path, None) for path in cfg.align[:2])
    aligned = (photometric_align(source, reference, cfg.beta) * 255).round().byte().permute(1, 2, 0).numpy()
    write_atomically(cfg.align[2], lambda file: Image.fromarray(aligned).save(file, format="PNG"))


@command
def main(argv: list[str] | None = None) -> None:
    """Step 0, then steps 1 to K, each followed by its evaluation."""
    cfg, options = parse("c2f.py", __doc__, (Config, Options), argv, TOY)
    if cfg.align:
        return align_files(cfg)
    augment = Augment(scale=cfg.scale, crop=cfg.crop)
    run = Run("c2f", cfg, options, {f"step{i}": cfg.step_iterations for i in range(cfg.K + 1)} | {
        "step0": cfg.step0_iterations + options.target_labels * cfg.K * cfg.step_iterations}, largest_scale=cfg.scale[1])
    test, tests = run.images("target", "val"), {"single-scale": {}}
    model = run.network("v3+")
    run.watch(model, test)
    if options.eval:
        return run.evaluate(run.latest, model, test, tests)
    target = run.images("target", "train", labels=False, augment=augment)
    aligns = cfg.alignment != "none" and not options.target_labels
    transform = Alignment(cfg, [pair.image for pair in target.pairs], target.size) if aligns else None
    domain = "target" if options.target_labels else "source"
    source = run.images(domain, "train", augment=replace(augment, jitter=cfg.jitter), transform=transform)
    aligned = fixed_version(run.images(domain, "train", transform=transform), derive_seed(options.seed, "centres"))
    if run.pending("step0"):                               # the upper bound trains as long as the adapted model
        if transform and not (run.folder / "alignment.png").exists():
            draw_alignments(run, cfg, source, target)
        train_step0(run, cfg, model, source, run.lengths["step0"])
        run.evaluate("step0", model, test, tests)
    model.freeze_bn(cfg.adapt_freeze_bn)
    for i in range(1, cfg.K + 1):
        if run.pending(f"step{i}"):
            centers, labelled, note = prepare_step(run, cfg, i, model, aligned, target)
            train_step(run, cfg, i, model, centers, source, labelled, note)
            run.evaluate(f"step{i}", model, test, tests)


def draw_alignments(run: Run, cfg: Config, source: SegmentationDataset, target: SegmentationDataset) -> None:
    """Draw alignment.png: source, reference, and the source aligned by each kind of Table 4."""
    rows, kinds = [], ("gpa", "gamma", "histogram")
    for k in range(4):
        pair = [denormalise(images[k * len(images) // 4][0]) for images in (source, target)]        # (H, W, 3) uint8
        m, n = (torch.from_numpy(image).permute(2, 0, 1) / 255 for image in pair)
        aligned = [*(photometric_align(m, n, cfg.beta, kind) for kind in kinds), align_by_frequency(m, n, cfg.window)]
        rows.append([*pair, *((x * 255).round().byte().permute(1, 2, 0).numpy() for x in aligned)])
    run.draw("alignment.png", rows, ["source", "reference", *kinds, "frequency"], legend=False)


def report_labels(run: Run, step: str, centers: Tensor, thresholds: Tensor, histogram: Tensor) -> dict:
    """Print how many pseudo labels of a step are valid, by `label_target`'s histogram. Returns: values for the log."""
    names, no_center = run.classes.names, centers.isnan().any(dim=1).tolist()
    valid = (histogram * (torch.arange(BINS) >= first_valid_bin(thresholds)[:, None])).sum(dim=1)
    percent = (100 * valid / histogram.sum(dim=1)).tolist()
    print_table(f"{step}: thresholds t_c, and valid pseudo labels per predicted category, in percent",
                {"t_c": [*(100 * thresholds).tolist(), None], "valid": [*percent, float(100 * valid.sum() / histogram.sum())]},
                (*names, "all"))
    absent = [name for name, missing in zip(names, no_center) if missing]
    print(f"{step}: no source pixel, so no centre: {', '.join(absent) or 'none'}", flush=True)
    return {"thresholds": dict(zip(names, thresholds.tolist())), "without_center": absent,
            "valid_percent": {name: round(share, 2) for name, share in zip(names, percent) if not isnan(share)}}


if __name__ == "__main__":
    main()
