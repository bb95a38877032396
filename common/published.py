"""Initial weights, and checkpoints of other projects: the family of a file, how its names map onto ours, the structure and
input that it needs.

    family                       recognised by                                   how its structure differs from ours
    AdaptSegNet, SIM, ADVENT     layer6.conv2d_list (layer5: an unused head)     Caffe's ResNet, BGR; two or four branches
    CLAN                         layer5 and layer6, both on layer4's channels    Caffe's ResNet, BGR; both heads are summed
    BDL, FDA                     layer5.conv2d_list                              Caffe's ResNet, BGR
    FADA                         feature_extractor and classifier                frozen batch norm without eps; VGG-16: BGR
    CAG                          decoder.last_conv.8                             RGB in [0, 1], not normalised
    BiSMAP                       decoder.last_conv.7                             nothing
    exports of this project      classifier.head, and a JSON file beside it      as the JSON file says

`recognise` says what a file holds, and `load_model` builds the network in the structure that its weights need.
`--input` gives what names and shapes do not tell, such as the input of Caffe's VGG-16 under torchvision's names; `--entry`
selects one of several networks in a file (`model`, `ema`, `teacher`).
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models.resnet import Bottleneck

from common.data import IMAGENET_MEAN, IMAGENET_STD
from common.deeplab import BACKBONES, DeepLab, Structure, make_network
from common.files import UserError, load, write_atomically, write_json

# The weights of the papers' years; torchvision's later IMAGENET1K_V2 come from a stronger training recipe.
IMAGENET = {name: models.get_model_weights(name).IMAGENET1K_V1 for name in BACKBONES}


class Input(NamedTuple):
    """What a network expects: (range * pixel - mean) / std, with pixels in [0, 1] and all values in this order of channels."""

    channels: str
    range: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


CAFFE_MEAN = (104.00698793, 116.66876762, 122.67891434)        # BGR; VGG-16's authors use 103.939, 116.779, 123.68
INPUTS = {
    "imagenet": Input("RGB", 1.0, IMAGENET_MEAN, IMAGENET_STD),
    "rgb": Input("RGB", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "rgb255": Input("RGB", 255.0, CAFFE_MEAN[::-1], (1.0, 1.0, 1.0)),
    "bgr255": Input("BGR", 255.0, CAFFE_MEAN, (1.0, 1.0, 1.0)),
}


def read_structure(values: dict | None, origin: str | Path) -> Structure:
    """A structure from the result of `asdict`; None: the default. Raises: UserError that names the file if it is invalid."""
    try:
        structure = Structure(**(values or {}))
        if structure.input == "bgr":                                       # its name in files of earlier versions
            structure = replace(structure, input="bgr255")
        for entry in fields(Structure):
            if type(getattr(structure, entry.name)) is not type(entry.default):
                raise ValueError(entry.name)
        if structure.input not in INPUTS or structure.branches not in (2, 4) or not 0 <= structure.bn_eps < 1:
            raise ValueError("value")
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin} asks for a structure that this version does not know ({values}); it is damaged or from "
                        "another version: use the version that wrote it") from error
    return structure


def describe(structure: Structure) -> str:
    """The differences from this project's structure, and the input, in words."""
    parts = ["stride on the 1x1 convolutions"] * structure.stride_first
    parts += ["dilation from the first block"] * structure.dilate_first
    parts += ["pooling rounded up"] * structure.ceil_mode
    parts += [f"a head of {structure.branches} branches"] * (structure.branches != 4)
    parts += [f"batch norm eps {structure.bn_eps:g}"] * (structure.bn_eps != 1e-5)
    values = {"imagenet": "ImageNet's mean and std", "rgb": "in [0, 1]"}.get(structure.input, "0-255 minus Caffe's mean")
    return ", ".join([*parts, f"input {INPUTS[structure.input].channels} {values}"])


CAFFE = Structure(stride_first=True, dilate_first=True, ceil_mode=True, input="bgr255")


# Files of other projects also hold NumPy arrays (CAG's anchors) and scalars (scores). These functions only rebuild arrays and
# numbers of the listed types. NumPy 2 renamed their module; files have either name.
NUMPY_VALUES = [
    np.ndarray, np.dtype, *map(type, map(np.dtype, (np.float64, np.float32, np.int64, np.int32, np.bool_))),
    *((function, f"{module}.multiarray.{function.__name__}") for module in ("numpy.core", "numpy._core")
      for function in (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])),
]


class Stub:
    """Stands for every class and function that `load_foreign` does not know: a call returns an empty dict, which the file may
    fill with plain values. The name in the file is only compared with a list; nothing is imported."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def load_foreign(path: str | Path, flag: str = "--init"):
    """`files.load` for a file of another project. Its authors' objects beside the weights (BiSMAP's settings, a scheduler, an
    optimizer) become stubs. As there, no code from the file runs. `flag`: the flag that gave the path, for messages."""
    unknown: list[str] = []
    try:
        if zipfile.is_zipfile(path):                                       # the format of torch.save since 1.6
            with torch.serialization.safe_globals(NUMPY_VALUES):
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                                                      # damaged: `load` reports it
        pass
    try:
        with torch.serialization.safe_globals([*NUMPY_VALUES, *((Stub, name) for name in unknown)]):
            return load(path, f"{flag} file", "give a state dict written by torch.save")
    except UserError as error:
        foreign = re.search(r"GLOBAL (\S+) was not an allowed", str(error.__cause__))
        if foreign and not zipfile.is_zipfile(path):
            raise UserError(f"{error}: it holds {foreign[1]}, which is not read from files of this old format; in the "
                            "project that wrote it, torch.save(model.state_dict(), FILE)") from error
        raise


class ConvertInput(nn.Module):
    """Convert images of this project's loaders (RGB, ImageNet's mean and std) to the input `INPUTS[name]`, (N, 3, H, W).

    So loaders, colour augmentation and pictures are the same for every network.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        expected = INPUTS[name]
        self.flip = expected.channels == "BGR"
        own_mean, own_std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD), dtype=torch.float64)
        mean, std = torch.tensor((expected.mean, expected.std), dtype=torch.float64)
        if self.flip:
            own_mean, own_std = own_mean.flip(0), own_std.flip(0)
        # Not persistent: the structure holds the input, so checkpoints have the same names with every input.
        for key, value in (("scale", expected.range * own_std / std), ("shift", (expected.range * own_mean - mean) / std)):
            self.register_buffer(key, value.view(3, 1, 1).to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flip(1) if self.flip else x) * self.scale + self.shift


def adapt(model: DeepLab) -> None:
    """Set a network's input, and for a DeepLab on a ResNet pooling, batch norm and strides, as its structure says, in place."""
    structure = model.structure
    if structure.input != "imagenet":
        model.prepare = ConvertInput(structure.input)
    for m in model.encoder.modules() if model.network in ("v2", "v3+") and model.backbone != "vgg16" else ():
        if isinstance(m, nn.MaxPool2d):
            m.ceil_mode = structure.ceil_mode
        if isinstance(m, _BatchNorm):
            m.eps = structure.bn_eps
        if isinstance(m, Bottleneck) and structure.stride_first:
            m.conv1.stride, m.conv2.stride = m.conv2.stride, m.conv1.stride


@dataclass
class Weights:
    """The content of a file: tensors by our names, and for a file of another project how to use them."""

    state: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)        # our name -> the file's
    structure: Structure = Structure()
    family: str = ""                                           # "" for torchvision's and this project's names
    network: str = ""                                          # v2 or v3+; "" fits both
    classifier: int = 0                                        # tensors of torchvision's classifier, left out
    left_out: tuple[str, ...] = ()                             # what else was left out, and why
    hint: str = ""                                             # ambiguities that names and shapes leave
    readings: dict[str, Structure] = field(default_factory=dict)    # structures by --input, if they depend on it

    @property
    def description(self) -> str:
        """For the printed line: family, structure and input, omitted parts."""
        return "".join(f"{part}; " for part in (self.family, describe(self.structure), self.hint, *self.left_out) if part)


# Entries in which the state dict is wrapped: by this project (state, model), by CAG and BiSMAP (named by the class), by others.
WRAPPERS = ("state", "model", "state_dict", "model_state", "model_state_dict", "DeepLab", "DeepLabV3_plus")
COPIES = re.compile(r"(?:^|_)(?:ema|teacher|student|avg|averaged)(?:_|$)")    # names of further copies of a network
WRAPPED = re.compile(r"^(?:(?:module|_orig_mod)\.)+")                  # before names: DataParallel's, torch.compile's,
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|model)\.)+")           # and that of a class around the network

RESNET = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
FADA = {"backbone.": "encoder.", "classifier.conv2d_list.": "head.branches."}
# A plain list of layers without pool4, so conv5's layers are one place lower than in torchvision; then fc6 and fc7.
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
    """Names of v3+'s decoder; its convolutions and batch norms are at these places of `last_conv`."""
    ours = ("decoder.0.0.", "decoder.0.1.", "decoder.1.0.", "decoder.1.1.", "head.")
    return {f"decoder.last_conv.{index}.": name for index, name in zip(indices, ours, strict=True)}


def unwrap(content, origin: str, entry: str | None = None) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Find the state dict in a file.

    Args: origin: the flag and the file, for messages; entry: the network to take if there are several.
    Returns: the tensors by their names without prefixes, {} if there are none; the names of the file's other content; and
        notes on other networks in the file, for the printed line.
    Raises: UserError for a pickled module, for several networks of which none is `model`, and for an unknown `entry`."""
    extra, notes, seen = [], [], []
    while isinstance(content, dict):
        if any("_modules" in getattr(value, "__dict__", {}) for value in (content, *content.values())):
            raise UserError(f"{origin} holds a pickled module, but no code from files is run: in the project that wrote it, "
                            "torch.save(model.state_dict(), FILE)")
        if all(isinstance(content.get(part), dict) for part in ("feature_extractor", "classifier")):            # FADA's
            extra += [str(key) for key in content if key not in ("feature_extractor", "classifier")]
            content = {**strip(content["feature_extractor"]),
                       **{f"classifier.{key}": value for key, value in strip(content["classifier"]).items()}}
        entries = networks(content)
        candidates = [name for name in (*WRAPPERS, *entries) if name in entries]
        if not entries:
            break
        seen += entries
        if entry not in entries and len(entries) > 1 and candidates[0] not in WRAPPERS:
            raise UserError(f"{origin} holds several networks ({', '.join(entries)}): pick one, for example --entry "
                            f"{candidates[0]}")
        chosen = entry if entry in entries else candidates[0]
        copies = [name for name in entries if name != chosen and COPIES.search(name)]
        notes += [f"entry {chosen}"] * (chosen not in WRAPPERS)
        notes += [f"beside it {', '.join(copies)} (--entry {copies[0]})"] if copies else []
        extra += [str(key) for key in content if key != chosen and not isinstance(content[key], Tensor)]
        content, entry = entries[chosen], None if chosen == entry else entry
    if entry:
        raise UserError(f"{origin} has no --entry {entry}; its networks are {', '.join(seen) or 'not in entries, omit it'}")
    return (strip(content) if isinstance(content, dict) else {}), extra, notes


def networks(content: dict) -> dict[str, dict]:
    """Entries that hold tensors; for a state dict with several networks (model., ema_model.), one entry per network."""
    def holds(value) -> bool:
        return isinstance(value, dict) and any(isinstance(x, Tensor) or isinstance(key, str) and holds(x)
                                               for key, x in value.items())      # numbers are keys in optimizers' states
    entries = {str(key): value for key, value in content.items() if holds(value)}
    if sum(isinstance(value, Tensor) for value in content.values()) > 1 and not any(name in entries for name in WRAPPERS):
        entries = {}                                             # this is the state dict, with other entries
    parts: dict[str, dict] = {}
    for key, value in ({} if entries else strip(content, WRAPPED)).items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, {})[rest] = value
    return parts if any(COPIES.search(name) for name in parts) else entries


def strip(state: dict, prefixes: re.Pattern = PREFIXES) -> dict[str, Tensor]:
    """The tensors of a state dict, by their names without the prefixes of wrappers."""
    return {prefixes.sub("", key): value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def recognise(content, origin: str, path: str | Path | None = None, branches: int | None = None,
              entry: str | None = None) -> Weights:
    """What a file holds, judged by the names and, if those are ambiguous, the shapes of its tensors.

    Args:
        content: of the file.
        origin: the flag and the file, for messages.
        path: the file; an export of this project has a JSON file beside it.
        branches: how many branches the head of a Caffe-style network sums; None: decide by `summed_branches`.
        entry: the network to take if there are several.
    Raises: UserError for an unknown family; it lists the first names and the expected ones.
    """
    tensors, extra, notes = unwrap(content, origin, entry)
    weights = recognise_names(tensors, extra, content, origin, path, branches)
    weights.left_out = (*notes, *weights.left_out)
    return weights


def recognise_names(tensors: dict[str, Tensor], extra: list[str], content, origin: str, path: str | Path | None,
                    branches: int | None) -> Weights:
    """`recognise` for the result of `unwrap`."""
    if not tensors:
        raise UserError(f"{origin} holds no state dict; give one, or a checkpoint whose entry \"model\" is one")

    def has(*prefixes: str) -> bool:
        return all(any(key.startswith(prefix) for key in tensors) for prefix in prefixes)

    if has("encoder."):                                                    # this project's names
        structures = content.get("structure")
        structure = structures.get("model") if isinstance(structures, dict) else None
        return Weights(tensors, structure=read_structure(structure, origin))
    if has("backbone.", "classifier.head."):
        side = read_side_file(path, origin)
        return Weights(*rename(tensors, EXPORTED)[:2], read_structure(side["structure"], origin),
                       f"an export of this project, DeepLab {side['network']}", side["network"])
    from_caffe = has("Scale.")                                             # initial weights converted from Caffe
    tensors = strip(tensors, re.compile(r"^Scale\."))
    for head, family in (("layer6", "AdaptSegNet, SIM or ADVENT"), ("layer5", "BDL, FDA or Caffe's own")):
        if has(f"{head}.conv2d_list.0.0."):
            raise UserError(f"{origin} has a head of normalised branches ({head}.conv2d_list.0.0), as MRNet and ProDA, which "
                            "is not built here; to start from its encoder, torch.save({'Scale.' + k: v for k, v in "
                            "state.items() if k[:6] not in ('layer5', 'layer6')}, FILE)")
        if has(f"{head}.conv2d_list.") or (from_caffe and head == "layer5"):
            weights = caffe_style(tensors, head, family, branches, origin)
            weights.hint = "CRST has these names too: --input imagenet" if head == "layer5" and not from_caffe else ""
            return weights
    if has("backbone.", "aspp.", "decoder.last_conv.8."):
        return published(tensors, V3PLUS | last_conv(0, 1, 4, 5, 8), Structure(input="rgb"), "CAG", "v3+", extra)
    if has("backbone.", "aspp.", "decoder.last_conv.7."):
        return published(tensors, V3PLUS | last_conv(0, 1, 3, 4, 7), Structure(), "BiSMAP", "v3+", extra)
    if has("backbone.conv1.", "classifier.conv2d_list."):
        # Its frozen batch norm has no counter and divides by the root of the variance, without eps.
        counted = any(key.endswith("num_batches_tracked") for key in tensors)
        weights = published(tensors, FADA, Structure() if counted else Structure(bn_eps=0.0), "FADA", "v2", extra)
        if "feature_extractor" not in content:
            weights.hint = "tllib's network on Caffe's ResNet has these names too: --input bgr255"
        weights.readings = {"bgr255": CAFFE}
        return weights
    if has("backbone.0.", "backbone.31.", "classifier.conv2d_list."):
        return published(tensors, FADA_VGG, Structure(input="bgr255"), "FADA, VGG-16", "v2", extra)
    if any(map(has, (*RESNET, "features."))):                              # torchvision's names
        state = {f"encoder.{key}": value for key, value in tensors.items() if not key.startswith(("fc.", "classifier."))}
        return Weights(state, {key: key.removeprefix("encoder.") for key in state}, classifier=len(tensors) - len(state))
    first = ", ".join(list(tensors)[:4])
    raise UserError(
        f"{origin} is of no known family: its first names are {first}; expected are layer6.conv2d_list.0.weight "
        "(AdaptSegNet, SIM, ADVENT), layer5.conv2d_list.0.weight (BDL, FDA), feature_extractor and classifier (FADA), "
        "decoder.last_conv.8.weight (CAG), decoder.last_conv.7.weight (BiSMAP), conv1.weight or features.0.weight "
        "(torchvision), encoder.conv1.weight (this project)")


def rename(tensors: dict[str, Tensor], table: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Returns: tensors by our names, our name -> the file's, and the file's names that begin with no key of `table`."""
    state, names, rest = {}, {}, []
    for key, value in tensors.items():
        prefix = next((prefix for prefix in table if key.startswith(prefix)), None)
        if prefix is None:
            rest.append(key)
        else:
            ours = table[prefix] + key.removeprefix(prefix)
            state[ours], names[ours] = value, key
    return state, names, rest


def published(tensors: dict[str, Tensor], table: dict[str, str], structure: Structure, family: str, network: str,
              extra: list[str]) -> Weights:
    """The weights of a family; `table` maps its names onto ours."""
    state, names, rest = rename(tensors, table)
    left_out = [f"left out {shortened(rest)}, not part of the network"] if rest else []
    left_out += [f"left out {shortened(extra)}, beside the network"] if extra else []
    return Weights(state, names, structure, f"{family}, DeepLab {network}", network, left_out=tuple(left_out))


def shortened(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def caffe_style(tensors: dict[str, Tensor], head: str, family: str, branches: int | None, origin: str) -> Weights:
    """The weights of a network on Caffe's ResNet. `head` is the layer that gives the output. If layer5 has as many input
    channels as layer6, it is a second head on layer4 (CLAN); else it is an unused head on layer3."""
    table = {part: f"encoder.{part}" for part in RESNET} | {f"{head}.conv2d_list.": "head.branches."}
    state, names, rest = rename(tensors, table)
    second = {key: tensors.get(f"layer5{file_name[6:]}") for key, file_name in names.items() if file_name.startswith("layer6.")}
    same = [x is not None and x.shape[1:] == state[key].shape[1:] for key, x in second.items() if key.endswith("weight")]
    other = [key for key in rest if head == "layer5" or not key.startswith("layer5.")]
    left_out = ["left out layer5, a head on layer3 for training only"] if len(other) < len(rest) and not any(same) else []
    left_out += [f"left out {shortened(other)}, not part of the network"] if other else []
    summed, why = (branches, "--branches") if branches else summed_branches(state)
    unused = [key for key in state if key.startswith("head.branches.") and int(key.split(".")[2]) >= summed]
    if unused:
        left_out.append(f"left out {len(unused)} tensors of the head's other branches")
    state = {key: value for key, value in state.items() if key not in unused}
    if any(same):
        if not all(x is not None and x.shape == state[key].shape for key, x in second.items() if key in state):
            raise UserError(f"{origin} has two heads on the same features, layer5 and layer6, as CLAN, but of different "
                            "shapes: it was cut or changed; give the whole file")
        state |= {key: state[key] + x for key, x in second.items() if key in state}     # convolutions are linear
        family, head = "CLAN", "of layer5 + layer6"
    return Weights(state, names, Structure(**(asdict(CAFFE) | {"branches": summed})), f"{family}, DeepLab v2, the head {head} "
                   f"sums {summed} branches ({why})", "v2", left_out=tuple(left_out))


def summed_branches(state: dict[str, Tensor]) -> tuple[int, str]:
    """How many branches the head of a Caffe-style file sums, and why.

    AdaptSegNet's and SIM's heads return inside their loop, after the second branch; ADVENT's have the same names and sum all
    four. Branches that are not summed get no gradient and no weight decay: they keep their normal initial weights of standard
    deviation 0.01. Trained branches have another one.
    """
    def untouched(branch: int) -> bool:
        weight = state.get(f"head.branches.{branch}.weight")
        if weight is None or weight.dim() != 4:
            return False
        weight = weight.double().flatten(1)                                # (K, 9 * 2048)
        sigma = (2 * weight.shape[1]) ** -0.5                              # error of the ratio below: 0.5 percent
        return bool((weight.std(dim=1) / 0.01 - 1).abs().max() < 6 * sigma)

    if untouched(2) and untouched(3) and not (untouched(0) and untouched(1)):
        return 2, "as in AdaptSegNet and SIM: the others are untrained; --branches 4 sums all"
    return 4, "as in ADVENT, BDL and FDA; --branches 2 for AdaptSegNet and SIM"


def load_model(network: str | Callable, backbone: str, num_classes: int, path: str | Path, partial_init: bool = False,
               branches: int | None = None, input: str | None = None, flag: str = "--init",
               entry: str | None = None) -> DeepLab:
    """Build a network with torchvision's ImageNet weights or a file's, in the structure that they need. Prints how many of a
    file's keys matched.

    A file holds torchvision's names (its classifier is left out), this project's names, a checkpoint of this project, an
    export, a checkpoint of a family in the table above, or the state dict of your own network. The counts omit
    num_batches_tracked, which frozen batch norm may lack.

    Args:
        network, backbone, num_classes: as for `deeplab.build_model`.
        path: the file, or "imagenet", which ignores the arguments below.
        partial_init: accept missing encoder keys and a head of another class count; load the keys that fit.
        branches: how many branches the head of a Caffe-style file sums; None: decide by `summed_branches`.
        input: what the network expects, a key of INPUTS; None: as recognised.
        flag: the flag that gave the path, for messages.
        entry: the network in the file to take if there are several.
    Returns: the network; `complete` says whether the file gave every weight, including the head's.
    Raises: UserError that names the file and the way out.
    """
    if path == "imagenet":
        model = make_network(network, backbone, num_classes)
        if not callable(network):                                          # your own keeps the weights of its constructor
            model.encoder.load_state_dict({key: value for key, value in imagenet_weights(backbone).items()
                                           if not key.startswith(("fc.", "classifier."))})
        return model
    origin, content = f"{flag} {path}", load_foreign(path, flag)
    if callable(network):
        from common.network import fill
        model = make_network(network, backbone, num_classes, Structure(input=input or "imagenet"))
        fill(model, unwrap(content, origin, entry)[0], strip, origin, partial_init)
        return model
    weights = recognise(content, origin, path, branches, entry)
    if weights.network not in ("", network):
        scripts = {"v2": "fada.py and sim.py", "v3+": "bismap.py, c2f.py and cag.py"}[weights.network]
        raise UserError(f"{origin} is {weights.family}, but this script's network is DeepLab {network}: it is for {scripts}")
    if input is not None:
        weights.structure, weights.hint = replace(weights.readings.get(input, weights.structure), input=input), ""
    model = make_network(network, backbone, num_classes, weights.structure)
    if not partial_init:
        check_fit(weights, model, origin)
    expected, given = model.state_dict(), weights.state
    fitting = {k: v for k, v in given.items() if k in expected and v.shape == expected[k].shape}
    counted = [k for k in expected if not k.endswith("num_batches_tracked")]
    missing = [k for k in counted if k not in fitting]
    encoder = [k for k in missing if k.startswith("encoder.")]
    unexpected = [k for k in given if k not in expected and not k.endswith("num_batches_tracked")]
    model.load_state_dict(fitting, strict=False)
    model.complete = not missing
    print(f"{origin}: {weights.description}{len(counted) - len(missing)} keys matched, {len(missing)} missing ({len(encoder)} "
          f"of the encoder), {len(unexpected)} unexpected, {weights.classifier} of a classifier left out")
    return model


def imagenet_weights(backbone: str) -> dict:
    """torchvision's ImageNet state dict, from its cache or by download. Raises: UserError if neither is available."""
    weights = IMAGENET[backbone]
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    try:
        return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:    # a download or a damaged file can raise any exception
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        problem = "cannot be read, delete it" if file.exists() else "is missing and could not be downloaded"
        raise UserError(f"ImageNet weights {file.name} in {file.parent}: the file {problem} ({cause}); put it there, or give "
                        "--init PATH (a file) or --init none (random weights)") from error


def check_fit(weights: Weights, model: DeepLab, origin: str) -> None:
    """Raise UserError unless the weights match the encoder exactly and their head, if any, has the right shape.

    A file with torchvision's or this project's names may lack a head; its other names are only counted.
    """
    expected, given, file_name = model.state_dict(), weights.state, weights.names
    missing = [k for k, value in expected.items()
               if not k.endswith("num_batches_tracked") and (k not in given or given[k].shape != value.shape)]
    encoder = [k for k in missing if k.startswith("encoder.")]
    if encoder:
        first = ", ".join([file_name.get(k, k) for k in given][:3])
        raise UserError(
            f"{origin} lacks {len(encoder)} encoder keys of {model.backbone}, or has them in another shape "
            f"({', '.join(encoder[:3])}, ...; its first names are {first}); give weights of this backbone, or --partial-init "
            "to load what fits")
    unexpected = [file_name[k] for k in given if k.startswith("encoder.") and k not in expected] if weights.family else []
    unexpected = [k for k in unexpected if not k.endswith("num_batches_tracked")]
    if unexpected:
        raise UserError(f"{origin} has {len(unexpected)} more encoder keys than {model.backbone} ({', '.join(unexpected[:3])}, "
                        "...); give the --backbone that it was trained with, or --partial-init to load what fits")
    misfit = [k for k in missing if k in given]
    if misfit:
        key = misfit[0]
        raise UserError(
            f"{origin} has {file_name.get(key, key)} of shape {tuple(given[key].shape)}, but with {model.num_classes} classes "
            f"it is {tuple(expected[key].shape)}; give weights of this class count, or --partial-init for a new head")
    if missing and weights.family and any(k.startswith("head.") for k in given):
        raise UserError(f"{origin} is {weights.family}, but lacks {len(missing)} of its keys (here {', '.join(missing[:3])}, "
                        "...): it was cut or changed; give the whole file, or --partial-init to load what fits")


def read_checkpoint(path: str | Path, first_stage: str, branches: int | None, entry: str | None = None) -> dict:
    """The content of `--from`: a checkpoint of this project, in which `entry`, if given, replaces the model. A network that
    others published counts as one that has finished the first stage. Raises: UserError for any other file."""
    content = load_foreign(path, "--from")
    if isinstance(content, dict) and isinstance(content.get("state"), dict) and "stage" in content:
        if entry and entry not in content["state"]:
            raise UserError(f"--from {path} has no --entry {entry}; it holds {', '.join(content['state'])}")
        content["state"] |= {"model": content["state"][entry]} if entry else {}
        structures = content.get("structure", {})
        known = {name: asdict(read_structure(values, f"--from {path}")) for name, values in structures.items()}
        return {**content, "structure": known} if known else content
    if not recognise(content, f"--from {path}", path, branches, entry).family:
        raise UserError(f"--from {path} is neither a checkpoint of this project nor a trained network of a known family: use "
                        "--init for initial weights and for weights of your own network")
    return {"stage": first_stage}


def read_weights(path: str | Path, flag: str = "--init") -> dict:
    """The state dict in a file, see `unwrap`. Raises: UserError if there is none."""
    tensors = unwrap(load_foreign(path, flag), f"{flag} {path}")[0]
    if not tensors:
        raise UserError(f"{flag} {path} holds no state dict; give one, or a checkpoint whose entry \"model\" is one")
    return tensors


# ------------------------------------------------------------------------------------------------------- exports


def export(path: Path, model: nn.Module, classes: tuple[str, ...]) -> None:
    """Write a plain state dict, and beside it a JSON file that describes the network.

    The names are those of torchvision's segmentation networks: `backbone.` + torchvision's names, and `classifier.` + the rest.
    Your own network keeps its names.
    """
    own = getattr(model, "module", None)
    state = own.state_dict() if own else {
        f"backbone.{key.removeprefix('encoder.')}" if key.startswith("encoder.") else f"classifier.{key}": value
        for key, value in model.state_dict().items()}
    write_atomically(path, lambda file: torch.save(state, file))
    write_json(side_file(path), {
        "file": path.name, "network": model.network, "backbone": model.backbone, "classes": list(classes),
        "structure": asdict(model.structure),
        "preprocessing": {"how": "(range * pixel - mean) / std, pixels in [0, 1], channels in this order",
                          **INPUTS[model.structure.input]._asdict()}})
    print(f"export: {path}, {side_file(path)}", flush=True)


def side_file(path: str | Path) -> Path:
    """The JSON file beside an export: g2c.pth -> g2c.json."""
    return Path(path).with_suffix(".json")


def read_side_file(path: str | Path | None, origin: str) -> dict:
    """Read the JSON file beside an export. Raises: UserError if it is missing or invalid."""
    try:
        side = json.loads(side_file(path or "").read_text(encoding="utf-8"))
        if side["network"] not in ("v2", "v3+") or not isinstance(side["structure"], dict):
            raise ValueError("network")
        return side
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{origin} is an export of this project, but the file {side_file(path or '')} beside it, which "
                        "describes the network, is missing or damaged; put it back") from error
