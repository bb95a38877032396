"""Coarse-to-Fine Domain Adaptive Semantic Segmentation with Photometric Alignment and Category-Center Regularization (C2F).

Ma, Lin, Wu, Yu. CVPR 2021. arXiv:2103.13041

Coarse: every source image takes the colours and the lightness of a random target image (global photometric alignment). Fine:
in K steps, a triplet loss holds source features near their category's centre, and the target learns from valid pseudo labels
of the model of the step before, also on its augmented images. There is no published code.

    Sec. 3.2       rgb_to_lab, lab_to_rgb, match_histogram, photometric_align
    Eqs. (1), (2)  solve_gamma
    Sec. 3.1       category_thresholds            t_c = min(P_h, P_s,c)
    Eq. (3)        category_centers               from class_sums, added up over the aligned source
    Eq. (4)        triplet_loss
    Eq. (5)        consistency_loss
    Step 0         train_step0                    T_0 on tau(M') by L_seg
    Steps 1 to K   train_step                     T_i from T_{i-1} by L_seg + L_triplet + L_consist

    M, M', N   source images, aligned source images, target images      tau    colour jitter
    T_i        model of step i                                          f_c    centre of category c, (C, D), unit length
    P_h, P_s,c caps of t_c: `--P-h`, and p percent of c lie above        G      L2 normalisation
    alpha      `--margin` of Eq. (4)                                     beta   weight in Eq. (2)
    K, U       steps after step 0, iterations of each                    C, c   categories

Stages: step0 -> step1 .. stepK.

    python c2f.py --align SOURCE.png REFERENCE.png OUT.png              align one picture
    python c2f.py --toy                                      the toy city, some minutes on two cores
    python c2f.py --source gta5                              the paper's GTA5 -> Cityscapes; again to resume
    torchrun --nproc_per_node=4 c2f.py --source gta5 --batch-size 1           the paper's four GPUs with one sample each
    python c2f.py --source gta5 --alignment none --tag no-gpa                                           Table 3
    python c2f.py --source gta5 --from runs/c2f-gta5/step0.pt --lambda-triplet 0 --tag no-ctl           Table 3
    python c2f.py --source gta5 --alignment frequency --tag fda                                         Table 4
    python c2f.py --source gta5 --eval                       only evaluate what the run has reached

Departures:
 1. L_seg, Eqs. (4), (5): sums over pixels are means over the labelled pixels, of each domain on its own.
 2. Eqs. (1), (2): "sum_L L p(L^gamma)" is read as the mean of L^gamma over the source image; Sec. 4.1's "beta in (5)" is that
    of Eq. (2).
 3. Eq. (2) is not convex for every histogram: gamma is searched on a grid over [0.05, 6] and then refined; both means come
    from histograms of 1,024 levels.
 4. Eq. (4): "other category centers" is the nearest other one (`--negatives nearest`) or the sum over all (`all`).
 5. Eqs. (3), (4): a category without a source pixel has no centre: it is no negative, and its pixels are not in the loss.
 6. Eq. (3): the features are those of one aligned version of each source image; ground truth comes to the feature grid by
    the nearest pixel.
 7. Sec. 3.1: P_s,c and t_c are lower edges of 250 bins of confidence, and P_h counts as the next edge above it. A category
    that is never predicted gets P_h.
 8. Sec. 3.1: valid is ">= t_c", as Eq. (5) prints; the text says "higher than".
 9. Sec. 3.1: pseudo labels are made once per step, at `target_size`, on the clean images; L_seg takes them on the clean image,
    L_consist on the jittered one, and both weigh 1.
10. Sec. 4.1: p = 10 "as in [14]" stays 10, although [14]'s published code keeps 50 % of each category.
11. Sec. 4.1: tau's strength (`jitter`), image sizes and the crop are not given; resize and crop are CAG's, whose settings the
    paper follows. So is batch norm: that of pretrained encoders is frozen in step 0, all of it afterwards.
12. Sec. 4.1: each step has its own optimizer and rate horizon, and there is no dropout. Step 0's length is not printed: 140k
    in all and K = 6 steps of U = 20k leave 20k.
13. Sec. 3.2: matching knows no smallest difference: the a and b of a grey image differ by rounding alone, and take the
    reference's colours all the same.
14. Table 4: gamma on all three channels has a and b scaled from [-128, 128] to [0, 1]; frequency alignment [33] swaps the
    amplitudes of the lowest frequencies, up to `window` of the shorter side on each side of zero, on RGB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common import toycity
from common.cli import Size, UserError, command, option, parse, write_atomically
from common.data import (
    IGNORE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    ClassList,
    OneVersion,
    SegmentationDataset,
    class_list,
    derive_seed,
    read_image,
    read_resized,
    save_label,
)
from common.deeplab import at_least_float32, resize_label, upsample
from common.run import Options, Run, check_domains, sum_over_processes
from common.viz import denormalise

BINS = 250                                             # of confidences; 0.9 is an edge of a bin


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    source: str = option("gta5", "source domain", choices=("gta5", "synthia", "cityscapes"))
    target: str = option("cityscapes", "target domain", choices=("cityscapes", "crosscity"))
    city: str = option("Rome", "city of Cross-City", choices=("Rome", "Rio", "Tokyo", "Taipei"))
    backbone: str = option("resnet101", "encoder of DeepLab v3+", paper="resnet101", section="Sec. 4.1",
                           choices=("resnet101", "resnet50", "resnet18"))
    freeze_bn: str = option("auto", "batch norm kept fixed in step 0; auto: encoder, or none with --init none",
                            choices=("auto", "all", "encoder", "none"))
    adapt_freeze_bn: str = option("all", "batch norm kept fixed in steps 1 to K", choices=("all", "encoder", "none"))
    K: int = option(6, "steps after step 0", paper=6, section="Sec. 4.1", low=1)
    alignment: str = option("gpa", "gamma for L and histograms for a, b (gpa); gamma for all; histograms for all; "
                                   "frequencies; none", paper="gpa", section="Sec. 3.2",
                            choices=("gpa", "gamma", "histogram", "frequency", "none"))
    beta: float = option(0.01, "weight of (gamma - 1)^2, Eq. (2)", paper=0.01, section="Sec. 4.1", low=0.0)
    window: float = option(0.01, "half width of the frequency window, of the shorter side", low=0.0, high=0.5)
    P_h: float = option(0.9, "cap of the confidence thresholds", paper=0.9, section="Sec. 4.1", low=0.0, high=1.0)
    p: float = option(10.0, "percent of a category's pixels with confidence above P_s,c", paper=10.0, section="Sec. 4.1",
                      low=0.0, high=100.0)
    margin: float = option(0.2, "alpha, margin of the triplet loss", paper=0.2, section="Sec. 4.1", low=0.0)
    negatives: str = option("nearest", "other centres in Eq. (4): the nearest, or all of them summed",
                            choices=("nearest", "all"))
    triplet_target: bool = option(False, "triplet loss also on the target, with pseudo labels", paper=False,
                                  section="Table 4")
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
    source_size: Size | None = option(None, "source images are resized to it; automatic: their own size")
    target_size: Size | None = option(None, "target images are resized to it, also in the test; automatic: their own size")
    scale: tuple[float, ...] = option((1.0, 1.5), "range of the random resize in training", low=0.1)
    crop: Size = option(Size(1280, 640), "random crop in training")
    align: tuple[str, ...] | None = option(None, "SOURCE REFERENCE OUT: align this picture, and nothing else", identity=False)


TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           crop=Size(128, 64), batch_size=2, K=2, lr=5e-3, step_lr=2.5e-3, step0_iterations=720, step_iterations=240,
           workers=0, amp="bf16", channels_last=True)

_ZERO = "--lambda-pseudo 0 --lambda-triplet 0 --lambda-consist 0"
_CONTROL = f"--from {{source only}}/step0.pt --alignment none {_ZERO}"
_C2F = "--from {coarse (GPA)}/step0.pt"
RESULTS = {                                            # `make results METHOD=c2f`: row -> (stage reported, flags of its run)
    "source only": ("step0", "--stage step0 --alignment none"),
    "source only, as long as step 1": ("step1", _CONTROL),
    "source only, as long as step 2": ("step2", _CONTROL),
    "coarse (GPA)": ("step0", "--stage step0"),
    "GPA only, as long as step 1": ("step1", f"{_C2F} {_ZERO}"),
    "step 1": ("step1", _C2F),
    "GPA only, as long as step 2": ("step2", f"{_C2F} {_ZERO}"),
    "step 2": ("step2", _C2F),
    "target only (upper bound)": ("step0", "--stage step0 --target-labels --alignment none"),
}


# ------------------------------------------------------------------- global photometric alignment, Sec. 3.2


# scikit-image's constants: sRGB with the white point D65.
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
GAMMA_RANGE = (0.05, 6.0)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB to CIE Lab.

    Args: rgb (..., 3, H, W) float in [0, 1].
    Returns: (..., 3, H, W): L in 0..100, a and b within -128..128.
    """
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92)
    to_xyz = rgb.new_tensor(RGB_TO_XYZ) / rgb.new_tensor(WHITE)[:, None]
    xyz = (to_xyz @ linear.flatten(-2)).unflatten(-1, rgb.shape[-2:])
    f = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856).pow(1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(dim=-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """CIE Lab to sRGB, colours outside its range cut off.

    Args: lab (..., 3, H, W) float, L in 0..100.
    Returns: (..., 3, H, W) in [0, 1].
    """
    L, a, b = lab.unbind(dim=-3)
    y = (L + 16) / 116
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp(min=0)], dim=-3)
    xyz = torch.where(f > 0.2068966, f.pow(3), (f - 16 / 116) / 7.787)
    from_xyz = torch.linalg.inv(lab.new_tensor(RGB_TO_XYZ).double()).to(lab) * lab.new_tensor(WHITE)
    linear = (from_xyz @ xyz.flatten(-2)).unflatten(-1, lab.shape[-2:])
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0.0031308).pow(1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def match_histogram(source: Tensor, reference: Tensor) -> Tensor:
    """Give a channel the distribution of values of a reference.

    Sec. 3.2, f_match: a value whose CDF in the source is q becomes the value whose CDF in the reference is q, interpolated
    linearly between the reference's unique values; pixels of one value stay of one value.

    Args: source (H, W) and reference (H', W'), float of any sizes.  Returns: (H, W).
    """
    one, one_n = torch.ones_like(source, dtype=torch.int64), torch.ones_like(reference, dtype=torch.int64)
    return match_values(source.flatten(), one.flatten(), reference.flatten(), one_n.flatten()).view_as(source)


def match_values(values: Tensor, count: Tensor, wanted: Tensor, count_wanted: Tensor) -> Tensor:
    """`match_histogram` for values that stand for several pixels each.

    Args: values (U,) float of which count (U,) int64 each occur; wanted (V,), count_wanted (V,) of the reference.
    Returns: (U,) like values.
    """
    (_, inverse), (unique_n, inverse_n) = (x.unique(return_inverse=True) for x in (values, wanted))      # ascending
    cdf, cdf_n = (index.bincount(n.double()).cumsum(0) / n.sum() for index, n in ((inverse, count), (inverse_n, count_wanted)))
    right = torch.searchsorted(cdf_n, cdf).clamp(max=len(unique_n) - 1)                       # linear interpolation
    left = (right - 1).clamp(min=0)
    share = ((cdf - cdf_n[left]) / (cdf_n[right] - cdf_n[left]).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(unique_n[left].double(), unique_n[right].double(), share).to(values.dtype)[inverse]


def solve_gamma(lightness: Tensor, reference_lightness: Tensor, beta: float = 0.01, count: Tensor | None = None,
                reference_count: Tensor | None = None) -> float:
    """The exponent that gives the source the mean lightness of the reference, held near 1.

    Eq. (2):  gamma* = argmin_gamma (sum_L L^gamma p_s(L) - sum_L L p_t(L))^2 + beta (gamma - 1)^2

    Args:
        lightness, reference_lightness: float in [0, 1], of any shapes.
        beta: >= 0.
        count, reference_count: how often each value occurs, of the same shapes; None: once.
    Returns: gamma in [0.05, 6], the optimum for histograms of 1,024 levels to 1e-4; exactly 1 for images of one histogram.
    """
    L = torch.linspace(0, 1, 1024, dtype=torch.float64)
    p_s, p_t = (histogram(x, n, len(L)) for x, n in ((lightness, count), (reference_lightness, reference_count)))
    wanted = (L * p_t).sum()                                                                  # sum_L L p_t(L)

    def best(gammas: Tensor) -> int:
        mean = (L ** gammas[:, None] * p_s).sum(dim=1)                                        # sum_L L^gamma p_s(L)
        cost = (mean - wanted) ** 2 + beta * (gammas - 1) ** 2
        ties = (cost == cost.min()).nonzero()[:, 0]
        return int(ties[(gammas[ties] - 1).abs().argmin()])

    low, high = GAMMA_RANGE
    gammas = torch.cat([torch.linspace(low, 1, 40), torch.linspace(1, high, 101)[1:]]).double()
    k = best(gammas)
    for _ in range(3):                                                                        # each time 25 times finer
        between = torch.linspace(float(gammas[max(0, k - 1)]), float(gammas[min(len(gammas) - 1, k + 1)]), 51).double()
        gammas = torch.cat([between, gammas[k:k + 1]]).unique()                               # keeps the best so far, so 1
        k = best(gammas)
    return float(gammas[k])


def histogram(x: Tensor, count: Tensor | None, levels: int) -> Tensor:
    """(levels,) float64 shares of the values of x, rounded to equally spaced levels of [0, 1], each weighed by its count."""
    index = (x.clamp(0, 1).float() * (levels - 1)).round().long().flatten()
    total = index.bincount(None if count is None else count.flatten().double(), minlength=levels).double().cpu()
    return total / total.sum()


def distinct_colors(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The colours of an image, since an aligned pixel is a function of its colour: a photograph has ten times as many pixels.

    Args: image (3, H, W) in [0, 1].
    Returns: colours (3, U), how many pixels each has (U,), and each pixel's colour (H, W). An image that does not consist of
        256 levels a channel is returned pixel by pixel.
    """
    scaled = image * 255
    levels = scaled.round()
    if (scaled - levels).abs().max() > 1e-3:
        n = image[0].numel()
        return image.flatten(1), torch.ones(n, dtype=torch.int64, device=image.device), torch.arange(
            n, device=image.device).view_as(image[0])
    r, g, b = levels.int()
    packed, index, count = (r * 65536 + g * 256 + b).unique(return_inverse=True, return_counts=True)
    return torch.stack([packed // 65536, packed // 256 % 256, packed % 256]) / 255, count, index


def move_colors(source: Tensor, reference: Tensor, move) -> Tensor:
    """Apply move(Lab (3, U), count (U,), Lab of the reference (3, V), count (V,)) -> Lab (3, U) to the colours of an image.

    Args: source (3, H, W), reference (3, H', W') in [0, 1].  Returns: (3, H, W) in [0, 1].
    """
    (colors, count, index), (colors_n, count_n, _) = distinct_colors(source), distinct_colors(reference)
    lab, lab_n = (rgb_to_lab(c[..., None])[..., 0] for c in (colors, colors_n))
    moved = lab_to_rgb(move(lab, count, lab_n, count_n)[..., None])[..., 0].to(source.dtype)  # (3, U)
    return moved[:, index]


def photometric_align(source: Tensor, reference: Tensor, beta: float = 0.01) -> Tensor:
    """Global photometric alignment: m' from (f_gamma(L_m), f_match(a_m), f_match(b_m)), Sec. 3.2.

    Args:
        source: (3, H, W) RGB in [0, 1].
        reference: (3, H', W') RGB in [0, 1], of any size.
        beta: weight in Eq. (2).
    Returns: (3, H, W) in [0, 1], matched exactly, at the cost of the images' distinct colours. Call it outside autocast.
    """
    def move(lab, n, lab_n, n_n):
        gamma = solve_gamma(lab[0] / 100, lab_n[0] / 100, beta, n, n_n)
        return torch.stack([100 * (lab[0] / 100).clamp(0, 1) ** gamma, match_values(lab[1], n, lab_n[1], n_n),
                            match_values(lab[2], n, lab_n[2], n_n)])
    return move_colors(source, reference, move)


def align_by_gamma(source: Tensor, reference: Tensor, beta: float = 0.01) -> Tensor:
    """Table 4's gamma correction on all three Lab channels; arguments as `photometric_align`."""
    def move(lab, n, lab_n, n_n):
        scale, shift = lab.new_tensor([[100.0], [256.0], [256.0]]), lab.new_tensor([[0.0], [0.5], [0.5]])
        unit, unit_n = ((x / scale + shift).clamp(0, 1) for x in (lab, lab_n))                # each channel in [0, 1]
        gammas = [solve_gamma(x, x_n, beta, n, n_n) for x, x_n in zip(unit, unit_n)]
        return (torch.stack([x ** gamma for x, gamma in zip(unit, gammas)]) - shift) * scale
    return move_colors(source, reference, move)


def align_by_histogram(source: Tensor, reference: Tensor) -> Tensor:
    """Table 4's histogram matching on all three Lab channels; arguments as `photometric_align`."""
    return move_colors(source, reference, lambda lab, n, lab_n, n_n: torch.stack(
        [match_values(x, n, x_n, n_n) for x, x_n in zip(lab, lab_n)]))


def align_by_frequency(source: Tensor, reference: Tensor, window: float = 0.01) -> Tensor:
    """Table 4's frequency alignment [33]: the source's phase with the reference's amplitude at the lowest frequencies.

    Args: source (3, H, W), reference (3, H', W') in [0, 1]; window: half width of the window, of the shorter side.
    Returns: (3, H, W) in [0, 1].
    """
    reference = F.interpolate(reference[None], source.shape[-2:], mode="bilinear", antialias=True)[0]
    spectrum, other = torch.fft.fft2(source), torch.fft.fft2(reference)
    half = int(window * min(source.shape[-2:]))
    low_y, low_x = (torch.fft.fftfreq(n, 1 / n, device=source.device).abs() <= half for n in source.shape[-2:])
    amplitude = torch.where(low_y[:, None] & low_x, other.abs(), spectrum.abs())
    return torch.fft.ifft2(torch.polar(amplitude, spectrum.angle())).real.clamp(0, 1)


# ------------------------------------------------------------ categories: thresholds, centres, losses


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """L_seg: cross entropy on labelled pixels, at the size of the labels.

    Args: logits (N, C, h, w); label (N, H, W) int64, 255 ignored.
    Returns: 0-d, mean over the labelled pixels; exactly 0 if there are none.
    """
    loss = F.cross_entropy(upsample(logits, label.shape[-2:]), label, ignore_index=IGNORE, reduction="sum")
    return loss / (label != IGNORE).sum().clamp(min=1)


def category_thresholds(histogram: Tensor, P_h: float = 0.9, p: float = 10.0) -> Tensor:
    """Confidence from which a pseudo label is valid, for each category.

    Sec. 3.1:  t_c = min(P_h, P_s,c);  p percent of the pixels of category c have confidence above P_s,c

    Args:
        histogram: (C, B) int64, confidences of the pixels predicted as each category, in B equal bins of [0, 1].
        P_h: cap.  p: in percent.
    Returns: (C,) float64: P_s,c is the highest lower edge of a bin at or above which at least p percent lie; a category
        that is never predicted has P_h.
    """
    at_or_above = histogram.flip(1).cumsum(1).flip(1)                                         # (C, B)
    enough = 100 * at_or_above >= p * at_or_above[:, :1]                                      # true, then false
    P_s = (enough.sum(dim=1) - 1).double() / histogram.shape[1]
    return torch.where(at_or_above[:, 0] > 0, P_s, 1.0).clamp(max=P_h)


def class_sums(feat: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """What a batch contributes to Eq. (3). Args: feat (N, D, h, w), label (N, h, w), 255 ignored.

    Returns: sum (C, D) float64 and count (C,) int64, which add up over batches.
    """
    feat, label = feat.movedim(1, -1)[label != IGNORE], label[label != IGNORE]                # (M, D), (M,)
    one_hot = label == torch.arange(num_classes, device=label.device)[:, None]                # (C, M)
    return one_hot.double() @ feat.double(), one_hot.sum(dim=1)


def category_centers(sum: Tensor, count: Tensor) -> Tensor:  # noqa: A002
    """Centres of the categories on the unit sphere.

    Eq. (3):  f_c = G(1 / N_c sum_s sum_i sum_j 1(y_ij = c) x_ij),  G: L2 normalisation

    Args: sum (C, D) and count (C,), of `class_sums`.
    Returns: (C, D), rows of length 1; NaN for a category without pixels.
    """
    mean = sum / count[:, None]
    return mean / mean.norm(dim=1, keepdim=True)


def centered(label: Tensor, centers: Tensor) -> Tensor:
    """Bool, where a label (N, h, w) is a category that has a centre: not where it is 255, nor where the centre is NaN."""
    return (label != IGNORE) & ~centers.isnan().any(dim=1)[label.clamp(max=len(centers) - 1)]


def triplet_loss(feat: Tensor, label: Tensor, centers: Tensor, margin: float = 0.2, negatives: str = "nearest") -> Tensor:
    """Hold every feature closer to its own category's centre than to the others'.

    Eq. (4):  L_triplet = sum max(||G(x_ij) - f_c=C|| - ||G(x_ij) - f_c!=C|| + alpha, 0)

    Args:
        feat: (N, D, h, w) float.
        label: (N, h, w) int64 on the feature's grid, 255 ignored.
        centers: (C, D), fixed; a row of NaN is a category without centre.
        margin: alpha.
        negatives: "nearest" other centre, or "all" others, summed.
    Returns: 0-d, mean over the labelled pixels whose category has a centre; exactly 0 if there are none.
    """
    if negatives not in ("nearest", "all"):
        raise ValueError(f'negatives is "nearest" or "all", not {negatives!r}')
    absent = centers.isnan().any(dim=1)                                                       # (C,)
    valid = centered(label, centers)                                                          # (N, h, w)
    x = F.normalize(at_least_float32(feat), dim=1, eps=1e-4)                                  # (N, D, h, w), G(x)
    centers = centers.nan_to_num().to(x.dtype)
    dot = (centers @ x.flatten(2)).unflatten(2, x.shape[2:])                                  # (N, C, h, w)
    square = x.square().sum(dim=1, keepdim=True) + centers.square().sum(dim=1)[:, None, None] - 2 * dot
    distance = square.clamp(min=1e-12).sqrt()                                                 # (N, C, h, w)

    own = torch.where(valid, label, 0)[:, None]                                               # (N, 1, h, w)
    classes = torch.arange(len(centers), device=label.device)[:, None, None]
    violation = (distance.gather(1, own) - distance + margin).clamp(min=0)                    # (N, C, h, w)
    violation = violation.masked_fill((classes == own) | absent[:, None, None], 0)
    loss = violation.amax(dim=1) if negatives == "nearest" else violation.sum(dim=1)          # the nearest violates most
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def consistency_loss(logits_augmented: Tensor, pseudo_label: Tensor) -> Tensor:
    """Predict on the augmented image what the model of the step before predicted on the clean one.

    Eq. (5):  L_cst = sum_j 1(max T_{i-1}(n)|_j >= t_c) CE(y^_j, p_j),  p = T_i(n')

    Args:
        logits_augmented: (N, C, h, w), of T_i on tau(n).
        pseudo_label: (N, H, W) int64, of T_{i-1} on n; 255 where the confidence is below t_c.
    Returns: 0-d, mean over the valid pixels (the paper sums); exactly 0 if there are none.
    """
    return segmentation_loss(logits_augmented, pseudo_label)


# --------------------------------------------------------------------- aligned images, labels of a step


class Alignment:
    """What the loader's workers do to a source image: align it to a target image chosen by the item's seed."""

    def __init__(self, cfg: Config, references: list[Path]):
        self.cfg, self.references = cfg, references

    def __call__(self, image: Tensor, seed: int, name: str) -> Tensor:
        """(3, H, W) in [0, 1] -> the same, aligned."""
        cfg = self.cfg
        reference = read_resized(self.references[derive_seed(seed, "reference") % len(self.references)], cfg.target_size)
        if cfg.alignment == "gpa":
            return photometric_align(image, reference, cfg.beta)
        if cfg.alignment == "gamma":
            return align_by_gamma(image, reference, cfg.beta)
        if cfg.alignment == "histogram":
            return align_by_histogram(image, reference)
        return align_by_frequency(image, reference, cfg.window)


def draw_alignments(run: Run, cfg: Config, source: SegmentationDataset, target: SegmentationDataset) -> None:
    """A picture: source, reference, and the source by each alignment of Table 4."""
    aligners = {"aligned (gpa)": lambda m, n: photometric_align(m, n, cfg.beta),
                "gamma on all": lambda m, n: align_by_gamma(m, n, cfg.beta), "histogram on all": align_by_histogram,
                "frequency": lambda m, n: align_by_frequency(m, n, cfg.window)}
    rows = []
    for k in range(4):
        pair = [denormalise(data[k * len(data) // 4][0]) for data in (source, target)]        # (H, W, 3) uint8
        m, n = (torch.from_numpy(image).permute(2, 0, 1) / 255 for image in pair)
        rows.append([*pair, *((align(m, n) * 255).round().byte().permute(1, 2, 0).numpy() for align in aligners.values())])
    run.draw("alignment.png", rows, ["source", "reference", *aligners], width=256)


def tau(images: Tensor, strength: float, seeds: list[int]) -> Tensor:
    """Colour jitter of normalised images (N, 3, H, W), each a function of its seed."""
    jitter = v2.ColorJitter(strength, strength, strength, hue=0.4 * strength)
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    jittered = []
    for image, seed in zip(images, seeds, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            jittered.append((jitter((image * std + mean).clamp(0, 1)) - mean) / std)
    return torch.stack(jittered).contiguous(memory_format=torch.channels_last if images.is_contiguous(
        memory_format=torch.channels_last) else torch.contiguous_format)


def first_valid_bin(thresholds: Tensor) -> Tensor:
    """(C,) t_c -> (C,) int64, the first of the BINS bins of confidence whose lower edge is not below t_c."""
    return (thresholds * BINS - 1e-3).ceil().long()


def valid_labels(label: Tensor, confidence_bin: Tensor, thresholds: Tensor) -> Tensor:
    """Pseudo labels (N, H, W) with 255 where the confidence, known as a bin of BINS, is below t_c."""
    first = torch.cat([first_valid_bin(thresholds), label.new_full((1,), BINS)])              # the last: no label
    return label.masked_fill(confidence_bin < first[label.clamp(max=len(thresholds))], IGNORE)


@torch.no_grad()
def source_centers(run: Run, model: nn.Module, aligned: Dataset, num_classes: int) -> Tensor:
    """Eq. (3) over the aligned source set, in one pass: (C, D) float32."""
    where = run.float64_device
    total = torch.zeros(num_classes, model.feat_channels, dtype=torch.float64, device=where)
    count = torch.zeros(num_classes, dtype=torch.int64, device=where)
    model.eval()
    for x, y, _ in run.sweep("centres", aligned, shared=True):
        with run.autocast():
            feat, _ = model(x)                                                                # (1, D, h, w)
        part, pixels = class_sums(feat.to(where), resize_label(y, feat.shape[-2:]).to(where), num_classes)
        total, count = total + part, count + pixels
    model.train()
    sum_over_processes(total, count)
    return category_centers(total, count).float().to(run.device)


@torch.no_grad()
def label_target(run: Run, model: nn.Module, target: SegmentationDataset, folder: Path, num_classes: int) -> Tensor:
    """Write T_{i-1}'s pseudo label and confidence bin of every target pixel; return the histogram (C, BINS) of confidences."""
    histogram = torch.zeros(num_classes * BINS, dtype=torch.int64, device=run.device)
    model.eval()
    for x, _, (name,) in run.sweep("pseudo labels", target, shared=True):
        with run.autocast():
            _, logits = model(x)                                                              # (1, C, h, w)
        confidence, label = upsample(logits, x.shape[-2:]).softmax(dim=1).max(dim=1)          # (1, H, W) each
        index = (confidence * BINS).long().clamp(max=BINS - 1)
        histogram += (label * BINS + index).flatten().bincount(minlength=len(histogram))
        save_label(folder / "labels" / f"{name}.png", label[0])
        save_label(folder / "confidences" / f"{name}.png", index[0])
    model.train()
    sum_over_processes(histogram)
    return histogram.view(num_classes, BINS)


def prepare_step(run: Run, cfg: Config, i: int, model: nn.Module, aligned: Dataset, target: SegmentationDataset,
                 classes: ClassList) -> None:
    """From T_{i-1}: write the centres, pseudo labels, confidences and thresholds of step i into its folder."""
    name, folder = f"step{i}", run.folder / f"step{i}"
    run.prepare(name)
    centers = source_centers(run, model, aligned, len(classes))
    histogram = label_target(run, model, target, folder, len(classes))
    thresholds = category_thresholds(histogram, cfg.P_h, cfg.p)
    kept = {"centers": centers.cpu(), "thresholds": thresholds.float().cpu()}
    run.keep(f"{name}/state.pt", kept)

    bins = torch.arange(BINS, device=histogram.device)
    valid = (histogram * (bins >= first_valid_bin(thresholds)[:, None])).sum(dim=1)
    percent = 100 * valid / histogram.sum(dim=1)
    print(f"\n{name}: valid pseudo labels of the target, in percent of the pixels predicted as the category")
    for c, t, share, center in zip(classes.names, thresholds.tolist(), percent.tolist(), centers):
        print(f"{c:<16}t_c {t:.3f}" + ("never predicted".rjust(17) if isnan(share) else f"{share:17.1f}")
              + "   no source pixel, so no centre" * bool(center.isnan().any()))
    print(f"{'all':<16}{100 * float(valid.sum() / histogram.sum()):26.1f}", flush=True)
    run.log(stage=name, iteration=0, thresholds=dict(zip(classes.names, thresholds.tolist())),
            valid_percent={c: round(share, 2) for c, share in zip(classes.names, percent.tolist()) if not isnan(share)},
            without_center=[c for c, center in zip(classes.names, centers) if center.isnan().any()])


# ----------------------------------------------------------------------------------------------- the steps


def sgd(model: nn.Module, cfg: Config, lr: float) -> torch.optim.SGD:
    """Sec. 4.1's optimizer."""
    return torch.optim.SGD(model.parameter_groups(lr, cfg.encoder_rate), lr=lr, momentum=cfg.momentum,
                           weight_decay=cfg.weight_decay)


def train_step0(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, iterations: int) -> None:
    """Step 0: T_0 on tau(M') by L_seg."""
    optimizer = sgd(model, cfg, cfg.lr)
    state = {"model": model, "optimizer": optimizer}
    model = run.parallel(model)
    for _, (x, y) in run.stage("step0", iterations, state, source, batch_size=cfg.batch_size):
        with run.autocast():
            _, logits = model(x)                                                              # (N, C, h, w)
        loss = segmentation_loss(logits, y) * run.share(y != IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg_s=loss)


def train_step(run: Run, cfg: Config, i: int, model: nn.Module, centers: Tensor, thresholds: Tensor,
               source: SegmentationDataset, target: SegmentationDataset) -> None:
    """Steps 1 to K: from T_{i-1} to T_i by L_seg + L_triplet + L_consist, with fixed centres and pseudo labels."""
    optimizer = sgd(model, cfg, cfg.step_lr)
    state = {"model": model, "optimizer": optimizer}
    model = run.parallel(model)
    for it, (x_s, y_s), (x_t, _, y_t, confidence) in run.stage(f"step{i}", cfg.step_iterations, state, source, target,
                                                               batch_size=cfg.batch_size):
        y_t = valid_labels(y_t, confidence, thresholds)                                       # (N, H, W)
        x_tau = tau(x_t, cfg.jitter, run.item_seeds(len(x_t), "tau", i, it))
        with run.autocast():
            feat_s, logits_s = model(x_s)                                                     # (N, D, h, w), (N, C, h, w)
            feat_t, logits_t = model(x_t)
            _, logits_tau = model(x_tau)

        share_s, share_t = run.share(y_s != IGNORE), run.share(y_t != IGNORE)
        seg_s, seg_t = segmentation_loss(logits_s, y_s) * share_s, segmentation_loss(logits_t, y_t) * share_t
        y_grid = resize_label(y_s, feat_s.shape[-2:])                                         # (N, h, w)
        triplet = triplet_loss(feat_s, y_grid, centers, cfg.margin, cfg.negatives)            # Eq. (4)
        triplet = triplet * run.share(centered(y_grid, centers))
        if cfg.triplet_target:
            y_grid = resize_label(y_t, feat_t.shape[-2:])
            triplet_t = triplet_loss(feat_t, y_grid, centers, cfg.margin, cfg.negatives)
            triplet = triplet + triplet_t * run.share(centered(y_grid, centers))
        consist = consistency_loss(logits_tau, y_t) * share_t                                 # Eq. (5)
        loss = seg_s + cfg.lambda_pseudo * seg_t + cfg.lambda_triplet * triplet + cfg.lambda_consist * consist

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg_s=seg_s, seg_t=seg_t, triplet=triplet, consist=consist)


def align_files(cfg: Config) -> None:
    """--align SOURCE REFERENCE OUT: align one picture exactly and write it as PNG."""
    if len(cfg.align) != 3:
        raise UserError(f"--align takes three files, SOURCE REFERENCE OUT, not {len(cfg.align)}")
    source, reference = (read_image(path).float() / 255 for path in cfg.align[:2])
    aligned = (photometric_align(source, reference, cfg.beta) * 255).round().byte().permute(1, 2, 0).numpy()
    write_atomically(cfg.align[2], lambda file: Image.fromarray(aligned).save(file, format="PNG"))


def check(cfg: Config, options: Options) -> None:
    """Check the settings before anything is loaded."""
    if len(cfg.scale) != 2 or cfg.scale[0] > cfg.scale[1]:
        raise UserError(f"--scale {' '.join(map(str, cfg.scale))} is no range: give the smallest and the largest factor")
    check_domains(cfg, options, "step0", [cfg.source_size, cfg.target_size], cfg.scale[1])


@command
def main(argv: list[str] | None = None) -> None:
    """Step 0, then steps 1 to K, each followed by its evaluation."""
    cfg, options = parse("c2f.py", __doc__, (Config, Options), argv, TOY)
    if cfg.align:
        align_files(cfg)
        return
    check(cfg, options)
    if options.toy:
        toycity.ensure(options.data)
    run = Run("c2f", cfg, options, ("step0", *(f"step{i}" for i in range(1, cfg.K + 1))))
    classes = class_list(cfg.source, cfg.target)
    sizes = {cfg.source: cfg.source_size, cfg.target: cfg.target_size}

    test, tests = run.images(cfg.target, "val", classes, sizes), {"single-scale": {}}
    if options.eval:
        model = run.network("v3+", classes)
        run.evaluate(run.load_latest(model), model, test, classes, tests)
        return

    moved = Augment(scale=(cfg.scale[0], cfg.scale[1]), crop=cfg.crop)
    target = run.images(cfg.target, "train", classes, sizes, labels=False, augment=moved)
    alter = None if cfg.alignment == "none" or options.target_labels else Alignment(cfg, [pair.image for pair in target.pairs])
    labelled_domain = cfg.target if options.target_labels else cfg.source
    source = run.images(labelled_domain, "train", classes, sizes, augment=replace(moved, jitter=cfg.jitter), alter=alter)
    whole = run.images(labelled_domain, "train", classes, sizes, alter=alter)
    aligned = OneVersion(whole, derive_seed(options.seed, "centres"))

    model = run.network("v3+", classes)
    if alter is not None and run.trains("step0") and not run.begun("step0"):
        draw_alignments(run, cfg, source, target)
    run.start_from(model)
    run.watch(model, test, classes)
    # Train the upper bound for as many iterations as the adapted model.
    train_step0(run, cfg, model, source, cfg.step0_iterations + options.target_labels * cfg.K * cfg.step_iterations)
    run.evaluate("step0", model, test, classes, tests)

    model.freeze_bn(cfg.adapt_freeze_bn)
    for i in range(1, cfg.K + 1):
        if not run.reaches(f"step{i}"):
            continue
        folder, centers, thresholds, labelled = run.folder / f"step{i}", None, None, target
        if run.trains(f"step{i}"):
            if not run.begun(f"step{i}"):
                prepare_step(run, cfg, i, model, aligned, target, classes)
            if not (folder / "state.pt").exists():
                raise UserError(f"{folder / 'state.pt'} is gone; delete {run.folder / 'last.pt'} too to start this step again")
            kept = run.read(f"step{i}/state.pt")
            centers, thresholds = kept["centers"].to(run.device), kept["thresholds"].to(run.device)
            labelled = target.with_maps(folder / "labels", folder / "confidences")
        train_step(run, cfg, i, model, centers, thresholds, source, labelled)
        run.evaluate(f"step{i}", model, test, classes, tests)


if __name__ == "__main__":
    main()
