"""Run a script over seeds and variants as a user would, and print the README's table.

    python -m common.results fada --seeds 0 1 2 --name toy -- --toy
    python -m common.results fada --seeds 0 1 2 --name pair --jobs 2 -- --data PATH --init PATH --backbone resnet18 ...

What stands behind `--` goes to every run. The rows are the script's own `RESULTS`: row -> (stage reported, flags); `{row}` in
the flags is the run folder of another row with the same seed. Rows with the same flags are stages of one run. Runs that are
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

from common.cli import UserError, command, parse
from common.run import Options, run_folder


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
    try:
        script = importlib.import_module(args.method)
    except ModuleNotFoundError as error:
        raise UserError(f"there is no script {args.method}.py here; give the name of one without .py") from error
    rows, wanted = script.RESULTS, args.rows or list(script.RESULTS)
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
        stage, found = rows[row][0], futures[first_of(rows, row), seed].result()[1]
        if stage not in found:
            raise UserError(f"{row!r} with seed {seed} was stopped; start again to go on")
        results[row].append(found[stage])
    print(table(results, args.mean, gap={list(rows)[0], list(rows)[-1]} <= set(wanted)))


def first_of(rows: dict[str, tuple[str, str]], row: str) -> str:
    """The first row with the same flags, which names the run."""
    return next(other for other in rows if rows[other][1] == rows[row][1])


def measure(args, extra: list[str], script, row: str, seed: int, futures: dict) -> tuple[Path, dict]:
    """Run one variant with one seed. Returns the run's folder and what is in its results.json.

    A finished run is started too: it checks its settings, refuses if they are others, and ends at once.
    """
    rows, flags = script.RESULTS, script.RESULTS[row][1]
    for needed in re.findall(r"\{(.+?)\}", flags):
        flags = flags.replace(f"{{{needed}}}", shlex.quote(str(futures[first_of(rows, needed), seed].result()[0])))
    tag = f"{args.name}-{re.sub(r'[^a-z0-9]+', '-', first_of(rows, row).lower()).strip('-')}-{seed}"
    argv = [*extra, *shlex.split(flags), "--seed", str(seed), "--tag", tag, "--runs", args.runs]
    line = [sys.executable, f"{args.method}.py", *argv]
    print(f"\n{shlex.join(['python', *line[1:]])}", file=sys.stderr, flush=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))} if args.jobs > 1 else {}
    if subprocess.run(line, stdout=2, env={**os.environ, **threads}).returncode != 0:
        raise UserError(f"{row!r} with seed {seed} failed; put it right and start again: what is finished is kept")
    cfg, options = parse(f"{args.method}.py", "", (script.Config, Options), argv, script.TOY)
    folder = run_folder(args.method, cfg, options)
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


if __name__ == "__main__":
    main()
