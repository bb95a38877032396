"""The start of a run: check its settings and its folder, print its first lines."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
import torchvision

from common import checks
from common.cli import Size, flag, to_json
from common.distributed import gather_objects
from common.files import UserError, load, read_json, write_json

NOTES = ("lengths", "images", "made")                            # in config.json; all other entries are settings


def run_folder(method: str, options) -> Path:
    """<runs>/<method>-<source>[-<city>][-<tag>]"""
    parts = [method, options.source, options.city.lower() if options.target == "crosscity" else "",
             options.tag or ("toy" if options.toy else "")]
    return Path(options.runs, "-".join(filter(None, parts)))


def check_settings(options, stages: tuple[str, ...], sizes: dict, largest_scale: float, folder: Path) -> None:
    """Refuse an invalid stage, export, upper bound or crop; set --workers if it is not given. folder: of the run; other
    arguments as for `Run`."""
    if options.workers is None:
        options.workers = min(4, os.cpu_count() or 1)
    if options.stage not in (None, *stages):
        raise UserError(f"--stage {options.stage} is unknown; the stages are {', '.join(stages)}")
    if bool(options.predict) != bool(options.out):
        raise UserError("--predict FOLDER holds the images, --out FOLDER receives the labels: give both")
    options.eval |= bool(options.predict)
    if options.export:
        check_export(Path(options.export), folder)
    if options.eval:                                             # nothing is trained
        return
    if options.target == "crosscity" and options.target_labels:
        raise UserError("Cross-City's training images have no labels: --target-labels is for --target cityscapes")
    if options.target_labels and options.stage != stages[0]:
        raise UserError(f"--target-labels trains an upper bound, which is not adapted: add --stage {stages[0]}")
    for width, height in filter(None, sizes.values() if options.crop else ()):
        largest = Size(round(largest_scale * width), round(largest_scale * height))
        if options.crop.width > largest.width or options.crop.height > largest.height:
            scaled = "" if largest_scale == 1 else f", at most {largest} after --scale"
            raise UserError(f"--crop {options.crop} is larger than the images ({Size(width, height)}{scaled}); choose a "
                            "smaller crop or larger images")


def check_export(path: Path, current: Path) -> None:
    """Refuse to write exported weights into a run folder or over any file but an earlier export. current: this run's folder."""
    if path.suffix == ".json":
        raise UserError(f"--export {path} is the name of the JSON file beside the weights: choose another suffix")
    for folder in path.resolve().parents:
        if folder == current.resolve() or ((folder / "config.json").exists() and (folder / "log.jsonl").exists()):
            raise UserError(f"--export {path} lies in the run folder {folder}, whose files it needs: choose another folder")
    side = path.with_suffix(".json")
    try:
        exported = read_json(side).get("file") == path.name
    except UserError:                                            # another kind of file
        exported = False
    for file in (path, side):
        if file.exists() and not exported:
            raise UserError(f"--export {path} would replace {file}, which is no export of {path.name}: give another name")


def native_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(supported() for supported in known if supported)


def choose_precision(options, device: torch.device, begun: dict) -> None:
    """Set --amp and --channels-last if they are not given, once per run. begun: config.json of a run that continues."""
    cuda = device.type == "cuda"
    if options.amp in ("auto", None):
        wanted = (cuda or options.amp == "auto") and native_bf16(device)
        options.amp = begun.get("amp", "none") if begun else "bf16" if wanted else "none"
    if options.channels_last is None:
        options.channels_last = begun.get("channels_last", False) if begun else cuda and options.amp == "bf16"


def check_config(run) -> None:
    """Refuse to continue a run with other settings, unless nothing is trained yet. A setting that an earlier version did not
    write to config.json counts as its default. With --eval only the precision is decided."""
    if run.options.eval:
        return choose_precision(run.options, run.device, {})
    path = run.folder / "config.json"
    old, trained = gather_objects((read_json(path), any(run.folder.glob("*.pt"))))[0]
    choose_precision(run.options, run.device, old if trained else {})
    new = {"method": run.method, **to_json(run.cfg, defining_only=True), **to_json(run.options, defining_only=True),
           "processes": run.world}
    defaults = {**to_json(type(run.options)(), defining_only=True), **to_json(type(run.cfg)(), defining_only=True),
                "amp": "none", "channels_last": False}
    previous = {**defaults, **{key: value for key, value in old.items() if key not in NOTES}} if old else {}
    changed = [key for key in sorted(previous.keys() | new.keys()) if previous.get(key) != new.get(key)]
    if changed and trained:
        shown = ", ".join(f"{flag(key)} ({previous.get(key)} -> {new.get(key)})" for key in changed)
        way_on = _way_on(run, changed, old.get("lengths", {}))
        raise UserError(f"{run.folder} holds a run with other settings: {shown}; {way_on}")
    if run.rank == 0 and (changed or not trained):
        write_json(path, {**new, "lengths": run.lengths, "images": {}, "made": made(run)})


def _way_on(run, changed: list[str], lengths: dict) -> str:
    """How to train a stage for longer than an existing run did."""
    if all(key.endswith(("iterations", "epochs")) for key in changed):
        same = next((k for k, stage in enumerate(run.stages) if lengths.get(stage) != run.lengths[stage]), 0)
        before = run.folder / f"{run.stages[same - 1]}.pt"
        if same and before.exists():
            return f"to train {run.stages[same]!r} for that long, add another --tag and --from {before}"
    return "give this one another --tag, or delete the folder"


def check_images(run, domain: str, split: str, dataset) -> None:
    """Print once how many images a set has; refuse to continue a run with other images."""
    path, name, new = run.folder / "config.json", f"{domain} {split}", checks.identity(dataset)
    if name in run.sets:
        return
    run.sets[name] = dataset
    print(f"{name} ({dataset.dataset}): {new['images']} images", flush=True)
    config = {} if run.options.eval else gather_objects(read_json(path))[0]
    old = config.get("images", {}).get(name, new)
    if old != new:
        others = f"{old['images']} images, here are {new['images']}" if old["images"] != new["images"] else "other file names"
        raise UserError(f"{run.folder} holds a run whose {name} set has {others}, such as {dataset.pairs[0].image}: give "
                        "the --data of that run, or this one another --tag")
    if config and run.rank == 0 and name not in config.get("images", {}):
        write_json(path, {**config, "images": {**config.get("images", {}), name: new}})


def select(run, base: dict | None) -> tuple[str, ...]:
    """The stages to run: --stage, or those after the stage of --from, or all. base: the content of --from."""
    stage, path, first = run.options.stage, run.options.from_, 0
    if run.options.eval:
        return run.stages
    if base:
        if base.get("iteration", 0) < base.get("iterations", 0):
            raise UserError(f"--from {path} is from the middle of stage {base['stage']!r}; start that run again to finish it")
        method = base.get("method", run.method)
        known = method == run.method and base["stage"] in run.stages
        first = run.stages.index(base["stage"]) + 1 if known else len(run.stages)
        if first == len(run.stages) and not stage:
            raise UserError(f"--from {path} finished {base['stage']!r} of {method}.py, and no stage of this run follows: "
                            f"add --stage {' or '.join(run.stages)} to start from it, or --eval")
    elif stage and stage != run.stages[0]:
        before = run.folder / f"{run.stages[run.stages.index(stage) - 1]}.pt"
        if not gather_objects(before.exists())[0]:
            raise UserError(f"--stage {stage} needs {before}, which does not exist: run --stage {before.stem} first, or "
                            "give --from CHECKPOINT")
    return (stage,) if stage else run.stages[first:]


def check_nothing_is_stale(run, stage: str, missing: str) -> None:
    """Refuse to repeat a stage, or to make `missing` again, while results that depend on the old one exist."""
    later = run.stages[run.stages.index(stage) + 1:]
    results = [f"{stage}.pt"] * gather_objects((run.folder / f"{stage}.pt").exists())[0]
    results += [path.name for name in later for pattern in ("", "-*") for path in run.folder.glob(f"{name}{pattern}.pt")]
    results += [f"{name!r} in results.json" for name in (stage, *later) if name in run.results()]
    if results:
        raise UserError(f"{run.folder} has no {missing}, but has later results ({', '.join(results)}): delete the folder, or "
                        "give this run another --tag")


def commit() -> str:
    """The git commit of the scripts, with "-dirty" if they have local changes; "unknown" without git."""
    try:
        result = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
                              capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip() or "unknown"


def made(run) -> dict:
    """The origin of a run, for config.json; it is not compared when a run continues."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "commit": commit(), "host": platform.node(),
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "data": run.options.data,
            "target_data": run.options.target_data}


def introduce(run, given_amp: str | None) -> None:
    """Print a run's first lines: script, commit, device, precision, folder, stages. With --toy, render the toy city.
    given_amp: --amp of the command line."""
    device, name = run.device.type, run.options.device
    if device == "cuda":
        device = f"cuda ({torch.cuda.get_device_name(run.device)})"
    elif device == "cpu" and name == "cpu":
        device = "cpu, as --device says"
    elif device == "cpu":
        why = "no GPU is visible to torch" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        device = f"cpu, because {why}"
    precision = "bfloat16" if run.options.amp == "bf16" else "float32"
    precision += ", channels-last" * bool(run.options.channels_last)
    precision += ", chosen by --amp auto" * (given_amp == "auto" or (given_amp is None and run.device.type == "cuda"))
    lengths = ", ".join(f"{stage} {run.lengths[stage] or ''}".strip() for stage in run.stages)
    print(f"{run.method}.py, commit {commit()}, torch {torch.__version__}\ndevice: {device}; precision: {precision}\n"
          f"folder: {run.folder}\nstages: {lengths}", flush=True)
    if run.options.toy and not run.options.predict:
        from common import toycity
        toycity.ensure(run.options.data)


def trained_with(method: str, values: dict, defining: set[str]) -> list[str]:
    """The flags that a checkpoint or a run was trained with (sizes, network, data, ...), for its evaluation by --eval. With an
    --init file, only the run that the flags name counts.

    Args: values: the command line's and the defaults; defining: names of the flags that define a run.
    """
    options = SimpleNamespace(**values)
    if options.from_:
        try:
            content = dict(load(options.from_))
        except (UserError, TypeError, ValueError):               # another project's file: read or refused later
            content = {}
        config = {**content.get("options", {}), **(content.get("config", {}) if content.get("method") == method else {})}
        folders = config
    else:
        folder = run_folder(method, options)
        if options.init in ("imagenet", "none") and not (folder / "config.json").exists():
            # perhaps it has another --source or --target
            others = [path.parent for path in Path(options.runs).glob(f"{method}-*/config.json")
                      if not options.tag or path.parent.name.endswith(f"-{options.tag}")]
            folder = others[0] if len(others) == 1 else folder
        config = read_json(folder / "config.json")
        folders = config.get("made", {})
    settings = {key: value for key, value in config.items() if key in defining - {"toy", "from_"}}
    settings |= {key: folders[key] for key in ("data", "target_data") if os.path.isdir(folders.get(key) or "")}
    argv = []
    for key, value in settings.items():
        if isinstance(value, bool):
            argv.append(flag(key) if value else flag(key).replace("--", "--no-", 1))
        elif isinstance(value, list):
            argv += [flag(key), *map(str, value)]
        elif value is not None:
            argv.append(f"{flag(key)}={value}")
    return argv


def tensorboard(folder: Path):
    """The writer for --tensorboard. Raises UserError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard, or leave the flag out") from error
    return SummaryWriter(str(folder / "tensorboard"))
