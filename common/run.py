"""A run: its folder, device, random states, log, checkpoints, and the iteration loop that survives being killed.

Nothing here knows a method. A script's stage reads

    state = {"model": model, "optimizer": optimizer}
    for it, (x, y) in run.stage("source", cfg.source_iterations, state, source, batch_size=cfg.batch_size):
        ...                                             # forward passes, losses, backward pass: the method
        run.report(seg=loss)

and `run.stage` sets the learning rates, moves the batches, logs, saves, resumes and stops cleanly.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn

from common import data, metrics, viz
from common.cli import Size, UserError, flag, option, to_json, write_atomically
from common.deeplab import DeepLab, build_model, load_weights, read_file
from common.published import Structure, export, recognise, side_file

try:
    import fcntl
except ImportError:                                              # Windows has no such locks
    fcntl = None


@dataclass
class Options:
    """where things are and how they run"""

    data: str = option("data", "folder that holds gta5/, synthia/, cityscapes/, crosscity/", identity=False)
    source_images: str | None = option(None, "take the source images from this folder instead (same file names)")
    init: str = option("imagenet", "initial weights: imagenet, none, or a file, also of the projects that the README lists")
    branches: int | None = option(None, "branches that the head of an --init or --from file sums: 2 in AdaptSegNet and SIM, 4 "
                                  "in ADVENT, BDL, FDA; automatic: 2 where the others were never trained", choices=(2, 4))
    input: str | None = option(None, "input of the network in an --init file or a published --from file: channels and range; "
                               "automatic: as the file's names tell", choices=("imagenet", "rgb", "rgb255", "bgr255"))
    partial_init: bool = option(False, "accept an --init file that lacks weights of the encoder")
    target_labels: bool = option(False, "train the source stage on the labelled target: an upper bound, not adaptation")
    runs: str = option("runs", "folder that holds the run folders", identity=False)
    tag: str | None = option(None, "suffix of the run folder's name", identity=False)
    seed: int = option(0, "seed of weights, data order and augmentation", low=0)
    device: str = option("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"), identity=False)
    amp: str = option("none", "bf16: run the networks in bfloat16 autocast (losses stay float32)", choices=("none", "bf16"))
    channels_last: bool = option(False, "keep images and weights in channels-last memory format")
    workers: int = option(4, "processes that load images; 0 loads in the main process", low=0, identity=False)
    eval_every: int = option(0, "evaluate every so many iterations for the curves; 0 only at the end of a stage", low=0,
                             identity=False)
    log_every: int = option(50, "iterations between two log lines", low=1, identity=False)
    save_every: int = option(500, "iterations between two checkpoints for resuming", low=1, identity=False)
    stage: str | None = option(None, "run only this stage", identity=False)
    from_: str | None = option(None, "a checkpoint of another run: start after the stage that it finished; or a published "
                                     "one: start after the first stage")
    eval: bool = option(False, "only evaluate: --from CHECKPOINT, or --init FILE, or the run's last stage", identity=False)
    export: str | None = option(None, "also write the evaluated model to this file as a plain state dict, with a JSON file "
                                      "beside it", identity=False)
    toy: bool = option(False, "render the toy city if needed and use the script's small settings")
    command: str = ""


class Run:
    """One run of a script in its own folder.

    Args:
        method: the script's name, the first part of the folder's name.
        cfg, options: what `cli.parse` gave.
        stages: the names of the script's stages, in order.
    Raises: UserError for a changed configuration, an unknown stage, a device that is not there.
    """

    def __init__(self, method: str, cfg, options: Options, stages: tuple[str, ...]):
        self.cfg, self.options, self.method, self.stages = cfg, options, method, stages
        if options.export and Path(options.export).suffix == ".json":
            raise UserError(f"--export {options.export} is the name of the JSON file beside the weights: choose another suffix")
        if options.stage and options.stage not in stages:
            raise UserError(f"--stage {options.stage} is unknown; the stages are {', '.join(stages)}")
        self.device = choose_device(options.device)
        self.rank, self.world = join_processes()
        self.folder = run_folder(method, cfg, options)
        self._asked_to_stop = self._stop = False              # by a signal to this process; all processes agreed to
        self._asked_at = 0.0
        self._watched: tuple | None = None
        self._held = None
        self._losses: list[dict[str, Tensor]] = []
        if self.folder.is_dir() and not options.eval:
            self._lock(clear=True)
        # Only the first process looks what is there: over a network, the others may see it seconds later.
        self._files = set(gather_objects([path.name for path in self.folder.glob("*.pt")])[0])
        self.selected = self._selected_stages()
        if not options.eval:
            self._check_config()

    # ---------------------------------------------------------------- stages

    def stage(self, name: str, iterations: int, state: dict, *datasets, batch_size: int):
        """Yield `(iteration, batch, ...)` for the iterations that this stage still has to do.

        Args:
            name: the stage; decides the random streams and the checkpoint's name.
            iterations: its length, also the horizon of the poly rate.
            state: everything that must survive: modules and optimizers (anything with `state_dict`) and tensors.
            datasets: one `SegmentationDataset` or more; each gives a batch `(image, label, *maps)` on the device.
            batch_size: images a batch, of each dataset.
        A finished stage yields nothing and loads its checkpoint into `state`; a stage that is not selected yields nothing.
        """
        if self.finished(name):
            restore(self._own_checkpoint(name), state)
            if self.begun(name):                                 # killed before it could remove this
                self.forget("last.pt")
            print(f"{name}: finished before, loaded {self.folder / name}.pt", flush=True)
            return
        if name not in self.selected:
            return
        self._write_config()
        self.seed(name)
        self._losses = []
        optimizers = [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group.setdefault("initial_lr", group["lr"])
        start, look = self._resume(name, state)
        if start == 0:
            self._check_nothing_is_stale(name)
        loaders = [data.training_loader(dataset, batch_size, iterations, data.derive_seed(self.options.seed, name, k), start,
                                        self.options.workers, self.device.type == "cuda", self.rank, self.world)
                   for k, dataset in enumerate(datasets)]
        clock = Clock(iterations - start)
        with self._signals():
            if look:
                self._look(name, start)
            for it, batches in zip(range(start, iterations), zip(*loaders, strict=True), strict=False):
                for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                    group["lr"] = poly_rate(group["initial_lr"], it, iterations)
                yield it, *(self._to_device(batch) for batch in batches)
                done = it + 1
                self._agree_to_stop()
                clock.live(f"{name} {done}/{iterations}", done - start)
                if done % self.options.log_every == 0 or done == iterations:
                    self._flush(name, done, iterations, optimizers, clock)
                look = self._watched and self.options.eval_every and done % self.options.eval_every == 0 and done < iterations
                if look and not self._stop:
                    same_buffers(state)
                    look = not self._look(name, done)
                    clock.restart()
                if self._stop or (done % self.options.save_every == 0 and done < iterations):
                    self._flush(name, done, iterations, optimizers, clock)
                    self._save("last", name, done, state, complete=True, look=bool(look))
                if self._stop:
                    self._stop_here()
            self._save(name, name, iterations, state, complete=False)
            self.forget("last.pt")
            self._draw_curves()

    def report(self, **losses: Tensor) -> None:
        """Note this iteration's losses (0-d tensors). They are looked at, and logged, every `--log-every` iterations."""
        self._losses.append({name: loss.detach() for name, loss in losses.items()})

    def watch(self, model: nn.Module, dataset, classes) -> None:
        """With --eval-every, log this model's mIoU on `dataset` during the stages (for the curves; decides nothing)."""
        self._watched = (model, dataset, classes)

    def finished(self, name: str) -> bool:
        """Whether a stage's checkpoint is in the folder."""
        return f"{name}.pt" in self._files

    def trains(self, name: str) -> bool:
        """Whether this start of the script still has iterations of a stage to do."""
        return name in self.selected and not self.finished(name)

    def begun(self, name: str) -> bool:
        """Whether there is a checkpoint for resuming inside this stage."""
        return "last.pt" in self._files and self._own_checkpoint("last")["stage"] == name

    def reaches(self, name: str) -> bool:
        """Whether a stage is finished or gets finished by this start of the script."""
        return name in self.selected or self.finished(name)

    def prepare(self, name: str) -> None:
        """Before what a script computes for a stage that it has not begun: refuse what is stale, forget an earlier attempt."""
        self._check_nothing_is_stale(name)
        self._write_config()                                     # what is computed belongs to these settings
        self._cut_log(name, -1)

    def once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What an earlier start kept under this name in the run's folder, else `compute()`, which is kept: tensors by name,
        on the CPU."""
        if name not in self._files:
            self.keep(name, compute())
        return self.read(name)

    def keep(self, name: str, content) -> None:
        """Write tensors to a file of the run's folder, which every process may read afterwards."""
        if self.rank == 0:
            write_atomically(self.folder / name, lambda file: torch.save(content, file))
        wait_for_processes()
        self._files.add(name)

    def read(self, name: str):
        """What `keep` wrote, on the CPU. Raises: UserError if it is damaged."""
        try:
            return data.load_tensors(self.folder / name)
        except Exception as error:
            refuse_unreadable(self.folder / name, error)
            raise UserError(f"{self.folder / name} is damaged ({type(error).__name__}): delete it, and the run's last.pt if "
                            "there is one, to compute it again") from error

    def forget(self, *names: str) -> None:
        """Remove these files of the run's folder, where they are there."""
        for name in names * (self.rank == 0):
            (self.folder / name).unlink(missing_ok=True)
        wait_for_processes()
        self._files -= set(names)

    def draw(self, name: str, rows: list, titles: list[str], **how) -> None:
        """Write a contact sheet into the run's folder and say so."""
        if self.rank == 0:
            viz.contact_sheet(self.folder / name, rows, titles, **how)
            print(f"pictures: {self.folder / name}", flush=True)

    def sweep(self, what: str, dataset, shared: bool = False):
        """Yield `(image, label, names, *maps)` once for each image of a dataset, one at a time, on the device.

        With `shared`, each of several processes gets its part; `sum_over_processes` brings together what they counted.
        After the last image all processes have done theirs, and written what they write of each.
        """
        rank, world = (self.rank, self.world) if shared else (0, 1)
        loader = data.sweep_loader(dataset, self.options.workers, self.device.type == "cuda", rank, world)
        clock = Clock(len(loader))
        with self._signals():
            for k, (image, label, names, *maps) in enumerate(loader):
                yield self._image(image), label.to(self.device), names, *(m.to(self.device) for m in maps)
                if self._asked_to_stop:
                    self._stop_here()
                clock.live(f"{what}: image {k + 1} of {len(loader)}", k + 1)
        clock.print()
        wait_for_processes()

    # --------------------------------------------------- several processes (torchrun)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module to call in a stage: torch's DistributedDataParallel, which averages gradients over the processes; the
        module itself where there is one process."""
        if self.world == 1:
            return module
        with warnings.catch_warnings():                          # its replacement is not in every torch that is supported
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    def share(self, counts: Tensor) -> Tensor | float:
        """What a mean over this process's pixels is multiplied by, so that the average over the processes is the mean over the
        pixels of all: (its pixels) * (processes) / (all pixels). Args: counts: bool mask of the pixels in the mean."""
        if self.world == 1:
            return 1.0
        own = counts.sum()
        every = own.clone()
        sum_over_processes(every)
        return own * self.world / every.clamp(min=1)

    def gathered(self, x: Tensor) -> Tensor:
        """(N, ..) of this process -> (world N, ..) of all, in the order of one process's batch; without a gradient."""
        x = x.detach().contiguous()
        if self.world == 1:
            return x
        every = [torch.empty_like(x) for _ in range(self.world)]
        distributed.all_gather(every, x)
        return torch.cat(every)

    def item_seeds(self, count: int, *names) -> list[int]:
        """Seeds of the images of this process's batch, from (--seed, names, position in the batch of all processes)."""
        return [data.derive_seed(self.options.seed, *names, self.rank * count + n) for n in range(count)]

    # ------------------------------------------------- images, models, precision, seeds

    def images(self, domain: str, split: str, classes: data.ClassList, sizes: dict, labels: bool = True,
               augment: data.Augment = data.Augment(), alter=None) -> data.SegmentationDataset:  # noqa: B008 (frozen)
        """A domain's images with --data, --city and, for the source, --source-images; raises DataError for a wrong layout.

        Args: sizes: domain -> Size, or None for the images' own; the others as `data.find_pairs` and `SegmentationDataset`.
        """
        translated = self.options.source_images if domain == self.cfg.source else None
        pairs = data.find_pairs(self.options.data, domain, split, city=self.cfg.city, labels=labels, images=translated)
        return data.SegmentationDataset(pairs, domain, classes, sizes[domain], augment, alter=alter)

    def network(self, kind: str, classes: data.ClassList) -> nn.Module:
        """DeepLab "v2" or "v3+" with --backbone, --init and --freeze-bn on the device; the same initial weights each time."""
        self.seed("model")
        init = "none" if self.options.eval and self.options.from_ else self.options.init
        return self.place(build_model(kind, self.cfg.backbone, len(classes), init, self.cfg.freeze_bn,
                                      self.options.partial_init, self.options.branches, self.options.input))

    @property
    def float64_device(self) -> torch.device:
        """The device, or the CPU where it is Apple's, which has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def seed(self, *names) -> None:
        """Seed every random state from (--seed, names): what follows does not depend on what ran before."""
        value = data.derive_seed(self.options.seed, *names)
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the run's device and memory format."""
        return module.to(self.device, memory_format=self._layout())

    def autocast(self):
        """The context for forward passes: bfloat16 with --amp bf16, nothing otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    def start_from(self, model: nn.Module) -> None:
        """Load the model of `--from CHECKPOINT`, if given, into `model`: of this project, or one that others published."""
        path = self.options.from_
        if not path:
            return
        checkpoint = self._read_from()
        if "state" in checkpoint:
            restore_model(checkpoint, model)
        else:
            load_weights(model, path, branches=self.options.branches, input=self.options.input, flag="--from")
            if not model.filled:
                raise UserError(f"--from {path} has no head, so no stage can start from it; give it to --init")

    def load_latest(self, model: nn.Module) -> str:
        """For --eval: load --from's model, else keep an --init file that has a head, else the run's last stage (--stage).

        Returns: the name under which to report. Raises: UserError if there is nothing to evaluate.
        """
        if self.options.from_:
            self.start_from(model)
            return Path(self.options.from_).stem
        if model.filled:                                     # an --init file with a head: a trained network of its own
            return Path(self.options.init).stem
        done = [name for name in self.selected if self.finished(name)]
        if not done:
            raise UserError(f"there is nothing to evaluate in {self.folder}; train first, or give --from CHECKPOINT or "
                            "an --init file with a head")
        restore_model(self._own_checkpoint(done[-1]), model)
        return done[-1]

    # ------------------------------------------------------------------ results

    def evaluate(self, name: str, model: nn.Module, dataset, classes, tests: dict[str, dict]) -> None:
        """Evaluate a finished stage once, keep the result in results.json, write a picture, print the run's table so far.

        Args:
            name: the stage.
            dataset: labelled target images.
            tests: name of each test mode -> keyword arguments of `metrics.predict` (scales, flip).
        """
        if not (self.finished(name) or self.options.eval):
            return
        if self.options.export and self.rank == 0:                   # a later stage's model replaces it
            self._export(model, classes)
        results = self.results()
        if gather_objects(name not in results)[0]:
            results[name] = {}
            for test, how in tests.items():
                with self.autocast():
                    images = self.sweep(f"{name}, {test}", dataset, shared=True)
                    matrix = metrics.evaluate(model, images, len(classes), self.device, **how)
                sum_over_processes(matrix)
                results[name][test] = summary(matrix, classes)
            if not self.options.eval and self.rank == 0:
                self._write_pictures(name, model, dataset, classes)
                last = max((line["iteration"] for line in self._log_lines() if line["stage"] == name), default=0)
                self._rewrite_log(lambda line: "miou" not in line or (line["stage"], line["iteration"]) != (name, last))
                self.log(stage=name, iteration=last, miou=percent(next(iter(results[name].values()))))
                self._draw_curves()
                write_json(self.folder / "results.json", results)    # last: with it, all of this counts as done
            wait_for_processes()
        columns = {f"{stage}" if test == "single-scale" else f"{stage}, {test}": torch.tensor(result["matrix"])
                   for stage, modes in results.items() for test, result in modes.items()}
        print(f"\nIoU in percent{', trained with target labels: an upper bound' * self.options.target_labels}")
        print(metrics.score_table(columns, classes), end="\n\n", flush=True)

    def results(self) -> dict:
        """What results.json holds: stage -> test mode -> `summary`."""
        path = self.folder / "results.json"
        results = read_json(path) if path.exists() and not self.options.eval else {}
        try:
            matrices = [torch.tensor(test["matrix"]) for tests in results.values() for test in tests.values()]
            if any(matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] for matrix in matrices):
                raise ValueError("shape")
        except Exception as error:
            raise UserError(f"{path} is damaged: delete it to evaluate again") from error
        return results

    def log(self, **record) -> None:
        """Append one line to log.jsonl."""
        if self.rank:
            return
        try:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.folder / 'log.jsonl'}: {error.strerror}; make room, then start again to "
                            "resume") from error

    # ---------------------------------------------------------------- mechanics

    def _selected_stages(self) -> tuple[str, ...]:
        first = 0
        if self.options.from_:
            checkpoint = self._read_from()
            if "random" in checkpoint and not self.options.eval:
                raise UserError(f"--from {self.options.from_} is from inside the stage {checkpoint['stage']!r}; start that run "
                                "again to finish it")
            method = checkpoint.get("method", self.method)
            if method == self.method and checkpoint["stage"] in self.stages:
                first = self.stages.index(checkpoint["stage"]) + 1
            elif not self.options.stage and not self.options.eval:
                raise UserError(f"--from {self.options.from_} finished the stage {checkpoint['stage']!r} of {method}.py, which "
                                f"this run does not have ({', '.join(self.stages)}); --stage says which stage starts from it")
            if first == len(self.stages) and not self.options.stage and not self.options.eval:
                raise UserError(f"no stage follows --from {self.options.from_}, which finished {checkpoint['stage']!r}; "
                                "add --eval to evaluate it, or --stage to run a stage from it")
        if self.options.stage is None:
            return self.stages[first:]
        before = self.stages[: self.stages.index(self.options.stage)]
        if before and not self.options.from_ and not self.options.eval and not self.finished(before[-1]):
            raise UserError(f"--stage {self.options.stage} needs {self.folder / before[-1]}.pt, which does not exist: "
                            f"run --stage {before[-1]} first or give --from CHECKPOINT")
        return (self.options.stage,)

    def _read_from(self) -> dict:
        """The checkpoint in --from. One that others published counts as a model that finished the first stage."""
        path = Path(self.options.from_)
        if not path.exists():
            raise UserError(f"there is no checkpoint {path}")
        content = read_file(path, "--from")
        if is_checkpoint(content):
            return content
        if not recognise(content, f"--from {path}", path, self.options.branches).family:
            raise UserError(f"--from {path} is neither a checkpoint of this project nor a trained network of a family that is "
                            "known here; initial weights load by --init")
        return {"stage": self.stages[0]}

    def _export(self, model: nn.Module, classes) -> None:
        path = Path(self.options.export)
        state, about = export(path, model, classes.names)
        write_atomically(path, lambda file: torch.save(state, file))
        write_json(side_file(path), about)
        print(f"export: {path}, {side_file(path)}", flush=True)

    def _check_config(self) -> None:
        """Refuse to continue a run with other settings; a folder in which nothing was trained yet is free."""
        path = self.folder / "config.json"
        if path.exists() and self._files:
            old, new = read_json(path), self._config()
            changed = [f"{flag(key)} ({old.get(key)} -> {new.get(key)})"
                       for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            if changed:
                raise UserError(f"{self.folder} holds a run with other settings: {', '.join(changed)}; "
                                "give this one another --tag, or delete the folder")

    def _check_nothing_is_stale(self, name: str) -> None:
        """A stage that starts anew must not meet what an earlier training of it led to."""
        later = self.stages[self.stages.index(name):]
        left = [f"{stage}.pt" for stage in later if self.finished(stage)]
        left += [f"{stage!r} in results.json" for stage in later if stage in self.results()]
        if left:
            raise UserError(f"{self.folder} has no {name}.pt, but what came after it ({', '.join(left)}): "
                            "delete the folder, or give this run another --tag")

    def _config(self) -> dict:
        processes = {"processes": self.world} if self.world > 1 else {}
        return {"method": self.method, **to_json(self.cfg, identity_only=True), **to_json(self.options, identity_only=True),
                **processes}

    def _lock(self, clear: bool = False) -> None:
        """Keep other starts out of the folder for as long as this process lives, however it ends. With `clear`, before any
        process writes, remove the half-written files that a kill has left."""
        if self.rank or self._held or fcntl is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = open(self.folder / ".lock", "a")                    # noqa: SIM115 (for the rest of the process)
        except OSError as error:
            raise UserError(f"cannot write into {self.folder}: {error.strerror}; choose another folder by --runs") from error
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.folder} is in use by another start of the script: wait until it ends, or give this one "
                            "another --tag") from error
        except OSError:                                                      # a file system without locks
            return
        for half in self.folder.rglob(".*.tmp") if clear else ():
            half.unlink(missing_ok=True)

    def _write_config(self) -> None:
        if self.rank == 0:
            self._lock()
            path = self.folder / "config.json"
            if not path.exists() or read_json(path) != self._config():
                write_json(path, self._config())

    def _agree_to_stop(self) -> None:
        """If one process was asked to stop, all stop after the same iteration."""
        asked = torch.tensor(int(self._asked_to_stop))
        sum_over_processes(asked)
        self._stop = bool(asked)

    def _to_device(self, batch: list) -> tuple:
        image, label, _, *maps = batch
        return self._image(image), label.to(self.device, non_blocking=True), *(
            m.to(self.device, non_blocking=True) for m in maps)

    def _image(self, image: Tensor) -> Tensor:
        return image.to(self.device, non_blocking=True, memory_format=self._layout())

    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.options.channels_last else torch.preserve_format

    def _flush(self, stage: str, done: int, iterations: int, optimizers: list, clock: Clock) -> None:
        """Look at the losses since the last flush: stop on one that is not finite, log and show their means."""
        if not self._losses:
            return
        names = list(self._losses[0])
        values = torch.stack([torch.stack([losses[name].float() for name in names]) for losses in self._losses]).cpu()
        sum_over_processes(values)
        values /= self.world
        first = done - len(self._losses) + 1
        self._losses = []
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            kept = self.folder / "last.pt"
            raise UserError(f"loss {names[column]!r} became {values[row, column].item()} at iteration {first + row} of stage "
                            f"{stage!r}; {f'{kept} from before it is kept' if self.begun(stage) else 'nothing was saved yet'}; "
                            "the same settings will probably meet it again: try a lower --lr or --amp none under a new --tag")
        means = {name: round(value, 6) for name, value in zip(names, values.double().mean(dim=0).tolist(), strict=True)}
        rate = optimizers[0].param_groups[0]["lr"] if optimizers else 0.0
        seconds = clock.per_iteration(done - first + 1)
        self.log(stage=stage, iteration=done, rate=rate, seconds=round(seconds, 4), **means)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        clock.print(f"{stage} {done}/{iterations}  {losses}  rate {rate:.2e}  {seconds:.2f} s/it  "
                    f"{minutes(seconds * (iterations - done))} left")

    def _look(self, stage: str, done: int) -> bool:
        """Log the mIoU of the model that is watched. Returns: False if it was asked to stop meanwhile."""
        model, dataset, classes = self._watched
        loader = data.sweep_loader(dataset, self.options.workers, self.device.type == "cuda", self.rank, self.world)
        with self.autocast():
            images = itertools.takewhile(lambda _: not self._asked_to_stop, loader)
            matrix = metrics.evaluate(model, images, len(classes), self.device)
        sum_over_processes(matrix)
        self._agree_to_stop()
        if self._stop:                                       # half a sweep is no result
            return False
        means = percent(summary(matrix, classes))
        self.log(stage=stage, iteration=done, miou=means)
        print(f"{stage} {done}: " + "  ".join(f"{name} {value}" for name, value in means.items()), flush=True)
        return True

    def _save(self, file: str, stage: str, iteration: int, state: dict, complete: bool, look: bool = False) -> None:
        """Write a checkpoint; one for resuming (`complete`) also holds optimizers and random states, and whether a look at
        the mIoU is still to be had."""
        same_buffers(state)
        kept = {key: value for key, value in state.items() if complete or not isinstance(value, torch.optim.Optimizer)}
        checkpoint = {"method": self.method, "stage": stage, "iteration": iteration, "config": to_json(self.cfg),
                      "options": to_json(self.options),
                      "structure": {key: asdict(value.structure) for key, value in kept.items() if isinstance(value, DeepLab)},
                      "state": {key: value.state_dict() if hasattr(value, "state_dict") else value
                                for key, value in kept.items()}}
        for key, value in checkpoint["state"].items():
            tensors = value.values() if isinstance(value, dict) else [value]
            if not all(x.isfinite().all() for x in tensors if isinstance(x, Tensor) and x.is_floating_point()):
                raise UserError(f"{key!r} holds values that are not finite after iteration {iteration} of stage {stage!r}; "
                                "no checkpoint was written: try a lower --lr or --amp none under a new --tag")
        if complete:
            checkpoint |= {"random": random_states(self.device), "look": look}
        self.keep(f"{file}.pt", checkpoint)

    def _own_checkpoint(self, name: str) -> dict:
        """The checkpoint of this name in the run's folder; one of another script is refused."""
        path = self.folder / f"{name}.pt"
        checkpoint = read_checkpoint(path)
        if (method := checkpoint.get("method")) != self.method:
            raise UserError(f"{path} does not fit: it is of {method}.py; put back this run's own, or delete the folder")
        return checkpoint

    def _resume(self, stage: str, state: dict) -> tuple[int, bool]:
        start, look = 0, False
        if self.begun(stage):
            checkpoint = self._own_checkpoint("last")
            restore(checkpoint, state)
            set_random_states(checkpoint["random"], self.device)
            start, look = checkpoint["iteration"], bool(self._watched and checkpoint.get("look"))
            print(f"{stage}: resuming at iteration {start}", flush=True)
        self._cut_log(stage, start)                          # later lines are from after the last checkpoint
        return start, look

    def _cut_log(self, stage: str, last: int) -> None:
        self._rewrite_log(lambda line: line["stage"] != stage or line["iteration"] <= last)

    def _rewrite_log(self, stays: Callable[[dict], bool]) -> None:
        if self.rank:
            return
        kept = [line for line in self._log_lines() if stays(line)]
        text = "".join(json.dumps(line) + "\n" for line in kept).encode()
        log = self.folder / "log.jsonl"
        if not log.exists() or log.read_bytes() != text:
            write_atomically(log, lambda file: file.write(text))

    def _log_lines(self) -> list[dict]:
        log = self.folder / "log.jsonl"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        return [record for record in map(log_record, lines) if record]

    @contextlib.contextmanager
    def _signals(self):
        """Turn SIGINT or SIGTERM into a clean stop after the iteration under way. The same signal often comes twice, from a
        scheduler and from torchrun; one that comes seconds later is not held up."""
        def ask_to_stop(number, frame):
            if self._asked_to_stop and time.monotonic() - self._asked_at > 2:
                signal.signal(number, previous[number])
                os.kill(os.getpid(), number)
            elif not self._asked_to_stop:
                self._asked_to_stop, self._asked_at = True, time.monotonic()

        previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.getsignal(number)
                signal.signal(number, ask_to_stop)
        except ValueError:                                   # not the main thread: signals are somebody else's
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_here(self) -> None:
        again = self.options.command if self.world == 1 else f"the same torchrun command, with {self.world} processes"
        print(f"\nstopped; resume with: {again}", flush=True)
        raise SystemExit(0)

    def _write_pictures(self, name: str, model: nn.Module, dataset, classes, count: int = 4) -> None:
        rows, training = [], model.training
        model.eval()
        for k in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
            image, label, *_ = dataset[k]
            with torch.inference_mode(), self.autocast():
                prediction = metrics.predict(model, self._image(image[None]), tuple(image.shape[-2:]))[0].cpu()
            small = torch.nn.functional.interpolate(label[None, None].float(), image.shape[-2:])[0, 0].long()
            photo = viz.denormalise(image)
            rows.append([photo, viz.overlay(photo, prediction, classes), viz.colorize(prediction, classes),
                         viz.colorize(small, classes)])
        model.train(training)
        self.draw(f"{name}.png", rows, ["image", "overlay", f"prediction ({name})", "label"])

    def _draw_curves(self) -> None:
        if self.rank:
            return
        lines = self._log_lines()
        series: dict[str, list] = {}
        for line in lines:
            for name, value in line.get("miou", {}).items():
                series.setdefault(f"{line['stage']}: {name}", []).append((line["iteration"], value))
        if series:
            viz.curves(self.folder / "miou.png", series, f"{self.folder.name}: mIoU on the target", ylabel="%")
        for stage in {line["stage"] for line in lines if "rate" in line}:
            points = [line for line in lines if line["stage"] == stage and "rate" in line]
            names = [key for key in points[0] if key not in ("stage", "iteration", "rate", "seconds")]
            series = {name: [(line["iteration"], line[name]) for line in points if name in line] for name in names}
            values = [line[name] for line in points for name in names if line.get(name, 0) > 0]
            viz.curves(self.folder / f"{stage}-losses.png", series, f"{self.folder.name}: {stage}", ylabel="loss",
                       log=bool(values) and max(values) > 20 * min(values))


def run_folder(method: str, cfg, options: Options) -> Path:
    """<runs>/<method>-<source>[-<city>][-<tag>]"""
    parts = [method, cfg.source, cfg.city.lower() if getattr(cfg, "target", "") == "crosscity" else "",
             options.tag or ("toy" if options.toy else "")]
    return Path(options.runs, "-".join(filter(None, parts)))


def check_domains(cfg, options: Options, first_stage: str, sizes: list, largest_scale: float = 1.0) -> None:
    """Refuse domains, an upper bound and a crop that cannot be meant.

    Args: first_stage: the one that --target-labels is for; sizes: of the source's and target's images, None for their own;
        largest_scale: of the random resize.
    """
    if cfg.source == cfg.target:
        raise UserError(f"--source and --target are both {cfg.source}; add --target crosscity --city {cfg.city}")
    if cfg.target == "crosscity" and options.target_labels:
        raise UserError("Cross-City's training images have no labels: --target-labels is for --target cityscapes")
    if options.target_labels and options.stage != first_stage:
        raise UserError(f"--target-labels trains an upper bound, nothing is adapted from it: add --stage {first_stage}")
    for width, height in filter(None, sizes):
        largest = Size(round(largest_scale * width), round(largest_scale * height))
        if cfg.crop and not options.eval and (cfg.crop.width > largest.width or cfg.crop.height > largest.height):
            scaled = "" if largest_scale == 1 else f", at most {largest} after --scale"
            raise UserError(f"--crop {cfg.crop} is larger than the images ({Size(width, height)}{scaled}); choose a smaller "
                            "crop or larger images")


class Clock:
    """Time left: on a live line where standard output is a terminal, in the printed lines everywhere."""

    def __init__(self, total: int):
        self.total, self.begin, self.last, self.shown = total, time.monotonic(), time.monotonic(), 0.0
        self.live_line = sys.stdout.isatty()

    def restart(self) -> None:
        """Leave out of the next mean what happened since the last one."""
        self.last = time.monotonic()

    def per_iteration(self, count: int) -> float:
        """Mean seconds of the last `count` iterations."""
        self.last, before = time.monotonic(), self.last
        return (self.last - before) / count

    def live(self, text: str, done: int) -> None:
        """Show `text` and the time left, at most twice a second."""
        now = time.monotonic()
        if self.live_line and now - self.shown > 0.5:
            self.shown = now
            print(f"\r{text}  {minutes((now - self.begin) / done * (self.total - done))} left\x1b[K", end="", flush=True)

    def print(self, text: str = "") -> None:
        """Print a line for good, in place of the live one."""
        if self.live_line:
            print("\r\x1b[K", end="")
        print(text, end="\n" if text else "", flush=True)


def minutes(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def join_processes() -> tuple[int, int]:
    """Under torchrun, join the other processes of the run. Returns: this one's rank, and how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if distributed.get_rank():
            sys.stdout = open(os.devnull, "w")                   # noqa: SIM115 (for the rest of the process): one speaks for all
    return (distributed.get_rank(), distributed.get_world_size()) if several_processes() else (0, 1)


def several_processes() -> bool:
    """Whether this process is one of several that torch.distributed has brought together."""
    return distributed.is_available() and distributed.is_initialized()


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place; nothing is done where there is one process."""
    if several_processes():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def gather_objects(own) -> list:
    """What each process has, in the order of the processes; [own] where there is one."""
    every = [own] * (distributed.get_world_size() if several_processes() else 1)
    if several_processes():
        distributed.all_gather_object(every, own)
    return every


def wait_for_processes() -> None:
    """Come back when all processes of the run have come here."""
    sum_over_processes(torch.zeros(1))


def same_buffers(state: dict) -> None:
    """Give every process the first one's buffers (batch norm that is not frozen sees other images in each)."""
    if several_processes():
        for module in (value for value in state.values() if isinstance(value, nn.Module)):
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)


def poly_rate(initial: float, iteration: int, iterations: int, power: float = 0.9) -> float:
    """The learning rate at an iteration: initial * (1 - iteration / iterations)^power."""
    return initial * (1 - iteration / iterations) ** power


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise UserError(f"--device {name} is not available on this machine; use --device auto or --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def summary(matrix: Tensor, classes) -> dict:
    """A confusion matrix as the entry of results.json: means, per-class IoU (None where a class has none), the matrix."""
    iou = metrics.iou(matrix).tolist()
    means = {name: metrics.mean_iou(matrix, indices) for name, indices in classes.means.items()}
    present = {f"{name} present": metrics.mean_iou_present(matrix, indices) for name, indices in classes.means.items()}
    return {**means, **present, "iou": {name: None if math.isnan(value) else value
                                        for name, value in zip(classes.names, iou, strict=True)}, "matrix": matrix.tolist()}


def percent(result: dict) -> dict[str, float]:
    """The means of a `summary`, in percent."""
    return {name: round(100 * value, 2) for name, value in result.items() if isinstance(value, float)}


# ------------------------------------------------------------------- checkpoints


def random_states(device: torch.device) -> dict:
    """The states of Python's, NumPy's and torch's generators (the last also on a cuda device), as plain values."""
    version, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (version, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_states(states: dict, device: torch.device) -> None:
    """Put back what `random_states` returned."""
    random.setstate(states["python"])
    version, keys, *rest = states["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def read_json(path: Path) -> dict:
    """Read a JSON file that holds a dictionary. Raises UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        raise ValueError("no dictionary")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read or is damaged; put it right, or delete the folder to start again") from error


def log_record(line: str) -> dict | None:
    """A line of log.jsonl; None for one that a kill has cut or a disk has damaged."""
    try:
        record = json.loads(line)
        numbers = [record["iteration"], *record.get("miou", {}).values()]
        numbers += [value for key, value in record.items() if key != "stage"] if "rate" in record else []
        return record if isinstance(record["stage"], str) and all(isinstance(n, int | float) for n in numbers) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def refuse_unreadable(path: Path, error: Exception) -> None:
    """Raise UserError if it is the machine that fails to read a file, which may well be whole."""
    full = isinstance(error, MemoryError) or "allocate memory" in str(error)
    if full or getattr(error, "errno", None) in (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.EMFILE):
        raise UserError(f"{path} cannot be read now ({'out of memory' if full else error.strerror}); it may be whole, so keep "
                        "it, put the cause right and start again") from error


def read_checkpoint(path: Path) -> dict:
    """Read one of this project's checkpoints without running code from it. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        checkpoint = data.load_tensors(path)
    except Exception as error:
        refuse_unreadable(path, error)
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); "
                        "delete it to start again from what came before") from error
    if not is_checkpoint(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project; weights of other projects load by --init")
    return checkpoint


def is_checkpoint(content) -> bool:
    """Whether the content of a file is one of this project's checkpoints."""
    return isinstance(content, dict) and isinstance(content.get("state"), dict) and "stage" in content


def restore(checkpoint: dict, state: dict) -> None:
    """Give the networks in `state` the checkpoint's structures, then load its entries into the objects of the same names."""
    for key, value in state.items():
        if isinstance(value, DeepLab):
            value.configure(Structure.read(checkpoint.get("structure", {}).get(key), f"the checkpoint's {key!r}"))
    load_state(checkpoint["state"], state)


def restore_model(checkpoint: dict, model: nn.Module) -> None:
    """Load the network of a checkpoint alone."""
    restore({**checkpoint, "state": {"model": checkpoint["state"]["model"]}}, {"model": model})


def load_state(saved: dict, state: dict) -> None:
    """Load a checkpoint's entries into the objects of the same names (optimizers may be absent from the checkpoint)."""
    needed = {key for key, value in state.items() if not isinstance(value, torch.optim.Optimizer)}
    if not needed <= saved.keys() <= state.keys():
        raise UserError(f"the checkpoint holds {', '.join(sorted(saved))} where {', '.join(sorted(state))} are needed; "
                        "it comes from another method or version")
    for key, value in saved.items():
        if hasattr(state[key], "load_state_dict"):
            try:
                state[key].load_state_dict(value)
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(f"the checkpoint's {key!r} does not fit this run's: {str(error).splitlines()[-1].strip()}; "
                                "check --backbone, --source and --target") from error
        else:
            state[key].copy_(value)
