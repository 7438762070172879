"""What a training loop asks of its device and of the other workers.

With one worker nothing here communicates. With several, the process group is initialised by whoever
starts the workers, and every function below is a collective: all ranks call it at the same point.
"""

from __future__ import annotations

import contextlib
import inspect
import resource
import sys
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainables.context import Context
from trainables.errors import UserError


def data_parallel(model: nn.Module, context: Context) -> nn.Module:
    """The model whose backward pass averages gradients over the workers."""
    if context.world_size == 1:
        return model
    devices = [context.device] if context.device.type == "cuda" else None
    # the only buffers are fixed positions, the same on every rank; torch 2.13 renamed the option
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, device_ids=devices, **options)


def batch_slice(batch: int, context: Context, setting: str) -> slice:
    """This worker's contiguous part of the global batch; `setting` names the batch in messages."""
    if batch % context.world_size:
        raise UserError(
            f"{setting}: {batch} images cannot be split evenly over {context.world_size} workers; "
            f"use a multiple of {context.world_size}, or other resources.workers"
        )
    share = batch // context.world_size
    return slice(context.rank * share, (context.rank + 1) * share)


def sum_over_workers(values: Tensor, context: Context) -> Tensor:
    if context.world_size > 1:
        dist.all_reduce(values)
    return values


def from_all_workers(value: Tensor, context: Context) -> Tensor:
    """(workers,) of a number that each has its own of."""
    if context.world_size == 1:
        return value[None]
    values = [torch.empty_like(value) for _ in range(context.world_size)]
    dist.all_gather(values, value)
    return torch.stack(values)


def decided_by_main(decision: Any, context: Context) -> Any:
    """What rank 0 decided, on every rank."""
    if context.world_size == 1:
        return decision
    box = [decision]
    dist.broadcast_object_list(box, src=0, device=context.device)
    return box[0]


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 when asked for, and by itself ("fast") on devices that are faster in it.

    Weights and reductions stay fp32. "auto" means GPUs alone, as in release 0.1.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_half(precision, device))


def is_half(precision: str, device: torch.device) -> bool:
    """Whether products are in bf16 with that setting."""
    if precision == "fast":
        return _is_faster_in_half(device)
    if precision == "auto":
        return device.type == "cuda" and _is_faster_in_half(device)
    return precision == "bf16"


def _is_faster_in_half(device: torch.device) -> bool:
    """GPUs from Ampere on, and CPUs that multiply tiles (AMX); others emulate it, or are slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _has_amx()


@cache
def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())  # no public function says so


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float:
    """Bytes of tensors on the GPU since the reset; without one, of the process since its start."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
