"""A run: its folder, log and checkpoints, and the iteration loop that survives being killed. Nothing here depends on a method.

    model = run.network("v2")                                   # weights of the last finished stage or of --from
    if run.pending("source"):
        state = {"model": model, "optimizer": optimizer}
        for it, (x, y) in run.stage("source", cfg.source_iterations, state, source, batch_size=cfg.batch_size):
            ...                                                 # forward passes, losses, backward pass: the method
            run.report(seg=loss)
        run.evaluate("source", model, test)
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import data, metrics, viz
from common.cli import Size, option, to_json
from common.deeplab import DeepLab, Structure, build_model, make_network
from common.distributed import any_process, barrier, broadcast_buffers, choose_device, gather_objects, join, sum_over_processes
from common.files import UserError, load, lock, progress, read_json, read_log, write_atomically, write_json, writing

REMEDY = "try a lower --lr or --amp none under a new --tag"     # for values that are not finite


@dataclass
class Options:
    """domains, files, and how a script runs"""

    source: str = option("gta5", "gta5, synthia, cityscapes, or a set of your own, see --classes")
    target: str = option("cityscapes", "cityscapes, crosscity, or a set of your own")
    city: str = option("Rome", "city of Cross-City", choices=("Rome", "Rio", "Tokyo", "Taipei"))
    backbone: str = option("resnet101", "encoder; vgg16: v2 only", choices=("resnet101", "resnet50", "resnet18", "vgg16"))
    freeze_bn: str = option("auto", "frozen batch norm; affine: the encoder's, except statistics; auto: encoder, or none "
                            "with --init none", choices=("auto", "all", "encoder", "affine", "none"))
    source_size: Size | None = option(None, "source images are resized to it; automatic: the script's size for the domain")
    target_size: Size | None = option(None, "the same for target images, also in tests; automatic: the script's size")
    crop: Size | None = option(None, "random crop of both domains in training; automatic: none")
    data: str = option("data", "folder that holds gta5/, cityscapes/, ...", defines_run=False)
    target_data: str | None = option(None, "folder that holds the target; automatic: --data", defines_run=False)
    label_ids: str = option("ids", "content of label files: the data set's ids, or Cityscapes' train ids in one domain or both",
                            choices=("ids", "train", "source-train", "target-train"))
    classes: str | None = option(None, "JSON file of your own classes, see docs/data.md; automatic: Cityscapes'")
    source_images: str | None = option(None, "folder with other source images of the same file names")
    init: str = option("imagenet", "initial weights: imagenet, none, or a file")
    branches: int | None = option(None, "branches that the head of an --init or --from file sums: 2 in AdaptSegNet and SIM, 4 "
                                  "in ADVENT, BDL, FDA; automatic: 2 where the others were never trained", choices=(2, 4))
    input: str | None = option(None, "input of the network in an --init file or a published --from file: channels and range; "
                               "automatic: from the names in the file", choices=("imagenet", "rgb", "rgb255", "bgr255"))
    entry: str | None = option(None, "name of the network in a file that holds several: ema, teacher, ...")
    partial_init: bool = option(False, "accept an --init file that lacks weights of the encoder")
    target_labels: bool = option(False, "train the first stage on the labelled target: an upper bound, not adaptation")
    runs: str = option("runs", "folder that holds the run folders", defines_run=False)
    tag: str | None = option(None, "suffix of the run folder's name", defines_run=False)
    seed: int = option(0, "seed of weights, data order, augmentation", low=0)
    device: str = option("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"), defines_run=False)
    amp: str | None = option(None, "bf16: run the networks in bfloat16 autocast (losses stay float32); auto: where the machine "
                             "computes in it natively; automatic: auto on CUDA, else none", choices=("none", "bf16", "auto"))
    channels_last: bool | None = option(None, "keep images and weights channels-last in memory; automatic: with bf16 on CUDA")
    workers: int | None = option(None, "processes that load images; 0 loads in the main process; automatic: one per CPU core, "
                                 "at most 4", low=0, defines_run=False)
    eval_every: int = option(0, "iterations between two evaluations in a stage; 0: only after it", low=0, defines_run=False)
    log_every: int = option(50, "iterations between two log lines", low=1, defines_run=False)
    save_every: int = option(500, "iterations between two checkpoints for resuming", low=1, defines_run=False)
    stage: str | None = option(None, "run only this stage", defines_run=False)
    from_: str | None = option(None, "start after the stage that this checkpoint finished; published ones: after the first")
    eval: bool = option(False, "only evaluate the last stage, or --from, or --init", defines_run=False)
    predict: str | None = option(None, "only predict the images of this folder, as --eval would, into --out", defines_run=False)
    out: str | None = option(None, "folder of --predict's label-id PNGs and overlays", defines_run=False)
    export: str | None = option(None, "also write the evaluated weights here, with a JSON file beside them", defines_run=False)
    tensorboard: bool = option(False, "also write the log's numbers for TensorBoard, if installed", defines_run=False)
    toy: bool = option(False, "the script's small settings, on the toy city")
    command: str = ""


class Run:
    """One run of a script in its own folder.

    Args:
        method: the script's name; cfg, options: what `cli.parse` gave; stages: name -> iterations, in order; 0 leaves a stage
            out; None: depends on the number of images, and is set in `run.lengths` before the first stage.
        sizes: data set -> size of its images if no flag gives one; None or absent: the images' own size.
        largest_scale: of the random resize in training, against which the crop is checked.
    Raises: UserError for settings that make no sense or differ from the folder's, and for a device that is unavailable.
    """

    def __init__(self, method: str, cfg, options: Options, stages: dict[str, int | None], sizes: dict | None = None,
                 largest_scale: float = 1.0):
        from common import layouts, start  # only a run's start needs them
        self.classes = layouts.classes_of(options)
        self.lengths = {stage: iterations for stage, iterations in stages.items() if iterations != 0}
        self.cfg, self.options, self.method, self.stages = cfg, options, method, tuple(self.lengths)
        self.sizes = {"source": options.source_size or (sizes or {}).get(options.source),
                      "target": options.target_size or (sizes or {}).get(options.target)}
        self.folder, given_amp = start.run_folder(method, options), options.amp
        start.check_settings(options, self.stages, self.sizes, largest_scale, self.folder)
        self.device = choose_device(options.device)
        self.rank, self.world = join()
        self._losses: list[dict[str, Tensor]] = []
        self._watched = self._asked_to_stop = self._base = self._keep = None     # _asked_to_stop: when, by which signal
        self.sets: dict[str, data.SegmentationDataset] = {}          # "source train" ... -> the first one made
        self.inspected: set[str] = set()                             # those that `checks.inspect` has checked
        if not options.eval:
            self._lock = lock(self.folder) if self.rank == 0 else None
            barrier()
        start.check_config(self)
        start.introduce(self, given_amp)
        if options.from_:
            from common import published  # only weights of another run or project need it
            self._base = published.read_checkpoint(options.from_, self.stages[0], options.branches, options.entry)
        self.selected = start.select(self, self._base)
        self._board = start.tensorboard(self.folder) if options.tensorboard and not options.eval and self.rank == 0 else None

    def pending(self, stage: str) -> bool:
        """Whether this start must train or evaluate a stage."""
        if stage not in self.selected or self.options.eval:
            return False
        if not self._has(f"{stage}.pt") or gather_objects(stage not in self.results())[0]:
            from common import checks
            checks.inspect(self)                                 # once, before anything is trained
            return True
        print(f"{stage}: finished before, see {self.folder / stage}.pt", flush=True)
        if stage == self.selected[-1]:
            self._print_table(self.results())
        return False

    def once(self, stage: str, what: str, compute: Callable[[], dict]) -> dict:
        """The result of `compute()`, a dict of tensors and plain values. The first start computes it and writes it to
        `<stage>-<what>.pt`; later starts read that file."""
        path = self.folder / f"{stage}-{what}.pt"
        if not self._has(path.name):
            from common.start import check_nothing_is_stale
            check_nothing_is_stale(self, stage, path.name)
            self._write(path, compute())
        return load(path, remedy="delete it, and last.pt if there is one, to compute it again")

    def stage(self, name: str, iterations: int, state: dict, *datasets, batch_size: int, note: dict | None = None):
        """Yield `(iteration, batch, ...)` for each remaining iteration of a stage.

        Args:
            name: decides the random streams and the checkpoint's name.
            iterations: the stage's length, also the horizon of the poly rate.
            state: everything that a checkpoint must hold: modules and optimizers (anything with `state_dict`).
            datasets: each gives a batch `(image, label, *maps)` of batch_size images on the device; note: first log line.
        """
        if self._has(f"{name}.pt"):                                 # trained, but not evaluated
            restore(self._checkpoint(name)["state"], state)
            (self.folder / "last.pt").unlink(missing_ok=True)
            return
        start = self._resume(name, state, note)
        optimizers = [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]
        loaders = [data.training_loader(dataset, batch_size, iterations, data.derive_seed(self.options.seed, name, k), start,
                                        self.options.workers, self.device.type == "cuda", self.rank, self.world)
                   for k, dataset in enumerate(datasets)]
        def save() -> None:
            self._flush(name, self._done, iterations, optimizers)
            self._save("last", name, self._done, iterations, state)
            self._saved = self._done

        self._losses, self._last, self._done, self._saved, self._keep = [], time.monotonic(), start, start, save
        with self._stop_signals(*loaders) as rows:
            for it, batches in zip(range(start, iterations), rows, strict=False):
                stop = self._evaluate_during(name, it)
                if not stop:
                    self.seed(name, it)                          # so no random state has to be saved
                    set_rates(optimizers, it, iterations)
                    torch.backends.cudnn.benchmark = True        # a stage's batches have one shape, evaluation's many
                    yield it, *([self.place(x) for x in batch if isinstance(x, Tensor)] for batch in batches)    # no names
                    torch.backends.cudnn.benchmark = False
                    stop, it = any_process(self._asked_to_stop), it + 1
                self._done = it
                if stop or (it % self.options.save_every == 0 and it < iterations):
                    save()
                elif it % self.options.log_every == 0 or it == iterations:
                    self._flush(name, it, iterations, optimizers)
                if stop:
                    self._exit()
        self._keep = None
        self._save(name, name, iterations, iterations, state)
        (self.folder / "last.pt").unlink(missing_ok=True)

    def report(self, **losses: Tensor) -> None:
        """Record this iteration's losses (0-d tensors). They are checked and logged every `--log-every` iterations."""
        self._losses.append({name: loss.detach() for name, loss in losses.items()})

    def watch(self, model: nn.Module, dataset) -> None:
        """With --eval-every, log this model's mIoU on `dataset` during the stages (for the curves; decides nothing)."""
        self._watched = (model, dataset) if self.options.eval_every and dataset.labelled else None

    def sweep(self, what: str, dataset, shared: bool = True):
        """Yield `(image, label, names, *maps)` once for each image of a dataset, one at a time, on the device. With `shared`,
        the processes divide the images. All processes wait for each other at the end."""
        rank, world = (self.rank, self.world) if shared else (0, 1)
        loader = data.sweep_loader(dataset, self.options.workers, self.device.type == "cuda", rank, world)
        with self._stop_signals(loader) as rows:
            for (image, label, names, *maps), in progress(f"{what}: image", rows, len(loader)):
                yield self.place(image), self.place(label), names, *map(self.place, maps)
                if self._asked_to_stop:
                    self._exit()
        barrier()

    def images(self, domain: str, split: str, labels: bool = True, augment: data.Augment = data.Augment(),  # noqa: B008
               transform=None, size: Size | None = None) -> data.SegmentationDataset:
        """The images of a domain, "source" or "target", that the flags name, resized to `size` or to the domain's size. The
        target's "val" images may lack labels: then nothing is evaluated."""
        from common import layouts, start
        if self.options.predict:
            from common import predict  # only --predict needs it
            return predict.folder_of(self.options, size or self.sizes[domain])
        pairs, name, classes = layouts.find(self.options, self.classes, domain, split, labels)
        dataset = data.SegmentationDataset(pairs, name, classes, size or self.sizes[domain], augment, transform=transform)
        start.check_images(self, domain, split, dataset)
        return dataset

    def network(self, kind: str | Callable, fresh: bool = False) -> DeepLab:
        """DeepLab "v2", "v3+" or your own network (docs/network.md), on the device, with --freeze-bn. Its weights are those of
        the last finished stage or --from; without these, and always with `fresh`, of --init. `run.latest` names them."""
        self.seed("model")
        from common import checks
        options, (self.latest, content) = self.options, ("", {}) if fresh else self._latest()
        frozen = ("none" if options.init == "none" else "encoder") if options.freeze_bn == "auto" else options.freeze_bn
        if "state" in content:
            structure = Structure(**content.get("structure", {}).get("model", {}))
            model = make_network(kind, options.backbone, len(self.classes), structure)
            model.freeze_bn(frozen)
            restore({"model": content["state"]["model"]}, {"model": model})
            checks.finite(model, options.from_ if content is self._base else self.folder / f"{self.latest}.pt")
            return self.place(model)
        init, source = (options.from_, "--from") if content else (options.init, "--init")
        model = build_model(kind, options.backbone, len(self.classes), init, frozen, partial_init=options.partial_init,
                            branches=options.branches, input=options.input, flag=source, entry=options.entry)
        if not model.complete and (content or options.eval):
            raise UserError(f"{source} {init} is no trained network with its head, and no stage of {self.folder} is finished: "
                            "train first, or give --from CHECKPOINT")
        self.latest = self.latest or Path(init).stem
        checks.finite(model, init)
        return self.place(model)

    def seed(self, *names) -> None:
        """Seed every random state from (--seed, names): what follows does not depend on what ran before."""
        value = data.derive_seed(self.options.seed, *names)
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)

    def item_seeds(self, count: int, *names) -> list[int]:
        """Seeds of the images of this process's batch, from (--seed, names, position in the batch of all processes)."""
        return [data.derive_seed(self.options.seed, *names, self.rank * count + n) for n in range(count)]

    def place(self, x):
        """Move a module or a tensor to the run's device, and a module or images to its memory format."""
        channels_last = self.options.channels_last and (isinstance(x, nn.Module) or x.dim() == 4)
        layout = torch.channels_last if channels_last else torch.preserve_format
        return x.to(self.device, non_blocking=True, memory_format=layout)

    def autocast(self):
        """The context for forward passes: bfloat16 with --amp bf16, nothing otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    @property
    def float64_device(self) -> torch.device:
        """The device, or the CPU if the device is Apple's, which has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def evaluate(self, name: str, model: nn.Module, dataset, tests: dict[str, dict]) -> None:
        """Evaluate a stage on labelled images, write the result into results.json and a picture, print the run's table so far.
        `tests`: name of each test mode -> keyword arguments of `metrics.predict`."""
        from common import checks
        if self.options.export and self.rank == 0:               # a later stage's model replaces it
            from common import published
            published.export(Path(self.options.export), model, self.classes.names)
        if self.options.predict:
            return dataset.write(self, name, model, next(iter(tests.values())))
        checks.inspect(self)
        results = {**({} if self.options.eval else self.results()), name: {} if dataset.labelled else None}
        for test, view in tests.items() if dataset.labelled else ():
            with self.autocast():
                matrix = metrics.evaluate(model, self.sweep(f"{name}, {test}", dataset), len(self.classes), self.device, **view)
            results[name][test] = metrics.summary(matrix, self.classes)
        if not self.options.eval and self.rank == 0:
            with self.autocast():
                rows = viz.prediction_rows(model, dataset, self.classes, self.place)
            titles = ["image", "overlay", f"prediction ({name})", "label"][:3 + dataset.labelled]
            self.draw(f"{name}.png", [row[:len(titles)] for row in rows], titles)
            last = max((line["iteration"] for line in read_log(self.folder) if line["stage"] == name), default=0)
            if dataset.labelled and not self._has_point(name, last):
                self._log(stage=name, iteration=last, miou=metrics.percent(next(iter(results[name].values()))))
            with contextlib.suppress(ImportError):               # without matplotlib
                from common import curves
                curves.draw([self.folder], self.folder / "curves.png")
            write_json(self.folder / "results.json", results)    # last: it marks the stage as evaluated
        barrier()
        self._print_table(results)

    def results(self) -> dict:
        """What results.json holds: stage -> test mode -> `metrics.summary`, or stage -> None without labels."""
        return read_json(self.folder / "results.json")

    def draw(self, name: str, rows: list, titles: list[str], legend: bool = True) -> None:
        """Write a contact sheet into the run's folder, with the classes' colours as its legend, and print its path."""
        if self.rank == 0:
            viz.contact_sheet(self.folder / name, rows, titles, self.classes if legend else None)
            print(f"pictures: {self.folder / name}", flush=True)

    def _print_table(self, results: dict) -> None:
        title = f"IoU in percent{', trained with target labels: an upper bound' * self.options.target_labels}"
        columns = {stage + f", {test}" * (test != "single-scale"): result
                   for stage, tests in results.items() for test, result in (tests or {}).items()}
        metrics.print_scores(title, columns) if columns else print("nothing to evaluate: the target has no labels", flush=True)

    def _has_point(self, stage: str, iteration: int) -> bool:
        """Whether the log has the mIoU of this iteration."""
        return any(line["stage"] == stage and line["iteration"] == iteration and "miou" in line
                   for line in read_log(self.folder))

    def _evaluate_during(self, stage: str, it: int) -> bool:
        """Evaluate before this iteration if --eval-every says so and the log has no result yet. Returns whether to stop."""
        due = self._watched and it and it % self.options.eval_every == 0
        if not due or gather_objects(self._has_point(stage, it))[0]:
            return False
        model, dataset = self._watched
        broadcast_buffers(model)
        loader = data.sweep_loader(dataset, self.options.workers, self.device.type == "cuda", self.rank, self.world)
        images = progress(f"{stage} {it}: image", (row for row, in self._or_keep(zip(loader, strict=True))), len(loader))
        images = itertools.takewhile(lambda _: not self._asked_to_stop, images)
        with self.autocast():
            matrix = metrics.evaluate(model, images, len(self.classes), self.device)
        if any_process(self._asked_to_stop):                     # half a pass is discarded: the next start repeats it
            return True
        means = metrics.percent(metrics.summary(matrix, self.classes))
        self._log(stage=stage, iteration=it, miou=means)
        self._print(f"{stage} {it}: " + "  ".join(f"{name} {value}" for name, value in means.items()))
        self._last = time.monotonic()
        return False

    def _flush(self, stage: str, done: int, iterations: int, optimizers: list) -> None:
        """Log and print each loss's mean since the last flush. Raises UserError if a loss is not finite."""
        if not self._losses:
            return
        names = list(self._losses[0])
        values = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in self._losses]).cpu()
        sum_over_processes(values)
        values, self._losses = values / self.world, []
        if len(bad := (~values.isfinite()).nonzero()):
            row, column = bad[0].tolist()
            last = self.folder / "last.pt"
            raise UserError(f"loss {names[column]!r} became {values[row, column].item()} at iteration "
                            f"{done - len(values) + 1 + row} of stage {stage!r}; "
                            f"{f'{last} from before it is kept' if last.exists() else 'nothing was saved yet'}; {REMEDY}")
        means = {name: round(value, 6) for name, value in zip(names, values.double().mean(dim=0).tolist(), strict=True)}
        now = time.monotonic()
        seconds, self._last = (now - self._last) / len(values), now
        rate = optimizers[0].param_groups[0]["lr"] if optimizers else 0.0
        self._log(stage=stage, iteration=done, rate=rate, seconds=round(seconds, 4), **means)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        later = self.stages[self.stages.index(stage) + 1:]
        ahead = iterations - done + sum(self.lengths[name] or 0 for name in later if name in self.selected)
        left = datetime.timedelta(seconds=round(seconds * ahead))
        self._print(f"{stage} {done}/{iterations}  {losses}  rate {rate:.2e}  {seconds:.2f} s/it  {left} left")

    def _save(self, file: str, stage: str, iteration: int, iterations: int, state: dict) -> None:
        """Write a checkpoint; that of a finished stage holds no optimizers."""
        entries = {key: value for key, value in state.items()
                if iteration < iterations or not isinstance(value, torch.optim.Optimizer)}
        broadcast_buffers(*(value for value in entries.values() if isinstance(value, nn.Module)))
        saved = {key: value.state_dict() for key, value in entries.items()}
        for key, values in saved.items():
            if not all(x.isfinite().all() for x in values.values() if isinstance(x, Tensor) and x.is_floating_point()):
                raise UserError(f"{key!r} holds values that are not finite after iteration {iteration} of stage {stage!r}, and "
                                f"is not saved; {REMEDY}")
        self._write(self.folder / f"{file}.pt", {
            "method": self.method, "stage": stage, "iteration": iteration, "iterations": iterations, "state": saved,
            "structure": {key: asdict(value.structure) for key, value in entries.items() if isinstance(value, DeepLab)},
            "config": to_json(self.cfg), "options": to_json(self.options)})

    def _write(self, path: Path, content: dict) -> None:
        """Write a file that every process may read afterwards."""
        if self.rank == 0:
            write_atomically(path, lambda file: torch.save(content, file))
        barrier()

    def _resume(self, stage: str, state: dict, note: dict | None) -> int:
        """Restore `last.pt` if it belongs to this stage. Returns: the iteration to start with."""
        start, last = 0, self._checkpoint("last") if self._has("last.pt") else {}
        if last.get("stage") == stage:
            restore(last["state"], state)
            start = last["iteration"]
            print(f"{stage}: resuming at iteration {start}", flush=True)
        else:
            from common.start import check_nothing_is_stale
            check_nothing_is_stale(self, stage, f"{stage}.pt")
        if self.rank == 0:                                       # drop log lines from after the checkpoint
            end = start + (start > 0)
            lines = [line for line in read_log(self.folder) if line["stage"] != stage or line["iteration"] < end]
            text = "".join(json.dumps(line) + "\n" for line in lines).encode()
            write_atomically(self.folder / "log.jsonl", lambda file: file.write(text))
            if note and start == 0:
                self._log(stage=stage, iteration=0, **note)
        return start

    def _has(self, file: str) -> bool:
        return gather_objects((self.folder / file).exists())[0]  # asked once: on a network disk, other processes may lag

    def _checkpoint(self, name: str) -> dict:
        """The checkpoint of this name in the run's folder; one of another script is refused."""
        path = self.folder / f"{name}.pt"
        checkpoint = load(path, remedy="delete it to start from the previous checkpoint")
        if not isinstance(checkpoint, dict) or checkpoint.get("method") != self.method:
            raise UserError(f"{path} does not fit: it is not of {self.method}.py; restore the original, or delete the folder")
        return checkpoint

    def _latest(self) -> tuple[str, dict]:
        """Name and content of the checkpoint that this start continues from or evaluates; {}: begin with --init."""
        options = self.options
        last = self.stages.index(options.stage) + options.eval if options.stage else len(self.stages)
        finished = [stage for stage in self.stages[:last] if self._has(f"{stage}.pt")]
        if self._base and (options.eval or not finished):
            return Path(options.from_).stem, self._base
        checkpoint = self._checkpoint(finished[-1]) if finished else {}
        if options.eval and options.init not in ("imagenet", "none", checkpoint.get("options", {}).get("init")):
            return "", {}                                        # evaluate this file, not a stage that began with another
        return (finished[-1], checkpoint) if finished else ("", {})

    def _log(self, **record) -> None:
        """Append one line to log.jsonl: stage, iteration (how many are done) and, each --log-every iterations, rate, seconds
        per iteration and each loss's mean; or miou (name of a mean -> percent); or, at 0, the stage's `note`."""
        path = self.folder / "log.jsonl"
        if self.rank == 0:
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        for name, value in {**record, **record.get("miou", {})}.items() if self._board else ():
            if isinstance(value, int | float) and name != "iteration":
                self._board.add_scalar(f"{record['stage']}/{name}", value, record["iteration"])

    def _print(self, line: str) -> None:
        """Print during a stage. If the output is closed, the run stops as if it had received SIGPIPE."""
        try:
            print(line, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")
            self._asked_to_stop = self._asked_to_stop or (time.monotonic(), 13)

    @contextlib.contextmanager
    def _stop_signals(self, *loaders):
        """Yield the loaders' batches, and turn SIGINT, SIGTERM and SIGHUP into a clean stop after the current iteration. A
        signal often comes twice, from a scheduler and from torchrun; one that comes seconds later ends the process at once."""
        def ask_to_stop(number, frame):
            if not self._asked_to_stop:
                self._asked_to_stop = time.monotonic(), number
                unit = "image; once more: stop now"
                if self._keep:
                    unit = f"iteration; once more: stop now, losing {self._done + 1 - self._saved} iterations"
                with contextlib.suppress(OSError):                   # not print: the signal may have interrupted it
                    os.write(1, f"\nstopping after this {unit}\n".encode() * (self.rank == 0))
            elif time.monotonic() - self._asked_to_stop[0] > 2:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        previous = {number: signal.signal(number, ask_to_stop) for number in numbers
                    if signal.getsignal(number) != signal.SIG_IGN}       # nohup ignores SIGHUP
        try:
            rows = zip(*loaders, strict=True)                    # here torch sets a SIGCHLD handler that may raise at any
            if previous and hasattr(signal, "SIGCHLD"):          # moment, also while a file is written
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)    # without it, the next batch reports a killed worker
            yield self._or_keep(rows)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _or_keep(self, rows):
        """Yield the rows. If one fails (damaged image, killed worker), save the trained state first; not with several
        processes, because they do not fail together."""
        try:
            yield from rows
        except Exception:
            if self._keep and self.world == 1 and self._done > self._saved:
                self._keep()
            raise

    def _exit(self) -> None:
        again = self.options.command if self.world == 1 else f"the same torchrun command, with {self.world} processes"
        print(f"\nstopped; resume with: {again}", flush=True)
        raise SystemExit(128 + (self._asked_to_stop or (0, signal.SIGTERM))[1])      # the signal may be another process's


def set_rates(optimizers: list, iteration: int, iterations: int) -> None:
    """The poly rate of every parameter group: the rate it began with * (1 - iteration / iterations)^0.9."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - iteration / iterations) ** 0.9


def restore(saved: dict, state: dict) -> None:
    """Load a checkpoint's entries into the objects of the same names; optimizers may be absent from the checkpoint."""
    needed = {key for key, value in state.items() if not isinstance(value, torch.optim.Optimizer)}
    if not needed <= saved.keys() <= state.keys():
        raise UserError(f"the checkpoint holds {', '.join(sorted(saved))}, but {', '.join(sorted(state))} are needed; "
                        "it comes from another method or version: give one of this method")
    for key, value in saved.items():
        try:
            state[key].load_state_dict(value)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"the checkpoint's {key!r} does not fit this run's: {str(error).splitlines()[-1].strip()}; "
                            "check --backbone, --source and --target") from error
