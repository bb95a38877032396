"""The toy city: always the same, and readable like the real data sets."""

import itertools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

import fada
from common import files, toycity
from common.cli import Size
from common.files import UserError

SMALL = Size(64, 32)
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
SYNTHIA_TO_CITYSCAPES = {3: 7, 4: 8, 2: 11, 21: 12, 5: 13, 7: 17, 15: 19, 9: 20, 6: 21, 1: 23, 10: 24, 17: 25, 8: 26,
                         19: 28, 12: 32, 11: 33}


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("toycity")
    toycity.main([str(root), "--train", "4", "--val", "3", "--size", "96x48"])
    return root


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_whatever_the_count(city, tmp_path):
    toycity.render(tmp_path, train=2, val=1, size=Size(96, 48))
    fewer, more = contents(tmp_path), contents(city)
    del fewer["toycity.json"]
    assert len(fewer) == 2 * 4 + 2 * 2 + 2 + 1 + 2
    assert {name: more[name] for name in fewer} == fewer


def test_seed_domain_and_index_each_change_the_picture():
    pictures = [toycity.draw(*key, size=SMALL)[0].tobytes()
                for key in (("game", 0), ("game", 1), ("game", 0, 1), ("camera", 0), ("camera-val", 0))]
    assert len(set(pictures)) == 5


def test_layout_is_complete(city):
    assert sorted(name for name in contents(city) if "0000" not in name or name.startswith("city")) == sorted(
        ["toycity.json"] + [
            f"cityscapes/{kind}/{split}/{town}/{town}_{index:06d}_000019_{end}.png"
            for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
            for split, town, index in (("train", "altstadt", 0), ("train", "kleinstadt", 1), ("train", "neustadt", 2),
                                       ("train", "altstadt", 3), *(("val", "seestadt", i) for i in range(3)))])
    for folder, names in (("gta5/images", ["00001", "00002", "00003", "00004"]),
                          ("gta5/labels", ["00001", "00002", "00003", "00004"]),
                          ("synthia/RGB", ["0000000", "0000001", "0000002", "0000003"]),
                          ("synthia/GT/LABELS", ["0000000", "0000001", "0000002", "0000003"]),
                          ("crosscity/Rome/Images/Train", ["pano_00000"]),
                          ("crosscity/Rome/Images/Test", ["pano_00000"]),
                          ("crosscity/Rome/Labels/Test", ["pano_00000_eval"])):
        assert sorted(path.stem for path in (city / folder).iterdir()) == names, folder
    for path in city.rglob("*.png"):
        assert Image.open(path).size == (96, 48), path


def test_gta5_labels_are_palette_pngs_of_cityscapes_ids(city):
    for index in range(4):
        label = Image.open(city / f"gta5/labels/{index + 1:05d}.png")
        ids = toycity.draw("game", index, size=Size(96, 48))[1]
        assert label.mode == "P"
        assert np.array_equal(np.asarray(label), np.where(ids == toycity.MARKING, 7, ids))
        colors = np.asarray(label.convert("RGB"))
        assert (colors[np.asarray(label) == 7] == (128, 64, 128)).all()         # the colours are Cityscapes' own
        assert (colors[np.asarray(label) == 23] == (70, 130, 180)).all()


def test_synthia_labels_are_16_bit_and_agree_with_the_palette_labels(city):
    instances = 0
    for index in range(4):
        pixels = decode_image(str(city / f"synthia/GT/LABELS/{index:07d}.png"), mode=ImageReadMode.UNCHANGED).numpy()
        gta5 = np.asarray(Image.open(city / f"gta5/labels/{index + 1:05d}.png"))
        assert pixels.dtype == np.uint16 and pixels.shape == (3, 48, 96)
        expected = np.where(np.isin(gta5, list(SYNTHIA_TO_CITYSCAPES.values())), gta5, 0)
        mapped = np.vectorize(lambda id: SYNTHIA_TO_CITYSCAPES.get(id, 0))(pixels[0])
        marked = pixels[0] == 22
        assert np.array_equal(mapped[~marked], expected[~marked])
        assert marked.any() and (expected[marked] == 7).all()                   # lane markings lie on the road
        assert (pixels[1][np.isin(gta5, (7, 8, 11, 21, 23))] == 0).all()
        instances = max(instances, pixels[1].max())
        assert (city / f"synthia/RGB/{index:07d}.png").read_bytes() == (
            city / f"gta5/images/{index + 1:05d}.png").read_bytes()
    assert instances > 3


def test_png16_keeps_every_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), np.uint16)
    toycity.write_png16(tmp_path / "x.png", pixels)
    decoded = decode_image(str(tmp_path / "x.png"), mode=ImageReadMode.UNCHANGED)
    assert np.array_equal(decoded.numpy().transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("domain", ["game", "camera"])
def test_every_class_occurs_in_a_fair_share_of_the_images(domain):
    labels = [toycity.draw(domain, index, size=Size(128, 64))[1] for index in range(60)]
    share = {id: np.mean([(label == id).sum() >= 8 for label in labels]) for id in CITYSCAPES_IDS}
    assert min(share.values()) >= 0.12, share
    assert set(np.unique(labels)) - {*CITYSCAPES_IDS, toycity.MARKING}, "some pixels must be void"


def test_the_domains_differ_in_photometry_and_structure():
    saturation, road = {}, {}
    for domain in ("game", "camera"):
        pictures = [toycity.draw(domain, index, size=SMALL) for index in range(16)]
        saturation[domain] = np.mean([np.ptp(image.astype(int), axis=-1) for image, _, _ in pictures])
        road[domain] = np.mean([np.isin(ids, (7, toycity.MARKING)) for _, ids, _ in pictures])
    assert saturation["game"] > 1.5 * saturation["camera"]
    assert road["game"] > road["camera"] + 0.05                                 # a higher camera and a wider road


def test_ensure_renders_once_and_completes_an_interrupted_rendering(tmp_path, monkeypatch):
    arguments = dict(train=2, val=1, size=SMALL)
    drawn = []
    draw = toycity.draw

    def interrupted(domain, index, seed, size):
        drawn.append(domain)
        if domain == "camera-val":
            raise KeyboardInterrupt
        return draw(domain, index, seed, size)

    monkeypatch.setattr(toycity, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toycity.ensure(tmp_path, **arguments)
    assert json.loads((tmp_path / "toycity.json").read_text())["complete"] is False
    monkeypatch.setattr(toycity, "draw", draw)
    toycity.ensure(tmp_path, **arguments)
    assert json.loads((tmp_path / "toycity.json").read_text())["size"] == "64x32"
    toycity.render(tmp_path / "other", **arguments)
    expected = contents(tmp_path / "other")
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("other")} == expected

    monkeypatch.setattr(toycity, "draw", None)              # further rendering would fail
    toycity.ensure(tmp_path)


@pytest.mark.parametrize("marker", ['{"version": 0, "seed": 0}', '{"version": 1, "seed": 7}', "not json", "[1, 2]"])
def test_ensure_refuses_another_city(tmp_path, marker):
    (tmp_path / "toycity.json").write_text(marker)
    with pytest.raises(UserError, match="delete the folder"):
        toycity.ensure(tmp_path)


def test_of_two_first_starts_only_one_renders(tmp_path, monkeypatch):
    rendered = []

    def render(root, *_):
        rendered.append(root)
        time.sleep(0.2)
        root.mkdir()
        (root / toycity.MARKER).write_text(json.dumps({"version": toycity.VERSION, "seed": 0}))
    monkeypatch.setattr(toycity, "render", render)
    with ThreadPoolExecutor() as pool:
        list(pool.map(toycity.ensure, [tmp_path / "data/city"] * 4))
    assert rendered == [tmp_path / "data/city"]


def test_render_refuses_invalid_values(tmp_path, capsys):
    for flags in (["--train", "0"], ["--size", "8x8"], ["--seed", "-1"]):
        with pytest.raises(SystemExit) as stop:
            toycity.main([str(tmp_path / "new"), *flags])
        assert stop.value.code == 2 and "a toy city needs" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write below"):
        toycity.render(tmp_path / "file", train=1, val=1, size=SMALL)


def refused(main, *argv) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    assert stop.value.code == 2


@pytest.fixture
def real(tmp_path):
    """GTA5 and Cityscapes, with the file names of a toy city."""
    for name in ("gta5/images/00001.png", "gta5/labels/00001.png", "synthia/RGB/0000000.png",
                 "cityscapes/leftImg8bit/train/altstadt/altstadt_000000_000019_leftImg8bit.png"):
        (tmp_path / "real" / name).parent.mkdir(parents=True)
        (tmp_path / "real" / name).write_bytes(b"precious")
    yield tmp_path / "real"
    assert set(contents(tmp_path / "real").values()) == {b"precious"} and len(contents(tmp_path / "real")) == 4


def test_a_folder_with_other_files_is_refused_even_if_it_has_the_names_of_a_toy_city(real, tmp_path, capsys):
    refused(fada.main, "--toy", "--data", real, "--runs", tmp_path / "runs")
    refused(toycity.main, real, "--train", 1, "--val", 1, "--size", "64x32")
    assert capsys.readouterr().err.count("is not empty and has no toycity.json") == 2


@pytest.mark.parametrize("marked", [False, True])
def test_a_toy_city_is_not_written_through_links(real, tmp_path, marked, capsys):
    """Not into folders that link to real data, even if a marker says that this is a toy city."""
    root = tmp_path / "data"
    root.mkdir()
    if marked:
        toycity.render(root, train=1, val=1, size=SMALL)
        for name in ("gta5", "cityscapes"):
            shutil.rmtree(root / name)
    for name in ("gta5", "cityscapes"):
        (root / name).symlink_to(real / name, target_is_directory=True)
    refused(toycity.main, root, "--train", 1, "--val", 1, "--size", "64x32")
    assert ("is a link" if marked else "has no toycity.json") in capsys.readouterr().err
    if not marked:
        refused(fada.main, "--toy", "--data", root, "--runs", tmp_path / "runs")


def test_a_hard_linked_file_keeps_its_content(real, tmp_path):
    """A hard link in a city is replaced, not written through; a file that the city lacks is refused."""
    root = tmp_path / "data"
    toycity.render(root, train=1, val=1, size=SMALL)
    image = root / "gta5/images/00001.png"
    image.unlink()
    image.hardlink_to(real / "gta5/images/00001.png")
    toycity.render(root, train=1, val=1, size=SMALL)
    assert image.read_bytes() != b"precious"
    (root / "gta5/images/24966.png").write_bytes(b"precious")
    with pytest.raises(UserError, match="24966.png does not belong to this toy city: delete"):
        toycity.render(root, train=1, val=1, size=SMALL)


def test_rendering_prints_its_progress(tmp_path, monkeypatch, capsys):
    clock = itertools.count(step=20)
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    toycity.render(tmp_path / "city", train=2, val=1, size=SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("city: 7 pictures") and lines[1:3] == ["toy city: picture 2 of 7", "toy city: picture 4 of 7"]
