"""Run the variants of a script with several seeds, as a user would start them, and print the table of their scores.

    python -m common.results                                 FADA on the toy city, seeds 0 1 2
    python -m common.results fada --name own --jobs 2 -- --data PATH --init PATH --backbone resnet18 ...
    python -m common.results pair --name i2c --jobs 2 -- --data PATH --init resnet18.pth      all runs of docs/results.md
    python -m common.results pair --name i2c --show -- --data PATH --init resnet18.pth        list their states

Flags after `--` go to every run; without any, each run has --toy. The rows are those of `RESULTS`: row -> (stages, flags);
`{row}` in the flags is the run folder of an earlier row with the same seed. Rows with the same flags are stages of one run.
Start the same line again to continue: finished runs are not repeated, interrupted ones resume. With --jobs N, N runs train side
by side, each on its share of the cores. If a run fails, runs that need it are skipped and the others continue.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from common.cli import command, flag, parse, to_json
from common.files import UserError, read_json, read_log
from common.run import Options
from common.start import run_folder

_CAG = "--from {source only}/source.pt"
_CAG_CONTROL = f"{_CAG} --lambda-adv 0 --lambda1 0 --lambda2 0"
_ZERO = "--lambda-pseudo 0 --lambda-triplet 0 --lambda-consist 0"
_C2F = "--from {coarse (GPA)}/step0.pt"
_C2F_CONTROL = f"--from {{source only}}/step0.pt --alignment none {_ZERO}"
_OFF = "--no-distill --no-stm --assign none --lambda-consist 0"
_GPA = "--from {GPA baseline}/warmup.pt"
_V2 = "--batch-size 4 --lr 2.5e-3"                          # of the protocol's runs
_FADA = f"{_V2} --lr-discriminator 1e-3 --adversarial-iterations 1000 --no-distill --from {{fada source}}/source.pt"
_V3 = "--lr 5e-3 --step-lr 2.5e-3 --encoder-rate 0.1 --step0-iterations 2000 --K 2 --step-iterations 500"
_STEPS = f"{_V3} --batch-size 2 --from {{c2f coarse}}/step0.pt"
_ANCHORS = ("--batch-size 2 --lr 2.5e-3 --encoder-rate 0.1 --lr-discriminator 1e-3 "
            "--warmup-epochs {epochs} --stage-epochs {epochs} --K 2 --margin {margin} --from {c2f source}/step0.pt")
_MAPS = ("--batch-size 2 --lr 5e-4 --adapt-lr 5e-4 --selftrain-iterations 1500 --distill-iterations 1000 "
         "--stm-backbone resnet18 --stm-weights {init} --from {c2f coarse}/step0.pt")
_SIM = "--batch-size 2 --lr 2.5e-3 --lr-discriminator 1e-3 --iterations 1200"
PAIR = "--backbone resnet18 --source-size 256x144 --target-size 256x128 --crop 192x112 --amp bf16 --workers 0 --save-every 250"
RESULTS = {                                                  # script -> row -> (stages, flags of its run)
    "fada": {
        "source only": ("source", ""),
        "source only, as long": ("adversarial", "--from {source only}/source.pt --lambda-adv 0"),
        "FADA": ("adversarial", "--from {source only}/source.pt"),
        "target only (upper bound)": ("source", "--target-labels"),
    },
    "cag": {
        "source only": ("source", ""),
        "source only, as long as warm-up": ("warmup", _CAG_CONTROL),
        "warm-up": ("warmup", _CAG),
        "source only, as long as stage 1": ("stage1", _CAG_CONTROL),
        "stage 1": ("stage1", _CAG),
        "source only, as long as stage 2": ("stage2", _CAG_CONTROL),
        "stage 2": ("stage2", _CAG),
        "source only, as long as stage 3": ("stage3", _CAG_CONTROL),
        "stage 3": ("stage3", _CAG),
        "target only (upper bound)": ("source", "--target-labels"),
    },
    "c2f": {
        "source only": ("step0", "--alignment none"),
        "source only, as long as step 1": ("step1", _C2F_CONTROL),
        "source only, as long as step 2": ("step2", _C2F_CONTROL),
        "coarse (GPA)": ("step0", ""),
        "GPA only, as long as step 1": ("step1", f"{_C2F} {_ZERO}"),
        "step 1": ("step1", _C2F),
        "GPA only, as long as step 2": ("step2", f"{_C2F} {_ZERO}"),
        "step 2": ("step2", _C2F),
        "target only (upper bound)": ("step0", "--target-labels --alignment none"),
    },
    "sim": {
        "source only": ("step1", "--no-ssl --lambda-adv 0 --lambda-ci 0"),
        "+ adversarial": ("step1", "--no-ssl --lambda-ci 0"),
        "+ SIM": ("step1", ""),
        "+ SSL": ("step2", ""),
        "target only (upper bound)": ("step1", "--target-labels"),
    },
    "bismap": {
        "source only": ("warmup", "--alignment none"),
        "source only, as long": ("selftrain", f"--from {{source only}}/warmup.pt --alignment none {_OFF}"),
        "GPA baseline": ("warmup", ""),
        "GPA only, as long": ("selftrain", f"{_GPA} {_OFF}"),
        "+ STM": ("selftrain", f"{_GPA} --no-distill --assign none --lambda-consist 0"),
        "+ MAPs": ("selftrain", f"{_GPA} --no-distill --lambda-consist 0"),
        "+ consistency": ("selftrain", _GPA),
        "distilled": ("distill1 distill2", _GPA),
        "target only (upper bound)": ("warmup", "--target-labels --alignment none"),
    },
    "pair": {                                                # all scripts; the first word of a row is its script
        "fada source": ("source", f"{_V2} --source-iterations 3000"),
        "fada control": ("adversarial", f"{_FADA} --lambda-adv 0"),
        "fada fada": ("adversarial", _FADA),
        "fada strong": ("adversarial", f"{_FADA} --lambda-adv 0.01"),
        "c2f source": ("step0", f"{_V3} --batch-size 4 --alignment none"),
        "c2f coarse": ("step0", f"{_V3} --batch-size 4"),
        "c2f control": ("step1 step2", f"{_STEPS} {_ZERO}"),
        "c2f c2f": ("step1 step2", _STEPS),
        "cag control": ("warmup stage1 stage2", f"{_ANCHORS} --lambda-adv 0 --lambda1 0 --lambda2 0"),
        "cag cag": ("warmup stage1 stage2", _ANCHORS),
        "bismap control": ("selftrain", f"{_MAPS} {_OFF}"),
        "bismap bismap": ("selftrain", f"{_MAPS} --pl-ratio 0.613"),
        "sim control": ("step1", f"{_SIM} --no-ssl --lambda-adv 0 --lambda-ci 0"),
        "sim sim": ("step1 step2", _SIM),
        "fada target": ("source", f"{_V2} --source-iterations 3000 --adversarial-iterations 1000 --target-labels"),
        "c2f target": ("step0", f"{_V3} --batch-size 4 --alignment none --target-labels"),
    },
}


class Job(NamedTuple):
    """One run of a script: its stages are started one after another, in one folder."""

    script: str
    argv: list[str]
    stages: tuple[str, ...]
    needs: tuple[tuple[str, int], ...]                       # (row, seed) of the runs whose checkpoints it starts from
    folder: Path

    @property
    def finished(self) -> bool:
        return set(self.stages) <= read_json(self.folder / "results.json").keys()

    @property
    def state(self) -> str:
        """Finished, begun or open; how long its iterations took, over all starts; the folder's name."""
        seconds, counted = 0.0, {}
        for line in read_log(self.folder):
            if "seconds" in line:
                seconds += line["seconds"] * (line["iteration"] - counted.get(line["stage"], 0))
                counted[line["stage"]] = line["iteration"]
        state = "finished" if self.finished else "begun" if counted else "open"
        return f"{state:<9}{seconds / 60:7.1f} min  {self.folder.name}"


@command
def main(argv: list[str] | None = None) -> None:
    """Read the flags, train the unfinished runs, print the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="python -m common.results", allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", default="fada", help="a script's name without .py, or pair [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="toy", help="first part of the run folders' tags [%(default)s]")
    parser.add_argument("--rows", nargs="+", help="only these rows, and those that they start from")
    parser.add_argument("--runs", default="runs", help="folder that holds the run folders")
    parser.add_argument("--mean", default="mIoU present", help="which mean of results.json the table shows")
    parser.add_argument("--margin", default="2.3", help="CAG's in the rows of pair, by tests/diagnose.py [%(default)s]")
    parser.add_argument("--epochs", default="0.75", help="CAG's per stage in the rows of pair [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--show", action="store_true", help="only list the runs: state, minutes, folder")
    args, extra = parser.parse_args(argv[:cut]), argv[cut + 1:] or ["--toy"]
    sys.path.insert(0, os.getcwd())                          # the scripts lie beside common/
    if args.method not in RESULTS:
        raise UserError(f"there is no script {args.method}.py here; give one of {', '.join(RESULTS)}")
    rows = RESULTS[args.method]
    if unknown := set(args.rows or ()) - set(rows):
        raise UserError(f"unknown row {min(unknown)!r}; the rows are {', '.join(map(repr, rows))}")
    jobs = queue(args, extra)
    if args.show:
        return print("\n".join(job.state for job in jobs.values()))
    if failed := work(jobs, args.jobs):
        raise UserError(f"{', '.join(failed)} failed; fix it and start again: finished stages are not repeated")
    results = {}
    for row, (stages, _) in rows.items():
        for stage in stages.split() if row in (args.rows or rows) else ():
            finished = [read_json(jobs[first_of(rows, row), seed].folder / "results.json") for seed in args.seeds]
            results[row + f", {stage}" * (" " in stages)] = [stages_of_run[stage] for stages_of_run in finished]
    if None in itertools.chain(*results.values()):
        raise UserError("all runs are finished, but the target has no labels to test with: there is no table")
    print(table(results, args.mean, gap=args.method != "pair" and {list(rows)[0], list(rows)[-1]} <= results.keys()))


def first_of(rows: dict[str, tuple[str, str]], row: str) -> str:
    """The first row with the same flags and script, which names the run."""
    return next(other for other in rows if rows[other][1] == rows[row][1])


def queue(args, extra: list[str]) -> dict[tuple[str, int], Job]:
    """The runs of the chosen rows and of those that they start from, in order: (row that names the run, seed) -> run.

    Raises: UserError for a run folder with other settings, and for rows of "pair" without --init."""
    rows, jobs = RESULTS[args.method], {}
    chosen = {first_of(rows, row) for row in args.rows or rows}
    for row in reversed(rows):                               # a row's start comes before it
        if row in chosen:
            chosen |= set(re.findall(r"\{(.+?)\}", rows[row][1])) & set(rows)
    known = {"margin": args.margin, "epochs": args.epochs, "init": dict(zip(extra, extra[1:])).get("--init")}
    for row, seed in [(row, seed) for row in rows if row in chosen for seed in args.seeds]:
        script, variant = row.split() if args.method == "pair" else (args.method, row)
        needs, text = [], rows[row][1]
        for name in re.findall(r"\{(.+?)\}", text):
            if name in rows:
                needs.append((name, seed))
                known[name] = str(jobs[name, seed].folder)
            if not known[name]:
                raise UserError(f"{row!r} needs --{name} FILE behind --")
            text = text.replace(f"{{{name}}}", shlex.quote(known[name]))
        tag = f"{args.name}-{re.sub(r'[^a-z0-9]+', '-', variant.lower()).strip('-')}-{seed}"
        common = shlex.split(PAIR) if args.method == "pair" else []
        argv = [*common, *extra, *shlex.split(text), "--seed", str(seed), "--tag", tag, "--runs", args.runs]
        stages = dict.fromkeys(stage for other in rows.values() if other[1] == rows[row][1] for stage in other[0].split())
        jobs[row, seed] = Job(script, argv, tuple(stages), tuple(needs), check_settings(script, argv))
    return jobs


def check_settings(script: str, argv: list[str]) -> Path:
    """The run's folder. Raises UserError where it holds a run with other settings, as the script itself would."""
    module = importlib.import_module(script)
    cfg, options = parse(f"{script}.py", "", (module.Config, Options), argv, module.TOY)
    folder = run_folder(script, options)
    new = {**to_json(cfg, defining_only=True), **to_json(options, defining_only=True)}
    old = {**to_json(type(cfg)()), **to_json(Options()), **read_json(folder / "config.json")}
    decided = {"classes", *["amp"] * (options.amp == "auto")}   # at the run's start
    changed = [key for key in sorted(new.keys() - decided) if old[key] != new[key]]
    if changed and (folder / "results.json").exists():
        shown = ", ".join(f"{flag(key)} ({old[key]} -> {new[key]})" for key in changed)
        raise UserError(f"{folder} holds a run with other settings: {shown}; give another --name, or delete the folder")
    return folder


def work(jobs: dict[tuple[str, int], Job], side_by_side: int) -> list[str]:
    """Train each unfinished run once the runs that it starts from are finished. Returns: folders of the failed runs."""
    number = {key: k for k, key in enumerate(jobs, 1)}

    def tell(key: tuple[str, int], what: str) -> None:
        print(f"\nrun {number[key]} of {len(jobs)}{what}: {jobs[key].state}", file=sys.stderr, flush=True)

    done = {key for key, job in jobs.items() if job.finished}
    waiting, running, failed = [key for key in jobs if key not in done], {}, []
    pool = ThreadPoolExecutor(side_by_side)
    try:
        while True:
            for key in [key for key in waiting if done.issuperset(jobs[key].needs)][:side_by_side - len(running)]:
                waiting.remove(key)
                tell(key, "")
                running[pool.submit(start, jobs[key], side_by_side)] = key
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                if future.result():
                    done.add(key)
                else:
                    failed.append(jobs[key].folder.name)
                tell(key, " FAILED" * (key not in done))
    finally:
        pool.shutdown(cancel_futures=True)


def start(job: Job, side_by_side: int) -> bool:
    """Train the unfinished stages of a run, each by a start of the script. Returns: whether all succeeded."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // side_by_side))} if side_by_side > 1 else {}
    for stage in [stage for stage in job.stages if stage not in read_json(job.folder / "results.json")]:
        line = [sys.executable, f"{job.script}.py", *job.argv, "--stage", stage]
        print(shlex.join(["python", *line[1:]]), file=sys.stderr, flush=True)
        if subprocess.run(line, stdout=2, env={**os.environ, **threads}).returncode != 0:
            return False
    return True


def table(results: dict[str, list[dict]], mean: str, gap: bool) -> str:
    """Mean over the seeds, sample standard deviation and, with `gap`, the share of the gap between the first and the last row
    that each row closes, as Markdown."""
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
