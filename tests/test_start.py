"""What a run does once, when it starts, through the real command line: what it prints, refuses and recognises."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import c2f
import fada
from common import start, toycity
from common.cli import Size
from common.run import Options

SMALL = ("--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --workers 0 --log-every 1 --save-every 1 "
         "--source-iterations 2 --adversarial-iterations 2 --no-distill --batch-size 2 --test-scales 1.0").split()


def train(city: Path, runs: Path, *more: str, script=fada) -> None:
    script.main(["--data", str(city), "--runs", str(runs), *SMALL, *map(str, more)])


def refused(capsys, main, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "error: " in error and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def done(city, tmp_path_factory) -> Path:
    """The folder of a run of two stages with two iterations each."""
    runs = tmp_path_factory.mktemp("runs")
    train(city, runs)
    return runs / "fada-gta5"


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return shutil.copytree(done, tmp_path / "fada-gta5")


def pace(line: str) -> tuple[float, int]:
    """Seconds per iteration and seconds left, from a line that a stage prints."""
    hours, minutes, seconds = map(int, line.split(" left")[0].split()[-1].split(":"))
    return float(line.split(" s/it")[0].split()[-1]), 3600 * hours + 60 * minutes + seconds


def edit(copy: Path, change) -> None:
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))


def test_the_first_lines_say_what_runs_and_the_time_left_is_that_of_all_stages(city, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    train(city, tmp_path, "--target", "crosscity")
    printed = capsys.readouterr().out
    first, device, folder, stages = printed.splitlines()[:4]
    assert first.startswith(f"fada.py, commit {start.commit()}, torch {torch.__version__}")
    if not torch.cuda.is_available():
        assert device == "device: cpu, because this torch is built without CUDA; precision: float32"
    assert folder == f"folder: {tmp_path / 'fada-gta5-rome'}" and stages == "stages: source 2, adversarial 2"
    before = printed.split("source 1/2")[0]
    assert [before.count(f"{count} images") for count in (8, 2, 1, 3)] == [1, 1, 1, 0]           # GTA5, Rome's two parts
    for line in printed.splitlines():
        if "s/it" in line:
            stage, done = line.split("/")[0].split()
            ahead, (seconds, left) = 2 - int(done) + 2 * (stage == "source"), pace(line)
            assert abs(left - ahead * seconds) <= 0.5 + 0.005 * ahead
    config = json.loads((tmp_path / "fada-gta5-rome/config.json").read_text())
    assert config["lengths"] == {"source": 2, "adversarial": 2}
    assert config["made"].keys() == {"torch", "torchvision", "commit", "host", "date", "data", "target_data"}


def test_cags_stages_know_their_lengths_which_depend_on_the_number_of_images(city, tmp_path, capsys):
    import cag
    argv = ["--data", str(city), "--runs", str(tmp_path), *SMALL[:SMALL.index("--adversarial-iterations")], "--crop", "64x32",
            "--warmup-epochs", "2.5", "--K", "1", "--stage-epochs", "200", "--batch-size", "2", "--margin", "0.05"]
    cag.main([*argv, "--stage", "source"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("source 1/2"))
    seconds, left = pace(line)                                                 # eight images, two per batch: 10 and 800 more
    assert left == pytest.approx(1 * seconds, abs=1)                           # with --stage, no other stage is ahead
    cag.main([*argv, "--tag", "all", "--stage-epochs", "0.25"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("source 1/2"))
    seconds, left = pace(line)
    assert left == pytest.approx(11 * seconds + seconds, abs=1 + 12 * 0.005)


@pytest.mark.parametrize(("path", "words"), [
    *((name, "lies in the run folder") for name in ("source.pt", "new.pth", "pictures/new.pth")),
    ("../copy.pt", "copy.pt, which is no export of copy.pt"), ("../link/new.pth", "lies in the run folder"),
    ("../mine.pth", "mine.json, which is no export of mine.pth"), ("../broken.pth", "broken.json, which is no export"),
])
def test_an_export_never_overwrites_a_run(copy, city, capsys, path, words):
    shutil.copy(copy / "source.pt", copy.parent / "copy.pt")
    (copy.parent / "link").symlink_to(copy)
    (copy.parent / "mine.json").write_text('["classes"]')
    (copy.parent / "broken.json").write_text("{")
    files = {file: file.read_bytes() for file in copy.parent.rglob("*.*") if file.is_file()}
    argv = ["--data", city, "--runs", copy.parent, *SMALL, "--eval", "--export"]
    assert words in refused(capsys, fada.main, *argv, copy / path)
    assert words in refused(capsys, fada.main, *argv, copy / path, "--tag", "other")
    assert files == {file: file.read_bytes() for file in copy.parent.rglob("*.*") if file.is_file()}
    fada.main([*map(str, argv), str(copy.parent / "good.pth")])
    fada.main([*map(str, argv), str(copy.parent / "good.pth")])                # an export may replace an export
    assert (copy.parent / "good.json").exists()


def test_an_export_into_the_folder_of_a_new_run_is_refused(city, tmp_path, capsys):
    argv = ["--data", city, "--runs", tmp_path, *SMALL, "--export", tmp_path / "fada-gta5/x.pth"]
    assert "lies in the run folder" in refused(capsys, fada.main, *argv)
    assert not (tmp_path / "fada-gta5").exists()


def test_a_flag_that_an_earlier_version_lacks_counts_as_its_default(copy, city, capsys):
    edit(copy, lambda config: [config.pop(key) for key in ("jitter", "channels_last", "lengths", "images", "made")])
    train(city, copy.parent)
    assert "adversarial: finished before" in capsys.readouterr().out
    argv = ["--data", city, "--runs", copy.parent, *SMALL]
    assert "--jitter (0.5 -> 0.25)" in refused(capsys, fada.main, *argv, "--jitter", "0.25")
    assert "--channels-last (False -> True)" in refused(capsys, fada.main, *argv, "--channels-last")


def test_a_longer_stage_of_an_existing_run(copy, city, capsys):
    """The message says how to continue, and that works."""
    argv = ["--data", city, "--runs", copy.parent, *SMALL]
    error = refused(capsys, fada.main, *argv, "--adversarial-iterations", 3)
    before = copy / "source.pt"
    assert f"to train 'adversarial' for that long, add another --tag and --from {before}" in error
    train(city, copy.parent, "--adversarial-iterations", 3, "--tag", "longer", "--from", before)
    assert "adversarial 3/3" in capsys.readouterr().out
    for more in (["--source-iterations", 3], ["--adversarial-iterations", 3, "--lr", "1e-3"]):
        assert "give this one another --tag, or delete the folder" in refused(capsys, fada.main, *argv, *more)


def test_another_data_set_is_another_run(copy, tmp_path_factory, city, capsys):
    """Even with the same settings: by the number of images, and by their names."""
    more, other = tmp_path_factory.mktemp("more"), shutil.copytree(city, copy.parent / "other")
    toycity.render(more, train=9, val=3, size=Size(64, 32))
    images = other / "cityscapes/leftImg8bit/val/seestadt"
    for folder, end in ((images, "leftImg8bit"), (other / "cityscapes/gtFine/val/seestadt", "gtFine_labelIds")):
        (folder / f"seestadt_000000_000019_{end}.png").rename(folder / f"seestadt_000007_000019_{end}.png")
    argv = ["--runs", copy.parent, *SMALL, "--data"]
    assert "has 8 images, here are 9" in refused(capsys, fada.main, *argv, more)
    assert "has other file names" in refused(capsys, fada.main, *argv, other)
    shutil.move(shutil.copytree(city, copy.parent / "moved"), copy.parent / "elsewhere")         # the same images
    fada.main([*map(str, argv), str(copy.parent / "elsewhere")])
    (copy / "source.pt").unlink(), (copy / "adversarial.pt").unlink()                            # nothing is trained yet
    (copy / "results.json").unlink()
    fada.main([*map(str, argv), str(more)])
    assert json.loads((copy / "config.json").read_text())["images"]["source train"]["images"] == 9


@pytest.mark.parametrize("native", [True, False])
def test_amp_auto_is_decided_once_and_belongs_to_the_run(native, city, tmp_path, monkeypatch, capsys):
    chosen, words = ("bf16", "bfloat16") if native else ("none", "float32")
    monkeypatch.setattr(start, "native_bf16", lambda device: native)
    train(city, tmp_path, "--amp", "auto", "--stage", "source")
    assert f"precision: {words}, chosen by --amp auto\n" in capsys.readouterr().out
    folder = tmp_path / "fada-gta5"
    assert json.loads((folder / "config.json").read_text())["amp"] == chosen
    assert torch.load(folder / "source.pt")["options"]["amp"] == chosen
    monkeypatch.setattr(start, "native_bf16", lambda device: not native)       # another machine keeps the run's precision
    train(city, tmp_path, "--amp", "auto")
    assert f"precision: {words}, chosen" in capsys.readouterr().out
    assert torch.load(folder / "adversarial.pt")["options"]["amp"] == chosen


@pytest.mark.parametrize(("device", "native", "given", "begun", "expected"), [
    ("cuda", True, (None, None), {}, ("bf16", True)), ("cuda", False, (None, None), {}, ("none", False)),
    ("cuda", True, ("none", None), {}, ("none", False)), ("cuda", True, ("bf16", False), {}, ("bf16", False)),
    ("cuda", True, (None, None), {"amp": "none", "channels_last": False}, ("none", False)),
    ("cuda", True, (None, None), {"seed": 0}, ("none", False)),                  # begun by a version without these flags
    ("cuda", False, ("auto", None), {"amp": "bf16", "channels_last": True}, ("bf16", True)),
    ("cpu", True, (None, None), {}, ("none", False)), ("cpu", True, ("auto", None), {}, ("bf16", False)),
    ("cpu", True, ("auto", True), {}, ("bf16", True)), ("cpu", False, (None, None), {"amp": "bf16"}, ("bf16", False)),
    ("mps", False, (None, None), {}, ("none", False))])
def test_precision_and_memory_format_where_they_are_left_open(device, native, given, begun, expected, monkeypatch):
    monkeypatch.setattr(start, "native_bf16", lambda device: native)
    options = Options(amp=given[0], channels_last=given[1])
    start.choose_precision(options, torch.device(device), begun)
    assert (options.amp, options.channels_last) == expected


def test_bf16_is_native_where_the_processor_or_the_gpu_computes_in_it(monkeypatch):
    for vector, tile in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda vector=vector: vector, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tile=tile: tile, raising=False)
        assert start.native_bf16(torch.device("cpu")) == (vector or tile)
    for capability, native in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert start.native_bf16(torch.device("cuda")) == native
    assert not start.native_bf16(torch.device("mps"))


@pytest.mark.parametrize("script", ["bismap", "c2f", "cag", "fada", "sim"])
def test_the_toy_settings_leave_the_precision_to_the_machine(script):
    assert __import__(script).TOY["amp"] == "auto"


def test_eval_takes_the_flags_of_the_run(tmp_path, city, capsys):
    """Network, sizes, classes, domains, data folder and test settings; the command line overrides them."""
    train(city, tmp_path, "--source", "synthia", "--tag", "x", "--stage", "source")

    def scores(columns: int, argv=()) -> list[str]:
        """The first of the printed columns."""
        if argv:
            fada.main(["--workers", "0", "--eval", *map(str, argv)])
        lines = capsys.readouterr().out.split("IoU in percent")[1].splitlines()[3:]
        return [line.split()[-columns] for line in lines if line]

    table, checkpoint = scores(1), tmp_path / "fada-synthia-x/source.pt"
    assert 18 <= len(table) <= 20 and len(set(table)) > 2                      # 16 classes and the means
    assert scores(2, ["--runs", tmp_path, "--tag", "x"]) == table
    assert scores(2, ["--runs", tmp_path, "--tag", "x", "--source", "synthia"]) == table
    assert scores(2, ["--runs", tmp_path / "none", "--from", checkpoint]) == table
    assert scores(2, ["--from", checkpoint, "--target-size", "32x16"]) != table
    values = vars(fada.Config()) | vars(Options(runs=str(tmp_path), eval=True))
    assert "--source=synthia" in start.trained_with("fada", values, {"source"})        # of the only run
    assert start.trained_with("fada", values | {"init": "other.pth"}, {"source"}) == []
    named = values | {"init": "other.pth", "source": "synthia", "tag": "x"}
    assert start.trained_with("fada", named, {"source"})[0] == "--source=synthia"
    assert not (tmp_path / "none").exists()


def test_eval_of_another_scripts_run_and_of_several_runs(copy, city, capsys):
    train(city, copy.parent, "--source", "synthia", "--stage", "source")
    capsys.readouterr()
    error = refused(capsys, fada.main, "--runs", copy.parent, "--data", city, "--eval", "--source", "cityscapes", "--target",
                    "crosscity", "--init", "none")
    assert "no stage of" in error
    assert "no trained network" in refused(capsys, c2f.main, "--runs", copy.parent, "--data", city, "--eval", "--init", "none")


def test_tensorboard_gets_what_the_log_has(city, tmp_path, capsys, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(city, tmp_path, "--stage", "source", "--tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "fada-gta5/tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (tmp_path / "fada-gta5/log.jsonl").read_text().splitlines()]
    written = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    wanted = {(f"source/{key}", line["iteration"]): value for line in log
              for key, value in {**line, **line.get("miou", {})}.items() if isinstance(value, float)}
    assert written == pytest.approx(wanted, rel=1e-6) and len(wanted) >= 8
    train(city, tmp_path, "--tag", "without")
    assert not (tmp_path / "fada-gta5-without/tensorboard").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    argv = ["--data", city, "--runs", tmp_path, *SMALL, "--tag", "none", "--tensorboard"]
    assert "--tensorboard needs tensorboard: pip install tensorboard" in refused(capsys, fada.main, *argv)


def test_a_tilde_is_the_home_folder_in_every_path(city, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    os.symlink(city, tmp_path / "city")
    fada.main(["--data=~/city", "--runs=~/runs", *SMALL, "--stage", "source", "--export=~/out.pth"])
    assert (tmp_path / "runs/fada-gta5/source.pt").exists() and (tmp_path / "out.pth").exists()
