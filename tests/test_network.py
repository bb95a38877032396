"""Your own network: the example of docs/network.md trains in every script; one sentence says what a network lacks."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_scripts import SCRIPTS, STAGES, arguments, final_state
from torch import nn

from common.deeplab import Structure, build_model, make_network
from common.files import UserError
from common.published import export

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/network.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    return re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """`edited(script)`: the module of a script with the page's edit, and the page's example beside it."""
    (tmp_path / "my_network.py").write_text(block("python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_network", raising=False)
    added, removed, placed = (line[1:].strip() for line in block("diff").splitlines())
    before, after = (line.split("model = ")[1].rstrip(")") for line in (removed, placed))       # run.network("v2"

    def edit(script: str):
        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        text = text.replace("\nimport torch\n", f"\nimport torch\n{added}\n", 1)
        count = text.count(before) + text.count(before.replace("v2", "v3+"))
        text = text.replace(before, after).replace(before.replace("v2", "v3+"), after)
        assert count == {"fada": 2, "sim": 2, "bismap": 3}.get(script, 1)
        path = tmp_path / f"{script}_mine.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module
    return edit


def small(script: str, city: Path, runs: Path, *more: str) -> list[str]:
    argv = [word for word in arguments(script, city, runs, *more)]
    return [*argv, "--no-stm"] if script == "bismap" else argv


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_pages_network_trains_in_every_script(script, edited, city, tmp_path, capsys):
    module, runs = edited(script), tmp_path / "runs"
    module.main(small(script, city, runs, "--export", str(tmp_path / "mine.pth")))
    printed = capsys.readouterr().out
    assert "network: MyNetwork, " in printed and "feat has 128 channels at 1/16" in printed
    folder = runs / f"{script}-gta5"
    assert list(json.loads((folder / "results.json").read_text())) == STAGES[script]
    last, exported = final_state(folder, STAGES[script][-1]), torch.load(tmp_path / "mine.pth", weights_only=True)
    own = sys.modules["my_network"].MyNetwork(19)
    assert list(exported) == list(own.state_dict())                            # unchanged names
    assert all(torch.equal(value, last[f"module.{key}"]) for key, value in exported.items())
    own.load_state_dict(exported)

    # The same table from the run, from its checkpoint and from the exported file.
    def table(*more: str) -> list[list[str]]:
        capsys.readouterr()
        module.main(small(script, city, runs, "--eval", *more))
        lines = capsys.readouterr().out.split("IoU in percent")[1].splitlines()
        return [line.split() for line in lines[3:]]                            # without the titles, which name checkpoints
    scores = table()
    assert scores == table("--from", str(folder / f"{STAGES[script][-1]}.pt"))
    if script != "fada":                                                       # its last stage is tested at another size
        assert scores == table("--init", str(tmp_path / "mine.pth"))


def test_it_resumes_and_another_network_is_refused(edited, city, tmp_path, capsys):
    module, runs = edited("sim"), tmp_path / "runs"
    line = small("sim", city, runs, "--stage", "step1")
    module.main(line)
    state = final_state(runs / "sim-gta5", "step1")
    module.main(small("sim", city, runs))                                      # continues with step 2
    assert all(torch.equal(value, final_state(runs / "sim-gta5", "step1")[key]) for key, value in state.items())
    capsys.readouterr()
    import sim
    with pytest.raises(SystemExit):
        sim.main(small("sim", city, runs, "--eval"))                           # DeepLab
    assert "does not fit" in capsys.readouterr().err


def test_bismaps_encoder_must_be_a_resnet(edited, city, tmp_path, capsys):
    module = edited("bismap")
    with pytest.raises(SystemExit):
        module.main(arguments("bismap", city, tmp_path / "runs"))              # --stm-backbone warmup
    error = capsys.readouterr().err
    assert "--stm-backbone resnet18" in error and "--no-stm" in error and not list(tmp_path.glob("runs/*/*.pt"))


class Net(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4, eps=0.1))
        self.rest = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        self.head = nn.Conv2d(6, num_classes, 1)

    def forward(self, x):
        feat = self.rest(self.encoder(x))
        return feat, self.head(feat)


def returning(result):
    class Wrong(Net):
        def forward(self, x):
            return result(*super().forward(x))
    return Wrong


@pytest.mark.parametrize(("build", "words"), [
    (returning(lambda feat, logits: logits), "Wrong returns a Tensor for two images of 64x128: forward must return feat"),
    (returning(lambda feat, logits: {"out": logits}), "returns a dict"),
    (returning(lambda feat, logits: (feat, logits, logits)), "returns 3 values"),
    (returning(lambda feat, logits: (feat, None)), "returns 2 values"),
    (returning(lambda feat, logits: (feat, logits[:, :-1])), r"logits \(2, 4, 32, 64\).*logits \(N, 5, h, w\)"),
    (returning(lambda feat, logits: (feat[:, :, ::2], logits)), r"feat \(2, 6, 16, 64\).*both on one grid"),
    (returning(lambda feat, logits: (feat.mean((2, 3)), logits)), r"feat \(2, 6\)"),
    (returning(lambda feat, logits: feat @ logits), "Wrong fails on two images of 64x128 .RuntimeError"),
    (lambda num_classes: 3, "returns a int, but a torch.nn.Module is needed"),
])
def test_what_a_network_lacks_is_reported_in_one_sentence(build, words):
    with pytest.raises(UserError, match=words) as error:
        make_network(build, "resnet18", 5)
    assert "\n" not in str(error.value) and "docs/network.md" in str(error.value)


def test_the_check_changes_nothing(capsys):
    torch.manual_seed(0)
    plain, state = Net(5), None
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = make_network(Net, "resnet18", 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.module.state_dict()[key]) for key, value in plain.state_dict().items())
    assert model.module.training and model.module.encoder.training
    assert model.feat_channels == 6 and model.num_classes == 5
    assert "no member" not in capsys.readouterr().out
    make_network(lambda k: nn.Sequential(Net(k)), "resnet18", 5)
    assert "<lambda>" in (line := capsys.readouterr().out) and "it has no member `encoder`, so all of it learns" in line


def test_batch_norm_is_frozen_and_rates_are_given():
    model = build_model(Net, "resnet18", 5, "none", "encoder").train()
    encoder, rest = model.module.encoder[1], model.module.rest[1]
    assert model.module.training and not encoder.training and rest.training
    assert not encoder.weight.requires_grad and rest.weight.requires_grad
    groups = model.parameter_groups(0.5, encoder_rate=0.1)
    assert [group["lr"] for group in groups] == [0.5, 0.05]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.module.encoder[0].parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 2
    model.freeze_bn("all")
    assert not model.train().module.rest[1].training
    model.freeze_bn("none")
    assert model.module.encoder[1].training and encoder.weight.requires_grad
    plain = make_network(lambda k: nn.Sequential(Net(k)), "resnet18", 5)
    plain.freeze_bn("encoder")                                                 # it has no encoder
    assert [group["lr"] for group in plain.parameter_groups(0.5, 0.1)] == [0.5]

    class Grouped(Net):
        def parameter_groups(self, lr, encoder_rate):
            return [{"params": self.head.parameters(), "lr": 7 * lr}]
    assert make_network(Grouped, "resnet18", 5).parameter_groups(1.0)[0]["lr"] == 7


def test_its_input_and_its_weights(tmp_path, capsys):
    torch.manual_seed(0)
    trained = Net(5)
    x, own = torch.randn(1, 3, 16, 16), trained.eval()
    file = tmp_path / "mine.pth"
    torch.save({"epoch": 3, "model": {f"module._orig_mod.{key}": value for key, value in trained.state_dict().items()}}, file)
    model = build_model(Net, "resnet18", 5, str(file), "none").eval()
    assert model.complete and "keys matched, 0 missing, 0 unexpected" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(model(x)[1], own(x)[1])
        converted = build_model(Net, "resnet18", 5, str(file), "none", input="bgr255")
        assert converted.structure == Structure(input="bgr255") and converted.module.encoder[1].eps == 0.1
        assert torch.allclose(converted.eval()(x)[1], own(converted.prepare(x))[1])
        assert not torch.allclose(converted(x)[1], own(x)[1])
    export(tmp_path / "again.pth", model, tuple("abcde"))
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == trained.state_dict().keys()
    assert json.loads((tmp_path / "again.json").read_text())["network"] == "own"
    state = trained.state_dict()
    state["head.weight"] = state["head.weight"][:3]
    state["odd.weight"] = state.pop("rest.0.weight")
    torch.save(state, file)
    with pytest.raises(UserError, match="2 weights are missing or have another shape, 1 are unexpected .rest.0.weight"):
        build_model(Net, "resnet18", 5, str(file))
    assert not build_model(Net, "resnet18", 5, str(file), partial_init=True).complete
    torch.save({**trained.state_dict(), "odd.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="0 weights are missing or have another shape, 1 are unexpected .odd.weight"):
        build_model(Net, "resnet18", 5, str(file))
    initial = build_model(Net, "resnet18", 5, "imagenet")                      # with the weights of its constructor
    assert not initial.complete and initial.frozen_bn == "encoder"
