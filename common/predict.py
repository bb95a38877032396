"""--predict FOLDER --out FOLDER: label-id PNGs and overlays for every image of a folder, from any network that --eval takes.

    <out>/labels/<name>.png      file ids, one grey byte per pixel, at the image's own size, as benchmark servers expect
    <out>/overlays/<name>.jpg    the image under the classes' colours
    <out>/predict.json           which model and images; without it, --out must be empty

The ids are Cityscapes ids; of your own classes, the smallest file id of each. A second start continues an interrupted one.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

from common import data, metrics, viz
from common.cli import Size
from common.data import IGNORE, ClassList
from common.distributed import barrier
from common.files import UserError, read_json, write_atomically, write_json

ENDINGS = (".png", ".jpg", ".jpeg")
MARKER = "predict.json"


class Folder(Dataset):
    """The images of a folder and its subfolders, in the order of their names.

    dataset[k]: image float32 (3,h,w), normalised, resized at its own aspect ratio to about as many pixels as `size` has (None:
    not resized); label int64 (H,W), all 255, at the image's own size; name: the path below the folder, without the ending.
    Raises: UserError for a folder without images, and for two images with the same name."""

    labelled = False

    def __init__(self, folder: str | Path, size: Size | None) -> None:
        self.files, self.size, self.root, seen = {}, size, Path(folder).expanduser().resolve(), set()
        paths = []
        for parent, folders, names in os.walk(self.root, followlinks=True):
            if os.path.realpath(parent) in seen:                 # a link to a folder that was seen
                folders.clear()
            else:
                paths += [Path(parent, name) for name in names]
            seen.add(os.path.realpath(parent))
        for path in sorted(path for path in paths if path.suffix.lower() in ENDINGS and not path.name.startswith(".")):
            name = path.relative_to(self.root).with_suffix("").as_posix()
            if name in self.files:
                raise UserError(f"{path} and {self.files[name]} would both become {name}.png: rename one of them")
            self.files[name] = path
        if not self.files:
            what = "has no image (*.png, *.jpg, *.jpeg)" if self.root.is_dir() else "is not a folder"
            raise UserError(f"--predict {folder} {what}: give the folder of the images")
        self.names = list(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        name = self.names[index]
        image = data.read_image(self.files[name])
        height, width = image.shape[1:]
        scale = (self.size.width * self.size.height / (width * height)) ** 0.5 if self.size else 1
        small = data.resize(image, Size(max(1, round(scale * width)), max(1, round(scale * height))))
        small = v2.functional.to_dtype(small, torch.float32, scale=True)
        small = v2.functional.normalize(small, data.IMAGENET_MEAN, data.IMAGENET_STD)
        return small, torch.full((height, width), IGNORE), name

    def write(self, run, name: str, model: nn.Module, how: dict) -> None:
        """Write predictions for all images that have none yet.

        Args: run: gives --out, device and classes; name: of the checkpoint; how: keyword arguments of `metrics.predict`.
        Raises: UserError for an unreadable image, and for an --out with predictions of another model or folder."""
        out, ids = Path(run.options.out).expanduser(), file_ids(run.classes)
        digest = hashlib.blake2b(digest_size=16)
        for value in model.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        about = {"checkpoint": name, "weights": digest.hexdigest(), "images": str(self.root), "size": str(self.size or "own"),
                 "views": {key: str(value) for key, value in how.items()},
                 "ids": dict(zip(run.classes.names, ids.tolist()))}
        previous = read_json(out / MARKER)
        changed = [key for key in about if previous and previous.get(key) != about[key]]
        if changed:
            raise UserError(f"--out {out} holds predictions with different {' and '.join(changed)}, and nothing is "
                            "overwritten: give a new folder")
        if run.rank == 0 and not previous:
            write_json(out / MARKER, about)
        remaining = [k for k, image in enumerate(self.names) if not (out / "labels" / f"{image}.png").exists()]
        barrier()                                                # no process writes before all have counted
        print(f"predict: {len(remaining)} of {len(self)} images are left; weights: {name}", flush=True)
        with metrics.evaluation_mode(model):
            for image, label, (key,) in run.sweep("predict", Subset(self, remaining)):
                with run.autocast():
                    prediction = metrics.predict(model, image, tuple(label.shape[-2:]), **how)[0].cpu()       # (H, W)
                photo = data.read_image(self.files[key]).permute(1, 2, 0).numpy()
                save = partial(Image.fromarray(viz.overlay(photo, prediction, run.classes)).save, format="JPEG", quality=90)
                write_atomically(out / "overlays" / f"{key}.jpg", save)
                data.save_label(out / "labels" / f"{key}.png", ids[prediction])       # last: it marks the image as done
        print(f"predict: {out / 'labels'}, {out / 'overlays'}", flush=True)


def folder_of(options, size: Size | None) -> Folder:
    """The images of --predict. Raises: UserError for an invalid --predict or --out, before anything else is loaded."""
    out, images = Path(options.out).expanduser(), Path(options.predict).expanduser().resolve()
    if images in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in --predict {options.predict}, so the next start would read its labels as "
                        "images: give a folder outside it")
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} holds other files, and nothing is overwritten: give a new or an empty folder")
    return Folder(options.predict, size)


def file_ids(classes: ClassList) -> Tensor:
    """(K,) uint8: class index -> its id in a label file."""
    if classes.ids is None:
        return torch.tensor([data._CLASSES[train_id][2] for train_id in classes.train_ids], dtype=torch.uint8)
    smallest = [min(key for key, index in classes.ids.items() if index == k) for k in range(len(classes))]
    return torch.tensor(smallest, dtype=torch.uint8)
