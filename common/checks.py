"""Checks that run once, before a run trains or evaluates: do labels and weights hold what the settings say?"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from common.data import BY_COLOR, IGNORE, ClassList, SegmentationDataset, read_ids, read_label
from common.distributed import barrier
from common.files import UserError

SAMPLE = 8                                                       # labels to read per data set, evenly spaced
ENOUGH = 100_000                                                 # with so many pixels, an id above 18 is expected


def inspect(run) -> None:
    """Read one pair of every data set of a run, as training or evaluation does, and a sample of its labels. Print one line per
    set on the sample, and one line on sets whose labels and images differ in size. Each set is checked once.

    Raises: UserError for unreadable files, labels without any class, and labels that hold train ids instead of ids."""
    resized = []
    for name in [name for name in run.sets if name not in run.inspected] if run.rank == 0 else ():
        run.inspected.add(name)
        images = run.sets[name]
        split, labelled = name.split()[1], [pair for pair in images.pairs if pair.label]
        images.item(0, 0 if split == "train" else None)
        text = "no labels: there is nothing to evaluate" if split == "val" else "labels are not used"
        if labelled:
            sample = [labelled[k] for k in np.unique(np.linspace(0, len(labelled) - 1, SAMPLE).round().astype(int))]
            text = _sample(name, sample, images)
            for pair in sample:
                sizes = [_size(path) for path in (pair.label, pair.image)]
                if sizes[0] != sizes[1]:
                    resized.append(f"{name} ({pair.label.name}: {sizes[0]}, image {sizes[1]})")
                    break
        print(f"{name} ({images.dataset}): {text}", flush=True)
    if resized:
        print(f"labels and images differ in size; training resizes the labels (nearest): {', '.join(resized)}", flush=True)
    barrier()


def _size(path: Path) -> str:
    """The size in an image file's header. Raises: UserError for a file that is no image."""
    try:
        with Image.open(path) as file:
            return f"{file.width}x{file.height}"
    except OSError as error:
        raise UserError(f"cannot read {path}: it is empty, damaged or not an image; restore it, or remove the pair") from error


def _sample(what: str, sample: list, images: SegmentationDataset) -> str:
    """Describe each class's share of the pixels in a sample of labels. Raises: as `inspect`."""
    counts, ids, readings = np.zeros(256, np.int64), np.zeros(256, np.int64), {}
    for pair in sample:
        counts += np.bincount(read_label(pair.label, images.dataset, images.classes).flatten(), minlength=256)
        stored, _, reading = read_ids(pair.label, images.dataset, images.classes)
        ids += np.bincount(stored.flatten(), minlength=256)
        readings[reading] = pair.label.name
    present, total = np.flatnonzero(ids).tolist(), int(counts.sum())
    if not counts[:IGNORE].any():
        raise UserError(f"{what}: no pixel of {len(sample)} labels has a class; their ids are {_some(present)} (first file: "
                        f"{sample[0].label}): use labels with ids, or describe these ids with --label-ids or --classes"
                        + ", or remove the labels to train without evaluation" * (what.split()[-1] == "val"))
    by_id = images.dataset in ("gta5", "cityscapes", "crosscity") and not images.classes.ids and BY_COLOR not in readings
    if by_id and total >= ENOUGH and max(number for number in present if number < IGNORE) <= 18:
        raise UserError(f"{what}: {len(sample)} labels have ids up to 18 only ({_some(present)}; first file: "
                        f"{sample[0].label}) and look like train ids, as ids go up to 33: add --label-ids "
                        f"{what.split()[0]}-train, or --label-ids train if both domains have train ids")
    shares = sorted(zip(counts.tolist(), images.classes.names, strict=False), reverse=True)
    text = ", ".join(f"{name} {100 * count / total:.1f}" for count, name in shares if count)
    notes = "".join(f"; {reading} (as in {name})" for reading, name in readings.items() if reading)
    return f"% in {len(sample)} labels: {text}, no class {100 * counts[IGNORE] / total:.1f}{notes}"


def undefined_ids(path: str | Path, dataset: str, classes: ClassList, unknown: list[int]) -> UserError:
    """The error for ids in a label file that are not defined."""
    remedy = "; replace the label, or remove the pair"
    if classes.ids and classes.stuff is None:
        remedy = "; train ids go up to 18: omit --label-ids, or use it for one domain only (source-train, target-train)"
    elif classes.ids:
        remedy = '; add them to "ids" or "ignore" of the --classes file'
    return UserError(f"{path} has ids that {dataset} does not define: {_some(unknown)}{remedy}")


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:8])) + ", ..." * (len(ids) > 8)


def finite(model: nn.Module, path: str | Path) -> None:
    """Refuse weights that are not finite; path: their file, for the message."""
    bad = [name for name, x in model.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise UserError(f"{path}: its weights are not finite ({bad[0]}{f' and {len(bad) - 1} more' * (len(bad) > 1)}): "
                        "use a checkpoint from before training diverged")


def identity(dataset: SegmentationDataset) -> dict:
    """What identifies a data set: the number of images, and a hash of their names."""
    names = "\n".join(pair.name for pair in dataset.pairs).encode()
    return {"images": len(dataset.pairs), "names": hashlib.blake2b(names, digest_size=8).hexdigest()}
