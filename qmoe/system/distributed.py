"""Several processes on one model (`torchrun --nproc-per-node N -m qmoe quantize ...`).

Each runs its share of the calibration batches and solves its share of the experts. They meet here,
and all of it does nothing in a process of its own. The ranks must see the same folders.
"""

import datetime
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=1)  # one rank may solve for hours while another waits


def join() -> None:
    """Meet the other ranks if torchrun started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)


def leave() -> None:
    """Part from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local() -> int:
    """The rank among those of this machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def shard(values: Sequence[T]) -> list[T]:
    """This rank's part of what there is to do: neighbours, so that all parts put together in the
    order of ranks are in the old order."""
    size = len(values)
    return list(values[size * rank() // count() : size * (rank() + 1) // count()])


def all_gather_object(value: T) -> list[T]:
    """What each rank gives here, in the order of ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """What rank 0 gives here."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks."""
    if count() > 1:
        dist.all_reduce(tensor)


def all_gather(tensor: Tensor) -> Tensor:
    """What all ranks give here, joined along the first dimension in the order of ranks."""
    if count() == 1:
        return tensor
    sizes = all_gather_object(len(tensor))
    # Only equal shapes can be gathered.
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
