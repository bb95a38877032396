"""One's own network in place of DeepLab: what it must offer, and what a run makes of it. docs/network.md has an example.

    model = run.network(MyNetwork)                              # a class, or a function, of the number of classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from common.deeplab import DeepLab, Structure, at_least_float32
from common.files import UserError

HELP = "see docs/network.md"
TRIAL = (2, 3, 64, 128)                                          # the images of the forward pass that checks a network


class Network(Protocol):
    """What a torch.nn.Module must offer to be trained by the scripts: this one method.

    Two more members are used if they are there: `encoder`, the pretrained part, a module (for --freeze-bn encoder and affine,
    for the encoder's rate, and, if it is a ResNet of torchvision's, for bismap.py's --stm-backbone warmup); and
    `parameter_groups(lr, encoder_rate)`, which gives the optimizer's groups. Images come normalised by ImageNet's mean and
    standard deviation, or as --input says."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), of any H and W -> feat (N, D, h, w) and logits (N, num_classes, h, w), both on one grid."""


class OwnNetwork(DeepLab):
    """A module with what scripts and a run ask of a DeepLab. Its own state dict is that of `module`."""

    network = "own"

    def __init__(self, module: nn.Module, backbone: str, num_classes: int, feat_channels: int, structure: Structure):
        super().__init__(backbone, num_classes, feat_channels, structure)
        self.module = module

    @property
    def encoder(self) -> nn.Module:
        return getattr(self.module, "encoder", nn.Identity())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feat, logits = self.module(self.prepare(x))
        return feat, at_least_float32(logits)                    # (N, D, h, w), (N, K, h, w)

    def parameter_groups(self, lr: float, encoder_rate: float = 1.0) -> list[dict]:
        """The module's own, or the encoder at encoder_rate * lr and the rest at lr."""
        if hasattr(self.module, "parameter_groups"):
            return self.module.parameter_groups(lr, encoder_rate)
        inner = {id(parameter) for parameter in self.encoder.parameters()}
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        parts = [p for p in trained if id(p) not in inner], [p for p in trained if id(p) in inner]
        return [{"params": part, "lr": rate * lr} for part, rate in zip(parts, (1, encoder_rate)) if part]


def adopt(build: Callable[[int], nn.Module], backbone: str, num_classes: int, structure: Structure) -> OwnNetwork:
    """The network that `build(num_classes)` gives, checked by a forward pass of two small images. Prints one line.

    Args: backbone: of --backbone, not used; structure: whose `input` the images are turned into.
    Raises: UserError that says what is missing."""
    name, module = getattr(build, "__name__", str(build)), build(num_classes)
    if not isinstance(module, nn.Module):
        raise UserError(f"{name}({num_classes}) gives a {type(module).__name__}, and a torch.nn.Module is needed; {HELP}")
    given, modes = "two images of 64x128", {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = module.eval()(torch.zeros(TRIAL))
    except Exception as error:                                   # whatever is wrong in it
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{name} fails on {given} ({cause}); its forward takes (N, 3, H, W) of any H and W, {HELP}") from error
    finally:
        for part, training in modes.items():
            part.training = training
    wanted = f"forward must return feat (N, D, h, w) and logits (N, {num_classes}, h, w), both on one grid; {HELP}"
    if not (isinstance(result, tuple | list) and len(result) == 2 and all(isinstance(x, Tensor) for x in result)):
        kind = f"{len(result)} things" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        raise UserError(f"{name} returns {kind} for {given}: {wanted}")
    feat, logits = result
    fits = feat.dim() == logits.dim() == 4 and feat.shape[0] == 2 and feat.shape[2:] == logits.shape[2:]
    if not fits or logits.shape[:2] != (2, num_classes):
        raise UserError(f"{name} returns feat {tuple(feat.shape)} and logits {tuple(logits.shape)} for {given}: {wanted}")
    model = OwnNetwork(module, backbone, num_classes, feat.shape[1], structure)
    print(f"network: {name}, {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters, feat of {feat.shape[1]} "
          f"channels on 1/{TRIAL[2] // feat.shape[2]} of the image"
          + "; without a member `encoder`, all of it learns at the rate of new layers" * (not hasattr(module, "encoder")),
          flush=True)
    return model


def fill(model: OwnNetwork, found: dict[str, Tensor], strip: Callable, where: str, partial: bool) -> None:
    """Load a plain state dict into one's own network, by names without the prefixes that `strip` takes away. Prints what fits.
    Raises: UserError, unless `partial`, if a weight is missing or has another shape, or if one is left over."""
    own = model.module.state_dict()
    names = dict(zip(strip(own), own, strict=True))
    fitting = {names[key]: value for key, value in found.items() if key in names and value.shape == own[names[key]].shape}
    missing = [key for key in own if key not in fitting and not key.endswith("num_batches_tracked")]
    more = [key for key in found if key not in names]
    if (missing or more) and not partial:
        first = ", ".join([*missing, *more][:3])
        raise UserError(f"{where} does not fit this network: {len(missing)} of its weights are missing or have another shape, "
                        f"{len(more)} are left over ({first}, ...); give weights of it, or --partial-init to load what fits")
    model.module.load_state_dict(fitting, strict=False)
    model.complete = not missing
    print(f"{where}: {len(fitting)} keys matched, {len(missing)} missing, {len(more)} unexpected", flush=True)
