"""Charts of runs from their log.jsonl, drawn by matplotlib, and a table of the IoU per class of two or more runs.

    python -m common.curves RUN [RUN ...]        writes curves.png here, or --out FILE

The mIoU and each loss have a panel of their own. Thin lines are the logged means, thick lines are smoothed. Stages follow one
another on the horizontal axis, and a dashed line marks where a stage begins.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.cli import command
from common.files import UserError, read_json, read_log, write_atomically

NOT_LOSSES = {"stage", "iteration", "rate", "seconds", "miou"}


def series(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, int]]:
    """Read what a run has logged.

    Returns: name -> points (iterations since the start of the run, value), with "mIoU" in percent; stage -> iterations
        before it.
    """
    lines, starts, points = read_log(folder), {}, {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        starts[stage] = sum(max((line["iteration"] for line in lines if line["stage"] == earlier), default=0)
                            for earlier in starts)
    for line in lines:
        values = {key: value for key, value in line.items() if key not in NOT_LOSSES} if "rate" in line else {}
        for name, value in {**line.get("miou", {}), **values}.items():
            points.setdefault(name, []).append((starts[line["stage"]] + line["iteration"], value))
    return points, starts


def smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Exponential moving mean, corrected for the bias at its start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(mean / weight)
    return means


def draw(folders: list[Path], path: Path) -> None:
    """Write the chart of one run, or of several for comparison. Raises: ImportError without matplotlib."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    runs = {folder.name: series(folder) for folder in folders}
    names = list(dict.fromkeys(name for points, _ in runs.values() for name in points))
    figure = Figure(figsize=(9, 1 + 2.2 * max(1, len(names))), layout="constrained")
    for panel, name in zip(figure.subplots(max(1, len(names)), 1, squeeze=False, sharex=True)[:, 0], names):
        for color, (run, (points, starts)) in enumerate(runs.items()):
            x, y = zip(*sorted(points.get(name, [(0, float("nan"))])))
            if name.startswith("mIoU"):
                panel.plot(x, y, "o-", color=f"C{color}", label=run)
            else:
                panel.plot(x, y, color=f"C{color}", alpha=0.3, linewidth=0.8)
                panel.plot(x, smooth(list(y)), color=f"C{color}", label=run)
            for stage, start in starts.items():
                panel.axvline(start, color=f"C{color}", linestyle="--", linewidth=0.6)
                if panel is figure.axes[0]:
                    panel.annotate(f" {stage}", (start, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
        panel.set_ylabel(f"{name}, %" if name.startswith("mIoU") else name)
    if len(runs) > 1:
        figure.axes[0].legend(fontsize=8)
    figure.axes[-1].set_xlabel("iteration")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def differences(folders: list[Path]) -> str:
    """Table of each run's IoU per class in percent, at its last evaluated stage, and the difference to the first run."""
    columns = {}
    for folder in folders:
        results = read_json(folder / "results.json")
        stage, tests = list(results.items())[-1] if results else ("", None)
        if not tests:
            raise UserError(f"{folder} has no results.json with scores: compare runs whose stages have been tested")
        columns[f"{folder.name}, {stage}"] = next(iter(tests.values()))
    first = next(iter(columns.values()))
    if any(result["iou"].keys() != first["iou"].keys() for result in columns.values()):
        raise UserError(f"{', '.join(columns)} have different classes: compare runs with the same --source and --target")
    lines = [" ".join(f"{title:>24}" for title in ("class", *columns))]
    for name in (*first["iou"], "mIoU"):
        values = [result["iou"].get(name, result.get(name)) for result in columns.values()]
        shown = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        shown[1:] = [text if value is None or values[0] is None else f"{text} ({100 * (value - values[0]):+.1f})"
                     for text, value in zip(shown[1:], values[1:])]
        lines.append(" ".join(f"{text:>24}" for text in (name, *shown)))
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    """Draw the chart of the runs; for two or more, print their differences."""
    parser = argparse.ArgumentParser(prog="python -m common.curves", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the picture to write [%(default)s]")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not (folder / "log.jsonl").exists():
            raise UserError(f"{folder} has no log.jsonl: give the folder of a run")
    try:
        draw(args.runs, args.out)
    except ImportError as error:
        raise UserError("matplotlib is not installed, and charts need it: pip install matplotlib") from error
    print(f"curves: {args.out}")
    if len(args.runs) > 1:
        print(differences(args.runs))


if __name__ == "__main__":
    main()
