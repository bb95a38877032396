"""Bidirectional Self-Training with Multiple Anisotropic Prototypes for Domain Adaptive Semantic Segmentation (BiSMAP).

Lu, Luo, Zhang, Li, Yang, Xiao. ACM MM 2022. arXiv:2204.07730

Forward: a mixture of diagonal Gaussians (MAPs) describes each category's source features. A target pixel with high density
under the best mixture gets that category as pseudo label. Backward: source pixels far from all clusters of target features
weigh less in training (the source transferability map, STM).

    Eq. (3)             correct_label_map, FeatureSample    Lambda_c; 300,000 of it per category
    Eqs. (4), (5)       log_density, fit_gmm                Sec. 3.3: expectation maximisation
    Eq. (6)             map_pseudo_labels                   Table 3: anchor_pseudo_labels (CAs), ias_thresholds (IAS)
    Sec. 3.4, Eq. (7)   kmeans, target_distance             target prototypes A_j, and D(x), the distance to them
    Eqs. (8), (9)       normalised_entropy (e'), transferability_map (w)
    Eqs. (2), (10)      reweighted_cross_entropy            Eq. (2): w = 1, images aligned by c2f.photometric_fit
    Eqs. (11), (12)     symmetric_cross_entropy, consistency_loss
    Eq. (13)            self_train                          stage selftrain; distill: "as ProDA [40]"

    E, F, G = F o E   encoder, classifier, network          C, c     categories
    f, feat           the classifier's input feature        G, k     `--components` per category (the paper's K)
    p_c               log density of category c's mixture   delta    `--delta`, of Eq. (6)
    E^, f^            independent encoder, its features     J, A_j   number of target prototypes, prototype j
    phi               RandAugment and CutOut                lambda   `--lambda-consist`, of Eq. (13)

Stages: warmup -> selftrain -> distill1 -> distill2.

    python bismap.py --toy                                   the toy city, some minutes on two cores
    python bismap.py --source gta5                           the paper's GTA5 -> Cityscapes; again to resume
    torchrun --nproc_per_node=4 bismap.py --source gta5 --warmup-batch-size 2 --batch-size 1     four GPUs
    python bismap.py --source gta5 --from runs/bismap-gta5/warmup.pt --no-distill --assign none --lambda-consist 0 --tag stm
    python bismap.py --source gta5 --eval                    only evaluate what the run has reached

Departures:
 1. Eqs. (2), (10), (11): the paper sums over pixels; here it is a mean over the labelled pixels. Eq. (12) and distillation's KL
    are means over the C categories and, at stride 4, the pixels that CutOut leaves (padding counts).
 2. Footnote 1 enlarges the features, which costs 16 times more. Here densities are computed at stride 4 and then enlarged;
    entropies stay at stride 4.
 3. Sec. 3.3: EM starts from k-means and ends by `--em-tol`, at the latest after `--em-iterations`. Variances are at least
    `--variance-floor`. An empty component has weight 0.
 4. Sec. 4.2: delta depends on the feature's dimension and on the variance floor. `--pl-ratio` picks it by Table 5's "PL ratio".
 5. Sec. 3.5: E^ is torchvision's ResNet-152 on ImageNet; the paper's is SimCLRv2's. The paper gives neither E^'s input size,
    layer and grid (distances are enlarged by nearest neighbour), nor J, nor the number of clustered target features.
 6. Eq. (7) prints 0 < j < J; here all J centres are used. Eq. (8)'s prose swaps minimum and maximum. Its categories are the
    network's predictions, not pseudo labels. e' is 0 for one that is never predicted, and for all if the entropies are equal.
 7. Sec. 3.5: each source image has one fixed aligned version in all stages. Transferability maps are stored in 8 bits.
 8. Sec. 3.5: "retraining" starts from the initial weights, as in the authors' configuration. `--continue-warmup` starts from
    the warm-up model.
 9. Eq. (11): the label is clamped in the reverse term only, so a pixel that the network contradicts keeps its gradient.
10. Eq. (12) puts phi on the teacher's input (`--augment teacher`). phi uses RandAugment's colour operations. The paper gives
    neither their number and strength nor CutOut's size.
11. Eq. (13) has no ramp. Here lambda rises as exp(-5 (1 - t/T)^2); T: `--ramp-iterations`, at most `--ramp-share` of the stage.
12. Sec. 4.2: the rate is the encoder's; ASPP, decoder and classifier have `--head-rate` times that. The jitter's strength is
    not given. There is no dropout. Each stage has its own optimizer and rate schedule. Batches are per domain.
13. Sec. 4.3, "proposed in [40]": two rounds, each with a new student. Labels are the previous model's argmax, multi-scale and
    flipped. The losses are Eq. (10) on the source, Eq. (11) on the target, and KL to the previous model.
14. Sec. 4.2: batch norm of pretrained encoders is frozen (`--freeze-bn`). With `--continue-warmup`, self-training freezes all.
15. Table 3: CAs are the means of the samples of Eq. (3), with CAG's margin. IAS has IAST's constants.
docs/agreement.md lists what the published code does differently.
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
from torch import Tensor, nn
from torch.utils.data import Dataset

from c2f import photometric_fit
from common import data
from common.cli import Size, command, option, parse
from common.data import IGNORE, Augment, SegmentationDataset, derive_seed, fixed_version, save_label
from common.deeplab import at_least_float32, resize_label, resnet_features, upsample
from common.distributed import broadcast_buffers, gather_objects, labelled_mean, parallel, sum_over_processes
from common.files import UserError
from common.metrics import predict, print_table
from common.run import Options, Run
from common.viz import colorize, denormalise

SIZES = {"synthia": Size(2048, 1024)}                  # Sec. 4.2; others: their own size


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    backbone: str = option("resnet101", "encoder of DeepLab v3+", paper="resnet101", section="Sec. 4.2",
                           choices=("resnet101", "resnet50", "resnet18"))
    adapt_freeze_bn: str = option("auto", "frozen batch norm in self-training; auto: as --freeze-bn, or all with "
                                  "--continue-warmup", choices=("auto", "all", "encoder", "none"))
    alignment: str = option("gpa", "global photometric alignment", paper="gpa", section="Sec. 3.5", choices=("gpa", "none"))
    components: int = option(8, "Gaussians per category", paper=8, section="Sec. 3.5", low=1)
    samples: int = option(300_000, "source features per category; 8 KB each to fit", paper=300_000, section="Sec. 3.5", low=1)
    em_iterations: int = option(100, "most iterations of EM", low=1)
    em_tol: float = option(1e-3, "EM stops if the mean log-likelihood rises by less", low=0.0)
    variance_floor: float = option(1e-6, "smallest variance of a Gaussian", low=1e-30)
    assign: str = option("maps", "pseudo labels: maps: Eq. (6); anchors: category anchors; ias: instant adaptive selector",
                         paper="maps", section="Table 3", choices=("maps", "anchors", "ias", "none"))
    delta: float | None = option(None, "smallest log density that Eq. (6) labels", paper="100, SYNTHIA -50", section="Sec. 4.2")
    pl_ratio: float | None = option(None, "choose delta to label this share of the target's pixels", low=0.0, high=1.0)
    anchor_margin: float = option(1.0, "margin of --assign anchors", paper=1.0, section="Table 5", low=0.0)
    stm: bool = option(True, "weight source pixels by the transferability map", paper=True, section="Sec. 3.4")
    stm_backbone: str = option("resnet152", "E^: a torchvision classification network, or warmup: the warm-up's encoder",
                               paper="resnet152", section="Sec. 3.5")
    stm_weights: str | None = option(None, "file with E^'s weights, under torchvision's names; automatic: ImageNet's")
    stm_layer: str = option("layer4", "E^'s layer that gives the features")
    stm_size: Size = option(Size(256, 128), "size of E^'s input images")
    stm_grid: Size = option(Size(4, 4), "E^'s features are averaged over this grid; each cell has one distance")
    J: int = option(40, "target prototypes", low=1)
    stm_samples: int = option(200_000, "most target features to cluster", low=1)
    alpha: float = option(0.1, "weight of the cross entropy in Eq. (11)", paper=0.1, section="Sec. 3.5", low=0.0)
    beta: float = option(1.0, "weight of the reverse cross entropy in Eq. (11)", paper=1.0, section="Sec. 3.5", low=0.0)
    lambda_consist: float = option(20.0, "lambda, weight of Eq. (12); 0: without it", paper=20.0, section="Sec. 4.2", low=0.0)
    ramp_iterations: int = option(4000, "iterations in which lambda rises to its value", low=0)
    ramp_share: float = option(0.25, "upper limit of --ramp-iterations, as a share of the stage", low=0.0, high=1.0)
    continue_warmup: bool = option(False, "self-training starts from the warm-up model, not from the initial weights")
    ema: float = option(0.999, "smoothing coefficient of the teacher", paper=0.999, section="Sec. 4.2", low=0.0, high=1.0)
    augment: str = option("teacher", "input to augment", paper="teacher", section="Eq. (12)", choices=("teacher", "student"))
    phi_operations: int = option(2, "operations of RandAugment per image", low=0)
    phi_strength: float = option(0.5, "strength of these operations", low=0.0, high=1.0)
    cutout: float = option(0.4, "side of CutOut's square, as a share of the shorter side", low=0.0, high=1.0)
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
    distill_iterations: int = option(90_000, "iterations per round of distillation", paper=90_000, section="Sec. 4.2", low=1)
    warmup_batch_size: int = option(8, "images per batch and process in the warm-up", paper=8, section="Sec. 4.2", low=1)
    batch_size: int = option(4, "images per domain, batch and process after the warm-up", paper=4, section="Sec. 4.2", low=1)
    scale: tuple[float, float] = option((0.5, 1.5), "range of the random resize", paper=(0.5, 1.5), section="Sec. 4.2", low=0.1)
    crop: Size = option(Size(896, 512), "random crop in training", paper=Size(896, 512), section="Sec. 4.2")


TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           crop=Size(128, 64), scale=(1.0, 1.5), warmup_batch_size=2, batch_size=2, warmup_iterations=720,
           selftrain_iterations=500, distill_iterations=500, samples=20_000, pl_ratio=0.6, stm_backbone="warmup", ema=0.99,
           workers=0, amp="auto", channels_last=True)


class Gmm(NamedTuple):
    """A mixture of diagonal Gaussians; with a leading dimension C, one per category."""

    weight: Tensor                                     # (G,), pi; 0: an empty component
    mean: Tensor                                       # (G, D), mu
    variance: Tensor                                   # (G, D), the diagonal of Sigma


def component_log_prob(feat: Tensor, square: Tensor, gmm: Gmm) -> Tensor:
    """log pi_k + log N_k(f), Eq. (5) expanded: feat (M, D) float64 and its square -> (M, G), or (M, C, G) for C mixtures."""
    mean, precision = gmm.mean.double().flatten(0, -2), 1 / gmm.variance.double().flatten(0, -2)      # (C G, D) each
    exponent = square @ precision.T - feat @ (2 * mean * precision).T + (mean.square() * precision).sum(dim=1)
    log_norm = mean.shape[1] * math.log(2 * math.pi) - precision.log().sum(dim=1)
    return gmm.weight.double().log() - 0.5 * (exponent + log_norm).unflatten(1, gmm.weight.shape)


def log_density(feat: Tensor, gmm: Gmm) -> Tensor:
    """Eq. (4):  p_c(f) = log sum_k pi_ck N_ck(f | mu_ck, Sigma_ck)
    Eq. (5):  N_ck(f) = exp(-1/2 (f - mu)^T Sigma^-1 (f - mu)) / ((2 pi)^(d/2) |Sigma|^(1/2))

    Args: feat (M, D) float; gmm with G components, or C x G.
    Returns: (M,) or (M, C) float64; -inf for a mixture without components. A log-sum-exp: no underflow."""
    feat = feat.double()
    return component_log_prob(feat, feat.square(), gmm).logsumexp(dim=-1)


def fit_gmm(feat: Tensor, components: int = 8, iterations: int = 100, tol: float = 1e-3, seed: int = 0, init: Gmm | None = None,
            variance_floor: float = 1e-6) -> Gmm:
    """Fit a mixture of diagonal Gaussians by expectation maximisation, Sec. 3.3.
    Args: feat (M, D) float; components: G (one without samples gets weight 0); iterations: maximum; tol: EM ends if the mean
        log-likelihood rises by less; seed: of the k-means start; init: a mixture to start from instead; variance_floor: lower
        limit of the variances (clamped; the likelihood still never falls).
    Returns: Gmm in float64."""
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
    """Eq. (3):  Lambda_c = {f_i | argmax G(x)_i = c, y_i = c};  the label where the prediction is correct.

    Args: logits (N, C, h, w); label (N, h, w) int64 on the same grid, 255 ignored.  Returns: (N, h, w), 255 elsewhere."""
    return torch.where(logits.argmax(dim=1) == label, label, IGNORE)


class FeatureSample:
    """A uniform sample, without replacement, of each category's features, in one pass: those with the smallest random keys.
    A feature's key depends only on (seed, image, pixel). So the sample does not depend on the order of the images, nor on the
    number of processes. Memory: between two images, at most 1.25 `size` float32 features per category."""

    def __init__(self, num_classes: int, size: int, seed: int):
        self.size, self.seed = size, seed
        self.parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_classes)]      # (keys, features)
        self.held = [0] * num_classes
        self.largest = [2**62] * num_classes                                                  # larger keys are rejected

    def add(self, name: str, feat: Tensor, label: Tensor) -> None:
        """Add an image's features. Args: name; feat (M, D); label (M,) int64, 255 ignored."""
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
        """(n, D) float32, n <= size, in key order; None if there are none."""
        parts = [part for parts in gather_objects(self.parts[c]) for part in parts]
        if not parts:
            return None
        keys, feats = (torch.cat(part) for part in zip(*parts))
        return feats[keys.argsort()[: self.size]]


def map_pseudo_labels(log_prob: Tensor, delta: float) -> Tensor:
    """Eq. (6):  y^_r = 1 if r = argmax_c p_c(f), p_r(f) >= delta, else 0.

    Args: log_prob (N, C, h, w), p_c of Eq. (4).  Returns: (N, h, w) int64, 255 where no category reaches delta."""
    best, label = log_prob.max(dim=1)                                                         # (N, h, w) each
    return label.masked_fill(~((best >= delta) & best.isfinite()), IGNORE)


def anchor_pseudo_labels(feat: Tensor, anchors: Tensor, margin: float = 1.0) -> Tensor:
    """Table 3's CAs: the nearest anchor, if the second is farther by more than the margin (CAG's Eqs. 5 to 7).
    Args: feat (N, D, h, w); anchors (C, D), NaN for a category without one.  Returns: (N, h, w) int64, 255 elsewhere."""
    distance = torch.cdist(feat.movedim(1, -1).flatten(0, 2), anchors.nan_to_num())           # (N h w, C)
    distance = distance.masked_fill(anchors.isnan().any(dim=1), torch.inf)
    (first, second), (label, _) = (x.unbind(dim=1) for x in distance.topk(2, dim=1, largest=False))
    return label.masked_fill(~(second - first > margin), IGNORE).view(len(feat), *feat.shape[2:])


def ias_thresholds(theta: Tensor, confidence: Tensor, label: Tensor) -> Tensor:
    """Table 3's IAS [25], updated by one image:  theta_c <- 0.9 theta_c + 0.1 psi_c.  psi_c is at rank
    0.2 theta_c^8 n_c of the image's n_c confidences in category c, highest first.
    Args: theta (C,); confidence, label (h, w) of the image's prediction.  Returns: (C,); unchanged for an absent category."""
    theta = theta.clone()
    for c in label.unique().tolist():
        ranked = confidence[label == c].sort(descending=True).values
        psi = ranked[min(len(ranked) - 1, int(len(ranked) * 0.2 * float(theta[c]) ** 8))]
        theta[c] = 0.9 * theta[c] + 0.1 * psi
    return theta


def kmeans(feat: Tensor, J: int, iterations: int = 30, seed: int = 0) -> Tensor:
    """Sec. 3.4: centres (J, D) of J clusters of feat (M, D), M >= 1, float32 or float64, with a k-means++ start. A cluster that
    loses its features keeps its centre. With fewer than J different features, some centres are equal."""
    from scipy.cluster.vq import kmeans2  # takes a second, which --help does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                                       # empty clusters, 0 / 0
        centers, _ = kmeans2(feat.cpu().numpy(), J, iter=iterations, minit="++", rng=seed)
    return torch.from_numpy(centers).to(feat)


def target_distance(feat: Tensor, prototypes: Tensor) -> Tensor:
    """Eq. (7):  D(x)_i = min_j || f^_i - A_j ||_2, over all J.

    Args: feat (M, D), of E^; prototypes (J, D).  Returns: (M,), >= 0."""
    return torch.cdist(feat, prototypes, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)


def normalised_entropy(entropy: Tensor) -> Tensor:
    """Eq. (8):  e'_c = (e_c - e_min) / (e_max - e_min), over the predicted categories.

    Args: entropy (C,), mean entropy of the target pixels predicted as c; NaN: never predicted.
    Returns: (C,) in [0, 1]; 0 for NaN; all 0 if all entropies are equal."""
    low, high = entropy.nan_to_num(torch.inf).min(), entropy.nan_to_num(-torch.inf).max()
    return ((entropy - low) / (high - low)).nan_to_num(0.0)                                   # 0 / 0, or a NaN


def transferability_map(distance: Tensor, d_mean: float | Tensor, normalised_entropy: Tensor, label: Tensor) -> Tensor:
    """Eq. (9):  w_i = min(exp(-D(x)_i^2 / d_mean^2 log 2) + e'_c, 1),  c = y_i.

    Args: distance (N, h, w) of Eq. (7); d_mean, its mean over the source set, > 0; normalised_entropy (C,) of Eq. (8);
        label (N, h, w) int64, 255 ignored.  Returns: (N, h, w) in [0, 1]; 0 at unlabelled pixels."""
    e = F.pad(normalised_entropy, (0, 1))[label.clamp(max=len(normalised_entropy))]
    w = (torch.exp(-(distance / d_mean).square() * math.log(2)) + e).clamp(max=1.0)
    return w.masked_fill(label == IGNORE, 0.0)


def reweighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Eq. (10):  L_ce = sum_i sum_c - w_i y_ic log p_ic;  Eq. (2): the same with w = 1.

    Args: logits (N, C, h, w); label (N, H, W) int64, 255 ignored; weight (N, H, W) in [0, 1], or 1 for all.
    Returns: 0-d, the sum over the number of labelled pixels (the paper sums); exactly 0 if there are none."""
    loss = F.cross_entropy(upsample(logits, label.shape[-2:]), label, ignore_index=IGNORE, reduction="none")  # (N, H, W)
    return labelled_mean(weight * loss, label != IGNORE)


def symmetric_cross_entropy(logits: Tensor, pseudo_label: Tensor, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
    """Eq. (11):  L_sce = sum_i sum_c - alpha y^_ic log p_ic - beta p_ic log y^_ic,  y^ in the second term clamped to [1e-4, 1].

    Args: logits (N, C, h, w); pseudo_label (N, H, W) int64, 255 ignored.
    Returns: 0-d, mean over the labelled pixels (the paper sums); exactly 0 if there are none."""
    logits = upsample(logits, pseudo_label.shape[-2:])                                        # (N, C, H, W)
    labelled = pseudo_label != IGNORE
    forward = F.cross_entropy(logits, pseudo_label, ignore_index=IGNORE, reduction="none")    # (N, H, W)
    p_label = logits.softmax(dim=1).gather(1, torch.where(labelled, pseudo_label, 0)[:, None])[:, 0]
    reverse = -math.log(1e-4) * (1 - p_label)                                                 # log y^ is 0 at the label
    return labelled_mean(alpha * forward + beta * reverse, labelled)


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Eq. (12):  L_consist = sum_i sum_c p~_ic log p~_ic - p~_ic log p_ic.

    Args: student_logits, teacher_logits (N, C, h, w), no gradient to the teacher's; mask (N, h, w): true where a pixel counts.
    Returns: 0-d, mean over the C categories and the pixels that count (the paper sums); exactly 0 if none does."""
    log_p, log_q = student_logits.log_softmax(dim=1), teacher_logits.detach().log_softmax(dim=1)
    kl = (log_q.exp() * (log_q - log_p)).mean(dim=1)                                          # (N, h, w)
    return kl.mean() if mask is None else labelled_mean(kl, mask)


def ramp(iteration: int, iterations: int, length: int = 4000, share: float = 0.25) -> float:
    """The factor of Eq. (13)'s lambda, in (0, 1]: exp(-5 (1 - t/T)^2) for t < T, then 1;  T = min(length, share iterations)."""
    T = min(length, share * iterations)
    return math.exp(-5 * (1 - iteration / T) ** 2) if iteration < T else 1.0


@torch.no_grad()
def update_teacher(teacher: nn.Module, model: nn.Module, ema: float) -> None:
    """theta' <- ema theta' + (1 - ema) theta, for weights and floating-point buffers; others are copied."""
    for old, new in zip(teacher.state_dict().values(), model.state_dict().values(), strict=True):
        old.copy_(torch.lerp(old, new, 1 - ema) if old.is_floating_point() else new)


RAND_AUGMENT = (                                       # torchvision's, for uint8 images; argument for m in [-1, 1]
    ("autocontrast", None), ("equalize", None), ("posterize", lambda m: 8 - round(4 * abs(m))),
    ("solarize", lambda m: 255 * (1 - abs(m))), ("adjust_saturation", lambda m: 1 + m), ("adjust_contrast", lambda m: 1 + m),
    ("adjust_brightness", lambda m: 1 + m), ("adjust_sharpness", lambda m: 1 + m))


def phi(images: Tensor, seeds: list[int], operations: int = 2, strength: float = 0.5,
        cutout: float = 0.4) -> tuple[Tensor, Tensor]:
    """RandAugment's colour operations, then CutOut; each result depends only on its image and seed.
    Args: images (N, 3, H, W), normalised; cutout: side of the square as a share of the shorter side.
    Returns: images of the same kind, and (N, H, W) bool, false where CutOut removed a pixel."""
    from torchvision.transforms.v2 import functional  # takes seconds, which --help does not need
    mean, std = torch.tensor((data.IMAGENET_MEAN, data.IMAGENET_STD)).to(images, non_blocking=True)[..., None, None]
    augmented, visible = torch.empty_like(images), torch.ones_like(images[:, 0], dtype=torch.bool)
    side = round(cutout * min(images.shape[-2:]))
    for n, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = ((images[n] * std + mean).clamp(0, 1) * 255).round().byte()
        for k in torch.randint(len(RAND_AUGMENT), (operations,), generator=generator).tolist():
            (name, argument), m = RAND_AUGMENT[k], strength * (2 * torch.rand((), generator=generator).item() - 1)
            x = getattr(functional, name)(x, *([argument(m)] if argument else []))
        top, left = (int(torch.randint(1 - side, length, (), generator=generator)) for length in images.shape[-2:])
        visible[n, max(0, top): top + side, max(0, left): left + side] = False
        augmented[n] = torch.where(visible[n], (x / 255 - mean) / std, 0.0)                   # 0: the mean colour
    return augmented, visible


def align(references: list[Path], size: Size | None, seed: int, image: Tensor, _: int, name: str) -> tuple[Tensor, Callable]:
    """The loader's transform of a source image (3, H, W) uint8: align what a crop needs to a target image, chosen by `name`."""
    from common.pixels import change_window  # only the loader needs it
    reference = references[derive_seed(seed, "alignment", name) % len(references)]
    return image, partial(change_window, photometric_fit(image, reference, size))


def torchvision_layer(run: Run, cfg: Config) -> nn.Module:
    """One layer of a classification network: (1, 3, H, W) -> {"feat": (1, D, h, w)}. Raises: UserError if unavailable."""
    from torchvision import models  # takes seconds, which --help does not need
    from torchvision.models.feature_extraction import create_feature_extractor
    try:
        net = models.get_model(cfg.stm_backbone, weights=None if cfg.stm_weights else "IMAGENET1K_V1")
        layer = run.place(create_feature_extractor(net, {cfg.stm_layer: "feat"}).eval().requires_grad_(False))
        _, _, _, _ = layer(torch.zeros(1, 3, 64, 128, device=run.device))["feat"].shape       # fails if it is no feature map
    except Exception as error:                         # a download raises almost anything
        raise UserError(f"--stm-backbone {cfg.stm_backbone}: torchvision does not know it, its ImageNet weights "
                        f"cannot be downloaded, or --stm-layer {cfg.stm_layer} gives no feature map ({type(error).__name__}); "
                        "give --stm-weights PATH, --stm-backbone warmup or --no-stm") from error
    if cfg.stm_weights:
        from common.published import read_weights  # only a file of weights needs it
        weights, needed = read_weights(cfg.stm_weights, "--stm-weights"), layer.state_dict()
        if missing := [key for key, value in needed.items() if key not in weights or weights[key].shape != value.shape]:
            raise UserError(f"--stm-weights {cfg.stm_weights} lacks {len(missing)} keys of {cfg.stm_backbone} ({missing[0]}, "
                            "...) or has other shapes for them; give weights of this network under torchvision's names")
        layer.load_state_dict({key: weights[key] for key in needed})
    return layer


def independent_encoder(run: Run, cfg: Config, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """E^, a function: image (1, 3, H, W) -> features (cells of `stm_grid`, D). Raises: UserError if unavailable."""
    layer = torchvision_layer(run, cfg) if cfg.stm_backbone != "warmup" else None
    if layer is None and not hasattr(model.encoder, "layer4"):
        raise UserError("--stm-backbone warmup needs a ResNet encoder: give --stm-backbone resnet18 or --no-stm")

    def encode(x: Tensor) -> Tensor:
        x = F.interpolate(x, cfg.stm_size[::-1], mode="bilinear", antialias=True)
        with run.autocast():
            feat = layer(x)["feat"] if layer else resnet_features(model.encoder, model.prepare(x))[1]
        return F.adaptive_avg_pool2d(at_least_float32(feat), cfg.stm_grid[::-1])[0].flatten(1).T
    return encode


def class_scores(feat: Tensor, gmms: Gmm) -> Tensor:
    """p_c(f) of a feature map (N, D, h, w) under each category's mixture: (N, C, h, w) float32, finite."""
    flat = feat.movedim(1, -1).flatten(0, 2).to(gmms.mean.device)                             # (N h w, D)
    scores = log_density(flat, gmms).float().clamp(min=-1e30).to(feat.device)                 # (N h w, C)
    return scores.view(len(feat), *feat.shape[2:], -1).movedim(-1, 1)


def fit_prototypes(run: Run, cfg: Config, model: nn.Module, source: Dataset) -> dict[str, Tensor]:
    """Eq. (3) over the aligned source set, in one pass, then a mixture per category. Returns: weight (C, G), mean and variance
    (C, G, D), anchor (C, D), number of samples: count (C,)."""
    C, sample = len(run.classes), FeatureSample(len(run.classes), cfg.samples, run.options.seed)
    for x, y, (name,) in run.sweep("source features", source):
        with run.autocast():
            feat, logits = model(x)                                                           # (1, D, h, w), (1, C, h, w)
        label = correct_label_map(logits, resize_label(y, logits.shape[-2:]))                 # (1, h, w)
        sample.add(name, feat[0].flatten(1).T, label.flatten())
    samples = [sample.features(c) for c in range(C)]
    feats = [torch.empty(0, model.feat_channels) if feat is None else feat for feat in samples]
    gmms = [fit_gmm(feat.to(run.float64_device), cfg.components, cfg.em_iterations, cfg.em_tol,
                    derive_seed(run.options.seed, "gmm", c), variance_floor=cfg.variance_floor) for c, feat in enumerate(feats)]
    anchor = torch.stack([feat.mean(dim=0, dtype=torch.float64).float() for feat in feats])   # NaN without samples
    weight, mean, variance = (torch.stack(part).cpu() for part in zip(*gmms))
    return {"weight": weight, "mean": mean, "variance": variance, "anchor": anchor, "count": torch.tensor([*map(len, feats)])}


def choose_delta(run: Run, cfg: Config, model: nn.Module, gmms: Gmm, target: SegmentationDataset) -> float:
    """delta: by --delta; by --pl-ratio, from the best log densities of a million target pixels; or the paper's."""
    if cfg.delta is not None or cfg.pl_ratio is None:
        return cfg.delta if cfg.delta is not None else {"synthia": -50.0}.get(run.options.source, 100.0)
    sample = FeatureSample(1, 1_000_000, run.options.seed)
    for x, _, (name,) in run.sweep("densities", target):
        with run.autocast():
            feat, _ = model(x)
        best = upsample(class_scores(feat, gmms), x.shape[-2:]).amax(dim=1).view(-1, 1)       # (H W, 1)
        sample.add(name, best, torch.zeros_like(best[:, 0], dtype=torch.int64))
    return sample.features(0).quantile(1 - cfg.pl_ratio, interpolation="lower").item()


def label_target(run: Run, cfg: Config, model: nn.Module, gmms: Gmm | None, anchors: Tensor | None, target: SegmentationDataset,
                 folder: Path) -> dict:
    """One pass over the target: write the pseudo labels and measure the warm-up model's entropy.
    Returns: e_c (C,), NaN for a category that is never predicted; delta; the percentage of pixels per label."""
    C, theta = len(run.classes), torch.full((len(run.classes),), 0.9)
    delta = None if cfg.assign == "none" else choose_delta(run, cfg, model, gmms, target)
    pixels, (count, entropy) = torch.zeros(C + 1, dtype=torch.float64), torch.zeros(2, C, dtype=torch.float64)
    shared = cfg.assign != "ias"                                                              # IAS needs all images in order
    for x, _, (name,) in run.sweep("pseudo labels", target, shared):
        with run.autocast():
            feat, logits = model(x)                                                           # (1, D, h, w), (1, C, h, w)
        log_p = logits.log_softmax(dim=1)
        predicted = log_p.argmax(dim=1).flatten().cpu()
        entropy.index_add_(0, predicted, -(log_p.exp() * log_p).sum(dim=1).flatten().cpu().double())
        count += predicted.bincount(minlength=C)
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
        pixels += label.clamp(max=C).flatten().cpu().bincount(minlength=C + 1)
        save_label(folder / f"{name}.png", label[0])
    if shared:
        sum_over_processes(pixels, entropy, count)
    if cfg.assign == "none":
        return {"entropy": entropy / count}
    percent = (100 * torch.cat([pixels[:C], pixels[:C].sum(dim=0, keepdim=True)]) / pixels.sum()).tolist()
    print_table("pseudo labels of the target, in percent of its pixels", {"PL ratio": percent}, (*run.classes.names, "all"), 2)
    return {"entropy": entropy / count, "delta": delta, "pl_ratio": dict(zip((*run.classes.names, "all"), percent))}


def cluster_target(run: Run, cfg: Config, encoder: Callable, source: Dataset, target: SegmentationDataset) -> dict[str, Tensor]:
    """Sec. 3.4: prototypes (J, D) of E^'s target features, and d_mean, the mean distance of its source features to them."""
    sample = FeatureSample(1, cfg.stm_samples, run.options.seed)
    for x, _, (name,) in run.sweep("target features", target):
        feat = encoder(x)                                                                     # (cells, D)
        sample.add(name, feat, torch.zeros_like(feat[:, 0], dtype=torch.int64))
    prototypes = kmeans(sample.features(0), cfg.J, seed=run.options.seed).to(run.device)
    total = torch.zeros((), dtype=torch.float64)
    for x, *_ in run.sweep("distances", source):
        total += target_distance(encoder(x), prototypes).cpu().double().mean()
    sum_over_processes(total)
    return {"prototypes": prototypes.cpu(), "d_mean": (total / len(source)).clamp(min=1e-12)}


def write_transferability(run: Run, cfg: Config, encoder: Callable, prototypes: Tensor, d_mean: float, e: Tensor,
                          source: Dataset, folder: Path) -> dict:
    """Write w of each source image as an 8-bit map."""
    for x, y, (name,) in run.sweep("transferability", source):
        distance = target_distance(encoder(x), prototypes).view(1, 1, *cfg.stm_grid[::-1])
        distance = F.interpolate(distance, y.shape[-2:], mode="nearest-exact")[:, 0]          # (1, H, W)
        save_label(folder / f"{name}.png", (255 * transferability_map(distance, d_mean, e, y)[0]).round())
    return {}


@torch.no_grad()
def prepare_selftraining(run: Run, cfg: Config, model: nn.Module, encoder: Callable | None, source: Dataset,
                         target: SegmentationDataset) -> tuple[SegmentationDataset, dict]:
    """All that the warm-up model gives, each part computed once. Returns: the target with pseudo labels; values for the log."""
    once, gmms, anchors, note = partial(run.once, "selftrain"), None, None, {}
    model.eval()
    if cfg.assign != "none":
        fitted = once("prototypes", lambda: fit_prototypes(run, cfg, model, source))
        gmms, anchors = Gmm(*(fitted[key].to(run.float64_device) for key in Gmm._fields)), fitted["anchor"].to(run.device)
        note["samples"] = dict(zip(run.classes.names, fitted["count"].tolist()))
    if cfg.assign != "none" or cfg.stm:
        folder = run.folder / "pseudo_labels"
        measured = once("labels", lambda: label_target(run, cfg, model, gmms, anchors, target, folder))
        note |= {**measured, "entropy": [None if math.isnan(e) else e for e in measured["entropy"].tolist()]}
    labelled = target if cfg.assign == "none" else target.with_maps(folder)
    if cfg.assign != "none":
        draw_maps(run, "labels.png", labelled, ["target", "pseudo label"], lambda photo, y: [colorize(y, run.classes)])
    if cfg.stm:
        maps, e = run.folder / "transferability", normalised_entropy(measured["entropy"]).float().to(run.device)
        clusters = once("target", lambda: cluster_target(run, cfg, encoder, source, target))
        A, d_mean = clusters["prototypes"].to(run.device), clusters["d_mean"].item()
        once("transferability", lambda: write_transferability(run, cfg, encoder, A, d_mean, e, source, maps))
        draw_maps(run, "transferability.png", fixed_version(source.dataset.with_maps(maps), 0), ["source", "weighted by w"],
                  lambda photo, w: [(photo * (w[..., None].numpy() / 255)).astype("uint8")])
    model.train()
    return labelled, note


def sgd(model: nn.Module, cfg: Config, lr: float) -> torch.optim.SGD:
    """Sec. 4.2's optimizer; lr is the encoder's rate."""
    return torch.optim.SGD(model.parameter_groups(cfg.head_rate * lr, 1 / cfg.head_rate), lr=lr, momentum=cfg.momentum,
                           weight_decay=cfg.weight_decay)


def warm_up(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, iterations: int) -> None:
    """Eq. (2) on the aligned source."""
    optimizer = sgd(model, cfg, cfg.lr)
    state = {"model": model, "optimizer": optimizer}
    model = parallel(model)
    for _, (x, y) in run.stage("warmup", iterations, state, source, batch_size=cfg.warmup_batch_size):
        with run.autocast():
            _, logits = model(x)                                                              # (N, C, h, w)
        loss = reweighted_cross_entropy(logits, y)                                            # Eq. (2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg=loss)


def self_train(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, target: SegmentationDataset,
               note: dict | None = None) -> None:
    """Eq. (13):  L = L_ce + L_sce + lambda L_consist."""
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = sgd(model, cfg, cfg.adapt_lr)
    state = {"model": model, "teacher": teacher, "optimizer": optimizer}
    model = parallel(model)
    for it, (x_s, y_s, *w), (x_t, *_, y_hat) in run.stage("selftrain", cfg.selftrain_iterations, state, source, target,
                                                          batch_size=cfg.batch_size, note=note):
        with run.autocast():
            _, logits_s = model(x_s)                                                          # (N, C, h, w)
            _, logits_t = model(x_t)
        ce = reweighted_cross_entropy(logits_s, y_s, w[0] / 255 if w else 1.0)                # Eq. (10)
        sce = symmetric_cross_entropy(logits_t, y_hat, cfg.alpha, cfg.beta)                   # Eq. (11)
        consist = torch.zeros_like(ce)
        if cfg.lambda_consist:
            seeds = run.item_seeds(len(x_t), "phi", it)
            x_phi, visible = phi(x_t, seeds, cfg.phi_operations, cfg.phi_strength, cfg.cutout)
            with run.autocast():
                if cfg.augment == "student":
                    _, logits_t = model(x_phi)
                with torch.no_grad():
                    _, logits_teacher = teacher(x_phi if cfg.augment == "teacher" else x_t)
            mask = resize_label(visible.long(), logits_t.shape[-2:]).bool()
            consist = consistency_loss(logits_t, logits_teacher, mask)                        # Eq. (12)
        lambda_it = cfg.lambda_consist * ramp(it, cfg.selftrain_iterations, cfg.ramp_iterations, cfg.ramp_share)
        loss = ce + sce + lambda_it * consist                                                 # Eq. (13)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, model, cfg.ema)
        broadcast_buffers(teacher)
        run.report(ce=ce, sce=sce, consist=consist)


@torch.no_grad()
def write_hard_labels(run: Run, cfg: Config, stage: str, model: nn.Module, target: SegmentationDataset, folder: Path) -> dict:
    """Labels for a round of distillation: each target pixel's argmax, multi-scale and flipped."""
    model.eval()
    for x, _, (name,) in run.sweep(f"labels of {stage}", target):
        with run.autocast():
            save_label(folder / f"{name}.png", predict(model, x, tuple(x.shape[-2:]), cfg.test_scales, flip=True)[0])
    return {}


def distill(run: Run, cfg: Config, stage: str, student: nn.Module, previous: nn.Module, source: SegmentationDataset,
            target: SegmentationDataset) -> None:
    """A round of distillation [40]: weighted source, hard labels of the previous model, and KL to it."""
    previous.requires_grad_(False).eval()
    optimizer = sgd(student, cfg, cfg.adapt_lr)
    state = {"model": student, "optimizer": optimizer}
    student = parallel(student)
    for _, (x_s, y_s, *w), (x_t, *_, y_hat) in run.stage(stage, cfg.distill_iterations, state, source, target,
                                                         batch_size=cfg.batch_size):
        with run.autocast():
            _, logits_s = student(x_s)                                                        # (N, C, h, w)
            _, logits_t = student(x_t)
            with torch.no_grad():
                _, logits_previous = previous(x_t)
        ce = reweighted_cross_entropy(logits_s, y_s, w[0] / 255 if w else 1.0)
        sce = symmetric_cross_entropy(logits_t, y_hat, cfg.alpha, cfg.beta)
        kl = consistency_loss(logits_t, logits_previous)
        loss = ce + sce + cfg.lambda_kl * kl

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(ce=ce, sce=sce, kl=kl)


def check(cfg: Config) -> None:
    """Refuse invalid settings before anything is loaded. Raises: UserError."""
    if cfg.delta is not None and cfg.assign != "maps":
        raise UserError(f"--delta is the threshold of --assign maps, not of --assign {cfg.assign}: omit --delta")
    if cfg.stm_weights and cfg.stm_backbone == "warmup":
        raise UserError("--stm-weights needs a torchvision network: name it by --stm-backbone and --stm-layer")
    if cfg.adapt_freeze_bn == "all" and not cfg.continue_warmup:
        raise UserError("--adapt-freeze-bn all freezes untrained batch norm, because self-training starts from the initial "
                        "weights: add --continue-warmup, or omit --adapt-freeze-bn")


@command
def main(argv: list[str] | None = None) -> None:
    """Warm-up, self-training, two rounds of distillation; each followed by its evaluation."""
    cfg, options = parse("bismap.py", __doc__, (Config, Options), argv, TOY)
    check(cfg)
    augment, distilled = Augment(scale=cfg.scale, crop=cfg.crop, jitter=cfg.jitter), cfg.distill * cfg.distill_iterations
    run = Run("bismap", cfg, options, {"warmup": cfg.warmup_iterations + options.target_labels * cfg.selftrain_iterations,
              "selftrain": cfg.selftrain_iterations, "distill1": distilled, "distill2": distilled}, SIZES, cfg.scale[1])
    test, tests = run.images("target", "val"), {"single-scale": {}}
    model = run.network("v3+")
    run.watch(model, test)
    if options.eval:
        return run.evaluate(run.latest, model, test, tests)
    target = run.images("target", "train", labels=False, augment=augment)
    maps, transform, encoder = run.folder / "transferability", None, None
    if options.from_ and "selftrain" not in run.selected and not maps.is_dir():
        maps = Path(options.from_).parent / "transferability"
    if cfg.alignment == "gpa" and not options.target_labels:
        transform = partial(align, [pair.image for pair in target.pairs], target.size, options.seed)
    domain = "target" if options.target_labels else "source"
    source = run.images(domain, "train", augment=augment, transform=transform)
    if cfg.stm and "selftrain" in run.selected and not (run.folder / "selftrain-transferability.pt").exists():
        encoder = independent_encoder(run, cfg, model)                                        # fails now, not after the warm-up
    if run.pending("warmup"):                              # the upper bound trains as long as the adapted model
        warm_up(run, cfg, model, source, run.lengths["warmup"])
        run.evaluate("warmup", model, test, tests)
    if run.pending("selftrain"):
        aligned = fixed_version(run.images(domain, "train", transform=transform), 0)
        labelled, note = prepare_selftraining(run, cfg, model, encoder, aligned, target)
        model = model if cfg.continue_warmup else run.network("v3+", fresh=True)
        if cfg.continue_warmup or cfg.adapt_freeze_bn != "auto":
            model.freeze_bn("all" if cfg.adapt_freeze_bn == "auto" else cfg.adapt_freeze_bn)
        run.watch(model, test)
        self_train(run, cfg, model, source.with_maps(maps) if cfg.stm else source, labelled, note)
        run.evaluate("selftrain", model, test, tests)
    for stage in filter(run.pending, run.stages[2:]):
        if cfg.stm and not maps.is_dir():
            raise UserError(f"{maps} is missing: --from has no transferability maps beside it; add --no-stm")
        weighted, folder, previous = source.with_maps(maps) if cfg.stm else source, run.folder / stage, model
        run.once(stage, "labels", partial(write_hard_labels, run, cfg, stage, previous, target, folder))
        model = run.network("v3+", fresh=True)
        run.watch(model, test)
        distill(run, cfg, stage, model, previous, weighted, target.with_maps(folder))
        run.evaluate(stage, model, test, tests)


def draw_maps(run: Run, file: str, images: Dataset, titles: list[str], paint: Callable) -> None:
    """Draw four images, each beside `paint(photo, map)`, the pictures of its map."""
    items = (images[k] for k in range(0, len(images), max(1, len(images) // 4))[:4])
    run.draw(file, [[photo := denormalise(image), *paint(photo, values)] for image, _, _, values in items], titles)


if __name__ == "__main__":
    main()
