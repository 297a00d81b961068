"""Ranks: the processes that share a model, and how they communicate.

Tensors travel by NCCL between CUDA devices and by gloo between CPUs; messages travel by gloo.

N rows   P part of the vocabulary   V vocabulary
"""

from __future__ import annotations

import os
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# How long a rank waits for the others in a step: first steps compile, and not all ranks finish at the same time.
STEP_TIMEOUT = timedelta(minutes=10)
# Followers may have nothing to do for long. (If rank 0 ends, they notice at once.)
IDLE_TIMEOUT = timedelta(days=365)


class Ranks:
    """This process's place among the ranks, `rank` of `size`, and its connections. Rank 0 leads."""

    def __init__(self) -> None:
        """Connect the processes of the default group, which must be there."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._commands = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    @classmethod
    def start(cls, device_type: str) -> Ranks:
        """Connect the processes that torchrun has started; on "cuda", each takes the device of its local rank.

        Raises: ValueError if it has started none, or more than there are devices.
        """
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and not dist.is_initialized():
            raise ValueError(
                f"tensor_parallel needs several processes ({', '.join(missing)} not set); start the program with "
                "torchrun --nproc-per-node N"
            )
        if device_type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"process {local_rank} of this machine has no CUDA device: there are {torch.cuda.device_count()}; "
                    "start as many processes as devices"
                )
            torch.cuda.set_device(local_rank)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
            weakref.finalize(cls, _end)  # when the program ends, after Generators that were not closed before
        return cls()

    @property
    def is_leader(self) -> bool:
        """Return whether this is the rank that takes requests."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, the same bits on each. A graph, compiled or captured, can hold it."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def gather(self, x_NP: Tensor, size: int) -> Tensor:
        """Return all ranks' columns side by side, (N, V). size: V; the last ranks may hold fewer than the first.

        A graph can hold it, too.
        """
        rows, columns = x_NP.shape[0], -(-size // self.size)
        own_NP = F.pad(x_NP, (0, columns - x_NP.shape[1])).contiguous()
        every = own_NP.new_empty(self.size * rows, columns)
        dist.all_gather_into_tensor(every, own_NP)
        return every.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)[:, :size].contiguous()

    def share(self, x: Tensor) -> Tensor:
        """Broadcast rank 0's tensor and return it; the others pass one of the same shape and dtype."""
        x = x.contiguous()
        dist.broadcast(x, src=0)
        return x

    def broadcast(self, message: Any) -> None:
        """Send a message from rank 0 to all others."""
        dist.broadcast_object_list([message], src=0, group=self._commands)

    def receive(self) -> Any:
        """Wait for rank 0's next message, on the others. Raises: RuntimeError if rank 0 is gone."""
        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0, group=self._commands)
        return message[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return this object: connections are not copied with a module that has them."""
        return self


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
