"""Published checkpoints: each family against a forward pass from its raw tensors, invalid files, round trips.

The files have exactly the published names. ResNet-50 replaces ResNet-101 if depth does not matter, and ResNet-18 if the
forward pass does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import cag
import fada
from common import files
from common.data import IMAGENET_MEAN, IMAGENET_STD
from common.deeplab import DeepLabV2, Structure, build_model, make_network
from common.files import UserError
from common.published import Stub, export, load_foreign, read_checkpoint, read_structure, read_weights, recognise
from common.run import Options, Run

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
K = 19


# ------------------------------------------------------------------------------------- files as they were published


def encoder(backbone: str, prefix: str, counters: bool = True) -> dict[str, Tensor]:
    """ResNet's names and shapes, the same in torchvision and Caffe; random values keep activations near 1."""
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, inner: int, size: int) -> None:
        state[f"{prefix}{name}.weight"] = torch.randn(out, inner, size, size) * (2 / (inner * size * size)) ** 0.5

    def norm(name: str, channels: int, last: bool = False) -> None:
        state.update(batch_norm(f"{prefix}{name}", channels, counters, 0.2 if last else 1.0))

    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    inner = 64
    for layer, (width, count) in enumerate(zip((64, 128, 256, 512), BLOCKS[backbone]), 1):
        for block in range(count):
            name = f"layer{layer}.{block}"
            for k, (out, into, size) in enumerate([(width, inner, 1), (width, width, 3), (4 * width, width, 1)], 1):
                conv(f"{name}.conv{k}", out, into, size)
                norm(f"{name}.bn{k}", out, last=k == 3)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * width, inner, 1)
                norm(f"{name}.downsample.1", 4 * width)
            inner = 4 * width
    return state


def batch_norm(name: str, channels: int, counters: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    var = 10 ** (3 * torch.rand(channels) - 3)                         # small enough that eps has an effect
    state = {f"{name}.weight": scale * (0.5 + torch.rand(channels)) * var.sqrt(), f"{name}.bias": 0.1 * torch.randn(channels),
             f"{name}.running_mean": 0.1 * torch.randn(channels), f"{name}.running_var": var}
    return state | ({f"{name}.num_batches_tracked": torch.tensor(7)} if counters else {})


def summed_head(prefix: str, channels: int = 2048, trained: int = 4) -> dict[str, Tensor]:
    """Four dilated convolutions; those after the first `trained` keep their initial weights."""
    state = {}
    for k in range(4):
        scale = 0.004 + 0.004 * torch.rand(K, 1, 1, 1) if k < trained else 0.01
        state[f"{prefix}conv2d_list.{k}.weight"] = scale * torch.randn(K, channels, 3, 3)
        state[f"{prefix}conv2d_list.{k}.bias"] = torch.randn(K)
    return state


def v3plus(backbone: str, last_conv: tuple[int, ...]) -> dict[str, Tensor]:
    state = encoder(backbone, "backbone.")

    def conv(name: str, out: int, inner: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, inner, size, size) * (2 / (inner * size * size)) ** 0.5

    for k, size in enumerate((1, 3, 3, 3), 1):
        conv(f"aspp.aspp{k}.atrous_conv", 256, 2048, size)
        state |= batch_norm(f"aspp.aspp{k}.bn", 256)
    conv("aspp.global_avg_pool.1", 256, 2048, 1)
    state |= batch_norm("aspp.global_avg_pool.2", 256)
    conv("aspp.conv1", 256, 1280, 1)
    state |= batch_norm("aspp.bn1", 256)
    conv("decoder.conv1", 48, 256, 1)
    state |= batch_norm("decoder.bn1", 48)
    for place, (out, inner, size) in zip(last_conv, [(256, 304, 3), (256, 0, 0), (256, 256, 3), (256, 0, 0), (K, 256, 1)]):
        if size:
            conv(f"decoder.last_conv.{place}", out, inner, size)
        else:
            state |= batch_norm(f"decoder.last_conv.{place}", out)
    state[f"decoder.last_conv.{last_conv[-1]}.bias"] = torch.randn(K)
    return state


# ------------------------------------------------------------------- forward passes, straight from the raw tensors


def norm(state: dict, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=eps)


def conv(state: dict, name: str, x: Tensor, **how) -> Tensor:
    bias = state.get(f"{name}.bias")
    return F.conv2d(x, state[f"{name}.weight"].double(), None if bias is None else bias.double(), **how)


def resnet(state: dict, prefix: str, x: Tensor, strides, dilations, first_dilations, caffe: bool = False,
           eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Outputs of layer1 and layer4. `dilations` per layer: one number, or one per block; `first_dilations`: first blocks."""
    x = norm(state, f"{prefix}bn1", conv(state, f"{prefix}conv1", x, stride=2, padding=3), eps).relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=caffe)
    for layer in range(1, 5):
        block = 0
        while f"{prefix}layer{layer}.{block}.conv1.weight" in state:
            name, stride = f"{prefix}layer{layer}.{block}", strides[layer - 1] if block == 0 else 1
            d = dilations[layer - 1]
            d = first_dilations[layer - 1] if block == 0 else d[block] if isinstance(d, tuple) else d
            y = norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x, stride=stride if caffe else 1), eps).relu()
            y = conv(state, f"{name}.conv2", y, stride=1 if caffe else stride, dilation=d, padding=d)
            y = norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", norm(state, f"{name}.bn2", y, eps).relu()), eps)
            if block == 0:
                x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride=stride), eps)
            x = (x + y).relu()
            block += 1
        if layer == 1:
            low = x
    return low, x


def branches(state: dict, prefix: str, x: Tensor, count: int) -> Tensor:
    return sum(conv(state, f"{prefix}conv2d_list.{k}", x, dilation=6 * k + 6, padding=6 * k + 6) for k in range(count))


def caffe_forward(state: dict, x: Tensor, head: str, count: int) -> Tensor:
    _, x = resnet(state, "", x, (1, 2, 1, 1), (1, 1, 2, 4), (1, 1, 2, 4), caffe=True)
    return branches(state, f"{head}.", x, count)


def fada_forward(state: dict, x: Tensor, eps: float) -> Tensor:
    _, x = resnet(state, "backbone.", x, (1, 2, 1, 1), (1, 1, 2, 4), (1, 1, 1, 2), eps=eps)
    return branches(state, "", x, 4)


def v3plus_forward(state: dict, x: Tensor, last_conv: tuple[int, ...]) -> Tensor:
    low, x = resnet(state, "backbone.", x, (1, 2, 2, 1), (1, 1, 1, (2, 4, 8)), (1, 1, 1, 2))
    parts = [conv(state, f"aspp.aspp{k}.atrous_conv", x, dilation=d, padding=p)
             for k, (d, p) in enumerate(((1, 0), (6, 6), (12, 12), (18, 18)), 1)]
    parts = [norm(state, f"aspp.aspp{k}.bn", part).relu() for k, part in enumerate(parts, 1)]
    pooled = norm(state, "aspp.global_avg_pool.2", conv(state, "aspp.global_avg_pool.1", F.adaptive_avg_pool2d(x, 1))).relu()
    parts.append(F.interpolate(pooled, x.shape[2:], mode="bilinear", align_corners=True))
    x = norm(state, "aspp.bn1", conv(state, "aspp.conv1", torch.cat(parts, dim=1))).relu()
    low = norm(state, "decoder.bn1", conv(state, "decoder.conv1", low)).relu()
    x = torch.cat([F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True), low], dim=1)
    a, b, c, d, e = (f"decoder.last_conv.{place}" for place in last_conv)
    x = norm(state, b, conv(state, a, x, padding=1)).relu()
    return conv(state, e, norm(state, d, conv(state, c, x, padding=1)).relu())


def small_file(trained: int = 2) -> dict[str, Tensor]:
    """AdaptSegNet's names on ResNet-18."""
    state = {key: value for key, value in models.resnet18().state_dict().items() if not key.startswith("fc.")}
    return state | summed_head("layer5.", 256) | summed_head("layer6.", 512, trained)


@pytest.fixture(scope="module")
def caffe() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return small_file()


# ---------------------------------------------------------------------------------------------------- the families


def bgr(pixels: Tensor) -> Tensor:
    return 255 * pixels.flip(1) - torch.tensor([104.00698793, 116.66876762, 122.67891434], dtype=torch.float64).view(3, 1, 1)


def imagenet(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


CAG, BISMAP = (0, 1, 4, 5, 8), (0, 1, 3, 4, 7)


def adaptsegnet(backbone: str = "resnet50", trained: int = 2, counters: bool = True) -> dict:
    return encoder(backbone, "", counters) | summed_head("layer5.", 1024) | summed_head("layer6.", trained=trained)


def clan() -> dict:
    return encoder("resnet50", "") | summed_head("layer5.") | summed_head("layer6.")


def fada_file(backbone: str = "resnet50", frozen: bool = True) -> dict:
    return {"iteration": 40000, "feature_extractor": encoder(backbone, "backbone.", not frozen), "classifier": summed_head(""),
            "model_D": {f"{name}.{part}": torch.randn(2, 2) for name in ("D.0", "D.2", "cls1", "cls2")
                        for part in ("weight", "bias")},
            "optimizer_fea": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}}


def wrapped(name: str, state: dict) -> dict:
    return {name: {"model_state": state, "optimizer_state": {"param_groups": []}, "scheduler_state": {"last_epoch": 3}},
            "iter": 9000, "best_iou": np.float64(0.5023)}


# name -> network, content of the file, --branches, input, forward pass of the content, words of the printed line
FAMILIES = {
    "AdaptSegNet": ("v2", adaptsegnet, None, bgr, lambda c, x: caffe_forward(c, x, "layer6", 2),
                    ["AdaptSegNet, SIM or ADVENT", "layer6 sums 2", "--branches 4", "left out layer5", "BGR"]),
    "AdaptSegNet by --branches": ("v2", lambda: adaptsegnet(trained=4), 2, bgr, lambda c, x: caffe_forward(c, x, "layer6", 2),
                                  ["sums 2 branches (--branches)", "left out 4 tensors"]),
    "ADVENT": ("v2", lambda: adaptsegnet(trained=4, counters=False), None, bgr, lambda c, x: caffe_forward(c, x, "layer6", 4),
               ["sums 4 branches", "--branches 2"]),
    "BDL": ("v2", lambda: {f"module.{k}": v for k, v in (encoder("resnet50", "") | summed_head("layer5.")).items()}, None, bgr,
            lambda c, x: caffe_forward({k.removeprefix("module."): v for k, v in c.items()}, x, "layer5", 4), ["BDL, FDA"]),
    "CLAN": ("v2", clan, None, bgr, lambda c, x: caffe_forward(c, x, "layer5", 4) + caffe_forward(c, x, "layer6", 4),
             ["CLAN, DeepLab v2, the head of layer5 + layer6 sums 4 branches", "BGR"]),
    "FADA, frozen": ("v2", fada_file, None, imagenet,
                     lambda c, x: fada_forward(c["feature_extractor"] | c["classifier"], x, 0.0),
                     ["FADA, DeepLab v2", "eps 0", "left out iteration, model_D, optimizer_fea"]),
    "FADA": ("v2", lambda: fada_file(frozen=False), None, imagenet,
             lambda c, x: fada_forward(c["feature_extractor"] | c["classifier"], x, 1e-5), ["FADA"]),
    "CAG": ("v3+", lambda: wrapped("DeepLab", v3plus("resnet50", CAG)), None, lambda pixels: pixels,
            lambda c, x: v3plus_forward(c["DeepLab"]["model_state"], x, CAG), ["CAG, DeepLab v3+", "RGB in [0, 1]"]),
    "BiSMAP": ("v3+", lambda: wrapped("DeepLabV3_plus", v3plus("resnet50", BISMAP)), None, imagenet,
               lambda c, x: v3plus_forward(c["DeepLabV3_plus"]["model_state"], x, BISMAP), ["BiSMAP, DeepLab v3+"]),
}


def without(state: dict, *parts: str) -> dict:
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def save(path: Path, content, **how) -> str:
    torch.save(content, path, **how)
    return str(path)


def fada_vgg_file() -> dict:
    """FADA's VGG-16: one list of layers, pool4 and pool5 left out of it, then fc6 and fc7."""
    state, inner = {}, 3
    for place, out in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31),
                          (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)):
        state[f"backbone.{place}.weight"] = torch.randn(out, inner, 3, 3) * (2 / (9 * inner)) ** 0.5
        state[f"backbone.{place}.bias"] = 0.1 * torch.randn(out)
        inner = out
    state["backbone.0.weight"] /= 50                                   # its input is in 0..255
    return {"iteration": 40000, "feature_extractor": state, "classifier": summed_head("", 1024)}


def fada_vgg_forward(content: dict, x: Tensor) -> Tensor:
    state = content["feature_extractor"]
    for place in (0, 2, "pool", 5, 7, "pool", 10, 12, 14, "pool", 17, 19, 21, 23, 25, 27, 29, 31):
        if place == "pool":
            x = F.max_pool2d(x, 2)
        else:
            d = 4 if place >= 29 else 2 if place >= 23 else 1
            x = conv(state, f"backbone.{place}", x, dilation=d, padding=d).relu()
    return branches(content["classifier"], "", x, 4)


def compare(model: nn.Module, content: dict, convert, forward) -> None:
    pixels = torch.rand(1, 3, 33, 64, dtype=torch.float64)                       # 64: rounding up gives one more column
    with torch.no_grad():
        logits = model.double().eval()(imagenet(pixels))[1]
        expected = forward(content, convert(pixels))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_its_own_networks_logits(name, tmp_path, capsys):
    network, write, count, convert, forward, words = FAMILIES[name]
    torch.manual_seed(0)
    content = write()
    path = save(tmp_path / "file.pth", content, _use_new_zipfile_serialization=name != "BDL")     # old files are not archives
    model = build_model(network, "resnet50", K, path, branches=count)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and all(word in line for word in [path, "0 missing", *words]), line
    assert model.complete and model.frozen_bn == "encoder"
    compare(model, content, convert, forward)


def test_fadas_vgg16(tmp_path, capsys):
    torch.manual_seed(0)
    content = fada_vgg_file()
    path = save(tmp_path / "file.pth", content)
    model = build_model("v2", "vgg16", K, path)
    line = capsys.readouterr().out
    for words in ("FADA, VGG-16, DeepLab v2", "input BGR 0-255", "left out iteration", " 0 missing"):
        assert words in line
    compare(model, content, bgr, fada_vgg_forward)
    compare(build_model("v2", "vgg16", K, path, input="imagenet"), content, imagenet, fada_vgg_forward)
    with pytest.raises(UserError, match="lacks 100 encoder keys of resnet18.*first names are backbone.0.weight"):
        build_model("v2", "resnet18", K, path)
    content["feature_extractor"].pop("backbone.29.bias")
    with pytest.raises(UserError, match="is FADA, VGG-16, DeepLab v2, but lacks 1 of its keys .here fc6.bias"):
        build_model("v2", "vgg16", K, save(tmp_path / "file.pth", content))


@pytest.mark.parametrize("network", ["v2", "v3+"])
def test_a_family_in_full_size(network, tmp_path):
    torch.manual_seed(0)
    if network == "v2":
        content = adaptsegnet("resnet101")
        assert len(content) == 2 * 8 + 6 * 104
        compare(build_model("v2", "resnet101", K, save(tmp_path / "file.pth", content)), content, bgr,
                lambda c, x: caffe_forward(c, x, "layer6", 2))
    else:
        content = v3plus("resnet101", CAG)
        compare(build_model("v3+", "resnet101", K, save(tmp_path / "file.pth", content)), content, lambda pixels: pixels,
                lambda c, x: v3plus_forward(c, x, CAG))


def test_a_two_branch_head_has_two_branches(tmp_path, caffe):
    model = build_model("v2", "resnet18", K, save(tmp_path / "file.pth", caffe)).eval()
    x = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        before = model(x)[1]
        changed = {key: value + 100 if "layer6.conv2d_list.2" in key or "layer6.conv2d_list.3" in key else value
                   for key, value in caffe.items()}
        path = save(tmp_path / "file.pth", changed)
        assert torch.equal(build_model("v2", "resnet18", K, path, branches=2).eval()(x)[1], before)
        assert not torch.allclose(build_model("v2", "resnet18", K, path, branches=4).eval()(x)[1], before)
    assert len(model.head.branches) == 2                 # every parameter has a gradient, as several processes need


def test_untrained_branches_are_recognised():
    def summed(trained: int, decay: float = 1.0) -> int:
        torch.manual_seed(0)
        state = {f"layer6.{key}": decay * value for key, value in summed_head("", trained=trained).items()}
        return recognise({"conv1.weight": torch.zeros(1), **state}, "--init x").structure.branches

    assert summed(2) == 2 and summed(4) == 4
    assert summed(0) == 4                                # nothing is trained: no difference
    assert summed(2, decay=0.95) == 4                    # weight decay alone is noticed
    assert recognise(small_file(2), "--init x").structure.branches == 2


def test_weights_converted_from_caffe_initialise_the_encoder(tmp_path, caffe, capsys):
    """AdaptSegNet's initial weights: `Scale.` before each name, a head of 21 classes or none."""
    content = {f"Scale.{key}": value for key, value in without(caffe, "conv2d_list", "num_batches_tracked").items()}
    model = build_model("v2", "resnet18", K, save(tmp_path / "file.pth", content))
    assert model.structure == Structure(True, True, True, 4, 1e-5, "bgr255") and not model.complete
    assert torch.equal(model.encoder.conv1.weight, content["Scale.conv1.weight"])
    content |= {f"Scale.{key}": value[:7] for key, value in summed_head("layer5.", 512).items()}
    path = save(tmp_path / "file.pth", content)
    with pytest.raises(UserError, match=r"layer5.conv2d_list.0.weight of shape \(7, .*19 classes.*--partial-init"):
        build_model("v2", "resnet18", K, path)
    assert not build_model("v2", "resnet18", K, path, partial_init=True).complete
    assert "BGR 0-255 minus Caffe's mean" in capsys.readouterr().out


def test_ambiguous_names_are_reported_and_overruled(tmp_path, capsys):
    """CRST has BDL's names and ImageNet's input; tllib has FADA's names and Caffe's network."""
    torch.manual_seed(0)
    content = encoder("resnet50", "") | summed_head("layer5.")
    path = save(tmp_path / "crst.pth", content)
    build_model("v2", "resnet50", K, path)
    assert "CRST has these names too: --input imagenet; " in capsys.readouterr().out
    compare(build_model("v2", "resnet50", K, path, input="imagenet"), content, imagenet, FAMILIES["BDL"][4])
    assert "CRST" not in capsys.readouterr().out
    flat = encoder("resnet50", "backbone.") | summed_head("classifier.")
    path = save(tmp_path / "tllib.pth", {"model": flat, "best_miou": 44.1})
    build_model("v2", "resnet50", K, path)
    assert "tllib's network on Caffe's ResNet has these names too: --input bgr255; " in capsys.readouterr().out
    model = build_model("v2", "resnet50", K, path, input="bgr255")
    compare(model, flat, bgr, lambda c, x: branches(c, "classifier.", resnet(
        c, "backbone.", x, (1, 2, 1, 1), (1, 1, 2, 4), (1, 1, 2, 4), caffe=True)[1], 4))
    build_model("v2", "resnet50", K, save(tmp_path / "fada.pth", fada_file()))
    assert "tllib" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.module.", "_orig_mod.module.",
                                    "model._orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix, tmp_path, caffe):
    path = save(tmp_path / "file.pth", {"state_dict": {f"{prefix}{key}": value for key, value in caffe.items()}})
    model = build_model("v2", "resnet18", K, path)
    assert model.complete and torch.equal(model.encoder.conv1.weight, caffe["conv1.weight"])


def test_one_of_several_networks(tmp_path, caffe, capsys):
    """`model` is the default and the others are reported; without it, --entry is required."""
    other = {key: value + 1 if value.is_floating_point() else value for key, value in caffe.items()}

    def loaded(content, **how) -> tuple[float, str]:
        capsys.readouterr()
        model = build_model("v2", "resnet18", K, save(tmp_path / "file.pth", content), **how)
        added = (model.encoder.conv1.weight - caffe["conv1.weight"]).mean().item()
        return round(added, 3), capsys.readouterr().out

    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": []}
    beside = {"epoch": 3, "optimizer": optimizer, "model": caffe, "model_ema": {"module." + k: v for k, v in other.items()}}
    added, line = loaded(beside)
    assert added == 0 and "beside it model_ema (--entry model_ema); " in line
    assert loaded(beside, entry="model_ema")[0] == 1 and loaded(beside, entry="model")[0] == 0
    added, line = loaded({"ema": other, "optimizer": optimizer, "epoch": 3})
    assert added == 1 and "entry ema; " in line                                # the only one
    flat = {f"module.model.{k}": v for k, v in caffe.items()} | {f"module.ema_model.{k}": v for k, v in other.items()}
    added, line = loaded({"state_dict": flat})
    assert added == 0 and "beside it ema_model (--entry ema_model); " in line
    assert loaded({"state_dict": flat}, entry="ema_model")[0] == 1
    two = {"student": caffe, "teacher": {"state_dict": other}, "optimizer": optimizer}
    assert loaded(two, entry="teacher")[0] == 1
    for content, entry, words in (
            (two, None, "holds several networks .student, teacher.: pick one, for example --entry student"),
            (beside, "teacher", "has no --entry teacher; its networks are model, model_ema"),
            (caffe, "ema", "has no --entry ema; its networks are not in entries, omit it")):
        with pytest.raises(UserError, match=words) as error:
            loaded(content, entry=entry)
        assert "file.pth" in str(error.value) and "\n" not in str(error.value)
    assert loaded({**caffe, "schema.weight": torch.zeros(1)})[0] == 0          # "ema" inside a word is no copy


def test_entry_on_the_command_line(city, tmp_path, caffe, capsys):
    """For --init, for a published --from file, and for this project's checkpoint; it defines the run."""
    path = save(tmp_path / "file.pth", {"student": without(caffe, "conv2d_list"), "teacher": caffe})
    flags = ["--data", str(city), "--runs", str(tmp_path / "runs"), *SMALL.split(), "--stage", "source"]
    flags += ["--source-iterations", "1"]
    fada.main([*flags, "--init", path, "--entry", "teacher"])
    assert "entry teacher; " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        fada.main([*flags, "--init", path, "--entry", "student"])
    assert "--entry (teacher -> student)" in capsys.readouterr().err
    fada.main([*flags, "--eval", "--from", path, "--entry", "teacher"])
    with pytest.raises(SystemExit):
        fada.main([*flags, "--eval", "--from", path, "--entry", "student"])
    assert "neither a checkpoint of this project nor a trained network" in capsys.readouterr().err
    own = torch.load(tmp_path / "runs/fada-gta5/source.pt", weights_only=True)
    own["state"]["teacher"] = {key: value + 1 for key, value in own["state"]["model"].items()}
    read = read_checkpoint(save(tmp_path / "own.pt", own), "source", None, "teacher")
    assert torch.equal(read["state"]["model"]["head.branches.0.bias"], own["state"]["model"]["head.branches.0.bias"] + 1)
    with pytest.raises(UserError, match="own.pt has no --entry ema; it holds model, teacher"):
        read_checkpoint(tmp_path / "own.pt", "source", None, "ema")


def normalised_head(prefix: str, channels: int) -> dict[str, Tensor]:
    """The head of ProDA and MRNet: branches of convolution and norm, a bottleneck, a 1x1 classifier."""
    state = {f"{prefix}conv2d_list.{k}.0.weight": torch.zeros(2, channels, 1 if k == 0 else 3, 1 if k == 0 else 3)
             for k in range(5)}
    state |= {f"{prefix}conv2d_list.{k}.1.weight": torch.zeros(2) for k in range(5)}
    return state | {f"{prefix}bottleneck.1.weight": torch.zeros(2, 10, 3, 3), f"{prefix}head.1.weight": torch.zeros(K, 2, 1, 1)}


def test_messages_on_unreadable_files_say_how_to_save_them(tmp_path, caffe, monkeypatch):
    plain = without(caffe, "conv2d_list")
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    old = {"args": argparse.Namespace(lr=0.1), "state_dict": caffe}
    cut = clan() | {"layer5.conv2d_list.1.bias": torch.zeros(3)}
    pickled = "holds a pickled module.*torch.save.model.state_dict.., FILE"
    cases = {
        "ProDA": ({"ResNet101": {"model_state": plain | normalised_head("layer5.", 512)}, "iter": 3},
                  r"layer5.conv2d_list.0.0., as MRNet and ProDA, .*torch.save\({'Scale.' \+ k: v for k, v in state.items"),
        "MRNet": (plain | normalised_head("layer5.", 256) | normalised_head("layer6.", 768), "layer6.conv2d_list.0.0.*Scale"),
        "module": (module, pickled), "inside": ({"model": module, "epoch": 3}, pickled),
        "beside": ({"model": 3, "ema": module}, pickled),
        "CLAN": (cut, "two heads on the same features, layer5 and layer6, as CLAN, but of different shapes"),
    }
    for name, (content, words) in cases.items():
        path = save(tmp_path / f"{name}.pth", content)
        with pytest.raises(UserError, match=words) as error:
            build_model("v2", "resnet18", K, path)
        assert path in str(error.value) and "\n" not in str(error.value)
    # The remedy works: ProDA's encoder as initial weights of Caffe's network.
    state = cases["ProDA"][0]["ResNet101"]["model_state"]
    path = save(tmp_path / "out.pth", {"Scale." + k: v for k, v in state.items() if k[:6] not in ("layer5", "layer6")})
    model = build_model("v2", "resnet18", K, path)
    assert model.structure.stride_first and torch.equal(model.encoder.conv1.weight, caffe["conv1.weight"])

    assert build_model("v2", "resnet18", K, save(tmp_path / "new.pth", old)).complete
    path = save(tmp_path / "old.pth", old, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="it holds argparse.Namespace, which is not read from files of this old format; .*save"):
        build_model("v2", "resnet18", K, path)


# ------------------------------------------------------------------------------------------------- what is refused


class Malicious:
    """Calls a function when a plain unpickler reads it."""

    def __init__(self, function=open, *args):
        self.call = function, args or ("pwned", "w")

    def __reduce__(self):
        return self.call


def test_files_that_do_not_fit(tmp_path, caffe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deeper = {key.replace("layer3.1.", "layer3.2."): value for key, value in caffe.items() if "layer3.1." in key}
    cases = {
        "encoder": (without(caffe, "layer3.0.conv1"),
                    "lacks 1 encoder keys .*layer3.0.conv1.weight.*first names are conv1.weight"),
        "head": (without(caffe, "layer6.conv2d_list.1"), "but lacks 2 of its keys .*head.branches.1.weight.*whole file"),
        "branch 0": (without(caffe, "layer6.conv2d_list.0"), "but lacks 2 of its keys .*head.branches.0.weight"),
        "deeper": (caffe | deeper, "more encoder keys than resnet18 .layer3.2.*--backbone"),
        "classes": ({key: value[:16] if "layer6" in key else value for key, value in caffe.items()},
                    r"layer6.conv2d_list.0.weight of shape \(16, .*with 19 classes"),
        "shapes": (caffe | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, "in another shape .encoder.conv1.weight"),
        "unknown": ({"net.a.weight": torch.zeros(1), "net.b.weight": torch.zeros(1)},
                    "no known family.*first names are net.a.weight, net.b.weight; expected are layer6.*FADA.*CAG.*torchvision"),
        "vit": ({"state_dict": {"module.blocks.0.weight": torch.zeros(1)}}, "first names are blocks.0.weight"),
        "empty": ({"state_dict": {}, "epoch": 3}, "holds no state dict"),
        "discriminator": ({"iteration": 3, "model_D": {"D.0.weight": torch.zeros(1)}}, "first names are D.0.weight"),
        "evil": ({"state_dict": Malicious(), "best": 3}, "holds no state dict"),
        "blocked": ({"state_dict": caffe, "best": Malicious(os.system, "touch pwned")}, "damaged or not a --init file"),
        "code": ({"x": np.random.default_rng}, "holds no state dict"),
        "v3+": ({f"{name}.weight": torch.zeros(1) for name in ("backbone.conv1", "aspp.conv1", "decoder.last_conv.8")},
                "is CAG, DeepLab v3., but this script's network is DeepLab v2: it is for bismap.py, c2f.py and cag.py"),
    }
    for name, (content, words) in cases.items():
        path = save(tmp_path / f"{name}.pth", content)
        with pytest.raises(UserError, match=words) as error:
            build_model("v2", "resnet18", K, path)
        assert path in str(error.value) and "\n" not in str(error.value)
    intact = (tmp_path / "head.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(intact[:-5000])
    torch.save(caffe, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "cut-legacy.pth").write_bytes((tmp_path / "legacy.pth").read_bytes()[:100_000])
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))
    for name in ("cut", "cut-legacy", "pickle"):
        with pytest.raises(UserError, match=f"{name}.pth is damaged or not a --init file .*; give a state dict"):
            build_model("v2", "resnet18", K, tmp_path / f"{name}.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def authors(monkeypatch):
    """Classes of BiSMAP's authors: yacs.config.CfgNode and schedulers.schedulers.PolynomialLR. They exist while a file is
    written, but not while it is read."""
    class CfgNode(dict):
        def __init__(self, **values):
            super().__init__(**values)
            self.__dict__["__immutable__"] = False

    class PolynomialLR(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            return self.base_lrs

    for module, cls in (("yacs.config", CfgNode), ("schedulers.schedulers", PolynomialLR)):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        for name in (module.split(".")[0], module):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        setattr(sys.modules[module], cls.__name__, cls)
    yield CfgNode, PolynomialLR


def test_bismap_as_its_authors_save_it(tmp_path, authors, monkeypatch, capsys):
    CfgNode, PolynomialLR = authors
    torch.manual_seed(0)
    content = wrapped("DeepLabV3_plus", v3plus("resnet50", BISMAP))
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()                                     # it has a momentum buffer
    content["DeepLabV3_plus"] |= {"optimizer_state": optimizer.state_dict(),
                                  "scheduler_state": {"finished": True, "after_scheduler": PolynomialLR(optimizer)}}
    content["configs"] = {"training": CfgNode(lr=5e-4, ddp=CfgNode(gpus=[0, 1], status=True), size=(896, 512), big=2**40)}
    path = save(tmp_path / "from_gta5_to_cityscapes_on_deeplabv3_plus_best_model.pkl", content)
    monkeypatch.undo()
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    for named in (b"cyacs.config\nCfgNode\n", b"cschedulers.schedulers\nPolynomialLR\n", b"ctorch.optim.sgd\nSGD\n"):
        assert named in pickled
    modules = set(sys.modules)
    model = build_model("v3+", "resnet50", K, path)
    line = capsys.readouterr().out
    assert "BiSMAP, DeepLab v3+" in line and " 0 missing" in line and "left out iter, best_iou, configs, ..." in line
    compare(model, content, imagenet, lambda c, x: v3plus_forward(c["DeepLabV3_plus"]["model_state"], x, BISMAP))
    assert not (set(sys.modules) - modules) & {"yacs", "yacs.config", "schedulers", "schedulers.schedulers"}
    loaded = load_foreign(path)                          # the objects are dicts of their content
    assert loaded["configs"]["training"]["ddp"]["gpus"] == [0, 1] and loaded["best_iou"] == 0.5023
    scheduler = loaded["DeepLabV3_plus"]["scheduler_state"]["after_scheduler"]
    assert type(loaded["configs"]["training"]) is type(scheduler) is OrderedDict
    with pytest.raises(UserError, match="damaged or not a checkpoint .UnpicklingError."):    # our checkpoints hold no objects
        files.load(path)


def hand_made(path: Path, code: bytes) -> str:
    """A file as torch.save writes it, but with `code` as its pickle."""
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in content.items():
            archive.writestr(name, code if name.endswith("data.pkl") else value)
    return str(path)


def test_no_file_runs_code(tmp_path, caffe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text("open('pwned', 'w')")         # an import would be enough
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(torch.serialization.get_safe_globals())
    touch = b"X\x0b\x00\x00\x00touch pwned"
    inert = {                                            # become empty dicts
        "open": Malicious(), "popen": Malicious(subprocess.Popen, ["touch", "pwned"]), "getattr": Malicious(getattr, 1, "real"),
        "eval": Malicious(eval, "open('pwned', 'w')"), "exec": Malicious(exec, "open('pwned', 'w')"), "function": print,
    }
    loaded = load_foreign(save(tmp_path / "inert.pth", {"state_dict": caffe, **inert}))
    assert all(loaded[name] == {} for name in inert if name != "function") and loaded["function"] is Stub
    assert recognise(loaded, "x").family and torch.equal(loaded["state_dict"]["conv1.weight"], caffe["conv1.weight"])
    for code in (b"\x80\x02cplanted\nrun\n)R.", b"\x80\x02cplanted\nRun\n)\x81}X\x01\x00\x00\x00a" + touch + b"sb.",
                 b"\x80\x02csubprocess\ngetoutput\n" + touch + b"\x85R."):
        assert load_foreign(hand_made(tmp_path / "hand.pth", code)) == {}
    refused = {
        "system": {"a": Malicious(os.system, "touch pwned")},
        "nested": {"a": [Malicious(os.execlp, "touch", "touch", "pwned")]},
        "object": np.array([Malicious(os.system, "touch pwned")], dtype=object)}
    paths = [save(tmp_path / f"{name}.pth", content) for name, content in refused.items()]
    for code in (b"cposix\nsystem\n" + touch + b"\x85R.",              # protocols 0 to 5, every kind of call
                 b"\x80\x02(" + touch + b"iposix\nsystem\n.", b"\x80\x02(cposix\nsystem\n" + touch + b"o.",
                 b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + touch + b"\x85R.",
                 b"\x80\x02ctorch\nos.system\n" + touch + b"\x85Rb.",
                 b"\x80\x02cplanted\nrun\n)R" + touch + b"\x85R."):
        paths.append(hand_made(tmp_path / f"hand{len(paths)}.pth", code))
    torch.save({"a": Malicious()}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(os.system, "touch pwned"), protocol=2))
    for path in (*paths, tmp_path / "legacy.pth", tmp_path / "plain.pth"):
        with pytest.raises(UserError, match="damaged or not a --init file"):
            load_foreign(path)
    assert not (tmp_path / "pwned").exists() and "planted" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == before       # stubs replace names only during reading


def test_numpy_values_load_and_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"score": np.float64(0.5), "count": np.int64(3), "array": np.arange(6.0).reshape(2, 3), "flag": np.bool_(True)}
    path = save(tmp_path / "values.pth", values)
    for old in (False, True):
        if old:                                          # NumPy 1's name of the module, in a file that is no archive
            torch.save(values, path, _use_new_zipfile_serialization=False)
            raw = Path(path).read_bytes()
            assert b"numpy._core.multiarray" in raw
            Path(path).write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        loaded = load_foreign(path)
        assert loaded["score"] == 0.5 and loaded["count"] == 3 and loaded["flag"]
        assert np.array_equal(loaded["array"], values["array"])
    for evil in (np.array([Malicious()], dtype=object), {"a": Malicious()}, np.load, np.random.RandomState(0)):
        path = save(tmp_path / "evil.pth", {"x": evil})
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            files.load(path)
        with contextlib.suppress(UserError):             # a stub, or refused
            assert load_foreign(path)["x"] in ({}, {"a": {}}, Stub)
    assert not (tmp_path / "pwned").exists()
    assert np.ndarray not in torch.serialization.get_safe_globals()    # the list is valid only during reading


def test_the_structure_in_files_of_earlier_versions():
    assert read_structure({"input": "bgr", "branches": 2}, "g2c.pt") == Structure(input="bgr255", branches=2)


@pytest.mark.parametrize("values", [{"stride": 1}, {"branches": 9}, {"input": "hsv"}, {"bn_eps": "0"}, {"ceil_mode": 1}, [3]])
def test_an_unknown_structure_is_refused(values):
    with pytest.raises(UserError, match="g2c.pt asks for a structure"):
        read_structure(values, "g2c.pt")


# -------------------------------------------------------------------------------------------- anchors of CAG's authors


def test_the_authors_anchors(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(19, 256))
    vectors[4] = 0                                       # never seen
    for content in ({"objective_vectors": vectors, "objective_num": np.ones(19)}, vectors):
        anchors = cag.read_anchors(save(tmp_path / "category_anchors", content), 19, 256)
        assert anchors.dtype == torch.float32 and anchors[4].isnan().all()
        seen = [k for k in range(19) if k != 4]
        torch.testing.assert_close(anchors[seen], torch.from_numpy(vectors[seen]).float())
    for content in ({"objective_vectors": vectors[:16]}, {"objective_vectors": np.zeros((19, 256), dtype=np.int64)},
                    {"objective_vectors": [1.0]}, {"objective_num": vectors}):
        with pytest.raises(UserError, match="where anchors are a float tensor"):
            cag.read_anchors(save(tmp_path / "category_anchors", content), 19, 256)


# ---------------------------------------------------------------------------------------------------- round trips


def test_a_structure_changes_the_forward_pass_and_not_the_weights():
    torch.manual_seed(0)
    model = build_model("v2", "resnet50", 3, "none").eval()
    x = torch.randn(1, 3, 33, 32)

    def built(structure: Structure) -> nn.Module:
        other = make_network("v2", "resnet50", 3, structure).eval()
        other.load_state_dict(model.state_dict(), strict=structure.branches == 4)
        return other

    with torch.no_grad():
        before = model(x)[1]
        assert torch.equal(built(Structure())(x)[1], before)
        assert built(Structure(ceil_mode=True))(x)[1].shape[3] == before.shape[3] + 1
        for structure in (Structure(stride_first=True), Structure(dilate_first=True), Structure(bn_eps=0.1),
                          Structure(input="rgb")):
            assert not torch.allclose(built(structure)(x)[1], before, atol=1e-6), structure
    assert len(model.state_dict()) == 326 and len(DeepLabV2("resnet50", 3, Structure(branches=2)).state_dict()) == 322


def logits_of(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return copy.deepcopy(model).cpu().eval()(torch.randn(1, 3, 33, 64))[1]


def test_through_our_own_checkpoint_and_export(tmp_path, caffe, capsys):
    model = build_model("v2", "resnet18", K, save(tmp_path / "file.pth", caffe))
    expected = logits_of(model)
    checkpoint = {"stage": "source", "state": {"model": model.state_dict()},
                  "structure": {"model": model.structure.__dict__}}
    own = save(tmp_path / "source.pt", checkpoint)
    assert torch.equal(logits_of(build_model("v2", "resnet18", K, own)), expected)

    path = tmp_path / "export.pth"
    export(path, model, tuple("abc"))
    assert f"export: {path}, {tmp_path / 'export.json'}" in capsys.readouterr().out
    state, about = torch.load(path, weights_only=True), json.loads((tmp_path / "export.json").read_text())
    (tmp_path / "export.json").unlink()
    with pytest.raises(UserError, match="the file .*export.json beside it.*put it back"):
        build_model("v2", "resnet18", K, path)
    (tmp_path / "export.json").write_text(json.dumps(about))
    again = build_model("v2", "resnet18", K, path)
    assert torch.equal(logits_of(again), expected) and again.complete
    assert about["preprocessing"]["channels"] == "BGR" and about["classes"] == ["a", "b", "c"]
    assert {"backbone.conv1.weight", "backbone.layer4.1.bn2.running_var", "classifier.head.branches.1.bias"} <= state.keys()
    with pytest.raises(UserError, match="this script's network is DeepLab v3.: it is for fada.py and sim.py"):
        build_model("v3+", "resnet18", K, path)
    assert set(read_weights(path)) == set(state)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(UserError, match="missing or damaged"):
        build_model("v2", "resnet18", K, path)


SMALL = ("--backbone resnet18 --workers 0 --source-size 64x32 --target-size 64x32 --batch-size 2 --adversarial-iterations 1 "
         "--no-distill --test-scales 1.0 --device cpu")


def test_a_script_evaluates_continues_and_exports(city, tmp_path, caffe, capsys):
    """fada.py --eval --init; --from after the source stage; its checkpoint and its export keep the structure."""
    path = save(tmp_path / "g2c.pth", caffe)
    flags = ["--data", str(city), "--runs", str(tmp_path / "runs"), *SMALL.split()]

    def table(*argv: str) -> list[list[str]]:
        capsys.readouterr()
        fada.main([*flags, *argv])
        printed = capsys.readouterr().out
        assert "mIoU" in printed
        return [line.split() for line in printed[printed.index("IoU in percent"):].splitlines()[3:]]

    evaluated = table("--eval", "--init", path)
    assert table("--eval", "--from", path) == evaluated
    fada.main([*flags, "--from", path, "--init", "none"])
    printed = capsys.readouterr().out
    assert "--from " in printed and "adversarial 1/1" in printed and "source 1/" not in printed
    saved = torch.load(tmp_path / "runs/fada-gta5/adversarial.pt", weights_only=True)
    assert saved["structure"] == {"model": {**Structure(True, True, True, 2, 1e-5, "bgr255").__dict__}}

    trained = table("--eval", "--from", str(tmp_path / "runs/fada-gta5/adversarial.pt"), "--export", str(tmp_path / "out.pth"))
    assert trained == table("--eval", "--init", str(tmp_path / "out.pth"))
    assert trained == table("--eval", "--from", str(tmp_path / "out.pth"))
    assert len(json.loads((tmp_path / "out.json").read_text())["classes"]) == 19


def test_what_from_refuses(city, tmp_path, caffe, capsys):
    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            fada.main(["--data", str(city), "--runs", str(tmp_path), *SMALL.split(), "--init", "none", *argv])
        assert stop.value.code == 2
        return capsys.readouterr().err

    headless = save(tmp_path / "a.pth", {f"Scale.{key}": value for key, value in caffe.items() if "conv2d_list" not in key})
    assert "--from" in (error := refused("--from", headless)) and "a.pth is no trained network with its head" in error
    plain = save(tmp_path / "b.pth", without(caffe, "conv2d_list"))
    assert "neither a checkpoint of this project nor a trained network" in refused("--from", plain)
    assert "is of no known family" in refused("--from", save(tmp_path / "c.pth", {"a": torch.zeros(1)}))
    assert "the name of the JSON file" in refused("--export", "out.json")


def test_stages_after_a_published_file(tmp_path, caffe, capsys):
    @dataclass
    class Config:
        """the method"""

    path = save(tmp_path / "file.pth", caffe)
    for stage, selected in ((None, ("second", "third")), ("third", ("third",))):
        options = Options(runs=str(tmp_path), tag=stage, from_=path, stage=stage, device="cpu", backbone="resnet18")
        run = Run("fada", Config(), options, {"first": 1, "second": 1, "third": 1})
        assert tuple(name for name in run.stages if run.pending(name)) == selected
        model = run.network("v2")
        assert run.latest == "file" and model.complete and model.structure.input == "bgr255" and model.frozen_bn == "encoder"
        assert torch.equal(model.encoder.conv1.weight, caffe["conv1.weight"])
        options.init = "none"
        assert not run.network("v2", fresh=True).complete and run.latest == "none"


def test_a_checkpoint_of_an_earlier_version_keeps_its_structure(tmp_path, caffe):
    model = build_model("v2", "resnet18", K, save(tmp_path / "file.pth", caffe))
    old = {**model.structure.__dict__, "input": "bgr"}                 # its former name
    checkpoint = {"method": "fada", "stage": "source", "state": {"model": model.state_dict()}, "structure": {"model": old}}
    assert read_checkpoint(save(tmp_path / "a.pt", checkpoint), "source", None)["structure"]["model"]["input"] == "bgr255"
    with pytest.raises(UserError, match="b.pt asks for a structure that this version does not know"):
        read_checkpoint(save(tmp_path / "b.pt", {**checkpoint, "structure": {"model": {"stride": 1}}}), "source", None)
    plain = {key: value for key, value in checkpoint.items() if key != "structure"}
    assert "structure" not in read_checkpoint(save(tmp_path / "c.pt", plain), "source", None)
