"""Every script as a user meets it: --help, import, end to end, resumed in each stage, copied out."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from starts import link_checkpoints

from common import usage
from common.cli import flags
from common.run import Options, Run

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "bismap": "--warmup-iterations 3 --selftrain-iterations 3 --distill-iterations 3 --warmup-batch-size 1 "
              "--batch-size 1 --crop 64x32 --stm-backbone warmup --samples 500 --stm-samples 500 --components 2 --J 4 "
              "--pl-ratio 0.6 --lr 1e-4",
    "c2f": "--step0-iterations 3 --step-iterations 3 --K 2 --crop 64x32 --batch-size 1",
    "cag": "--source-iterations 3 --warmup-epochs 0.375 --stage-epochs 0.375 --K 2 --crop 64x32 --margin 0.05",
    "fada": "--source-iterations 3 --adversarial-iterations 3 --distill-iterations 3 --batch-size 2",
    "sim": "--iterations 3",
}
STAGES = {                                             # of three iterations each
    "bismap": ["warmup", "selftrain", "distill1", "distill2"],
    "c2f": ["step0", "step1", "step2"],
    "cag": ["source", "warmup", "stage1", "stage2"],
    "fada": ["source", "adversarial", "distill"],
    "sim": ["step1", "step2"],
}


def arguments(script: str, city: Path, runs: Path, *more: str) -> list[str]:
    small = "--backbone resnet18 --init none --source-size 64x32 --target-size 64x32 --workers 0 --log-every 1 --save-every 1"
    return ["--data", str(city), "--runs", str(runs), *small.split(), *SCRIPTS[script].split(), *more]


def final_state(folder: Path, stage: str) -> dict:
    return torch.load(folder / f"{stage}.pt", weights_only=True)["state"]["model"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_end_to_end_and_resumed_in_every_stage(script, city, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(script)
    module.main(arguments(script, city, tmp_path, "--tag", "uninterrupted"))
    uninterrupted = tmp_path / f"{script}-gta5-uninterrupted"
    results = json.loads((uninterrupted / "results.json").read_text())
    stages = STAGES[script]
    assert list(results) == stages
    assert all((uninterrupted / f"{name}.png").exists() for name in [*stages, "curves"])

    # Started again, it shows the results and changes no file.
    files, printed = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.*")}, capsys.readouterr().out
    module.main(arguments(script, city, tmp_path, "--tag", "uninterrupted"))
    again = capsys.readouterr().out
    assert all(f"{stage}: finished" in again for stage in stages) and "iteration" not in again
    assert again.split("IoU in percent")[1:] == printed.split("IoU in percent")[-1:]
    assert files == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.*")}

    # Stop after the second iteration of every stage in turn, start again, and end like the uninterrupted run.
    stopped = tmp_path / f"{script}-gta5-stopped"
    for k, stage in enumerate(stages):
        shutil.rmtree(stopped, ignore_errors=True)
        shutil.copytree(uninterrupted, stopped, copy_function=link_checkpoints)      # earlier stages are finished
        (stopped / "results.json").write_text(json.dumps({name: results[name] for name in stages[:k]}))
        for path in [path for name in stages[k:] for pattern in ("", "-*") for path in stopped.glob(f"{name}{pattern}.pt")]:
            path.unlink()

        def report(self, _report=Run.report, **losses):
            _report(self, **losses)
            report.count += 1
            if report.count == 2:
                signal.raise_signal(signal.SIGTERM)
        report.count = 0
        monkeypatch.setattr(Run, "report", report)
        with pytest.raises(SystemExit) as stop:
            module.main(arguments(script, city, tmp_path, "--tag", "stopped"))
        assert stop.value.code == 128 + signal.SIGTERM
        monkeypatch.undo()
        assert torch.load(stopped / "last.pt", weights_only=True)["stage"] == stage
        module.main(arguments(script, city, tmp_path, "--tag", "stopped"))
        for name in stages:
            again, once = final_state(stopped, name), final_state(uninterrupted, name)
            assert all(torch.equal(again[key], once[key]) for key in once), (stage, name)
        assert json.loads((stopped / "results.json").read_text()) == results


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_import_have_no_side_effects(script, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--no-such-flag']; import torch, {script}\n"
            f"try: {script}.main(['--help'])\nexcept SystemExit: pass\n"
            "slow = {'torchvision', 'scipy', 'matplotlib', 'torch._dynamo'} & sys.modules.keys()\n"
            "assert not torch.cuda.is_initialized() and not slow, slow")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert os.listdir(tmp_path) == []
    shown = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--help-all"], cwd=tmp_path, check=True,
                           capture_output=True, encoding="gbk", env={**os.environ, "PYTHONIOENCODING": "gbk"})
    assert "Departures:" in shown.stdout and "paper: ?" in shown.stdout and os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_a_terminal_and_names_the_stages(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.count("\n") <= 24 and shown.count("\n  --") == 10
    text = " ".join(shown.split())
    assert f"run only this stage: {STAGES[script][0]} " in text and f"python {script}.py --help-all" in text


def test_every_common_flag_has_its_group():
    known = {name for names in usage.GROUPS.values() for name in names.split()}
    assert known == {field.name for field, _ in flags(Options)} and set(usage.COMMON) <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_copied_out_it_runs(script, city, tmp_path):
    """With common/ alone, and without its files that only some flags need."""
    for name in {script, *(["c2f"] if script == "bismap" else [])}:      # whose warm-up is C2F's alignment
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    optional = ("published.py", "curves.py", "results.py", "toycity.py", "predict.py", "network.py")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__", *optional))
    line = [sys.executable, f"{script}.py", *arguments(script, city, Path("runs"), "--stage", STAGES[script][0])]
    process = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert process.returncode == 0, process.stderr
    assert (tmp_path / f"runs/{script}-gta5/{STAGES[script][0]}.pt").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_five_packages_and_no_other_script(script):
    files = [ROOT / f"{script}.py", *(ROOT / "common").glob("*.py")]
    allowed = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "PIL", "scipy", "common"}
    more = {"bismap.py": {"c2f"}, "curves.py": {"matplotlib"}, "page.py": {"matplotlib"}}    # for charts
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} <= allowed | more.get(file.name, set()), file


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("flags", "folder", "classes", "means"), [
    ("--source synthia", "synthia", 16, {"mIoU", "mIoU*"}),
    ("--source cityscapes --target crosscity --city Rome", "cityscapes-rome", 19, {"mIoU"}),
    ("--source gta5 --target-labels", "gta5", 19, {"mIoU"}),
])
def test_other_domains(script, flags, folder, classes, means, city, tmp_path):
    module = importlib.import_module(script)
    first = STAGES[script][0]
    module.main([*arguments(script, city, tmp_path, "--stage", first), *flags.split()])
    result = json.loads((tmp_path / f"{script}-{folder}/results.json").read_text())[first]["single-scale"]
    assert len(result["iou"]) == len(result["matrix"]) == classes
    assert {name for name in result if name.startswith("mIoU") and "present" not in name} == means


@pytest.mark.parametrize("script", ["c2f", "fada"])                # the loader is shared; c2f also transforms images in it
def test_a_damaged_image_ends_the_run_and_its_worker(script, city, tmp_path):
    shutil.copytree(city, tmp_path / "data")
    for image in (tmp_path / "data/gta5/images").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    line = [sys.executable, f"{script}.py", *arguments(script, tmp_path / "data", tmp_path / "runs", "--workers", "1")]
    process = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "is damaged, truncated or not an image" in process.stderr


def run_main(script: str, *argv: str) -> int:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(list(argv))
    return stop.value.code


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("more", "words"), [
    (["--crop", "99x32"], "--crop 99x32 is larger than the images (64x32"),
    (["--stage", "finish"], "--stage finish is unknown"),
    (["--device", "cuda"], "--device cuda is not available"),
    (["--from", "missing.pt"], "there is no --from file missing.pt"),
    (["--init", "missing.pth"], "there is no --init file missing.pth"),
    (["--eval"], "is no trained network with its head, and no stage of"),
    (["--export", "out.json"], "--export out.json is the name of the JSON file beside the weights"),
    (["--data", "nowhere"], "nowhere"),
    (["--source", "gta4"], "--source gta4 is none of gta5, synthia, cityscapes"),
])
def test_a_mistake_is_reported_before_anything_runs(script, more, words, city, tmp_path, capsys):
    if more[:2] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run_main(script, *arguments(script, city, tmp_path), *more) == 2
    assert words in capsys.readouterr().err
