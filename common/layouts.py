"""Where the files of each data set lie, which label belongs to which image, and your own classes; used when a run starts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from common import data
from common.data import IGNORE, ClassList, Pair
from common.files import UserError

_IMAGE, _PLAIN = r"\.(png|jpe?g)", r"\.png"
_BYPRODUCT = re.compile(r"_(labelTrainIds|labelIds|color|instanceIds|instanceTrainIds)$", re.IGNORECASE)


class Layout(NamedTuple):
    """Folders below --data; endings of file names as regular expressions (case is ignored); an example of a name, which also
    gives the depth of the files ("**": any depth), and its endings."""
    images: tuple[str, ...]                                      # the first that exists
    image_end: str
    labels: str
    label_end: str
    train_id_end: str
    example: str
    example_ends: tuple[str, str]
    splits: tuple[str, ...] = ("train", "val")


LAYOUTS = {
    "gta5": Layout(("gta5/images",), _IMAGE, "gta5/labels", _PLAIN, r"_labelTrainIds\.png", "00001", (".png", ".png"),
                   ("train",)),
    "synthia": Layout(("synthia/RGB",), _IMAGE, "synthia/GT/LABELS", _PLAIN, r"_labelTrainIds\.png", "0000000",
                      (".png", ".png"), ("train",)),
    "cityscapes": Layout(("cityscapes/leftImg8bit/{split}", "cityscapes/leftImg8bit_foggy/{split}"),
                         r"(_leftImg8bit.*|_rgb_anon)" + _IMAGE, "cityscapes/gtFine/{split}", r"(_gtFine|_gt)_labelIds\.png",
                         r"(_gtFine|_gt)_labelTrainIds\.png", "aachen/aachen_000000_000019",
                         ("_leftImg8bit.png", "_gtFine_labelIds.png")),
    "crosscity": Layout(("crosscity/{city}/Images/{part}",), _IMAGE, "crosscity/{city}/Labels/Test", r"_eval\.png",
                        r"(_eval)?_labelTrainIds\.png", "pano_00001", (".png", "_eval.png")),
}
OWN = Layout(("{name}/images/{split}",), _IMAGE, "{name}/labels/{split}", _PLAIN, r"_labelTrainIds\.png", "**/a",
             (".png", ".png"))
SOURCES, TARGETS = ("gta5", "synthia", "cityscapes"), ("cityscapes", "crosscity")


def find_pairs(root: str | Path, dataset: str, split: str = "train", *, images: str | Path | None = None,
               city: str | None = None, labels: bool = True, train_ids: bool = False, own: bool = False,
               unlabelled: bool = False) -> list[Pair]:
    """List a split's images with their labels, sorted by name; no file is opened.

    Args:
        root: the folder that holds gta5/, synthia/, cityscapes/, crosscity/ or the folder of your own set.
        dataset: one of these; split: "train" or "val" (GTA5 and SYNTHIA have no "val"); city: of Cross-City.
        images: read the images from this folder instead, under the same names (translated images).
        labels: False if labels are not needed: then `label` is None, as always in Cross-City's "train".
        train_ids: use *_labelTrainIds.png files if there are any; own: `dataset` is the folder of your own set.
        unlabelled: accept a set without any label file; then `label` is None.
    Raises: UserError for a missing folder (with the expected and the existing files), city, label or image.
    """
    layout, root = OWN if own else LAYOUTS.get(dataset), Path(root)
    if not layout or split not in layout.splits:
        known = ", ".join(f"{name} ({' '.join(layout.splits)})" for name, layout in LAYOUTS.items())
        raise UserError(f"there is no dataset {dataset!r} with a split {split!r}: choose one of {known}")
    if dataset == "crosscity":
        labels = labels and split == "val"
        cities = sorted(path.name for path in (root / "crosscity").glob("[!.]*/"))
        if cities and city not in cities:
            raise UserError(f"there is no city {city!r} in {root / 'crosscity'}: choose one of {', '.join(cities)}")
    fields = {"name": dataset, "split": split, "city": city or "Rome", "part": "Train" if split == "train" else "Test"}
    folders = [root / folder.format(**fields) for folder in layout.images]
    image_folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    label_folder = root / layout.labels.format(**fields)
    files = _list(image_folder, layout, layout.image_end)
    label_files: dict[str, Path] = {}
    if labels:
        label_files = train_ids and _list(label_folder, layout, layout.train_id_end) or _list(
            label_folder, layout, layout.label_end, files.keys())
        if unlabelled and not label_files and not any(_walk(label_folder, "**")):
            labels = False
    for folder in [image_folder] * (not files) + [label_folder] * (labels and not label_files):
        tree = f"\n  {image_folder / layout.example}{layout.example_ends[0]}"
        tree += f"\n  {label_folder / layout.example}{layout.example_ends[1]}" * labels
        raise UserError(f"{folder} has no {dataset} files\nexpected:{tree}\nfound in {_contents(folder)}")
    for name in sorted(files.keys() ^ label_files.keys()) if labels else ():
        if name in files:
            label = label_folder / f"{name}{layout.example_ends[1]}"
            raise UserError(f"{files[name]} has no label: {label} is missing{_similar(label.parent, Path(name).name)}; "
                            "add it, or remove the image")
        image = image_folder / f"{name}{layout.example_ends[0]}"
        raise UserError(f"{label_files[name]} has no image: {image} is missing{_similar(image.parent, Path(name).name)}; "
                        "add it, or remove the label")
    if images is not None:
        translated = _list(Path(images), layout, layout.image_end)
        for name in sorted(files.keys() - translated.keys()):
            missing = Path(images) / files[name].relative_to(image_folder)
            raise UserError(f"{files[name]} has no counterpart: {missing} is missing; translate it too")
        files = {name: translated[name] for name in files}
    return [Pair(files[name], label_files.get(name), name) for name in sorted(files)]


def _list(folder: Path, layout: Layout, end: str, names=None) -> dict[str, Path]:
    """Name -> file for the files below `folder` with this ending, at the depth of the layout's example. If the images' `names`
    are given, by-products of other programs are skipped: names that end in _color, _labelTrainIds, ... and have no image."""
    files: dict[str, list[Path]] = {}
    for path in _walk(folder, layout.example):
        if match := re.fullmatch(f"(?P<stem>.+?){end}", path.name, re.IGNORECASE):
            name = (path.parent / match["stem"]).relative_to(folder).as_posix()
            if names is None or name in names or not _BYPRODUCT.search(name):
                files.setdefault(name, []).append(path)
    for name, paths in files.items():
        if len(paths) > 1:
            raise UserError(f"{', '.join(path.name for path in sorted(paths))} in {paths[0].parent} have the same name "
                            f"{Path(name).name!r}: keep one per image (a folder with links to the right files is enough)")
    return {name: paths[0] for name, paths in files.items()}


def _walk(folder: Path, example: str):
    """Files below a folder at the depth of the example; follows links to folders. Skips ._00001.png, which macOS adds."""
    if example.startswith("**"):
        paths = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    else:
        paths = folder.glob("/".join("*" * len(Path(example).parts)))
    return (path for path in paths if not path.name.startswith("."))


def _visible(folder: Path) -> list[Path]:
    """A folder's entries but hidden ones, sorted; none of a file or of a folder that may not be read."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _contents(folder: Path) -> str:
    """Describe the nearest existing folder: its first entries, each with the first file below it."""
    parent, shown = next(path for path in (folder, *folder.absolute().parents) if path.is_dir()), []
    entries = _visible(parent)
    for path in entries[:8]:
        for _ in range(6):
            path = next(iter(_visible(path)), path)
        shown.append(path.relative_to(parent).as_posix() + "/" * path.is_dir())
    return f"{parent}: {', '.join(shown + ['...'] * (len(entries) > 8)) or 'nothing'}"


def _similar(folder: Path, stem: str) -> str:
    """Describe files of a folder whose names begin with `stem`, or any files if there are none."""
    names = [path.name for path in _visible(folder)]
    names = ([name for name in names if name.startswith(stem)] or names)[:4]
    return f" (found there: {', '.join(names)})" if names else ""


def find(options, classes: ClassList, domain: str, split: str, labels: bool) -> tuple[list[Pair], str, ClassList]:
    """The data set behind a run's "source" or "target": its pairs, its name, and the classes with the ids of its files.
    The target's validation images need no labels."""
    name, root, images = (options.source, options.data, options.source_images) if domain == "source" else (
        options.target, options.target_data or options.data, None)
    train_ids = options.label_ids in ("train", f"{domain}-train")
    pairs = find_pairs(root, name, split, city=options.city, labels=labels, images=images, train_ids=train_ids,
                       own=name not in LAYOUTS, unlabelled=split == "val")
    if options.classes and name in LAYOUTS:                      # ids that the file does not name get no class
        classes = dataclasses.replace(classes, ids=dict.fromkeys(data.DEFINED[name], IGNORE) | classes.ids)
    elif train_ids:
        ids = dict.fromkeys(range(19), IGNORE) | {train_id: k for k, train_id in enumerate(classes.train_ids)}
        classes = dataclasses.replace(classes, ids=ids)
    return pairs, name, classes


def classes_of(options) -> ClassList:
    """The classes of a run. Replaces the file name in `options.classes` by the file's content (JSON), which the run keeps.

    Raises: UserError for an invalid pair of domains or an invalid file."""
    for flag, name, known in (("--source", options.source, SOURCES), ("--target", options.target, TARGETS)):
        if name not in known and (not options.classes or name in LAYOUTS or not re.fullmatch(r"\w[\w.-]*", name)):
            raise UserError(f"{flag} {name} is none of {', '.join(known)}; a data set of your own is a folder "
                            f"{options.data}/{name} and needs --classes FILE.json, see docs/data.md")
    other = Path(options.target_data or options.data).absolute()
    if options.source == options.target and other == Path(options.data).absolute():
        raise UserError(f"--source and --target are both {options.source}: add --target-data FOLDER, which holds the target's "
                        f"{options.target}/, or --target crosscity --city {options.city}")
    if not options.classes:
        return data.class_list(options.source, options.target)
    if options.label_ids != "ids":
        raise UserError(f"--label-ids {options.label_ids} is for Cityscapes' classes, but --classes defines its own ids: omit "
                        "--label-ids")
    if options.source == "synthia" and options.target in LAYOUTS:
        raise UserError(f"--classes gives each id one meaning, but SYNTHIA's ids differ from those of {options.target}: choose "
                        "--source gta5, or omit --classes")
    if not options.classes.startswith("{"):
        options.classes = json.dumps(_content(Path(options.classes).expanduser()))
    content = json.loads(options.classes)
    names = content["names"]
    means = {title: tuple(map(names.index, members)) for title, members in content["means"].items()}
    return ClassList(tuple(names), tuple(map(tuple, content["colors"])), tuple(range(len(names))), means,
                     tuple(content["stuff"]), {int(key): index for key, index in content["ids"].items()})


def _content(path: Path) -> dict:
    """Read and check a classes file, fill in its defaults, and turn "ids" into file id -> class index."""
    def need(valid: bool, message: str) -> None:
        if not valid:
            raise UserError(f"{path}: {message}; docs/data.md has an example")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--classes {path} cannot be read as JSON ({error}); docs/data.md has an example") from error
    need(isinstance(content, dict), "it must contain one JSON object {...}")
    extra = content.keys() - {"names", "colors", "ids", "ignore", "stuff", "means"}
    need(not extra, f"{', '.join(sorted(extra))} is none of names, colors, ids, ignore, stuff, means")
    names, colors = content.get("names"), content.get("colors")
    need(isinstance(names, list) and 2 <= len(names) <= 254 and all(isinstance(name, str) and name for name in names)
         and len(set(names)) == len(names), '"names" must list two to 254 different names')
    need(isinstance(colors, list) and len(colors) == len(names) and len({str(color) for color in colors}) == len(names) and all(
        isinstance(color, list) and len(color) == 3 and all(_byte(value) for value in color) for color in colors),
        f'"colors" must list {len(names)} different colours, one per name, each as [red, green, blue] in 0..255')
    ids = content.get("ids", [[k] for k in range(len(names))])
    if isinstance(ids, dict):
        pairs = [(int(key) if key.isdecimal() else key, index) for key, index in ids.items()]
    else:
        need(isinstance(ids, list) and len(ids) == len(names),
             f'"ids" must list {len(names)} lists of file ids, one per name, or be an object "file id": index of the class')
        pairs = [(key, k) for k, keys in enumerate(ids) for key in (keys if isinstance(keys, list) else [keys])]
    ignore = content.get("ignore", [])
    need(isinstance(ignore, list), '"ignore" must list file ids')
    pairs += [(key, IGNORE) for key in ignore]
    for key, index in pairs:
        need(_byte(key) and _byte(index) and (index < len(names) or index == IGNORE),
             f'"ids" and "ignore" have {key!r} (index {index!r}): ids must be in 0..255, indices in 0..{len(names) - 1} or 255')
        need(sum(key == other for other, _ in pairs) == 1, f"the file id {key} occurs twice, but needs one meaning")
    missing = [name for k, name in enumerate(names) if k not in dict(pairs).values()]
    need(not missing, f'"ids" has no file id for {", ".join(missing)}')
    stuff, means = content.get("stuff", []), content.get("means", {"mIoU": names})
    need(isinstance(stuff, list) and all(name in names for name in stuff), '"stuff" must list some of the names')
    need(isinstance(means, dict) and "mIoU" in means and all(
        isinstance(members, list) and members and all(name in names for name in members) for members in means.values()),
         '"means" must be an object with "mIoU" and optional others, each a list of some of the names')
    return {"names": names, "colors": colors, "ids": {str(key): index for key, index in sorted(pairs)}, "stuff": stuff,
            "means": means}


def _byte(value) -> bool:
    return type(value) is int and 0 <= value <= 255
