"""The tables of docs/results.md, README's table and their figure, from the JSON files in docs/results/.

    python -m common.page                                    update tables and figure
    python -m common.page runs/*-i2c-*                       first add these run folders to docs/results/
    python -m common.page --pair i2c-heldout RUN ...         the same, under another name of the pair of domains

A run folder is named as `common/results.py` does: SCRIPT-SOURCE-PAIR-VARIANT-SEED. A table stands in the page below its marker
`<!-- table: NAME ... -->`; `TABLES` has the names. Scores come from the confusion matrices alone: mIoU over the classes that
occur in the target's labels, in percent, of a stage's last iteration. A difference is always that of two runs of one seed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from common import metrics
from common.cli import command
from common.files import UserError, read_json, read_log, write_atomically
from common.usage import PATHS

ROOT = Path(__file__).parents[1]
TITLES = {"i2c": "IDDA to Cityscapes", "i2v": "IDDA to CamVid", "toy": "toy city"}        # in the order of the tables
Runs = dict[tuple[str, str, int], dict]                     # (script, variant, seed) -> content of a file of docs/results


class Step(NamedTuple):
    """A row of the tables: the stage of a method, and its control, which differs only in the method's terms."""

    method: str
    name: str
    run: str                                                 # script, variant, stage
    control: str
    network: str
    main: bool = False                                       # whether it is in the table of gains


STEPS = (
    Step("FADA", "adversarial", "fada fada adversarial", "fada control adversarial", "v2", True),
    Step("FADA", "second setting", "fada strong adversarial", "fada control adversarial", "v2"),
    Step("CAG", "warm-up", "cag cag warmup", "cag control warmup", "v3+"),
    Step("CAG", "stage 1", "cag cag stage1", "cag control stage1", "v3+"),
    Step("CAG", "stage 2", "cag cag stage2", "cag control stage2", "v3+", True),
    Step("C2F", "alignment", "c2f coarse step0", "c2f source step0", "v3+", True),
    Step("C2F", "step 1", "c2f c2f step1", "c2f control step1", "v3+"),
    Step("C2F", "step 2", "c2f c2f step2", "c2f control step2", "v3+", True),
    Step("BiSMAP", "self-training", "bismap bismap selftrain", "bismap control selftrain", "v3+", True),
    Step("SIM", "step 1", "sim sim step1", "sim control step1", "v2"),
    Step("SIM", "step 2", "sim sim step2", "sim control step1", "v2", True),
)
SOURCE = {"v2": "fada source source", "v3+": "c2f source step0"}
TARGET = {"v2": "fada target source", "v3+": "c2f target step0"}


# ------------------------------------------------------------------------------------------- the arithmetic


def paired(method: dict[int, float], control: dict[int, float]) -> list[float]:
    """Differences method - control, for the seeds that both have, in the order of the seeds. Args: seed -> score."""
    return [method[seed] - control[seed] for seed in sorted(method.keys() & control.keys())]


def gap_share(method: dict[int, float], control: dict[int, float], target: dict[int, float]) -> float | None:
    """The share of the gap between control and target only that a method closes: mean of method - control over the seeds that
    both have, by the mean of the target's seeds minus that of these controls. Args: seed -> score. Returns: None without such
    seeds or without a gap."""
    gain = paired(method, control)
    if not gain or not target:
        return None
    way = statistics.fmean(target.values()) - statistics.fmean(control[seed] for seed in method.keys() & control.keys())
    return statistics.fmean(gain) / way if way > 0 else None


def class_scores(matrix: list[list[int]]) -> list[float | None]:
    """IoU in percent of each class, from a confusion matrix with labels as rows; None for a class that is in no label."""
    matrix = torch.tensor(matrix)
    return [100 * score if count else None for score, count in zip(metrics.iou(matrix).tolist(), matrix.sum(dim=1).tolist())]


def mean_score(matrix: list[list[int]]) -> float:
    """mIoU in percent over the classes that occur in the labels."""
    return statistics.fmean(score for score in class_scores(matrix) if score is not None)


def matrices(runs: Runs, row: str) -> dict[int, list[list[int]]]:
    """Seed -> confusion matrix of a row "script variant stage", first test mode."""
    script, variant, stage = row.split()
    return {seed: next(iter(run["stages"][stage].values()))["matrix"] for (*name, seed), run in sorted(runs.items())
            if name == [script, variant] and stage in run["stages"]}


def scores(runs: Runs, row: str) -> dict[int, float]:
    """Seed -> mIoU in percent."""
    return {seed: mean_score(matrix) for seed, matrix in matrices(runs, row).items()}


# -------------------------------------------------------------------------------------------------- the tables


def mean_and_range(values: list[float], digits: int = 1, sign: str = "+") -> str:
    """Mean, and the lowest and the highest: "+1.5 (+0.2 to +2.1)", with sign "" "1.5 (0.2 to 2.1)"."""
    if not values:
        return "-"
    mean, low, high = (f"{round(statistic(values), digits) + 0.0:{sign}.{digits}f}"                # + 0.0: never -0.0
                       for statistic in (statistics.fmean, min, max))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def mean_text(values: list[float]) -> str:
    """The mean with one digit; "-" without values."""
    return f"{statistics.fmean(values):.1f}" if values else "-"


def percent(share: float | None) -> str:
    """A share in percent, without digits; "-" for None."""
    return "-" if share is None else f"{100 * share:.0f} %"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; each row has as many cells as the head."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def gains(pairs: dict[str, Runs], *names: str) -> str:
    """Methods x pairs of domains: the paired difference to the control; the share of the gap, in pairs with a target only."""
    steps = [step for step in STEPS if step.main]
    head, rows = ["method"], [[f"{step.method}, {step.name}"] for step in steps]
    for name in names or [name for name in TITLES if name in pairs]:
        runs = pairs.get(name, {})
        targets = {network: scores(runs, row) for network, row in TARGET.items()}
        head += [f"gain, {TITLES[name]}", *["gap closed"] * any(targets.values())]
        for cells, step in zip(rows, steps):
            method, control = scores(runs, step.run), scores(runs, step.control)
            cells.append(mean_and_range(paired(method, control)))
            if any(targets.values()):
                cells.append(percent(gap_share(method, control, targets[step.network])))
    return markdown(head, rows)


def all_rows(pairs: dict[str, Runs], name: str) -> str:
    """Every row of one pair that has a run: source only, control and method stage by stage, target only."""
    runs, rows = pairs.get(name, {}), []

    def add(title: str, row: str, cells: list[str]) -> None:
        if values := list(scores(runs, row).values()):
            rows.append([title, mean_text(values), " ".join(f"{value:.1f}" for value in values), *cells])

    for network in SOURCE:
        add(f"**source only**, {network}", SOURCE[network], ["", ""])
        seen = set()
        for step in [step for step in STEPS if step.network == network]:
            method, control, target = (scores(runs, row) for row in (step.run, step.control, TARGET[network]))
            if step.control not in {*SOURCE.values(), *seen}:
                add(f"{step.method}: control, as long as {step.name}", step.control, ["", ""])
            seen.add(step.control)
            add(f"**{step.method}**, {step.name}", step.run,
                [mean_and_range(paired(method, control)), percent(gap_share(method, control, target))])
        add(f"target only, {network}", TARGET[network], ["", ""])
    return markdown(["row", "mIoU", "each seed", "gain over control", "gap closed"], rows)


def per_class(pairs: dict[str, Runs], name: str, method: str) -> str:
    """IoU of each class: source only, then control, method and paired difference of each step that has a run."""
    runs = pairs.get(name, {})
    steps = [step for step in STEPS if step.method == method and scores(runs, step.run)]
    source = SOURCE[next(step.network for step in STEPS if step.method == method)]
    classes = next((run["classes"] for run in runs.values()), [])
    columns = {row: {seed: class_scores(matrix) for seed, matrix in matrices(runs, row).items()}
               for row in {source, *(row for step in steps for row in (step.run, step.control))}}
    tested = [seed_scores for seeds in columns.values() for seed_scores in seeds.values()]
    occur = [k for k in range(len(classes)) if any(seed_scores[k] is not None for seed_scores in tested)]

    def of_class(row: str, k: int) -> dict[int, float]:
        return {seed: seed_scores[k] for seed, seed_scores in columns[row].items()}

    head, rows = ["class", "source only"], []
    for step in steps:
        head += [f"control, {step.name}", step.name, "gain"]
    for k in occur:
        rows.append([classes[k], mean_text(list(of_class(source, k).values()))])
        for step in steps:
            adapted, control = of_class(step.run, k), of_class(step.control, k)
            rows[-1] += [mean_text(list(control.values())), mean_text(list(adapted.values())),
                         mean_and_range(paired(adapted, control))]
    return markdown(head, rows)


def curve(pairs: dict[str, Runs], name: str) -> str:
    """The mIoU during training of the runs with --eval-every: a row per iteration, a column per run."""
    points = {f"{script} {variant}, seed {seed}": {line["iteration"]: line["miou"]["mIoU present"] for line in run["log"]
                                                   if "mIoU present" in line.get("miou", {})}
              for (script, variant, seed), run in sorted(pairs.get(name, {}).items())}
    iterations = sorted({iteration for column in points.values() for iteration in column})
    return markdown(["iteration", *points], [[str(iteration), *(f"{column[iteration]:.1f}" if iteration in column else "-"
                                                                for column in points.values())] for iteration in iterations])


def label_quality(matrix: list[list[int]]) -> tuple[list[float], list[float], list[list[float | None]]]:
    """The quality of pseudo labels. Args: counts of (label, pseudo label), (K, K + 1); last column: pixels without one.
    Returns: all in percent: accuracy of the labelled pixels; coverage, the labelled share of the pixels that have a true
    label; for each class [accuracy of its pseudo labels, share of its pixels that have any], None for 0 / 0."""
    K, total = len(matrix), sum(map(sum, matrix))
    labelled = total - sum(row[-1] for row in matrix)
    pseudo = [sum(row[k] for row in matrix) for k in range(K)]
    true = [sum(row) for row in matrix]
    classes = [[100 * matrix[k][k] / pseudo[k] if pseudo[k] else None, 100 - 100 * matrix[k][-1] / true[k] if true[k] else None]
               for k in range(K)]
    return 100 * sum(matrix[k][k] for k in range(K)) / max(1, labelled), 100 * labelled / max(1, total), classes


def diagnoses(runs: Runs, kind: str) -> dict[tuple[str, str, str], list]:
    """(script, variant, folder of labels or stage) -> results of tests/diagnose.py, in the order of the seeds."""
    measured: dict[tuple[str, str, str], list] = {}
    for (script, variant, _), run in sorted(runs.items()):
        for name, value in run.get("diagnosis", {}).get(kind, {}).items():
            measured.setdefault((script, variant, name), []).append(value)
    return measured


def title(script: str, variant: str, name: str) -> str:
    """A row's name: "CAG, stage1", or "CAG control, stage1" of a variant that is not the method itself."""
    method = next(step.method for step in STEPS if step.method.lower() == script)
    return f"{method}{'' if variant == script else ' ' + variant}, {name}"


def labels(pairs: dict[str, Runs], name: str) -> str:
    """Accuracy and coverage of each set of pseudo labels, over all pixels and as means of classes."""
    rows = []
    for key, matrices in diagnoses(pairs.get(name, {}), "labels").items():
        accuracy, coverage, classes = zip(*map(label_quality, matrices))
        means = [statistics.fmean(cell for cell, of in seed if cell is not None and of is not None) for seed in classes]
        rows.append([title(*key), *(mean_and_range(values, sign="") for values in (accuracy, coverage, means))])
    return markdown(["pseudo labels", "accuracy", "coverage", "accuracy, mean of classes"], rows)


def label_classes(pairs: dict[str, Runs], name: str) -> str:
    """Accuracy / coverage of the methods' pseudo labels per class, means over the seeds."""
    runs = pairs.get(name, {})
    qualities = {title(*key): [label_quality(matrix)[2] for matrix in matrices]
                 for key, matrices in diagnoses(runs, "labels").items() if "control" not in key}
    rows = []
    for k, of_class in enumerate(next((run["classes"] for run in runs.values()), [])):
        cells = [[[x for x in column if x is not None] for column in zip(*(classes[k] for classes in seeds))]
                 for seeds in qualities.values()]
        if any(coverage for _, coverage in cells):
            rows.append([of_class, *(f"{mean_text(accuracy)} / {mean_text(coverage)}" for accuracy, coverage in cells)])
    return markdown(["class: accuracy / coverage", *qualities], rows)


def features(pairs: dict[str, Runs], name: str) -> str:
    """Class center distances and the discriminators' accuracies, of each stage's model."""
    rows, runs = [], pairs.get(name, {})
    trained = {(script, variant, stage) for (script, variant, _), run in runs.items() for stage in run["stages"]}
    for key, entries in [item for item in diagnoses(runs, "features").items() if item[0] in trained]:
        ccd = [[entry["class center distance"][domain] for entry in entries] for domain in ("source", "target", "both")]
        right = [entry["discriminator"] for entry in entries if "discriminator" in entry]
        rows.append([title(*key), *(mean_and_range(values, 2, "") for values in ccd),
                     *(mean_text([100 * entry[domain] for entry in right]) for domain in ("source", "target"))])
    return markdown(["model", "CCD, source", "CCD, target", "CCD, both", "D right, source", "D right, target"], rows)


def distances(pairs: dict[str, Runs], name: str) -> str:
    """Distances of target features to a stage's anchors or centres, with the model before the stage and after it."""
    rows = []
    for (script, variant, stage), entries in diagnoses(pairs.get(name, {}), "features").items():
        for which in [which for which in entries[0] if which.endswith((", before", ", after"))]:
            values = [[entry[which][key] for entry in entries] for key in ("own", "other", "right")]
            columns = [*values[:2], [own / other for own, other in zip(*values[:2])]]
            rows.append([title(script, variant, f"{which}: {stage}"), *(mean_and_range(column, 2, "") for column in columns),
                         mean_and_range([100 * x for x in values[2]], sign="")])
    return markdown(["centres of, when: model", "to the own", "to the nearest other", "own / other", "own is nearest, %"], rows)


TABLES = {"gains": gains, "rows": all_rows, "classes": per_class, "curve": curve, "labels": labels,
          "labels-per-class": label_classes, "features": features, "distances": distances}


def filled(text: str, pairs: dict[str, Runs]) -> str:
    """A page in which each table is computed again from the JSON files. Raises: UserError for an unknown name."""
    def table(marker: re.Match) -> str:
        name, *args = marker[2].split()
        if name not in TABLES:
            raise UserError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
        return marker[1] + TABLES[name](pairs, *args)

    text = re.sub(r"(<!-- table: (.+?) -->\n)(?:\|.*\n)*", table, text)
    begin, end = "<!-- results: begin -->\n", "<!-- results: end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{gains(pairs)}\n{end}", text, flags=re.DOTALL)


def draw(pairs: dict[str, Runs], path: Path) -> None:
    """A panel per pair: a bar for each method's mean gain over its control, a point for each seed's."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    names, steps = [name for name in TITLES if name in pairs], [step for step in STEPS if step.main]
    figure = Figure(figsize=(1 + 4.2 * max(1, len(names)), 3.4), layout="constrained")
    for panel, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False, sharey=True)[0], names):
        for k, step in enumerate(steps):
            values = paired(scores(pairs[name], step.run), scores(pairs[name], step.control))
            if values:
                panel.bar(k, statistics.fmean(values), color="C0" if step.network == "v2" else "C1", alpha=0.5)
                panel.plot([k] * len(values), values, "ko", markersize=4)
        panel.set_xlim(-0.6, len(steps) - 0.4)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(steps)), [f"{step.method}\n{step.name}" for step in steps], fontsize=7)
        panel.set_title(TITLES[name])
    figure.axes[0].set_ylabel("mIoU: method minus control")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


# ------------------------------------------------------------------------------------------ the JSON files


def run_name(folder: Path, config: dict) -> tuple[str, str]:
    """Pair and variant of a run folder. Raises: UserError for another form of name."""
    name = re.fullmatch(rf"{config.get('method')}-{config.get('source')}-([^-]+)-(.+)-{config.get('seed')}", folder.name)
    if not config or not name:
        raise UserError(f"{folder} is no run folder named SCRIPT-SOURCE-PAIR-VARIANT-SEED, as common/results.py names them")
    return name[1], name[2]


def collect(folder: Path, results: Path, pair: str | None = None) -> Path | None:
    """Write results/PAIR/SCRIPT-VARIANT-SEED.json: what the page needs of a run folder, without paths of this machine.

    Returns: the file; None for a run without scores. Raises: UserError for another name and other test images."""
    config, stages = read_json(folder / "config.json"), read_json(folder / "results.json")
    script, (named_pair, variant) = config.get("method"), run_name(folder, config)
    if not stages or None in stages.values():                    # not finished, or no labels to test with
        return None
    images, pair = config.get("images", {}).get("target val"), pair or named_pair
    for other in (results / pair).glob("*-*.json"):
        if images and read_json(other)["images"] not in (images, None):
            raise UserError(f"{folder} was tested on other images than {other}: give it another --pair, or remove the file")
    settings = {key: value for key, value in config.items() if key not in ("images", "made", "lengths", "method", "seed")}
    for key in [key for key in PATHS - {"classes"} if settings.get(key)]:                      # classes: a file's content
        settings[key] = "/".join(Path(settings[key]).parts[-2 if key == "from_" else -1:])
    log = read_log(folder)
    last = {line["stage"]: line for line in log if "rate" in line}
    content = {
        "script": script, "pair": pair, "variant": variant, "seed": config["seed"], "settings": settings,
        "lengths": config.get("lengths"), "images": images,
        "made": {key: config.get("made", {}).get(key) for key in ("torch", "torchvision", "commit", "date")},
        "classes": list(next(iter(next(iter(stages.values())).values()))["iou"]),
        "stages": {stage: {test: {key: value for key, value in entry.items() if key != "iou"} for test, entry in tests.items()}
                   for stage, tests in stages.items()},
        "log": [line for line in log if "rate" not in line or line is last[line["stage"]]]}
    path = results / pair / f"{script}-{variant}-{config['seed']}.json"
    write(path, content)
    return path


def write(path: Path, content: dict) -> None:
    """A JSON file with a line per key."""
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_atomically(path, lambda file: file.write(f"{{\n{text}\n}}\n".encode()))


def read(results: Path) -> dict[str, Runs]:
    """Pair -> its runs, each with its entry of the pair's diagnosis.json, which tests/diagnose.py writes."""
    pairs: dict[str, Runs] = {}
    for path in sorted(results.glob("*/*-*.json")):
        run = read_json(path)
        run["diagnosis"] = read_json(path.parent / "diagnosis.json").get(path.stem, {})
        pairs.setdefault(run["pair"], {})[run["script"], run["variant"], run["seed"]] = run
    return pairs


@command
def main(argv: list[str] | None = None) -> None:
    """Collect run folders, write tables and figure."""
    parser = argparse.ArgumentParser(prog="python -m common.page", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to collect first")
    parser.add_argument("--pair", help="name of their pair of domains; automatic: as in the folders' names")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds docs/ and README.md [this checkout]")
    args = parser.parse_args(argv)
    for folder in args.runs:
        print(f"{folder.name}: {collect(folder, args.root / 'docs/results', args.pair) or 'no stage has scores'}")
    pairs = read(args.root / "docs/results")
    for page in (args.root / "docs/results.md", args.root / "README.md"):
        if page.exists():
            old = page.read_text(encoding="utf-8")
            new = filled(old, pairs)
            if new != old:
                write_atomically(page, lambda file, new=new: file.write(new.encode()))
                print(f"tables: {page}")
    try:
        draw(pairs, args.root / ".github/results.png")
    except ImportError as error:
        raise UserError("matplotlib is not installed, and the figure needs it: pip install matplotlib") from error


if __name__ == "__main__":
    main()
