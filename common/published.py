"""Initial weights, and checkpoints of other projects: which family a file is, how its names map onto ours, which structure
and input it needs.

    family                       recognised by                                   what its structure differs in
    AdaptSegNet, SIM, ADVENT     layer6.conv2d_list (layer5: an unused head)     Caffe's ResNet, BGR; two or four branches
    CLAN                         layer5 and layer6, both on layer4's channels    Caffe's ResNet, BGR; both heads are summed
    BDL, FDA                     layer5.conv2d_list                              Caffe's ResNet, BGR
    FADA                         feature_extractor and classifier                frozen batch norm without eps; VGG-16: BGR
    CAG                          decoder.last_conv.8                             RGB in [0, 1], not normalised
    BiSMAP                       decoder.last_conv.7                             nothing
    exports of this project      classifier.head, and a JSON file beside it      as the JSON file says

`recognise` says what a file holds, and `load_model` builds the network in the structure that its weights need.
What names and shapes do not tell, such as the input of Caffe's VGG-16 under torchvision's names, `--input` says; which
of several networks in a file is meant (`model`, `ema`, `teacher`), `--entry` says.
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


def read_structure(values: dict | None, where: str | Path) -> Structure:
    """From what `asdict` gave; None is the default. Raises: UserError naming the file if it is something else."""
    try:
        structure = Structure(**(values or {}))
        if structure.input == "bgr":                                       # the name in files of earlier versions
            structure = replace(structure, input="bgr255")
        for entry in fields(Structure):
            if type(getattr(structure, entry.name)) is not type(entry.default):
                raise ValueError(entry.name)
        if structure.input not in INPUTS or structure.branches not in (2, 4) or not 0 <= structure.bn_eps < 1:
            raise ValueError("value")
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} asks for a structure that this version does not know ({values}); it is damaged or from "
                        "another version") from error
    return structure


def describe(structure: Structure) -> str:
    """What is not this project's own, and the input."""
    parts = ["stride on the 1x1 convolutions"] * structure.stride_first
    parts += ["dilation from the first block"] * structure.dilate_first
    parts += ["pooling rounded up"] * structure.ceil_mode
    parts += [f"a head of {structure.branches} branches"] * (structure.branches != 4)
    parts += [f"batch norm eps {structure.bn_eps:g}"] * (structure.bn_eps != 1e-5)
    values = {"imagenet": "ImageNet's mean and std", "rgb": "in [0, 1]"}.get(structure.input, "0-255 minus Caffe's mean")
    return ", ".join([*parts, f"input {INPUTS[structure.input].channels} {values}"])


CAFFE = Structure(stride_first=True, dilate_first=True, ceil_mode=True, input="bgr255")


# Files of other projects hold NumPy arrays (CAG's anchors) and scalars (scores) too. These functions only rebuild arrays and
# numbers of the kinds listed. NumPy 2 renamed their module, files have both names.
NUMPY_VALUES = [
    np.ndarray, np.dtype, *map(type, map(np.dtype, (np.float64, np.float32, np.int64, np.int32, np.bool_))),
    *((function, f"{module}.multiarray.{function.__name__}") for module in ("numpy.core", "numpy._core")
      for function in (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])),
]


class Stub:
    """What `load_foreign` makes of every class and function that it does not know: called or built, an empty dict, into which
    the file may put plain values. The name in the file is only compared with a list; nothing is imported."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def load_foreign(path: str | Path, flag: str = "--init"):
    """`files.load` for a file of another project, which may hold its authors' objects beside the weights (BiSMAP's settings, a
    scheduler, an optimizer): they become stubs. As there, no code of the file runs. `flag` names the file, for messages."""
    unknown: list[str] = []
    try:
        if zipfile.is_zipfile(path):                                       # as torch.save writes since 1.6
            with torch.serialization.safe_globals(NUMPY_VALUES):
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                                                      # damaged: `load` says so
        pass
    try:
        with torch.serialization.safe_globals([*NUMPY_VALUES, *((Stub, name) for name in unknown)]):
            return load(path, f"{flag} file", "give a state dict written by torch.save")
    except UserError as error:
        foreign = re.search(r"GLOBAL (\S+) was not an allowed", str(error.__cause__))
        if foreign and not zipfile.is_zipfile(path):
            raise UserError(f"{error}: it holds {foreign[1]}, which is not read from files as old as this; where it loads, "
                            "torch.save(model.state_dict(), FILE)") from error
        raise


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


def adapt(model: DeepLab) -> None:
    """Give a network the input, and a DeepLab on a ResNet the pooling, batch norm and strides, of its structure, in place."""
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
    """What a file holds: tensors by our names, and for a file of another project what to do with them."""

    state: dict[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)        # our name -> the file's
    structure: Structure = Structure()
    family: str = ""                                           # "" for torchvision's and this project's names
    network: str = ""                                          # v2 or v3+; "" fits both
    classifier: int = 0                                        # tensors left out of torchvision's classifier
    left_out: tuple[str, ...] = ()                             # what else was left out, and why
    hint: str = ""                                             # what neither names nor shapes tell
    readings: dict[str, Structure] = field(default_factory=dict)    # by --input, where the structure depends on it

    @property
    def description(self) -> str:
        """For the printed line: family, structure and input, what was left out."""
        return "".join(f"{part}; " for part in (self.family, describe(self.structure), self.hint, *self.left_out) if part)


# Entries in which the state dict is wrapped: by this project (state, model), by CAG and BiSMAP (named by the class), by others.
WRAPPERS = ("state", "model", "state_dict", "model_state", "model_state_dict", "DeepLab", "DeepLabV3_plus")
COPIES = re.compile(r"(?:^|_)(?:ema|teacher|student|avg|averaged)(?:_|$)")    # names of one more copy of a network
WRAPPED = re.compile(r"^(?:(?:module|_orig_mod)\.)+")                  # before names: DataParallel's, torch.compile's,
PREFIXES = re.compile(r"^(?:(?:module|_orig_mod|model)\.)+")           # and that of a class around the network

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


def unwrap(content, where: str, entry: str | None = None) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Find the state dict in a file.

    Args: where: the flag and the file, for messages; entry: the one to take where there are several.
    Returns: the tensors by their names without prefixes, {} if there are none; the names of what lies beside them; and what
        the printed line says of other networks in the file.
    Raises: UserError for a whole pickled module, for several networks of which none is `model`, and for an unknown `entry`."""
    beside, notes, seen = [], [], []
    while isinstance(content, dict):
        if any("_modules" in getattr(value, "__dict__", {}) for value in (content, *content.values())):
            raise UserError(f"{where} holds a whole module, and no code of a file is run: in the project that wrote it, "
                            "torch.save(model.state_dict(), FILE)")
        if all(isinstance(content.get(part), dict) for part in ("feature_extractor", "classifier")):            # FADA's
            beside += [str(key) for key in content if key not in ("feature_extractor", "classifier")]
            content = {**strip(content["feature_extractor"]),
                       **{f"classifier.{key}": value for key, value in strip(content["classifier"]).items()}}
        found = networks(content)
        usual = [name for name in (*WRAPPERS, *found) if name in found]
        if not found:
            break
        seen += found
        if entry not in found and len(found) > 1 and usual[0] not in WRAPPERS:
            raise UserError(f"{where} holds several networks ({', '.join(found)}): pick one, for example --entry {usual[0]}")
        inner = entry if entry in found else usual[0]
        copies = [name for name in found if name != inner and COPIES.search(name)]
        notes += [f"entry {inner}"] * (inner not in WRAPPERS)
        notes += [f"beside it {', '.join(copies)} (--entry {copies[0]})"] if copies else []
        beside += [str(key) for key in content if key != inner and not isinstance(content[key], Tensor)]
        content, entry = found[inner], None if inner == entry else entry
    if entry:
        raise UserError(f"{where} has no --entry {entry}; its networks are {', '.join(seen) or 'not in entries, leave it out'}")
    return (strip(content) if isinstance(content, dict) else {}), beside, notes


def networks(content: dict) -> dict[str, dict]:
    """Entries that hold tensors; in a state dict with the weights of several networks (model., ema_model.), each one's."""
    def holds(value) -> bool:
        return isinstance(value, dict) and any(isinstance(x, Tensor) or isinstance(key, str) and holds(x)
                                               for key, x in value.items())      # numbers are keys in optimizers' states
    found = {str(key): value for key, value in content.items() if holds(value)}
    if sum(isinstance(value, Tensor) for value in content.values()) > 1 and not any(name in found for name in WRAPPERS):
        found = {}                                               # the state dict is here, with other things in it
    parts: dict[str, dict] = {}
    for key, value in ({} if found else strip(content, WRAPPED)).items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, {})[rest] = value
    return parts if any(COPIES.search(name) for name in parts) else found


def strip(state: dict, prefixes: re.Pattern = PREFIXES) -> dict[str, Tensor]:
    """The tensors of a state dict, their names without the prefixes that wrappers put before them."""
    return {prefixes.sub("", key): value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def recognise(content, where: str, path: str | Path | None = None, branches: int | None = None,
              entry: str | None = None) -> Weights:
    """What a file holds, by the names and, where those are ambiguous, the shapes of its tensors.

    Args:
        content: of the file.
        where: the flag and the file, for messages.
        path: the file; an export of this project has a JSON file beside it.
        branches: how many branches the head of a Caffe-style network sums; None: decide by `summed_branches`.
        entry: which of several networks is meant.
    Raises: UserError for a family that is not known, listing the first names and what was expected.
    """
    found, beside, notes = unwrap(content, where, entry)
    weights = recognise_names(found, beside, content, where, path, branches)
    weights.left_out = (*notes, *weights.left_out)
    return weights


def recognise_names(found: dict[str, Tensor], beside: list[str], content, where: str, path: str | Path | None,
                    branches: int | None) -> Weights:
    """`recognise` for what `unwrap` has found in a file's content."""
    if not found:
        raise UserError(f"{where} holds no state dict; give one, or a checkpoint whose entry \"model\" is one")

    def has(*prefixes: str) -> bool:
        return all(any(key.startswith(prefix) for key in found) for prefix in prefixes)

    if has("encoder."):                                                    # this project's names
        structures = content.get("structure")
        structure = structures.get("model") if isinstance(structures, dict) else None
        return Weights(found, structure=read_structure(structure, where))
    if has("backbone.", "classifier.head."):
        side = read_side_file(path, where)
        return Weights(*rename(found, EXPORTED)[:2], read_structure(side["structure"], where),
                       f"an export of this project, DeepLab {side['network']}", side["network"])
    from_caffe = has("Scale.")                                             # initial weights that were converted from Caffe
    found = strip(found, re.compile(r"^Scale\."))
    for head, family in (("layer6", "AdaptSegNet, SIM or ADVENT"), ("layer5", "BDL, FDA or Caffe's own")):
        if has(f"{head}.conv2d_list.0.0."):
            raise UserError(f"{where} has a head of normalised branches ({head}.conv2d_list.0.0), as MRNet and ProDA, which is "
                            "not built here; its encoder is initial weights, if saved by torch.save({'Scale.' + k: v for k, v "
                            "in state.items() if k[:6] not in ('layer5', 'layer6')}, FILE)")
        if has(f"{head}.conv2d_list.") or (from_caffe and head == "layer5"):
            weights = caffe_style(found, head, family, branches, where)
            weights.hint = "CRST has these names too: --input imagenet" if head == "layer5" and not from_caffe else ""
            return weights
    if has("backbone.", "aspp.", "decoder.last_conv.8."):
        return published(found, V3PLUS | last_conv(0, 1, 4, 5, 8), Structure(input="rgb"), "CAG", "v3+", beside)
    if has("backbone.", "aspp.", "decoder.last_conv.7."):
        return published(found, V3PLUS | last_conv(0, 1, 3, 4, 7), Structure(), "BiSMAP", "v3+", beside)
    if has("backbone.conv1.", "classifier.conv2d_list."):
        # Its frozen batch norm, which has no counter, divides by the root of the variance as it is.
        counted = any(key.endswith("num_batches_tracked") for key in found)
        weights = published(found, FADA, Structure() if counted else Structure(bn_eps=0.0), "FADA", "v2", beside)
        if "feature_extractor" not in content:
            weights.hint = "tllib's network on Caffe's ResNet has these names too: --input bgr255"
        weights.readings = {"bgr255": CAFFE}
        return weights
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


def caffe_style(found: dict[str, Tensor], head: str, family: str, branches: int | None, where: str) -> Weights:
    """The weights of a network on Caffe's ResNet; `head` is the layer that gives the output, in CLAN with layer5, whose
    channels say whether it is one of two heads on layer4 or the unused one on layer3."""
    table = {part: f"encoder.{part}" for part in RESNET} | {f"{head}.conv2d_list.": "head.branches."}
    state, names, rest = rename(found, table)
    second = {key: found.get(f"layer5{file_name[6:]}") for key, file_name in names.items() if file_name.startswith("layer6.")}
    same = [x is not None and x.shape[1:] == state[key].shape[1:] for key, x in second.items() if key.endswith("weight")]
    other = [key for key in rest if head == "layer5" or not key.startswith("layer5.")]
    left_out = ["left out layer5, a head on layer3 for training only"] if len(other) < len(rest) and not any(same) else []
    left_out += [f"left out {shortened(other)}, no part of the network"] if other else []
    summed, why = (branches, "--branches") if branches else summed_branches(state)
    unused = [key for key in state if key.startswith("head.branches.") and int(key.split(".")[2]) >= summed]
    if unused:
        left_out.append(f"left out {len(unused)} tensors of the head's other branches")
    state = {key: value for key, value in state.items() if key not in unused}
    if any(same):
        if not all(x is not None and x.shape == state[key].shape for key, x in second.items() if key in state):
            raise UserError(f"{where} has two heads on the same features, layer5 and layer6, as CLAN, but of different shapes: "
                            "it was cut or changed; give the whole file")
        state |= {key: state[key] + x for key, x in second.items() if key in state}     # convolutions are linear
        family, head = "CLAN", "of layer5 + layer6"
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


def load_model(network: str | Callable, backbone: str, num_classes: int, path: str | Path, partial_init: bool = False,
               branches: int | None = None, input: str | None = None, flag: str = "--init",
               entry: str | None = None) -> DeepLab:
    """The network with torchvision's ImageNet weights, or with those of a file, in the structure that they need. Prints what
    of a file matched.

    A file holds torchvision's names (its classifier is left out), this project's names, a checkpoint of this project, an
    export, a checkpoint of a family in the table above, or the state dict of one's own network. The counts leave out
    num_batches_tracked, which frozen batch norms need not have.

    Args:
        network, backbone, num_classes: as for `deeplab.build_model`.
        path: the file, or "imagenet", for which the other arguments mean nothing.
        partial_init: accept missing encoder keys and a head of another class count; what fits is loaded.
        branches: how many branches the head of a Caffe-style file sums; None: decide by `summed_branches`.
        input: what the network expects, a key of INPUTS; None: as recognised.
        flag: gave the path, for messages.
        entry: which of several networks in the file is meant.
    Returns: the network; `complete` says whether the file gave every weight, the head's too.
    Raises: UserError naming the file and the way out.
    """
    if path == "imagenet":
        model = make_network(network, backbone, num_classes)
        if not callable(network):                                          # one's own starts as its constructor makes it
            model.encoder.load_state_dict({key: value for key, value in imagenet_weights(backbone).items()
                                           if not key.startswith(("fc.", "classifier."))})
        return model
    where, content = f"{flag} {path}", load_foreign(path, flag)
    if callable(network):
        from common.network import fill
        model = make_network(network, backbone, num_classes, Structure(input=input or "imagenet"))
        fill(model, unwrap(content, where, entry)[0], strip, where, partial_init)
        return model
    weights = recognise(content, where, path, branches, entry)
    if weights.network not in ("", network):
        scripts = {"v2": "fada.py and sim.py", "v3+": "bismap.py, c2f.py and cag.py"}[weights.network]
        raise UserError(f"{where} is {weights.family}, but this script's network is DeepLab {network}: it is for {scripts}")
    if input is not None:
        weights.structure, weights.hint = replace(weights.readings.get(input, weights.structure), input=input), ""
    model = make_network(network, backbone, num_classes, weights.structure)
    if not partial_init:
        check_fit(weights, model, where)
    own, named = model.state_dict(), weights.state
    fitting = {k: v for k, v in named.items() if k in own and v.shape == own[k].shape}
    counted = [k for k in own if not k.endswith("num_batches_tracked")]
    missing = [k for k in counted if k not in fitting]
    encoder = [k for k in missing if k.startswith("encoder.")]
    unexpected = [k for k in named if k not in own and not k.endswith("num_batches_tracked")]
    model.load_state_dict(fitting, strict=False)
    model.complete = not missing
    print(f"{where}: {weights.description}{len(counted) - len(missing)} keys matched, {len(missing)} missing ({len(encoder)} "
          f"of the encoder), {len(unexpected)} unexpected, {weights.classifier} of a classifier left out")
    return model


def imagenet_weights(backbone: str) -> dict:
    """torchvision's ImageNet state dict, from its cache or its download; UserError where neither is available."""
    weights = IMAGENET[backbone]
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[-1])
    try:
        return weights.get_state_dict(map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:    # a download or a damaged file raises almost anything
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        why = "cannot be read, delete it" if file.exists() else "is not there and did not download"
        raise UserError(f"ImageNet weights {file.name} in {file.parent}: the file {why} ({cause}); put it there, or give "
                        "--init PATH (a file) or --init none (random weights)") from error


def check_fit(weights: Weights, model: DeepLab, where: str) -> None:
    """UserError unless the weights fill the encoder with nothing left over and the head, if they have one, has its shape.

    Of a file in torchvision's or this project's names, a head may be absent and other names are only counted.
    """
    own, named, file_name = model.state_dict(), weights.state, weights.names
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


def read_checkpoint(path: str | Path, first_stage: str, branches: int | None, entry: str | None = None) -> dict:
    """What `--from` holds: a checkpoint of this project, whose `entry` stands for its model; a trained network that others
    published counts as a model that has finished the first stage. Raises: UserError for another file."""
    content = load_foreign(path, "--from")
    if isinstance(content, dict) and isinstance(content.get("state"), dict) and "stage" in content:
        if entry and entry not in content["state"]:
            raise UserError(f"--from {path} has no --entry {entry}; it holds {', '.join(content['state'])}")
        content["state"] |= {"model": content["state"][entry]} if entry else {}
        structures = content.get("structure", {})
        known = {name: asdict(read_structure(values, f"--from {path}")) for name, values in structures.items()}
        return {**content, "structure": known} if known else content
    if not recognise(content, f"--from {path}", path, branches, entry).family:
        raise UserError(f"--from {path} is neither a checkpoint of this project nor a trained network of a family that is "
                        "known here; initial weights, and those of one's own network, load by --init")
    return {"stage": first_stage}


def read_weights(path: str | Path, flag: str = "--init") -> dict:
    """The state dict in a file, see `unwrap`. Raises: UserError where there is none."""
    found = unwrap(load_foreign(path, flag), f"{flag} {path}")[0]
    if not found:
        raise UserError(f"{flag} {path} holds no state dict; give one, or a checkpoint whose entry \"model\" is one")
    return found


# ------------------------------------------------------------------------------------------------------- exports


def export(path: Path, model: nn.Module, classes: tuple[str, ...]) -> None:
    """Write a plain state dict, and beside it a JSON file that says how the network is built.

    The names are those of torchvision's segmentation networks: `backbone.` + torchvision's own, and `classifier.` + the rest;
    one's own network keeps its names.
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
