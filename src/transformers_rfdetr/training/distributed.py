"""Sums over processes, tensors that may be sharded, and results that one process computes for all."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from torch import Tensor


def start_sum(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to add the tensors of all processes in place; return a function that waits for the sum and returns it.

    On a GPU, the kernels that are launched after it wait, and the host does not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return lambda: tensor
    work = torch.distributed.all_reduce(tensor, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return tensor

    return finish


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered from all processes if FSDP version 2 shards it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_full_tensor(tensor: Tensor, values: Tensor) -> None:
    """Copy full `values` into a tensor that may be sharded."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def run_on_first_process(work: Callable[[], Any], process_index: int) -> Any:
    """Call `work` on the first process; return its result, or raise its error, on all processes."""
    answer: list[Any] = [None]
    if process_index == 0:
        try:
            answer = [work()]
        except Exception as error:  # the other processes wait for an answer
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
