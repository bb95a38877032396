"""Differential Treatment for Stuff and Things: A Simple Unsupervised Domain Adaptation Method for Semantic Segmentation (SIM).

Wang, Yu, Wei, Feris, Xiong, Hwu, Huang, Shi. CVPR 2020. arXiv:2003.08040

Banks store mean features of correctly predicted source regions: one per stuff class and image, one per connected region of a
thing class. In a target image, each predicted region's mean feature is pulled to the most similar stored feature of its class.
The output is adapted adversarially. Step 2 does the same, with pseudo labels. Stages: step1 -> step2.

    Eqs. (1), (10)   segmentation_loss                       L_seg^S, and L_seg^T on pseudo labels
    Eqs. (2), (3)    adversarial_loss, discriminator_loss
    Eq. (4)          correct_label_map                       L_C = L_G intersected with L_P
    Eq. (5)          masked_mean (A), store_stuff (S^b)      into a FeatureBank
    Eq. (7)          connected_regions (T), masked_mean (I)
    Algorithm 1      store_instances (S^k)                   into a second
    Eqs. (6), (8)    stuff_loss, instance_loss
    Eq. (9)          class_thresholds (y^k, Sec. 6.2), pseudo_labels (y^)
    Eq. (11)         augmented_label_map
    Eqs. (12), (13)  train_step                              stage step1; stage step2
    Sec. 5.1         Discriminator                           D = P(target)

    F, C, G = C o F   encoder, classifier, network            f, feat    features, F's output
    L_G, L_P, L_C     label maps on the feature's grid: ground truth, prediction, correct prediction
    S^b, S^k          stored source features                  b in B, k in K   stuff (background), things (foreground)
    w     `--w`, stored features per stuff class              z          `--z`, regions per thing class and image; z w stored

    python sim.py --toy                                      the toy city, a few minutes on two cores
    python sim.py --source gta5                              the paper's GTA5 -> Cityscapes; the same line resumes
    torchrun --nproc_per_node=4 sim.py --source gta5         on four GPUs, four times the batch
    python sim.py --source gta5 --no-ssl --lambda-ci 0 --tag aa                       Table 2, "+ AA"
    python sim.py --source gta5 --source-images PATH --no-ssl --w 200 --tag w200      translated ("IT"), Table 4; 3: --lambda-ci
    python sim.py --source gta5 --eval                       only evaluate the latest stage of the run

Departures:
 1. Eqs. (1)-(3), (6), (8), (10): sums are means, over labelled pixels, D's outputs or images: a sum's scale depends on them.
 2. Eqs. (6), (8): ||x||_1^2 is the mean of |x| over channels. The abstract says L1 loss; a squared sum has no usable scale.
 3. Eq. (5): j counts the writes of a class, as Algorithm 1's c_k does; i mod w leaves places of rare classes empty.
    A != 0 means that the class occurs.
 4. Sec. 4.1: label maps are on the feature grid: predictions before upsampling, labels by the nearest pixel centre.
 5. Sec. 4.1: regions are 8-connected; the paper does not say. Equally large ones come in reading order. At most z regions per
    class and target image are matched, as the text of Sec. 6.2 says.
 6. Sec. 4.1: empty places are not matched. Each iteration stores the source features before it matches the target's.
 7. Sec. 6.2: y^k is the lower edge of the lower median's bin, of 1,000 bins; 0.9 for a class never predicted. Eq. (9) follows
    the text of Sec. 6.2: the predicted class, where its own confidence is above y^k.
 8. Sec. 6.2 prints lambda_adv 0.01; the default is Sec. 5.1's 0.001.
 9. Sec. 5.2 gives no length (here 200,000 iterations per step), batch size (one image per domain), crop, augmentation (none).
10. Sec. 5 does not give: frozen batch norm of pretrained encoders, ten times the rate for the classifier, a horizon per step.
11. Table 2 uses translated images ("IT") in each row with SIM. Without `--source-images` the default is AA + SIM + SSL.
12. Published code: only the encoder has batch norm, with batch statistics at batch 1 and fixed affine parameters. This is
    `--freeze-bn affine`. AdaptSegNet does the same; without it, its users report 27-29 for "source only", not 36.6.
13. Published code, matching, not followed: no Eq. (11); only pooled features that are classified correctly are stored; a class
    is matched only after its ring is full; labels come to the grid by the nearest corner, 4 pixels off.
14. Published code, training, not followed: checkpoint, thresholds, rates, weights, no Nesterov (docs/agreement.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import Size, command, option, parse
from common.data import IGNORE, Augment, SegmentationDataset, Sizes, save_label
from common.deeplab import at_least_float32, resize_label, upsample
from common.distributed import gather, labelled_mean, parallel, sum_over_processes
from common.files import UserError
from common.metrics import print_table
from common.run import Options, Run
from common.viz import colorize, denormalise

BINS = 1000                                            # of confidences; 0.9 is an edge of a bin
STUFF = ("road", "sidewalk", "building", "wall", "fence", "vegetation", "terrain", "sky")    # Sec. 6.2; the rest are things
SIZES = Sizes(gta5=Size(1280, 720), synthia=Size(1280, 760), cityscapes=Size(1024, 512), crosscity=Size(1024, 512))


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    ssl: bool = option(True, "step 2, with pseudo labels", paper=True, section="Table 2")
    lambda_seg: float = option(1.0, "weight of L_seg", paper=1.0, section="Sec. 5.1", low=0.0)
    lambda_adv: float = option(0.001, "weight of L_adv, Eq. (2); 0: without AA", paper=0.001, section="Sec. 5.1", low=0.0)
    lambda_ci: float = option(0.01, "weight of L_stf + L_ins; 0: without SIM", paper=0.01, section="Table 3", low=0.0)
    lambda_D: float = option(1.0, "weight of L_D, Eq. (3)", paper=1.0, section="Sec. 5.1", low=0.0)
    w: int = option(50, "stored features per stuff class", paper=50, section="Table 4", low=1)
    z: int = option(10, "most regions per thing class and image; z w are stored", paper=10, section="Algorithm 1", low=1)
    cap: float = option(0.9, "highest confidence threshold of a pseudo label", paper=0.9, section="Sec. 6.2", low=0.0, high=1.0)
    lr: float = option(2.5e-4, "SGD's initial rate", paper=2.5e-4, section="Sec. 5.2", low=0.0)
    momentum: float = option(0.9, "SGD's momentum", paper=0.9, section="Sec. 5.2", low=0.0, high=1.0)
    nesterov: bool = option(True, "Nesterov momentum", paper=True, section="Sec. 5.2")
    weight_decay: float = option(5e-4, "SGD's weight decay", paper=5e-4, section="Sec. 5.2", low=0.0)
    lr_discriminator: float = option(1e-4, "Adam's initial rate for D", paper=1e-4, section="Sec. 5.2", low=0.0)
    beta1: float = option(0.9, "Adam's beta_1 for D", paper=0.9, section="Sec. 5.2", low=0.0, high=0.99999)
    beta2: float = option(0.99, "Adam's beta_2 for D", paper=0.99, section="Sec. 5.2", low=0.0, high=0.99999)
    iterations: int = option(200_000, "iterations per step", low=1)
    batch_size: int = option(1, "images per batch and domain", low=1)
    source_size: Size | None = option(None, "source images are resized to it; automatic: the paper's, 1024x512 for Cityscapes",
                                      paper="1280x720, SYNTHIA 1280x760", section="Sec. 6.1")
    target_size: Size | None = option(None, "target images are resized to it, also in the test; automatic: 1024x512",
                                      paper="1024x512", section="Sec. 6.1")


TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           iterations=400, batch_size=2, lr=2.5e-3, lambda_adv=0.01, lambda_ci=0.1, lr_discriminator=3e-4, workers=0,
           amp="auto", channels_last=True)


# ------------------------------------------------------------------------------------------ the equations


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy on labelled pixels.

    Eqs. (1), (10):  L_seg = - sum_i,h,w sum_k y_i^(h,w) log S(C(f_i)^(h,w))^(k),  S: softmax

    Args: logits (N, K, h, w) at feature resolution; label (N, H, W) int64, ground truth or pseudo labels, 255 ignored.
    Returns: 0-d, mean over the labelled pixels (the paper sums); exactly 0 if there are none.
    """
    logits = upsample(logits, label.shape[-2:])                                   # (N, K, H, W)
    return labelled_mean(F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none"), label != IGNORE)


def adversarial_loss(d_target: Tensor) -> Tensor:
    """Reward target outputs that D does not take for the target's.

    Eq. (2):  L_adv = - sum log(1 - D(S(G(x^t)))),  D = P(target) = sigmoid(d)

    Args: d_target (N, 1, h, w) raw outputs of D on target predictions.  Returns: 0-d, mean (the paper sums).
    """
    return F.softplus(d_target).mean()                                            # - log(1 - sigmoid(d))


def discriminator_loss(d_source: Tensor, d_target: Tensor) -> Tensor:
    """Teach D the domain of a prediction.

    Eq. (3):  L_D = - sum log D(S(G(x^t))) - sum log(1 - D(S(G(x^s))))

    Args: d_source, d_target (N, 1, h, w) raw outputs of D.  Returns: 0-d, the sum of two means (the paper sums).
    """
    return F.softplus(-d_target).mean() + F.softplus(d_source).mean()


class Discriminator(nn.Module):
    """Sec. 5.1: softmax outputs (N, K, H, W), H and W at least 32 -> raw outputs (N, 1, H/32, W/32)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(num_classes, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(128, 256, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(256, 512, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(512, 1, 4, stride=2, padding=1),
        )

    def forward(self, prob: Tensor) -> Tensor:
        return at_least_float32(self.layers(prob))


def correct_label_map(logits: Tensor, label: Tensor) -> Tensor:
    """The label where the prediction is correct.

    Eq. (4):  L_P = argmax_k C(f)^(k);  L_C = L_G intersected with L_P

    Args: logits (N, K, h, w); label (N, h, w) int64, 255 ignored.  Returns: (N, h, w) int64, 255 if wrong or ignored.
    """
    return torch.where(logits.argmax(dim=1) == label, label, IGNORE)


def masked_mean(feat: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean feature of a region, or of several.

    A in Eq. (5), I in Eq. (7):  sum_h,w r^(h,w) f^(h,w) / max(eps, sum_h,w r^(h,w))

    Args: feat (D, h, w) float; mask (h, w) or (M, h, w) of 0 and 1, or bool; eps > 0.
    Returns: (D,) or (M, D), at least float32; 0 for an empty region.
    """
    feat = at_least_float32(feat)
    mask = mask.to(feat.dtype)
    area = mask.sum(dim=(-2, -1)).clamp(min=eps)                                  # () or (M,)
    return mask.flatten(-2) @ feat.flatten(1).T / area[..., None]


def connected_regions(label_map: Tensor, k: int, limit: int = 10) -> Tensor:
    """The largest connected regions of a class.

    Eq. (7):  R_k = {r_k1, ..., r_km} = T(L, k);  Algorithm 1 sorts them by area and takes at most z

    Args: label_map (h, w) int64; k the class; limit, z.
    Returns: (m, h, w) bool, m <= limit, 8-connected, the largest first, equally large ones in reading order.
    """
    from scipy import ndimage  # only training needs it
    regions, _ = ndimage.label((label_map == k).cpu().numpy(), structure=np.ones((3, 3)))       # 0: other classes; 1, 2, ...
    largest = 1 + np.argsort(-np.bincount(regions.ravel())[1:], kind="stable")[:limit]          # by area
    return torch.from_numpy(regions == largest[:, None, None]).to(label_map.device)


def regions(feat: Tensor, label_map: Tensor, classes: list[int], limit: int | None):
    """Yield per image and class that occurs: the class, its regions (m, h, w) bool on the CPU, their mean features (m, D).

    Args: feat (N, D, h, w); label_map (N, h, w) int64; limit: most per class, Eq. (7); None: one per class, Eq. (5).
    """
    for f, labels in zip(feat, label_map.cpu()):                                  # for scipy
        masks = {k: (labels == k)[None] if limit is None else connected_regions(labels, k, limit)
                 for k in classes if (labels == k).any()}
        if masks:
            means = masked_mean(f, torch.cat(list(masks.values())).to(f.device, non_blocking=True))      # all in one pass
            yield from zip(masks, masks.values(), means.split([len(m) for m in masks.values()]))


class FeatureBank(nn.Module):
    """S in Eqs. (5), (6), (8) and Algorithm 1: the last `slots` source features of each class, in a ring.

    Args: classes: class indices; slots: places per class, w for stuff and z w for things; dim: D; device: of the features.
    Its state_dict holds `features` (classes, slots, D) and `written` (classes,), on the CPU: the number of writes.
    """

    def __init__(self, classes: list[int], slots: int, dim: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.classes, self.slots = list(classes), slots
        self.register_buffer("features", torch.zeros(len(self.classes), slots, dim, device=device))
        self.register_buffer("written", torch.zeros(len(self.classes), dtype=torch.int64))

    @torch.no_grad()
    def write(self, k: int, feat: Tensor) -> None:
        """Write feat, (D,) or (m, D), to the next places of class k; in a full ring, to the oldest ones."""
        row, feat = self.classes.index(k), feat.view(-1, self.features.shape[2]).to(self.features)
        places = (int(self.written[row]) + torch.arange(len(feat))) % self.slots
        self.features[row, places[-self.slots:].to(feat.device, non_blocking=True)] = feat[-self.slots:]
        self.written[row] += len(feat)

    def samples(self, k: int) -> Tensor:
        """The stored features of class k, (n, D), n <= slots, without empty places."""
        row = self.classes.index(k)
        return self.features[row, :int(self.written[row])]


def store_stuff(feat: Tensor, label_map: Tensor, bank: FeatureBank) -> None:
    """Store the stuff features of source images.

    Eq. (5):  S_j^b = A^b(L_C, f) if A^b(L_C, f) != 0;  j counts the writes

    Args: feat (N, D, h, w); label_map (N, h, w) int64 of Eq. (4); bank of the stuff classes.
    """
    for b, _, mean in regions(feat.detach(), label_map, bank.classes, limit=None):
        bank.write(b, mean)                                                       # (1, D)


def store_instances(feat: Tensor, label_map: Tensor, bank: FeatureBank, limit: int = 10) -> None:
    """Store the instance features of source images.

    Algorithm 1:  S_j^k = I(R_sort[l], f) for l in 1..min(z, |R_sort|);  j = c_k mod z w,  c_k = c_k + 1

    Args: feat (N, D, h, w); label_map (N, h, w) int64 of Eq. (4); bank of the thing classes; limit, z.
    """
    for k, _, means in regions(feat.detach(), label_map, bank.classes, limit):
        bank.write(k, means)                                                      # (m, D)


def nearest_sample(query: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the most similar stored feature, and its index.

    Eqs. (6), (8):  min_j || q - S_j ||_1^2,  read as the mean of |q - S_j| over the channels

    Args: query (M, D); samples (n, D), n >= 1.
    Returns: (M,) distances, with a gradient to query; (M,) int64 indices, the first on ties.
    """
    with torch.no_grad():
        nearest = torch.cdist(query, samples, p=1.0).argmin(dim=1)
    return (query - samples[nearest]).abs().mean(dim=1), nearest


def matching_loss(feat: Tensor, label_map: Tensor, bank: FeatureBank, limit: int | None) -> Tensor:
    """Eqs. (6) and (8) for the `regions` of a limit: mean over a class's regions, sum over classes, mean over images."""
    loss = at_least_float32(feat[..., :0]).sum()                                  # 0, with a gradient of 0
    for k, _, means in regions(feat, label_map, bank.classes, limit):
        if len(bank.samples(k)):
            loss = loss + nearest_sample(means, bank.samples(k))[0].mean()
    return loss / len(feat)


def stuff_loss(feat: Tensor, label_map: Tensor, bank: FeatureBank) -> Tensor:
    """Pull every stuff class of a target image to its most similar source image.

    Eq. (6):  L_stf = sum_i sum_b min_j || A^b(L_P, f_i) - S_j^b ||_1^2

    Args: feat (N, D, h, w); label_map (N, h, w) int64, predicted, 255 ignored; bank of the stuff classes.
    Returns: 0-d, sum over the classes that occur and have stored features, mean over the N images.
    """
    return matching_loss(feat, label_map, bank, limit=None)                       # one region per class


def instance_loss(feat: Tensor, label_map: Tensor, bank: FeatureBank, limit: int = 10) -> Tensor:
    """Pull every predicted region of a thing class to its most similar source region.

    Eq. (8):  L_ins = sum_i sum_k 1 / |R_k| sum_{r in R_k} min_j || I(r, f_i) - S_j^k ||_1^2

    Args: as for `stuff_loss`; bank of the thing classes; limit, regions per class and image.
    Returns: 0-d, mean over a class's regions, summed over the classes with stored features, mean over the N images.
    """
    return matching_loss(feat, label_map, bank, limit)


def class_thresholds(histogram: Tensor, cap: float = 0.9) -> Tensor:
    """Confidence above which a pixel gets a pseudo label, for each class.

    Sec. 6.2:  y^k = the median confidence of the pixels predicted as k in the whole target set, at most 0.9

    Args: histogram (K, B) int64, confidences in B equal bins of [0, 1]; cap.
    Returns: (K,) float64, lower edge of the bin with the (lower) median; cap for a class that is never predicted.
    """
    below_or_in = histogram.cumsum(dim=1)                                         # (K, B)
    median = (2 * below_or_in < below_or_in[:, -1:]).sum(dim=1).double() / histogram.shape[1]
    return torch.where(below_or_in[:, -1] > 0, median, 1.0).clamp(max=cap)


def pseudo_labels(logits: Tensor, thresholds: Tensor) -> Tensor:
    """The predicted class, where its probability is above the class's threshold.

    Eq. (9):  y^ = argmax_k 1[S(C(f))^(k) > y^k] C(f)^(k), "don't care" where the condition is false

    Args: logits (N, K, h, w); thresholds (K,), y^k.  Returns: (N, h, w) int64, 255 where the confidence is not strictly above.
    """
    confidence, label = logits.softmax(dim=1).max(dim=1)                          # (N, h, w) each
    return torch.where(confidence > thresholds[label], label, IGNORE)


def augmented_label_map(prediction: Tensor, pseudo_label: Tensor) -> Tensor:
    """The predicted label map, overwritten by pseudo labels.

    Eq. (11):  L_P <- y^ where L_P != y^, and there is a y^

    Args: prediction, pseudo_label (N, h, w) int64 on one grid, the latter with 255 for none.  Returns: (N, h, w) int64.
    """
    return torch.where(pseudo_label != IGNORE, pseudo_label, prediction)


# ---------------------------------------------------------------------------------------------- the steps


def make_banks(run: Run, cfg: Config, dim: int) -> tuple[FeatureBank, FeatureBank]:
    """Empty banks of stuff, with w places per class, and of things, with z w."""
    names = STUFF if run.classes.stuff is None else run.classes.stuff
    stuff, things = ([k for k, name in enumerate(run.classes.names) if (name in names) is kind] for kind in (True, False))
    return FeatureBank(stuff, cfg.w, dim, run.device), FeatureBank(things, cfg.z * cfg.w, dim, run.device)


def train_step(run: Run, cfg: Config, step: int, model: nn.Module, stuff: FeatureBank, things: FeatureBank,
               source: SegmentationDataset, target: SegmentationDataset, note: dict | None = None) -> None:
    """Per iteration one step of G on Eq. (12) in step 1, Eq. (13) in step 2, and one step of D on lambda_D L_D."""
    run.seed("discriminator", step)
    D = run.place(Discriminator(model.num_classes))
    optimizer = torch.optim.SGD(model.parameter_groups(cfg.lr), lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov,
                                weight_decay=cfg.weight_decay)
    optimizer_D = torch.optim.Adam(D.parameters(), lr=cfg.lr_discriminator, betas=(cfg.beta1, cfg.beta2))
    weights_G, weights_D = [p for p in model.parameters() if p.requires_grad], list(D.parameters())
    state = {"model": model, "D": D, "stuff": stuff, "things": things, "optimizer": optimizer, "optimizer_D": optimizer_D}
    model, D = parallel(model), parallel(D)
    for _, (x_s, y_s), (x_t, _, *y_t) in run.stage(f"step{step}", cfg.iterations, state, source, target,
                                                     batch_size=cfg.batch_size, note=note):
        with run.autocast():
            feat_s, logits_s = model(x_s)                                         # (N, D, h, w), (N, K, h, w)
            feat_t, logits_t = model(x_t)
            prob_s = upsample(logits_s, x_s.shape[-2:]).softmax(dim=1)            # (N, K, H, W)
            prob_t = upsample(logits_t, x_t.shape[-2:]).softmax(dim=1)
            d_s, d_t = D(prob_s.detach()), D(prob_t)                              # (N, 1, H/32, W/32)

        correct = correct_label_map(logits_s, resize_label(y_s, logits_s.shape[-2:]))           # Eq. (4)
        feat_s, correct = gather(feat_s), gather(correct).cpu()                   # of all processes; on the CPU for scipy
        store_stuff(feat_s, correct, stuff)                                       # Eq. (5)
        store_instances(feat_s, correct, things, cfg.z)                           # Algorithm 1
        label_map = logits_t.argmax(dim=1)                                        # (N, h, w), L_P of the target
        loss_seg = {"seg_s": segmentation_loss(logits_s, y_s)}                    # Eq. (1)
        if step == 2:
            loss_seg["seg_t"] = segmentation_loss(logits_t, *y_t)                 # Eq. (10)
            label_map = augmented_label_map(label_map, resize_label(*y_t, label_map.shape[-2:]))             # Eq. (11)
        label_map = label_map.cpu()
        loss_stf = stuff_loss(feat_t, label_map, stuff)                           # Eq. (6)
        loss_ins = instance_loss(feat_t, label_map, things, cfg.z)                # Eq. (8)
        loss_adv, loss_D = adversarial_loss(d_t), discriminator_loss(d_s, d_t)    # Eqs. (2), (3)
        loss = cfg.lambda_seg * sum(loss_seg.values()) + cfg.lambda_adv * loss_adv + cfg.lambda_ci * (loss_stf + loss_ins)

        optimizer.zero_grad()
        optimizer_D.zero_grad()
        (cfg.lambda_D * loss_D).backward(inputs=weights_D, retain_graph=True)     # G stays fixed
        loss.backward(inputs=weights_G)                                           # D stays fixed
        optimizer.step()
        optimizer_D.step()
        run.report(**loss_seg, adv=loss_adv, stuff=loss_stf, things=loss_ins, D=loss_D)


@torch.no_grad()
def write_pseudo_labels(run: Run, cfg: Config, model: nn.Module, target: SegmentationDataset, folder: Path) -> dict:
    """Sec. 6.2: one pass over the target for the thresholds, one for the labels. Returns: both per class, to log."""
    names, K = run.classes.names, len(run.classes)
    histogram = torch.zeros(K, BINS, dtype=torch.int64, device=run.device)
    labelled = torch.zeros(K, dtype=torch.int64, device=run.device)
    model.eval()
    for x, *_ in run.sweep("confidences", target):
        with run.autocast():
            _, logits = model(x)                                                  # (1, K, h, w)
        confidence, label = upsample(logits, x.shape[-2:]).softmax(dim=1).max(dim=1)            # (1, H, W) each
        pair = label * BINS + (confidence * BINS).long().clamp(max=BINS - 1)
        histogram += pair.flatten().bincount(minlength=K * BINS).view(K, BINS)
    sum_over_processes(histogram)
    thresholds = class_thresholds(histogram, cfg.cap).float()

    for x, _, (name,) in run.sweep("pseudo labels", target):
        with run.autocast():
            _, logits = model(x)
        label = pseudo_labels(upsample(logits, x.shape[-2:]), thresholds)         # (1, H, W)
        labelled += label[label != IGNORE].bincount(minlength=K)
        save_label(folder / f"{name}.png", label[0])
    sum_over_processes(labelled)

    percent = (100 * labelled / histogram.sum(dim=1)).tolist()                    # NaN: never predicted
    print_table("pseudo labels of the target, in percent: y^k; labelled pixels among those predicted as the class",
                {"threshold": [*(100 * thresholds).tolist(), None],
                 "labelled": [*percent, 100 * float(labelled.sum() / histogram.sum())]}, [*names, "all"])
    return {"thresholds": dict(zip(names, thresholds.tolist())),
            "labelled_percent": {name: round(share, 2) for name, share in zip(names, percent) if share == share}}


def check(cfg: Config, options: Options) -> None:
    """Check the method's settings before anything is loaded."""
    if cfg.nesterov and cfg.momentum == 0:
        raise UserError("Nesterov momentum needs --momentum above 0: raise it or add --no-nesterov")
    sizes = [options.source_size or SIZES[options.source], options.target_size or SIZES[options.target]]
    for size in [options.crop] if options.crop else sizes:
        if min(size) < 32:
            raise UserError(f"images of {size} are too small for the discriminator: give each side at least 32 pixels")


@command
def main(argv: list[str] | None = None) -> None:
    """Step 1, pseudo labels, step 2. An evaluation follows each step."""
    cfg, options = parse("sim.py", __doc__, (Config, Options), argv, TOY)
    check(cfg, options)
    if options.target_labels:                                                     # the upper bound does not adapt
        cfg = replace(cfg, lambda_adv=0.0, lambda_ci=0.0)
    run = Run("sim", cfg, options, {"step1": cfg.iterations, "step2": cfg.ssl * cfg.iterations}, SIZES)
    test, tests = run.images("target", "val"), {"single-scale": {}}
    model = run.network("v2")
    if options.eval:
        return run.evaluate(run.latest, model, test, tests)
    augment = Augment(crop=options.crop)
    source = run.images("target" if options.target_labels else "source", "train", augment=augment)
    target = run.images("target", "train", labels=False, augment=augment)
    if run.pending("step1"):
        stuff, things = make_banks(run, cfg, model.feat_channels)
        run.watch(model, test)
        train_step(run, cfg, 1, model, stuff, things, source, target)
        draw_matches(run, cfg, 1, model, stuff, things, target)
        run.evaluate("step1", model, test, tests)
    if run.pending("step2"):
        folder = run.folder / "pseudo_labels"
        note = run.once("step2", "labels", lambda: write_pseudo_labels(run, cfg, model, target, folder))
        model = run.network("v2", fresh=True)                                     # "we reinitialize and repeat", Sec. 4.3
        stuff, things = make_banks(run, cfg, model.feat_channels)
        run.watch(model, test)
        train_step(run, cfg, 2, model, stuff, things, source, target.with_maps(folder), note)
        draw_matches(run, cfg, 2, model, stuff, things, target)
        run.evaluate("step2", model, test, tests)


@torch.no_grad()
def draw_matches(run: Run, cfg: Config, step: int, model: nn.Module, stuff: FeatureBank, things: FeatureBank,
                 target: SegmentationDataset) -> None:
    """Draw target images, predictions on the grid, and regions in the colour of the matched source sample (black: none)."""
    rows = []
    model.eval()
    for image, *_ in (target[i] for i in range(0, len(target), max(1, len(target) // 4))[:4]):
        with run.autocast():
            feat, logits = model(run.place(image[None]))
        label_map = logits.argmax(dim=1).cpu()                                    # (1, h, w)
        matched = np.zeros((*label_map.shape[1:], 3), dtype=np.uint8)
        for bank, limit in ((stuff, None), (things, cfg.z)):
            for k, masks, means in regions(feat, label_map, bank.classes, limit):
                if len(bank.samples(k)):
                    for mask, j in zip(masks.numpy(), nearest_sample(means, bank.samples(k))[1].tolist()):
                        matched[mask] = np.random.default_rng((k, j)).integers(64, 256, 3)
        rows.append([denormalise(image), colorize(label_map[0], run.classes), matched])
    run.draw(f"step{step}-matches.png", rows, ["target", "prediction on the grid", "colour: its source sample"])


if __name__ == "__main__":
    main()
