"""common/data.py on files written byte by byte."""

from __future__ import annotations

import multiprocessing
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from common.cli import Size, command
from common.data import (
    BY_COLOR,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    Pair,
    SegmentationDataset,
    batch_order,
    class_list,
    derive_seed,
    fixed_version,
    read_ids,
    read_image,
    read_label,
    read_resized,
    save_label,
    sweep_loader,
    training_loader,
)
from common.files import UserError
from common.layouts import find_pairs

GTA, SYN = class_list("gta5"), class_list("synthia")
# By hand from the data sets' id lists: Cityscapes id -> class index with 19 and with 16 classes, and
# SYNTHIA id -> class index with 16.
CITY_19 = dict(zip([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], range(19)))
CITY_16 = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 23: 9, 24: 10, 25: 11, 26: 12, 28: 13, 32: 14,
           33: 15}
SYNTHIA_16 = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 9, 10: 10, 17: 11, 8: 12, 19: 13, 12: 14,
              11: 15}


def write_png(path, pixels: np.ndarray, colour: int, palette: bytes = b"", rows: int | None = None, kind: int = 0):
    """A PNG with `pixels` (h,w) or (h,w,c), uint8 or uint16; colour type 0 grey, 2 RGB, 3 palette; rows with filter `kind`."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    data = zlib.compress(b"".join(bytes([kind]) + row.tobytes() for row in big_endian[:rows]))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8 * pixels.itemsize, colour, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"PLTE", palette) * bool(palette)
                     + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8)


def gta5(root, count: int = 6, size=(12, 16)):
    """A small GTA5 tree with random images and palette labels."""
    for i in range(count):
        write_png(root / f"gta5/images/{i:05}.png", noise(*size, i), 2)
        write_png(root / f"gta5/labels/{i:05}.png", noise(*size, i)[..., 0] % 35, 3, bytes(range(105)))
    return root


def dataset_of(root, **kwargs) -> SegmentationDataset:
    return SegmentationDataset(find_pairs(root, "gta5"), "gta5", GTA, kwargs.pop("size", None), **kwargs)


def test_class_lists():
    assert len(GTA) == 19 and GTA.train_ids == tuple(range(19)) and GTA.means == {"mIoU": tuple(range(19))}
    assert SYN.train_ids == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
    assert SYN.names[9] == "sky" and SYN.names[15] == "bicycle" and SYN.colors[9] == (70, 130, 180)
    assert SYN.means == {"mIoU": tuple(range(16)), "mIoU*": (0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}
    cross = class_list("cityscapes", "crosscity")
    assert len(cross) == 19 and cross.means == {"mIoU": (0, 1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)}


@pytest.mark.parametrize("dataset, classes, table, ids", [
    ("gta5", GTA, CITY_19, [*range(35), 255]), ("cityscapes", GTA, CITY_19, [*range(34), 255]),
    ("cityscapes", SYN, CITY_16, [*range(34), 255]), ("crosscity", GTA, CITY_19, [*range(34), 255]),
])
@pytest.mark.parametrize("colour", [0, 3])
def test_grey_and_palette_labels_hold_ids(tmp_path, dataset, classes, table, ids, colour):
    palette = bytes(3 * [200]) + bytes(range(253)) + bytes(512)  # any colours: they must not matter
    path = write_png(tmp_path / "label.png", np.array([ids], np.uint8), colour, palette if colour == 3 else b"")
    assert read_label(path, dataset, classes)[0].tolist() == [table.get(i, 255) for i in ids]


def test_synthia_labels_are_the_first_of_16_bit_channels(tmp_path):
    ids = np.arange(23, dtype=np.uint16)
    path = write_png(tmp_path / "label.png", np.stack([ids, ids * 2000, 0 * ids], axis=-1)[None], 2)
    assert read_label(path, "synthia", SYN)[0].tolist() == [SYNTHIA_16.get(i, 255) for i in range(23)]
    assert read_label(path, "synthia", GTA)[0, 19] == 15         # a bus is 15 with 19 classes, not 13
    write_png(path, np.stack([ids, ids, ids], axis=-1).astype(np.uint8)[None], 2)
    with pytest.raises(UserError, match="label.png must be a 16-bit RGB PNG"):
        read_label(path, "synthia", SYN)


@pytest.mark.parametrize("dataset, ids, named", [
    ("gta5", [7, 35, 200], "35, 200"), ("cityscapes", [7, 34, 99], "34, 99"), ("crosscity", [34], "34"),
    ("synthia", [3, 23, 255], "23, 255"), ("synthia", [256 * 3], "768"),
])
def test_undefined_ids_are_named(tmp_path, dataset, ids, named):
    pixels = np.array([ids], np.uint16 if dataset == "synthia" else np.uint8)
    path = write_png(tmp_path / "x.png", np.stack([pixels] * 3, -1) if dataset == "synthia" else pixels,
                     2 if dataset == "synthia" else 0)
    with pytest.raises(UserError, match=rf"x.png has ids that {dataset} does not define: {named}; replace"):
        read_label(path, dataset, SYN)


def test_labels_of_another_pixel_type_are_refused(tmp_path):
    for pixels, colour in ((noise(2, 2), 2), (np.full((2, 2), 7, np.uint16), 0)):
        path = write_png(tmp_path / "x.png", pixels, colour)
        with pytest.raises(UserError, match="x.png must be an 8-bit PNG with one channel"):
            read_label(path, "cityscapes", GTA)
    for shape, colour in (((2, 2), 0), ((2, 2, 3), 2)):
        path = write_png(tmp_path / "x.png", np.full(shape, 7, np.uint16), colour)
        with pytest.raises(UserError, match="x.png is not an 8-bit image"):
            read_image(path)


def test_images_are_rgb(tmp_path):
    pixels = noise(20, 30)
    for save in ({"format": "PNG"}, {"format": "JPEG", "quality": 95}):
        for mode in ("RGB", "L", *(("CMYK",) if save["format"] == "JPEG" else ("RGBA", "P"))):
            Image.fromarray(pixels).convert(mode).save(tmp_path / "x", **save)
            with Image.open(tmp_path / "x") as file:
                expected = np.array(file.convert("RGB"))
            image = read_image(tmp_path / "x")
            assert image.dtype == torch.uint8
            tolerance = 2 if mode == "CMYK" else 0               # the libraries round the black channel differently
            assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


def _read_in_another_process(path, kind, answer):
    try:
        read_image(path) if kind == "image" else read_label(path, kind, SYN)
        answer.put("read without an error")
    except UserError as error:
        answer.put(str(error))


@pytest.mark.parametrize("kind", ["image", "jpeg", "gta5", "synthia"])
def test_damaged_files_are_errors_that_name_them(tmp_path, kind):
    """In another process, because a damaged file may make a decoder kill its process."""
    path = tmp_path / "x.png"
    if kind == "jpeg":
        Image.fromarray(noise(64, 64)).save(path, format="JPEG")
    elif kind == "synthia":
        write_png(path, (noise(64, 64) % 23).astype(np.uint16), 2)
    else:
        write_png(path, noise(64, 64) if kind == "image" else noise(64, 64)[..., 0] % 34, 2 if kind == "image" else 0)
    content = path.read_bytes()
    half = len(content) // 2
    damages = {"cut": content[:half], "short": content[:-30], "zeros": content[:half] + bytes(len(content) - half),
               "empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n"}
    if kind != "jpeg":                                           # JPEG has no checksums
        damages["bit"] = content[:half] + bytes([content[half] ^ 1]) + content[half + 1:]
    if kind == "synthia":                                        # correct checksums, but rows are missing
        rows = write_png(tmp_path / "y.png", (noise(64, 64) % 23).astype(np.uint16), 2, rows=40)
        damages["rows"] = rows.read_bytes()
        damages["filter"] = write_png(tmp_path / "y.png", (noise(64, 64) % 23).astype(np.uint16), 2, kind=5).read_bytes()
    for name, data in {**damages, "missing": None}.items():
        path.unlink() if data is None else path.write_bytes(data)
        context = multiprocessing.get_context("fork")
        answer = context.SimpleQueue()
        process = context.Process(target=_read_in_another_process,
                                  args=(path, "image" if kind == "jpeg" else kind, answer))
        process.start()
        process.join()
        assert process.exitcode == 0, name
        reason = "No such file or directory" if data is None else "the file is damaged, truncated or not an image"
        assert answer.get() == f"cannot read {path}: {reason}", name


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_find_pairs_in_each_layout(tmp_path):
    touch(tmp_path, "gta5/images/00002.png", "gta5/images/00001.png", "gta5/labels/00001.png", "gta5/labels/00002.png",
          "gta5/images/._00001.png", "gta5/images/Thumbs.db", "translated/00001.png", "translated/00002.png")
    pairs = find_pairs(tmp_path, "gta5")
    assert pairs == [Pair(tmp_path / f"gta5/images/{n}.png", tmp_path / f"gta5/labels/{n}.png", n)
                     for n in ("00001", "00002")]
    translated = find_pairs(tmp_path, "gta5", images=tmp_path / "translated")
    assert [p.image for p in translated] == [tmp_path / "translated/00001.png", tmp_path / "translated/00002.png"]
    assert [p[1:] for p in translated] == [p[1:] for p in pairs]

    touch(tmp_path, "synthia/RGB/0000000.png", "synthia/GT/LABELS/0000000.png")
    assert find_pairs(tmp_path, "synthia")[0].label == tmp_path / "synthia/GT/LABELS/0000000.png"

    stem = "ulm/ulm_000000_000019"
    touch(tmp_path, *(f"cityscapes/leftImg8bit/{split}/{stem}_leftImg8bit.png" for split in ("train", "val")),
          f"cityscapes/gtFine/val/{stem}_gtFine_labelIds.png", f"cityscapes/gtFine/val/{stem}_gtFine_color.png")
    assert find_pairs(tmp_path, "cityscapes", labels=False) == [
        Pair(tmp_path / f"cityscapes/leftImg8bit/train/{stem}_leftImg8bit.png", None, stem)]
    val = find_pairs(tmp_path, "cityscapes", "val")[0]
    assert (val.name, val.label) == (stem, tmp_path / f"cityscapes/gtFine/val/{stem}_gtFine_labelIds.png")

    touch(tmp_path, "crosscity/Rio/Images/Train/a.png", "crosscity/Rio/Images/Train/b.jpg",
          "crosscity/Rio/Images/Test/c.jpg", "crosscity/Rio/Labels/Test/c_eval.png")
    assert [p[1:] for p in find_pairs(tmp_path, "crosscity", city="Rio")] == [(None, "a"), (None, "b")]
    assert find_pairs(tmp_path, "crosscity", "val", city="Rio")[0].label.name == "c_eval.png"
    with pytest.raises(UserError, match="no city 'Paris' in .*: choose one of Rio$"):
        find_pairs(tmp_path, "crosscity", city="Paris")


def test_what_is_missing_is_named(tmp_path):
    touch(tmp_path, "gta5/images/1.png", "gta5/images/2.png", "gta5/labels/1.png")
    with pytest.raises(UserError, match=r"gta5/labels/2.png is missing .found there: 1.png.; add it, or remove the image$"):
        find_pairs(tmp_path, "gta5")
    touch(tmp_path, "gta5/labels/2.png", "gta5/labels/3.png")
    with pytest.raises(UserError, match=r"gta5/images/3.png is missing .found there: 1.png, 2.png.; add it, or remove"):
        find_pairs(tmp_path, "gta5")
    touch(tmp_path, "gta5/images/3.png", "other/1.png", "other/2.png")
    with pytest.raises(UserError, match=r"other/3.png is missing; translate it too$"):
        find_pairs(tmp_path, "gta5", images=tmp_path / "other")
    touch(tmp_path, "cityscapes/leftImg8bit/train/ulm/a_leftImg8bit.png")
    with pytest.raises(UserError) as error:
        find_pairs(tmp_path, "cityscapes")
    assert f"{tmp_path}/cityscapes/gtFine/train has no cityscapes files" in str(error.value)
    assert "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png" in str(error.value)
    assert str(error.value).endswith(f"found in {tmp_path}/cityscapes: leftImg8bit/train/ulm/a_leftImg8bit.png")
    with pytest.raises(UserError, match="no dataset 'gta5' with a split 'val': choose one of gta5 .train., synthia"):
        find_pairs(tmp_path, "gta5", "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found in .*/empty: nothing"):
        find_pairs(tmp_path / "empty", "synthia")
    touch(tmp_path, "crosscity/Rio/Images/Train/a.png", "crosscity/Rio/Images/Train/a.jpg")
    with pytest.raises(UserError, match="a.jpg, a.png in .*/Rio/Images/Train have the same name 'a': keep one per image"):
        find_pairs(tmp_path, "crosscity", city="Rio")


def test_an_unreadable_folder_beside_what_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    iterdir = Path.iterdir

    def guarded(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)
    monkeypatch.setattr(Path, "iterdir", guarded)
    with pytest.raises(UserError, match="found in .*: lost.found/$"):
        find_pairs(tmp_path, "gta5")


def test_labels_of_another_size_than_their_image(tmp_path):
    """Training labels are resized to it, evaluation labels keep their size; proportions may differ by at most 2 percent."""
    image = write_png(tmp_path / "image.png", noise(4, 6), 2)
    label = write_png(tmp_path / "label.png", np.array([[7, 8, 11], [12, 13, 17]], np.uint8), 0)
    for dataset in ("gta5", "cityscapes", "crosscity"):
        images = SegmentationDataset([Pair(image, label, "image")], dataset, GTA, None)
        assert images[0, 5][1].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
        assert images[0][1].tolist() == [[0, 1, 2], [3, 4, 5]]
    ids = np.array(sorted(CITY_19))[noise(62, 93)[..., 0] % 19].astype(np.uint8)
    pair = Pair(write_png(tmp_path / "wide.png", noise(40, 60), 2), write_png(tmp_path / "small.png", ids, 0), "wide")
    shown = SegmentationDataset([pair], "gta5", GTA, Size(30, 20))[0, 5][1].numpy()             # first to the image's file size

    def nearest(array, height, width):
        rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip((height, width), array.shape))
        return array[rows][:, columns]

    twice = nearest(nearest(ids, 40, 60), 20, 30)
    assert shown.tolist() == np.vectorize(CITY_19.get)(twice).tolist() and (twice != nearest(ids, 20, 30)).any()
    for shape, fits in (((100, 151), True), ((100, 154), False), ((100, 148), True), ((6, 4), False)):
        write_png(label, np.full(shape, 7, np.uint8), 0)
        images = SegmentationDataset([Pair(image, label, "image")], "cityscapes", GTA, None)
        if fits:
            assert images[0, 5][1].shape == (4, 6) and images[0][1].shape == shape
        else:
            with pytest.raises(UserError, match=rf"label.png is {shape[1]}x{shape[0]}, its image .*image.png 6x4: .*restore"):
                images[0]


CITYSCAPES_COLORS = {0: (0, 0, 0), 4: (20, 20, 20), 5: (111, 74, 0), 7: (128, 64, 128), 11: (70, 70, 70), 17: (153, 153, 153),
                     18: (153, 153, 153), 21: (107, 142, 35), 22: (152, 251, 152), 23: (70, 130, 180), 26: (0, 0, 142),
                     34: (0, 0, 142)}                            # of ids; 18 and 34: GTA5's, without a class


def palette_png(path, ids: np.ndarray, entries: dict[int, int], colors):
    """A palette PNG of `ids`. entries: id -> its palette index; colors: id -> its colour."""
    palette = np.zeros((256, 3), np.uint8)
    for i, index in entries.items():
        palette[index] = colors[i]
    return write_png(path, np.vectorize(entries.get)(ids).astype(np.uint8), 3, palette[:max(entries.values()) + 1].tobytes())


@pytest.mark.parametrize("classes, table", [(GTA, CITY_19), (SYN, CITY_16)])
def test_a_palettes_content_decides_what_its_indices_mean(tmp_path, classes, table):
    ids = np.array([[0, 4, 5, 7, 11], [17, 21, 22, 23, 26]])
    expected = [[table.get(i, 255) for i in row] for row in ids.tolist()]
    plain, order = {i: i for i in CITYSCAPES_COLORS}, {i: k for k, i in enumerate([26, 7, 0, 4, 5, 11, 17, 21, 22, 23])}

    def read(dataset, *how):
        path = palette_png(tmp_path / "x.png", *how)
        return read_label(path, dataset, classes).tolist(), read_ids(path, dataset, classes)[2]

    greys = {i: (i, i, i) for i in range(256)}
    assert read("gta5", ids, plain, CITYSCAPES_COLORS) == (expected, "")
    for dataset in ("gta5", "cityscapes", "crosscity"):          # reordered, as optimisers of PNGs do
        assert read(dataset, ids, order, CITYSCAPES_COLORS) == (expected, BY_COLOR)
        assert read(dataset, ids, order, greys)[0] == expected
        assert read(dataset, ids, plain, greys)[0] == expected
        others = {i: (9 * i % 256, 255 - i, 7 * i) for i in range(35)}
        labels, reading = read(dataset, ids, plain, others)
        assert labels == expected and "indices are the ids" in reading
    # GTA5's 18 and 34 have no class, but the colours of pole and car. A palette of greys may be GTA5's own.
    assert read("gta5", np.array([[18, 34, 26, 17]]), plain, CITYSCAPES_COLORS) == ([[255, 255, table[26], table[17]]], "")
    assert read("gta5", np.array([[0, 4, 11]]), plain, CITYSCAPES_COLORS) == ([[255, 255, 2]], "")
    # ids 0 and 20 as greys; grey 20 is also the colour of another id
    assert read("cityscapes", np.array([[0, 20]]), {0: 0, 20: 1}, greys)[0] == [[255, table[20]]]
    with pytest.raises(UserError, match="x.png has ids that cityscapes does not define: 200;"):
        read("cityscapes", np.array([[200]]), {200: 3}, greys)
    with pytest.raises(UserError, match="x.png has ids that cityscapes does not define: 40;"):
        read("cityscapes", np.array([[7]]), {7: 40}, {7: (1, 2, 3)})


def test_an_own_sets_classes_may_be_black_and_white(tmp_path):
    """A palette with the classes' colours at the classes' ids holds indices, also if all of these colours are greys."""
    two = replace(GTA, names=("back", "front"), colors=((0, 0, 0), (255, 255, 255)), train_ids=(), ids={0: 0, 1: 1})
    for colors in ({0: (0, 0, 0), 1: (255, 255, 255)}, {0: (0, 0, 0), 1: (1, 1, 1)}):
        path = palette_png(tmp_path / "x.png", np.array([[0, 1, 0]]), {0: 0, 1: 1}, colors)
        assert read_label(path, "own", two).tolist() == [[0, 1, 0]]
    two = replace(two, ids={0: 0, 255: 1})                       # an 8-bit mask, also one that was shrunk to a palette
    for path in (write_png(tmp_path / "y.png", np.array([[0, 255, 0]], np.uint8), 0),
                 palette_png(tmp_path / "x.png", np.array([[0, 1, 0]]), {0: 0, 1: 1}, {0: (0, 0, 0), 1: (255, 255, 255)})):
        assert read_label(path, "own", two).tolist() == [[0, 1, 0]]


def test_black_and_white_labels_are_8_bit_ones_that_were_shrunk(tmp_path):
    pixels = np.array([[0, 255, 0], [0, 0, 255]], np.uint8)
    Image.fromarray(pixels).convert("1").save(tmp_path / "x.png")
    ids, _, reading = read_ids(tmp_path / "x.png", "cityscapes", GTA)
    assert ids.tolist() == pixels.tolist() and reading == ""
    assert (read_label(tmp_path / "x.png", "cityscapes", GTA) == 255).all()


def test_train_ids_are_read_by_classes_that_say_so(tmp_path):
    train = np.array([[*range(19), 255]], np.uint8)
    nineteen = replace(GTA, ids={k: k for k in range(19)})
    sixteen = replace(SYN, ids=dict.fromkeys(range(19), 255) | {t: k for k, t in enumerate(SYN.train_ids)})
    path = write_png(tmp_path / "x.png", train, 0)
    for dataset in ("gta5", "cityscapes", "synthia"):
        assert read_label(path, dataset, nineteen)[0].tolist() == [*range(19), 255]
        assert read_label(path, dataset, sixteen)[0].tolist() == [*range(9), 255, 9, 10, 11, 12, 255, 13, 255, 14, 15, 255]
    write_png(path, np.array([[0, 19, 33]], np.uint8), 0)
    with pytest.raises(UserError, match="x.png has ids that gta5 does not define: 19, 33; train ids go up to 18: omit"):
        read_label(path, "gta5", nineteen)


def test_what_other_programs_and_sets_leave_beside_the_labels(tmp_path):
    touch(tmp_path, *(f"gta5/{name}" for name in ("images/00001.jpg", "images/00002.PNG", "images/00003.jpeg")),
          *(f"gta5/labels/0000{k}{end}.png" for k in (1, 2, 3) for end in ("", "_labelTrainIds", "_color", "_instanceIds")))
    assert [p.label.name for p in find_pairs(tmp_path, "gta5")] == ["00001.png", "00002.png", "00003.png"]
    assert [p.image.name for p in find_pairs(tmp_path, "gta5")] == ["00001.jpg", "00002.PNG", "00003.jpeg"]
    train = find_pairs(tmp_path, "gta5", train_ids=True)
    assert [(p.name, p.label.name) for p in train] == [(f"0000{k}", f"0000{k}_labelTrainIds.png") for k in (1, 2, 3)]
    (tmp_path / "gta5/labels/00002_labelTrainIds.png").unlink()
    with pytest.raises(UserError, match=r"00002.PNG has no label: .* is missing .found there: 00002.png, 00002_color.png, "):
        find_pairs(tmp_path, "gta5", train_ids=True)

    stem, end = "ulm/ulm_000000_000019", "_leftImg8bit_foggy_beta_0.02.png"
    touch(tmp_path, f"cityscapes/leftImg8bit_foggy/val/{stem}{end}",
          *(f"cityscapes/gtFine/val/{stem}_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds", "color")))
    for train_ids, kind in ((False, "labelIds"), (True, "labelTrainIds")):
        pair = find_pairs(tmp_path, "cityscapes", "val", train_ids=train_ids)[0]
        assert (pair.name, pair.image.name) == (stem, f"ulm_000000_000019{end}") and pair.label.name.endswith(f"_{kind}.png")
    touch(tmp_path, f"cityscapes/leftImg8bit_foggy/val/{stem}_leftImg8bit_foggy_beta_0.01.png")
    with pytest.raises(UserError, match=r"foggy_beta_0.01.png, ulm_.*_foggy_beta_0.02.png in .* keep one"):
        find_pairs(tmp_path, "cityscapes", "val")
    touch(tmp_path, "acdc/cityscapes/leftImg8bit/val/a/b_rgb_anon.png", "acdc/cityscapes/gtFine/val/a/b_gt_labelIds.png")
    assert find_pairs(tmp_path / "acdc", "cityscapes", "val")[0].name == "a/b"


def test_an_own_set_lies_at_any_depth_and_behind_links(tmp_path):
    touch(tmp_path, "real/images/val/x/y/1.jpg", "real/labels/val/x/y/1.png", "real/images/val/2_color.png",
          "real/labels/val/2_color.png", "real/labels/val/2_color_color.png")
    for kind in ("images", "labels"):
        (tmp_path / "linked" / kind / "val").mkdir(parents=True)
        (tmp_path / "linked" / kind / "val/x").symlink_to(tmp_path / "real" / kind / "val/x", target_is_directory=True)
        (tmp_path / "linked" / kind / "val/2_color.png").symlink_to(tmp_path / "real" / kind / "val/2_color.png")
    pairs = find_pairs(tmp_path, "linked", "val", own=True)
    assert [(p.name, p.label.name) for p in pairs] == [("2_color", "2_color.png"), ("x/y/1", "1.png")]
    touch(tmp_path, "real/labels/val/x/y/3.png")
    with pytest.raises(UserError, match=r"labels/val/x/y/3.png has no image: .*images/val/x/y/3.png is missing"):
        find_pairs(tmp_path, "linked", "val", own=True)


def test_a_set_without_labels_is_no_error_where_none_are_needed(tmp_path):
    touch(tmp_path, "cityscapes/leftImg8bit/val/ulm/a_leftImg8bit.png")
    assert find_pairs(tmp_path, "cityscapes", "val", unlabelled=True)[0].label is None
    with pytest.raises(UserError, match="gtFine/val has no cityscapes files"):
        find_pairs(tmp_path, "cityscapes", "val")
    touch(tmp_path, "cityscapes/gtFine/val/ulm/a_gtFine_polygons.json")      # a sign that labels should be there
    with pytest.raises(UserError, match=r"found in .*gtFine/val: ulm/a_gtFine_polygons.json$"):
        find_pairs(tmp_path, "cityscapes", "val", unlabelled=True)


def test_evaluation_items_keep_the_labels_resolution(tmp_path):
    dataset = dataset_of(gta5(tmp_path, 1, (12, 16)), size=Size(8, 6), augment=Augment(flip=True, jitter=1.0))
    image, label, name = dataset[0]
    assert (image.shape, label.shape, name) == ((3, 6, 8), (12, 16), "00000")
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    assert label.tolist() == [[CITY_19.get(i, 255) for i in row] for row in (noise(12, 16)[..., 0] % 35).tolist()]
    small = noise(12, 16).reshape(6, 2, 8, 2, 3).mean((1, 3))     # half size, antialiased: about the mean of 2x2
    shown = image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert np.corrcoef(shown.permute(1, 2, 0).flatten(), small.ravel())[0, 1] > 0.85
    unlabelled = SegmentationDataset([dataset.pairs[0]._replace(label=None)], "gta5", GTA, Size(8, 6))[0][1]
    assert unlabelled.shape == (6, 8) and (unlabelled == 255).all()


def test_image_label_and_maps_move_together(tmp_path):
    """Red is the column and green the row, so the image shows the origin of each pixel of the label and the maps."""
    h, w = 60, 80
    y, x = np.mgrid[:h, :w]
    ids = np.array(sorted(CITY_19))
    image = write_png(tmp_path / "image.png", np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8), 2)
    label = write_png(tmp_path / "label.png", ids[x % 19].astype(np.uint8), 0)
    for folder, values in (("columns", x), ("rows", y)):
        write_png(tmp_path / folder / "image.png", values.astype(np.uint8), 0)
    augment = Augment(flip=True, scale=(0.6, 1.9), crop=Size(70, 50))
    dataset = SegmentationDataset([Pair(image, label, "image")], "gta5", GTA, None, augment,
                                  maps=[tmp_path / "columns", tmp_path / "rows"])
    flipped, padded, unpadded = set(), 0, 0
    for seed in range(24):
        image, label, _, columns, rows = dataset[0, seed]
        assert image.shape == (3, 50, 70) and label.shape == columns.shape == rows.shape == (50, 70)
        inside = columns != 255
        padded, unpadded = padded + (~inside).any().item(), unpadded + inside.all().item()
        assert torch.equal(inside, rows != 255) and torch.equal(inside, label != 255)
        assert torch.equal(label[inside], columns[inside] % 19)
        assert (image[:, ~inside].abs() < 0.01).all()            # padding is the mean colour, 0 once normalised
        shown = image * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        assert (shown[0] * 85 - columns)[inside].abs().max() < 0.68  # half a pixel and the rounding
        assert (shown[1] * 85 - rows)[inside].abs().max() < 0.68
        row = columns[inside.any(1)][0]
        flipped.add(bool(row[row != 255][0] > row[row != 255][-1]))
    assert flipped == {True, False} and padded and unpadded


def test_training_items_are_resized_before_they_are_cropped(tmp_path):
    write_png(tmp_path / "maps/00000.png", np.kron(np.array([[1, 2], [3, 4]], np.uint8), np.ones((3, 4), np.uint8)), 0)
    dataset = dataset_of(gta5(tmp_path, 1, (12, 16)), size=Size(8, 6), maps=[tmp_path / "maps"])
    image, label, _, values = dataset[0, 5]
    assert image.shape == (3, 6, 8) and label.shape == values.shape == (6, 8)
    assert values.dtype == torch.int64 and values[2, 3] == 1 and values[2, 4] == 2 and values[3, 3] == 3
    with pytest.raises(UserError, match="maps/00001.png is missing"):
        dataset_of(gta5(tmp_path, 2), maps=[tmp_path / "maps"])
    with pytest.raises(UserError, match="maps/00000.png is 8x6, its image 16x12"):
        dataset_of(gta5(tmp_path / "one", 1), maps=[tmp_path / "maps"])[0]


def test_jitter_and_transform_change_the_image_only(tmp_path):
    gta5(tmp_path, 1)
    plain, seen = dataset_of(tmp_path)[0, 3], []

    def transform(image, seed, name):
        seen.append((image.dtype, tuple(image.shape), seed, name))
        return image, change

    def change(image, size, y, x):
        seen.append((image.dtype, tuple(image.shape), size, y, x))
        return 255 - image

    jittered = dataset_of(tmp_path, augment=Augment(jitter=0.5))[0, 3]
    transformed = dataset_of(tmp_path, transform=transform)[0, 3]
    assert not torch.equal(jittered[0], plain[0]) and torch.equal(jittered[1], plain[1])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(transformed[0] * std + mean, 1 - (plain[0] * std + mean))
    assert seen == [(torch.uint8, (3, 12, 16), 3, "00000"),
                    (torch.uint8, (3, 12, 16), Size(16, 12), slice(0, 12), slice(0, 16))]
    cropped = dataset_of(tmp_path, augment=Augment(crop=Size(20, 5)), transform=transform)[0, 3][0]      # wider than the image
    _, _, size, y, x = seen[3]
    assert size == Size(16, 12) and y.stop - y.start == 5 and x.start == 0 and x.stop >= 16 and cropped.shape == (3, 5, 20)
    assert (cropped == 0).all(dim=0).any(dim=0).sum() == 4       # the padding has the mean colour; the crop's change leaves it
    without_crop = dataset_of(tmp_path, transform=lambda image, seed, name: (255 - image, None))[0, 3]
    torch.testing.assert_close(without_crop[0], transformed[0])


def test_an_item_is_a_window_of_the_resized_image_and_label(tmp_path):
    """Each item is a window of the resized image, to 1/255, and its label is the same window of the resized label. The windows
    reach all regions."""
    pixels = np.array(Image.fromarray(noise(12, 17)).resize((67, 45), Image.Resampling.BICUBIC))
    ids = np.array(sorted(CITY_19))[noise(45, 67)[..., 0] % 19].astype(np.uint8)
    pair = Pair(write_png(tmp_path / "image.png", pixels, 2), write_png(tmp_path / "label.png", ids, 0), "image")
    crop, corners = Size(31, 22), set()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for seed in range(40):
        scale = (0.7, 1.4)[seed % 2]
        item = SegmentationDataset([pair], "gta5", GTA, None, Augment(scale=(scale, scale), crop=crop))[0, seed]
        size = (round(scale * 45), round(scale * 67))
        full_image = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, size,
                                                     mode="bilinear", antialias=True)[0]
        label = torch.from_numpy(np.vectorize(CITY_19.get)(ids)).float()
        label = torch.nn.functional.interpolate(label[None, None], size, mode="nearest-exact")[0, 0].long()
        shown, matches = item[0] * std + mean, []
        for top in range(size[0] - 22 + 1):
            for left in range(size[1] - 31 + 1):
                if torch.equal(label[top:top + 22, left:left + 31], item[1]):
                    matches.append((full_image[:, top:top + 22, left:left + 31] - shown).abs().max() <= 1 / 255)
                    corners.add((scale, 3 * top // (size[0] - 21), 3 * left // (size[1] - 30)))
        assert matches == [True]
    assert len(corners) > 14                                     # of 2 x 9


def test_an_item_is_what_torchvisions_transforms_make_with_the_same_draws(tmp_path):
    """Resize, RandomHorizontalFlip, RandomCrop and ColorJitter on the whole image. Without flips: torchvision's comes first."""
    pixels = np.array(Image.fromarray(noise(12, 17)).resize((67, 45), Image.Resampling.BICUBIC))
    ids = np.array(sorted(CITY_19))[noise(45, 67)[..., 0] % 19].astype(np.uint8)
    pair = Pair(write_png(tmp_path / "image.png", pixels, 2), write_png(tmp_path / "label.png", ids, 0), "image")
    dataset = SegmentationDataset([pair], "gta5", GTA, None, Augment(jitter=0.5, scale=(1.0, 1.5), crop=Size(31, 22)))
    moves = v2.Compose([v2.RandomHorizontalFlip(0.0), v2.RandomCrop((22, 31))])
    jitter = v2.Compose([v2.ColorJitter(0.5, 0.5, 0.5, 0.2), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    for seed in range(12):
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "augment"))
            factor = torch.empty(()).uniform_(1.0, 1.5).item()
            size = [round(factor * 45), round(factor * 67)]
            image = v2.functional.resize(torch.from_numpy(pixels).permute(2, 0, 1) / 255, size, antialias=True)
            label = torch.from_numpy(np.vectorize(CITY_19.get)(ids))[None]
            label = v2.functional.resize(label, size, v2.InterpolationMode.NEAREST_EXACT)
            image, label = moves(tv_tensors.Image(image), tv_tensors.Mask(label))
            image = jitter(image)
        item = dataset[0, seed]
        assert torch.equal(item[1], label.as_subclass(torch.Tensor)[0])
        assert (item[0] - image.as_subclass(torch.Tensor)).abs().mean() < 4 / 255          # resized in 8 bits


def test_an_item_is_a_function_of_index_and_seed(tmp_path):
    augment = Augment(flip=True, jitter=0.5, scale=(0.5, 2.0), crop=Size(300, 200))
    dataset = dataset_of(gta5(tmp_path, 2, (240, 320)), augment=augment)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = [dataset[1, seed][0] for seed in range(4)]
    assert torch.equal(torch.get_rng_state(), state)             # the run's random state is unchanged
    torch.manual_seed(99)
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(torch.equal(dataset[1, seed][0], first[seed]) for seed in range(4))
    finally:
        torch.set_num_threads(threads)
    assert not any(torch.equal(first[0], other) for other in first[1:])


def test_batch_order_covers_each_epoch_once_and_is_the_same_for_any_split(tmp_path):
    one = list(batch_order(7, 4, 14, seed=3))
    indices = [index for batch in one for index, _ in batch]
    epochs = [indices[i:i + 7] for i in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len({tuple(e) for e in epochs}) > 5
    assert len({seed for batch in one for _, seed in batch}) == 56
    assert one != list(batch_order(7, 4, 14, seed=4))
    assert list(batch_order(7, 4, 14, seed=3, start=9)) == one[9:]
    ranks = [list(batch_order(7, 2, 14, seed=3, rank=rank, world=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == one
    assert derive_seed(1, "a") != derive_seed(1, "b") and derive_seed(0, 1, 2) == 5458876493991123480


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers_or_on_the_start(tmp_path):
    augment = Augment(flip=True, jitter=0.5, scale=(0.8, 1.2), crop=Size(260, 200))
    dataset = dataset_of(gta5(tmp_path, 5, (220, 280)), augment=augment)
    state = torch.get_rng_state()
    expected = list(training_loader(dataset, 2, 5, seed=1))
    for workers, start in ((1, 0), (3, 0), (0, 3), (1, 3)):
        batches = list(training_loader(dataset, 2, 5, seed=1, start=start, workers=workers))
        assert len(batches) == 5 - start
        for (image, label, names), (image_, label_, names_) in zip(batches, expected[start:]):
            assert torch.equal(image, image_) and torch.equal(label, label_) and list(names) == list(names_)
    assert torch.equal(torch.get_rng_state(), state)
    assert expected[0][0].shape == (2, 3, 200, 260) and expected[0][1].shape == (2, 200, 260)


def test_sweep_visits_every_image_once(tmp_path):
    dataset = dataset_of(gta5(tmp_path, 5))
    names = [[name for _, _, (name,) in sweep_loader(dataset, rank=rank, world=2)] for rank in range(2)]
    assert names == [["00000", "00002", "00004"], ["00001", "00003"]]
    assert [name for _, _, (name,) in sweep_loader(dataset)] == [f"{i:05}" for i in range(5)]


def test_a_fixed_version_is_training_items_of_one_seed(tmp_path):
    dataset = dataset_of(gta5(tmp_path, 3), augment=Augment(flip=True, jitter=0.5, scale=(0.5, 2.0), crop=Size(9, 7)))
    one, again, other = (list(fixed_version(dataset, seed)) for seed in (4, 4, 5))
    assert [item[2] for item in one] == ["00000", "00001", "00002"] and all(item[0].shape == (3, 7, 9) for item in one)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(one, other))


def test_an_image_at_another_size_is_antialiased_and_in_0_to_1(tmp_path):
    pixels = np.kron([[0, 255], [255, 0]], np.ones((8, 8))).astype(np.uint8)
    path = write_png(tmp_path / "x.png", np.stack([pixels] * 3, -1), 2)
    full, small = read_resized(path, None), read_resized(path, Size(2, 4))
    assert full.shape == (3, 16, 16) and full.dtype == torch.float32 and set(full.unique().tolist()) == {0.0, 1.0}
    assert small.shape == (3, 4, 2) and small[0, 0, 0] < 0.2 and small[0, 0, 1] > 0.8
    assert 0 < small[0, 1, 0] < small[0, 2, 0] < 1


def test_maps_come_beside_the_labels_of_the_same_data_set(tmp_path):
    write_png(tmp_path / "maps/00000.png", np.full((12, 16), 3, np.uint8), 0)
    plain = dataset_of(gta5(tmp_path, 1), augment=Augment(flip=True))
    mapped = plain.with_maps(tmp_path / "maps")
    for seed in range(3):
        image, label, name = plain[0, seed]
        image_, label_, name_, values = mapped[0, seed]
        assert torch.equal(image, image_) and torch.equal(label, label_) and name == name_ and (values == 3).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_workers_error_arrives_as_one_sentence(tmp_path, workers, capsys):
    dataset = dataset_of(gta5(tmp_path, 1))
    path = dataset.pairs[0].image
    path.write_bytes(path.read_bytes()[:200])

    @command
    def main(argv=None):
        next(iter(training_loader(dataset, 1, 1, seed=0, workers=workers)))

    with pytest.raises(SystemExit) as stop:
        main([])
    sentence = f"test_data.py: error: cannot read {path}: the file is damaged, truncated or not an image\n"
    assert stop.value.code == 2 and capsys.readouterr().err == sentence
    assert not multiprocessing.active_children()                 # the loader's workers have ended


def test_saved_labels_come_back_and_failures_leave_nothing(tmp_path):
    label = torch.tensor([[0, 18, 255]])
    save_label(tmp_path / "a/b/c.png", label)
    assert np.array(Image.open(tmp_path / "a/b/c.png")).tolist() == label.tolist()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["c.png"]
    with pytest.raises(ValueError, match="0..255"):
        save_label(tmp_path / "a/b/c.png", label - 1)
    with pytest.raises(UserError, match="cannot write .*c.png/d.png"):
        save_label(tmp_path / "a/b/c.png/d.png", label)
    (tmp_path / "a/b/e.png").mkdir()
    with pytest.raises(UserError, match="cannot write .*e.png"):
        save_label(tmp_path / "a/b/e.png", label)
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["c.png", "e.png"]
