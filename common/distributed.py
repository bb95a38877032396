"""The device, and communication between the processes of torchrun; a single process communicates with none."""

from __future__ import annotations

import atexit
import os
import sys
import warnings

import torch
from torch import Tensor, distributed, nn

from common.files import UserError


def join() -> tuple[int, int]:
    """Under torchrun, join the other processes of the run. Returns: the rank of this process, and the number of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(distributed.destroy_process_group)       # without it, gloo's threads can abort the ending process
        if distributed.get_rank():
            sys.stdout = open(os.devnull, "w")                   # only the first process prints
    return (distributed.get_rank() if world_size() > 1 else 0), world_size()


def world_size() -> int:
    """The number of processes of the run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. Raises UserError if the device is unavailable."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in available if available[device]) if name == "auto" else name
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine; use --device auto or --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device(name)


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, in place."""
    for tensor in tensors * (world_size() > 1):
        distributed.all_reduce(tensor)


def gather_objects(own) -> list:
    """The `own` of every process, in the order of their ranks."""
    objects = [own] * world_size()
    if len(objects) > 1:
        distributed.all_gather_object(objects, own)
    return objects


def gather(x: Tensor) -> Tensor:
    """(N, ..) of this process -> (world * N, ..) of all, in the order that a single process's batch has; without a gradient."""
    parts = [x.detach().contiguous().clone() for _ in range(world_size())]
    if len(parts) > 1:
        distributed.all_gather(parts, parts[0].clone())
    return torch.cat(parts)


def any_process(own) -> bool:
    """Whether `own` is true in at least one process."""
    count = torch.tensor(int(bool(own)))
    sum_over_processes(count)
    return bool(count)


def barrier() -> None:
    """Wait until all processes have reached this call."""
    sum_over_processes(torch.zeros(1))


def broadcast_buffers(*modules: nn.Module) -> None:
    """Copy the first process's buffers to all (batch norm that is not frozen sees different images in each process)."""
    for buffer in [buffer for module in modules for buffer in module.buffers()] * (world_size() > 1):
        distributed.broadcast(buffer, 0)


def parallel(module: nn.Module) -> nn.Module:
    """The module to call in a stage: DistributedDataParallel, which averages gradients; with one process, the module itself."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():                              # older supported versions of torch lack its replacement
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def labelled_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true, over the pixels of all processes; exactly 0 if there are none.
    DistributedDataParallel averages the processes' gradients, hence the factor `world_size()`."""
    count = mask.sum()
    sum_over_processes(count)
    return (values * mask).sum() * world_size() / count.clamp(min=1)
