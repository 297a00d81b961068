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
    """The processes that share a model: this one is `rank` of `size`. Rank 0 is the leader."""

    def __init__(self) -> None:
        """Connect the processes of the default process group, which must exist."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Any: PyTorch 2.14 declares that it may also be a number, for processes outside of the group.
        self._commands: Any = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    @classmethod
    def start(cls, device_type: str) -> Ranks:
        """Connect the processes that torchrun has started; on "cuda", each uses the device of its local rank.

        Raises: ValueError without torchrun, or for more processes than devices.
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
        """True for the rank that accepts requests."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, the same bits on each. It can be compiled and captured in graphs."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def gather(self, x_NP: Tensor, size: int) -> Tensor:
        """Return all ranks' columns side by side, (N, V). size: V; the last ranks may have fewer columns.

        It can be compiled and captured in graphs.
        """
        rows, columns = x_NP.shape[0], -(-size // self.size)
        own_NP = F.pad(x_NP, (0, columns - x_NP.shape[1])).contiguous()
        every = own_NP.new_empty(self.size * rows, columns)
        dist.all_gather_into_tensor(every, own_NP)
        return every.view(self.size, rows, columns).transpose(0, 1).reshape(rows, -1)[:, :size].contiguous()

    def share(self, x: Tensor) -> Tensor:
        """Return rank 0's tensor, broadcast to all ranks; each passes a tensor of the same shape and dtype."""
        x = x.contiguous()
        dist.broadcast(x, src=0)
        return x

    def broadcast(self, message: Any) -> None:
        """Send a message from rank 0 to all other ranks."""
        dist.broadcast_object_list([message], src=0, group=self._commands)

    def receive(self) -> Any:
        """Wait for rank 0's next message, on any other rank. Raises: RuntimeError if rank 0 has ended."""
        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0, group=self._commands)
        return message[0]

    def collect(self, message: Any) -> list[Any]:
        """Return the messages of all ranks, by rank; all ranks call this together."""
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, message, group=self._commands)
        return messages

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return this object: copies of a module share its connections."""
        return self


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
