"""--predict: ids, sizes and names of the files that every script writes; no existing file is overwritten."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import SCRIPTS, STAGES, arguments
from torch import nn

import sim
from common import data, metrics
from common.cli import Size
from common.data import ClassList, class_list
from common.files import UserError
from common.predict import Folder, file_ids

IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]      # Cityscapes', by train id


def photo(path: Path, width: int, height: int, seed: int = 0, **how) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four images in three folders, of three sizes and endings, and files that are not images."""
    folder = tmp_path / "photos"
    photo(folder / "a.png", 64, 32)
    photo(folder / "day/b.JPG", 50, 40, 1, format="JPEG")
    photo(folder / "day/rain/c.jpeg", 30, 60, 2, format="JPEG")
    photo(tmp_path / "elsewhere/d.PNG", 128, 64, 3)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "day/back").symlink_to(folder)                                   # a loop of links
    (folder / "day/._b.jpg").write_bytes(b"macOS")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def trained(city, tmp_path_factory) -> Path:
    """The folder of runs, with one run of sim.py."""
    runs = tmp_path_factory.mktemp("runs")
    sim.main(arguments("sim", city, runs, "--stage", "step1"))
    return runs


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


WRITTEN = ["labels/a.png", "labels/day/b.png", "labels/day/rain/c.png", "labels/linked/d.png", "overlays/a.jpg",
           "overlays/day/b.jpg", "overlays/day/rain/c.jpg", "overlays/linked/d.jpg", "predict.json"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_predicts(script, city, photos, tmp_path, capsys):
    """With the flags of the run, and without a data set on disk."""
    module, stage, out = importlib.import_module(script), STAGES[script][0], tmp_path / "out"
    module.main(arguments(script, city, tmp_path / "runs", "--stage", stage))
    folder = tmp_path / f"runs/{script}-gta5"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    module.main(["--runs", str(tmp_path / "runs"), "--data", str(tmp_path / "nothing"), "--workers", "0",
                 "--predict", str(photos), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "predict: 4 of 4 images are left" in printed and f"{out / 'labels'}" in printed and "IoU" not in printed
    assert files(out) == WRITTEN
    for name, size in (("a", (64, 32)), ("day/b", (50, 40)), ("day/rain/c", (30, 60)), ("linked/d", (128, 64))):
        with Image.open(out / f"labels/{name}.png") as label, Image.open(out / f"overlays/{name}.jpg") as picture:
            assert label.mode == "L" and label.size == picture.size == size
            assert set(np.unique(np.array(label))) <= set(IDS)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_labels_are_the_models(trained, photos, tmp_path, monkeypatch):
    """Compared with predict() on an image of the run's size, which is not resized before."""
    seen = {}
    real = metrics.predict
    monkeypatch.setattr(metrics, "predict", lambda model, image, size, **how: seen.setdefault("model", model) and real(
        model, image, size, **how))
    sim.main(["--runs", str(trained), "--workers", "0", "--predict", str(photos), "--out", str(tmp_path / "out")])
    image = data.read_resized(photos / "a.png", None)
    image = (image - torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    expected = real(seen["model"].eval(), image[None], (32, 64))[0].numpy()
    with Image.open(tmp_path / "out/labels/a.png") as label:
        assert (np.array(label) == np.array(IDS)[expected]).mean() > 0.999                    # float32, other order of sums
    assert len(np.unique(expected)) > 1


def test_it_resumes_and_overwrites_nothing(trained, photos, tmp_path, capsys):
    out = tmp_path / "out"

    def predict(*more: str, images: Path = photos, into: Path = out) -> str:
        capsys.readouterr()
        sim.main(["--runs", str(trained), "--workers", "0", "--predict", str(images), "--out", str(into), *more])
        return capsys.readouterr().out

    def refused(*more: str, **how) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as stop:
            predict(*more, **how)
        assert stop.value.code == 2
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        return capsys.readouterr().err

    predict()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    (out / "labels/day/b.png").unlink()                                        # as if interrupted there
    assert "1 of 4 images are left" in predict() and files(out) == WRITTEN
    unchanged = [path for path in times if path.name not in ("b.png", "b.jpg")]
    assert all(path.stat().st_mtime_ns == times[path] for path in unchanged)
    photo(photos / "new.png", 20, 20, 4)
    assert "1 of 5 images are left" in predict()

    assert "with different weights" in refused("--eval", "--init", _other(tmp_path))           # the same name, another model
    shutil.copytree(photos, tmp_path / "copy", symlinks=True)
    assert "with different images, and nothing is overwritten: give a new folder" in refused(images=tmp_path / "copy")
    theirs = tmp_path / "theirs"
    photo(theirs / "labels/a.png", 64, 32)
    assert f"--out {theirs} holds other files" in refused(into=theirs)
    assert "holds other files" in refused(into=theirs / "labels/a.png")
    assert "lies in --predict" in refused(into=photos / "out") and "lies in --predict" in refused(into=photos)
    (tmp_path / "link").symlink_to(theirs)
    assert "holds other files" in refused(into=tmp_path / "link")
    (tmp_path / "none").mkdir()
    assert "none has no image" in refused(images=tmp_path / "none", into=tmp_path / "new")
    assert "absent is not a folder" in refused(images=tmp_path / "absent", into=tmp_path / "new")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:500])
    with pytest.raises(SystemExit):
        predict()
    assert "cannot read" in (error := capsys.readouterr().err) and "cut.png" in error
    photo(photos / "cut.png", 20, 20)
    shutil.copy(photos / "a.png", photos / "cut.jpg")
    assert "would both become cut.png" in refused(into=tmp_path / "new")
    with pytest.raises(SystemExit):
        sim.main(["--runs", str(trained), "--predict", str(photos)])
    assert "give both" in capsys.readouterr().err


def _other(folder: Path) -> str:
    """Other weights, under the name of the run's last stage."""
    from common.deeplab import make_network
    torch.manual_seed(5)
    torch.save(make_network("v2", "resnet18", 19).state_dict(), folder / "step1.pth")
    return str(folder / "step1.pth")


def test_images_keep_their_aspect_in_about_as_many_pixels(photos):
    images = Folder(photos, Size(64, 32))
    shapes = {name: (tuple(image.shape), tuple(label.shape)) for image, label, name in map(images.__getitem__, range(4))}
    assert shapes == {"a": ((3, 32, 64), (32, 64)), "day/b": ((3, 40, 51), (40, 50)), "day/rain/c": ((3, 64, 32), (60, 30)),
                      "linked/d": ((3, 32, 64), (64, 128))}
    assert [tuple(image.shape[1:]) for image, *_ in (Folder(photos, None)[k] for k in range(4))] == [
        (32, 64), (40, 50), (60, 30), (64, 128)]
    image, label, _ = images[0]
    assert image.dtype == torch.float32 and image.mean().abs() < 0.5 and (label == 255).all()


def test_file_ids():
    assert file_ids(class_list("gta5")).tolist() == IDS
    sixteen = [IDS[k] for k in range(19) if k not in (9, 14, 16)]
    assert file_ids(class_list("synthia")).tolist() == sixteen
    own = ClassList(("a", "b"), ((0, 0, 0), (1, 1, 1)), (0, 1), {"mIoU": (0, 1)}, (), {3: 1, 5: 1, 200: 0, 201: 0, 0: 255})
    assert file_ids(own).tolist() == [200, 3]


def test_weights_of_any_type_are_distinguished(tmp_path, photos):
    """The marker identifies a model by all of its tensors, of every type."""
    class Model(nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.register_buffer("small", torch.tensor(value, dtype=torch.bfloat16))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, x):
            return x, torch.stack([x[:, 0], x[:, 1]], dim=1)

    class Stub:
        options = type("", (), {"out": str(tmp_path / "out"), "predict": str(photos)})
        classes, rank = ClassList(("a", "b"), ((0, 0, 0), (9, 9, 9)), (0, 1), {"mIoU": (0, 1)}), 0

        def sweep(self, what, images, shared=True):
            return ((image[None], label[None], (name,)) for image, label, name in map(images.__getitem__, range(len(images))))

        def autocast(self):
            return torch.autocast("cpu", enabled=False)

    Folder(photos, None).write(Stub(), "x", Model(1.0), {})
    Folder(photos, None).write(Stub(), "x", Model(1.0), {})
    with pytest.raises(UserError, match="different weights"):
        Folder(photos, None).write(Stub(), "x", Model(2.0), {})
    about = json.loads((tmp_path / "out/predict.json").read_text())
    assert about["ids"] == {"a": 7, "b": 8} and about["images"] == os.path.realpath(photos)
