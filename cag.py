"""Category Anchor-Guided Unsupervised Domain Adaptation for Semantic Segmentation (CAG-UDA).

Zhang, Zhang, Liu, Tao. NeurIPS 2019. arXiv:1910.13049

The mean source feature of each category is its anchor. A target pixel is active if it is clearly nearest to one anchor: it gets
that anchor's category as pseudo label and is pulled towards the anchor. Each of K stages computes anchors and labels once, from
the model of the stage before, and keeps them fixed. Stages: source -> warmup -> stage1 .. stageK.

    Eqs. (2), (9), (11)  cross_entropy_loss             L_CE^s at image size, L_CE^t and L_CE^tP on the feature grid
    Eq. (4)              class_sums                     numerator and |Lambda_c| of a batch; source_anchors adds them up
    Eq. (5)              anchor_distances
    Eqs. (6), (7)        anchor_pseudo_labels           d' - d* of Eq. (6) is nearest_anchor's
    Eqs. (8), (10)       distance_loss
    Eq. (11), labels     probability_pseudo_labels
    Eq. (12)             train_stage                    the training stage itself; Algorithm 1 is main
    Secs. 3.4, 4.1       adversarial_loss, discriminator_loss, Discriminator: the warm-up's global feature alignment

    f_D, feat   the feature that enters the classifier       C, c      categories              K, k   stages;  M_k  their models
    f_c^s       anchors, (C, D)                              d         Euclidean distance      superscript P   by probability
    a           active states; here: label is not 255        Delta_d   `--margin`              P_0   `--threshold` of Eq. (11)

    python cag.py --toy                                      the toy city, a few minutes on two cores
    python cag.py --source gta5                              the paper's GTA5 -> Cityscapes; the same line resumes
    torchrun --nproc_per_node=4 cag.py --source gta5         on four GPUs, four times the batch
    python cag.py --source gta5 --from runs/cag-gta5/warmup.pt --K 1 --terms ce_tP --tag ce-tP          a row of Table 4
    python cag.py --source gta5 --from runs/cag-gta5/source.pt --no-warmup --K 1 --tag cold             Sec. 4.3
    python cag.py --source gta5 --eval                       only evaluate the latest stage of the run

Departures:
 1. Sec. 3.2 says DeepLab v2; the authors confirm v3+ with ResNet-101, as in their code. f_D is the decoder's feature before the
    last 1x1 convolution, with 256 channels at stride 4.
 2. Eqs. (2), (8)-(11): sums over pixels are means over the labelled pixels, in Eq. (2) of the image, else of the feature grid.
 3. Eqs. (8), (10): the square is averaged over f_D's channels too, so that lambda1 = 0.3 trains at the paper's rate.
    `--lambda1 76.8` (0.3 x 256) gives the printed sum over channels.
 4. Sec. 3.2: anchors, active states and labels come from whole images at `source_size` and `target_size`, on the feature
    grid. Ground truth moves to the grid, and pseudo labels move to the image, by the nearest pixel.
 5. Sec. 3.4: [14]'s adversarial loss, towards the source only, is binary cross entropy on D(f_D); each domain's half of D's
    loss weighs 0.5. [14]'s category-specific part is not used: the paper says "global feature alignment".
 6. Sec. 4.1 gives only D's layers and the weight 0.01. Adam trains D (`lr_discriminator`, `beta1`, `beta2`).
 7. Sec. 4.1: an epoch is one pass over the target's training images, as the paper names no set. It gives no length of the
    source stage; here that is 59,500 iterations, 20 x 2,975.
 8. Sec. 4.1 gives SGD for the stages only; source stage and warm-up use it too. Each stage has its own optimizer, and its
    iterations are the horizon of the rate. `encoder_rate` is an addition, 1 by default.
 9. Sec. 4.1 freezes all batch norms. The source stage freezes only those of a pretrained encoder, because the others start
    at random. Batch 1 is one image per domain. There is no dropout.
10. Eq. (11) does not define its active states. Here a pixel is active if its highest probability is greater than P_0.
11. Eq. (4): a class without source pixels has no anchor (NaN, 0/0). It is never nearest, and Eqs. (8), (10) skip its pixels.
12. Table 4 prints the superscript P as LP, and not in all rows; docs/agreement.md says how its rows are read.
The authors' code differs from their paper as follows, and this is not followed:
13. Eq. (4): anchors use correctly predicted pixels only, as a running mean of per-image means whose count stops at 3,000.
14. Eqs. (8), (10): smooth L1 between anchors and class means per image, with scales and limits (docs/agreement.md).
15. Eq. (12): weights are 0.7 for the distances and 0.5 for each cross entropy of the target.
16. Sec. 3.4: a fixed copy of the warmed-up model makes the pseudo labels of each crop during training.
17. Sec. 4.1: rate 1e-4, weight decay 2e-4, batch 4, crop 896x512, flips, trained batch norm, dropout before f_D, input RGB/255
    without normalisation; the checkpoint that is best on the validation set is used.
Misprints without effect: SYNTHIA's images are 1280x760, Cityscapes has 2,975 training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import Size, command, option, parse
from common.data import IGNORE, Augment, SegmentationDataset, save_label
from common.deeplab import at_least_float32, resize_label, upsample
from common.distributed import labelled_mean, parallel, sum_over_processes
from common.files import UserError
from common.run import Options, Run
from common.viz import colorize, denormalise

TERMS = ("ce_t", "ce_tP", "dis_s", "dis_t", "dis_tP")
KINDS = ("anchor_labels", "probability_labels")        # of pseudo labels, and the names of their folders
LOG_BINS = 1280                                        # of the histogram of d' - d*: 32 per octave, 2^-20 to 2^20


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    backbone: str = option("resnet101", "encoder of DeepLab v3+", paper="resnet101", section="Sec. 3.2",
                           choices=("resnet101", "resnet50", "resnet18"))
    adapt_freeze_bn: str = option("all", "batch norm frozen in warm-up and stages", paper="all", section="Sec. 4.1",
                                  choices=("all", "encoder", "none"))
    warmup: bool = option(True, "warm up before stage 1", paper=True, section="Sec. 3.4")
    K: int = option(3, "stages after the warm-up", paper=3, section="Table 4", low=1)
    margin: float = option(2.5, "Delta_d: about half the gap of nearest anchors", paper=2.5, section="Sec. 4.1", low=0.0)
    threshold: float = option(0.95, "P_0, a probability, of Eq. (11)", paper=0.95, section="Sec. 4.1", low=0.0, high=1.0)
    lambda1: float = option(0.3, "weight of distances, Eq. (12); 76.8: the printed sum", paper=0.3, section="Sec. 4.1", low=0.0)
    lambda2: float = option(0.7, "weight of the target's cross entropies, Eq. (12)", paper=0.7, section="Sec. 4.1", low=0.0)
    lambda_adv: float = option(0.01, "weight of the warm-up's adversarial loss", paper=0.01, section="Sec. 4.1", low=0.0)
    terms: tuple[str, ...] = option(("ce_t", "ce_tP", "dis_s", "dis_t"), "terms of Eq. (12) besides L_CE^s; dis_tP: Table 4",
                                    paper=("ce_t", "ce_tP", "dis_s", "dis_t"), section="Eq. (12)", choices=TERMS)
    offline_anchors: str | None = option(None, "anchors of stage 1: file with a (C, 256) tensor, or the authors'")
    lr: float = option(2.5e-4, "SGD's initial rate", paper=2.5e-4, section="Sec. 4.1", low=0.0)
    encoder_rate: float = option(1.0, "the encoder's rate as a multiple of --lr", low=0.0)
    momentum: float = option(0.9, "SGD's momentum", paper=0.9, section="Sec. 4.1", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "SGD's weight decay", paper=1e-4, section="Sec. 4.1", low=0.0)
    lr_discriminator: float = option(1e-4, "Adam's initial rate for D", low=0.0)
    beta1: float = option(0.9, "Adam's beta_1 for D", low=0.0, high=0.99999)
    beta2: float = option(0.99, "Adam's beta_2 for D", low=0.0, high=0.99999)
    source_iterations: int = option(59_500, "iterations of the source stage; 20 x 2,975", low=1)
    warmup_epochs: float = option(20.0, "warm-up's length, in passes over the target", paper=20.0, section="Sec. 4.1", low=1e-3)
    stage_epochs: float = option(20.0, "length of a stage, in passes over the target", paper=20.0, section="Sec. 4.1", low=1e-3)
    batch_size: int = option(1, "images per batch and domain", paper=1, section="Sec. 4.1", low=1)
    scale: tuple[float, ...] = option((1.0, 1.5), "range of the random resize", paper=(1.0, 1.5), section="Sec. 4.1", low=0.1)
    crop: Size = option(Size(1280, 640), "random crop in training", paper=Size(1280, 640), section="Sec. 4.1")


def stage_names(cfg: Config) -> tuple[str, ...]:
    """Algorithm 1: pretraining, warm-up, stages 1 to K."""
    return ("source", *("warmup",) * cfg.warmup, *(f"stage{k}" for k in range(1, cfg.K + 1)))


TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           crop=Size(128, 64), batch_size=2, lr=5e-3, source_iterations=720, warmup_epochs=2.5, stage_epochs=2.5, margin=0.5,
           lr_discriminator=3e-4, workers=0, amp="auto", channels_last=True)


# ------------------------------------------------------------------------------------------- the equations


def cross_entropy_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Eq. (2):  L_CE = - sum_i sum_j sum_c y_ijc log p_ijc;  Eqs. (9), (11): the same on active pixels, with pseudo labels.

    Args: logits (N, C, h, w); label (N, h, w) int64 in 0..C-1, 255 ignored (not labelled, not active).
    Returns: 0-d, mean over the labelled pixels (the paper sums); exactly 0 if there are none."""
    return labelled_mean(F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none"), label != IGNORE)


def class_sums(feat: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Eq. (4):  f_c^s = 1 / |Lambda_c^s| sum_i sum_j y_ijc f_D(Enc(x_i))|_j;  here the double sum and |Lambda_c^s|.

    Args: feat (N, D, h, w); label (N, h, w) int64 on the feature's grid, 0..C-1, 255 ignored; num_classes C.
    Returns: sum (C, D) float64, count (C,) int64; batches add up. Anchors are sum / count[:, None], NaN where count is 0."""
    feat, label = feat.movedim(1, -1)[label != IGNORE], label[label != IGNORE]               # (M, D), (M,)
    one_hot = label == torch.arange(num_classes, device=label.device)[:, None]               # (C, M)
    return one_hot.double() @ feat.double(), one_hot.sum(dim=1)


def anchor_distances(feat: Tensor, anchors: Tensor) -> Tensor:
    """Eq. (5):  d_ijc = || f_c^s - f_D(Enc(x_i))|_j ||_2,  here the root of |f|^2 - 2 f . f_c + |f_c|^2; not under autocast.

    Args: feat (N, D, h, w); anchors (C, D), a row of NaN is a class without anchor.
    Returns: (N, C, h, w) >= 0, at least float32, d^2 exact to a few 1e-7 of |f|^2 + |f_c|^2; inf for a class without anchor."""
    feat, anchors = at_least_float32(feat), at_least_float32(anchors)
    dot = (anchors @ feat.flatten(2)).unflatten(2, feat.shape[2:])                           # (N, C, h, w), f . f_c
    square = torch.linalg.vector_norm(feat, dim=1, keepdim=True).square()                    # (N, 1, h, w)
    distance = dot.mul_(-2).add_(square).add_(anchors.square().sum(dim=1)[:, None, None]).clamp_(min=0).sqrt_()
    return distance.masked_fill_(anchors.isnan().any(dim=1)[:, None, None], torch.inf)


def nearest_anchor(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Sec. 3.2:  d_c sorted in ascending order; the shortest, d_c*, is compared with the second shortest, d_c'.

    Args: distances (N, C, h, w), >= 0 or inf.
    Returns: c* (N, h, w) int64, any on ties; and d' - d* (N, h, w): inf if only one class has an anchor, NaN if none."""
    shortest, nearest = distances.min(dim=1, keepdim=True)                                   # (N, 1, h, w) each
    second = distances.scatter(1, nearest, torch.inf).amin(dim=1)                            # (N, h, w), among the others
    return nearest[:, 0], second - shortest[:, 0]


def anchor_pseudo_labels(distances: Tensor, margin: float = 2.5) -> Tensor:
    """Eq. (6):  a = 1 if d_c' - d_c* > Delta_d, else 0;  Eq. (7):  y^_c* = 1 if d_c* < d_c - Delta_d for all c != c*.

    Args: distances (N, C, h, w); margin Delta_d: half the distance between nearest anchors (the authors': 5 to 8).
    Returns: (N, h, w) int64, the category of the nearest anchor, 255 where the pixel is not active."""
    nearest, gap = nearest_anchor(distances)
    return nearest.masked_fill(~(gap > margin), IGNORE)


def distance_loss(feat: Tensor, label: Tensor, anchors: Tensor) -> Tensor:
    """Eq. (8):  L_dis^s = sum_i sum_j sum_c y_ijc || f_c^s - f_D(Enc(x_i^s))|_j ||^2;  Eq. (10): the same on active pixels.

    Args: feat (N, D, h, w); label (N, h, w) int64 on its grid, 0..C-1, 255 ignored; anchors (C, D), NaN: pixels are skipped.
    Returns: 0-d, mean over the other pixels and the D channels (the paper sums); exactly 0, with gradient 0, without pixels."""
    row = label.clamp(max=len(anchors))                                                      # (N, h, w), C without label
    anchored = F.pad(~anchors.isnan().any(dim=1), (0, 1))[row]                               # (N, h, w)
    anchor = F.pad(anchors.nan_to_num(), (0, 0, 0, 1))[row].movedim(-1, 1)                   # (N, D, h, w)
    return labelled_mean((anchor - at_least_float32(feat)).square().mean(dim=1), anchored)


def probability_pseudo_labels(logits: Tensor, threshold: float = 0.95) -> Tensor:
    """Sec. 3.3, read as:  y^P_c = 1 if c = argmax_c p_c,  a^P = 1 if max_c p_c > P_0: labels and active states of Eq. (11).

    Args: logits (N, C, h, w); threshold P_0.  Returns: (N, h, w) int64, 255 where the pixel is not active."""
    confidence, label = logits.softmax(dim=1).max(dim=1)                                     # (N, h, w) each
    return label.masked_fill(~(confidence > threshold), IGNORE)


def adversarial_loss(d_target: Tensor) -> Tensor:
    """Sec. 3.4, after [14]:  L_adv = - mean_j log P(source | f_j^t),  P(source | f) = sigmoid(D(f));  d_target (N, 1, h, w)."""
    return F.softplus(-d_target).mean()


def discriminator_loss(d_source: Tensor, d_target: Tensor) -> Tensor:
    """Sec. 3.4, after [14]:  L_D = - 0.5 mean_i log P(source | f_i^s) - 0.5 mean_j log (1 - P(source | f_j^t))."""
    return 0.5 * F.softplus(-d_source).mean() + 0.5 * F.softplus(d_target).mean()


class Discriminator(nn.Module):
    """Sec. 4.1: five 3x3 convolutions of stride 2 with {64, 128, 256, 512, 1} channels; ReLU after three, Leaky-ReLU 0.2.

    forward: feat (N, D, h, w) -> raw outputs (N, 1, about h/32, about w/32); their sigmoid is the probability of "source"."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(256, 512, 3, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(512, 1, 3, stride=2, padding=1))

    def forward(self, feat: Tensor) -> Tensor:
        return at_least_float32(self.layers(feat))


@torch.no_grad()
def source_anchors(run: Run, model: nn.Module, source: SegmentationDataset) -> Tensor:
    """Algorithm 1, line 4 (CAC): the anchors (C, D) float32 of the whole source set, Eq. (4), in one pass over its images."""
    C, device = len(run.classes), run.float64_device
    total = torch.zeros(C, model.feat_channels, dtype=torch.float64, device=device)
    count = torch.zeros(C, dtype=torch.int64, device=device)
    model.eval()
    for x, y, _ in run.sweep("anchors", source):
        with run.autocast():
            feat, _ = model(x)                                                               # (1, D, h, w)
        part, pixels = class_sums(feat.to(device), resize_label(y, feat.shape[-2:]).to(device), C)
        total, count = total + part, count + pixels
    model.train()
    sum_over_processes(total, count)
    if not count.any():
        raise UserError("no pixel of the source has a label, so there are no anchors: check the labels of --source")
    return (total / count[:, None]).float()                                                  # Eq. (4)


@torch.no_grad()
def label_target(run: Run, cfg: Config, model: nn.Module, anchors: Tensor, target: SegmentationDataset, folder: Path) -> dict:
    """Algorithm 1, lines 5 and 6 (ATI, PLA): write both kinds of pseudo labels of every target image as PNGs of class indices.

    Returns: pixels, active pixels per class; images without active ones (row 0 by anchor, 1 by probability); d' - d* counts."""
    C, zeros = len(anchors), lambda *shape: torch.zeros(*shape, dtype=torch.int64, device=run.device)
    counts = {"pixels": zeros(2, C), "active": zeros(2, C), "inactive": zeros(2), "gaps": zeros(LOG_BINS)}
    model.eval()
    for x, _, (name,) in run.sweep("pseudo labels", target):
        with run.autocast():
            feat, logits = model(x)                                                          # (1, D, h, w), (1, C, h, w)
        distances = anchor_distances(feat, anchors)                                          # (1, C, h, w)
        nearest, gap = nearest_anchor(distances)                                             # (1, h, w) each
        counts["gaps"] += log_histogram(gap)
        labels = anchor_pseudo_labels(distances, cfg.margin), probability_pseudo_labels(logits, cfg.threshold)
        for k, (label, winner) in enumerate(zip(labels, (nearest, logits.argmax(dim=1)))):
            save_label(folder / KINDS[k] / f"{name}.png", resize_label(label, x.shape[-2:])[0])
            counts["pixels"][k] += winner.flatten().bincount(minlength=C)
            counts["active"][k] += label[label != IGNORE].bincount(minlength=C)
            counts["inactive"][k] += (label == IGNORE).all()
    model.train()
    sum_over_processes(*counts.values())
    return counts


def prepare_stage(run: Run, cfg: Config, k: int, model: nn.Module, source: SegmentationDataset,
                  target: SegmentationDataset) -> tuple[Tensor, SegmentationDataset, dict]:
    """Algorithm 1, lines 4 to 6, computed once from M_{k-1}. Returns: anchors (C, D), labelled target, what to log."""
    stage, file, shape = f"stage{k}", cfg.offline_anchors if k == 1 else None, (len(run.classes), model.feat_channels)
    anchors = run.once(stage, "anchors", lambda: {
        "anchors": read_anchors(file, *shape) if file else source_anchors(run, model, source)})["anchors"].to(run.device)
    counts = run.once(stage, "labels", lambda: label_target(run, cfg, model, anchors, target, run.folder / stage))
    labelled = target.with_maps(*(run.folder / stage / kind for kind in KINDS))
    return anchors, labelled, report_labels(run, cfg, stage, anchors, counts, labelled)


def read_anchors(path: str | Path, num_classes: int, channels: int) -> Tensor:
    """Read a (C, D) tensor, a run's `stageK-anchors.pt`, or the authors' array (may be `objective_vectors` of a dict), where a
    row of zeros is a class without anchor. Raises: UserError with the file's name if it is missing or holds something else."""
    from common import published  # only a file of anchors needs it
    anchors = published.load_foreign(path, "--offline-anchors")
    if isinstance(anchors, dict):
        anchors = anchors.get("anchors", anchors.get("objective_vectors", anchors))
    if isinstance(anchors, np.ndarray) and anchors.dtype.kind == "f":
        anchors = torch.from_numpy(anchors)
        anchors[(anchors == 0).all(dim=-1)] = torch.nan
    if not isinstance(anchors, Tensor) or anchors.shape != (num_classes, channels) or not anchors.is_floating_point():
        shape = f"a tensor of shape {tuple(anchors.shape)}, {anchors.dtype}" if isinstance(anchors, Tensor) else type(anchors)
        raise UserError(f"{path} holds {shape} where anchors are a float tensor of shape {(num_classes, channels)}")
    if anchors.isinf().any() or anchors.isnan().all():
        raise UserError(f"{path} holds anchors that are not finite: give anchors without inf, not all NaN")
    return anchors.float()


# ---------------------------------------------------------------------------------------------- the stages


def sgd(model: nn.Module, cfg: Config) -> torch.optim.SGD:
    """Sec. 4.1's optimizer."""
    groups = model.parameter_groups(cfg.lr, cfg.encoder_rate)
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def train_source(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, iterations: int) -> None:
    """Algorithm 1, line 1: pretraining M_0^p on the source, Eq. (2)."""
    optimizer = sgd(model, cfg)
    state = {"model": model, "optimizer": optimizer}
    model = parallel(model)
    for _, (x, y) in run.stage("source", iterations, state, source, batch_size=cfg.batch_size):
        with run.autocast():
            _, logits = model(x)                                                             # (N, C, h, w)
        loss = cross_entropy_loss(upsample(logits, y.shape[-2:]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(ce_s=loss)


def warm_up(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, target: SegmentationDataset,
            iterations: int) -> None:
    """Algorithm 1, line 2: M_0 by aligning the features f_D of both domains as a whole (Sec. 3.4)."""
    run.seed("discriminator")
    D = run.place(Discriminator(model.feat_channels))
    optimizer = sgd(model, cfg)
    optimizer_D = torch.optim.Adam(D.parameters(), lr=cfg.lr_discriminator, betas=(cfg.beta1, cfg.beta2))
    weights_M, weights_D = [p for p in model.parameters() if p.requires_grad], list(D.parameters())
    state = {"model": model, "D": D, "optimizer": optimizer, "optimizer_D": optimizer_D}
    model, D = parallel(model), parallel(D)
    for _, (x_s, y_s), (x_t, _) in run.stage("warmup", iterations, state, source, target, batch_size=cfg.batch_size):
        with run.autocast():
            feat_s, logits_s = model(x_s)                                                    # (N, D, h, w), (N, C, h, w)
            feat_t, _ = model(x_t)
            d_s, d_t = D(feat_s.detach()), D(feat_t)                                         # (N, 1, h', w')
        loss_ce = cross_entropy_loss(upsample(logits_s, y_s.shape[-2:]), y_s)
        loss_adv, loss_D = adversarial_loss(d_t), discriminator_loss(d_s, d_t)

        optimizer.zero_grad()
        optimizer_D.zero_grad()
        loss_D.backward(inputs=weights_D, retain_graph=True)                                 # the model stays fixed
        (loss_ce + cfg.lambda_adv * loss_adv).backward(inputs=weights_M)                     # D stays fixed
        optimizer.step()
        optimizer_D.step()
        run.report(ce_s=loss_ce, adv=loss_adv, D=loss_D)


def train_stage(run: Run, cfg: Config, k: int, model: nn.Module, anchors: Tensor, source: SegmentationDataset,
                target: SegmentationDataset, iterations: int, note: dict | None = None) -> None:
    """Algorithm 1, lines 7 to 10: from M_{k-1} to M_k by Eq. (12), with fixed anchors and fixed labels."""
    weights = {"ce_s": 1.0} | {term: cfg.lambda1 if term.startswith("dis") else cfg.lambda2 for term in cfg.terms}
    optimizer = sgd(model, cfg)
    state = {"model": model, "optimizer": optimizer}
    model = parallel(model)
    for _, (x_s, y_s), (x_t, _, y_t, y_tP) in run.stage(f"stage{k}", iterations, state, source, target,
                                                        batch_size=cfg.batch_size, note=note):
        with run.autocast():
            feat_s, logits_s = model(x_s)                                                    # (N, D, h, w), (N, C, h, w)
            feat_t, logits_t = model(x_t)
        y_grid = resize_label(y_s, feat_s.shape[-2:])                                        # (N, h, w)
        y_t, y_tP = resize_label(y_t, feat_t.shape[-2:]), resize_label(y_tP, feat_t.shape[-2:])
        terms = {
            "ce_s": (cross_entropy_loss, upsample(logits_s, y_s.shape[-2:]), y_s),           # Eq. (2)
            "dis_s": (distance_loss, feat_s, y_grid, anchors),                               # Eq. (8)
            "dis_t": (distance_loss, feat_t, y_t, anchors),                                  # Eq. (10)
            "dis_tP": (distance_loss, feat_t, y_tP, anchors),                                # Table 4
            "ce_t": (cross_entropy_loss, logits_t, y_t),                                     # Eq. (9)
            "ce_tP": (cross_entropy_loss, logits_t, y_tP),                                   # Eq. (11)
        }
        losses = {term: term_loss(*inputs) for term, (term_loss, *inputs) in terms.items() if term in weights}
        loss = sum(weights[term] * losses[term] for term in losses)                          # Eq. (12)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        unlabelled = (y_t == IGNORE).flatten(1).all(dim=1).float().mean()                    # crops that add nothing
        run.report(**losses, unlabelled_crops=unlabelled)


@command
def main(argv: list[str] | None = None) -> None:
    """Algorithm 1. An evaluation follows each stage."""
    cfg, options = parse("cag.py", __doc__, (Config, Options), argv, TOY)
    if len(cfg.scale) != 2 or cfg.scale[0] > cfg.scale[1]:
        raise UserError(f"--scale {' '.join(map(str, cfg.scale))} is not a range: give the smallest factor, then the largest")
    run = Run("cag", cfg, options, dict.fromkeys(stage_names(cfg)), largest_scale=cfg.scale[1])
    test, tests = run.images("target", "val"), {"single-scale": {}}
    model = run.network("v3+")
    run.watch(model, test)
    if options.eval:
        return run.evaluate(run.latest, model, test, tests)
    augment = Augment(scale=(cfg.scale[0], cfg.scale[1]), crop=options.crop)
    source = run.images("target" if options.target_labels else "source", "train", augment=augment)
    target = run.images("target", "train", labels=False, augment=augment)
    warmup, adapt = (max(1, round(epochs * len(target) / (cfg.batch_size * run.world)))      # iterations
                     for epochs in (cfg.warmup_epochs, cfg.stage_epochs))
    run.lengths = {**dict.fromkeys(run.stages, adapt), "warmup": warmup,
                   "source": cfg.source_iterations + options.target_labels * (warmup * cfg.warmup + adapt * cfg.K)}
    if cfg.offline_anchors and not (run.folder / "stage1-anchors.pt").exists():              # check it now, not at stage 1
        if "stage1" not in run.selected:
            raise UserError("--offline-anchors is for stage 1, and this start does not reach stage 1: leave the flag out")
        read_anchors(cfg.offline_anchors, len(run.classes), model.feat_channels)
    if run.pending("source"):                              # train the upper bound for as many iterations as the adapted model
        train_source(run, cfg, model, source, run.lengths["source"])
        run.evaluate("source", model, test, tests)
    model.freeze_bn(cfg.adapt_freeze_bn)
    if run.pending("warmup"):
        warm_up(run, cfg, model, source, target, warmup)
        run.evaluate("warmup", model, test, tests)
    for k in range(1, cfg.K + 1):
        if run.pending(f"stage{k}"):
            anchors, labelled, note = prepare_stage(run, cfg, k, model, source, target)
            train_stage(run, cfg, k, model, anchors, source, labelled, adapt, note)
            run.evaluate(f"stage{k}", model, test, tests)


def log_histogram(values: Tensor) -> Tensor:
    """(LOG_BINS,) int64 counts of values >= 0 in bins of equal ratio: the outermost take what is beyond; inf, NaN: no bin."""
    return torch.histc(values[values.isfinite()].log2().clamp(-20, 20), LOG_BINS, -20, 20).long()


def log_quantiles(histogram: Tensor, shares: tuple[float, ...]) -> list[float]:
    """Quantiles, for shares in [0, 1], from a sum of `log_histogram`s, within 1.1 percent; [] if nothing was counted."""
    below = histogram.cumsum(0) / histogram.sum()
    return [2 ** ((int((below < share).sum()) + 0.5) / 32 - 20) for share in shares if histogram.any()]


def report_labels(run: Run, cfg: Config, stage: str, anchors: Tensor, counts: dict, target: SegmentationDataset) -> dict:
    """Print and draw the labels that a stage starts with. Warn where the paper's assumptions fail. Returns: what to log."""
    names, missing = (*run.classes.names, "all"), anchors.isnan().any(dim=1).tolist()
    active, pixels = (torch.cat([x, x.sum(1, keepdim=True)], dim=1) for x in (counts["active"], counts["pixels"]))
    percent = (100 * active / pixels).tolist()                                               # 2 rows of C + 1
    print(f"\n{stage}: active pixels of the target, in percent of the pixels nearest to, or predicted as, the class")
    print(f"{'class':<16}" + "".join(f"{kind:>20}" for kind in KINDS))
    for c, by_anchor, by_probability in zip(names, *percent, strict=True):
        print(f"{c:<16}{by_anchor:>20.1f}{by_probability:>20.1f}".replace("nan", "  -"))
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = dict(zip(shares, log_quantiles(counts["gaps"], shares)))
    gaps = ", ".join(f"{value:.3g} ({share:.0%})" for share, value in quantiles.items())
    print(f"quantiles of d' - d*: {gaps}; --margin is {cfg.margin:g}")
    absent = [c for c, is_missing in zip(names, missing) if is_missing]
    inactive = [c for c, is_missing, n in zip(names, missing, active[0].tolist()) if not is_missing and not n]
    notes = [f"no source pixel, so no anchor: {', '.join(absent)}"] * bool(absent)
    notes += [f"no active pixel by anchor in the whole target: {', '.join(inactive)}"] * bool(inactive)
    notes += [f"{n} of {len(target)} images have no active pixel in {kind}" for kind, n in zip(KINDS, counts["inactive"]) if n]
    print(*(f"{stage}: {note}\n" for note in notes), sep="", end="", flush=True)
    items = [target[k] for k in range(0, len(target), max(1, len(target) // 4))[:4]]
    run.draw(f"{stage}/labels.png",
             [[denormalise(image), *(colorize(label, run.classes) for label in maps)] for image, _, _, *maps in items],
             ["target image", f"by anchor, margin {cfg.margin:g}", f"by probability > {cfg.threshold:g}"])
    shown = {kind: {c: round(value, 2) for c, value in zip(names, values) if not isnan(value)}
             for kind, values in zip(KINDS, percent)}
    return {"margin": cfg.margin, "gap_quantiles": quantiles, "active_percent": shown, "notes": notes}


if __name__ == "__main__":
    main()
