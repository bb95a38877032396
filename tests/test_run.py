"""The loop's mechanics: rates, checkpoints, resuming bit for bit, clean stops, refusals."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from starts import children
from torch import nn

from common import files, metrics
from common.cli import Size, option
from common.data import Augment, SegmentationDataset, class_list
from common.files import UserError, load, write_atomically
from common.layouts import find_pairs
from common.run import Options, Run

STAGES = {"first": 10, "second": 10}


@dataclass
class Config:
    """the method"""

    rate: float = option(0.1, "rate")


class Tiny(nn.Module):
    """One 1x1 convolution with batch norm and dropout: weights, buffers and a use of the random state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 19, 1), nn.BatchNorm2d(19), nn.Dropout(0.5))
        self.register_buffer("total", torch.zeros(()))           # a tensor that lives across iterations

    def forward(self, x):
        return x, self.layers(x)


@pytest.fixture
def make(tmp_path, city):
    """make(**options) -> (run, state, dataset): a run in tmp_path with a model and its optimizer as state."""
    classes = class_list("gta5")
    dataset = SegmentationDataset(find_pairs(city, "gta5"), "gta5", classes, None)

    def build(rate: float = 0.1, tag: str = "a", **options):
        options = {"data": str(city), "runs": str(tmp_path), "workers": 0, "log_every": 3, "save_every": 4, **options}
        run = Run("x", Config(rate=rate), Options(tag=tag, **options), STAGES)
        run.seed("model")
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        return run, {"model": model, "optimizer": optimizer}, dataset
    return build


def train(run: Run, state: dict, dataset, stage: str = "first", iterations: int = 10, at=None) -> list[int]:
    """A stage with a loss; at(iteration) is called inside the loop. Returns the iterations that were done."""
    done = []
    for it, (x, y) in run.stage(stage, iterations, state, dataset, batch_size=2):
        loss = nn.functional.cross_entropy(state["model"](x)[1], y, ignore_index=255)
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        state["model"].total += loss.detach()
        run.report(seg=loss if at is None else at(it, loss))
        done.append(it)
    return done


def tensors(state: dict) -> list[torch.Tensor]:
    return [*state["model"].state_dict().values(), *(s["momentum_buffer"] for s in state["optimizer"].state.values())]


def log_lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", [0, 3, 4, 8])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_and_resumed_equals_undisturbed(make, stop, number, capsys):
    run, uninterrupted, dataset = make(tag="uninterrupted")
    assert train(run, uninterrupted, dataset) == list(range(10))
    expected = tensors(uninterrupted)
    run, state, dataset = make()
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(run, state, dataset, at=lambda it, loss: (it == stop and os.kill(os.getpid(), number), loss)[1])
    assert stopped.value.code == 128 + number and "resume with: " in capsys.readouterr().out
    assert signal.getsignal(number) is handler
    torch.manual_seed(99)                                        # whatever happened in between
    run, state, dataset = make()
    assert train(run, state, dataset) == list(range(stop + 1, 10))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), expected, strict=True))
    assert [line["iteration"] for line in log_lines(run)][-3:] == [8, 9, 10]
    assert not (run.folder / "last.pt").exists()


def test_a_signal_that_is_ignored_stays_ignored(make):
    """As SIGHUP is under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run, state, dataset = make()
        assert len(train(run, state, dataset, at=lambda it, loss: (os.kill(os.getpid(), signal.SIGHUP), loss)[1])) == 10
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_training_is_saved_when_an_image_becomes_unreadable_during_an_evaluation(make):
    run, state, dataset, _ = watched(make, save_every=100)

    def fail(k):
        raise UserError("cannot read x.png")

    interrupt(run, fail)
    with pytest.raises(UserError, match="cannot read x.png"):
        train(run, state, dataset)
    assert load(run.folder / "last.pt")["iteration"] == 5
    assert [line["iteration"] for line in log_lines(run)] == [3, 5]


def test_a_pass_over_images_shows_how_far_it_is(make, monkeypatch, capsys):
    """A line each half minute, also during a stage. The clock advances twenty seconds per reading."""
    clock = itertools.count(step=20)
    run, state, dataset, _ = watched(make)
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    capsys.readouterr()
    list(run.sweep("labels", dataset))
    assert capsys.readouterr().out.splitlines() == [f"labels: image {k} of 8" for k in (2, 4, 6, 8)]
    train(run, state, dataset)
    assert "first 5: image 2 of 3\n" in capsys.readouterr().out


def test_killed_between_checkpoints_repeats_iterations_and_log_lines(make):
    run, state, dataset = make()

    def die(it, loss):
        if it == 6:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        train(run, state, dataset, at=die)
    assert [line["iteration"] for line in log_lines(run)] == [3, 4, 6]
    run, state, dataset = make()
    assert train(run, state, dataset) == list(range(4, 10))      # last.pt was written after 4
    assert [line["iteration"] for line in log_lines(run)] == [3, 4, 6, 8, 9, 10]


def test_a_finished_stage_is_loaded_and_not_run_again(make):
    run, state, dataset = make()
    train(run, state, dataset)
    weight = state["model"].layers[0].weight.clone()
    run, state, dataset = make()
    assert train(run, state, dataset) == [] and torch.equal(state["model"].layers[0].weight, weight)


def test_stages_have_their_own_random_streams_and_the_seed_decides(make):
    batches = {}
    for seed, stage in ((0, "first"), (0, "second"), (1, "first"), (0, "first")):
        run, state, dataset = make(tag=f"{len(batches)}", seed=seed)
        seen = [x.sum().item() for _, (x, _) in run.stage(stage, 3, state, dataset, batch_size=2)]
        if (seed, stage) in batches:
            assert batches[seed, stage] == seen
        batches[seed, stage] = seen
    assert len({tuple(seen) for seen in batches.values()}) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(make, value):
    run, state, dataset = make()
    with pytest.raises(UserError, match=f"loss 'seg' became {value} at iteration 6 of stage 'first'"):
        train(run, state, dataset, at=lambda it, loss: loss * value if it == 5 else loss)
    assert load(run.folder / "last.pt")["iteration"] == 4
    assert not (run.folder / "first.pt").exists()


def test_rates_follow_the_stages_own_iterations(make):
    run, state, dataset = make()
    rates = [(it, group["lr"]) for it, _ in run.stage("first", 5, state, dataset, batch_size=1)
             for group in state["optimizer"].param_groups]
    assert rates == [(it, pytest.approx(0.1 * (1 - it / 5) ** 0.9)) for it in range(5)]


def test_another_config_is_refused_by_name(make):
    make(rate=0.3)                                               # nothing trained yet: nothing to protect
    train(*make())
    make(workers=1, log_every=5, device="cpu")                   # these do not make another run
    with pytest.raises(UserError, match=r"--rate \(0.1 -> 0.2\).*--tag"):
        make(rate=0.2)
    with pytest.raises(UserError, match=r"--seed \(0 -> 3\)"):
        make(seed=3)


def test_stage_and_from_decide_what_is_pending(make, tmp_path):
    with pytest.raises(UserError, match="--stage third is unknown; the stages are first, second"):
        make(stage="third")
    with pytest.raises(UserError, match="--stage second needs .*first.pt"):
        make(stage="second")
    run, state, dataset = make(stage="first")
    assert run.pending("first") and not run.pending("second")
    train(run, state, dataset)
    run, other, dataset = make(tag="b", from_=str(run.folder / "first.pt"))
    assert not run.pending("first") and run.pending("second")
    finished = torch.load(tmp_path / "x-gta5-a/first.pt", weights_only=True)
    for foreign, words in (({"stage": "zeroth"}, "'zeroth' of x.py"), ({"method": "y"}, "'first' of y.py")):
        torch.save({**finished, **foreign}, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match=f"finished {words}, and no stage of this run follows: add --stage first or second"):
            make(tag="c", from_=str(tmp_path / "foreign.pt"))
        assert make(tag="c", from_=str(tmp_path / "foreign.pt"), stage="second")[0].pending("second")
    with pytest.raises(UserError, match="there is no --from file nowhere.pt"):
        make(tag="c", from_="nowhere.pt")
    train(run, other, dataset, "second")
    with pytest.raises(UserError, match="--from .*second.pt finished 'second' of x.py, and no stage of this run follows"):
        make(tag="c", from_=str(run.folder / "second.pt"))
    with pytest.raises(AttributeError):
        train(*make(tag="d"), at=lambda it, loss: None if it == 5 else loss)     # fails after the checkpoint of iteration 4
    with pytest.raises(UserError, match="last.pt is from the middle of stage 'first'; start that run again"):
        make(tag="c", from_=str(tmp_path / "x-gta5-d/last.pt"))


def test_a_published_network_has_finished_the_first_stage_of_a_run_that_has_no_other(tmp_path, city):
    head = {f"layer{layer}.conv2d_list.{k}.weight": torch.zeros(1) for layer in (5, 6) for k in range(4)}
    torch.save(head, tmp_path / "x.pth")
    options = Options(data=str(city), runs=str(tmp_path), from_=str(tmp_path / "x.pth"))
    with pytest.raises(UserError, match="x.pth finished 'only' of x.py, and no stage of this run follows: add --stage only"):
        Run("x", Config(), options, {"only": 1})


@pytest.mark.parametrize("options, words", [
    ({"source": "cityscapes"}, "--source and --target are both cityscapes: add --target-data FOLDER"),
    ({"crop": Size(65, 32)}, "--crop 65x32 is larger than the images .64x32.; choose a smaller crop"),
    ({"export": "x.json"}, "--export x.json is the name of the JSON file beside the weights"),
    ({"target_labels": True}, "--target-labels trains an upper bound, which is not adapted: add --stage first"),
    ({"target_labels": True, "stage": "second"}, "add --stage first"),
    ({"target": "crosscity", "target_labels": True, "stage": "first"}, "Cross-City's training images have no labels"),
    ({"device": "cuda"}, "--device cuda is not available"),
])
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, city, options, words):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    sizes = {"gta5": Size(64, 32), "cityscapes": Size(64, 32)}
    with pytest.raises(UserError, match=words):
        Run("x", Config(), Options(data=str(city), runs=str(tmp_path / "runs"), **options), STAGES, sizes)
    assert not (tmp_path / "runs").exists()


def test_the_crop_may_be_as_large_as_the_images_after_the_random_resize(tmp_path, city):
    sizes = {"gta5": Size(64, 32), "cityscapes": Size(64, 32)}
    options = Options(data=str(city), runs=str(tmp_path), crop=Size(96, 48))
    Run("x", Config(), options, STAGES, sizes, largest_scale=1.5)
    with pytest.raises(UserError, match="--crop 96x48 is larger than the images .64x32, at most 95x47 after --scale"):
        Run("x", Config(), options, STAGES, sizes, largest_scale=1.48)
    Run("x", Config(), Options(data=str(city), runs=str(tmp_path), tag="own", crop=Size(9999, 1)), STAGES)    # sizes unknown


def test_a_networks_weights_are_those_of_the_last_finished_stage_of_from_or_of_init(tmp_path, city, capsys):
    how = {"data": str(city), "runs": str(tmp_path), "workers": 0, "init": "none", "backbone": "resnet18"}

    def start(tag="a", **options):
        return Run("x", Config(), Options(tag=tag, **{**how, **options}), STAGES)

    def finish(run, stage, value):
        model = run.network("v2")
        with torch.no_grad():
            model.head.branches[0].bias.fill_(value)
        assert list(run.stage(stage, 0, {"model": model}, batch_size=1)) == []

    def bias(run, **options):
        return run.network("v2", **options).head.branches[0].bias[0].item()

    run = start()
    assert bias(run) == 0 and run.latest == "none" and run.network("v2").frozen_bn == "none"
    with pytest.raises(UserError, match="--init none is no trained network with its head, and no stage of .*a is finished"):
        bias(start(eval=True))
    finish(run, "first", 1.0)
    assert bias(run) == 1 and run.latest == "first" and bias(run, fresh=True) == 0
    finish(run, "second", 2.0)
    assert bias(run) == 2 and bias(start(eval=True, stage="first")) == 1
    del run
    assert bias(start(stage="second")) == 1                      # starts after the first, though a later one exists
    first = str(tmp_path / "x-gta5-a/first.pt")
    run = start("b", from_=first, freeze_bn="all")
    assert bias(run) == 1 and run.latest == "first" and run.network("v2").frozen_bn == "all"
    finish(run, "second", 3.0)
    assert bias(run) == 3
    assert bias(start("b", from_=first, freeze_bn="all", eval=True)) == 1            # --eval evaluates what --from holds
    assert bias(start("c", init=first, eval=True)) == 1 and "keys matched, 0 missing" in capsys.readouterr().out
    with pytest.raises(UserError, match="the checkpoint's 'model' does not fit this run's: .*; check --backbone"):
        start("d", from_=first, backbone="resnet50").network("v2")


def test_images_have_the_sizes_of_flags_or_script_and_translated_sources(tmp_path, city):
    options = Options(data=str(city), runs=str(tmp_path), target_size=Size(32, 16), source_images=str(city / "synthia/RGB"))
    run = Run("x", Config(), options, STAGES, {"gta5": Size(48, 24), "cityscapes": Size(48, 24)})
    with pytest.raises(UserError, match="has no counterpart"):   # SYNTHIA's names differ
        run.images("source", "train")
    target = run.images("target", "val")
    assert target[0][0].shape == (3, 16, 32) and target[0][1].shape == (32, 64) and len(target) == 3
    assert run.images("target", "val", size=Size(40, 20))[0][0].shape == (3, 20, 40)
    options.source_images = None
    source = run.images("source", "train", augment=Augment(crop=Size(20, 10)), transform=lambda image, *_: (0 * image, None))
    image, label, _ = source[0, 1]
    assert image.shape == (3, 10, 20) and label.shape == (10, 20) and len(image.unique()) == 3    # black, in three channels
    assert run.images("target", "train", labels=False)[0][1].unique().tolist() == [255]


def test_what_a_stage_computes_before_it_trains_is_computed_once(make):
    calls = []

    def compute():
        calls.append(1)
        return {"anchors": torch.arange(3.0), "count": 7, "names": ["a", "b"]}

    run, state, dataset = make()
    one = run.once("first", "anchors", compute)
    assert one["anchors"].tolist() == [0, 1, 2] and one["count"] == 7 and one["names"] == ["a", "b"]
    with pytest.raises(AttributeError):
        train(run, state, dataset, at=lambda it, loss: None if it == 5 else loss)
    run, state, dataset = make()
    assert run.once("first", "anchors", compute)["anchors"].tolist() == [0, 1, 2] and len(calls) == 1
    train(run, state, dataset)
    assert make()[0].once("first", "anchors", compute)["count"] == 7 and len(calls) == 1
    path = run.folder / "first-anchors.pt"
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(UserError, match="first-anchors.pt is damaged .*; delete it, and last.pt if there is one, to compute"):
        run.once("first", "anchors", compute)
    path.unlink()                                                # the trained stage used another
    with pytest.raises(UserError, match="has no first-anchors.pt, but has later results .first.pt."):
        run.once("first", "anchors", compute)
    assert len(calls) == 1


def test_a_stage_is_pending_until_it_is_evaluated_and_says_when_it_is_finished(make, capsys):
    run, state, dataset = make()
    test = run.images("target", "val")
    train(run, state, dataset)
    assert run.pending("first")                                  # its results are missing
    run.evaluate("first", state["model"], test, {"single-scale": {}, "flip": {"flip": True}})
    assert not run.pending("first") and run.pending("second")
    train(run, state, dataset, "second")
    run.evaluate("second", state["model"], test, {"single-scale": {}})
    capsys.readouterr()
    del run
    run, *_ = make()
    assert not run.pending("first") and not run.pending("second")
    text = capsys.readouterr().out
    assert "first: finished before, see" in text and "second: finished before, see" in text
    assert text.count("IoU in percent") == 1 and "first  first, flip  second" in text
    assert not make(eval=True)[0].pending("first")               # --eval trains nothing


def test_a_checkpoint_of_another_script_in_the_folder_is_refused(make):
    """Even where names and shapes are equal, as for two scripts with DeepLab v3+."""
    run, state, dataset = make()
    train(run, state, dataset)
    path = run.folder / "first.pt"
    torch.save({**torch.load(path, weights_only=True), "method": "y"}, path)
    with pytest.raises(UserError, match="first.pt does not fit: it is not of x.py"):
        train(*make())
    path.rename(run.folder / "last.pt")
    with pytest.raises(UserError, match="last.pt does not fit: it is not of x.py"):
        train(*make())


def test_a_stage_is_not_repeated_while_later_results_exist(make):
    run, state, dataset = make()
    train(run, state, dataset)
    train(run, state, dataset, "second")
    (run.folder / "first.pt").unlink()
    with pytest.raises(UserError, match="has no first.pt, but has later results .second.pt."):
        train(*make())
    with pytest.raises(UserError, match="has no first-anchors.pt, but has later results .second.pt."):
        make()[0].once("first", "anchors", dict)
    (run.folder / "second.pt").unlink()
    for later in ("second-labels.pt", "results.json"):
        (run.folder / later).write_text('{"second": {}}')
        with pytest.raises(UserError, match=f"has no first.pt, but has later results .({later}|'second' in {later})."):
            train(*make())
        (run.folder / later).unlink()
    assert train(*make()) == list(range(10))


def test_a_note_of_the_preparation_is_there_once(make):
    def start(die: bool):
        run, state, dataset = make()
        for it, (x, _) in run.stage("first", 10, state, dataset, batch_size=2, note={"margin": 0.5}):
            run.report(seg=state["model"](x)[1].mean())
            if die and it in (2, 6):
                raise KeyboardInterrupt
        return log_lines(run)

    for _ in range(2):                                           # killed before the stage's first checkpoint, and after it
        with pytest.raises(KeyboardInterrupt):
            start(die=True)
    lines = start(die=False)
    assert [line["iteration"] for line in lines] == [0, 3, 4, 6, 8, 9, 10] and lines[0] == {
        "stage": "first", "iteration": 0, "margin": 0.5}


def test_weights_that_are_not_finite_are_not_saved(make):
    run, state, dataset = make()

    def poison(it, loss):
        if it == 7:
            with torch.no_grad():
                state["model"].layers[0].weight[0] = float("nan")
            return loss * 0
        return loss

    with pytest.raises(UserError, match="'model' holds values that are not finite|loss 'seg' became nan"):
        train(run, state, dataset, at=poison)
    assert load(run.folder / "last.pt")["state"]["model"]["layers.0.weight"].isfinite().all()


def test_sigterm_to_all_processes_stops_cleanly(city, tmp_path):
    """As `timeout` (to the group) and schedulers (to each) send it: the loaders must not die before the parent has saved."""
    root = Path(__file__).parents[1]
    line = [sys.executable, "fada.py", "--data", str(city), "--runs", str(tmp_path), "--init", "none", "--workers", "2",
            "--backbone", "resnet18", "--source-size", "64x32", "--target-size", "64x32", "--batch-size", "2",
            "--log-every", "1", "--source-iterations", "100000"]
    process = subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True)
    printed = ""
    while "source 3/" not in printed:
        printed += next(process.stdout)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "resume with: " in rest, printed + rest
    assert load(tmp_path / "fada-gta5/last.pt")["iteration"] >= 3


def test_checkpoints_of_others_are_refused(make, tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)

    run, state, dataset = make()
    crafted, foreign = tmp_path / "crafted.pt", tmp_path / "foreign.pt"
    torch.save({"method": "x", "stage": "first", "state": {"x": Crafted()}}, crafted)
    torch.save({"weight": torch.ones(1)}, foreign)
    write_atomically(tmp_path / "good.pt", lambda file: torch.save({"state": {"x": torch.ones(100)}}, file))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:300])
    for path, words in ((crafted, "damaged or not a checkpoint"), (tmp_path / "cut.pt", "damaged or not a checkpoint"),
                        (foreign, "does not fit")):
        for name in ("first.pt", "last.pt"):
            (run.folder / name).write_bytes(path.read_bytes())
            with pytest.raises(UserError, match=rf"{name}.* {words}"):
                train(run, state, dataset)
            (run.folder / name).unlink()
    assert not (tmp_path / "code ran").exists()


def test_state_must_fit(make):
    run, state, dataset = make()
    train(run, state, dataset)
    wider = Tiny()
    wider.layers[0] = nn.Conv2d(3, 20, 1)
    for other, words in (({"model": wider}, "'model' does not fit this run's: size mismatch.*; check --backbone"),
                         ({"teacher": Tiny()}, "holds model, but model, optimizer, teacher are needed")):
        with pytest.raises(UserError, match=f"the checkpoint.* {words}"):
            train(run, {**state, **other}, dataset)
    del state["model"]
    with pytest.raises(UserError, match="the checkpoint holds model, but optimizer are needed"):
        train(run, state, dataset)


def test_an_evaluation_writes_results_picture_log_and_export(make, tmp_path, capsys):
    run, state, dataset = make()
    test = run.images("target", "val")
    train(run, state, dataset)
    tests = {"single-scale": {}, "flip": {"flip": True}}
    run.evaluate("first", state["model"], test, tests)
    results = run.results()["first"]
    for name, view in tests.items():
        state["model"].eval()
        expected = torch.zeros(19, 19, dtype=torch.int64)
        for image, label, _ in test:
            score = state["model"](image[None])[1].softmax(1)
            if view:
                score = score + state["model"](image[None].flip(-1))[1].flip(-1).softmax(1)
            guess = score.argmax(1)[0]
            for t, p in zip(label.flatten().tolist(), guess.flatten().tolist()):
                if t != 255:
                    expected[t, p] += 1
        assert results[name]["matrix"] == expected.tolist() and 0 <= results[name]["mIoU"] <= 1
    assert (run.folder / "first.png").exists() and "road" in capsys.readouterr().out
    assert miou_lines(run) == [("first", 10, {"mIoU": round(100 * results["single-scale"]["mIoU"], 2),
                                              "mIoU present": round(100 * results["single-scale"]["mIoU present"], 2)})]
    before = (run.folder / "results.json").read_bytes()
    del run
    run, *_ = make(eval=True, seed=5)                            # --eval prints and writes nothing
    run.evaluate("first", state["model"], test, {"single-scale": {}})
    assert (run.folder / "results.json").read_bytes() == before and "mIoU" in capsys.readouterr().out


def miou_lines(run) -> list[tuple]:
    return [(line["stage"], line["iteration"], line["miou"]) for line in log_lines(run) if "miou" in line]


def watched(make, **options):
    """A run with its evaluation, also every five iterations; `evaluate` does it at the end."""
    run, state, dataset = make(eval_every=5, **options)
    test = run.images("target", "val")
    run.watch(state["model"], test)
    return run, state, dataset, lambda: run.evaluate("first", state["model"], test, {"single-scale": {}})


class Interrupted(SegmentationDataset):
    """Calls `act(k)` when the k-th evaluation item is read."""

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            self.act(self.count)
            self.count += 1
        return super().__getitem__(key)


def interrupt(run, act):
    model, test = run._watched
    mine = Interrupted(test.pairs, test.dataset, test.classes, test.size)
    mine.act, mine.count = act, 0
    run.watch(model, mine)


def test_a_point_of_the_curve_is_not_lost(make):
    """By a stop in the iteration before it, or by a stop or a kill during its evaluation; nor is it logged twice."""
    uninterrupted, state, dataset, evaluate = watched(make)
    train(uninterrupted, state, dataset)
    evaluate()

    def signal_at(wanted):
        return lambda k: os.kill(os.getpid(), signal.SIGTERM) if k == wanted else None

    def kill_at(wanted):
        def act(k):
            if k == wanted:
                raise KeyboardInterrupt
        return act

    run, state, dataset, _ = watched(make, tag="b")
    with pytest.raises(SystemExit):
        train(run, state, dataset, at=lambda it, loss: (signal_at(4)(it), loss)[1])
    assert miou_lines(run) == [] and load(run.folder / "last.pt")["iteration"] == 5
    for act, error in ((kill_at(1), KeyboardInterrupt), (signal_at(1), SystemExit)):
        del run
        run, state, dataset, _ = watched(make, tag="b")
        interrupt(run, act)
        with pytest.raises(error):
            train(run, state, dataset)
        assert miou_lines(run) == [] and load(run.folder / "last.pt")["iteration"] == 5
    del run
    run, state, dataset, evaluate = watched(make, tag="b")
    train(run, state, dataset)
    half = run.folder / f".results.json.{os.getpid()}.tmp"
    half.mkdir()                                                 # the results are not written: the log has the last point
    with pytest.raises(UserError, match="cannot write .*results.json"):
        evaluate()
    half.rmdir()
    evaluate()
    assert miou_lines(run) == miou_lines(uninterrupted) and [line[1] for line in miou_lines(run)] == [5, 10]


def test_what_a_kill_leaves_is_removed(make):
    run, state, dataset = make()
    train(run, state, dataset)
    shutil.copy(run.folder / "first.pt", run.folder / "last.pt")     # killed between the stage's end and its removal
    (run.folder / "labels").mkdir()
    for name in (".last.pt.123.tmp", "labels/.a.png.123.tmp"):
        (run.folder / name).touch()
    del run                                                      # and its lock
    run, state, dataset = make()
    assert train(run, state, dataset) == [] and not (run.folder / "last.pt").exists()
    assert not list(run.folder.rglob("*.tmp"))


def test_a_file_that_the_machine_cannot_read_is_not_called_damaged(make, monkeypatch):
    """A user would delete it, and lose days of work."""
    run, state, dataset = make()
    run.once("first", "anchors", dict)
    train(run, state, dataset)
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("can't allocate memory: you tried")):
        def fail(*args, error=error, **how):
            raise error
        monkeypatch.setattr(torch, "load", fail)
        for read, name in ((lambda: train(run, state, dataset), "first.pt"),
                           (lambda: run.once("first", "anchors", dict), "first-anchors.pt")):
            with pytest.raises(UserError, match=f"{name} cannot be read now .*it may be intact: keep it"):
                read()


def test_a_run_is_locked_while_it_lives(make):
    run, *_ = make()
    assert make(tag="b")[0].folder != run.folder
    code = ("import sys; from pathlib import Path; from common.files import lock\n"
            "try: lock(Path(sys.argv[1]))\nexcept Exception as error: print(type(error).__name__, error)")
    printed = subprocess.check_output([sys.executable, "-c", code, run.folder], cwd=Path(__file__).parents[1], text=True)
    assert printed.startswith("UserError") and "is in use by another process: wait until it ends, or give" in printed


def test_bf16_keeps_losses_in_float32(make):
    run, state, dataset = make(amp="bf16")
    with run.autocast():
        assert nn.Conv2d(3, 4, 1)(torch.zeros(1, 3, 4, 4)).dtype == torch.bfloat16
    run, _, _ = make(tag="b")
    with run.autocast():
        assert nn.Conv2d(3, 4, 1)(torch.zeros(1, 3, 4, 4)).dtype == torch.float32


def test_cudnn_chooses_its_fastest_algorithms_in_a_stage_only(make, monkeypatch):
    """A stage's batches have one shape; images that are evaluated may have many."""
    run, state, dataset = make(eval_every=2)
    seen = {"stage": [], "evaluation": []}
    evaluate = metrics.evaluate

    def watched(*args, **how):
        seen["evaluation"].append(torch.backends.cudnn.benchmark)
        return evaluate(*args, **how)

    def at(it, loss):
        seen["stage"].append(torch.backends.cudnn.benchmark)
        return loss
    monkeypatch.setattr(metrics, "evaluate", watched)
    run.watch(state["model"], dataset)
    train(run, state, dataset, iterations=5, at=at)
    run.evaluate("first", state["model"], dataset, {"single-scale": {}})
    assert seen == {"stage": [True] * 5, "evaluation": [False] * 3} and not torch.backends.cudnn.benchmark
