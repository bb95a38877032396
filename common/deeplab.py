"""DeepLab v2 and v3+ on torchvision's encoders: `feat, logits = model(x)`, both at feature resolution.

    network  backbone                        feat                              head (the classifier C of G = C o F)
    v2       resnet101, resnet50, resnet18   layer4, 2048 or 512, stride 8     four dilated 3x3 convolutions, summed
    v2       vgg16                           fc7, 1024, stride 8               the same
    v3+      resnet101, resnet50, resnet18   decoder, 256, stride 4            one 1x1 convolution

`model.encoder` keeps torchvision's parameter names (conv1, bn1, layer1..4; features), so that `encoder.` + name maps a
classification checkpoint onto a model and back. In every network `logits == model.head(feat)`. There is no dropout.
Other projects' published weights load too (common/published.py): a `Structure` says where their networks differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.files import UserError

BACKBONES = ("resnet101", "resnet50", "resnet18", "vgg16")


@dataclass(frozen=True)
class Structure:
    """Where networks with the same weights differ; the defaults are this project's own."""

    stride_first: bool = False     # a bottleneck's stride is on its first 1x1 convolution, as in Caffe, not on its 3x3
    dilate_first: bool = False     # v2: the first blocks of layer3 and layer4 dilate by 2 and 4, as the others, not by 1 and 2
    ceil_mode: bool = False        # the max pooling rounds its size up
    branches: int = 4              # v2: how many dilated convolutions the head sums
    bn_eps: float = 1e-5           # of the encoder's batch norms
    input: str = "imagenet"        # form of the input images, a key of published.INPUTS


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

    Works on BasicBlock too, which torchvision's replace_stride_with_dilation refuses. With dilations twice `first` (that of
    the convolution that carried the stride), every second output is what the strided layer would compute. `dilations` holds
    one number per block, for its other 3x3 convolutions."""
    for block, dilation in zip(layer, dilations):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d):
                d = first if conv.stride == (2, 2) else dilation
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (d, d)


def resnet_encoder(backbone: str) -> nn.Module:
    """torchvision's ResNet, randomly initialised, without its classifier; run by `resnet_features`."""
    from torchvision import models  # two seconds: not before the flags are read
    encoder = models.get_model(backbone, weights=None)
    del encoder.avgpool, encoder.fc
    return encoder


def resnet_features(encoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of layer1 (stride 4) and of layer4."""
    low = encoder.layer1(encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x)))))
    return low, encoder.layer4(encoder.layer3(encoder.layer2(low)))


def vgg16_encoder() -> nn.Module:
    """VGG-16's convolutions at stride 8: pool4 and pool5 removed, conv5_x with dilation 2."""
    from torchvision.models import vgg
    encoder = nn.Module()
    encoder.features = vgg.make_layers(vgg.cfgs["D"], batch_norm=False)    # models.vgg16 fills 120 M unused weights
    for i in (23, 30):                                                     # pool4, pool5; other names must stay
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
    """Batch norm that uses and keeps its running statistics if it sees one or two values per channel, as image pooling's does
    at batch 1 or 2. Two values normalised by themselves keep little but a sign, and the loss has 40 times the curvature."""

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
    """v2's classifier: 3x3 convolutions with dilations 6, 12, 18, 24 or the first, summed. (N, D, h, w) -> (N, K, h, w)"""

    def __init__(self, in_channels: int, num_classes: int, branches: int = 4) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(in_channels, num_classes, 3, padding=d, dilation=d)
                                      for d in (6, 12, 18, 24)[:branches])
        for conv in self.branches:
            nn.init.normal_(conv.weight, 0, 0.01)
            nn.init.zeros_(conv.bias)

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
    """What both networks share: the check of their input, frozen batch norm, and rates. Each has its own `features`.
    Raises: UserError for an unknown backbone; `forward`: ValueError for an input of another rank or channel count."""

    network = ""     # its name in `build_model`
    head_rate = 1    # the head's learning rate as a multiple of the network's

    def __init__(self, backbone: str, num_classes: int, feat_channels: int, structure: Structure) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"unknown backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
        if self.network == "v3+" and backbone == "vgg16":
            raise UserError("there is no DeepLab v3+ on vgg16: choose a resnet backbone, or network v2")
        self.backbone = backbone
        self.num_classes = num_classes
        self.feat_channels = feat_channels
        self.structure = structure
        self.frozen_bn = "none"
        self.complete = False                                    # whether a file gave every weight
        self.prepare = nn.Identity()                                # for another input: published.adapt

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"expected images of shape (N, 3, h, w), got {tuple(x.shape)}")
        feat = self.features(self.prepare(x))
        return feat, at_least_float32(self.head(feat))              # (N, D, h, w), (N, K, h, w)

    def freeze_bn(self, which: str) -> None:
        """Freeze the batch norms of "all" modules, of the "encoder", or of "none" (which unfreezes them).

        Frozen means, also after `model.train()`, that running statistics are used and kept, and affine parameters have no
        gradient. "affine" freezes only the encoder's affine parameters: batch statistics are used, running ones updated. Call
        it before `parameter_groups`. Raises ValueError for another word."""
        if which not in ("all", "encoder", "affine", "none"):
            raise ValueError(f"freeze_bn must be all, encoder, affine or none, not {which!r}")
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
        """Groups of the trainable parameters: the encoder at encoder_rate * lr, v2's head at 10 * lr, the rest at lr."""
        groups: dict[float, list[nn.Parameter]] = {1: []}          # the rest first: its rate is the one that is logged
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.split(".")[0]
                groups.setdefault({"head": self.head_rate, "encoder": encoder_rate}.get(part, 1), []).append(parameter)
        return [{"params": parameters, "lr": multiple * lr} for multiple, parameters in groups.items() if parameters]


class DeepLabV2(DeepLab):
    """DeepLab v2 (ResNet-101, -50, -18 or VGG-16) at stride 8.
    forward: (N, 3, H, W) float -> feat (N, feat_channels, h, w), logits (N, num_classes, h, w) with h about H/8."""

    network, head_rate = "v2", 10

    def __init__(self, backbone: str = "resnet101", num_classes: int = 19, structure: Structure = Structure()):  # noqa: B008
        super().__init__(backbone, num_classes, {"vgg16": 1024, "resnet18": 512}.get(backbone, 2048), structure)
        if backbone == "vgg16":
            self.encoder = vgg16_encoder()
            self.fc6 = init_convs(nn.Conv2d(512, 1024, 3, padding=4, dilation=4))
            self.fc7 = init_convs(nn.Conv2d(1024, 1024, 3, padding=4, dilation=4))
        else:
            self.encoder = resnet_encoder(backbone)
            first = 2 if structure.dilate_first else 1
            dilate(self.encoder.layer3, first, [2] * len(self.encoder.layer3))
            dilate(self.encoder.layer4, 2 * first, [4] * len(self.encoder.layer4))
        self.head = SummedASPP(self.feat_channels, num_classes, structure.branches)

    def features(self, x: Tensor) -> Tensor:
        if self.backbone == "vgg16":
            return F.relu(self.fc7(F.relu(self.fc6(self.encoder.features(x)))))
        return resnet_features(self.encoder, x)[1]


class DeepLabV3Plus(DeepLab):
    """DeepLab v3+ (ResNet-101, -50 or -18): encoder at stride 16, ASPP with image pooling, decoder at stride 4.
    forward: (N, 3, H, W) float -> feat (N, 256, h, w), logits (N, num_classes, h, w) with h about H/4."""

    network = "v3+"

    def __init__(self, backbone: str = "resnet101", num_classes: int = 19, structure: Structure = Structure()):  # noqa: B008
        super().__init__(backbone, num_classes, 256, structure)
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


def make_network(network: str | Callable, backbone: str, num_classes: int,
                 structure: Structure = Structure()) -> DeepLab:  # noqa: B008
    """"v2", "v3+" or your own network, see `build_model`, with random weights. Raises: UserError for an unknown choice."""
    if callable(network):
        from common.network import adopt  # only your own network needs it
        model = adopt(network, backbone, num_classes, structure)
    elif network in ("v2", "v3+"):
        model = (DeepLabV2 if network == "v2" else DeepLabV3Plus)(backbone, num_classes, structure)
    else:
        raise UserError(f"unknown network {network!r}: choose v2 or v3+")
    if structure != Structure():
        from common.published import adapt  # only weights of other projects need it
        adapt(model)
    return model


def build_model(network: str | Callable, backbone: str, num_classes: int, init: str = "imagenet", freeze_bn: str = "encoder",
                **file) -> DeepLab:
    """A network with its initial weights, and its batch norms frozen as given.

    Args:
        network: "v2", "v3+", or a callable that makes your own network from the number of classes (common/network.py).
        backbone: "resnet101", "resnet50", "resnet18" or, for v2, "vgg16".
        num_classes: K, channels of the logits.
        init: "imagenet", "none" (random) or a file; then `file` are more arguments of `published.load_model`.
        freeze_bn: see `DeepLab.freeze_bn`.
    Raises: UserError for an unknown choice and for weights that are unavailable, cannot be read or do not fit.
    """
    if init == "none":
        model = make_network(network, backbone, num_classes)
    else:
        from common.published import load_model  # only weights need it
        model = load_model(network, backbone, num_classes, init, **file)
    model.freeze_bn(freeze_bn)
    return model
