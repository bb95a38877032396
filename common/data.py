"""Images and labels: classes, labels as class indices, augmentation, loaders. `common/layouts.py` finds the files.

Each item depends only on (file, seed), and the order of items only on (seed, iteration, position in the batch). So neither
the number of worker processes nor an interruption changes what a run sees.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common.cli import Size
from common.files import UserError, write_atomically

IGNORE = 255
IMAGENET_MEAN = (0.485, 0.456, 0.406)                            # of RGB in [0, 1], as in the encoders' training
IMAGENET_STD = (0.229, 0.224, 0.225)

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
# The ids that a data set defines. GTA5 stores Cityscapes' -1 (license plate) as 34; in 8 bits, -1 becomes 255.
DEFINED = {"gta5": (*range(35), 255), "synthia": tuple(range(23)), "cityscapes": (*range(34), 255),
           "crosscity": (*range(34), 255)}
_UNDEFINED = 254                                                 # marks undefined ids in `_index_table`
# Colours of Cityscapes' ids without a class. GTA5's ids 18 and 34 have no class, but the colours of pole and car.
_VOID = bytes.fromhex("000000 141414 6f4a00 510051 faaaa0 e6968c b4a5b4 966464 96785a 00005a 00006e")
BY_COLOR = "the palette's colours tell the classes"
_TWINS = ((18, (153, 153, 153)), (34, (0, 0, 142)))


@dataclass(frozen=True)
class ClassList:
    """The classes that a network predicts, in index order. means: name of a reported mean -> indices of its classes. stuff:
    names of the classes without instances; None: a method uses its own list. ids: file id -> class index or 255; None: those
    of the data set."""
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    train_ids: tuple[int, ...]
    means: dict[str, tuple[int, ...]]
    stuff: tuple[str, ...] | None = None
    ids: dict[int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)


class Sizes(dict):
    """A script's image sizes: name of a data set -> Size. Raises UserError for an unknown name."""

    def __missing__(self, name: str):
        raise UserError(f"{name!r} is none of {', '.join(self)}: your own data set needs --classes, --source-size and "
                        "--target-size, see docs/data.md")


def class_list(source: str, target: str = "cityscapes") -> ClassList:
    """The classes of a source -> target pair: 16 from SYNTHIA, else 19. Cross-City's reported mean is over 13."""
    rows = [(i, row) for i, row in enumerate(_CLASSES) if source != "synthia" or row[3] is not None]
    names = tuple(row[0] for _, row in rows)
    thirteen = tuple(k for k, name in enumerate(names) if name not in _NOT_IN_13)
    means = {"mIoU": thirteen if target == "crosscity" else tuple(range(len(names)))}
    if source == "synthia" and target != "crosscity":
        means["mIoU*"] = thirteen
    return ClassList(names, tuple(row[1] for _, row in rows), tuple(i for i, _ in rows), means)


def _index_table(dataset: str, classes: ClassList) -> np.ndarray:
    """(256,) uint8: file id -> class index, 255 for a defined id without a class, 254 for an undefined id."""
    table = np.full(256, _UNDEFINED, dtype=np.uint8)
    table[[255] if classes.ids else list(DEFINED[dataset])] = IGNORE
    ids = classes.ids or {_CLASSES[k][3 if dataset == "synthia" else 2]: n for n, k in enumerate(classes.train_ids)}
    for file_id, index in ids.items():
        if file_id is not None:
            table[file_id] = index
    return table


class Pair(NamedTuple):
    """One image. `name` is its path in the split's folder, without its ending: "aachen/aachen_000000_000019"."""
    image: Path
    label: Path | None
    name: str


@contextmanager
def _content(path: str | Path) -> Iterator[bytes]:
    """The bytes of an image file. Any error of a decoder (there are half a dozen kinds) becomes a UserError with the path."""
    try:
        content = Path(path).read_bytes()
        if not content.startswith(b"\xff\xd8"):                  # all but JPEG, which has no checksums; on a damaged
            with Image.open(io.BytesIO(content)) as file:        # file, torchvision's decoder may kill the process
                file.verify()
        yield content
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or "the file is damaged, truncated or not an image"
        raise UserError(f"cannot read {path}: {reason}") from error


def read_image(path: str | Path) -> Tensor:
    """Read a PNG or JPEG as uint8 (3,H,W) RGB. Raises UserError with the path of a missing, damaged or truncated file."""
    with _content(path) as content:
        from common.pixels import decode  # torchvision takes seconds, which --help does not need
        image = decode(content, "RGB")
    if image.dtype != torch.uint8:
        raise UserError(f"{path} is not an 8-bit image")
    return image


def resize(image: Tensor, size: Size | None) -> Tensor:
    """uint8 (3,H,W) at another size, antialiased; None: unchanged."""
    if size in (None, image.shape[:0:-1]):
        return image
    # In the decoders' memory order (the colours of a pixel are adjacent) this is several times faster than in float32.
    image = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(image, size[::-1], mode="bilinear", antialias=True)[0]


def read_resized(path: Path, size: Size | None) -> Tensor:
    """An image file as float32 (3,H,W) in [0,1] at this size."""
    return resize(read_image(path), size) / 255


def normalise(image: Tensor) -> Tensor:
    """Normalise (..,3,H,W) in [0,1] by ImageNet's mean and standard deviation."""
    mean, std = torch.tensor((IMAGENET_MEAN, IMAGENET_STD)).to(image, non_blocking=True)[..., None, None]
    return (image - mean) / std


def read_label(path: str | Path, dataset: str, classes: ClassList) -> Tensor:
    """Read a label file of `dataset` as uint8 (H,W) of class indices 0..K-1; 255: no class of the list.

    Raises: UserError with the path of a file that is missing or damaged, or has a wrong pixel type or undefined ids."""
    ids, table, _ = read_ids(path, dataset, classes)
    label = table.take(ids, mode="clip")
    if (label == _UNDEFINED).any():
        from common import checks  # only to say what is wrong
        raise checks.undefined_ids(path, dataset, classes, np.unique(ids[label == _UNDEFINED]).tolist())
    return torch.from_numpy(label)


def read_ids(path: str | Path, dataset: str, classes: ClassList) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns: a label file's ids (H,W), the table (256,) from ids to class indices, and how its palette is read.

    Ids are palette indices in GTA5, grey values in Cityscapes and Cross-City, the first channel of 16-bit RGB in SYNTHIA. But
    programs that shrink PNGs also add or reorder palettes, so the palette's colours decide.
    """
    table = _index_table(dataset, classes)
    if dataset == "synthia" and not classes.ids:
        return _read_synthia_ids(path), table, ""
    with _content(path) as content, Image.open(io.BytesIO(content)) as file:
        if dataset == "synthia" and file.tile[0][3] == "RGB;16B":
            return _read_synthia_ids(path), table, ""
        ids = _one_channel(path, file)
        if file.mode != "P":
            return ids, table, ""
        used = np.flatnonzero(file.histogram()).tolist()
        palette = bytes(file.getpalette("RGB")).ljust(768, b"\0")
    colors = {i: tuple(palette[3 * i:3 * i + 3]) for i in used}
    pairs = zip(classes.colors, range(len(classes)))
    if dataset in DEFINED and classes.stuff is not None:         # the user's classes, perhaps other colours
        pairs = ((row[1], table[row[2]]) for row in _CLASSES)
    meaning = dict.fromkeys([*zip(*[iter(_VOID)] * 3), *(row[1] for row in _CLASSES)], IGNORE) | dict(pairs)
    plain = all(meaning.get(color) == table[i] or (i, color) in _TWINS for i, color in colors.items())
    # A plain palette of greys holds indices in GTA5, whose file may show void and buildings only, and in an own set.
    if all(r == g == b for r, g, b in colors.values()) and not (
            plain and dataset not in ("cityscapes", "crosscity", "synthia")):
        return np.frombuffer(palette[::3], np.uint8)[ids], table, "the palette's greys are the ids"
    if not plain and meaning.keys() >= set(colors.values()):
        return ids, np.array([meaning.get(tuple(palette[3 * i:3 * i + 3]), IGNORE) for i in range(256)], np.uint8), BY_COLOR
    return ids, table, "" if plain else "the palette's indices are the ids, its colours are not the classes'"


def _one_channel(path: str | Path, file: Image.Image) -> np.ndarray:
    """The pixels of an 8-bit one-channel PNG as uint8 (H,W); for a palette PNG, the indices."""
    if file.mode not in ("1", "L", "P"):                         # 1: black and white; a shrunk label may be that
        raise UserError(f"{path} must be an 8-bit PNG with one channel, but Pillow calls it {file.mode}"
                        + ": colours are no ids; use the files with ids" * file.mode.startswith("RGB"))
    return np.array(file.convert("L") if file.mode == "1" else file)


def _read_synthia_ids(path: str | Path) -> np.ndarray:
    """The first channel of a 16-bit RGB PNG as uint16 (H,W). torchvision reads all 16 bits; Pillow reads only the upper 8."""
    with _content(path) as content, Image.open(io.BytesIO(content)) as file:
        if file.tile[0][3] != "RGB;16B":
            raise UserError(f"{path} must be a 16-bit RGB PNG like SYNTHIA's labels, but Pillow calls it {file.tile[0][3]}: "
                            "most image programs drop the ids; use the original or --label-ids source-train for grey train ids")
        file.load_prepare()
        rows = zlib.decompress(b"".join(iter(lambda: file.load_read(2**20), b"")))
        if len(rows) != file.height * (1 + 6 * file.width) or max(rows[::1 + 6 * file.width]) > 4:
            raise ValueError("rows are missing, or their filters are not 0..4")        # would crash torchvision's decoder
        from common.pixels import decode  # torchvision takes seconds, which --help does not need
        return decode(content, "UNCHANGED")[0].numpy()


def save_label(path: str | Path, label: Tensor) -> None:
    """Write an (H,W) label as an 8-bit PNG. Raises: UserError if it cannot be written; ValueError for values not in 0..255."""
    values = label.detach().cpu().numpy()
    if values.size and not 0 <= values.min() <= values.max() <= 255:
        raise ValueError(f"label values must lie in 0..255, not {values.min()}..{values.max()}")
    write_atomically(path, lambda file: Image.fromarray(values.astype(np.uint8)).save(file, format="PNG"))


@dataclass(frozen=True)
class Augment:
    """Random changes of a training item, in the order scale, crop, flip, jitter.

    scale: range of a uniform resize factor. crop: size of a random window; a smaller image is padded with the mean colour,
    label and maps with 255. flip: left-right with probability 1/2. jitter: strength, see `pixels.jitter`. Raises: UserError."""
    flip: bool = False
    jitter: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    crop: Size | None = None

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise UserError(f"a random resize by {self.scale[0]} to {self.scale[1]} is no range: give the smaller factor first")


class SegmentationDataset(Dataset):
    """Images with labels and, optionally, further maps.

    dataset[index, seed]: a training item (image, label, name, *maps) of one size; the augmentation depends only on `seed`.
    dataset[index]: an evaluation item without augmentation; its label keeps its file's resolution.
    image is float32 (3,H,W), normalised by ImageNet's mean and standard deviation; label and maps are int64 (H,W); the
    label holds class indices and 255. Without a label file, it is 255 everywhere and has the image's size.

    Args:
        pairs: from `layouts.find_pairs`; dataset: the name that defines the labels' ids; classes: define the class indices.
        size: images are resized to it (antialiased), training labels too (nearest); None: no resize.
        maps: folders with one 8-bit one-channel PNG `<folder>/<name>.png` per image, of the resized image's size.
        transform: called with (image uint8 (3,H,W), seed, name) for a training item, after the resize to `size`. It returns an
            image of the same kind, and None or a function (image, size, y, x) -> image, which may change only those pixels that
            the window [y, x] of the image at another `size` needs: see `pixels.change_window`.
    Raises: UserError with the file's path: see `read_image` and `read_label`; for a missing map; for a label whose proportions
        differ from its image's by more than 2 percent. A training label of another size is resized (nearest).
    """

    def __init__(self, pairs: Sequence[Pair], dataset: str, classes: ClassList, size: Size | None,
                 augment: Augment = Augment(), maps: Sequence[str | Path] = (),  # noqa: B008 (frozen)
                 transform: Callable | None = None):
        self.pairs = list(pairs)
        self.dataset = dataset
        self.classes = classes
        self.size = size
        self.augment = augment
        self.maps = list(map(Path, maps))
        self.transform = transform
        for folder, pair in itertools.product(self.maps, self.pairs):
            if not (folder / f"{pair.name}.png").is_file():
                raise UserError(f"{folder / pair.name}.png is missing: every image needs a map in {folder}")

    def with_maps(self, *folders: str | Path) -> SegmentationDataset:
        """The same data set with these folders of maps. Raises UserError for an image without a map."""
        return SegmentationDataset(self.pairs, self.dataset, self.classes, self.size, self.augment, folders, self.transform)

    @property
    def labelled(self) -> bool:
        return any(pair.label for pair in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple:
        threads = torch.get_num_threads()    # one, as in workers: the last bits of a sum depend on their number
        torch.set_num_threads(1)
        try:
            return self.item(*key) if isinstance(key, tuple) else self.item(key)
        finally:
            torch.set_num_threads(threads)

    def item(self, index: int, seed: int | None = None) -> tuple:
        pair = self.pairs[index]
        image = read_image(pair.image)
        original = image.shape[1:]
        label = None if pair.label is None else self._read_label(pair, original)
        image = resize(image, self.size)
        shape = image.shape[1:]
        label = torch.full(shape, IGNORE, dtype=torch.uint8) if label is None else label
        maps = [read_map(folder / f"{pair.name}.png", shape) for folder in self.maps]
        if seed is None:
            image = normalise(image / 255)
        else:
            masks = torch.stack([_nearest(_nearest(label, original), shape), *maps])
            image, (label, *maps) = self._augment(image, masks, seed, pair.name)
        return image, label.long(), pair.name, *(m.long() for m in maps)

    def _read_label(self, pair: Pair, shape: torch.Size) -> Tensor:
        label = read_label(pair.label, self.dataset, self.classes)
        h, w = label.shape
        height, width = shape
        if abs(h * width / (w * height) - 1) > 0.02:
            raise UserError(f"{pair.label} is {w}x{h}, its image {pair.image} {width}x{height}: a label needs its image's "
                            "proportions; restore this pair, or remove it")
        return label

    def _augment(self, image: Tensor, masks: Tensor, seed: int, name: str) -> tuple[Tensor, Tensor]:
        """image uint8 (3,H,W), masks uint8 (M,H,W) -> the augmented image, normalised, and the masks at the same window."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "augment"))
        change = None
        if self.transform:
            image, change = self.transform(image, seed, name)
        factor = torch.empty(()).uniform_(*self.augment.scale, generator=generator).item()
        size = Size(*(max(1, round(factor * side)) for side in image.shape[:0:-1]))
        flip = torch.rand((), generator=generator) < 0.5 * self.augment.flip
        (y, top_bottom), (x, left_right) = (
            _window(*sides, generator) for sides in zip(size[::-1], (self.augment.crop or size)[::-1]))
        if change:
            image = change(image, size, y, x)
        image = resize(image, size)[:, y, x].contiguous() / 255
        masks = _nearest(masks, size[::-1], y, x)
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
        if self.augment.jitter:
            from common.pixels import jitter  # needs torchvision
            image = jitter(image, self.augment.jitter, generator)
        padding = left_right + top_bottom
        return F.pad(normalise(image), padding), F.pad(masks, padding, value=IGNORE)


def _window(length: int, crop: int, generator: torch.Generator) -> tuple[slice, tuple[int, int]]:
    """A random crop along one axis: the slice of existing pixels, and the padding (before, after)."""
    spare = length - crop
    start = int(torch.randint(min(0, spare), max(0, spare) + 1, (), generator=generator))
    return slice(max(0, start), start + crop), (max(0, -start), max(0, start - spare))


def read_map(path: Path, shape: Sequence[int]) -> Tensor:
    """Read a per-image map, uint8 (H,W). Raises UserError with the path of a damaged file or one of another size."""
    with _content(path) as content, Image.open(io.BytesIO(content)) as file:
        values = torch.from_numpy(_one_channel(path, file))
    if values.shape != shape:
        size, expected = Size(*values.shape[::-1]), Size(*shape[::-1])
        raise UserError(f"{path} is {size}, its image {expected}: delete the run's folder, or give this run another --tag")
    return values


def _nearest(label: Tensor, shape: tuple, y: slice = slice(None), x: slice = slice(None)) -> Tensor:  # noqa: B008
    """The window [y, x] of (..,H,W) after a resize to `shape` by the nearest pixel centre. Plain NEAREST would shift labels
    against the image."""
    if label.shape[-2:] == shape:
        return label[..., y, x]
    rows, columns = (F.interpolate(torch.arange(old, dtype=torch.float)[None, None], new, mode="nearest-exact")[0, 0].int()
                     for old, new in zip(label.shape[-2:], shape))
    return label.index_select(-2, rows[y]).index_select(-1, columns[x])


def derive_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on all parts (plain numbers and strings), equal in all processes."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def fixed_version(dataset: SegmentationDataset, seed: int) -> Subset:
    """One fixed version of each training item, for a sweep: item k is dataset[k, seed of k]."""
    return Subset(dataset, [(k, derive_seed(seed, k)) for k in range(len(dataset))])


def batch_order(length: int, batch_size: int, iterations: int, seed: int, start: int = 0, rank: int = 0,
                world: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Yields this process's batch, a list of (index, item seed), per iteration from `start` on.

    Sample number n of the run is at position n % length of epoch n // length; each epoch has its own permutation.
    `world` processes with `batch_size` together see the same as one process with world * batch_size."""
    epoch, order = -1, []
    for iteration in range(start, iterations):
        batch = []
        for position in range(rank * batch_size, (rank + 1) * batch_size):
            number = iteration * world * batch_size + position
            if number // length != epoch:
                epoch = number // length
                generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
                order = torch.randperm(length, generator=generator).tolist()
            batch.append((order[number % length], derive_seed(seed, iteration, position)))
        yield batch


def training_loader(dataset: SegmentationDataset, batch_size: int, iterations: int, seed: int, start: int = 0,
                    workers: int = 0, pin: bool = False, rank: int = 0, world: int = 1) -> DataLoader:
    """Batches (image (B,3,H,W), label (B,H,W), names, *maps (B,H,W)) of the iterations from `start` on. Raises: UserError."""
    if not len(dataset):
        raise UserError("there are no images to train on")
    batches = batch_order(len(dataset), batch_size, iterations, seed, start, rank, world)
    # The loader itself draws a random number; its own generator keeps the run's random state unchanged.
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, generator=torch.Generator(),
                      worker_init_fn=_leave_signals_to_the_parent)


def sweep_loader(dataset: Dataset, workers: int = 0, pin: bool = False, rank: int = 0, world: int = 1) -> DataLoader:
    """Each image once, in order, in batches of one evaluation item; each of `world` processes has its share."""
    return DataLoader(dataset, batch_size=1, sampler=range(rank, len(dataset), world), num_workers=workers,
                      pin_memory=pin, generator=torch.Generator(), worker_init_fn=_leave_signals_to_the_parent)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and `timeout` signal the whole process group; schedulers signal each process. The parent stops cleanly and needs
    its workers until its iteration ends. So they leave its group, and the first SIGTERM ends them after half a minute."""
    if not hasattr(os, "setpgid"):                               # Windows has no process groups
        return

    def wait(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(30)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, wait)
