"""The loop's mechanics: rates, checkpoints, resuming bit for bit, clean stops, refusals."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from starts import children
from torch import nn

import common.run
from common.cli import UserError, option, write_atomically
from common.data import SegmentationDataset, class_list, find_pairs
from common.run import Options, Run, load_state, poly_rate, read_checkpoint

STAGES = ("first", "second")


@dataclass
class Config:
    source: str = option("gta5", "source")
    target: str = option("cityscapes", "target")
    rate: float = option(0.1, "rate")


class Tiny(nn.Module):
    """One 1x1 convolution with batch norm and dropout: weights, buffers and a use of the random state."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 19, 1), nn.BatchNorm2d(19), nn.Dropout(0.5))

    def forward(self, x):
        return x, self.layers(x)


@pytest.fixture
def make(tmp_path, city):
    """make(**options) -> (run, state, dataset): a run in tmp_path with a model, its optimizer and a tensor as state."""
    classes = class_list("gta5")
    dataset = SegmentationDataset(find_pairs(city, "gta5"), "gta5", classes, None)

    def build(rate: float = 0.1, tag: str = "a", **options):
        options = {"runs": str(tmp_path), "workers": 0, "log_every": 3, "save_every": 4, **options}
        run = Run("x", Config(rate=rate), Options(tag=tag, **options), STAGES)
        run.seed("model")
        model = Tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        return run, {"model": model, "optimizer": optimizer, "total": torch.zeros(())}, dataset
    return build


def train(run: Run, state: dict, dataset, stage: str = "first", iterations: int = 10, at=None) -> list[int]:
    """A stage with a loss; at(iteration) is called inside the loop. Returns the iterations that were done."""
    done = []
    for it, (x, y) in run.stage(stage, iterations, state, dataset, batch_size=2):
        loss = nn.functional.cross_entropy(state["model"](x)[1], y, ignore_index=255)
        state["optimizer"].zero_grad()
        loss.backward()
        state["optimizer"].step()
        state["total"] += loss.detach()
        run.report(seg=loss if at is None else at(it, loss))
        done.append(it)
    return done


def tensors(state: dict) -> list[torch.Tensor]:
    return [*state["model"].state_dict().values(), state["total"], torch.get_rng_state(),
            *(s["momentum_buffer"] for s in state["optimizer"].state.values())]


def log_lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]


def test_poly_rate():
    assert poly_rate(2.0, 0, 10) == 2.0 and poly_rate(2.0, 5, 10) == pytest.approx(2 * 0.5 ** 0.9)
    assert 0 < poly_rate(2.0, 9, 10) < 2.0


@pytest.mark.parametrize("stop", [0, 3, 4, 8])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_undisturbed(make, stop, number, capsys):
    run, whole, dataset = make(tag="whole")
    assert train(run, whole, dataset) == list(range(10))
    expected = tensors(whole)
    run, state, dataset = make()
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(run, state, dataset, at=lambda it, loss: (it == stop and os.kill(os.getpid(), number), loss)[1])
    assert stopped.value.code == 0 and "resume with: " in capsys.readouterr().out
    assert signal.getsignal(number) is handler
    torch.manual_seed(99)                                        # whatever happened in between
    run, state, dataset = make()
    assert train(run, state, dataset) == list(range(stop + 1, 10))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), expected, strict=True))
    assert [line["iteration"] for line in log_lines(run)][-3:] == [8, 9, 10]
    assert not (run.folder / "last.pt").exists()


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
    assert read_checkpoint(run.folder / "last.pt")["iteration"] == 4
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


def test_stage_and_from_decide_what_runs(make, tmp_path):
    with pytest.raises(UserError, match="--stage third is unknown; the stages are first, second"):
        make(stage="third")
    with pytest.raises(UserError, match="--stage second needs .*first.pt"):
        make(stage="second")
    run, state, dataset = make(stage="first")
    assert run.trains("first") and not run.trains("second")
    train(run, state, dataset)
    assert train(run, state, dataset, "second") == []
    run, other, dataset = make(tag="b", from_=str(run.folder / "first.pt"))
    assert not run.trains("first") and run.trains("second")
    run.start_from(other["model"])
    assert torch.equal(other["model"].layers[0].weight, state["model"].layers[0].weight)
    finished = torch.load(tmp_path / "x-gta5-a/first.pt", weights_only=True)
    for foreign, words in (({"stage": "zeroth"}, "'zeroth' of x.py"), ({"method": "y"}, "'first' of y.py")):
        torch.save({**finished, **foreign}, tmp_path / "foreign.pt")
        with pytest.raises(UserError, match=f"the stage {words}, which this run does not have .first, second.; --stage"):
            make(tag="c", from_=str(tmp_path / "foreign.pt"))
        assert make(tag="c", from_=str(tmp_path / "foreign.pt"), stage="second")[0].selected == ("second",)
    with pytest.raises(UserError, match="there is no checkpoint nowhere.pt"):
        make(tag="c", from_="nowhere.pt")
    train(run, other, dataset, "second")
    with pytest.raises(UserError, match="no stage follows --from .*second.pt"):
        make(tag="c", from_=str(run.folder / "second.pt"))
    with pytest.raises(AttributeError):
        train(*make(tag="d"), at=lambda it, loss: None if it == 5 else loss)     # fails after the checkpoint of iteration 4
    with pytest.raises(UserError, match="last.pt is from inside the stage 'first'"):
        make(tag="c", from_=str(tmp_path / "x-gta5-d/last.pt"))


def test_a_checkpoint_of_another_script_in_the_folder_is_refused(make):
    """Even where names and shapes are equal, as for two scripts with DeepLab v3+."""
    run, state, dataset = make()
    train(run, state, dataset)
    path = run.folder / "first.pt"
    torch.save({**torch.load(path, weights_only=True), "method": "y"}, path)
    with pytest.raises(UserError, match="first.pt does not fit: it is of y.py"):
        train(*make())
    path.rename(run.folder / "last.pt")
    with pytest.raises(UserError, match="last.pt does not fit: it is of y.py"):
        train(*make())


def test_a_stage_does_not_start_anew_under_what_came_after_it(make):
    run, state, dataset = make()
    train(run, state, dataset)
    train(run, state, dataset, "second")
    (run.folder / "first.pt").unlink()
    with pytest.raises(UserError, match="has no first.pt, but what came after it .second.pt."):
        train(*make())
    with pytest.raises(UserError, match="has no first.pt, but what came after it .second.pt."):
        make()[0].prepare("first")


def test_what_a_script_logs_before_a_stage_is_there_once(make):
    def start(die: bool):
        run, state, dataset = make()
        if not run.begun("first"):
            run.prepare("first")
            run.log(stage="first", iteration=0, note="prepared")
        if die:
            with pytest.raises(AttributeError):
                train(run, state, dataset, at=lambda it, loss: None if it == 2 else loss)
        else:
            train(run, state, dataset)
        return log_lines(run)

    start(die=True)                                              # killed before the first checkpoint of the stage
    lines = start(die=False)
    assert [line["iteration"] for line in lines] == [0, 3, 4, 6, 8, 9, 10] and lines[0]["note"] == "prepared"


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
    assert read_checkpoint(run.folder / "last.pt")["state"]["model"]["layers.0.weight"].isfinite().all()


def test_sigterm_to_all_processes_stops_cleanly(city, tmp_path):
    """As `timeout` (to the group) and schedulers (to each) send it: the loaders must not die before the parent has saved."""
    root = Path(__file__).parents[1]
    line = [sys.executable, "fada.py", "--data", str(city), "--runs", str(tmp_path), "--init", "none", "--workers", "2",
            "--backbone", "resnet18", "--source-size", "64x32", "--target-size", "64x32", "--batch-size", "2",
            "--log-every", "1", "--source-iterations", "100000"]
    process = subprocess.Popen(line, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True)
    printed = [next(process.stdout) for _ in range(3)]
    for pid in children(process.pid):
        os.kill(pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "resume with: " in rest, "".join(printed) + rest
    assert read_checkpoint(tmp_path / "fada-gta5/last.pt")["iteration"] >= 3


def test_checkpoints_of_others_are_refused(tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)

    torch.save({"stage": "first", "state": {"x": Crafted()}}, tmp_path / "crafted.pt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "foreign.pt")
    good = {"stage": "first", "state": {"x": torch.ones(100)}}
    write_atomically(tmp_path / "good.pt", lambda file: torch.save(good, file))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:300])
    for name, words in (("crafted", "damaged or not a checkpoint"), ("cut", "damaged"), ("foreign", "not a checkpoint of")):
        with pytest.raises(UserError, match=f"{name}.pt is {words}"):
            read_checkpoint(tmp_path / f"{name}.pt")
    assert not (tmp_path / "code ran").exists()


def test_state_must_fit():
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="'model' does not fit"):
        load_state({"model": nn.Linear(2, 3).state_dict()}, {"model": model})
    with pytest.raises(UserError, match="holds teacher where model are needed"):
        load_state({"teacher": model.state_dict()}, {"model": model})


def test_evaluation_is_kept_and_done_once(make, city, capsys):
    run, state, dataset = make()
    classes = class_list("gta5")
    test = SegmentationDataset(find_pairs(city, "cityscapes", "val"), "cityscapes", classes, None)
    run.evaluate("first", state["model"], test, classes, {"single-scale": {}})
    assert run.results() == {}                                   # the stage is not finished
    train(run, state, dataset)
    run.evaluate("first", state["model"], test, classes, {"single-scale": {}})
    result = run.results()["first"]["single-scale"]
    assert 0 <= result["mIoU"] <= 1 and sum(map(sum, result["matrix"])) > 0 and (run.folder / "first.png").exists()
    assert "road" in capsys.readouterr().out
    run.evaluate("first", None, test, classes, {"single-scale": {}})     # would fail if it ran


def miou_lines(run) -> list[tuple]:
    lines = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    return [(line["stage"], line["iteration"], line["miou"]) for line in lines if "miou" in line]


def watched(make, **options):
    """A run with its evaluation, also every five iterations; `evaluate` does it at the end."""
    run, state, dataset = make(eval_every=5, **options)
    classes = class_list("gta5")
    test = SegmentationDataset(find_pairs(dataset.pairs[0].image.parents[2], "cityscapes", "val"), "cityscapes", classes, None)
    run.watch(state["model"], test, classes)
    return run, state, dataset, lambda: run.evaluate("first", state["model"], test, classes, {"single-scale": {}})


def test_a_point_of_the_curve_is_not_lost(make, monkeypatch):
    """By a stop in the iteration after which it is due, nor by a kill amid the evaluation; nor is it there twice."""
    whole, state, dataset, evaluate = watched(make)
    train(whole, state, dataset)
    evaluate()
    run, state, dataset, _ = watched(make, tag="b")

    def stop(it, loss):
        run._asked_to_stop = it == 4
        return loss
    with pytest.raises(SystemExit):
        train(run, state, dataset, at=stop)
    assert miou_lines(run) == []
    run, state, dataset, evaluate = watched(make, tag="b")
    train(run, state, dataset)
    for place in ("common.run.viz.curves", "common.run.write_json"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, lambda *args, **how: (_ for _ in ()).throw(KeyboardInterrupt))
            evaluate()
    evaluate()
    assert miou_lines(run) == miou_lines(whole) and [line[1] for line in miou_lines(run)] == [5, 10]


def test_what_a_kill_leaves_is_removed(make):
    run, state, dataset = make()
    train(run, state, dataset)
    last = {**torch.load(run.folder / "first.pt", weights_only=True), "random": {}}
    torch.save(last, run.folder / "last.pt")                     # killed between the stage's end and its removal
    (run.folder / "labels").mkdir()
    for name in (".last.pt.123.tmp", "labels/.a.png.123.tmp"):
        (run.folder / name).touch()
    del run                                                      # and its lock
    run, state, dataset = make()
    assert train(run, state, dataset) == [] and not (run.folder / "last.pt").exists()
    assert not list(run.folder.rglob("*.tmp"))


def test_a_file_that_the_machine_cannot_read_is_not_called_damaged(make, monkeypatch):
    """It would be deleted, and with it days of work."""
    run, state, dataset = make()
    train(run, state, dataset)
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("can't allocate memory: you tried")):
        def fail(path, error=error):
            raise error
        monkeypatch.setattr(common.run.data, "load_tensors", fail)
        for read in (lambda: read_checkpoint(run.folder / "first.pt"), lambda: run.read("first.pt")):
            with pytest.raises(UserError, match="first.pt cannot be read now .*it may be whole"):
                read()


def test_bf16_keeps_losses_in_float32(make):
    run, state, dataset = make(amp="bf16")
    with run.autocast():
        assert nn.Conv2d(3, 4, 1)(torch.zeros(1, 3, 4, 4)).dtype == torch.bfloat16
    run, _, _ = make(tag="b")
    with run.autocast():
        assert nn.Conv2d(3, 4, 1)(torch.zeros(1, 3, 4, 4)).dtype == torch.float32
