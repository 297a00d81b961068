"""Copies of numbers from the host to the device, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers (nested lists) as a tensor on the device; on CUDA, the copy is queued."""
    return staged(torch.tensor(values, dtype=dtype, device="cpu"), device).to(device, non_blocking=True)


def staged(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor in pinned memory, from which a CUDA device copies by itself.

    A copy from other memory would make the host wait for the device. The tensor may be deleted at once: PyTorch's
    allocator reuses pinned memory only after the copies from it are done.
    """
    return tensor.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else tensor
