"""Run a script over seeds and variants as a user would, and print the README's table.

    python -m common.results fada --seeds 0 1 2 --name toy -- --toy
    python -m common.results fada --seeds 0 1 2 --name pair --jobs 2 -- --data PATH --init PATH --backbone resnet18 ...

What stands behind `--` goes to every run. The rows are those of `RESULTS`: row -> (stage reported, flags); `{row}` in the flags
is the run folder of another row with the same seed. Rows with the same flags are stages of one run. Runs that are
finished are not run again; interrupted ones resume. With --jobs N, N runs go side by side, each on its share of the cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from common.cli import command, flag, flags, parse
from common.files import UserError
from common.run import Options
from common.start import run_folder
from common.usage import paper_value, show

_CAG = "--from {source only}/source.pt"
_CAG_CONTROL = f"{_CAG} --lambda-adv 0 --lambda1 0 --lambda2 0"
_ZERO = "--lambda-pseudo 0 --lambda-triplet 0 --lambda-consist 0"
_C2F = "--from {coarse (GPA)}/step0.pt"
_C2F_CONTROL = f"--from {{source only}}/step0.pt --alignment none {_ZERO}"
_OFF = "--no-distill --no-stm --assign none --lambda-consist 0"
_GPA = "--from {GPA baseline}/warmup.pt"
RESULTS = {                                                  # script -> row -> (stage reported, flags of its run)
    "fada": {
        "source only": ("source", "--stage source"),
        "source only, as long": ("adversarial", "--stage adversarial --from {source only}/source.pt --lambda-adv 0"),
        "FADA": ("adversarial", "--stage adversarial --from {source only}/source.pt"),
        "target only (upper bound)": ("source", "--stage source --target-labels"),
    },
    "cag": {
        "source only": ("source", "--stage source"),
        "source only, as long as warm-up": ("warmup", _CAG_CONTROL),
        "warm-up": ("warmup", _CAG),
        "source only, as long as stage 1": ("stage1", _CAG_CONTROL),
        "stage 1": ("stage1", _CAG),
        "source only, as long as stage 2": ("stage2", _CAG_CONTROL),
        "stage 2": ("stage2", _CAG),
        "source only, as long as stage 3": ("stage3", _CAG_CONTROL),
        "stage 3": ("stage3", _CAG),
        "target only (upper bound)": ("source", "--stage source --target-labels"),
    },
    "c2f": {
        "source only": ("step0", "--stage step0 --alignment none"),
        "source only, as long as step 1": ("step1", _C2F_CONTROL),
        "source only, as long as step 2": ("step2", _C2F_CONTROL),
        "coarse (GPA)": ("step0", "--stage step0"),
        "GPA only, as long as step 1": ("step1", f"{_C2F} {_ZERO}"),
        "step 1": ("step1", _C2F),
        "GPA only, as long as step 2": ("step2", f"{_C2F} {_ZERO}"),
        "step 2": ("step2", _C2F),
        "target only (upper bound)": ("step0", "--stage step0 --target-labels --alignment none"),
    },
    "sim": {
        "source only": ("step1", "--no-ssl --lambda-adv 0 --lambda-ci 0"),
        "+ adversarial": ("step1", "--no-ssl --lambda-ci 0"),
        "+ SIM": ("step1", ""),
        "+ SSL": ("step2", ""),
        "target only (upper bound)": ("step1", "--stage step1 --target-labels"),
    },
    "bismap": {
        "source only": ("warmup", "--stage warmup --alignment none"),
        "source only, as long": ("selftrain", f"--from {{source only}}/warmup.pt --alignment none {_OFF}"),
        "GPA baseline": ("warmup", "--stage warmup"),
        "GPA only, as long": ("selftrain", f"{_GPA} {_OFF}"),
        "+ STM": ("selftrain", f"{_GPA} --no-distill --assign none --lambda-consist 0"),
        "+ MAPs": ("selftrain", f"{_GPA} --no-distill --lambda-consist 0"),
        "+ consistency": ("selftrain", _GPA),
        "distilled": ("distill2", _GPA),
        "target only (upper bound)": ("warmup", "--stage warmup --target-labels --alignment none"),
    },
}


@command
def main(argv: list[str] | None = None) -> None:
    """Read the flags, run what is not finished, print the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="python -m common.results", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help="the script's name without .py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="results", help="first part of the run folders' tags")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--runs", default="runs", help="folder that holds the run folders")
    parser.add_argument("--mean", default="mIoU present", help="which mean of results.json the table shows")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    args, extra = parser.parse_args(argv[:cut]), argv[cut + 1:]
    sys.path.insert(0, os.getcwd())                          # the scripts lie beside common/
    if args.method not in RESULTS:
        raise UserError(f"there is no script {args.method}.py here; give one of {', '.join(RESULTS)}")
    script, rows = importlib.import_module(args.method), RESULTS[args.method]
    wanted = args.rows or list(rows)
    if unknown := set(wanted) - set(rows):
        raise UserError(f"unknown row {min(unknown)!r}; the rows are {', '.join(map(repr, rows))}")
    futures: dict[tuple[str, int], Future] = {}
    pool = ThreadPoolExecutor(args.jobs)
    try:
        for row in [row for row in rows if row in wanted or any(f"{{{row}}}" in rows[other][1] for other in wanted)]:
            for seed in args.seeds:                          # rows in order: what a run waits for was submitted before it
                if (first_of(rows, row), seed) not in futures:
                    futures[first_of(rows, row), seed] = pool.submit(measure, args, extra, script, row, seed, futures)
        for future in as_completed(futures.values()):
            future.result()                                  # the first failure ends the rest
    finally:
        pool.shutdown(cancel_futures=True)
    results: dict[str, list[dict]] = {row: [] for row in rows if row in wanted}
    for row, seed in [(row, seed) for row in results for seed in args.seeds]:
        stage, finished = rows[row][0], futures[first_of(rows, row), seed].result()[1]
        if stage not in finished:
            raise UserError(f"{row!r} with seed {seed} was stopped; start again to go on")
        results[row].append(finished[stage])
    print(table(results, args.mean, gap={list(rows)[0], list(rows)[-1]} <= set(wanted)))


def first_of(rows: dict[str, tuple[str, str]], row: str) -> str:
    """The first row with the same flags, which names the run."""
    return next(other for other in rows if rows[other][1] == rows[row][1])


def measure(args, extra: list[str], script, row: str, seed: int, futures: dict) -> tuple[Path, dict]:
    """Run one variant with one seed. Returns the run's folder and what is in its results.json.

    A finished run is started too: it checks its settings, refuses if they are others, and ends at once.
    """
    rows, flags = RESULTS[args.method], RESULTS[args.method][row][1]
    for needed in re.findall(r"\{(.+?)\}", flags):
        flags = flags.replace(f"{{{needed}}}", shlex.quote(str(futures[first_of(rows, needed), seed].result()[0])))
    tag = f"{args.name}-{re.sub(r'[^a-z0-9]+', '-', first_of(rows, row).lower()).strip('-')}-{seed}"
    argv = [*extra, *shlex.split(flags), "--seed", str(seed), "--tag", tag, "--runs", args.runs]
    line = [sys.executable, f"{args.method}.py", *argv]
    print(f"\n{shlex.join(['python', *line[1:]])}", file=sys.stderr, flush=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))} if args.jobs > 1 else {}
    if subprocess.run(line, stdout=2, env={**os.environ, **threads}).returncode != 0:
        raise UserError(f"{row!r} with seed {seed} failed; put it right and start again: what is finished is kept")
    _, options = parse(f"{args.method}.py", "", (script.Config, Options), argv, script.TOY)
    folder = run_folder(args.method, options)
    file = folder / "results.json"
    return folder, json.loads(file.read_text()) if file.exists() else {}


def table(results: dict[str, list[dict]], mean: str, gap: bool) -> str:
    """Mean over the seeds, sample standard deviation and, with `gap`, the share closed of what lies between the first and
    the last row, as Markdown."""
    lines = [f"| | {mean} | each seed | gap closed |", "|---|---|---|---|"]
    scores = {row: [100 * result["single-scale"][mean] for result in entries] for row, entries in results.items()}
    means = {row: statistics.mean(values) for row, values in scores.items()}
    low, high = next(iter(means.values())), list(means.values())[-1]
    for row, values in scores.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        share = f"{100 * (means[row] - low) / (high - low):.0f} %" if gap and high != low else "-"
        lines.append(f"| {row} | {means[row]:.1f}{spread} | {' '.join(f'{value:.1f}' for value in values)} | {share} |")
    return "\n".join(lines)


def defaults_table(cls: type) -> str:
    """A Config as the README shows it, in Markdown: flag, default, the paper's value and where the paper gives it."""
    lines = ["| flag | default | paper | meaning |", "|---|---|---|---|"]
    for field, _ in flags(cls):
        lines.append(f"| `{flag(field.name)}` | {show(field.default)} | {paper_value(field)} | {field.metadata['help']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
