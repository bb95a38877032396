"""Bidirectional Self-Training with Multiple Anisotropic Prototypes for Domain Adaptive Semantic Segmentation (BiSMAP).

Lu, Luo, Zhang, Li, Yang, Xiao. CVPR 2022. arXiv:2204.07730

Forward: each category's source features are a mixture of diagonal Gaussians (MAPs), and target pixels whose density under
the best mixture is high get its category as pseudo label. Backward: source pixels that are far from all clusters of target
features weigh less in training (the source transferability map, STM).

    Eq. (2)          segmentation_loss                warm-up on source images aligned by c2f.photometric_align
    Eq. (3)          correct_label_map, FeatureSample  Lambda_c and 300,000 of it a category
    Sec. 3.3         fit_gmm                          expectation maximisation
    Eqs. (4), (5)    log_density
    Eq. (6)          map_pseudo_labels
    Sec. 3.4         kmeans                           target prototypes A_j
    Eq. (7)          target_distance
    Eq. (8)          normalised_entropy
    Eq. (9)          transferability_map
    Eq. (10)         reweighted_cross_entropy
    Eq. (11)         symmetric_cross_entropy
    Eq. (12)         consistency_loss
    Eq. (13)         self_train
    "as ProDA [40]"  distill
    Table 3          anchor_pseudo_labels (CAs), ias_thresholds (IAS)

    E, F, G = F o E   encoder, classifier, network       C, c     categories
    f, feat           feature that enters the classifier  G, k     `--components` a category (the paper's K)
    p_c               log density of category c's mixture delta    `--delta`, of Eq. (6)
    E^, f^            independent encoder, its features   J, A_j   target prototypes
    D(x), d_mean      distance to them, and its mean      w        transferability
    phi               RandAugment and CutOut              lambda   `--lambda-consist`, of Eq. (13)

Stages: warmup -> selftrain -> distill1 -> distill2.

    python bismap.py --toy                                   the toy city, some minutes on two cores
    python bismap.py --source gta5                           the paper's GTA5 -> Cityscapes; again to resume
    torchrun --nproc_per_node=4 bismap.py --source gta5      on four GPUs, four times the batch
    python bismap.py --source gta5 --from runs/bismap-gta5/warmup.pt --no-distill --assign none --lambda-consist 0 --tag stm
    python bismap.py --source gta5 --eval                    only evaluate what the run has reached

Departures:
 1. Sums over pixels are means over the labelled pixels, in Eq. (12) over those that CutOut left (the padding of a crop that is
    larger than its image counts).
 2. Features, densities and entropies are computed at stride 4, Eq. (7)'s distances at E^'s own, 16; they are then enlarged.
    Footnote 1 enlarges features, which is 16 times the work.
 3. Mixtures start from k-means; a variance is at least `variance_floor`; EM stops when the mean log-likelihood rises by less
    than `em_tol`; a component that lost its samples starts again at the sample of lowest density.
 4. delta depends on the feature's dimension and on the variance floor: `--pl-ratio` picks it so that this share of the
    target's pixels is labelled, Table 5's "PL ratio".
 5. E^ is torchvision's ResNet-152 on ImageNet, its layer3 (`stm_backbone`, `stm_layer`, `stm_weights`); the paper's is
    pretrained by SimCLRv2. J, and how many target features are clustered, are not in the paper.
 6. Eq. (7) prints 0 < j < J: all J centres are used. Eq. (8)'s prose swaps minimum and maximum; a category that is never
    predicted has e' = 0, as all have where all entropies are equal.
 7. After the warm-up each source image has one fixed aligned version, so that its transferability map fits. The map is 8 bits.
 8. Eq. (11): the clamped label is in both terms; p is clamped to [1e-7, 1].
 9. Eq. (12) puts phi on the teacher's input (`--augment teacher`); the authors' code on the student's. phi's operations are
    RandAugment's on colours; how many, how strong, and CutOut's size are not in the paper.
10. Distillation is described by "proposed in [40]": two rounds, each with a fresh student, hard labels of the model before
    by multi-scale and flipped test, Eq. (10) on the source, Eq. (11) on the target, and KL to the model before.
11. Batch norm of pretrained encoders is frozen (`--freeze-bn`), in self-training all of it (`--adapt-freeze-bn`), as in C2F.
    There is no dropout; each stage has its own optimizer and rate horizon; the colour jitter's strength is not in the paper.
12. In Table 3, CAs are the means of the samples of Eq. (3) with CAG's margin; IAS's constants are IAST's.
The authors' code differs in ways that are not taken: no logarithm in distillation's KL (it sharpens), hard-coded entropies,
d_mean as a moving average, lambda 30, phi on the student's input.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

from c2f import photometric_align
from common import metrics, toycity
from common.cli import Size, UserError, command, option, parse
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
from common.deeplab import at_least_float32, read_weights, resize_label, resnet_features, upsample
from common.run import Options, Run, check_domains, gather_objects, same_buffers, sum_over_processes
from common.viz import colorize, denormalise

BLOCK = 2048                                           # features that are worked on at once: they stay in the cache
SIZES = {"synthia": Size(2048, 1024)}                  # Sec. 4.2; the others' own
SCORES = torch.linspace(-17, 10, 27_001, dtype=torch.float64).sinh()   # histogram by which --pl-ratio picks delta: 0.1 % wide
KEPT = ("prototypes.pt", "pseudo_labels.pt", "target_prototypes.pt", "transferability.pt")   # by prepare_selftraining


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    source: str = option("gta5", "source domain", choices=("gta5", "synthia", "cityscapes"))
    target: str = option("cityscapes", "target domain", choices=("cityscapes", "crosscity"))
    city: str = option("Rome", "city of Cross-City", choices=("Rome", "Rio", "Tokyo", "Taipei"))
    backbone: str = option("resnet101", "encoder of DeepLab v3+", paper="resnet101", section="Sec. 4.2",
                           choices=("resnet101", "resnet50", "resnet18"))
    freeze_bn: str = option("auto", "batch norm kept fixed, but for self-training; auto: encoder, or none with --init none",
                            choices=("auto", "all", "encoder", "none"))
    adapt_freeze_bn: str = option("all", "batch norm kept fixed in self-training", choices=("all", "encoder", "none"))
    alignment: str = option("gpa", "global photometric alignment of the source, or none", paper="gpa", section="Sec. 3.5",
                            choices=("gpa", "none"))
    components: int = option(8, "Gaussians a category", paper=8, section="Sec. 3.5", low=1)
    samples: int = option(300_000, "source features a category to fit them to; each takes 1.3 KB", paper=300_000,
                         section="Sec. 3.5", low=1)
    em_iterations: int = option(100, "EM's iterations, at most", low=1)
    em_tol: float = option(1e-3, "EM stops when the mean log-likelihood rises by less", low=0.0)
    variance_floor: float = option(1e-6, "smallest variance of a Gaussian", low=1e-30)
    assign: str = option("maps", "pseudo labels by Eq. (6), by category anchors, by instant adaptive selector; none",
                         paper="maps", section="Table 3", choices=("maps", "anchors", "ias", "none"))
    delta: float | None = option(None, "log density from which Eq. (6) labels; automatic: by --pl-ratio, else 100, from "
                                 "SYNTHIA -50 (Sec. 4.2)")
    pl_ratio: float | None = option(None, "pick delta so that this share of the target's pixels is labelled", low=0.0, high=1.0)
    anchor_margin: float = option(1.0, "margin of --assign anchors", paper=1.0, section="Table 5", low=0.0)
    stm: bool = option(True, "weigh source pixels by the transferability map", paper=True, section="Sec. 3.4")
    stm_backbone: str = option("resnet152", "E^: a torchvision classification network, or warmup: the warm-up's encoder")
    stm_layer: str = option("layer3", "its layer that gives the features")
    stm_weights: str | None = option(None, "file with its weights in torchvision's names; automatic: torchvision's of ImageNet")
    J: int = option(40, "target prototypes", low=1)
    stm_samples: int = option(200_000, "target features that are clustered", low=1)
    alpha: float = option(0.1, "weight of the cross entropy in Eq. (11)", paper=0.1, section="Sec. 3.5", low=0.0)
    beta: float = option(1.0, "weight of the reverse cross entropy in Eq. (11)", paper=1.0, section="Sec. 3.5", low=0.0)
    lambda_consist: float = option(20.0, "lambda, weight of Eq. (12); 0: without consistency", paper=20.0, section="Sec. 4.2",
                                   low=0.0)
    ema: float = option(0.999, "smoothing coefficient of the teacher", paper=0.999, section="Sec. 4.2", low=0.0, high=1.0)
    augment: str = option("teacher", "whose input phi augments", paper="teacher", section="Eq. (12)",
                          choices=("teacher", "student"))
    phi_operations: int = option(2, "operations of RandAugment an image", low=0)
    phi_strength: float = option(0.5, "their strength", low=0.0, high=1.0)
    cutout: float = option(0.4, "side of the square that CutOut removes, of the shorter side", low=0.0, high=1.0)
    distill: bool = option(True, "two rounds of distillation", paper=True, section="Table 4")
    lambda_kl: float = option(1.0, "weight of KL in distillation", low=0.0)
    test_scales: tuple[float, ...] = option((0.7, 1.0, 1.3), "scales of distillation's labels, each also flipped", low=0.1)
    jitter: float = option(0.5, "colour jitter: brightness, contrast, saturation by this, hue by 0.4 of it", low=0.0, high=1.0)
    lr: float = option(5e-4, "SGD's initial rate in the warm-up", paper=5e-4, section="Sec. 4.2", low=0.0)
    adapt_lr: float = option(5e-4, "SGD's initial rate afterwards", paper=5e-4, section="Sec. 4.2", low=0.0)
    encoder_rate: float = option(1.0, "the encoder's rate as a multiple of --lr", low=0.0)
    momentum: float = option(0.9, "SGD's momentum", paper=0.9, section="Sec. 4.2", low=0.0, high=1.0)
    weight_decay: float = option(5e-4, "SGD's weight decay", paper=5e-4, section="Sec. 4.2", low=0.0)
    warmup_iterations: int = option(90_000, "iterations of the warm-up", paper=90_000, section="Sec. 4.2", low=1)
    selftrain_iterations: int = option(90_000, "iterations of self-training", paper=90_000, section="Sec. 4.2", low=1)
    distill_iterations: int = option(90_000, "iterations of a round of distillation", paper=90_000, section="Sec. 4.2", low=1)
    warmup_batch_size: int = option(8, "images a batch of the warm-up", paper=8, section="Sec. 4.2", low=1)
    batch_size: int = option(4, "images a batch afterwards, of each domain", paper=4, section="Sec. 4.2", low=1)
    source_size: Size | None = option(None, "source images are resized to it; automatic: their own size, SYNTHIA's 2048x1024 "
                                      "(Sec. 4.2)")
    target_size: Size | None = option(None, "target images are resized to it, also in the test; automatic: their own size")
    scale: tuple[float, ...] = option((0.5, 1.5), "range of the random resize in training", paper=(0.5, 1.5),
                                      section="Sec. 4.2", low=0.1)
    crop: Size = option(Size(896, 512), "random crop in training", paper=Size(896, 512), section="Sec. 4.2")


# The toy city has no independent encoder, its densities another scale than the paper's, and the teacher hardly any time.
TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           crop=Size(128, 64), scale=(1.0, 1.5), warmup_batch_size=2, batch_size=2, warmup_iterations=720,
           selftrain_iterations=300, distill_iterations=500, lr=5e-3, adapt_lr=1e-3, samples=20_000, pl_ratio=0.6,
           stm_backbone="warmup", stm_samples=20_000, ema=0.99, lambda_consist=1.0, workers=0, amp="bf16", channels_last=True)

_OFF = "--no-distill --no-stm --assign none --lambda-consist 0"
_GPA = "--from {GPA baseline}/warmup.pt"
RESULTS = {                                            # `make results METHOD=bismap`: row -> (stage reported, flags of its run)
    "source only": ("warmup", "--stage warmup --alignment none"),
    "source only, as long": ("selftrain", f"--from {{source only}}/warmup.pt --alignment none {_OFF}"),
    "GPA baseline": ("warmup", "--stage warmup"),
    "GPA only, as long": ("selftrain", f"{_GPA} {_OFF}"),
    "+ STM": ("selftrain", f"{_GPA} --no-distill --assign none --lambda-consist 0"),
    "+ MAPs": ("selftrain", f"{_GPA} --no-distill --lambda-consist 0"),
    "+ consistency": ("selftrain", _GPA),
    "distilled": ("distill2", _GPA),
    "target only (upper bound)": ("warmup", "--stage warmup --target-labels --alignment none"),
}


# ------------------------------------------------------------------- source prototypes: mixtures, Sec. 3.3


class Gmm(NamedTuple):
    """A mixture of diagonal Gaussians; those of all categories have a dimension C in front.

    weight (G,), pi; mean (G, D), mu; variance (G, D), the diagonal of Sigma. A weight may be 0: no such component.
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor


def component_log_prob(feat: Tensor, gmm: Gmm) -> Tensor:
    """log pi_k + log N_k(f) of Eq. (5), by two matrix products. Args: feat (M, D).  Returns: (M, G)."""
    shift = gmm.mean.mean(dim=0)                                                             # smaller numbers cancel less
    feat, mean, precision = feat - shift, gmm.mean - shift, 1 / gmm.variance
    cross = feat @ (2 * mean * precision).T
    square = feat.square_() @ precision.T - cross + (mean.square() * precision).sum(dim=1)   # in place: new memory is slow
    constant = gmm.weight.log() - 0.5 * (gmm.variance.log().sum(dim=1) + mean.shape[1] * math.log(2 * math.pi))
    return constant - 0.5 * square.clamp(min=0)


def log_density(feat: Tensor, gmm: Gmm) -> Tensor:
    """Log density of features under a mixture.

    Eq. (4):  p_c(f) = log sum_k pi_ck N_ck(f | mu_ck, Sigma_ck)
    Eq. (5):  N_ck(f) = exp(-1/2 (f - mu)^T Sigma^-1 (f - mu)) / ((2 pi)^(d/2) |Sigma|^(1/2))

    Args: feat (M, D) float; gmm of G components.
    Returns: (M,); -inf for a mixture without components. No underflow: it is a log-sum-exp.
    """
    return torch.cat([component_log_prob(block, gmm).logsumexp(dim=-1) for block in feat.split(BLOCK)])


def fit_gmm(feat: Tensor, components: int = 8, iterations: int = 100, tol: float = 1e-3, seed: int = 0, init: Gmm | None = None,
            variance_floor: float = 1e-6) -> Gmm:
    """Fit a mixture of diagonal Gaussians by expectation maximisation, Sec. 3.3.

    Args:
        feat: (M, D) float32 or float64.
        components: G; with fewer samples than that, the others get weight 0 (with none, all).
        iterations, tol: EM ends after so many, or when the mean log-likelihood rises by less than tol.
        seed: of the k-means start.
        init: start from this mixture instead.
        variance_floor: smallest variance; held by clamping, under which the likelihood still never falls.
    Returns: Gmm in feat's dtype; sums over samples are float64. A component that lost its samples starts again at the sample
        of lowest density, with the variance of all samples.
    """
    if len(feat) < components and init is None:
        few = fit_gmm(feat, len(feat), iterations, tol, seed, None, variance_floor) if len(feat) else (feat[:, 0], feat, feat)
        (weight, mean, variance), more = few, components - len(feat)
        return Gmm(F.pad(weight, (0, more)), F.pad(mean, (0, 0, 0, more)), F.pad(variance, (0, 0, 0, more), value=1.0))

    center = feat.mean(dim=0)
    feat = feat - center                                                                      # smaller numbers cancel less

    def maximise(responsibility: Callable[[Tensor], Tensor]) -> tuple[Tensor, Gmm]:
        """Counts (G,), and the mixture of the weighted samples; responsibility: (m, D) -> (m, G), called block by block."""
        count, total, square = 0, 0, 0
        room = feat.new_empty(BLOCK, feat.shape[1], dtype=torch.float64)                      # new memory is slow
        for x in feat.split(BLOCK):
            r, x = responsibility(x).double().T, room[: len(x)].copy_(x)                      # (G, m), (m, D)
            count, total, square = count + r.sum(dim=1), total + r @ x, square + r @ x.square_()
        n = count.clamp(min=1e-300)[:, None]
        variance = (square / n - (total / n).square()).clamp(min=variance_floor)
        return count, Gmm(*(x.to(feat.dtype) for x in (count / count.sum(), total / n, variance)))

    if init is None:
        centers = kmeans(feat, components, seed=seed)
        gmm = maximise(lambda x: F.one_hot(nearest_center(x, centers)[1], components).to(feat.dtype))[1]
    else:
        gmm = init._replace(mean=init.mean - center)
    likelihood = -math.inf
    for _ in range(iterations):
        densities: list[Tensor] = []

        def expect(x: Tensor, gmm=gmm, densities=densities) -> Tensor:
            log_prob = component_log_prob(x, gmm)                                             # (m, G)
            densities.append(log_prob.logsumexp(dim=1))
            return (log_prob - densities[-1][:, None]).exp()

        count, gmm = maximise(expect)
        density = torch.cat(densities)                                                        # (M,)
        before, likelihood = likelihood, density.mean(dtype=torch.float64).item()
        if count.min() < 1e-6:                                                                # repair it, and go on
            empty, far = int(count.argmin()), int(density.argmin())
            gmm.weight[empty], gmm.mean[empty] = 1 / len(feat), feat[far]
            gmm.variance[empty] = feat.var(dim=0, correction=0).clamp(min=variance_floor)
            gmm.weight.div_(gmm.weight.sum())
        elif likelihood - before < tol:
            break
    return gmm._replace(mean=gmm.mean + center)


def correct_label_map(logits: Tensor, label: Tensor) -> Tensor:
    """The label where the prediction is right.

    Eq. (3):  Lambda_c = {f_i | argmax G(x)_i = c, y_i = c}

    Args: logits (N, C, h, w); label (N, h, w) int64 on the same grid, 255 ignored.  Returns: (N, h, w), 255 elsewhere.
    """
    return torch.where(logits.argmax(dim=1) == label, label, IGNORE)


class FeatureSample:
    """A uniform sample without replacement of each category's features, in one pass: those with the smallest random keys.

    A feature's key depends on (seed, image, pixel) alone, so the sample depends neither on the order of the images nor on
    how many processes share them. Memory: at most 1.25 `size` features a category between two images, in float32.
    """

    def __init__(self, num_classes: int, size: int):
        self.size = size
        self.parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_classes)]      # (keys, features)
        self.held = [0] * num_classes
        self.largest = [torch.iinfo(torch.int64).max] * num_classes                           # greater keys cannot enter

    def add(self, feat: Tensor, label: Tensor, key: Tensor) -> None:
        """Offer features. Args: feat (M, D); label (M,) int64, 255 ignored; key (M,) int64 of `pixel_keys`."""
        for c in label[label != IGNORE].unique().tolist():
            chosen = (label == c) & (key < self.largest[c])
            if chosen.any():
                self.parts[c].append((key[chosen].cpu(), feat[chosen].float().cpu()))
                self.held[c] += len(self.parts[c][-1][0])
            if self.held[c] > 1.25 * self.size:
                self._prune(c)

    def _prune(self, c: int) -> None:
        keys, feats = (torch.cat(part) for part in zip(*self.parts[c]))
        order = keys.argsort()[: self.size]
        self.parts[c], self.held[c] = [(keys[order], feats[order])], len(order)
        if len(order) == self.size:
            self.largest[c] = int(keys[order[-1]])

    def features(self, c: int) -> Tensor | None:
        """(n, D) float32, n <= size, in the order of their keys; None if there are none."""
        self.parts[c] = [part for parts in gather_objects(self.parts[c]) for part in parts]
        if not self.parts[c]:
            return None
        self._prune(c)
        return self.parts[c][0][1]


def pixel_keys(seed: int, name: str, count: int) -> Tensor:
    """(count,) int64 random keys of an image's pixels, a pure function of (seed, image, pixel)."""
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(derive_seed(seed, name)))


# ------------------------------------------------------------------------------------ target: pseudo labels


def map_pseudo_labels(log_prob: Tensor, delta: float) -> Tensor:
    """The category of the highest log density, where that is at least delta.

    Eq. (6):  y^_r = 1 if r = argmax_c p_c(f), p_r(f) >= delta, else 0

    Args: log_prob (N, C, h, w), p_c of Eq. (4).  Returns: (N, h, w) int64, 255 where no category reaches delta.
    """
    best, label = log_prob.max(dim=1)                                                         # (N, h, w) each
    return label.masked_fill(~((best >= delta) & best.isfinite()), IGNORE)


def delta_for_ratio(histogram: Tensor, ratio: float) -> float:
    """The largest edge of SCORES at or above which at least this share of the pixels' best log densities lies."""
    at_or_above = histogram.flip(0).cumsum(0).flip(0)
    enough = at_or_above >= ratio * at_or_above[0]                                            # true, then false
    return float(SCORES[max(0, int(enough.sum()) - 1)])


def anchor_pseudo_labels(feat: Tensor, anchors: Tensor, margin: float = 1.0) -> Tensor:
    """Table 3's CAs: the nearest anchor, where it is nearer than the second by more than a margin (CAG's Eqs. 5 to 7).

    Args: feat (N, D, h, w); anchors (C, D), NaN for a category without one.  Returns: (N, h, w) int64, 255 elsewhere.
    """
    distance = torch.cdist(feat.movedim(1, -1).flatten(0, 2), anchors.nan_to_num())           # (N h w, C)
    distance = distance.masked_fill(anchors.isnan().any(dim=1), torch.inf)
    (first, second), (label, _) = (x.unbind(dim=1) for x in distance.topk(2, dim=1, largest=False))
    return label.masked_fill(~(second - first > margin), IGNORE).view(len(feat), *feat.shape[2:])


def ias_thresholds(theta: Tensor, confidence: Tensor, label: Tensor) -> Tensor:
    """Table 3's IAS [25]: the thresholds after one more image.

    theta_c <- 0.9 theta_c + 0.1 psi_c;  psi_c: the confidence at rank 0.2 theta_c^8 of the image's category-c confidences

    Args: theta (C,); confidence, label (h, w) of the image's prediction.  Returns: (C,); unchanged for an absent category.
    """
    theta = theta.clone()
    for c in label.unique().tolist():
        ranked = confidence[label == c].sort(descending=True).values
        psi = ranked[min(len(ranked) - 1, int(len(ranked) * 0.2 * float(theta[c]) ** 8))]
        theta[c] = 0.9 * theta[c] + 0.1 * psi
    return theta


# ------------------------------------------------------------------------- source: transferability, Sec. 3.4


def nearest_center(feat: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (M,) of features (M, D) to the nearest of (J, D) centres, and its index (M,)."""
    parts = [torch.cdist(block, centers).min(dim=1) for block in feat.split(BLOCK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def kmeans(feat: Tensor, J: int, iterations: int = 100, seed: int = 0) -> Tensor:
    """Centres of J clusters: k-means++ start, then Lloyd's iterations until no feature changes its cluster.

    Args: feat (M, D) float, M >= 1.  Returns: (J, D); a cluster that lost its features moves to the one farthest from its
        own centre; with fewer than J different features, some centres are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    centers = feat[torch.randint(len(feat), (1,), generator=generator).to(feat.device)]
    square = nearest_center(feat, centers)[0].square()                                        # to the nearest centre so far
    while len(centers) < J:
        total = square.cumsum(dim=0, dtype=torch.float64)
        draw = torch.rand(1, generator=generator, dtype=torch.float64).to(feat.device) * total[-1]
        chosen = feat[torch.searchsorted(total, draw, right=True).clamp(max=len(feat) - 1)]   # with probability ~ square
        centers = torch.cat([centers, chosen])
        square = torch.minimum(square, nearest_center(feat, chosen)[0].square())
    label = None
    for _ in range(iterations):
        previous, (distance, label) = label, nearest_center(feat, centers)
        if previous is not None and torch.equal(label, previous):
            break
        count = label.bincount(minlength=J)
        total = torch.zeros(J, feat.shape[1], dtype=torch.float64, device=feat.device)
        for block, index in zip(feat.split(BLOCK), label.split(BLOCK)):
            total.index_add_(0, index, block.double())
        centers = (total / count.clamp(min=1)[:, None]).to(feat.dtype)
        empty = (count == 0).nonzero()[:, 0]
        if len(empty):
            far = distance.argsort(descending=True)[: len(empty)]
            centers[empty[: len(far)]] = feat[far]
            centers[empty[len(far):]] = feat[far[:1]]
    return centers


def target_distance(feat: Tensor, prototypes: Tensor) -> Tensor:
    """How far source features are from the target's.

    Eq. (7):  D(x)_i = min_j || f^_i - A_j ||_2, over all J

    Args: feat (M, D), of E^; prototypes (J, D).  Returns: (M,), >= 0.
    """
    return nearest_center(feat, prototypes)[0]


def normalised_entropy(entropy: Tensor) -> Tensor:
    """Min-max normalisation over the categories that were seen.

    Eq. (8):  e'_c = (e_c - e_min) / (e_max - e_min)

    Args: entropy (C,), mean entropy of the target pixels predicted as c; NaN for a category that never is.
    Returns: (C,) in [0, 1]; 0 for NaN, and for all where all are equal.
    """
    low, high = entropy.nan_to_num(torch.inf).min(), entropy.nan_to_num(-torch.inf).max()
    return ((entropy - low) / (high - low)).nan_to_num(0.0)                                   # 0 / 0, or a NaN


def transferability_map(distance: Tensor, d_mean: float | Tensor, normalised_entropy: Tensor, label: Tensor) -> Tensor:
    """Weight of every source pixel.

    Eq. (9):  w_i = min(exp(-D(x)_i^2 / d_mean^2 log 2) + e'_c, 1),  c = y_i

    Args: distance (N, h, w) of Eq. (7); d_mean, its mean over the source set, > 0; normalised_entropy (C,) of Eq. (8); label
        (N, h, w) int64, 255 ignored.
    Returns: (N, h, w) in [0, 1]; 0 where there is no label.
    """
    e = F.pad(normalised_entropy, (0, 1))[label.clamp(max=len(normalised_entropy))]
    w = (torch.exp(-(distance / d_mean).square() * math.log(2)) + e).clamp(max=1.0)
    return w.masked_fill(label == IGNORE, 0.0)


# ------------------------------------------------------------------------------------------------- the losses


def segmentation_loss(logits: Tensor, label: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Eq. (2): cross entropy, mean over labelled pixels. Args: logits (N, C, h, w); label (N, H, W) int64, 255 ignored."""
    loss = F.cross_entropy(upsample(logits, label.shape[-2:]), label, ignore_index=IGNORE, reduction="none")
    return (weight * loss).sum() / (label != IGNORE).sum().clamp(min=1)


def reweighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | float) -> Tensor:
    """Cross entropy of source pixels, each weighed by its transferability.

    Eq. (10):  L_ce = sum_i sum_c - w_i y_ic log p_ic

    Args: logits (N, C, h, w); label (N, H, W) int64, 255 ignored; weight (N, H, W) in [0, 1], or 1 for all.
    Returns: 0-d, divided by the number of labelled pixels (the paper sums); exactly 0 if there are none.
    """
    return segmentation_loss(logits, label, weight)


def symmetric_cross_entropy(logits: Tensor, pseudo_label: Tensor, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """Cross entropy both ways, which bears wrong labels better.

    Eq. (11):  L_sce = sum_i sum_c - alpha y^_ic log p_ic - beta p_ic log y^_ic,  y^ clamped to [1e-4, 1], p to [1e-7, 1]

    Args: logits (N, C, h, w); pseudo_label (N, H, W) int64, 255 ignored.
    Returns: 0-d, mean over the labelled pixels (the paper sums); exactly 0 if there are none.
    """
    logits = upsample(logits, pseudo_label.shape[-2:])                                        # (N, C, H, W)
    labelled = pseudo_label != IGNORE
    p = logits.softmax(dim=1).clamp(1e-7, 1.0)
    # y^ is 1 at the label and 1e-4 elsewhere, so both sums over c are a sum over all c and the value at the label.
    index = torch.where(labelled, pseudo_label, 0)[:, None]                                   # (N, 1, H, W)
    log_p, p_own = p.log(), p.gather(1, index)[:, 0]
    forward = 1e-4 * log_p.sum(dim=1) + (1 - 1e-4) * log_p.gather(1, index)[:, 0]             # sum_c y^_c log p_c
    reverse = math.log(1e-4) * (p.sum(dim=1) - p_own)                                         # sum_c p_c log y^_c, log 1 = 0
    return -((alpha * forward + beta * reverse) * labelled).sum() / labelled.sum().clamp(min=1)


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL divergence of the student's prediction from the teacher's.

    Eq. (12):  L_consist = sum_i sum_c p~_ic log p~_ic - p~_ic log p_ic

    Args: student_logits, teacher_logits (N, C, h, w), no gradient to the teacher's; mask (N, h, w), true where a pixel counts.
    Returns: 0-d, mean over the pixels that count (the paper sums); exactly 0 if none does.
    """
    log_p, log_q = student_logits.log_softmax(dim=1), teacher_logits.detach().log_softmax(dim=1)
    kl = (log_q.exp() * (log_q - log_p)).sum(dim=1)                                           # (N, h, w)
    if mask is None:
        return kl.mean()
    return (kl * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def update_teacher(teacher: nn.Module, model: nn.Module, ema: float) -> None:
    """theta' <- ema theta' + (1 - ema) theta, for weights and for floating point buffers; others are copied."""
    for old, new in zip(teacher.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - ema)
        else:
            old.copy_(new)


RAND_AUGMENT = (                                       # on uint8 images, by m in [-1, 1]
    lambda x, m: v2.functional.autocontrast(x),
    lambda x, m: v2.functional.equalize(x),
    lambda x, m: v2.functional.posterize(x, 8 - round(4 * abs(m))),
    lambda x, m: v2.functional.solarize(x, 255 * (1 - abs(m))),
    lambda x, m: v2.functional.adjust_saturation(x, 1 + m),
    lambda x, m: v2.functional.adjust_contrast(x, 1 + m),
    lambda x, m: v2.functional.adjust_brightness(x, 1 + m),
    lambda x, m: v2.functional.adjust_sharpness(x, 1 + m),
)


def phi(images: Tensor, seeds: list[int], operations: int = 2, strength: float = 0.5,
        cutout: float = 0.4) -> tuple[Tensor, Tensor]:
    """RandAugment's operations on colours, then CutOut, each image as a function of its seed.

    Args: images (N, 3, H, W), normalised; cutout, side of the square as a share of the shorter side.
    Returns: images of the same kind, and (N, H, W) bool, false where CutOut removed a pixel.
    """
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    augmented, kept = torch.empty_like(images), torch.ones_like(images[:, 0], dtype=torch.bool)
    side = round(cutout * min(images.shape[-2:]))
    for n, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = ((images[n] * std + mean).clamp(0, 1) * 255).round().byte()
        for k in torch.randint(len(RAND_AUGMENT), (operations,), generator=generator).tolist():
            x = RAND_AUGMENT[k](x, strength * (2 * torch.rand((), generator=generator).item() - 1))
        top, left = (int(torch.randint(1 - side, length, (), generator=generator)) for length in images.shape[-2:])
        kept[n, max(0, top): top + side, max(0, left): left + side] = False
        augmented[n] = torch.where(kept[n], (x / 255 - mean) / std, 0.0)                      # 0: the mean colour
    return augmented, kept


# ------------------------------------------------------------------------- aligned images, prototypes, labels


def align(references: list[Path], size: Size | None, fixed: int | None, image: Tensor, seed: int, name: str) -> Tensor:
    """What the loader's workers do to a source image (3, H, W) in [0, 1]: align it to a target image, chosen by the item's
    seed or, with a `fixed` seed, once and for all by the image's name."""
    chosen = derive_seed(seed, "reference") if fixed is None else derive_seed(fixed, name)
    return photometric_align(image, read_resized(references[chosen % len(references)], size))


def independent_encoder(run: Run, cfg: Config, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """E^, a function: (1, 3, H, W) -> features (1, D, h, w). Refuses by a UserError what cannot be used."""
    if cfg.stm_backbone == "warmup":
        return lambda x: resnet_features(model.encoder, model.prepare(x))[1]
    try:
        net = models.get_model(cfg.stm_backbone, weights=None if cfg.stm_weights else "IMAGENET1K_V1")
    except Exception as error:                         # a download raises almost anything
        raise UserError(f"--stm-backbone {cfg.stm_backbone}: torchvision does not know it, or its ImageNet weights are not "
                        f"here and did not download ({type(error).__name__}); give --stm-weights PATH, or --stm-backbone "
                        "warmup, or --no-stm") from error
    try:
        encoder = run.place(create_feature_extractor(net, {cfg.stm_layer: "feat"}).eval().requires_grad_(False))
        if encoder(torch.zeros(1, 3, 64, 128, device=run.device))["feat"].dim() != 4:
            raise ValueError("not a feature map")
    except Exception as error:
        raise UserError(f"--stm-layer {cfg.stm_layer} of --stm-backbone {cfg.stm_backbone} gives no feature map (1, D, h, w); "
                        "give another layer, or --stm-backbone warmup") from error
    if cfg.stm_weights:
        found, needed = read_weights(cfg.stm_weights, "--stm-weights"), encoder.state_dict()
        fitting = {k: v for k, v in found.items() if k in needed and v.shape == needed[k].shape}
        if missing := encoder.load_state_dict(fitting, strict=False).missing_keys:
            raise UserError(f"--stm-weights {cfg.stm_weights} lacks {len(missing)} keys of {cfg.stm_backbone} ({missing[0]}, "
                            "...) or has them in another shape; give weights of this network in torchvision's names")
    return lambda x: encoder(x)["feat"]


def class_scores(feat: Tensor, gmms: Gmm) -> Tensor:
    """p_c(f) of a feature map (N, D, h, w) under each category's mixture: (N, C, h, w), finite."""
    flat = at_least_float32(feat).movedim(1, -1).flatten(0, 2)                                # (N h w, D)
    scores = torch.stack([log_density(flat, Gmm(*gmm)) for gmm in zip(*gmms)], dim=-1)        # one shift each: exact
    return scores.view(len(feat), *feat.shape[2:], -1).movedim(-1, 1).clamp(min=-1e30)


def fit_prototypes(run: Run, cfg: Config, model: nn.Module, source: Dataset, num_classes: int) -> dict[str, Tensor]:
    """Eq. (3) over the aligned source set in one pass, then a mixture a category: weight (C, G), mean and variance (C, G, D),
    anchor (C, D), count (C,) of samples."""
    sample = FeatureSample(num_classes, cfg.samples)
    for x, y, (name,) in run.sweep("source features", source, shared=True):
        with run.autocast():
            feat, logits = model(x)                                                           # (1, D, h, w), (1, C, h, w)
        label = correct_label_map(logits, resize_label(y, logits.shape[-2:])).flatten()
        sample.add(feat[0].flatten(1).T, label, pixel_keys(run.options.seed, name, len(label)).to(label.device))
    gmms, anchors, counts = [], [], []
    for c in range(num_classes):
        feat = sample.features(c)
        feat = torch.empty(0, model.feat_channels) if feat is None else feat
        gmms.append(fit_gmm(feat.to(run.float64_device), cfg.components, cfg.em_iterations, cfg.em_tol,
                            derive_seed(run.options.seed, "gmm", c), variance_floor=cfg.variance_floor))
        anchors.append(feat.double().mean(dim=0).float())                                     # NaN without samples
        counts.append(len(feat))
    weight, mean, variance = (torch.stack(part).cpu() for part in zip(*gmms))
    return {"weight": weight, "mean": mean, "variance": variance, "anchor": torch.stack(anchors), "count": torch.tensor(counts)}


def choose_delta(run: Run, cfg: Config, model: nn.Module, gmms: Gmm, target: SegmentationDataset) -> float:
    """delta: as given, or by --pl-ratio from a histogram of the best log density of every target pixel, or the paper's."""
    if cfg.delta is not None or cfg.pl_ratio is None:
        return cfg.delta if cfg.delta is not None else {"synthia": -50.0}.get(cfg.source, 100.0)
    histogram = torch.zeros(len(SCORES), dtype=torch.int64)
    for x, *_ in run.sweep("densities", target, shared=True):
        with run.autocast():
            feat, _ = model(x)
        best = upsample(class_scores(feat, gmms), x.shape[-2:]).amax(dim=1).flatten().cpu().double()
        histogram += (torch.bucketize(best, SCORES, right=True) - 1).clamp(min=0).bincount(minlength=len(SCORES))
    sum_over_processes(histogram)
    return delta_for_ratio(histogram, cfg.pl_ratio)


def label_target(run: Run, cfg: Config, model: nn.Module, gmms: Gmm, anchors: Tensor, delta: float, target: SegmentationDataset,
                 folder: Path, num_classes: int) -> dict[str, Tensor]:
    """Write the pseudo labels of the target set. Returns: pixels labelled as each category (C,), and all pixels."""
    labelled, pixels = torch.zeros(num_classes, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    theta = torch.full((num_classes,), 0.9)
    everyone_has_all = cfg.assign == "ias"                                                    # it goes image by image
    for x, _, (name,) in run.sweep("pseudo labels", target, shared=not everyone_has_all):
        with run.autocast():
            feat, logits = model(x)                                                           # (1, D, h, w), (1, C, h, w)
        if cfg.assign == "maps":
            label = map_pseudo_labels(upsample(class_scores(feat, gmms), x.shape[-2:]), delta)
        elif cfg.assign == "anchors":
            label = resize_label(anchor_pseudo_labels(at_least_float32(feat), anchors, cfg.anchor_margin), x.shape[-2:])
        else:
            confidence, label = upsample(logits, x.shape[-2:]).softmax(dim=1).max(dim=1)      # (1, H, W) each
            theta = ias_thresholds(theta, confidence[0].cpu(), label[0].cpu())
            label = label.masked_fill(confidence <= theta.to(label.device)[label], IGNORE)
        labelled += label[label != IGNORE].cpu().bincount(minlength=num_classes)
        pixels += label.numel()
        save_label(folder / f"{name}.png", label[0])
    if not everyone_has_all:
        sum_over_processes(labelled, pixels)
    return {"labelled": labelled, "pixels": pixels}


def category_entropy(run: Run, model: nn.Module, target: SegmentationDataset, num_classes: int) -> Tensor:
    """e_c (C,): mean entropy of the warm-up model on the target pixels that it predicts as c; NaN where there are none."""
    entropy, count = torch.zeros(2, num_classes, dtype=torch.float64)
    for x, *_ in run.sweep("entropies", target, shared=True):
        with run.autocast():
            _, logits = model(x)                                                              # (1, C, h, w)
        log_p = at_least_float32(logits).log_softmax(dim=1)
        own = log_p.argmax(dim=1).flatten().cpu()
        entropy.index_add_(0, own, -(log_p.exp() * log_p).sum(dim=1).flatten().cpu().double())
        count += own.bincount(minlength=num_classes)
    sum_over_processes(entropy, count)
    return entropy / count


def encoded(run: Run, encoder, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """E^'s features of an image (1, 3, H, W) as (h w, D), and (h, w)."""
    with run.autocast():
        feat = at_least_float32(encoder(x))                                                   # (1, D, h, w)
    return feat[0].flatten(1).T, tuple(feat.shape[-2:])


def cluster_target(run: Run, cfg: Config, encoder, source: Dataset, target: SegmentationDataset) -> dict[str, Tensor]:
    """Sec. 3.4: prototypes (J, D) of the target's features of E^, and d_mean, the source features' mean distance to them."""
    sample = FeatureSample(1, cfg.stm_samples)
    for x, _, (name,) in run.sweep("target features", target, shared=True):
        feat, _ = encoded(run, encoder, x)
        sample.add(feat, feat.new_zeros(len(feat), dtype=torch.int64),
                   pixel_keys(run.options.seed, name, len(feat)).to(feat.device))
    prototypes = kmeans(sample.features(0).to(run.float64_device), cfg.J, seed=derive_seed(run.options.seed, "kmeans"))
    prototypes = prototypes.to(run.device)
    total, count = torch.zeros(2, dtype=torch.float64)
    for x, *_ in run.sweep("distances", source, shared=True):
        distance = target_distance(encoded(run, encoder, x)[0], prototypes)
        total, count = total + distance.cpu().double().sum(), count + len(distance)
    sum_over_processes(total, count)
    return {"prototypes": prototypes.cpu(), "d_mean": (total / count).clamp(min=1e-12)}


def write_transferability(run: Run, encoder, prototypes: Tensor, d_mean: float, e: Tensor, source: Dataset,
                          folder: Path) -> dict[str, Tensor]:
    """Write w of every source image as an 8-bit map. Returns: sum of w and number of labelled pixels a category, each (C,)."""
    total, count = torch.zeros(2, len(e), dtype=torch.float64)
    for x, y, (name,) in run.sweep("transferability", source, shared=True):
        feat, size = encoded(run, encoder, x)
        distance = upsample(target_distance(feat, prototypes).view(1, 1, *size), y.shape[-2:])[:, 0]
        w = transferability_map(distance, d_mean, e, y)                                       # (1, H, W)
        labels = y[y != IGNORE].cpu()
        total.index_add_(0, labels, w[y != IGNORE].cpu().double())
        count += labels.bincount(minlength=len(e))
        save_label(folder / f"{name}.png", (255 * w[0]).round())
    sum_over_processes(total, count)
    return {"total": total, "count": count}


def draw_labels(run: Run, cfg: Config, model: nn.Module, gmms: Gmm, anchors: Tensor, delta: float, target: SegmentationDataset,
                classes: ClassList) -> None:
    """A picture: target image, and its pseudo labels by anchors, by confidence above 0.9, and by MAPs."""
    rows = []
    for i in range(0, len(target), max(1, len(target) // 4))[:4]:
        image = target[i][0]
        with run.autocast():
            feat, logits = model(run.place(image[None]))
        by_anchor = resize_label(anchor_pseudo_labels(at_least_float32(feat), anchors, cfg.anchor_margin), image.shape[-2:])
        confidence, by_confidence = upsample(logits, image.shape[-2:]).softmax(dim=1).max(dim=1)
        by_confidence = by_confidence.masked_fill(confidence <= 0.9, IGNORE)
        by_maps = map_pseudo_labels(upsample(class_scores(feat, gmms), image.shape[-2:]), delta)
        rows.append([denormalise(image), *(colorize(label[0].cpu(), classes) for label in (by_anchor, by_confidence, by_maps))])
    run.draw("labels.png", rows, ["target", "by anchors", "by confidence", "by MAPs"])


def draw_transferability(run: Run, source: Dataset, folder: Path) -> None:
    """A picture: source image, its transferability map, and the image darkened by it."""
    rows = []
    for i in range(0, len(source), max(1, len(source) // 4))[:4]:
        image, _, name, *_ = source[i]
        photo, w = denormalise(image), read_image(folder / f"{name}.png").permute(1, 2, 0).numpy()
        rows.append([photo, w, (photo * (w / 255)).astype("uint8")])
    run.draw("transferability.png", rows, ["source", "transferability", "weighed by it"])


def report(title: str, names: tuple[str, ...], shares: Tensor) -> dict[str, float]:
    """Print one number a category; return those that there are."""
    print(f"\n{title}")
    for name, share in zip(names, shares.tolist(), strict=True):
        print(f"{name:<16}" + ("-".rjust(8) if math.isnan(share) else f"{share:8.2f}"), flush=True)
    return {name: share for name, share in zip(names, shares.tolist()) if not math.isnan(share)}


@torch.no_grad()
def prepare_selftraining(run: Run, cfg: Config, model: nn.Module, source: Dataset, target: SegmentationDataset,
                         classes: ClassList) -> None:
    """Prototypes, pseudo labels and transferability maps from the warm-up model; what an earlier start computed is kept."""
    run.prepare("selftrain")
    model.eval()
    if cfg.assign != "none":
        found = run.once(KEPT[0], lambda: fit_prototypes(run, cfg, model, source, len(classes)))
        run.log(stage="selftrain", iteration=0, samples=dict(zip(classes.names, found["count"].tolist())))
        *gmms, anchors = (found[key].to(run.device) for key in ("weight", "mean", "variance", "anchor"))
        gmms = Gmm(*gmms)
        delta = choose_delta(run, cfg, model, gmms, target)
        made = run.once(KEPT[1], lambda: label_target(run, cfg, model, gmms, anchors, delta, target,
                                                      run.folder / "pseudo_labels", len(classes)))
        percent = 100 * torch.cat([made["labelled"], made["labelled"].sum(dim=0, keepdim=True)]) / made["pixels"]
        ratio = report("pseudo labels of the target, in percent of its pixels (PL ratio)", (*classes.names, "all"), percent)
        run.log(stage="selftrain", iteration=0, delta=delta, pl_ratio=ratio)
        draw_labels(run, cfg, model, gmms, anchors, delta, target, classes)
    if cfg.stm:
        encoder, folder = independent_encoder(run, cfg, model), run.folder / "transferability"
        found = run.once(KEPT[2], lambda: {"entropy": category_entropy(run, model, target, len(classes)),
                                           **cluster_target(run, cfg, encoder, source, target)})
        e = normalised_entropy(found["entropy"]).float().to(run.device)
        w = run.once(KEPT[3], lambda: write_transferability(run, encoder, found["prototypes"].to(run.device),
                                                            found["d_mean"].item(), e, source, folder))
        mean = report("mean transferability of the source's pixels", classes.names, w["total"] / w["count"])
        run.log(stage="selftrain", iteration=0, entropy=found["entropy"].tolist(), transferability=mean)
        draw_transferability(run, source, folder)
    model.train()


# ------------------------------------------------------------------------------------------------- the stages


def sgd(model: nn.Module, cfg: Config, lr: float) -> torch.optim.SGD:
    """Sec. 4.2's optimizer."""
    return torch.optim.SGD(model.parameter_groups(lr, cfg.encoder_rate), lr=lr, momentum=cfg.momentum,
                           weight_decay=cfg.weight_decay)


def warm_up(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, iterations: int) -> None:
    """Eq. (2) on the aligned source."""
    optimizer = sgd(model, cfg, cfg.lr)
    state = {"model": model, "optimizer": optimizer}
    model = run.parallel(model)
    for _, (x, y) in run.stage("warmup", iterations, state, source, batch_size=cfg.warmup_batch_size):
        with run.autocast():
            _, logits = model(x)                                                              # (N, C, h, w)
        loss = segmentation_loss(logits, y) * run.share(y != IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg=loss)


def self_train(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, target: SegmentationDataset) -> None:
    """Eq. (13): L = L_ce + L_sce + lambda L_consist."""
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = sgd(model, cfg, cfg.adapt_lr)
    state = {"model": model, "teacher": teacher, "optimizer": optimizer}
    model = run.parallel(model)
    for it, (x_s, y_s, *w), (x_t, *_, y_hat) in run.stage("selftrain", cfg.selftrain_iterations, state, source, target,
                                                          batch_size=cfg.batch_size):
        with run.autocast():
            _, logits_s = model(x_s)                                                          # (N, C, h, w)
            _, logits_t = model(x_t)
        weight = w[0] / 255 if w else 1.0                                                     # (N, H, W)
        ce = reweighted_cross_entropy(logits_s, y_s, weight) * run.share(y_s != IGNORE)       # Eq. (10)
        sce = symmetric_cross_entropy(logits_t, y_hat, cfg.alpha, cfg.beta) * run.share(y_hat != IGNORE)   # Eq. (11)
        consist = torch.zeros_like(ce)
        if cfg.lambda_consist:
            seeds = run.item_seeds(len(x_t), "phi", it)
            x_phi, kept = phi(x_t, seeds, cfg.phi_operations, cfg.phi_strength, cfg.cutout)
            with run.autocast():
                if cfg.augment == "student":
                    _, logits_t = model(x_phi)
                with torch.no_grad():
                    _, logits_teacher = teacher(x_phi if cfg.augment == "teacher" else x_t)
            mask = resize_label(kept.long(), logits_t.shape[-2:]).bool()
            consist = consistency_loss(logits_t, logits_teacher, mask) * run.share(mask)      # Eq. (12)
        loss = ce + sce + cfg.lambda_consist * consist                                        # Eq. (13)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, model, cfg.ema)
        if cfg.adapt_freeze_bn != "all":
            same_buffers({"teacher": teacher})
        run.report(ce=ce, sce=sce, consist=consist)


@torch.no_grad()
def write_hard_labels(run: Run, cfg: Config, stage: str, model: nn.Module, target: SegmentationDataset, folder: Path) -> None:
    """Labels for a round of distillation: the argmax of every target pixel, multi-scale and flipped."""
    run.prepare(stage)
    model.eval()
    for x, _, (name,) in run.sweep(f"labels of {stage}", target, shared=True):
        with run.autocast():
            label = metrics.predict(model, x, tuple(x.shape[-2:]), scales=cfg.test_scales, flip=True)[0]
        save_label(folder / f"{name}.png", label)


def distill(run: Run, cfg: Config, stage: str, student: nn.Module, previous: nn.Module, source: SegmentationDataset,
            target: SegmentationDataset) -> None:
    """A round of distillation [40]: weighted source, hard labels and KL of the model before."""
    previous.requires_grad_(False).eval()
    optimizer = sgd(student, cfg, cfg.adapt_lr)
    state = {"model": student, "optimizer": optimizer}
    student = run.parallel(student)
    for _, (x_s, y_s, *w), (x_t, *_, y_hat) in run.stage(stage, cfg.distill_iterations, state, source, target,
                                                         batch_size=cfg.batch_size):
        with run.autocast():
            _, logits_s = student(x_s)                                                        # (N, C, h, w)
            _, logits_t = student(x_t)
            with torch.no_grad():
                _, logits_previous = previous(x_t)
        ce = reweighted_cross_entropy(logits_s, y_s, w[0] / 255 if w else 1.0) * run.share(y_s != IGNORE)
        sce = symmetric_cross_entropy(logits_t, y_hat, cfg.alpha, cfg.beta) * run.share(y_hat != IGNORE)
        kl = consistency_loss(logits_t, logits_previous)
        loss = ce + sce + cfg.lambda_kl * kl

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(ce=ce, sce=sce, kl=kl)


def check(cfg: Config, options: Options) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if len(cfg.scale) != 2 or cfg.scale[0] > cfg.scale[1]:
        raise UserError(f"--scale {' '.join(map(str, cfg.scale))} is no range: give the smallest and the largest factor")
    check_domains(cfg, options, "warmup", [cfg.source_size, cfg.target_size], cfg.scale[1])
    if cfg.delta is not None and cfg.assign != "maps":
        raise UserError(f"--delta is the threshold of --assign maps, not of --assign {cfg.assign}: leave it out")
    if cfg.stm_weights and cfg.stm_backbone == "warmup":
        raise UserError("--stm-weights are for a network of torchvision's: name it by --stm-backbone and --stm-layer")


@command
def main(argv: list[str] | None = None) -> None:
    """Warm-up, self-training, two rounds of distillation; each followed by its evaluation."""
    cfg, options = parse("bismap.py", __doc__, (Config, Options), argv, TOY)
    check(cfg, options)
    if options.toy:
        toycity.ensure(options.data)
    run = Run("bismap", cfg, options, ("warmup", "selftrain", *("distill1", "distill2") * cfg.distill))
    classes = class_list(cfg.source, cfg.target)
    sizes = {cfg.target: cfg.target_size, cfg.source: cfg.source_size or SIZES.get(cfg.source)}

    test, tests = run.images(cfg.target, "val", classes, sizes), {"single-scale": {}}
    if options.eval:
        model = run.network("v3+", classes)
        run.evaluate(run.load_latest(model), model, test, classes, tests)
        return

    augment = Augment(scale=(cfg.scale[0], cfg.scale[1]), crop=cfg.crop, jitter=cfg.jitter)
    target = run.images(cfg.target, "train", classes, sizes, labels=False, augment=augment)
    references, aligns = [pair.image for pair in target.pairs], cfg.alignment == "gpa" and not options.target_labels
    each_time, once = (partial(align, references, cfg.target_size, seed) if aligns else None
                       for seed in (None, derive_seed(options.seed, "alignment")))
    labelled = cfg.target if options.target_labels else cfg.source
    source = run.images(labelled, "train", classes, sizes, augment=augment, alter=each_time)
    fixed = run.images(labelled, "train", classes, sizes, augment=augment, alter=once)
    whole = OneVersion(run.images(labelled, "train", classes, sizes, alter=once), 0)

    model = run.network("v3+", classes)
    prepares = run.trains("selftrain") and not run.begun("selftrain")
    if cfg.stm and prepares:
        independent_encoder(run, cfg, model)                                                  # refuse it now, not later
    run.start_from(model)
    run.watch(model, test, classes)
    if run.trains("warmup"):
        run.forget(*KEPT)                                                                     # what an earlier one led to
    # An upper bound has to be trained as long as what it bounds.
    warm_up(run, cfg, model, source, cfg.warmup_iterations + options.target_labels * cfg.selftrain_iterations)
    run.evaluate("warmup", model, test, classes, tests)

    if run.reaches("selftrain"):
        model.freeze_bn(cfg.adapt_freeze_bn)
        pseudo_labelled = target
        if prepares and (cfg.stm or cfg.assign != "none"):
            prepare_selftraining(run, cfg, model, whole, target, classes)
        if cfg.assign != "none" and run.trains("selftrain"):
            pseudo_labelled = target.with_maps(run.folder / "pseudo_labels")
    if cfg.stm and any(map(run.trains, run.stages[1:])):
        maps = (run.folder if run.reaches("selftrain") else Path(options.from_).parent) / "transferability"
        if not maps.is_dir():
            raise UserError(f"{maps} is not there: --from has no transferability maps beside it; add --no-stm")
        fixed = fixed.with_maps(maps)
    if run.reaches("selftrain"):
        self_train(run, cfg, model, fixed, pseudo_labelled)
        run.evaluate("selftrain", model, test, classes, tests)

    for stage in run.stages[2:]:
        if run.reaches(stage):
            previous, pseudo_labelled = model, target
            if run.trains(stage):
                if not run.begun(stage):
                    write_hard_labels(run, cfg, stage, previous, target, run.folder / stage)
                pseudo_labelled = target.with_maps(run.folder / stage)
            model = run.network("v3+", classes)                              # a fresh student
            run.watch(model, test, classes)
            distill(run, cfg, stage, model, previous, fixed, pseudo_labelled)
            run.evaluate(stage, model, test, classes, tests)


if __name__ == "__main__":
    main()
