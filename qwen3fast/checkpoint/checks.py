"""Refusals of weights: dtypes, numbers that are not finite, files of other kinds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

# In safetensors' names. Other dtypes (integers, booleans, float8) have a meaning that a conversion would ignore.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PACKED = {"U8": torch.uint8, "I32": torch.int32, **FLOATS}
CHECKED_AT_ONCE = 2**22  # elements: the intermediate results of a pass stay small
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def dtype_problem(stored: str, packed: torch.dtype | None) -> str | None:
    """Return the problem with the dtype of a stored tensor; None if there is none.

    stored: in safetensors' names. packed: the dtype of a quantized layer's tensor; None for plain weights, which may
    be in any float dtype of 16 bits or more.
    """
    if packed is None:
        return None if stored in FLOATS else f"dtype {stored}, expected one of {', '.join(FLOATS)}"
    if PACKED.get(stored) == packed:
        return None
    expected = next(spelling for spelling, dtype in PACKED.items() if dtype == packed)
    return f"dtype {stored}, expected {expected}"


def non_finite(tensor: Tensor) -> str | None:
    """Return a text with the numbers of NaN and infinite elements; None without any, and for tensors of integers."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    return non_finite_parts(tensor.flatten().split(CHECKED_AT_ONCE))


def non_finite_parts(parts: Iterable[Tensor]) -> str | None:
    """Return the same for a tensor of floats that comes in parts, none of them empty."""
    nan = infinite = total = 0
    for part in parts:
        total += part.numel()
        part = part.float() if part.dtype.itemsize == 1 else part  # float8 lacks the functions
        low, high = part.aminmax()  # NaN if there is one; one pass, which writes nothing
        if not (low.isfinite() and high.isfinite()):
            nan, infinite = nan + int(part.isnan().sum()), infinite + int(part.isinf().sum())
    return f"{nan:,} NaN and {infinite:,} infinite of {total:,}" if nan or infinite else None


def refuse(problems: list[str], summary: str) -> None:
    """Raises: ValueError with the summary and the first problems, if there are any."""
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{summary}:\n  " + "\n  ".join(problems[:8]) + more)


def no_weights(folder: Path, expected: str) -> FileNotFoundError:
    """Return the error for a folder without safetensors; it names the pickles in it."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if not pickles:
        return FileNotFoundError(f"{folder} holds no weights; expected {expected}")
    return FileNotFoundError(
        f"{folder} holds pickles only ({', '.join(pickles[:4])}), which are never read, since they can run any code; "
        f"expected {expected}: take a revision that has them, or save the model with safe_serialization=True"
    )
