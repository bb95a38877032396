"""GTA5, SYNTHIA, Cityscapes and Cross-City: finding the files, reading labels as class indices, augmenting, loading.

Every item is a pure function of (file, seed), and the order of items a pure function of (seed, iteration, position in
the batch), so that neither the number of worker processes nor an interruption changes what a run sees.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from common.cli import Size, UserError, write_atomically

IGNORE = 255
IMAGENET_MEAN = (0.485, 0.456, 0.406)                            # of RGB in [0, 1], as the encoders were trained
IMAGENET_STD = (0.229, 0.224, 0.225)


class DataError(UserError):
    """Something is wrong with a file or a folder; the message names it."""

    def __init__(self, message: str):
        # A worker process hands its exception over as text, and torch rebuilds it from the whole traceback.
        if message.startswith("Caught "):
            message = re.sub(r"^[\w.]*DataError: ", "", message.strip().splitlines()[-1])
        super().__init__(message)


_CLASSES = (  # in the order of Cityscapes' train ids: name, colour, Cityscapes id, SYNTHIA id
    ("road", (128, 64, 128), 7, 3), ("sidewalk", (244, 35, 232), 8, 4), ("building", (70, 70, 70), 11, 2),
    ("wall", (102, 102, 156), 12, 21), ("fence", (190, 153, 153), 13, 5), ("pole", (153, 153, 153), 17, 7),
    ("traffic light", (250, 170, 30), 19, 15), ("traffic sign", (220, 220, 0), 20, 9),
    ("vegetation", (107, 142, 35), 21, 6), ("terrain", (152, 251, 152), 22, None), ("sky", (70, 130, 180), 23, 1),
    ("person", (220, 20, 60), 24, 10), ("rider", (255, 0, 0), 25, 17), ("car", (0, 0, 142), 26, 8),
    ("truck", (0, 0, 70), 27, None), ("bus", (0, 60, 100), 28, 19), ("train", (0, 80, 100), 31, None),
    ("motorcycle", (0, 0, 230), 32, 12), ("bicycle", (119, 11, 32), 33, 11),
)
_NOT_IN_13 = {"wall", "fence", "pole", "terrain", "truck", "train"}
# The ids a dataset defines. GTA5 has Cityscapes' -1 (license plate) as 34; 255 is what -1 becomes in 8 bits.
_DEFINED = {"gta5": (*range(35), 255), "synthia": tuple(range(23)), "cityscapes": (*range(34), 255),
            "crosscity": (*range(34), 255)}
_UNDEFINED = 254                                                 # in a table from ids to class indices


@dataclass(frozen=True)
class ClassList:
    """The classes a head predicts; position k in each tuple describes class index k.

    means: name of a reported mean -> the class indices it runs over.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    train_ids: tuple[int, ...]
    means: dict[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.names)


def class_list(source: str, target: str = "cityscapes") -> ClassList:
    """The classes of a source -> target pair: 16 from SYNTHIA, else 19; Cross-City's reported mean runs over 13."""
    rows = [(i, row) for i, row in enumerate(_CLASSES) if source != "synthia" or row[3] is not None]
    names = tuple(row[0] for _, row in rows)
    every, thirteen = tuple(range(len(names))), tuple(k for k, name in enumerate(names) if name not in _NOT_IN_13)
    if target == "crosscity":
        means = {"mIoU": thirteen}
    else:
        means = {"mIoU": every, "mIoU*": thirteen} if source == "synthia" else {"mIoU": every}
    return ClassList(names, tuple(row[1] for _, row in rows), tuple(i for i, _ in rows), means)


def _index_table(dataset: str, classes: ClassList) -> np.ndarray:
    """(256,) uint8: file id -> class index, 255 for a defined id without a class, 254 for an id that is not defined."""
    table = np.full(256, _UNDEFINED, dtype=np.uint8)
    table[list(_DEFINED[dataset])] = IGNORE
    for index, train_id in enumerate(classes.train_ids):
        file_id = _CLASSES[train_id][3 if dataset == "synthia" else 2]
        if file_id is not None:
            table[file_id] = index
    return table


class Pair(NamedTuple):
    """One image. `name` is its path below the split's folder without its ending: "aachen/aachen_000000_000019"."""

    image: Path
    label: Path | None
    name: str


class _Layout(NamedTuple):
    images: str
    image_ends: tuple[str, ...]
    labels: str
    label_end: str
    example: str
    splits: tuple[str, ...] = ("train", "val")
    depth: str = "*"


_LAYOUTS = {
    "gta5": _Layout("gta5/images", (".png",), "gta5/labels", ".png", "00001", ("train",)),
    "synthia": _Layout("synthia/RGB", (".png",), "synthia/GT/LABELS", ".png", "0000000", ("train",)),
    "cityscapes": _Layout("cityscapes/leftImg8bit/{split}", ("_leftImg8bit.png",), "cityscapes/gtFine/{split}",
                          "_gtFine_labelIds.png", "aachen/aachen_000000_000019", depth="*/*"),
    "crosscity": _Layout("crosscity/{city}/Images/{part}", (".jpg", ".png"), "crosscity/{city}/Labels/Test",
                         "_eval.png", "pano_00001"),
}


def find_pairs(root: str | Path, dataset: str, split: str = "train", *, images: str | Path | None = None,
               city: str | None = None, labels: bool = True) -> list[Pair]:
    """List a split's images with their labels, sorted by name; no file is opened.

    Args:
        root: the folder that holds gta5/, synthia/, cityscapes/ and crosscity/.
        dataset: "gta5", "synthia", "cityscapes" or "crosscity".
        split: "train" or "val"; GTA5 and SYNTHIA have only "train". Cross-City's "train" has no labels.
        images: a folder with files of the same names to be read instead of the images (translated images).
        city: Cross-City's city.
        labels: False if labels are not needed: they are not looked for, and `label` is None.
    Raises: DataError for a missing folder (with the expected tree and what is there), an image without its label,
        a label without its image, a city that is not there.
    """
    if dataset not in _LAYOUTS:
        raise DataError(f"there is no dataset {dataset!r}: choose one of {', '.join(_LAYOUTS)}")
    root, layout = Path(root), _LAYOUTS[dataset]
    if split not in layout.splits:
        raise DataError(f"{dataset} has no split {split!r}: choose one of {', '.join(layout.splits)}")
    if dataset == "crosscity":
        labels = labels and split == "val"
        cities = [name.rstrip("/") for name in _entries(root / "crosscity") if name.endswith("/")]
        if cities and city not in cities:
            raise DataError(f"there is no city {city!r} in {root / 'crosscity'}: choose one of {', '.join(cities)}")
    where = {"split": split, "city": city or "Rome", "part": "Train" if split == "train" else "Test"}
    image_folder, label_folder = root / layout.images.format(**where), root / layout.labels.format(**where)
    image_files = _list(image_folder, layout.depth, layout.image_ends)
    label_files = _list(label_folder, layout.depth, (layout.label_end,)) if labels else {}

    for folder, files in [(image_folder, image_files)] + [(label_folder, label_files)] * labels:
        if not files:
            there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
            names = _entries(there)
            found = ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"
            tree = f"\n  {image_folder / layout.example}{' or '.join(layout.image_ends)}"
            tree += f"\n  {label_folder / layout.example}{layout.label_end}" * labels
            raise DataError(f"{folder} has no {dataset} files\nexpected:{tree}\nfound in {there}: {found}")
    for name in sorted(image_files.keys() ^ label_files.keys()) if labels else ():
        if name in image_files:
            raise DataError(f"{image_files[name]} has no label: {label_folder / name}{layout.label_end} is missing")
        raise DataError(f"{label_files[name]} has no image: {image_folder / name}{layout.image_ends[0]} is missing")
    if images is not None:
        others = {name: Path(images) / path.relative_to(image_folder) for name, path in image_files.items()}
        there = set(_list(Path(images), layout.depth, layout.image_ends).values())
        for name in sorted(others):
            if others[name] not in there:
                raise DataError(f"{image_files[name]} has no counterpart: {others[name]} is missing")
        image_files = others
    return [Pair(image_files[name], label_files.get(name), name) for name in sorted(image_files)]


def _list(folder: Path, depth: str, ends: tuple[str, ...]) -> dict[str, Path]:
    """Name -> file for the files below `folder` with one of the endings; {} if there is no such folder."""
    files: dict[str, Path] = {}
    for path in folder.glob(depth):
        end = next((end for end in ends if path.name.endswith(end)), None)
        if end is None or path.name.startswith("."):             # ._00001.png is what macOS leaves in copied folders
            continue
        name = path.relative_to(folder).as_posix().removesuffix(end)
        if name in files:
            raise DataError(f"{path} and {files[name]} have the same name: remove one of them")
        files[name] = path
    return files


def _entries(folder: Path) -> list[str]:
    """What a folder holds, sorted, subfolders as "name/"; [] if it is not there."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name + "/" * path.is_dir() for path in paths if not path.name.startswith("."))


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises (half a dozen kinds) into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or "the file is damaged, truncated or not an image"
        raise DataError(f"cannot read {path}: {reason}") from error


def _check_png(data: bytes) -> dict[bytes, list[memoryview]]:
    """Check a PNG file's length and checksums, which Pillow skips and on which torchvision's decoder may crash.

    Returns: the chunks' contents by kind. Raises: ValueError, struct.error.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG")
    view, at, chunks = memoryview(data), 8, {}
    while b"IEND" not in chunks:
        length, kind = struct.unpack_from(">I4s", data, at)
        body, (checksum,) = view[at + 8:at + 8 + length], struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise ValueError("checksum")
        chunks.setdefault(kind, []).append(body)
        at += 12 + length
    return chunks


def read_image(path: str | Path) -> Tensor:
    """Read a PNG or JPEG as uint8 (3,H,W) RGB. Raises DataError naming a missing, damaged or truncated file."""
    with _reading(path):
        data = Path(path).read_bytes()
        if not data.startswith(b"\xff\xd8"):                     # JPEG has no checksums
            _check_png(data)
        # A fifth (PNG) to a third (JPEG) faster than Pillow, and it refuses JPEGs that Pillow fills up with grey.
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    if image.dtype != torch.uint8:
        raise DataError(f"{path} is not an 8-bit image")
    return image


def read_label(path: str | Path, dataset: str, classes: ClassList) -> Tensor:
    """Read a label file of `dataset` as uint8 (H,W) of class indices 0..K-1, 255 where no class of the list is.

    GTA5's palette PNGs hold ids as palette indices, Cityscapes' and Cross-City's files hold ids as grey values,
    SYNTHIA's hold them in the first channel of 16-bit RGB.
    Raises: DataError naming a file that is missing, damaged, of another pixel type, or has ids its dataset lacks.
    """
    ids = _read_synthia_ids(path) if dataset == "synthia" else _read_ids(path)
    label = _index_table(dataset, classes)[np.minimum(ids, 255).astype(np.uint8)]
    if (label == _UNDEFINED).any():
        unknown = np.unique(ids[label == _UNDEFINED]).tolist()
        raise DataError(f"{path} has ids that {dataset} does not define: {', '.join(map(str, unknown[:8]))}"
                        f"{', ...' if len(unknown) > 8 else ''}")
    return torch.from_numpy(label)


def _read_ids(path: str | Path) -> np.ndarray:
    """An 8-bit PNG with one channel as uint8 (H,W); of a palette PNG the indices: `convert` would give its colours."""
    with _reading(path):
        data = Path(path).read_bytes()
        _check_png(data)
        with Image.open(io.BytesIO(data)) as file:
            if file.mode not in ("L", "P"):
                raise DataError(f"{path} must be an 8-bit PNG with one channel, but Pillow calls it {file.mode}")
            return np.array(file)


def _read_synthia_ids(path: str | Path) -> np.ndarray:
    """A 16-bit RGB PNG's first channel as uint16 (H,W).

    Only torchvision reads all 16 bits (Pillow keeps the upper 8, in which every id is 0), but a stream that ends early
    makes its decoder crash the process, so that is looked at before.
    """
    with _reading(path):
        data = Path(path).read_bytes()
        chunks = _check_png(data)
        width, height, depth, colour, *method = struct.unpack(">IIBBBBB", chunks[b"IHDR"][0])
        if (depth, colour, *method) != (16, 2, 0, 0, 0):
            raise DataError(f"{path} must be a 16-bit RGB PNG as SYNTHIA's labels are, but has {depth} bits and colour "
                            f"type {colour}: copies made by most image programs have lost the ids")
        rows = np.frombuffer(zlib.decompress(b"".join(chunks[b"IDAT"])), dtype=np.uint8).reshape(height, 1 + 6 * width)
        if rows[:, 0].max() > 4:                                 # a row starts with its filter, 0..4
            raise ValueError("filter")
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    if pixels.dtype != torch.uint16:
        raise DataError(f"{path} has 16 bits but torchvision decoded it to {pixels.dtype}: install another version")
    return pixels[0].numpy()


def save_label(path: str | Path, label: Tensor) -> None:
    """Write an (H,W) label with values 0..255 as an 8-bit PNG: under its name there is always a whole file or none.

    Raises: UserError naming the path if it cannot be written; ValueError for values outside 0..255.
    """
    values = label.detach().cpu().numpy()
    if values.size and not 0 <= values.min() <= values.max() <= 255:
        raise ValueError(f"label values must lie in 0..255, not {values.min()}..{values.max()}")
    write_atomically(path, lambda file: Image.fromarray(values.astype(np.uint8)).save(file, format="PNG"))


@dataclass(frozen=True)
class Augment:
    """Random changes of a training item, made in the order scale, flip, crop, jitter.

    scale: range of a uniform factor on the size. flip: left-right with probability 1/2. crop: a window of this size,
    padded where the image is smaller (image with the mean colour, label and maps with 255). jitter: strength of
    brightness, contrast and saturation changes, 0.4 of it for hue; 0 is none.
    """

    flip: bool = False
    jitter: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    crop: Size | None = None


class SegmentationDataset(Dataset):
    """Images with labels and, if asked for, further maps.

    dataset[index, seed]: a training item (image, label, name, *maps), all of one size, augmented by `seed` alone.
    dataset[index]: an evaluation item, not augmented; its label has its own resolution.

    image is float32 (3,H,W), normalised by ImageNet's mean and standard deviation; label and maps are int64 (H,W), the
    label with class indices and 255. Without a label file the label is 255 everywhere, of the image's size.
    Raises: DataError naming the file, see `read_image` and `read_label`, and for a label of another size than its
        image; only GTA5 has a few such pairs: a warning names them, the label is resized.
    """

    def __init__(self, pairs: Sequence[Pair], dataset: str, classes: ClassList, size: Size | None,
                 augment: Augment = Augment(), maps: Sequence[str | Path] = (),  # noqa: B008 (frozen)
                 alter: Callable[[Tensor, int, str], Tensor] | None = None):
        """
        Args:
            pairs: what `find_pairs` returned.
            dataset: whose labels they are; decides reader and ids.
            classes: the class list whose indices the labels get.
            size: images are resized to it (antialiased), training labels and maps too (nearest); None: own size.
            maps: folders with one 8-bit one-channel PNG `<folder>/<name>.png` per image, of the size that images have here.
            alter: called with (image float32 (3,H,W) in [0,1], seed, name) after the resize of a training item, before its
                augmentation; returns an image of the same kind.
        """
        self.pairs, self.dataset, self.classes, self.size, self.alter = list(pairs), dataset, classes, size, alter
        self.augment, self.scale = augment, augment.scale
        self.maps = [Path(folder) for folder in maps]
        for path in (self._map_path(folder, pair) for folder in self.maps for pair in self.pairs):
            if not path.is_file():
                raise DataError(f"{path} is missing: every image needs a map in {path.parent}")
        mean = [round(255 * value) for value in IMAGENET_MEAN] if alter is None else list(IMAGENET_MEAN)
        moves: list[Callable] = [v2.RandomHorizontalFlip(0.5 if augment.flip else 0)]
        if augment.crop is not None:
            moves.append(v2.RandomCrop((augment.crop.height, augment.crop.width), pad_if_needed=True,
                                       fill={tv_tensors.Image: mean, tv_tensors.Mask: IGNORE}))
        self.move, jitter = v2.Compose(moves), augment.jitter
        self.jitter = v2.ColorJitter(jitter, jitter, jitter, hue=0.4 * jitter) if jitter else v2.Identity()

    def with_maps(self, *folders: str | Path) -> SegmentationDataset:
        """The same data set with these folders of maps. Raises DataError for an image without its map."""
        return SegmentationDataset(self.pairs, self.dataset, self.classes, self.size, self.augment, folders, self.alter)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        # One thread, as in worker processes: the last bits of a sum depend on how many threads share it, and on
        # images of this size several threads cost more than they save.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._item(*key) if isinstance(key, tuple) else self._item(key, None)
        finally:
            torch.set_num_threads(threads)

    def _item(self, index: int, seed: int | None) -> tuple:
        pair = self.pairs[index]
        image = read_image(pair.image)
        label = None if pair.label is None else self._read_label(pair, image.shape[1:])
        if self.size is not None:                                # as uint8, which is several times faster
            image = v2.functional.resize(image, [self.size.height, self.size.width], antialias=True)
        shape = image.shape[1:]
        if label is None:
            label = torch.full(shape, IGNORE, dtype=torch.uint8)
        maps = [self._read_map(self._map_path(folder, pair), shape) for folder in self.maps]
        if seed is None:
            image = v2.functional.to_dtype(image, torch.float32, scale=True)
        else:
            image, (label, *maps) = self._augment(image, torch.stack([_nearest(label, shape), *maps]), seed, pair.name)
        image = v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
        return image, label.long(), pair.name, *(m.long() for m in maps)

    def _read_label(self, pair: Pair, shape: torch.Size) -> Tensor:
        label = read_label(pair.label, self.dataset, self.classes)
        if label.shape == shape:
            return label
        message = f"{pair.label} is {label.shape[1]}x{label.shape[0]}, its image {pair.image} {shape[1]}x{shape[0]}"
        if self.dataset != "gta5":
            raise DataError(message)
        warnings.warn(f"{message}: the label is resized", stacklevel=2)
        return _nearest(label, shape)

    @staticmethod
    def _read_map(path: Path, shape: torch.Size) -> Tensor:
        values = torch.from_numpy(_read_ids(path))
        if values.shape != shape:
            raise DataError(f"{path} is {values.shape[1]}x{values.shape[0]}, its image {shape[1]}x{shape[0]}: delete the run's "
                            "folder, or give this run another --tag")
        return values

    def _augment(self, image: Tensor, masks: Tensor, seed: int, name: str) -> tuple[Tensor, Tensor]:
        """image uint8 (3,H,W) -> float32 in [0,1], masks (M,H,W) moved with it."""
        if self.alter is not None:
            image = self.alter(v2.functional.to_dtype(image, torch.float32, scale=True), seed, name)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed the accelerator too, which this fork_rng would not put back.
            torch.default_generator.manual_seed(derive_seed(seed, "augment"))
            if self.scale != (1.0, 1.0):
                factor = torch.empty(()).uniform_(*self.scale).item()
                shape = [max(1, round(factor * side)) for side in image.shape[1:]]
                image, masks = v2.functional.resize(image, shape, antialias=True), _nearest(masks, shape)
            image, masks = self.move(tv_tensors.Image(image), tv_tensors.Mask(masks))
            image = self.jitter(v2.functional.to_dtype(image, torch.float32, scale=True))
        return image.as_subclass(Tensor), masks.as_subclass(Tensor)

    @staticmethod
    def _map_path(folder: Path, pair: Pair) -> Path:
        return folder / f"{pair.name}.png"


def _nearest(label: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize (..,H,W) to `shape` by the nearest pixel centre: plain NEAREST shifts labels against the image."""
    return v2.functional.resize(label[None], list(shape), interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on all parts (plain numbers and strings) and is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def read_resized(path: Path, size: Size | None) -> Tensor:
    """An image file as float32 (3,H,W) in [0,1], resized (antialiased) to `size`; None keeps its own."""
    image = read_image(path)
    if size is not None:
        image = v2.functional.resize(image, [size.height, size.width], antialias=True)
    return v2.functional.to_dtype(image, torch.float32, scale=True)


# What files of other projects hold besides tensors: CAG's anchors are a NumPy array, and scores such as best_iou are NumPy
# scalars. These functions only rebuild arrays and numbers of the kinds listed. NumPy 2 renamed their module, files have both.
NUMPY_VALUES = [
    np.ndarray, np.dtype, *map(type, map(np.dtype, (np.float64, np.float32, np.int64, np.int32, np.bool_))),
    *((function, f"{module}.multiarray.{function.__name__}") for module in ("numpy.core", "numpy._core")
      for function in (np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0])),
]


def load_tensors(path: str | Path):
    """torch.load on the CPU, which runs no code from the file (only tensors, plain values and NUMPY_VALUES are read), and
    which here also looks at the file's checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken}")
    with torch.serialization.safe_globals(NUMPY_VALUES):
        return torch.load(path, map_location="cpu", weights_only=True)


class OneVersion(Dataset):
    """A data set of training items in one version for a sweep: item k is dataset[k, seed of k]."""

    def __init__(self, dataset: SegmentationDataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, k: int) -> tuple:
        return self.dataset[k, derive_seed(self.seed, k)]


class IterationSampler(Sampler):
    """A batch sampler: for each iteration this process's batch, a list of (index, item seed).

    Sample number n of the run is at position n % length of epoch n // length; every epoch has its own permutation.
    `world` processes with batches of `batch_size` see together what one process with world * batch_size sees.
    """

    def __init__(self, length: int, batch_size: int, iterations: int, seed: int, start: int = 0, rank: int = 0,
                 world: int = 1):
        self.length, self.batch_size, self.iterations, self.seed = length, batch_size, iterations, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return max(0, self.iterations - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for iteration in range(self.start, self.iterations):
            batch = []
            for position in range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size):
                number = iteration * self.world * self.batch_size + position
                if number // self.length != epoch:
                    epoch = number // self.length
                    generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
                    order = torch.randperm(self.length, generator=generator).tolist()
                batch.append((order[number % self.length], derive_seed(self.seed, iteration, position)))
            yield batch


def training_loader(dataset: SegmentationDataset, batch_size: int, iterations: int, seed: int, start: int = 0,
                    workers: int = 0, pin: bool = False, rank: int = 0, world: int = 1) -> DataLoader:
    """Batches (image (B,3,H,W), label (B,H,W), names, *maps (B,H,W)) of the iterations from `start` on."""
    if not len(dataset):
        raise DataError("there are no images to train on")
    batches = IterationSampler(len(dataset), batch_size, iterations, seed, start, rank, world)
    # The loader draws a number on its own; with its own generator the run's random state does not depend on it.
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, generator=torch.Generator(),
                      worker_init_fn=_leave_signals_to_the_parent)


def sweep_loader(dataset: SegmentationDataset, workers: int = 0, pin: bool = False, rank: int = 0,
                 world: int = 1) -> DataLoader:
    """Every image once, in order, as evaluation items in batches of one; of `world` processes each has its share."""
    return DataLoader(dataset, batch_size=1, sampler=range(rank, len(dataset), world), num_workers=workers,
                      pin_memory=pin, generator=torch.Generator(), worker_init_fn=_leave_signals_to_the_parent)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and `timeout` signal a whole process group, schedulers every process. The parent, which stops cleanly, still
    needs its workers for the iteration under way and then ends them, so they leave its group, and the first SIGTERM ends them
    only half a minute later."""
    def wait(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(30)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, wait)
