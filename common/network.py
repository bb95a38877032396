"""Your own network in place of DeepLab: what it needs, and how a run uses it. docs/network.md has an example.

    model = run.network(MyNetwork)                              # a class or function that takes the number of classes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from common.deeplab import DeepLab, Structure, at_least_float32
from common.files import UserError

HELP = "see docs/network.md"
TRIAL = (2, 3, 64, 128)                                          # shape of the images that check a network


class Network(Protocol):
    """What a torch.nn.Module needs so that the scripts can train it: this one method.

    Two more members are optional: `encoder`, the pretrained part, a module (for --freeze-bn encoder and affine, for the
    encoder's learning rate, and, if it is a torchvision ResNet, for bismap.py's --stm-backbone warmup); and
    `parameter_groups(lr, encoder_rate)`, which returns the optimizer's groups. Images are normalised with ImageNet's mean and
    standard deviation, or as --input says."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W), of any H and W -> feat (N, D, h, w) and logits (N, num_classes, h, w), both on one grid."""


class OwnNetwork(DeepLab):
    """Your module with the interface of DeepLab. Its exported weights are the state dict of `module`."""

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
        """The module's own groups, or the encoder at encoder_rate * lr and the rest at lr."""
        if hasattr(self.module, "parameter_groups"):
            return self.module.parameter_groups(lr, encoder_rate)
        inner = {id(parameter) for parameter in self.encoder.parameters()}
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        parts = [p for p in trained if id(p) not in inner], [p for p in trained if id(p) in inner]
        return [{"params": part, "lr": rate * lr} for part, rate in zip(parts, (1, encoder_rate)) if part]


def adopt(build: Callable[[int], nn.Module], backbone: str, num_classes: int, structure: Structure) -> OwnNetwork:
    """Build the network by `build(num_classes)` and check it with a forward pass of two small images. Prints one line.

    Args: backbone: the value of --backbone, not used; structure: its `input` is what the network expects.
    Raises: UserError that says what is missing."""
    name, module = getattr(build, "__name__", str(build)), build(num_classes)
    if not isinstance(module, nn.Module):
        raise UserError(f"{name}({num_classes}) returns a {type(module).__name__}, but a torch.nn.Module is needed; {HELP}")
    images, modes = "two images of 64x128", {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = module.eval()(torch.zeros(TRIAL))
    except Exception as error:                                   # a network can raise anything
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{name} fails on {images} ({cause}); forward must take (N, 3, H, W) of any H and W, {HELP}") from error
    finally:
        for part, training in modes.items():
            part.training = training
    requirement = f"forward must return feat (N, D, h, w) and logits (N, {num_classes}, h, w), both on one grid; {HELP}"
    if not (isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(x, Tensor) for x in output)):
        kind = f"{len(output)} values" if isinstance(output, tuple | list) else f"a {type(output).__name__}"
        raise UserError(f"{name} returns {kind} for {images}: {requirement}")
    feat, logits = output
    fits = feat.dim() == logits.dim() == 4 and feat.shape[0] == 2 and feat.shape[2:] == logits.shape[2:]
    if not fits or logits.shape[:2] != (2, num_classes):
        raise UserError(f"{name} returns feat {tuple(feat.shape)} and logits {tuple(logits.shape)} for {images}: {requirement}")
    model = OwnNetwork(module, backbone, num_classes, feat.shape[1], structure)
    print(f"network: {name}, {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters, feat has {feat.shape[1]} "
          f"channels at 1/{TRIAL[2] // feat.shape[2]} of the image size"
          + "; it has no member `encoder`, so all of it learns at the rate of new layers" * (not hasattr(module, "encoder")),
          flush=True)
    return model


def fill(model: OwnNetwork, state: dict[str, Tensor], strip: Callable, origin: str, partial: bool) -> None:
    """Load a plain state dict into your own network; `strip` removes wrappers' prefixes from the names. Prints the counts.
    Raises: UserError, unless `partial`, if a weight is missing, has another shape or is unexpected."""
    own = model.module.state_dict()
    names = dict(zip(strip(own), own, strict=True))
    fitting = {names[key]: value for key, value in state.items() if key in names and value.shape == own[names[key]].shape}
    missing = [key for key in own if key not in fitting and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in names]
    if (missing or unexpected) and not partial:
        first = ", ".join([*missing, *unexpected][:3])
        raise UserError(f"{origin} does not fit this network: {len(missing)} weights are missing or have another shape, "
                        f"{len(unexpected)} are unexpected ({first}, ...); give weights of this network, or --partial-init to "
                        "load those that fit")
    model.module.load_state_dict(fitting, strict=False)
    model.complete = not missing
    print(f"{origin}: {len(fitting)} keys matched, {len(missing)} missing, {len(unexpected)} unexpected", flush=True)
