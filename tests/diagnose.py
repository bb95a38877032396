"""Measure what each paper says that its method improves, with labels that training never sees. By hand, not by the tests.

    python tests/diagnose.py runs/*-i2c-* --data PATH         adds new results to docs/results/i2c/diagnosis.json
    python tests/diagnose.py --margin runs/c2f-gta5-i2c-source-0/step0.pt --data PATH         CAG's margin for this network
    python tests/diagnose.py runs/*-i2c-*-0 --data PATH --strip predictions.png               only draw the predictions

Pseudo labels (CAG, C2F, BiSMAP, SIM) are compared with the labels of the target's training images. Features are taken from
--images target images that have labels to test, and as many source images: those of the validation set below --held, or the
training images. On them: class center distance, FADA's Eq. (9); accuracy of the discriminators (FADA, CAG, SIM); the
distance of target features to their own class's anchor or centre (CAG, C2F), with the model before a stage and after it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))

import cag  # noqa: E402
import fada  # noqa: E402
import sim  # noqa: E402
from common import data, layouts, page, viz  # noqa: E402
from common.cli import Size  # noqa: E402
from common.data import IGNORE  # noqa: E402
from common.deeplab import Structure, at_least_float32, make_network, resize_label, upsample  # noqa: E402
from common.files import load, read_json  # noqa: E402

NETWORK = {"fada": "v2", "sim": "v2", "cag": "v3+", "c2f": "v3+", "bismap": "v3+"}
LABELS = {"cag": ("stage*/anchor_labels", "stage*/probability_labels"), "c2f": ("step*/labels",), "bismap": ("pseudo_labels",),
          "sim": ("pseudo_labels",)}
CENTERS = {"cag": "anchors", "c2f": "centers"}


class Domains:
    """Labelled images of both domains, in the size that a run uses."""

    def __init__(self, config: dict, root: str, held: str | None, images: int):
        self.classes = data.class_list(config["source"], config["target"])
        self.config, self.root, self.images = config, root, images
        self.source = self._some(held, config["target"], "val", "source") if held else self._some(
            root, config["source"], "train", "source")
        self.target = self._some(root, config["target"], "val", "target")

    def _set(self, root: str, name: str, split: str, domain: str) -> data.SegmentationDataset:
        size = self.config[f"{domain}_size"]
        pairs = layouts.find_pairs(root, name, split)
        return data.SegmentationDataset(pairs, name, self.classes, Size.parse(size) if size else None)

    def _some(self, *selection: str) -> Subset:
        images = self._set(*selection)
        count = min(len(images), self.images)
        return Subset(images, [k * len(images) // count for k in range(count)])

    @functools.cached_property
    def target_labels(self) -> dict[str, Tensor]:
        """Name -> (H, W) class indices of each training image of the target."""
        pairs = layouts.find_pairs(self.root, self.config["target"], "train")
        return {pair.name: data.read_label(pair.label, self.config["target"], self.classes) for pair in pairs}


# ------------------------------------------------------------------------------------------------- measures


def label_matrix(label: Tensor, pseudo_label: Tensor, num_classes: int) -> Tensor:
    """Count pixels of each (label, pseudo label): (K, K + 1) int64, the last column for none. Args: (H, W), 255 ignored."""
    label, pseudo_label = label.long(), pseudo_label.long().clamp(max=num_classes)
    pair = (label * (num_classes + 1) + pseudo_label)[label != IGNORE]
    return pair.bincount(minlength=num_classes * (num_classes + 1)).view(num_classes, num_classes + 1)


def compare_labels(folder: Path, labels: dict[str, Tensor], num_classes: int) -> list[list[int]]:
    """The sum of `label_matrix` over all pseudo labels of a folder, at their size."""
    total = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)
    for name, label in labels.items():
        pseudo_label = torch.from_numpy(np.array(Image.open(folder / f"{name}.png")))
        total += label_matrix(resize_label(label[None], pseudo_label.shape)[0], pseudo_label, num_classes)
    return total.tolist()


def center_distances(feat: Tensor, label: Tensor, centers: Tensor) -> Tensor:
    """Per class: pixels, sum of the distance to the own centre, sum of that to the nearest other, pixels nearest to their own.

    Args: feat (N, D, h, w); label (N, h, w), 255 ignored; centers (K, D), NaN for a class without.  Returns: (4, K) float64."""
    distance = cag.anchor_distances(feat, centers).movedim(1, -1)[label != IGNORE]                # (M, K)
    label = label[label != IGNORE]
    own, K = distance.gather(1, label[:, None])[:, 0], len(centers)
    other = distance.scatter(1, label[:, None], torch.inf).amin(dim=1)
    known = own.isfinite()
    values = torch.stack([torch.ones_like(own), own, other, (own < other).float()])[:, known].double()
    return torch.zeros(4, K, dtype=torch.float64).index_add_(1, label[known], values)


def discriminator(script: str, state: dict, model: nn.Module):
    """A run's D as a function of (feat, logits, size) -> whether it classifies each sample as source; None without D."""
    if "D" not in state:
        return None
    D = {"fada": lambda: fada.FineGrainedDiscriminator(model.feat_channels, state["D"]["layers.4.bias"].numel() // 2),
         "cag": lambda: cag.Discriminator(model.feat_channels), "sim": lambda: sim.Discriminator(model.num_classes)}[script]()
    D.load_state_dict(state["D"])
    D.eval()
    if script == "fada":                                         # P(d=0): the first K channels
        return lambda feat, logits, size: D(feat).softmax(dim=1).chunk(2, dim=1)[0].sum(dim=1) > 0.5
    if script == "cag":
        return lambda feat, logits, size: D(feat) > 0
    return lambda feat, logits, size: D(upsample(logits, size).softmax(dim=1)) < 0               # sim's D = P(target)


def network(path: str | Path, script: str, config: dict, num_classes: int) -> tuple[nn.Module, dict]:
    """A checkpoint's model in evaluation mode, and its whole state."""
    content = load(path)
    structure = Structure(**content.get("structure", {}).get("model", {}))
    model = make_network(NETWORK[script], config["backbone"], num_classes, structure)
    model.load_state_dict(content["state"]["model"])
    return model.eval(), content["state"]


@torch.no_grad()
def passes(model: nn.Module, images, config: dict):
    """Per image: feat, logits, the label on the feature's grid, the image's size."""
    for x, y, *_ in DataLoader(images):
        with torch.autocast("cpu", torch.bfloat16, enabled=config["amp"] == "bf16"):
            feat, logits = model(x)
        yield at_least_float32(feat), at_least_float32(logits), resize_label(y, feat.shape[-2:]), x.shape[-2:]


def measure(path: Path, script: str, config: dict, domains: Domains, centers: dict[str, Tensor]) -> dict:
    """One pass over both domains with a checkpoint's model. centers: name -> centres to measure the target's distances to."""
    K = len(domains.classes)
    model, state = network(path, script, config, K)
    D, moments, accuracy = discriminator(script, state, model), {}, {}
    distances = {name: torch.zeros(4, K, dtype=torch.float64) for name in centers}
    for domain, images in (("source", domains.source), ("target", domains.target)):
        sums, source_shares = [0, 0, 0], []
        for feat, logits, label, size in passes(model, images, config):
            new = fada.class_moments(feat.movedim(1, -1).flatten(0, 2), label.flatten(), K)
            sums = [a + b for a, b in zip(sums, new, strict=True)]
            if D:
                source_shares.append(D(feat, logits, size).float().mean().item())
            for name, rows in centers.items() if domain == "target" else ():
                x = F.normalize(feat, dim=1, eps=1e-4) if script == "c2f" else feat
                distances[name] += center_distances(x, label, rows)
        moments[domain] = sums
        if D:
            accuracy[domain] = statistics.fmean(source_shares) if domain == "source" else 1 - statistics.fmean(source_shares)
    moments["both"] = [a + b for a, b in zip(*moments.values(), strict=True)]
    result = {"class center distance": {domain: fada.class_center_distance_from_moments(*sums).nanmean().item()
                                       for domain, sums in moments.items()}}
    if D:
        result["discriminator"] = accuracy
    for name, (count, *sums) in distances.items():
        own, other, nearest = (float((values / count).nanmean()) for values in sums)
        result[name] = {"own": own, "other": other, "right": nearest}
    return result


def diagnose(folder: Path, domains: Domains) -> dict:
    """All measures of one run."""
    config = read_json(folder / "config.json")
    script, lengths = config["method"], list(config.get("lengths") or read_json(folder / "results.json"))
    result = {"labels": {path.relative_to(folder).as_posix(): compare_labels(path, domains.target_labels, len(domains.classes))
                        for pattern in LABELS.get(script, ()) for path in sorted(folder.glob(pattern))}, "features": {},
             "stages": list(read_json(folder / "results.json"))}
    kind = CENTERS.get(script)
    centers = {stage: load(path)[kind] for stage in lengths if kind and (path := folder / f"{stage}-{kind}.pt").exists()}
    for stage, following in zip(lengths, [*lengths[1:], None], strict=True):
        chosen = {f"{name}, {when}": centers[name]
                  for name, when in ((stage, "after"), (following, "before")) if name in centers}
        path = folder / f"{stage}.pt"
        if not path.exists() and chosen and config.get("from_"):                # the previous stage is another run's
            path = Path(config["from_"])
        if path.exists() and script != "bismap":
            result["features"][stage] = measure(path, script, config, domains, chosen)
    return result


@torch.no_grad()
def margin(path: str, domains: Domains) -> float:
    """Half the median distance of an anchor to its nearest other, of a v3+ source model: CAG's rule for its margin."""
    K = len(domains.classes)
    model, _ = network(path, "cag", domains.config, K)
    total, count = 0, 0
    for feat, _, label, _ in passes(model, domains.source, domains.config):
        part, pixels = cag.class_sums(feat, label, K)
        total, count = total + part, count + pixels
    anchors = (total / count[:, None])[count > 0]
    return torch.cdist(anchors, anchors).fill_diagonal_(torch.inf).amin(dim=1).median().item() / 2


def strip(path: str, folders: list[Path], domains: Domains) -> None:
    """Draw the predictions of each main row of the tables on three photographs, a column per row; wrong pixels are pale. The
    photographs are not drawn: their terms do not allow copies. folders: run folders of one seed."""
    known = {f"{config['method']} {page.run_name(folder, config)[1]}": (folder, config)
             for folder in folders for config in [read_json(folder / "config.json")]}
    photographs, columns = [domains.target[k * len(domains.target) // 3] for k in range(3)], {}
    steps = [(f"{step.method}, {step.name}", step.run) for step in page.STEPS if step.main]
    for title, row in [("source only, v3+", page.SOURCE["v3+"]), *steps]:
        run, stage = row.rsplit(" ", 1)
        folder, config = known.get(run, (Path(), {}))
        if (folder / f"{stage}.pt").exists():
            model, _ = network(folder / f"{stage}.pt", config["method"], config, len(domains.classes))
            columns[title] = [drawn(upsample(logits, size).argmax(dim=1)[0], label, domains.classes)
                              for (_, logits, _, size), (_, label, *_) in zip(passes(model, photographs, config), photographs)]
    viz.contact_sheet(path, list(zip(*columns.values(), strict=True)), list(columns), domains.classes, width=256)


def drawn(prediction: Tensor, label: Tensor, classes: data.ClassList) -> np.ndarray:
    """A prediction (H, W) in the classes' colours, (H, W, 3) uint8; pale where it differs from the label (H, W)."""
    wrong = (label != IGNORE) & (label != prediction)
    return np.where(wrong[..., None], 192 + viz.colorize(prediction, classes) // 4, viz.colorize(prediction, classes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--data", required=True, help="folder that holds both domains, with the target's labels")
    parser.add_argument("--held", help="folder whose target validation images are held-out source images")
    parser.add_argument("--images", type=int, default=50, help="per domain, for features [%(default)s]")
    parser.add_argument("--margin", metavar="CHECKPOINT", help="only print CAG's margin for this source model")
    parser.add_argument("--strip", metavar="PNG", help="only draw the predictions of these runs, all of one seed")
    parser.add_argument("--root", type=Path, default=HERE, help="folder that holds docs/ [this checkout]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.margin:
        config = load(args.margin)["options"] | load(args.margin)["config"]
        return print(f"margin: {margin(args.margin, Domains(config, args.data, None, 10**9)):.2g}")
    if args.strip:
        return strip(args.strip, args.runs, Domains(read_json(args.runs[0] / "config.json"), args.data, None, args.images))
    domains = {}
    for folder in args.runs:
        config = read_json(folder / "config.json")
        pair, variant = page.run_name(folder, config)
        path, key = args.root / "docs/results" / pair / "diagnosis.json", f"{config['method']}-{variant}-{config['seed']}"
        done, finished = read_json(path), list(read_json(folder / "results.json"))
        if finished and done.get(key, {}).get("stages") != finished:
            sizes = tuple(config[key] for key in ("source", "target", "source_size", "target_size"))
            domains.setdefault(sizes, Domains(config, args.data, args.held, args.images))
            result = diagnose(folder, domains[sizes])
            page.write(path, dict(sorted({**read_json(path), key: result}.items())))
            print(f"{key}: {json.dumps(read_json(path)[key]['features'])[:300]}", flush=True)


if __name__ == "__main__":
    main()
