"""How often the CPU waits for a GPU in an iteration of each training stage, counted without a GPU.

`Gpu` stands for a device. Its tensors hold their values on the CPU, and it records each operation that would make the CPU wait.
On a real GPU, torch.cuda.set_sync_debug_mode counts the same operations."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

import bismap
import c2f
import cag
import fada
import sim
from common.data import class_list
from common.deeplab import build_model
from common.metrics import evaluate
from common.run import Run

DEVICE = torch.device("meta")                                    # its backward pass needs no driver
SIZED_BY_VALUES = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"}


class OnGpu(torch.Tensor):
    """A tensor that reports the GPU as its device; `host` holds its values."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        x = torch.Tensor._make_wrapper_subclass(cls, host.shape, strides=host.stride(), dtype=host.dtype, device=DEVICE)
        x.host = host
        return x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the mode")


class FromNumbers(TorchFunctionMode):
    """Builds a tensor from Python numbers on the CPU and then copies it, as CUDA does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None) or "cpu"
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class Gpu(TorchDispatchMode):
    """waits: the operations that would make the CPU wait."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._overloadpacket.__name__
        here = there = any(isinstance(x, OnGpu) for x in tree_iter((args, kwargs)))
        if (device := kwargs.get("device")) is not None:
            there, kwargs["device"] = torch.device(device) == DEVICE, torch.device("cpu")
        if waits(name, args, kwargs, here, there):
            self.waits.append(name)
        host_args, host_kwargs = tree_map_only(OnGpu, lambda x: x.host, (args, kwargs))
        out = func(*host_args, **host_kwargs)
        if name.endswith("_") and out is host_args[0]:           # in place
            return args[0]
        return tree_map_only(torch.Tensor, OnGpu, out) if there else out


def waits(name: str, args: tuple, kwargs: dict, here: bool, there: bool) -> bool:
    """Whether an operation makes the CPU wait. here: its tensors are on the GPU; there: its result is."""
    if name in ("_to_copy", "copy_"):
        to_gpu, from_gpu = (isinstance(args[0], OnGpu), isinstance(args[1], OnGpu)) if name == "copy_" else (there, here)
        asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)                      # pinned or staged
        return to_gpu != from_gpu and (from_gpu or not asynchronous)
    if name in ("index", "index_put_") and here:
        indices = [x for x in args[1] if x is not None]
        as_fill = name == "index_put_" and args[2].numel() == 1
        return any(not isinstance(x, OnGpu) or (x.dtype == torch.bool and not as_fill) for x in indices)
    return here and (name in SIZED_BY_VALUES or name == "_local_scalar_dense")


class TwoIterations:
    """A Run on `gpu` that gives a stage the same batches twice. waits: those of the second iteration."""

    device, rank, classes, options = DEVICE, 0, class_list("gta5"), SimpleNamespace(seed=0)
    item_seeds, autocast = Run.item_seeds, staticmethod(contextlib.nullcontext)

    def __init__(self, gpu: Gpu, *batches):
        self.gpu, self.batches = gpu, [[x.to(DEVICE) for x in batch] for batch in batches]

    def stage(self, name, iterations, state, *datasets, batch_size, note=None):
        for it in range(2):
            self.gpu.waits.clear()
            yield it, *self.batches
        self.waits = list(self.gpu.waits)

    def place(self, x):
        return x.to(self.device, non_blocking=True)

    def seed(self, *names):
        torch.manual_seed(0)

    def report(self, **losses):
        pass


def network(kind: str = "v3+") -> torch.nn.Module:
    return build_model(kind, "resnet18", 19, "none", "all").to(DEVICE)


def batch(maps: int) -> list[torch.Tensor]:
    """Two images of 64x64, and `maps` labels or maps of 16 squares each."""
    squares = [torch.randint(0, 19, (2, 4, 4)) for _ in range(maps)]
    return [torch.randn(2, 3, 64, 64), *(x.repeat_interleave(16, 1).repeat_interleave(16, 2) for x in squares)]


def banks(run: TwoIterations) -> tuple[sim.FeatureBank, sim.FeatureBank]:
    return sim.make_banks(run, sim.Config(), 512)


def centers() -> torch.Tensor:
    return c2f.category_centers(torch.randn(19, 256), torch.ones(19)).to(DEVICE)


STAGES = {                                             # stage, number of labels and maps per batch, most waits
    "fada source": (lambda run: fada.train(run, fada.Config(), "source", 2, network("v2"), None), [1], 0),
    "fada adversarial": (lambda run: fada.adversarial(run, fada.Config(), network("v2"), None, None), [1, 1], 0),
    "cag source": (lambda run: cag.train_source(run, cag.Config(), network("v3+"), None, 2), [1], 0),
    "cag warmup": (lambda run: cag.warm_up(run, cag.Config(), network("v3+"), None, None, 2), [1, 1], 0),
    "cag stage1": (lambda run: cag.train_stage(run, cag.Config(), 1, network("v3+"), torch.randn(19, 256).to(DEVICE), None,
                                               None, 2), [1, 3], 0),
    "c2f step0": (lambda run: c2f.train_step0(run, c2f.Config(), network("v3+"), None, 2), [1], 0),
    "c2f step1": (lambda run: c2f.train_step(run, c2f.Config(), 1, network("v3+"), centers(), None, None), [1, 2], 0),
    "sim step1": (lambda run: sim.train_step(run, sim.Config(), 1, network("v2"), *banks(run), None, None), [1, 1], 2),
    "sim step2": (lambda run: sim.train_step(run, sim.Config(), 2, network("v2"), *banks(run), None, None), [1, 2], 2),
    "bismap warmup": (lambda run: bismap.warm_up(run, bismap.Config(), network("v3+"), None, 2), [1], 0),
    "bismap selftrain": (lambda run: bismap.self_train(run, bismap.Config(), network("v3+"), None, None), [2, 2], 0),
    "bismap distill": (lambda run: bismap.distill(run, bismap.Config(), "distill1", network("v3+"), network("v3+"), None, None),
                       [2, 2], 0),
}


@pytest.fixture()
def gpu():
    torch.manual_seed(0)
    with FromNumbers(), Gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("name", STAGES)
def test_an_iteration_does_not_wait_for_the_gpu(gpu, name):
    stage, maps, most = STAGES[name]
    run = TwoIterations(gpu, *map(batch, maps))
    stage(run)
    assert len(run.waits) <= most, run.waits


def test_evaluation_waits_once_per_image(gpu):
    images = [[x.to(DEVICE) for x in batch(1)] for _ in range(3)]
    model = network("v3+")
    gpu.waits.clear()
    evaluate(model, images, 19, DEVICE)
    assert gpu.waits == ["_to_copy"] * 3


@pytest.mark.parametrize(("count", "operation"), [
    (1, lambda x: x.sum().item()), (1, lambda x: x.cpu()), (1, lambda x: bool((x > 0).any())), (1, lambda x: x[x > 0]),
    (1, lambda x: x.new_tensor([1.0, 2.0])), (1, lambda x: torch.ones(2).to(DEVICE)), (1, lambda x: x[torch.tensor([0, 1])]),
    (1, lambda x: x.copy_(torch.ones(4))), (1, lambda x: x.unique()), (0, lambda x: x[x.argsort()]),
    (0, lambda x: torch.ones(2).to(DEVICE, non_blocking=True)), (0, lambda x: torch.zeros(3, device=DEVICE)),
    (0, lambda x: torch.where(x > 0, x, 1).masked_fill(x > 0, 0).sum())])
def test_what_counts_as_waiting(gpu, count, operation):
    x = torch.arange(4.0).to(DEVICE)
    gpu.waits.clear()
    operation(x)
    assert len(gpu.waits) == count
