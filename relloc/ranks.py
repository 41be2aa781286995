"""Communication between the processes of a run that torchrun started.

Every function also works in a run of a single process, where it returns what it was given. A rank
is the number of a process; rank 0 is the first.
"""

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Returns the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process among all of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Returns the number of this process among the run's on this machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns the number of processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Connects to the other processes if torchrun started several.

    GPUs communicate by NCCL and CPUs by gloo. With GPUs both are used, so that hosts can agree on
    something without waiting for the work that is queued on the GPUs.
    """
    # torchrun tells each process the number of processes in its environment.
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1
    if is_alone:
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    """Disconnects from the other processes; from here on this process is a run of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(value: T) -> T:
    """Returns rank 0's value on every rank. It can be anything that pickles; tensors on the CPU."""
    # The call overwrites the members of a list.
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def largest(*numbers: int) -> list[int]:
    """Returns, for each of the numbers, the largest over all ranks."""
    # On the CPU, so that hosts agree without waiting for the GPUs.
    of_this_rank = torch.tensor(numbers, dtype=torch.int64)
    of_all_ranks = gathered(of_this_rank)
    return of_all_ranks.amax(0).tolist()


def copy_from_first(values: Iterable[Tensor]) -> None:
    """Overwrites tensors on every rank with rank 0's."""
    if dist.is_initialized():
        for value in values:
            dist.broadcast(value, src=0)


def total(values: Tensor) -> Tensor:
    """Adds tensors up over all ranks, in place, and returns `values`."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(values: Shaped[Tensor, "*n"]) -> Shaped[Tensor, "world *n"]:
    """Returns the tensors of all ranks, stacked in the order of ranks."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    # The call writes into tensors that have to be there.
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


def gathered_on_first(value: T) -> list[T]:
    """Returns the values of all ranks in the order of ranks on rank 0, and nothing on the others.

    A value can be anything that pickles; tensors on the CPU.
    """
    if not dist.is_initialized():
        return [value]
    if rank() != 0:
        dist.gather_object(value, dst=0)
        return []
    # The call fills a list that has a place for each rank.
    of_all_ranks = [value] * world_size()
    dist.gather_object(value, of_all_ranks, dst=0)
    return of_all_ranks


def union(texts: dict[str, str]) -> dict[str, str]:
    """Returns the dictionaries of all ranks merged; where ranks share a key, the highest counts."""
    if not dist.is_initialized():
        return texts
    # The call fills a list that has a place for each rank.
    of_all_ranks: list[dict[str, str]] = [{}] * world_size()
    dist.all_gather_object(of_all_ranks, texts)
    merged = {}
    for of_rank in of_all_ranks:
        merged.update(of_rank)
    return merged
