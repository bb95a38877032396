"""DeepLab v2 and v3+ on torchvision's encoders: `feat, logits = model(x)`, both at feature resolution.

    network  backbone                        feat                              head (the classifier C of G = C o F)
    v2       resnet101, resnet50, resnet18   layer4, 2048 or 512, stride 8     four dilated 3x3 convolutions, summed
    v2       vgg16                           fc7, 1024, stride 8               the same
    v3+      resnet101, resnet50, resnet18   decoder, 256, stride 4            one 1x1 convolution

`model.encoder` keeps torchvision's parameter names (conv1, bn1, layer1..4; features), so that `encoder.` + name maps a
classification checkpoint onto a model and back. In every network `logits == model.head(feat)`. There is no dropout.
Weights that other projects published load too (common/published.py); `DeepLab.configure` takes the structure they need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models import vgg
from torchvision.models.resnet import Bottleneck

from common.cli import UserError
from common.published import ConvertInput, Structure, Weights, load_foreign, recognise, unwrap

# The weights of the papers' years; torchvision's later IMAGENET1K_V2 come from a stronger training recipe.
IMAGENET = {
    "resnet101": models.ResNet101_Weights.IMAGENET1K_V1,
    "resnet50": models.ResNet50_Weights.IMAGENET1K_V1,
    "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
    "vgg16": models.VGG16_Weights.IMAGENET1K_V1,
}

FREEZE_BN = ("all", "encoder", "affine", "none")


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w) bilinearly, with align_corners=True, to (N, C, H, W); `size` is (H, W), height first."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring (N, H, W) int64 labels to another size (h, w) by the nearest pixel centre."""
    return F.interpolate(label[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()


def at_least_float32(x: Tensor) -> Tensor:
    """What a network returns under bfloat16 autocast, as float32: losses and argmax are computed in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dilate(layer: nn.Sequential, first: int, dilations: Sequence[int]) -> None:
    """Remove the stride of a ResNet layer and dilate its 3x3 convolutions instead, in place.

    Works on Bottleneck and on BasicBlock, which torchvision's replace_stride_with_dilation refuses. With dilations
    twice `first` (the dilation of the convolution that carried the stride), every second output is what the strided
    layer would compute. `dilations` holds one number a block, for its other 3x3 convolutions.
    """
    for block, dilation in zip(layer, dilations):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                d = first if conv.stride == (2, 2) else dilation
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (d, d)


def resnet_encoder(backbone: str) -> nn.Module:
    """torchvision's ResNet, randomly initialised, without its classifier; run by `resnet_features`."""
    encoder = getattr(models, backbone)(weights=None)
    del encoder.avgpool, encoder.fc
    return encoder


def resnet_features(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of layer1 (stride 4) and of layer4."""
    low = encoder.layer1(encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x)))))
    return low, encoder.layer4(encoder.layer3(encoder.layer2(low)))


def vgg16_encoder() -> nn.Module:
    """VGG-16's convolutions at stride 8: pool4 and pool5 removed, conv5_x with dilation 2."""
    encoder = nn.Module()
    encoder.features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)    # models.vgg16 fills 120 M unused weights
    for i in (23, 30):                                                     # pool4, pool5; no other name may move
        encoder.features[i] = nn.Identity()
    for i in (24, 26, 28):
        encoder.features[i].dilation = encoder.features[i].padding = (2, 2)
    return init_convs(encoder)


def init_convs(module: nn.Module) -> nn.Module:
    """Kaiming-normal weights and zero biases for all convolutions in `module`, as torchvision's encoders have."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that uses and keeps its running statistics where it sees one or two values per channel, as that of image
    pooling does at batch 1 or 2 (per process). Two values normalised by their own statistics give little but the sign of
    their difference, and the loss a curvature that is 40 times higher."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= 2 * x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """All batch norms in a module."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Size-preserving convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False)
    return init_convs(nn.Sequential(conv, BatchNorm(out_channels), nn.ReLU(inplace=True)))


class SummedASPP(nn.Module):
    """v2's classifier: 3x3 convolutions with dilations 6, 12, 18 and 24, summed. (N, D, h, w) -> (N, K, h, w)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.shape = in_channels, num_classes
        self.branches = nn.ModuleList()
        self.resize(4)

    def resize(self, count: int) -> None:
        """Have the first `count` of the four branches: others are removed, those that come anew are random."""
        like = next(((p.device, p.dtype) for p in self.parameters()), (None, None))
        new = [nn.Conv2d(*self.shape, 3, padding=d, dilation=d, device=like[0], dtype=like[1])
               for d in (6, 12, 18, 24)[len(self.branches): count]]
        for conv in new:
            nn.init.normal_(conv.weight, 0, 0.01)
            nn.init.zeros_(conv.bias)
            self.branches.append(conv)
        del self.branches[count:]

    def forward(self, feat: Tensor) -> Tensor:
        first, *others = self.branches
        return sum((conv(feat) for conv in others), first(feat))


class ASPP(nn.Module):
    """v3+'s context: a 1x1, three dilated 3x3 and an image pooling branch. (N, C, h, w) -> (N, 256, h, w)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        dilated = [conv_bn_relu(in_channels, 256, 3, d) for d in (6, 12, 18)]
        self.branches = nn.ModuleList([conv_bn_relu(in_channels, 256), *dilated])
        self.pool = conv_bn_relu(in_channels, 256)
        self.project = conv_bn_relu(5 * 256, 256)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class DeepLab(nn.Module):
    """What both networks share: the check of their input, frozen batch norm, and rates."""

    network = ""     # its name in `build_model`
    head_rate = 1    # the head's learning rate as a multiple of the network's

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"expected images of shape (N, 3, h, w), got {tuple(x.shape)}")
        feat = self.features(self.prepare(x))
        return feat, at_least_float32(self.head(feat))              # (N, D, h, w), (N, K, h, w)

    def __init__(self, backbone: str, num_classes: int, feat_channels: int) -> None:
        super().__init__()
        self.backbone, self.num_classes, self.feat_channels = backbone, num_classes, feat_channels
        self.frozen_bn, self.filled = "none", False                 # filled: a file gave every weight, the head's too
        self.structure, self.prepare = Structure(), nn.Identity()   # prepare: the input, see `configure`

    def configure(self, structure: Structure) -> None:
        """Take the structure that weights of another project need, in place, before an optimizer is made. `Structure()` is
        what `__init__` builds; nothing here changes the names of weights, but the number of the head's branches."""
        self.structure = structure
        self.prepare = nn.Identity()
        if structure.input != "imagenet":
            self.prepare = ConvertInput(structure.input).to(next(self.parameters()))
        if isinstance(self.encoder, models.ResNet):
            self.encoder.maxpool.ceil_mode = structure.ceil_mode
        for m in batch_norms(self.encoder):
            m.eps = structure.bn_eps
        for m in self.encoder.modules():
            if isinstance(m, Bottleneck):
                strides = (1, 1), max(m.conv1.stride, m.conv2.stride)
                m.conv1.stride, m.conv2.stride = reversed(strides) if structure.stride_first else strides

    def freeze_bn(self, which: str) -> None:
        """Freeze the batch norms of "all" modules, of the "encoder", or of "none" (which thaws them).

        Frozen means, also after `model.train()`, that the running statistics are used and kept and that the affine
        parameters get no gradient. "affine" freezes only the affine parameters of the encoder's: batch statistics are used,
        running statistics updated. Call it before `parameter_groups`. Raises ValueError for another word.
        """
        if which not in FREEZE_BN:
            raise ValueError(f"freeze_bn must be one of {', '.join(FREEZE_BN)}, not {which!r}")
        self.frozen_bn = which
        fixed = batch_norms({"all": self, "none": nn.Identity()}.get(which, self.encoder))
        for m in batch_norms(self):
            m.requires_grad_(m not in fixed)
        self.train(self.training)

    def train(self, mode: bool = True) -> DeepLab:
        super().train(mode)
        for m in batch_norms({"all": self, "encoder": self.encoder}.get(self.frozen_bn, nn.Identity())):
            m.eval()
        return self

    def parameter_groups(self, lr: float, encoder_rate: float = 1.0) -> list[dict]:
        """Groups for an optimizer, trainable parameters only: the encoder at encoder_rate * lr, v2's head at 10 * lr, the
        rest at lr."""
        groups: dict[float, list[nn.Parameter]] = {1: []}          # the rest first: its rate is the one that is logged
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                groups.setdefault({"head": self.head_rate, "encoder": encoder_rate}.get(part, 1), []).append(parameter)
        return [{"params": parameters, "lr": multiple * lr} for multiple, parameters in groups.items() if parameters]


class DeepLabV2(DeepLab):
    """DeepLab v2 (ResNet-101, -50, -18 or VGG-16) at stride 8.

    forward: (N, 3, H, W) float -> feat (N, feat_channels, h, w), logits (N, num_classes, h, w) with h about H/8.
    Raises: ValueError for an input of another rank or channel count; UserError for an unknown backbone.
    """

    network, head_rate = "v2", 10

    def __init__(self, backbone: str = "resnet101", num_classes: int = 19) -> None:
        check_choice(self.network, backbone)
        super().__init__(backbone, num_classes, {"vgg16": 1024, "resnet18": 512}.get(backbone, 2048))
        if backbone == "vgg16":
            self.encoder = vgg16_encoder()
            self.fc6 = init_convs(nn.Conv2d(512, 1024, 3, padding=4, dilation=4))
            self.fc7 = init_convs(nn.Conv2d(1024, 1024, 3, padding=4, dilation=4))
        else:
            self.encoder = resnet_encoder(backbone)
            dilate(self.encoder.layer3, 1, [2] * len(self.encoder.layer3))
            dilate(self.encoder.layer4, 2, [4] * len(self.encoder.layer4))
        self.head = SummedASPP(self.feat_channels, num_classes)

    def configure(self, structure: Structure) -> None:
        super().configure(structure)
        self.head.resize(structure.branches)
        if isinstance(self.encoder, models.ResNet) and isinstance(self.encoder.layer3[0], Bottleneck):
            for layer, d in (self.encoder.layer3, 2), (self.encoder.layer4, 4):
                conv, d = layer[0].conv2, d if structure.dilate_first else d // 2
                conv.dilation = conv.padding = (d, d)

    def features(self, x: Tensor) -> Tensor:
        if self.backbone == "vgg16":
            return F.relu(self.fc7(F.relu(self.fc6(self.encoder.features(x)))))
        return resnet_features(self.encoder, x)[1]


class DeepLabV3Plus(DeepLab):
    """DeepLab v3+ (ResNet-101, -50 or -18): encoder at stride 16, ASPP with image pooling, decoder at stride 4.

    forward: (N, 3, H, W) float -> feat (N, 256, h, w), logits (N, num_classes, h, w) with h about H/4.
    Raises: ValueError for an input of another rank or channel count; UserError for an unknown backbone or VGG-16.
    """

    network = "v3+"

    def __init__(self, backbone: str = "resnet101", num_classes: int = 19) -> None:
        check_choice(self.network, backbone)
        super().__init__(backbone, num_classes, feat_channels=256)
        self.encoder = resnet_encoder(backbone)
        dilate(self.encoder.layer4, 2, (2, 4, 8))                   # ResNet-18 has two blocks: 2, 4
        low, high = (64, 512) if backbone == "resnet18" else (256, 2048)
        self.aspp = ASPP(high)
        self.low = conv_bn_relu(low, 48)
        self.decoder = nn.Sequential(conv_bn_relu(256 + 48, 256, 3), conv_bn_relu(256, 256, 3))
        self.head = nn.Conv2d(256, num_classes, 1)
        nn.init.kaiming_normal_(self.head.weight)                   # fan-in: with fan-out, K, first logits are large
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        low, high = resnet_features(self.encoder, x)
        low = self.low(low)                                         # (N, 48, H/4, W/4)
        context = upsample(self.aspp(high), low.shape[2:])          # (N, 256, H/4, W/4)
        return self.decoder(torch.cat([context, low], dim=1))


def check_choice(network: str, backbone: str) -> None:
    """UserError unless this network exists on this backbone."""
    if network not in ("v2", "v3+"):
        raise UserError(f"unknown network {network!r}: choose v2 or v3+")
    if backbone not in IMAGENET:
        raise UserError(f"unknown backbone {backbone!r}: choose one of {', '.join(IMAGENET)}")
    if network == "v3+" and backbone == "vgg16":
        raise UserError("there is no DeepLab v3+ on vgg16: choose a resnet backbone, or network v2")


def build_model(network: str, backbone: str, num_classes: int, init: str = "imagenet", freeze_bn: str = "auto",
                partial_init: bool = False, branches: int | None = None, input: str | None = None) -> DeepLab:
    """A network with its initial weights, and its batch norms frozen as asked.

    Args:
        network: "v2" or "v3+".
        backbone: "resnet101", "resnet50", "resnet18" or, for v2, "vgg16".
        num_classes: K, channels of the logits.
        init: "imagenet", "none" (random) or the path of a state dict or checkpoint; see `load_weights`.
        freeze_bn: "all", "encoder", "affine", "none" (see `DeepLab.freeze_bn`), or "auto": "none" where init is "none",
            else "encoder".
        partial_init: accept a file that does not fill the encoder or whose head has another class count.
        branches: how many branches the head of a Caffe-style file sums; None: see published.summed_branches.
        input: what a file's network expects, a key of published.INPUTS; None: as recognised.
    Raises: UserError for an unknown choice and for weights that cannot be had, cannot be read or do not fit.
    """
    check_choice(network, backbone)
    if freeze_bn not in ("auto", *FREEZE_BN):
        raise UserError(f"unknown freeze-bn {freeze_bn!r}: choose one of auto, {', '.join(FREEZE_BN)}")
    model = (DeepLabV2 if network == "v2" else DeepLabV3Plus)(backbone, num_classes)
    load_weights(model, init, partial_init, branches, input)
    model.freeze_bn({"auto": "none" if init == "none" else "encoder"}.get(freeze_bn, freeze_bn))
    return model


def load_weights(model: DeepLab, init: str | Path, partial: bool = False, branches: int | None = None,
                 input: str | None = None, flag: str = "--init") -> str:
    """Load weights into `model` in place, print what matched, and return the printed line.

    A file holds torchvision's names (its classifier is left out), this project's names, a checkpoint of this project, an
    export, or a checkpoint of a family in common/published.py, whose structure the model then takes. The counts leave out
    num_batches_tracked, which frozen batch norms need not have.

    Args:
        model: unchanged where an error is raised.
        init: "imagenet", "none" (nothing is done) or a path.
        partial: accept missing encoder keys and a head of another class count; what fits is loaded.
        branches, input: as for `build_model`.
        flag: gave the path, for messages.
    Raises: UserError naming the file and the way out.
    """
    if init == "none":
        return "--init none: random weights"
    where = f"{flag} {init}"
    content = imagenet_weights(model.backbone) if init == "imagenet" else read_file(init, flag)
    weights = recognise(content, where, init, branches)
    if input is not None and init != "imagenet":
        weights.structure = replace(weights.structure, input=input)
    if weights.network not in ("", model.network):
        scripts = {"v2": "fada.py and sim.py", "v3+": "bismap.py, c2f.py and cag.py"}[weights.network]
        raise UserError(f"{where} is {weights.family}, but this script's network is DeepLab {model.network}: the file is for "
                        f"{scripts}")
    with torch.device("meta"):                                      # the model's names and shapes in the file's structure
        wanted = type(model)(model.backbone, model.num_classes)
        wanted.configure(weights.structure)
    own, named = wanted.state_dict(), weights.state
    if not partial:
        check_fit(own, weights, model, where)

    fitting = {k: v for k, v in named.items() if k in own and v.shape == own[k].shape}
    counted = [k for k in own if not k.endswith("num_batches_tracked")]
    missing = [k for k in counted if k not in fitting]
    encoder = [k for k in missing if k.startswith("encoder.")]
    unexpected = [k for k in named if k not in own and not k.endswith("num_batches_tracked")]
    model.configure(weights.structure)
    model.load_state_dict(fitting, strict=False)
    model.filled = not missing
    summary = (
        f"{where}: {weights.description}{len(counted) - len(missing)} keys matched, {len(missing)} missing ({len(encoder)} "
        f"of the encoder), {len(unexpected)} unexpected, {weights.classifier} of a classifier left out")
    print(summary)
    return summary


def check_fit(own: dict[str, Tensor], weights: Weights, model: DeepLab, where: str) -> None:
    """UserError unless the weights fill the encoder with nothing left over and the head, if they have one, has its shape.

    Of a file in torchvision's or this project's names, a head may be absent and other names are only counted.
    """
    named, file_name = weights.state, weights.names
    missing = [k for k in own if not k.endswith("num_batches_tracked") and (k not in named or named[k].shape != own[k].shape)]
    encoder = [k for k in missing if k.startswith("encoder.")]
    if encoder:
        first = ", ".join([file_name.get(k, k) for k in named][:3])
        raise UserError(
            f"{where} lacks {len(encoder)} encoder keys of {model.backbone}, or has them in another shape "
            f"({', '.join(encoder[:3])}, ...; its first names are {first}); give weights of this backbone, or --partial-init "
            "to load what fits")
    more = [file_name[k] for k in named if k.startswith("encoder.") and k not in own] if weights.family else []
    more = [k for k in more if not k.endswith("num_batches_tracked")]
    if more:
        raise UserError(f"{where} has {len(more)} encoder keys more than {model.backbone} ({', '.join(more[:3])}, ...); give "
                        "the --backbone that it was trained with, or --partial-init to load what fits")
    misfit = [k for k in missing if k in named]
    if misfit:
        key = misfit[0]
        raise UserError(
            f"{where} has {file_name.get(key, key)} of shape {tuple(named[key].shape)}, but with {model.num_classes} classes "
            f"it is {tuple(own[key].shape)}; give weights of this class count, or --partial-init for a new head")
    if missing and weights.family and any(k.startswith("head.") for k in named):
        raise UserError(f"{where} is {weights.family}, but lacks {len(missing)} of its keys (here {', '.join(missing[:3])}, "
                        "...): it was cut or changed; give the whole file, or --partial-init to load what fits")


def imagenet_weights(backbone: str) -> dict:
    """torchvision's ImageNet state dict, from its cache or its download; UserError where neither is to be had."""
    weights = IMAGENET[backbone]
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    try:
        return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:    # a download or a damaged file raises almost anything
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        why = "cannot be read, delete it" if file.exists() else "is not there and did not download"
        raise UserError(
            f"ImageNet weights {file.name} in {file.parent}: the file {why} ({cause}); put it there, or give --init "
            "PATH (a file) or --init none (random weights)") from error


def read_file(path: str | Path, flag: str = "--init"):
    """What a file holds that torch.save wrote, see `published.load_foreign`. A UserError otherwise, in which `flag` named
    the file."""
    try:
        return load_foreign(path)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); give another path") from error
    except Exception as error:    # a damaged file raises almost anything, and torch's own text advises unsafe loading
        refused = re.search(r"GLOBAL (\S+)", str(error))            # the function or class that the file wanted
        raise UserError(
            f"{flag} {path} is no readable checkpoint ({refused[1] if refused else type(error).__name__}): it is truncated, of "
            "another format, or holds more than tensors and plain values; give a state dict written by torch.save") from error


def read_weights(path: str | Path, flag: str = "--init") -> dict:
    """The state dict in a file, see `published.unwrap`. Raises: UserError as `read_file`, and where there is none."""
    found, _ = unwrap(read_file(path, flag))
    if not found:
        raise UserError(f"{flag} {path} holds no state dict; give one, or a checkpoint whose entry \"model\" is one")
    return found
