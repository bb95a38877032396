"""Bidirectional Self-Training with Multiple Anisotropic Prototypes for Domain Adaptive Semantic Segmentation (BiSMAP).

Lu, Luo, Zhang, Li, Yang, Xiao. ACM MM 2022. arXiv:2204.07730

Forward: each category's source features are a mixture of diagonal Gaussians (MAPs), and target pixels whose density under
the best mixture is high get its category as pseudo label. Backward: source pixels that are far from all clusters of target
features weigh less in training (the source transferability map, STM).

    Eq. (2)          segmentation_loss                 warm-up on source images aligned by c2f.photometric_align
    Eq. (3)          correct_label_map, FeatureSample  Lambda_c, and 300,000 of it per category
    Sec. 3.3         fit_gmm                           expectation maximisation
    Eqs. (4), (5)    log_density
    Eq. (6)          map_pseudo_labels
    Sec. 3.4         kmeans                            target prototypes A_j
    Eq. (7)          target_distance
    Eq. (8)          normalised_entropy
    Eq. (9)          transferability_map
    Eq. (10)         reweighted_cross_entropy
    Eq. (11)         symmetric_cross_entropy
    Eq. (12)         consistency_loss
    Eq. (13)         self_train
    "as ProDA [40]"  distill
    Table 3          anchor_pseudo_labels (CAs), ias_thresholds (IAS)

    E, F, G = F o E   encoder, classifier, network        C, c     categories
    f, feat           feature that enters the classifier  G, k     `--components` per category (the paper's K)
    p_c               log density of category c's mixture  delta    `--delta`, of Eq. (6)
    E^, f^            independent encoder, its features   J, A_j   target prototypes
    D(x), d_mean      distance to them, and its mean      w        transferability
    phi               RandAugment and CutOut              lambda   `--lambda-consist`, of Eq. (13)

Stages: warmup -> selftrain -> distill1 -> distill2.

    python bismap.py --toy                                   the toy city, some minutes on two cores
    python bismap.py --source gta5                           the paper's GTA5 -> Cityscapes; again to resume
    torchrun --nproc_per_node=4 bismap.py --source gta5 --warmup-batch-size 2 --batch-size 1     the same on four GPUs
    python bismap.py --source gta5 --from runs/bismap-gta5/warmup.pt --no-distill --assign none --lambda-consist 0 --tag stm
    python bismap.py --source gta5 --eval                    only evaluate what the run has reached

Departures:
 1. Eqs. (2), (10), (11): sums over pixels are means over the labelled pixels; Eq. (12) and distillation's KL: means over the C
    categories and the pixels that CutOut left (the padding of a crop larger than its image counts).
 2. Footnote 1 enlarges features, 16 times the work: scores, densities and entropies are computed at stride 4, then enlarged.
 3. Sec. 3.3: EM starts from k-means and stops when the mean log-likelihood rises by less than `em_tol`; a variance is at least
    `variance_floor`; a component without samples has weight 0.
 4. Sec. 4.2: delta depends on the feature's dimension and on the variance floor; `--pl-ratio` picks it so that this share of
    the target's pixels is labelled, Table 5's "PL ratio".
 5. Sec. 3.5: E^ is torchvision's ResNet-152 on ImageNet, the paper's is SimCLRv2's. Its input size, layer and grid (distances
    are enlarged by nearest neighbour), J, and how many target features are clustered are not in the paper.
 6. Eq. (7) prints 0 < j < J: all J centres are used. Eq. (8)'s prose swaps minimum and maximum; e' is 0 for a category that is
    never predicted, and for all where all entropies are equal.
 7. Sec. 3.5: each source image has one fixed aligned version, in every stage. The transferability map is stored in 8 bits.
 8. Sec. 3.5, "retraining": self-training starts from the initial weights, as in the authors' configuration;
    `--continue-warmup` goes on from the warm-up model.
 9. Eq. (11): the label is clamped in the reverse term only, so that a confidently contradicted pixel keeps its gradient.
10. Eq. (12) puts phi on the teacher's input (`--augment teacher`). phi's operations are RandAugment's on colours; how many, how
    strong, and CutOut's size are not in the paper.
11. Eq. (13): lambda rises as exp(-5 (1 - t/T)^2) over the first T iterations: `ramp_iterations`, at most `ramp_share` of the
    stage. The paper has no ramp.
12. Sec. 4.2: the rate is the encoder's; ASPP, decoder and classifier learn `head_rate` times as fast. The jitter's strength is
    not in the paper. There is no dropout; each stage has its own optimizer and rate horizon.
13. Sec. 4.3, "proposed in [40]": two rounds, each with a fresh student, hard labels of the model before by multi-scale and
    flipped test, Eq. (10) on the source, Eq. (11) on the target, and KL to the model before.
14. Batch norm of pretrained encoders is frozen (`--freeze-bn`), with `--continue-warmup` all of it in self-training.
15. Table 3: CAs are the means of the samples of Eq. (3) with CAG's margin; IAS's constants are IAST's.
The published code differs in ways that we do not follow: no logarithm in distillation's KL (it sharpens instead of distilling);
hard-coded entropies; d_mean as a moving average; lambda 30; phi on the student's input; batch norm trained in every stage, the
teacher on batch statistics; flips in both domains; a weaker jitter on the target (0.1); width 2200 as the base of the random
resize; the best checkpoint on val as the result and as the next teacher; students from SimCLRv2's weights; labels for
distillation at scales 0.75, 1 and 1.5 by mean logits.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
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

SIZES = {"synthia": Size(2048, 1024)}                  # Sec. 4.2; the others' own
KEPT = ("prototypes.pt", "pseudo_labels.pt", "target_prototypes.pt", "transferability.pt")   # by prepare_selftraining


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    source: str = option("gta5", "source domain", choices=("gta5", "synthia", "cityscapes"))
    target: str = option("cityscapes", "target domain", choices=("cityscapes", "crosscity"))
    city: str = option("Rome", "city of Cross-City", choices=("Rome", "Rio", "Tokyo", "Taipei"))
    backbone: str = option("resnet101", "encoder of DeepLab v3+", paper="resnet101", section="Sec. 4.2",
                           choices=("resnet101", "resnet50", "resnet18"))
    freeze_bn: str = option("auto", "batch norm kept fixed; auto: encoder, or none with --init none",
                            choices=("auto", "all", "encoder", "none"))
    adapt_freeze_bn: str = option("auto", "batch norm kept fixed in self-training; auto: as --freeze-bn, or all with "
                                  "--continue-warmup", choices=("auto", "all", "encoder", "none"))
    alignment: str = option("gpa", "global photometric alignment of the source, or none", paper="gpa", section="Sec. 3.5",
                            choices=("gpa", "none"))
    components: int = option(8, "Gaussians per category", paper=8, section="Sec. 3.5", low=1)
    samples: int = option(300_000, "source features per category to fit them to; 1.3 KB each, and 8 KB during the fit",
                          paper=300_000, section="Sec. 3.5", low=1)
    em_iterations: int = option(100, "EM's iterations, at most", low=1)
    em_tol: float = option(1e-3, "EM stops when the mean log-likelihood rises by less", low=0.0)
    variance_floor: float = option(1e-6, "smallest variance of a Gaussian", low=1e-30)
    assign: str = option("maps", "pseudo labels by Eq. (6), by category anchors, by instant adaptive selector; none",
                         paper="maps", section="Table 3", choices=("maps", "anchors", "ias", "none"))
    delta: float | None = option(None, "log density from which Eq. (6) labels; automatic: by --pl-ratio, else the paper's",
                                 paper="100, SYNTHIA -50", section="Sec. 4.2")
    pl_ratio: float | None = option(None, "pick delta so that this share of the target's pixels is labelled", low=0.0, high=1.0)
    anchor_margin: float = option(1.0, "margin of --assign anchors", paper=1.0, section="Table 5", low=0.0)
    stm: bool = option(True, "weigh source pixels by the transferability map", paper=True, section="Sec. 3.4")
    stm_backbone: str = option("resnet152", "E^: a torchvision classification network, or warmup: the warm-up's encoder",
                               paper="resnet152", section="Sec. 3.5")
    stm_weights: str | None = option(None, "file with its weights in torchvision's names; automatic: torchvision's of ImageNet")
    stm_layer: str = option("layer4", "its layer that gives the features")
    stm_size: Size = option(Size(256, 128), "images are resized to it for E^")
    stm_grid: Size = option(Size(4, 4), "E^'s features are averaged to so many cells, each with one distance")
    J: int = option(40, "target prototypes", low=1)
    stm_samples: int = option(200_000, "target features that are clustered, at most", low=1)
    alpha: float = option(0.1, "weight of the cross entropy in Eq. (11)", paper=0.1, section="Sec. 3.5", low=0.0)
    beta: float = option(1.0, "weight of the reverse cross entropy in Eq. (11)", paper=1.0, section="Sec. 3.5", low=0.0)
    lambda_consist: float = option(20.0, "lambda, weight of Eq. (12); 0: without consistency", paper=20.0, section="Sec. 4.2",
                                   low=0.0)
    ramp_iterations: int = option(4000, "iterations over which lambda rises to its value", low=0)
    ramp_share: float = option(0.25, "the same as a share of the stage, where that is less", low=0.0, high=1.0)
    continue_warmup: bool = option(False, "self-training goes on from the warm-up model, not from the initial weights")
    ema: float = option(0.999, "smoothing coefficient of the teacher", paper=0.999, section="Sec. 4.2", low=0.0, high=1.0)
    augment: str = option("teacher", "whose input phi augments", paper="teacher", section="Eq. (12)",
                          choices=("teacher", "student"))
    phi_operations: int = option(2, "operations of RandAugment per image", low=0)
    phi_strength: float = option(0.5, "their strength", low=0.0, high=1.0)
    cutout: float = option(0.4, "side of the square that CutOut removes, of the shorter side", low=0.0, high=1.0)
    distill: bool = option(True, "two rounds of distillation", paper=True, section="Table 4")
    lambda_kl: float = option(1.0, "weight of KL in distillation", low=0.0)
    test_scales: tuple[float, ...] = option((0.7, 1.0, 1.3), "scales of distillation's labels, each also flipped", low=0.1)
    jitter: float = option(0.5, "colour jitter: brightness, contrast, saturation by this, hue by 0.4 of it", low=0.0, high=1.0)
    lr: float = option(5e-4, "SGD's initial rate of the encoder in the warm-up", paper=5e-4, section="Sec. 4.2", low=0.0)
    adapt_lr: float = option(5e-4, "SGD's initial rate of the encoder afterwards", paper=5e-4, section="Sec. 4.2", low=0.0)
    head_rate: float = option(10.0, "rate of ASPP, decoder and classifier as a multiple of the encoder's", low=1e-3)
    momentum: float = option(0.9, "SGD's momentum", paper=0.9, section="Sec. 4.2", low=0.0, high=1.0)
    weight_decay: float = option(5e-4, "SGD's weight decay", paper=5e-4, section="Sec. 4.2", low=0.0)
    warmup_iterations: int = option(90_000, "iterations of the warm-up", paper=90_000, section="Sec. 4.2", low=1)
    selftrain_iterations: int = option(90_000, "iterations of self-training", paper=90_000, section="Sec. 4.2", low=1)
    distill_iterations: int = option(90_000, "iterations of a round of distillation", paper=90_000, section="Sec. 4.2", low=1)
    warmup_batch_size: int = option(8, "images per batch and process in the warm-up", paper=8, section="Sec. 4.2", low=1)
    batch_size: int = option(4, "images of each domain per batch and process afterwards", paper=4, section="Sec. 4.2", low=1)
    source_size: Size | None = option(None, "source images are resized to it; automatic: the paper's, else their own size",
                                      paper="SYNTHIA 2048x1024", section="Sec. 4.2")
    target_size: Size | None = option(None, "target images are resized to it, also in the test; automatic: their own size")
    scale: tuple[float, ...] = option((0.5, 1.5), "range of the random resize in training", paper=(0.5, 1.5),
                                      section="Sec. 4.2", low=0.1)
    crop: Size = option(Size(896, 512), "random crop in training", paper=Size(896, 512), section="Sec. 4.2")


# The toy city has no independent encoder, its densities another scale than the paper's, and the teacher hardly any time.
TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           crop=Size(128, 64), scale=(1.0, 1.5), warmup_batch_size=2, batch_size=2, warmup_iterations=720,
           selftrain_iterations=500, distill_iterations=500, samples=20_000, pl_ratio=0.6, stm_backbone="warmup", ema=0.99,
           workers=0, amp="bf16", channels_last=True)

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


def component_log_prob(feat: Tensor, square: Tensor, gmm: Gmm) -> Tensor:
    """log pi_k + log N_k(f) of Eq. (5), its square multiplied out.

    Args: feat (M, D) float64; square, the same squared; gmm of G components, or of C x G.  Returns: (M, G) or (M, C, G).
    """
    mean, precision = gmm.mean.double().flatten(0, -2), 1 / gmm.variance.double().flatten(0, -2)      # (C G, D) each
    exponent = square @ precision.T - feat @ (2 * mean * precision).T + (mean.square() * precision).sum(dim=1)
    log_norm = mean.shape[1] * math.log(2 * math.pi) - precision.log().sum(dim=1)
    return gmm.weight.double().log() - 0.5 * (exponent + log_norm).unflatten(1, gmm.weight.shape)


def log_density(feat: Tensor, gmm: Gmm) -> Tensor:
    """Log density of features under a mixture.

    Eq. (4):  p_c(f) = log sum_k pi_ck N_ck(f | mu_ck, Sigma_ck)
    Eq. (5):  N_ck(f) = exp(-1/2 (f - mu)^T Sigma^-1 (f - mu)) / ((2 pi)^(d/2) |Sigma|^(1/2))

    Args: feat (M, D) float; gmm of G components, or of C x G.
    Returns: (M,) or (M, C) float64; -inf for a mixture without components. No underflow: it is a log-sum-exp.
    """
    feat = feat.double()
    return component_log_prob(feat, feat.square(), gmm).logsumexp(dim=-1)


def fit_gmm(feat: Tensor, components: int = 8, iterations: int = 100, tol: float = 1e-3, seed: int = 0, init: Gmm | None = None,
            variance_floor: float = 1e-6) -> Gmm:
    """Fit a mixture of diagonal Gaussians by expectation maximisation, Sec. 3.3.

    Args:
        feat: (M, D) float.
        components: G; those that no sample belongs to get weight 0 (without samples, all).
        iterations, tol: EM ends after so many, or when the mean log-likelihood rises by less than tol.
        seed: of the k-means start.
        init: start from this mixture instead.
        variance_floor: smallest variance; held by clamping, under which the likelihood still never falls.
    Returns: Gmm in float64.
    """
    feat = feat.double()
    square = feat.square()                                                                    # (M, D)

    def maximise(responsibility: Tensor) -> Gmm:
        """The mixture of samples with these responsibilities (M, G)."""
        count = responsibility.sum(dim=0)                                                     # (G,)
        mean, second = (responsibility.T @ x / count.clamp(min=1e-300)[:, None] for x in (feat, square))
        return Gmm(count / max(1, len(feat)), mean, (second - mean.square()).clamp(min=variance_floor))

    if init is None:
        centers = kmeans(feat, components, seed=seed) if len(feat) else feat.new_zeros(components, feat.shape[1])
        init = maximise(F.one_hot(torch.cdist(feat, centers).argmin(dim=1), components).double())
    gmm, likelihood = init, -math.inf
    for _ in range(iterations if len(feat) else 0):
        log_prob = component_log_prob(feat, square, gmm)                                      # (M, G)
        density = log_prob.logsumexp(dim=1)                                                   # (M,)
        gmm = maximise((log_prob - density[:, None]).exp())
        before, likelihood = likelihood, density.mean().item()
        if likelihood - before < tol:
            break
    return gmm


def correct_label_map(logits: Tensor, label: Tensor) -> Tensor:
    """The label where the prediction is right.

    Eq. (3):  Lambda_c = {f_i | argmax G(x)_i = c, y_i = c}

    Args: logits (N, C, h, w); label (N, h, w) int64 on the same grid, 255 ignored.  Returns: (N, h, w), 255 elsewhere.
    """
    return torch.where(logits.argmax(dim=1) == label, label, IGNORE)


class FeatureSample:
    """A uniform sample without replacement of each category's features, in one pass: those with the smallest random keys.

    A feature's key depends on (seed, image, pixel) alone, so the sample depends neither on the order of the images nor on
    how many processes share them. Memory: at most 1.25 `size` features per category between two images, in float32.
    """

    def __init__(self, num_classes: int, size: int, seed: int):
        self.size, self.seed = size, seed
        self.parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_classes)]      # (keys, features)
        self.held = [0] * num_classes
        self.largest = [2**62] * num_classes                                                  # greater keys cannot enter

    def add(self, name: str, feat: Tensor, label: Tensor) -> None:
        """Offer an image's features. Args: name; feat (M, D); label (M,) int64, 255 ignored."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, name))
        key = torch.randint(2**62, (len(feat),), generator=generator).to(label.device)
        for c in label[label != IGNORE].unique().tolist():
            chosen = (label == c) & (key < self.largest[c])
            if chosen.any():
                self.parts[c].append((key[chosen].cpu(), feat[chosen].float().cpu()))
                self.held[c] += int(chosen.sum())
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


# ------------------------------------------------------------------------------------ target: pseudo labels


def map_pseudo_labels(log_prob: Tensor, delta: float) -> Tensor:
    """The category of the highest log density, where that is at least delta.

    Eq. (6):  y^_r = 1 if r = argmax_c p_c(f), p_r(f) >= delta, else 0

    Args: log_prob (N, C, h, w), p_c of Eq. (4).  Returns: (N, h, w) int64, 255 where no category reaches delta.
    """
    best, label = log_prob.max(dim=1)                                                         # (N, h, w) each
    return label.masked_fill(~((best >= delta) & best.isfinite()), IGNORE)


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


def kmeans(feat: Tensor, J: int, iterations: int = 30, seed: int = 0) -> Tensor:
    """Centres of J clusters, from a k-means++ start.

    Args: feat (M, D) float32 or float64, M >= 1.  Returns: (J, D) of the same kind; a cluster that lost its features keeps its
        centre; with fewer than J different features, some centres are equal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                                       # of empty clusters, and 0 / 0
        centers, _ = kmeans2(feat.cpu().numpy(), J, iter=iterations, minit="++", rng=seed)
    return torch.from_numpy(centers).to(feat)


def target_distance(feat: Tensor, prototypes: Tensor) -> Tensor:
    """How far source features are from the target's.

    Eq. (7):  D(x)_i = min_j || f^_i - A_j ||_2, over all J

    Args: feat (M, D), of E^; prototypes (J, D).  Returns: (M,), >= 0.
    """
    return torch.cdist(feat, prototypes, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


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
    """Cross entropy of source pixels, each weighted by its transferability.

    Eq. (10):  L_ce = sum_i sum_c - w_i y_ic log p_ic

    Args: logits (N, C, h, w); label (N, H, W) int64, 255 ignored; weight (N, H, W) in [0, 1], or 1 for all.
    Returns: 0-d, divided by the number of labelled pixels (the paper sums); exactly 0 if there are none.
    """
    return segmentation_loss(logits, label, weight)


def symmetric_cross_entropy(logits: Tensor, pseudo_label: Tensor, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """Cross entropy both ways, which is more robust to wrong labels.

    Eq. (11):  L_sce = sum_i sum_c - alpha y^_ic log p_ic - beta p_ic log y^_ic,  y^ clamped to [1e-4, 1] in the second term

    Args: logits (N, C, h, w); pseudo_label (N, H, W) int64, 255 ignored.
    Returns: 0-d, mean over the labelled pixels (the paper sums); exactly 0 if there are none.
    """
    logits = upsample(logits, pseudo_label.shape[-2:])                                        # (N, C, H, W)
    labelled = pseudo_label != IGNORE
    forward = F.cross_entropy(logits, pseudo_label, ignore_index=IGNORE, reduction="none")    # (N, H, W)
    p_own = logits.softmax(dim=1).gather(1, torch.where(labelled, pseudo_label, 0)[:, None])[:, 0]
    reverse = -math.log(1e-4) * (1 - p_own) * labelled                                        # log y^ is 0 at the label
    return (alpha * forward + beta * reverse).sum() / labelled.sum().clamp(min=1)


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL divergence of the student's prediction from the teacher's.

    Eq. (12):  L_consist = sum_i sum_c p~_ic log p~_ic - p~_ic log p_ic

    Args: student_logits, teacher_logits (N, C, h, w), no gradient to the teacher's; mask (N, h, w), true where a pixel counts.
    Returns: 0-d, mean over the C categories and the pixels that count (the paper sums); exactly 0 if none does.
    """
    log_p, log_q = student_logits.log_softmax(dim=1), teacher_logits.detach().log_softmax(dim=1)
    kl = (log_q.exp() * (log_q - log_p)).mean(dim=1)                                          # (N, h, w)
    if mask is None:
        return kl.mean()
    return (kl * mask).sum() / mask.sum().clamp(min=1)


def ramp(iteration: int, iterations: int, length: int = 4000, share: float = 0.25) -> float:
    """Factor of lambda in Eq. (13): exp(-5 (1 - t/T)^2) at iteration t < T, then 1.

    Args: iterations, of the stage; length, share: T is length, at most this share of the stage.  Returns: in (0, 1].
    """
    T = min(length, share * iterations)
    return math.exp(-5 * (1 - iteration / T) ** 2) if iteration < T else 1.0


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


# ------------------------------------------------------------------- passes over the data before self-training


def align(references: list[Path], size: Size | None, seed: int, image: Tensor, _: int, name: str) -> Tensor:
    """What the loader's workers do to a source image (3, H, W) in [0, 1]: align it to a target image, chosen by its name."""
    chosen = references[derive_seed(seed, "alignment", name) % len(references)]
    return photometric_align(image, read_resized(chosen, size))


def torchvision_layer(run: Run, cfg: Config) -> nn.Module:
    """A layer of a classification network: (1, 3, H, W) -> {"feat": (1, D, h, w)}. Raises: UserError if it is unavailable."""
    try:
        net = models.get_model(cfg.stm_backbone, weights=None if cfg.stm_weights else "IMAGENET1K_V1")
        encoder = run.place(create_feature_extractor(net, {cfg.stm_layer: "feat"}).eval().requires_grad_(False))
        if encoder(torch.zeros(1, 3, 64, 128, device=run.device))["feat"].dim() != 4:
            raise ValueError("not a feature map")
    except Exception as error:                         # a download raises almost anything
        raise UserError(f"--stm-backbone {cfg.stm_backbone}: torchvision does not know it, its ImageNet weights are not here "
                        f"and did not download, or --stm-layer {cfg.stm_layer} gives no feature map ({type(error).__name__}); "
                        "give --stm-weights PATH, or --stm-backbone warmup, or --no-stm") from error
    if cfg.stm_weights:
        found, needed = read_weights(cfg.stm_weights, "--stm-weights"), encoder.state_dict()
        fitting = {k: v for k, v in found.items() if k in needed and v.shape == needed[k].shape}
        if missing := encoder.load_state_dict(fitting, strict=False).missing_keys:
            raise UserError(f"--stm-weights {cfg.stm_weights} lacks {len(missing)} keys of {cfg.stm_backbone} ({missing[0]}, "
                            "...) or has them in another shape; give weights of this network in torchvision's names")
    return encoder


def independent_encoder(run: Run, cfg: Config, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """E^, a function: image (1, 3, H, W) -> features (cells of `stm_grid`, D). Raises: UserError if it is unavailable."""
    encoder = None if cfg.stm_backbone == "warmup" else torchvision_layer(run, cfg)

    def encode(x: Tensor) -> Tensor:
        x = F.interpolate(x, cfg.stm_size[::-1], mode="bilinear", antialias=True)
        with run.autocast():
            feat = encoder(x)["feat"] if encoder is not None else resnet_features(model.encoder, model.prepare(x))[1]
        return F.adaptive_avg_pool2d(at_least_float32(feat), cfg.stm_grid[::-1])[0].flatten(1).T
    return encode


def class_scores(feat: Tensor, gmms: Gmm) -> Tensor:
    """p_c(f) of a feature map (N, D, h, w) under each category's mixture: (N, C, h, w) float32, finite."""
    flat = feat.movedim(1, -1).flatten(0, 2).to(gmms.mean.device)                             # (N h w, D)
    scores = log_density(flat, gmms).float().clamp(min=-1e30).to(feat.device)                 # (N h w, C)
    return scores.view(len(feat), *feat.shape[2:], -1).movedim(-1, 1)


def fit_prototypes(run: Run, cfg: Config, model: nn.Module, source: Dataset, num_classes: int) -> dict[str, Tensor]:
    """Eq. (3) over the aligned source set in one pass, then a mixture per category: weight (C, G), mean and variance
    (C, G, D), anchor (C, D), count (C,) of samples."""
    sample = FeatureSample(num_classes, cfg.samples, run.options.seed)
    for x, y, (name,) in run.sweep("source features", source, shared=True):
        with run.autocast():
            feat, logits = model(x)                                                           # (1, D, h, w), (1, C, h, w)
        label = correct_label_map(logits, resize_label(y, logits.shape[-2:]))                 # (1, h, w)
        sample.add(name, feat[0].flatten(1).T, label.flatten())
    gmms, anchors, counts = [], [], []
    for c in range(num_classes):
        feat = sample.features(c)
        feat = torch.empty(0, model.feat_channels) if feat is None else feat
        gmms.append(fit_gmm(feat.to(run.float64_device), cfg.components, cfg.em_iterations, cfg.em_tol,
                            derive_seed(run.options.seed, "gmm", c), variance_floor=cfg.variance_floor))
        anchors.append(feat.mean(dim=0, dtype=torch.float64).float())                         # NaN without samples
        counts.append(len(feat))
    weight, mean, variance = (torch.stack(part).cpu() for part in zip(*gmms))
    return {"weight": weight, "mean": mean, "variance": variance, "anchor": torch.stack(anchors), "count": torch.tensor(counts)}


def choose_delta(run: Run, cfg: Config, model: nn.Module, gmms: Gmm, target: SegmentationDataset) -> float:
    """delta: as given, or by --pl-ratio from the best log density of a million target pixels, or the paper's."""
    if cfg.delta is not None or cfg.pl_ratio is None:
        return cfg.delta if cfg.delta is not None else {"synthia": -50.0}.get(cfg.source, 100.0)
    sample = FeatureSample(1, 1_000_000, run.options.seed)
    for x, _, (name,) in run.sweep("densities", target, shared=True):
        with run.autocast():
            feat, _ = model(x)
        best = upsample(class_scores(feat, gmms), x.shape[-2:]).amax(dim=1).view(-1, 1)       # (H W, 1)
        sample.add(name, best, torch.zeros_like(best[:, 0], dtype=torch.int64))
    return sample.features(0).quantile(1 - cfg.pl_ratio, interpolation="lower").item()


def label_target(run: Run, cfg: Config, model: nn.Module, gmms: Gmm, anchors: Tensor, delta: float, target: SegmentationDataset,
                 folder: Path, num_classes: int) -> dict[str, Tensor]:
    """Write the pseudo labels of the target set, and measure the warm-up model's entropy on it in the same pass.

    Returns: pixels labelled as each category (C,); all pixels; e_c (C,), NaN for a category that is never predicted.
    """
    labelled, count, entropy = torch.zeros(3, num_classes, dtype=torch.float64)
    pixels, theta = torch.zeros((), dtype=torch.float64), torch.full((num_classes,), 0.9)
    everyone_has_all = cfg.assign == "ias"                                                    # it goes image by image
    for x, _, (name,) in run.sweep("pseudo labels", target, shared=not everyone_has_all):
        with run.autocast():
            feat, logits = model(x)                                                           # (1, D, h, w), (1, C, h, w)
        log_p = logits.log_softmax(dim=1)
        own = log_p.argmax(dim=1).flatten().cpu()
        entropy.index_add_(0, own, -(log_p.exp() * log_p).sum(dim=1).flatten().cpu().double())
        count += own.bincount(minlength=num_classes)
        if cfg.assign == "none":
            continue
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
        sum_over_processes(labelled, pixels, entropy, count)
    return {"labelled": labelled, "pixels": pixels, "entropy": entropy / count}


def cluster_target(run: Run, cfg: Config, encoder: Callable, source: Dataset, target: SegmentationDataset) -> dict[str, Tensor]:
    """Sec. 3.4: prototypes (J, D) of the target's features of E^, and d_mean, the source features' mean distance to them."""
    sample = FeatureSample(1, cfg.stm_samples, run.options.seed)
    for x, _, (name,) in run.sweep("target features", target, shared=True):
        feat = encoder(x)                                                                     # (cells, D)
        sample.add(name, feat, torch.zeros_like(feat[:, 0], dtype=torch.int64))
    prototypes = kmeans(sample.features(0), cfg.J, seed=run.options.seed).to(run.device)
    total, count = torch.zeros(2, dtype=torch.float64)
    for x, *_ in run.sweep("distances", source, shared=True):
        distance = target_distance(encoder(x), prototypes)
        total, count = total + distance.cpu().double().sum(), count + len(distance)
    sum_over_processes(total, count)
    return {"prototypes": prototypes.cpu(), "d_mean": (total / count).clamp(min=1e-12)}


def write_transferability(run: Run, cfg: Config, encoder: Callable, prototypes: Tensor, d_mean: float, e: Tensor,
                          source: Dataset, folder: Path) -> dict[str, Tensor]:
    """Write w of every source image as an 8-bit map. Returns: sum of w, and labelled pixels, per category (C,)."""
    total, count = torch.zeros(2, len(e), dtype=torch.float64)
    for x, y, (name,) in run.sweep("transferability", source, shared=True):
        distance = target_distance(encoder(x), prototypes).view(1, 1, *cfg.stm_grid[::-1])
        distance = F.interpolate(distance, y.shape[-2:], mode="nearest-exact")[:, 0]          # (1, H, W)
        w = transferability_map(distance, d_mean, e, y)                                       # (1, H, W)
        labels = y[y != IGNORE].cpu()
        total.index_add_(0, labels, w[y != IGNORE].cpu().double())
        count += labels.bincount(minlength=len(e))
        save_label(folder / f"{name}.png", (255 * w[0]).round())
    sum_over_processes(total, count)
    return {"total": total, "count": count}


@torch.no_grad()
def prepare_selftraining(run: Run, cfg: Config, model: nn.Module, encoder: Callable | None, source: Dataset,
                         target: SegmentationDataset, classes: ClassList) -> None:
    """Prototypes, pseudo labels and transferability maps from the warm-up model; what an earlier start computed is kept."""
    run.prepare("selftrain")
    model.eval()
    gmms, anchors, delta = None, None, None
    if cfg.assign != "none":
        found = run.once(KEPT[0], lambda: fit_prototypes(run, cfg, model, source, len(classes)))
        gmms, anchors = Gmm(*(found[key].to(run.float64_device) for key in Gmm._fields)), found["anchor"].to(run.device)
        delta = choose_delta(run, cfg, model, gmms, target)
        run.log(stage="selftrain", iteration=0, delta=delta, samples=dict(zip(classes.names, found["count"].tolist())))
    made = run.once(KEPT[1], lambda: label_target(run, cfg, model, gmms, anchors, delta, target, run.folder / "pseudo_labels",
                                                  len(classes)))
    if cfg.assign != "none":
        percent = 100 * torch.cat([made["labelled"], made["labelled"].sum(dim=0, keepdim=True)]) / made["pixels"]
        ratio = report("pseudo labels of the target, in percent of its pixels (PL ratio)", (*classes.names, "all"), percent)
        run.log(stage="selftrain", iteration=0, pl_ratio=ratio)
        draw_labels(run, cfg, model, gmms, anchors, delta, target, classes)
    if cfg.stm:
        folder = run.folder / "transferability"
        found = run.once(KEPT[2], lambda: cluster_target(run, cfg, encoder, source, target))
        e = normalised_entropy(made["entropy"]).float().to(run.device)
        w = run.once(KEPT[3], lambda: write_transferability(run, cfg, encoder, found["prototypes"].to(run.device),
                                                            found["d_mean"].item(), e, source, folder))
        mean = report("mean transferability of the source's pixels", classes.names, w["total"] / w["count"])
        run.log(stage="selftrain", iteration=0, entropy=made["entropy"].tolist(), transferability=mean)
        draw_transferability(run, source, folder)
    model.train()


# ------------------------------------------------------------------------------------------------- the stages


def sgd(model: nn.Module, cfg: Config, lr: float) -> torch.optim.SGD:
    """Sec. 4.2's optimizer. Args: lr: the encoder's rate."""
    return torch.optim.SGD(model.parameter_groups(cfg.head_rate * lr, 1 / cfg.head_rate), lr=lr, momentum=cfg.momentum,
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
        lambda_it = cfg.lambda_consist * ramp(it, cfg.selftrain_iterations, cfg.ramp_iterations, cfg.ramp_share)
        loss = ce + sce + lambda_it * consist                                                 # Eq. (13)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, model, cfg.ema)
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
    """Check the settings before anything is loaded."""
    if len(cfg.scale) != 2 or cfg.scale[0] > cfg.scale[1]:
        raise UserError(f"--scale {' '.join(map(str, cfg.scale))} is no range: give the smallest and the largest factor")
    check_domains(cfg, options, "warmup", [cfg.source_size, cfg.target_size], cfg.scale[1])
    if cfg.delta is not None and cfg.assign != "maps":
        raise UserError(f"--delta is the threshold of --assign maps, not of --assign {cfg.assign}: leave it out")
    if cfg.stm_weights and cfg.stm_backbone == "warmup":
        raise UserError("--stm-weights are for a network of torchvision's: name it by --stm-backbone and --stm-layer")
    if cfg.adapt_freeze_bn == "all" and not cfg.continue_warmup:
        raise UserError("--adapt-freeze-bn all would freeze statistics of new layers that have seen no image, because "
                        "self-training starts from the initial weights: add --continue-warmup, or leave it out")


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
    model = run.network("v3+", classes)
    if options.eval:
        run.evaluate(run.load_latest(model), model, test, classes, tests)
        return

    augment = Augment(scale=(cfg.scale[0], cfg.scale[1]), crop=cfg.crop, jitter=cfg.jitter)
    target = run.images(cfg.target, "train", classes, sizes, labels=False, augment=augment)
    domain = cfg.target if options.target_labels else cfg.source
    aligns = cfg.alignment == "gpa" and not options.target_labels
    alter = partial(align, [pair.image for pair in target.pairs], cfg.target_size, options.seed) if aligns else None
    source = run.images(domain, "train", classes, sizes, augment=augment, alter=alter)
    whole = OneVersion(run.images(domain, "train", classes, sizes, alter=alter), 0)

    prepares = run.trains("selftrain") and not run.begun("selftrain") and (cfg.stm or cfg.assign != "none")
    encoder = independent_encoder(run, cfg, model) if cfg.stm and prepares else None         # refuse it now, not later
    run.start_from(model)
    run.watch(model, test, classes)
    if run.trains("warmup"):
        run.forget(*KEPT)                                                                     # what an earlier one led to
    # An upper bound is trained for as many iterations as the adapted model.
    warm_up(run, cfg, model, source, cfg.warmup_iterations + options.target_labels * cfg.selftrain_iterations)
    run.evaluate("warmup", model, test, classes, tests)

    if prepares:
        prepare_selftraining(run, cfg, model, encoder, whole, target, classes)
    if cfg.stm and any(map(run.trains, run.stages[1:])):
        maps = (run.folder if run.reaches("selftrain") else Path(options.from_).parent) / "transferability"
        if not maps.is_dir():
            raise UserError(f"{maps} is not there: --from has no transferability maps beside it; add --no-stm")
        source = source.with_maps(maps)
    if run.reaches("selftrain"):
        labelled = cfg.assign != "none" and run.trains("selftrain")
        if not cfg.continue_warmup:
            model = run.network("v3+", classes)                                               # from the initial weights
        if cfg.continue_warmup or cfg.adapt_freeze_bn != "auto":
            model.freeze_bn("all" if cfg.adapt_freeze_bn == "auto" else cfg.adapt_freeze_bn)
        run.watch(model, test, classes)
        self_train(run, cfg, model, source, target.with_maps(run.folder / "pseudo_labels") if labelled else target)
        run.evaluate("selftrain", model, test, classes, tests)

    for stage in run.stages[2:]:
        if run.reaches(stage):
            previous, folder = model, run.folder / stage
            if run.trains(stage) and not run.begun(stage):
                write_hard_labels(run, cfg, stage, previous, target, folder)
            model = run.network("v3+", classes)                                               # a fresh student
            run.watch(model, test, classes)
            distill(run, cfg, stage, model, previous, source, target.with_maps(folder) if run.trains(stage) else target)
            run.evaluate(stage, model, test, classes, tests)


# ----------------------------------------------------------------------------------------- numbers and pictures


def report(title: str, names: tuple[str, ...], shares: Tensor) -> dict[str, float]:
    """Print one number per category; return those that there are."""
    print(f"\n{title}")
    for name, share in zip(names, shares.tolist(), strict=True):
        print(f"{name:<16}" + ("-".rjust(8) if math.isnan(share) else f"{share:8.2f}"), flush=True)
    return {name: share for name, share in zip(names, shares.tolist()) if not math.isnan(share)}


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
    run.draw("transferability.png", rows, ["source", "transferability", "weighted by it"])


if __name__ == "__main__":
    main()
