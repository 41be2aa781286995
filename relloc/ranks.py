"""Processes that train together, started by torchrun: the identity where there is only one."""

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Which of this machine's processes, and so of its GPUs, this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Meet the other processes if torchrun started several: NCCL between GPUs, gloo between CPUs.

    With GPUs there is both, so that hosts can agree without waiting for what is queued on the GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")


def leave() -> None:
    """Part from the other processes; collective calls are the identity from here on."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(value: T) -> T:
    """The value of rank 0, on every rank: anything that can be pickled; tensors on the CPU."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def largest(*numbers: int) -> list[int]:
    """The largest of each number over all ranks, on every rank."""
    return gathered(torch.tensor(numbers, dtype=torch.int64)).amax(0).tolist()


def copy_from_first(values: Iterable[Tensor]) -> None:
    """Put rank 0's values in the place of each rank's own."""
    if dist.is_initialized():
        for value in values:
            dist.broadcast(value, src=0)


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, on every rank; changes `values` in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(values: Tensor) -> Tensor:
    """The values (n) of all ranks, (world n), on every rank."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def union(texts: dict[str, str]) -> dict[str, str]:
    """The dictionaries of all ranks in one, on every rank."""
    if not dist.is_initialized():
        return texts
    gathered: list[dict[str, str]] = [{} for _ in range(world_size())]
    dist.all_gather_object(gathered, texts)
    return {name: text for part in gathered for name, text in part.items()}
