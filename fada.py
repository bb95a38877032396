"""Classes Matter: A Fine-grained Adversarial Approach to Cross-domain Semantic Segmentation (FADA).

Wang, Shen, Zhang, Duan, Mei. ECCV 2020. arXiv:2007.09222

A discriminator tells source features from target features. It has K channels per domain, so that it also tells classes apart.
The segmentation network's soft predictions say which of the K channels a feature belongs to. When the network fools the
discriminator, target features move towards source features of their own class, not just towards the source domain.

    Eq. (3)        segmentation_loss
    Eq. (7)        hard_labels
    Eq. (8)        soft_labels
    Sec. 3.2       domain_encoding               [a; 0] for the source, [0; a] for the target
    Eqs. (1), (5)  discriminator_loss            binary_labels (K = 1, a = 1) give Eq. (1)
    Eqs. (4), (6)  adversarial_loss              binary_labels give Eq. (4)
    Eq. (2)        adversarial                   the training stage itself
    Eq. (9)        class_center_distance
    Sec. 4.3       FineGrainedDiscriminator

    G = C o F      segmentation network: features F, classifier C          D    discriminator
    f, feat        feature samples, one per pixel of the stride-8 grid       K    classes
    a              class knowledge, (N, K, h, w)                            d    domain, 0 source, 1 target
    T              temperature of Eq. (8)                                   lambda_adv  weight of L_adv in Eq. (2)

Stages: source (20k) -> adversarial (40k) -> distill (20k) -> single-scale and multi-scale test.

    python fada.py --toy                                     the toy city, a few minutes on two cores
    python fada.py --source gta5                             the paper's GTA5 -> Cityscapes; the same line resumes
    torchrun --nproc_per_node=4 fada.py --source gta5 --batch-size 2      on four GPUs, the paper's eight images
    python fada.py --source cityscapes --target crosscity --city Rome
    python fada.py --source synthia --labels hard --no-distill --from runs/fada-synthia/source.pt --tag hard      Table 5
    python fada.py --source gta5 --eval                      only evaluate the latest stage of the run

Departures:
 1. Eqs. (3), (5), (6): sums are means, over the labelled pixels in (3), over all feature samples in (5) and (6). Each domain's
    half of (5) weighs 0.5. The scale of a sum would change with image and batch size.
 2. Eqs. (5), (6): both losses use one forward pass of D on the target batch. D changes only after both.
 3. Sec. 3.3: "clipping" sets soft labels above the threshold to the threshold. They are not normalised again.
 4. Sec. 4.3 only names self-distillation. Here a student starts from the initial weights and learns the adapted model's argmax
    on every target pixel, for `distill_iterations`, at the source stage's rates.
 5. Sec. 4.3 only names multi-scale testing. Here it is the mean of the softmax over `test_scales`, each also flipped.
 6. Sec. 4.3 gives no image sizes (SIZES), strength of jitter, rate of the classifier (ten times higher, common/deeplab.py)
    and batch norm (`--freeze-bn`, `--distill-freeze-bn`). Here they have the usual values of the field.
 7. Sec. 4.3: `batch_size` is eight in every stage. The paper gives eight, four per domain, for training on both domains.
 8. Sec. 4.3: each stage has its own optimizer, and the horizon of its poly rate is its own iterations.
 9. Sec. 4.5: Eq. (9) uses the labelled pixels of `ccd_images` images per domain on the feature grid. It is reported per domain
    and for both together: the paper does not say whether S_i holds both.

Self-distillation follows the published code (docs/agreement.md). The rest of that code differs from the paper as follows, and
this is not followed:
 a. L_seg uses logits / T. Then T hardly softens Eq. (8), and clipping acts on every confident pixel.
 b. D's outputs and the soft labels are upsampled to the image. Here Eqs. (5) and (6) use the feature samples, as printed.
 c. Source images are sampled by class rarity. No flip before distillation, jitter only on source images of stage 2.
 d. Weight decay 5e-4, rate 5e-4 in the source and distillation stages, poly horizons longer than the runs.
 e. VGG-16 starts from Caffe's weights, whose input is BGR in 0..255 minus the mean. Here it starts from torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import Size, command, option, parse
from common.data import IGNORE, Augment, SegmentationDataset, Sizes, save_label
from common.deeplab import at_least_float32, resize_label, upsample
from common.distributed import labelled_mean, parallel, sum_over_processes
from common.files import UserError
from common.metrics import print_table
from common.run import Options, Run

SIZES = Sizes(gta5=Size(1280, 720), synthia=Size(1280, 760), cityscapes=Size(1024, 512), crosscity=Size(1024, 512))


@dataclass
class Config:
    """the method; † marks what the paper does not give"""

    backbone: str = option("resnet101", "encoder of DeepLab v2", paper="resnet101", section="Sec. 4.3",
                           choices=("resnet101", "resnet50", "resnet18", "vgg16"))
    labels: str = option("soft", "class knowledge a: Eq. (8), Eq. (7), or one class (the baseline)", paper="soft",
                         section="Sec. 4.6", choices=("soft", "hard", "binary"))
    T: float = option(1.8, "temperature of the soft labels, Eq. (8)", paper=1.8, section="Sec. 4.3", low=1e-3)
    clip: float = option(0.9, "soft labels above this are set to it", paper=0.9, section="Sec. 4.6", low=0.0, high=1.0)
    hard_threshold: float = option(0.9, "lowest confidence of a hard label", paper=0.9, section="Sec. 4.6", low=0.0, high=1.0)
    lambda_adv: float = option(0.001, "weight of L_adv, Eq. (2)", paper=0.001, section="Sec. 4.3", low=0.0)
    lr: float = option(2.5e-4, "SGD's initial rate", paper=2.5e-4, section="Sec. 4.3", low=0.0)
    momentum: float = option(0.9, "SGD's momentum", paper=0.9, section="Sec. 4.3", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "SGD's weight decay", paper=1e-4, section="Sec. 4.3", low=0.0)
    lr_discriminator: float = option(1e-4, "Adam's initial rate for D", paper=1e-4, section="Sec. 4.3", low=0.0)
    beta1: float = option(0.9, "Adam's beta_1 for D", paper=0.9, section="Sec. 4.3", low=0.0, high=0.99999)
    beta2: float = option(0.99, "Adam's beta_2 for D", paper=0.99, section="Sec. 4.3", low=0.0, high=0.99999)
    source_iterations: int = option(20_000, "iterations of the source stage", paper=20_000, section="Sec. 4.3", low=1)
    adversarial_iterations: int = option(40_000, "adversarial iterations", paper=40_000, section="Sec. 4.3", low=1)
    distill: bool = option(True, "self-distillation after the adversarial stage", paper=True, section="Sec. 4.3")
    distill_iterations: int = option(20_000, "iterations of self-distillation", low=1)
    distill_size: Size | None = option(None, "size of pseudo labels, training and test images in self-distillation; "
                                       "automatic: twice target_size, so 2048x1024")
    distill_scale: tuple[float, float] = option((0.5, 1.5), "range of the random resize in self-distillation", low=0.1)
    distill_crop: Size | None = option(None, "random crop in self-distillation; automatic: target_size, so 1024x512")
    distill_freeze_bn: str = option("auto", "batch norm frozen in self-distillation; auto: none, but the value of "
                                    "--freeze-bn for SYNTHIA or if given", choices=("auto", "all", "encoder", "affine", "none"))
    batch_size: int = option(8, "images per batch, of both domains together", paper=8, section="Sec. 4.3", low=2)
    jitter: float = option(0.5, "colour jitter of brightness, contrast, saturation; hue: 0.4 times this", low=0.0, high=1.0)
    test_scales: tuple[float, ...] = option((0.7, 1.0, 1.3), "scales of the multi-scale test, each also flipped", low=0.1)
    ccd: bool = option(False, "also report Eq. (9); needs labels of the target's training images", defines_run=False)
    ccd_images: int = option(2000, "images per domain for Eq. (9)", paper=2000, section="Sec. 4.5", low=1, defines_run=False)


TOY = dict(data="data/toycity", init="none", backbone="resnet18", source_size=Size(128, 64), target_size=Size(128, 64),
           distill_size=Size(256, 128), distill_crop=Size(128, 64), source_iterations=600, adversarial_iterations=600,
           distill_iterations=400, lr=2.5e-3, lambda_adv=0.005, lr_discriminator=3e-4, workers=0, amp="auto",
           channels_last=True)


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy on labelled pixels.

    Eq. (3):  L_seg = - sum_i sum_k y_ik log p_ik

    Args: logits (N, K, h, w) float at feature resolution; label (N, H, W) int64, classes 0..K-1, 255 ignored.
    Returns: 0-d, mean over the labelled pixels (the paper sums); exactly 0 if there are none.
    """
    logits = upsample(logits, label.shape[-2:])                                   # (N, K, H, W)
    return labelled_mean(F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none"), label != IGNORE)


def hard_labels(logits: Tensor, threshold: float = 0.9) -> Tensor:
    """One-hot class knowledge of confident samples.

    Eq. (7):  a_k = 1 if k = argmax_k p_k, else 0;  all zero where max_k p_k < threshold (Sec. 4.6)

    Args: logits (N, K, h, w).  Returns: (N, K, h, w) of 0 and 1, no gradient.
    """
    confidence, label = logits.detach().softmax(dim=1).max(dim=1, keepdim=True)   # (N, 1, h, w) each
    a = torch.zeros_like(logits).scatter_(1, label, 1.0)
    return a * (confidence >= threshold)


def soft_labels(logits: Tensor, T: float = 1.8, clip: float = 0.9) -> Tensor:
    """Soft class knowledge with confidence clipping.

    Eq. (8):  a_k = exp(z_k / T) / sum_j exp(z_j / T);  values above clip become clip (Sec. 3.3, "confidence clipping")

    Args: logits (N, K, h, w), z; T, temperature, > 0; clip in [0, 1], 1 means no clipping.
    Returns: (N, K, h, w) in [0, clip], no gradient; after clipping a pixel's values may sum to less than one.
    """
    return (logits.detach() / T).softmax(dim=1).clamp(max=clip)


def binary_labels(logits: Tensor) -> Tensor:
    """No class knowledge: K = 1 and a = 1 turn Eqs. (5) and (6) into Eqs. (1) and (4).

    Args: logits (N, K, h, w).  Returns: (N, 1, h, w) of ones.
    """
    return torch.ones_like(logits[:, :1]).detach()


def domain_encoding(a: Tensor, domain: str) -> Tensor:
    """Class knowledge as supervision of the 2K channels of D.

    Sec. 3.2:  [a; 0] for the source, [0; a] for the target

    Args: a (N, K, h, w); domain "source" or "target".  Returns: (N, 2K, h, w).
    """
    if domain not in ("source", "target"):
        raise ValueError(f'domain is "source" or "target", not {domain!r}')
    zero = torch.zeros_like(a)
    return torch.cat([a, zero] if domain == "source" else [zero, a], dim=1)


def discriminator_loss(d_source: Tensor, d_target: Tensor, a_source: Tensor, a_target: Tensor) -> Tensor:
    """Teach D the domain and the class of every feature sample.

    Eq. (5):  L_D = - sum_i sum_k a_ik log P(d=0, c=k | f_i) - sum_j sum_k a_jk log P(d=1, c=k | f_j)

    Args: d_source, d_target (N, 2K, h, w), raw outputs of D, whose softmax over the 2K channels is P;
        a_source, a_target (N, K, h, w), class knowledge of the same samples, no gradient.
    Returns: 0-d; each domain is the mean over its samples (the paper sums), each weighs 0.5.
    """
    log_p_source = F.log_softmax(d_source, dim=1)                                 # (N, 2K, h, w)
    log_p_target = F.log_softmax(d_target, dim=1)
    loss_source = -(domain_encoding(a_source, "source") * log_p_source).sum(dim=1).mean()
    loss_target = -(domain_encoding(a_target, "target") * log_p_target).sum(dim=1).mean()
    return 0.5 * loss_source + 0.5 * loss_target


def adversarial_loss(d_target: Tensor, a_target: Tensor) -> Tensor:
    """Reward target features that D takes for source features of their own class.

    Eq. (6):  L_adv = - sum_j sum_k a_jk log P(d=0, c=k | f_j)

    Args: d_target (N, 2K, h, w) raw outputs of D; a_target (N, K, h, w) class knowledge of the same samples, no gradient.
    Returns: 0-d, mean over the samples (the paper sums).
    """
    log_p = F.log_softmax(d_target, dim=1)                                        # (N, 2K, h, w)
    return -(domain_encoding(a_target, "source") * log_p).sum(dim=1).mean()


class FineGrainedDiscriminator(nn.Module):
    """Sec. 4.3: three 3x3 convolutions of stride 1 with {256, 128, 2K} channels, Leaky-ReLU 0.2 between them.

    forward: feat (N, D, h, w) -> raw outputs (N, 2K, h, w); the first K channels are the source's, the others the target's.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 256, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(256, 128, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(128, 2 * num_classes, 3, padding=1))

    def forward(self, feat: Tensor) -> Tensor:
        return at_least_float32(self.layers(feat))


def class_moments(feat: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that Eq. (9) needs of a set of features. The sums of two sets add up to the sums of both together.

    Args: feat (M, D); label (M,) int64, 255 ignored.
    Returns: count (K,), sum (K, D) and sum of squared norms (K,), all float64.
    """
    feat, label = feat[label != IGNORE].double(), label[label != IGNORE]
    zeros = torch.zeros(num_classes, dtype=torch.float64, device=feat.device)
    return (zeros.index_add(0, label, torch.ones_like(label, dtype=torch.float64)),
            feat.new_zeros(num_classes, feat.shape[1]).index_add_(0, label, feat),
            zeros.index_add(0, label, feat.pow(2).sum(dim=1)))


def class_center_distance_from_moments(count: Tensor, total: Tensor, square: Tensor) -> Tensor:
    """Eq. (9) from `class_moments`. Returns (K,), NaN for a class without features or without a second class."""
    center = total / count[:, None]                                               # mu, NaN rows for absent classes
    intra = (square / count - center.pow(2).sum(dim=1)).clamp(min=0)              # mean of |x - mu_i|^2 over S_i
    inter = (center[:, None] - center[None]).pow(2).sum(dim=2)                    # (K, K), |mu_i - mu_j|^2
    other = ~torch.eye(len(count), dtype=torch.bool, device=count.device) & (count > 0) & (count > 0)[:, None]
    return torch.where(other, intra[:, None] / inter, 0).sum(dim=1) / other.double().sum(dim=1)


def class_center_distance(feat: Tensor, label: Tensor) -> Tensor:
    """The spread of each class relative to its distance from the other classes; lower is better aligned.

    Eq. (9):  CCD(i) = 1/(K-1) sum_{j != i} [1/|S_i| sum_{x in S_i} ||x - mu_i||^2] / ||mu_i - mu_j||^2

    Args: feat (M, D), one feature per row; label (M,) int64 classes, 255 ignored.
    Returns: (K',) float64 for the K' classes that occur, in ascending order; NaN if there is only one.
    """
    present = label[label != IGNORE].unique()                                     # ascending
    moments = class_moments(feat, label, int(present.max()) + 1 if len(present) else 0)
    return class_center_distance_from_moments(*(moment[present] for moment in moments))


def sgd(model: nn.Module, cfg: Config) -> torch.optim.SGD:
    """Sec. 4.3's optimizer of F and C."""
    return torch.optim.SGD(model.parameter_groups(cfg.lr), lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def train(run: Run, cfg: Config, stage: str, iterations: int, model: nn.Module, images: SegmentationDataset) -> None:
    """Stages 1 and 3, Eq. (3) alone: stage 1 on the source, stage 3 on the target with the adapted model's labels."""
    optimizer = sgd(model, cfg)
    state = {"model": model, "optimizer": optimizer}
    model = parallel(model)
    for _, (x, y, *pseudo_label) in run.stage(stage, iterations, state, images, batch_size=cfg.batch_size):
        with run.autocast():
            _, logits = model(x)                                                  # (N, K, h, w)
        loss = segmentation_loss(logits, *(pseudo_label or [y]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(seg=loss)


def adversarial(run: Run, cfg: Config, model: nn.Module, source: SegmentationDataset, target: SegmentationDataset) -> None:
    """Stage 2: per iteration one step of F and C on L_seg + lambda_adv L_adv (Eqs. 2, 3, 6), one of D on L_D (Eq. 5)."""
    knowledge = {"soft": lambda logits: soft_labels(logits, cfg.T, cfg.clip),
                 "hard": lambda logits: hard_labels(logits, cfg.hard_threshold),
                 "binary": binary_labels}[cfg.labels]
    run.seed("discriminator")
    D = run.place(FineGrainedDiscriminator(model.feat_channels, 1 if cfg.labels == "binary" else model.num_classes))
    optimizer = sgd(model, cfg)
    optimizer_D = torch.optim.Adam(D.parameters(), lr=cfg.lr_discriminator, betas=(cfg.beta1, cfg.beta2))
    weights_G, weights_D = [p for p in model.parameters() if p.requires_grad], list(D.parameters())
    state = {"model": model, "D": D, "optimizer": optimizer, "optimizer_D": optimizer_D}
    model, D = parallel(model), parallel(D)
    for _, (x_s, y_s), (x_t, _) in run.stage("adversarial", cfg.adversarial_iterations, state, source, target,
                                             batch_size=cfg.batch_size // 2):
        with run.autocast():
            feat_s, logits_s = model(x_s)                                         # (N, D, h, w), (N, K, h, w)
            feat_t, logits_t = model(x_t)
            d_s, d_t = D(feat_s.detach()), D(feat_t)                              # (N, 2K, h, w)
        a_s, a_t = knowledge(logits_s), knowledge(logits_t)                       # (N, K, h, w)
        loss_seg = segmentation_loss(logits_s, y_s)                               # Eq. (3)
        loss_adv, loss_D = adversarial_loss(d_t, a_t), discriminator_loss(d_s, d_t, a_s, a_t)

        optimizer.zero_grad()
        optimizer_D.zero_grad()
        loss_D.backward(inputs=weights_D, retain_graph=True)                      # Eq. (5): F and C stay fixed
        (loss_seg + cfg.lambda_adv * loss_adv).backward(inputs=weights_G)         # Eq. (2): D stays fixed
        optimizer.step()
        optimizer_D.step()
        run.report(seg=loss_seg, adv=loss_adv, D=loss_D)


@torch.no_grad()
def write_pseudo_labels(run: Run, model: nn.Module, target: SegmentationDataset, folder: Path, size: Size) -> dict:
    """Write the adapted model's argmax on every pixel of every target image, without a threshold, as PNGs of this size."""
    model.eval()
    for x, _, (name,) in run.sweep("pseudo labels", target):
        with run.autocast():
            _, logits = model(x)                                                  # (1, K, h, w)
        save_label(folder / f"{name}.png", upsample(logits, (size.height, size.width)).argmax(dim=1)[0])
    return {}


def student(run: Run, cfg: Config) -> nn.Module:
    """The network of self-distillation: initial weights, batch norm as --distill-freeze-bn says."""
    model = run.network("v2", fresh=True)
    as_before = run.options.source == "synthia" or run.options.freeze_bn != "auto"
    model.freeze_bn({"auto": model.frozen_bn if as_before else "none"}.get(cfg.distill_freeze_bn, cfg.distill_freeze_bn))
    return model


def check(cfg: Config, options: Options, size: Size, crop: Size) -> None:
    """Check the method's settings before anything is loaded. size, crop: those of self-distillation."""
    largest = Size(round(cfg.distill_scale[1] * size.width), round(cfg.distill_scale[1] * size.height))
    if crop.width > largest.width or crop.height > largest.height:
        raise UserError(f"--distill-crop {crop} is larger than the images of self-distillation, at most {largest}; "
                        "choose a smaller crop or a larger --distill-size")
    if cfg.batch_size % 2:
        raise UserError(f"--batch-size {cfg.batch_size} is odd, and half of a batch comes from each domain; use an even number")
    if cfg.ccd and options.target in ("crosscity", options.source):
        raise UserError("--ccd needs two labelled data sets, and Cross-City's training images have no labels: omit --ccd")


@command
def main(argv: list[str] | None = None) -> None:
    """The stages in order, each followed by its evaluation."""
    cfg, options = parse("fada.py", __doc__, (Config, Options), argv, TOY)
    size = options.target_size or SIZES[options.target]
    large, crop = cfg.distill_size or Size(2 * size.width, 2 * size.height), cfg.distill_crop or size
    check(cfg, options, large, crop)
    augment = Augment(flip=True, jitter=cfg.jitter, crop=options.crop)
    augment_large = Augment(flip=True, jitter=cfg.jitter, scale=cfg.distill_scale, crop=crop)
    run = Run("fada", cfg, options, {"source": cfg.source_iterations + options.target_labels * cfg.adversarial_iterations,
              "adversarial": cfg.adversarial_iterations, "distill": cfg.distill * cfg.distill_iterations}, SIZES)
    test, test_large = run.images("target", "val"), run.images("target", "val", size=large)
    single, multi = {"single-scale": {}}, {"multi-scale + flip": {"scales": cfg.test_scales, "flip": True}}
    analysed = [run.images(domain, "train") for domain in ("source", "target") * cfg.ccd]
    model = run.network("v2")
    run.watch(model, test)
    if options.eval:
        run.evaluate(run.latest, model, test_large if run.latest == "distill" else test, single | multi)
    else:
        source = run.images("target" if options.target_labels else "source", "train", augment=augment)
        target = run.images("target", "train", labels=False, augment=augment)
    if run.pending("source"):                              # train the upper bound for as many iterations as the adapted model
        train(run, cfg, "source", run.lengths["source"], model, source)
        run.evaluate("source", model, test, single)
    if run.pending("adversarial"):
        adversarial(run, cfg, model, source, target)
        run.evaluate("adversarial", model, test, single if cfg.distill else single | multi)
    if run.pending("distill"):
        run.once("distill", "labels", lambda: write_pseudo_labels(run, model, target, run.folder / "pseudo_labels", large))
        images = run.images("target", "train", labels=False, size=large, augment=augment_large)
        model = student(run, cfg)
        run.watch(model, test_large)
        train(run, cfg, "distill", cfg.distill_iterations, model, images.with_maps(run.folder / "pseudo_labels"))
        run.evaluate("distill", model, test_large, single | multi)
    if cfg.ccd:
        report_class_center_distance(run, cfg, model, analysed)


@torch.no_grad()
def report_class_center_distance(run: Run, cfg: Config, model: nn.Module, analysed: list[SegmentationDataset]) -> None:
    """Print Eq. (9) per class, for each domain and for both together. Memory does not grow with the data."""
    moments, device = {}, run.float64_device
    model.eval()
    for images in analysed:
        run.seed("ccd", images.dataset)
        chosen = torch.randperm(len(images))[: cfg.ccd_images].sort().values.tolist()
        empty = torch.zeros(0, model.feat_channels, device=device)
        sums = class_moments(empty, empty[:, 0].long(), model.num_classes)
        for x, label, _ in run.sweep(f"class center distance, {images.dataset}", torch.utils.data.Subset(images, chosen)):
            with run.autocast():
                feat, _ = model(x)                                                # (1, D, h, w)
            label = resize_label(label, feat.shape[-2:]).flatten().to(device)     # (h w,)
            image_sums = class_moments(feat[0].flatten(1).T.to(device), label, model.num_classes)
            sums = [a + b for a, b in zip(sums, image_sums, strict=True)]
        sum_over_processes(*sums)
        moments[images.dataset] = sums
    moments["both"] = [sum(parts) for parts in zip(*moments.values(), strict=True)]
    ccd = {domain: class_center_distance_from_moments(*sums) for domain, sums in moments.items()}
    columns = {domain: [*values.tolist(), values.nanmean().item()] for domain, values in ccd.items()}
    print_table("class center distance, Eq. (9)", columns, (*run.classes.names, "mean"), digits=3)


if __name__ == "__main__":
    main()
