"""C++ operations for bfloat16 and quantized weights on CPUs: read ops.h, then the .cpp file of interest.

After `load()` there are `torch.ops.qwen3fast.*` (ops.py), `DecodeLayersCall` (decode_layers.py) and `DecodeStepCall`
(decode_step.py). Where the C++ cannot be built, callers use their PyTorch forms. Models in bfloat16 also use these when
they run eagerly, as the reference that other forms are compared with (see kernels/compiling.py).
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qwen3fast.kernels.compiling import may_use_operations
from qwen3fast.kernels.cpu import experts, library, ops, prefill, tiles  # noqa: F401  three of them define operations
from qwen3fast.kernels.cpu.structures import LANES

logger = logging.getLogger(__name__)

_loading = threading.Lock()
_was_tried = False
_is_ready = False  # a plain flag, which torch.compile can read
_is_off = False


def load(jobs: int | None = None) -> bool:
    """Build (once per machine: seconds) and open the library of operations, once in a process.

    jobs: compilers that run at the same time; None runs all of them.
    Returns: whether the operations can be used; if not, the reason is logged. Linux and macOS are tried.
    """
    global _is_ready, _was_tried
    with _loading:
        if not _was_tried:
            _is_ready = _load(jobs)
            _was_tried = True
        return is_loaded()


def is_loaded() -> bool:
    """Return whether `load` has succeeded in this process."""
    return _is_ready and not _is_off


@contextmanager
def switched_off() -> Iterator[None]:
    """Switch the operations off in the block, in all threads, to measure their worth."""
    global _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = False


def version() -> str:
    """Return what tells this build of the operations from others; empty before `load` has succeeded."""
    return Path(library.functions()._name).stem if _is_ready else ""


def _load(jobs: int | None) -> bool:
    try:
        library.use(library.open_library(jobs))
    except library.NoCompilerError as err:
        logger.info("C++ operations not built: %s", err)
        return False
    except (OSError, RuntimeError, subprocess.SubprocessError) as err:  # RuntimeError: there is no home directory
        detail = str(err)
        if isinstance(err, subprocess.CalledProcessError):
            detail = err.stderr.strip()[-2000:] or f"exit status {err.returncode}"
            detail = f"{err.cmd[0]} failed: {detail}; set CXX to a g++ or clang++ that works, and start again"
        logger.warning("C++ operations could not be built, using slower PyTorch forms: %s", detail)
        return False
    tiles.try_tiles()
    return True


def can_linear(x: Tensor, weight_NK: Tensor) -> bool:
    """Return whether `torch.ops.qwen3fast.linear` serves this product."""
    return (
        may_use_operations()
        and x.device.type == "cpu"
        and x.dtype == weight_NK.dtype == torch.bfloat16
        and x.shape[-1] % LANES == 0
        and is_loaded()
    )


def can_decode_attention(q_BTHD: Tensor, k_RKSD: Tensor) -> bool:
    """Return whether `torch.ops.qwen3fast.decode_attention` serves this query."""
    return q_BTHD.shape[1] == 1 and can_prefill_attention(q_BTHD, k_RKSD)


def can_prefill_attention(q_BTHD: Tensor, k_RKSD: Tensor) -> bool:
    """Return whether `torch.ops.qwen3fast.prefill_attention` serves these queries."""
    return (
        may_use_operations()
        and q_BTHD.device.type == "cpu"
        and q_BTHD.dtype == torch.bfloat16
        and k_RKSD.dtype in (torch.bfloat16, torch.int8)
        and q_BTHD.shape[-1] % (2 * LANES) == 0
        and is_loaded()
    )
