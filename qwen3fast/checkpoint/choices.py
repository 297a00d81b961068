"""Devices and dtypes by name, "auto" included."""

from __future__ import annotations

import torch

from qwen3fast.model.config import ModelConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" takes CUDA where there is one. Raises: ValueError if it is not there."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as err:
        raise ValueError(f"device {device!r:.200} is not supported; supported: auto, cpu, cuda") from err
    if chosen.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device {device!r:.200} is not supported; supported: auto, cpu, cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device; use device='cpu'")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} was asked for, but this PyTorch sees {torch.cuda.device_count()} CUDA device(s), "
            "counted from 0"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """Return the dtype of a name; "auto" takes the checkpoint's. Raises: ValueError for an unknown name."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    if isinstance(dtype, str) and dtype == "auto":
        return config.dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.200} is not supported; supported: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
