"""DeepLab v2 and v3+: sizes, shapes, dilation, frozen batch norm, and loading weights without silence."""

from __future__ import annotations

import copy
import pickle
import urllib.error

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.transforms.v2.functional import normalize

from common.data import IMAGENET_MEAN, IMAGENET_STD
from common.deeplab import (
    ASPP,
    DeepLabV2,
    DeepLabV3Plus,
    SummedASPP,
    build_model,
    dilate,
    make_network,
    resnet_encoder,
    upsample,
)
from common.files import UserError
from common.published import load_model

CLASSES = {"v2": DeepLabV2, "v3+": DeepLabV3Plus}


def on_meta(network: str, backbone: str, num_classes: int = 19) -> nn.Module:
    with torch.device("meta"):
        return CLASSES[network](backbone, num_classes)


@pytest.mark.parametrize("network, backbone, parameters, feat_shape, small_shape", [
    ("v2", "resnet101", 43_901_068, (2048, 9, 9), (2048, 5, 5)),
    ("v2", "resnet50", 24_908_940, (2048, 9, 9), (2048, 5, 5)),
    ("v2", "resnet18", 11_526_796, (512, 9, 9), (512, 5, 5)),
    ("v2", "vgg16", 29_573_004, (1024, 8, 8), (1024, 4, 4)),
    ("v3+", "resnet101", 59_343_795, (256, 17, 17), (256, 9, 9)),
    ("v3+", "resnet50", 40_351_667, (256, 17, 17), (256, 9, 9)),
    ("v3+", "resnet18", 16_607_667, (256, 17, 17), (256, 9, 9)),
])
def test_size_and_shapes(network, backbone, parameters, feat_shape, small_shape):
    model = on_meta(network, backbone)
    assert sum(p.numel() for p in model.parameters()) == parameters
    feat, logits = model(torch.zeros(2, 3, 65, 65, device="meta"))
    assert feat.shape == (2, *feat_shape) and logits.shape == (2, 19, *feat_shape[1:])
    assert model.feat_channels == feat_shape[0] and model.num_classes == 19
    feat, _ = model(torch.zeros(1, 3, 33, 33, device="meta"))
    assert feat.shape == (1, *small_shape)


def test_v3plus_has_the_published_size():
    assert f"{sum(p.numel() for p in on_meta('v3+', 'resnet101').parameters()) / 1e6:.2f}" == "59.34"


def test_v3plus_strides_and_multi_grid():
    encoder = on_meta("v3+", "resnet50").encoder
    assert [block.conv2.dilation for block in encoder.layer4] == [(2, 2), (4, 4), (8, 8)]
    assert {block.conv2.dilation for block in encoder.layer3} == {(1, 1)}
    assert encoder.layer3[0].conv2.stride == (2, 2) and encoder.layer4[0].conv2.stride == (1, 1)
    small = on_meta("v3+", "resnet18").encoder
    assert [(b.conv1.dilation[0], b.conv2.dilation[0]) for b in small.layer4] == [(2, 2), (4, 4)]


def test_v2_dilation_is_torchvisions():
    ours = on_meta("v2", "resnet50").encoder
    with torch.device("meta"):
        reference = models.resnet50(replace_stride_with_dilation=[False, True, True])
    convs = {name: m for name, m in reference.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 53
    for name, conv in convs.items():
        conv_here = ours.get_submodule(name)
        assert (conv_here.stride, conv_here.dilation, conv_here.padding) == (conv.stride, conv.dilation, conv.padding), name


def test_dilated_basic_blocks_keep_the_strided_values():
    """Every fourth feature of the dilated encoder is what the undilated one computes, borders included."""
    torch.manual_seed(0)
    encoder = resnet_encoder("resnet18").double().eval()
    x = torch.randn(1, 128, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        strided = encoder.layer4(encoder.layer3(x))
        dilate(encoder.layer3, 1, [2] * len(encoder.layer3))
        dilate(encoder.layer4, 2, [4] * len(encoder.layer4))
        dilated = encoder.layer4(encoder.layer3(x))
    assert dilated.shape[2:] == (9, 7)
    torch.testing.assert_close(dilated[:, :, ::4, ::4], strided, rtol=1e-10, atol=1e-10)


def test_encoders_keep_torchvisions_names():
    for backbone in ("resnet18", "vgg16"):
        ours = set(on_meta("v2", backbone).encoder.state_dict())
        with torch.device("meta"):
            reference = set(getattr(models, backbone)().state_dict())
        assert ours == {k for k in reference if not k.startswith(("fc.", "classifier."))}


def test_vgg16_against_its_definition():
    torch.manual_seed(0)
    model = DeepLabV2("vgg16", 3).eval()
    with torch.no_grad():
        x = y = torch.randn(1, 3, 40, 33)
        convs = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
        for i, conv in enumerate(convs):
            d = 2 if i >= 10 else 1
            y = F.conv2d(y, conv.weight, conv.bias, padding=d, dilation=d).relu()
            if i in (1, 3, 6):
                y = F.max_pool2d(y, 2)
        for fc in (model.fc6, model.fc7):
            y = F.conv2d(y, fc.weight, fc.bias, padding=4, dilation=4).relu()
        feat, logits = model(x)
    assert y.std() > 0.001                                          # not a comparison of zeros
    torch.testing.assert_close(feat, y)
    torch.testing.assert_close(logits, model.head(feat))


def test_v2_head_is_the_sum_of_four_dilated_convolutions():
    torch.manual_seed(0)
    head = SummedASPP(2, 3).double()
    assert 0.005 < torch.cat([c.weight.flatten() for c in head.branches]).std() < 0.02
    assert all((c.bias == 0).all() for c in head.branches)
    for conv in head.branches:
        nn.init.normal_(conv.bias)
    feat = torch.randn(1, 2, 27, 26, dtype=torch.float64)
    naive = torch.zeros(1, 3, 27, 26, dtype=torch.float64)
    for conv, d in zip(head.branches, (6, 12, 18, 24)):
        naive += conv.bias.detach().view(1, 3, 1, 1)
        for y in range(27):
            for x in range(26):
                for i, j in ((i, j) for i in range(3) for j in range(3)):
                    u, v = y + (i - 1) * d, x + (j - 1) * d
                    if 0 <= u < 27 and 0 <= v < 26:
                        naive[0, :, y, x] += conv.weight.detach()[:, :, i, j] @ feat[0, :, u, v]
    torch.testing.assert_close(head(feat), naive)


def test_upsample_keeps_the_corners():
    logits = torch.tensor([[[[0.0, 3.0], [6.0, 9.0]]]])
    expected = torch.tensor([[[[0.0, 1.0, 2.0, 3.0], [6.0, 7.0, 8.0, 9.0]]]])
    torch.testing.assert_close(upsample(logits, (2, 4)), expected)


@pytest.mark.parametrize("shape", [(3, 33, 33), (1, 4, 33, 33), (1, 1, 33, 33)])
def test_wrong_input_is_named(shape):
    with pytest.raises(ValueError, match=r"\(N, 3, h, w\)"):
        on_meta("v2", "resnet18")(torch.zeros(shape, device="meta"))


@pytest.mark.parametrize("N", [1, 2, 3])
def test_image_pooling_at_batch_one_or_two_uses_running_statistics(N):
    torch.manual_seed(0)
    aspp = ASPP(4).double().train()
    norm = aspp.pool[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(N, 4, 5, 6, dtype=torch.float64)
    y = torch.einsum("nchw,dc->nd", x, aspp.pool[0].weight[:, :, 0, 0]) / 30     # (N, 256): all that the norm sees
    mean, var = (y.mean(0), y.var(0, unbiased=False)) if N == 3 else (before["running_mean"], before["running_var"])
    expected = ((y - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias).relu()
    pooled = aspp(x)                                                # the whole block, its other norms on batch statistics
    unchanged = all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert pooled.shape == (N, 256, 5, 6) and unchanged == (N < 3) and aspp.branches[0][1].num_batches_tracked == 1
    torch.testing.assert_close(aspp.pool(x.mean(dim=(2, 3), keepdim=True))[..., 0, 0], expected)


# ---------------------------------------------------------------------------------------------- frozen batch norm

def named_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def bn_state(model: nn.Module) -> dict[str, dict]:
    return {name: copy.deepcopy(m.state_dict()) for name, m in named_norms(model).items()}


def test_frozen_batch_norm_stays_as_it_is():
    torch.manual_seed(0)
    model = build_model("v3+", "resnet18", 3, init="none", freeze_bn="encoder")
    model.eval()
    model.train()
    before, conv = bn_state(model), model.encoder.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), momentum=0.9, weight_decay=0.1)
    images = torch.randn(3, 3, 17, 17)
    model(images)[1].square().mean().backward()
    optimizer.step()
    after = bn_state(model)
    for name, state in after.items():
        for key, value in state.items():
            assert torch.equal(value, before[name][key]) == name.startswith("encoder."), (name, key)
    assert not torch.equal(model.encoder.conv1.weight, conv)

    model.freeze_bn("all")
    model.eval()
    model.train()
    with torch.no_grad():
        model(images)
    for name, state in bn_state(model).items():
        assert all(torch.equal(value, after[name][key]) for key, value in state.items()), name
    assert not any(p.requires_grad for m in named_norms(model).values() for p in m.parameters())


def test_affine_freezes_the_encoders_parameters_and_not_its_statistics():
    torch.manual_seed(0)
    model = build_model("v3+", "resnet18", 3, init="none", freeze_bn="affine").double()
    model.eval()
    model.train()
    before = bn_state(model)
    optimizer = torch.optim.SGD(model.parameter_groups(0.1), momentum=0.9, weight_decay=0.1)
    images = 3 + torch.randn(3, 3, 33, 33, dtype=torch.float64)
    feat = model.encoder.bn1(model.encoder.conv1(images))           # batch statistics, whatever has been running
    torch.testing.assert_close(feat.mean(dim=(0, 2, 3)), model.encoder.bn1.bias, atol=1e-9, rtol=0)
    torch.testing.assert_close(feat.std(dim=(0, 2, 3), correction=0), model.encoder.bn1.weight, atol=1e-3, rtol=0)
    model(images)[1].square().mean().backward()
    optimizer.step()
    for name, state in bn_state(model).items():
        for key, value in state.items():
            fixed = name.startswith("encoder.") and key in ("weight", "bias")
            assert torch.equal(value, before[name][key]) == fixed, (name, key)
    model.eval()
    assert not any(m.training for m in named_norms(model).values())
    model.train()
    model.freeze_bn("none")
    assert all(m.training and m.weight.requires_grad for m in named_norms(model).values())
    model.freeze_bn("all")
    model.freeze_bn("affine")
    assert all(m.training and m.weight.requires_grad == (not name.startswith("encoder."))
               for name, m in named_norms(model).items())


def test_freezing_can_be_changed():
    model = build_model("v3+", "resnet18", 3, init="none", freeze_bn="all")
    model.freeze_bn("encoder")
    assert model.low[1].training and model.low[1].weight.requires_grad
    assert not model.encoder.bn1.training and not model.encoder.bn1.weight.requires_grad
    model.freeze_bn("none")
    assert model.training and all(m.training and m.weight.requires_grad for m in named_norms(model).values())
    with pytest.raises(ValueError, match="encoder"):
        model.freeze_bn("head")


def test_rates():
    model = on_meta("v2", "vgg16")
    body, head = model.parameter_groups(0.5)
    assert (body["lr"], head["lr"]) == (0.5, 5.0)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert any(p is model.fc6.weight for p in body["params"])
    assert len(body["params"]) + len(head["params"]) == len(list(model.parameters()))
    model = on_meta("v3+", "resnet18")
    model.freeze_bn("all")
    (group,) = model.parameter_groups(0.5)
    assert group["lr"] == 0.5 and all(p.requires_grad for p in group["params"])
    assert len(group["params"]) == len(list(model.parameters())) - 2 * len(named_norms(model))
    rest, encoder = model.parameter_groups(0.5, encoder_rate=0.1)
    assert (rest["lr"], encoder["lr"]) == (0.5, 0.05)
    trained = {id(p) for p in model.encoder.parameters() if p.requires_grad}
    assert {id(p) for p in encoder["params"]} == trained
    assert any(p is model.head.weight for p in rest["params"])


# ---------------------------------------------------------------------------------------------- weights

def save(folder, content) -> str:
    path = str(folder / "weights.pth")
    torch.save(content, path)
    return path


def test_init_from_torchvisions_names(tmp_path, capsys):
    state = models.resnet18().state_dict()
    model = build_model("v2", "resnet18", 3, init=save(tmp_path, state))
    out = capsys.readouterr().out
    assert "100 keys matched, 8 missing (0 of the encoder), 0 unexpected, 2 of a classifier left out" in out
    assert all(torch.equal(v, state[k]) for k, v in model.encoder.state_dict().items())


def test_init_vgg16_leaves_fc6_and_fc7_random(tmp_path, capsys):
    source = DeepLabV2("vgg16", 3)
    state = source.encoder.state_dict() | {"classifier.0.weight": torch.zeros(2, 2), "odd": torch.zeros(1)}
    model = build_model("v2", "vgg16", 3, init=save(tmp_path, state))
    assert "26 keys matched, 12 missing (0 of the encoder), 1 unexpected, 1 of a" in capsys.readouterr().out
    assert torch.equal(model.encoder.features[28].weight, source.encoder.features[28].weight)
    assert not torch.equal(model.fc6.weight, source.fc6.weight)


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"model": state, "epoch": 3},
    lambda state: {"state": {"model": state, "optimizer": {"state": {}}}, "iteration": 7},
    lambda state: {f"module.{k}": v for k, v in state.items()},
])
def test_init_from_own_checkpoints(tmp_path, capsys, wrap):
    torch.manual_seed(0)
    state = DeepLabV2("resnet18", 3).state_dict()
    state["encoder.bn1.num_batches_tracked"] += 5
    model = build_model("v2", "resnet18", 3, init=save(tmp_path, wrap(state)))
    assert "108 keys matched, 0 missing" in capsys.readouterr().out
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_init_without_batch_counters(tmp_path, capsys):
    state = {k: v for k, v in models.resnet18().state_dict().items() if "num_batches" not in k}
    build_model("v2", "resnet18", 3, init=save(tmp_path, state))
    assert "100 keys matched" in capsys.readouterr().out


def test_init_missing_encoder_key(tmp_path, capsys):
    state = models.resnet18().state_dict()
    del state["layer2.0.conv1.weight"]
    path = save(tmp_path, state)
    with pytest.raises(UserError, match=r"lacks 1 encoder keys.*\.layer2\.0\.conv1\.weight.*--partial-init") as e:
        load_model("v2", "resnet18", 3, path)
    assert path in str(e.value)
    model = load_model("v2", "resnet18", 3, path, partial_init=True)
    assert "99 keys matched, 9 missing (1 of the encoder)" in capsys.readouterr().out and not model.complete
    assert torch.equal(model.encoder.conv1.weight, state["conv1.weight"])


def test_init_of_another_backbone(tmp_path):
    path = save(tmp_path, models.resnet18().state_dict())
    with pytest.raises(UserError, match="encoder keys of resnet50"):
        load_model("v2", "resnet50", 19, path)


@pytest.mark.parametrize("network", ["v2", "v3+"])
def test_init_head_of_another_class_count(tmp_path, network):
    source = CLASSES[network]("resnet18", 16)
    path = save(tmp_path, source.state_dict())
    with pytest.raises(UserError, match=r"head\..*\(16.*19 classes.*--partial-init"):
        build_model(network, "resnet18", 19, init=path)
    model = build_model(network, "resnet18", 19, init=path, partial_init=True)
    assert torch.equal(model.encoder.conv1.weight, source.encoder.conv1.weight)


class Malicious:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_the_input_of_a_file_can_be_overruled(tmp_path, capsys):
    """Caffe's VGG-16 has torchvision's names; torchvision's own weights keep their input."""
    path = save(tmp_path, DeepLabV2("vgg16", 3).encoder.state_dict())
    pixels = torch.rand(1, 3, 16, 24)
    for name, words, channels, range, mean, std in (
            (None, "RGB ImageNet's mean and std", [0, 1, 2], 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ("imagenet", "RGB ImageNet's mean and std", [0, 1, 2], 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ("rgb", "RGB in [0, 1]", [0, 1, 2], 1, (0, 0, 0), (1, 1, 1)),
            ("rgb255", "RGB 0-255 minus Caffe's mean", [0, 1, 2], 255, (122.67891434, 116.66876762, 104.00698793), (1, 1, 1)),
            ("bgr255", "BGR 0-255 minus Caffe's mean", [2, 1, 0], 255, (104.00698793, 116.66876762, 122.67891434), (1, 1, 1))):
        model = build_model("v2", "vgg16", 3, path, input=name)
        assert f"--init {path}: input {words}; 26 keys matched" in capsys.readouterr().out
        expected = (range * pixels[:, channels] - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(model.prepare(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)), expected, rtol=1e-5,
                                   atol=1e-3)


def test_init_unusable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "whole.pth"
    torch.save(models.resnet18().state_dict(), weights)
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:-5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save({"model": Malicious()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"lr": 0.1}, tmp_path / "plain.pth")
    for name, text in [
        ("absent.pth", "there is no --init file"), (".", "cannot be read .*directory"), ("cut.pth", "is damaged"),
        ("empty.pth", "is damaged"), ("text.pth", "damaged or not a --init file"), ("pickle.pth", "or not a --init file"),
        ("evil.pth", "no state dict"), ("list.pth", "no state dict"), ("plain.pth", "no state dict"),
    ]:
        with pytest.raises(UserError, match=text) as e:
            load_model("v2", "resnet18", 3, str(tmp_path / name))
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value) and "weights_only" not in str(e.value)
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return tmp_path / "hub" / "checkpoints"


def test_imagenet_without_network_names_the_ways_out(offline):
    with pytest.raises(UserError) as e:
        build_model("v2", "resnet101", 3)
    for text in ("resnet101-63fe2227.pth", str(offline), "--init PATH", "--init none", "no network"):
        assert text in str(e.value)
    (offline / "resnet101-63fe2227.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read, delete it"):
        build_model("v2", "resnet101", 3)


def test_imagenet_from_the_cache(offline, capsys):
    offline.mkdir(parents=True)
    state = models.resnet18().state_dict()
    torch.save(state, offline / "resnet18-f37072fd.pth")
    model = build_model("v2", "resnet18", 3)
    assert all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())
    assert model.frozen_bn == "encoder" and not model.complete
    assert isinstance(build_model("v2", "resnet18", 3, input="bgr255").prepare, nn.Identity)     # --input is for files


@pytest.mark.parametrize("kwargs, text", [
    ({"network": "v3+", "backbone": "vgg16"}, "vgg16"),
    ({"network": "v3"}, "v3\\+"),
    ({"backbone": "resnet34"}, "resnet18"),
])
def test_unknown_choices(kwargs, text):
    with pytest.raises(UserError, match=text):
        build_model(**{"network": "v2", "backbone": "resnet18", "num_classes": 3, "init": "none"} | kwargs)
    with pytest.raises(UserError, match=text):
        make_network(**{"network": "v2", "backbone": "resnet18", "num_classes": 3} | kwargs)
