"""Checkpoints of other projects: which family a file is, how its names map onto ours, which structure and input it needs.

    family                       recognised by                                   what its structure differs in
    AdaptSegNet, SIM, ADVENT     layer6.conv2d_list (layer5: an unused head)     Caffe's ResNet, BGR; two or four branches
    BDL, FDA                     layer5.conv2d_list                              Caffe's ResNet, BGR
    FADA                         feature_extractor and classifier                frozen batch norm without eps; VGG-16: BGR
    CAG                          decoder.last_conv.8                             RGB in [0, 1], not normalised
    BiSMAP                       decoder.last_conv.7                             nothing
    exports of this project      classifier.head, and a JSON file beside it      as the JSON file says

Nothing here builds a network: `recognise` says what a file holds, and `DeepLab.configure` takes its structure.
What the names do not tell, such as the input of Caffe's VGG-16 under torchvision's names, `--input` says.
"""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.cli import UserError
from common.data import IMAGENET_MEAN, IMAGENET_STD, NUMPY_VALUES, load_tensors


class Input(NamedTuple):
    """What a network expects: (range * pixel - mean) / std of pixels in [0, 1], all in this order of channels."""

    channels: str
    range: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


CAFFE_MEAN = (104.00698793, 116.66876762, 122.67891434)        # BGR; VGG-16's authors have 103.939, 116.779, 123.68
INPUTS = {
    "imagenet": Input("RGB", 1.0, IMAGENET_MEAN, IMAGENET_STD),
    "rgb": Input("RGB", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "rgb255": Input("RGB", 255.0, CAFFE_MEAN[::-1], (1.0, 1.0, 1.0)),
    "bgr255": Input("BGR", 255.0, CAFFE_MEAN, (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Structure:
    """Where networks with the same weights differ; the defaults are this project's own."""

    stride_first: bool = False     # a bottleneck's stride is on its first 1x1 convolution, as in Caffe, not on its 3x3
    dilate_first: bool = False     # v2: the first blocks of layer3 and layer4 dilate by 2 and 4, as the others, not by 1 and 2
    ceil_mode: bool = False        # the max pooling rounds its size up
    branches: int = 4              # v2: how many dilated convolutions the head sums
    bn_eps: float = 1e-5           # of the encoder's batch norms
    input: str = "imagenet"        # what the images are turned into, a key of INPUTS

    @staticmethod
    def read(values: dict | None, where: str | Path) -> Structure:
        """From what `asdict` gave; None is the default. Raises: UserError naming the file if it is something else."""
        try:
            structure = Structure(**(values or {}))
            if structure.input == "bgr":                                   # the name in files of earlier versions
                structure = replace(structure, input="bgr255")
            for entry in fields(Structure):
                value, default = getattr(structure, entry.name), entry.default
                if type(value) is not type(default):
                    raise ValueError(entry.name)
            if structure.input not in INPUTS or structure.branches not in (2, 4) or not 0 <= structure.bn_eps < 1:
                raise ValueError("value")
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} asks for a structure that this version does not know ({values}); it is damaged or from "
                            "another version") from error
        return structure

    def __str__(self) -> str:
        parts = ["stride on the 1x1 convolutions"] * self.stride_first
        parts += ["dilation from the first block"] * self.dilate_first
        parts += ["pooling rounded up"] * self.ceil_mode
        parts += [f"a head of {self.branches} branches"] * (self.branches != 4)
        parts += [f"batch norm eps {self.bn_eps:g}"] * (self.bn_eps != 1e-5)
        values = {"imagenet": "ImageNet's mean and std", "rgb": "in [0, 1]"}.get(self.input, "0-255 minus Caffe's mean")
        return ", ".join([*parts, f"input {INPUTS[self.input].channels} {values}"])


CAFFE = Structure(stride_first=True, dilate_first=True, ceil_mode=True, input="bgr255")


class Stub:
    """What `load_foreign` makes of every class and function that it does not know: called or built, an empty dict, into which
    the file may put plain values. The name in the file is only compared with a list; nothing is imported."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def load_foreign(path: str | Path):
    """`data.load_tensors` for a file of another project, which may hold its authors' objects beside the weights (BiSMAP's
    settings, a scheduler, an optimizer): they become stubs. As there, no code of the file runs."""
    unknown: list[str] = []
    if zipfile.is_zipfile(path):                                           # as torch.save writes since 1.6
        with torch.serialization.safe_globals(NUMPY_VALUES):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Stub, name) for name in unknown]):
        return load_tensors(path)


class ConvertInput(nn.Module):
    """Images as this project's data gives them (RGB, ImageNet's mean and std) -> the input `INPUTS[name]`, (N, 3, H, W).

    The loaders, the colour changes of training and the pictures stay as they are, whatever network is trained.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        wanted = INPUTS[name]
        self.flip = wanted.channels == "BGR"
        own_mean, own_std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), dtype=torch.float64)
        mean, std = torch.tensor((wanted.mean, wanted.std), dtype=torch.float64)
        if self.flip:
            own_mean, own_std = own_mean.flip(0), own_std.flip(0)
        # Not persistent: the structure says it, and our checkpoints have the same names with every input.
        for key, value in (("scale", wanted.range * own_std / std), ("shift", (wanted.range * own_mean - mean) / std)):
            self.register_buffer(key, value.view(3, 1, 1).to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flip(1) if self.flip else x) * self.scale + self.shift


@dataclass
class Weights:
    """What a file holds: tensors by our names, and for a file of another project what to do with them."""

    state: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)        # our name -> the file's
    structure: Structure = Structure()
    family: str = ""                                           # "" for torchvision's and this project's names
    network: str = ""                                          # v2 or v3+; "" fits both
    classifier: int = 0                                        # tensors left out of torchvision's classifier
    left_out: tuple[str, ...] = ()                             # what else was left out, and why

    @property
    def description(self) -> str:
        """For the printed line: family, structure and input, what was left out."""
        return "".join(f"{part}; " for part in (self.family, self.structure, *self.left_out) if part)


# Entries in which the state dict is wrapped: by this project (state, model), by CAG and BiSMAP (named by the class), by others.
WRAPPERS = ("state", "model", "state_dict", "model_state", "model_state_dict", "DeepLab", "DeepLabV3_plus")

RESNET = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
FADA = {"backbone.": "encoder.", "classifier.conv2d_list.": "head.branches."}
# A plain list of layers without pool4, so that the layers of conv5 stand one place lower than torchvision's; then fc6 and fc7.
FADA_VGG = {**{f"backbone.{k}.": f"encoder.features.{k}." for k in range(23)},
            **{f"backbone.{k}.": f"encoder.features.{k + 1}." for k in range(23, 29)},
            "backbone.29.": "fc6.", "backbone.31.": "fc7.", "classifier.conv2d_list.": "head.branches."}
V3PLUS = {
    "backbone.": "encoder.",
    **{f"aspp.aspp{k + 1}.atrous_conv.": f"aspp.branches.{k}.0." for k in range(4)},
    **{f"aspp.aspp{k + 1}.bn.": f"aspp.branches.{k}.1." for k in range(4)},
    "aspp.global_avg_pool.1.": "aspp.pool.0.", "aspp.global_avg_pool.2.": "aspp.pool.1.",
    "aspp.conv1.": "aspp.project.0.", "aspp.bn1.": "aspp.project.1.",
    "decoder.conv1.": "low.0.", "decoder.bn1.": "low.1.",
}
EXPORTED = {"backbone.": "encoder.", "classifier.": ""}        # see `export`


def last_conv(*indices: int) -> dict[str, str]:
    """Names of v3+'s decoder, whose convolutions and batch norms stand at these places of `last_conv`."""
    ours = ("decoder.0.0.", "decoder.0.1.", "decoder.1.0.", "decoder.1.1.", "head.")
    return {f"decoder.last_conv.{index}.": name for index, name in zip(indices, ours, strict=True)}


def unwrap(content) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a file, without wrappers and prefixes ({} if there is none), and the names of what lies beside it."""
    beside: list[str] = []
    while isinstance(content, dict):
        if all(isinstance(content.get(part), dict) for part in ("feature_extractor", "classifier")):            # FADA's
            beside += [str(key) for key in content if key not in ("feature_extractor", "classifier")]
            content = {**strip(content["feature_extractor"]),
                       **{f"classifier.{key}": value for key, value in strip(content["classifier"]).items()}}
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return strip(content), beside
        beside += [str(key) for key in content if key != inner]
        content = content[inner]
    return {}, beside


def strip(state: dict, prefix: str = "module.") -> dict[str, Tensor]:
    """The tensors of a state dict, their names without a prefix, by default DataParallel's."""
    return {key.removeprefix(prefix): value for key, value in state.items()
            if isinstance(key, str) and isinstance(value, Tensor)}


def recognise(content, where: str, path: str | Path | None = None, branches: int | None = None) -> Weights:
    """What a file holds, by the names of its tensors.

    Args:
        content: of the file.
        where: the flag and the file, for messages.
        path: the file; an export of this project has a JSON file beside it.
        branches: how many branches the head of a Caffe-style network sums; None: decide by `summed_branches`.
    Raises: UserError for a family that is not known, listing the first names and what was expected.
    """
    found, beside = unwrap(content)
    if not found:
        raise UserError(f"{where} holds no state dict; give one, or a checkpoint whose entry \"model\" is one")

    def has(*prefixes: str) -> bool:
        return all(any(key.startswith(prefix) for key in found) for prefix in prefixes)

    if has("encoder."):                                                    # this project's names
        structures = content.get("structure")
        structure = structures.get("model") if isinstance(structures, dict) else None
        return Weights(found, structure=Structure.read(structure, where))
    if has("backbone.", "classifier.head."):
        side = read_side_file(path, where)
        return Weights(*rename(found, EXPORTED)[:2], Structure.read(side["structure"], where),
                       f"an export of this project, DeepLab {side['network']}", side["network"])
    from_caffe = has("Scale.")                                             # initial weights that were converted from Caffe
    found = strip(found, "Scale.")
    for head, family in (("layer6", "AdaptSegNet, SIM or ADVENT"), ("layer5", "BDL, FDA or Caffe's own")):
        if has(f"{head}.conv2d_list.") or (from_caffe and head == "layer5"):
            return caffe_style(found, head, family, branches)
    if has("backbone.", "aspp.", "decoder.last_conv.8."):
        return published(found, V3PLUS | last_conv(0, 1, 4, 5, 8), Structure(input="rgb"), "CAG", "v3+", beside)
    if has("backbone.", "aspp.", "decoder.last_conv.7."):
        return published(found, V3PLUS | last_conv(0, 1, 3, 4, 7), Structure(), "BiSMAP", "v3+", beside)
    if has("backbone.conv1.", "classifier.conv2d_list."):
        # Its frozen batch norm, which has no counter, divides by the root of the variance as it is.
        counted = any(key.endswith("num_batches_tracked") for key in found)
        return published(found, FADA, Structure() if counted else Structure(bn_eps=0.0), "FADA", "v2", beside)
    if has("backbone.0.", "backbone.31.", "classifier.conv2d_list."):
        return published(found, FADA_VGG, Structure(input="bgr255"), "FADA, VGG-16", "v2", beside)
    if any(map(has, (*RESNET, "features."))):                              # torchvision's names
        state = {f"encoder.{key}": value for key, value in found.items() if not key.startswith(("fc.", "classifier."))}
        return Weights(state, {key: key.removeprefix("encoder.") for key in state}, classifier=len(found) - len(state))
    first = ", ".join(list(found)[:4])
    raise UserError(
        f"{where} is of no family that is known here: its first names are {first}; expected are layer6.conv2d_list.0.weight "
        "(AdaptSegNet, SIM, ADVENT), layer5.conv2d_list.0.weight (BDL, FDA), feature_extractor and classifier (FADA), "
        "decoder.last_conv.8.weight (CAG), decoder.last_conv.7.weight (BiSMAP), conv1.weight or features.0.weight "
        "(torchvision), encoder.conv1.weight (this project)")


def rename(found: dict[str, Tensor], table: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Tensors by our names, the file's names by ours, and the names of the file that begin with no key of `table`."""
    state, names, rest = {}, {}, []
    for key, value in found.items():
        prefix = next((prefix for prefix in table if key.startswith(prefix)), None)
        if prefix is None:
            rest.append(key)
        else:
            ours = table[prefix] + key.removeprefix(prefix)
            state[ours], names[ours] = value, key
    return state, names, rest


def published(found: dict[str, Tensor], table: dict[str, str], structure: Structure, family: str, network: str,
              beside: list[str]) -> Weights:
    """The weights of a family whose names `table` maps."""
    state, names, rest = rename(found, table)
    left_out = [f"left out {shortened(rest)}, no part of the network"] if rest else []
    left_out += [f"left out {shortened(beside)}, beside the network"] if beside else []
    return Weights(state, names, structure, f"{family}, DeepLab {network}", network, left_out=tuple(left_out))


def shortened(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def caffe_style(found: dict[str, Tensor], head: str, family: str, branches: int | None) -> Weights:
    """The weights of a network on Caffe's ResNet; `head` is the layer that gives the output."""
    table = {part: f"encoder.{part}" for part in RESNET} | {f"{head}.conv2d_list.": "head.branches."}
    state, names, rest = rename(found, table)
    other = [key for key in rest if head == "layer5" or not key.startswith("layer5.")]
    left_out = ["left out layer5, a head on layer3 for training only"] if len(other) < len(rest) else []
    left_out += [f"left out {shortened(other)}, no part of the network"] if other else []
    summed, why = (branches, "--branches") if branches else summed_branches(state)
    unused = [key for key in state if key.startswith("head.branches.") and int(key.split(".")[2]) >= summed]
    if unused:
        left_out.append(f"left out {len(unused)} tensors of the head's other branches")
    state = {key: value for key, value in state.items() if key not in unused}
    return Weights(state, names, Structure(**(asdict(CAFFE) | {"branches": summed})), f"{family}, DeepLab v2, the head {head} "
                   f"sums {summed} branches ({why})", "v2", left_out=tuple(left_out))


def summed_branches(state: dict[str, Tensor]) -> tuple[int, str]:
    """How many branches the head of a Caffe-style file sums, and why.

    AdaptSegNet's and SIM's heads return inside their loop, after the second branch; ADVENT's, with the same names, sum all
    four. What is not summed gets no gradient, not even weight decay: branches 2 and 3 then still have the normal weights
    of standard deviation 0.01 that all were given, where trained ones have left it.
    """
    def untouched(branch: int) -> bool:
        weight = state.get(f"head.branches.{branch}.weight")
        if weight is None or weight.dim() != 4:
            return False
        weight = weight.double().flatten(1)                                # (K, 9 * 2048)
        sigma = (2 * weight.shape[1]) ** -0.5                              # of a relative standard deviation: 0.5 percent
        return bool((weight.std(dim=1) / 0.01 - 1).abs().max() < 6 * sigma)

    if untouched(2) and untouched(3) and not (untouched(0) and untouched(1)):
        return 2, "as AdaptSegNet's and SIM's: the others were never trained; --branches 4 sums all"
    return 4, "as ADVENT's, BDL's and FDA's; --branches 2 for AdaptSegNet's and SIM's"


# ------------------------------------------------------------------------------------------------------- exports


def export(path: str | Path, model: nn.Module, classes: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """What `--export` writes: a plain state dict, and the content of the JSON file beside it.

    The names are those of torchvision's segmentation networks: `backbone.` + torchvision's own, and `classifier.` + the rest.
    """
    state = {f"backbone.{key.removeprefix('encoder.')}" if key.startswith("encoder.") else f"classifier.{key}": value
             for key, value in model.state_dict().items()}
    expected = INPUTS[model.structure.input]
    return state, {"file": Path(path).name, "network": model.network, "backbone": model.backbone, "classes": list(classes),
                   "structure": asdict(model.structure),
                   "preprocessing": {"how": "(range * pixel - mean) / std, pixels in [0, 1], channels in this order",
                                     **expected._asdict()}}


def side_file(path: str | Path) -> Path:
    """The JSON file beside an export: g2c.pth -> g2c.json."""
    return Path(path).with_suffix(".json")


def read_side_file(path: str | Path | None, where: str) -> dict:
    """What the JSON file beside an export says. Raises: UserError if it is not there or says something else."""
    try:
        side = json.loads(side_file(path or "").read_text(encoding="utf-8"))
        if side["network"] not in ("v2", "v3+") or not isinstance(side["structure"], dict):
            raise ValueError("network")
        return side
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is an export of this project, but the file {side_file(path or '')} beside it, which says how "
                        "the network is built, is not there or damaged; put it back") from error
