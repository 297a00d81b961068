"""Numbers of the host on their way to the device, without the host waiting for the device's work before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers (nested lists) as a tensor on the device; on CUDA the copy is queued behind what runs there."""
    return staged(torch.tensor(values, dtype=dtype, device="cpu"), device).to(device, non_blocking=True)


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in memory that a CUDA device copies from by itself: pinned memory.

    A copy from other memory makes the host wait for all of the device's work. PyTorch's allocator of pinned memory
    gives it out again only after the copies from it are done, so the tensor may be dropped at once.
    """
    return tensor.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else tensor
