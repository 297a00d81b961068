"""C++ operations for bfloat16 and quantized weights on CPUs: read ops.h, then the .cpp file of interest.

After `load()` there are `torch.ops.qwen3fast.*` (ops.py), `DecodeLayersCall` (decode_layers.py) and `DecodeStepCall`
(decode_step.py). Where the C++ cannot be built, callers use their PyTorch forms. Models in bfloat16 also use these when
they run eagerly, as the reference that other forms are compared with (see kernels/compiling.py).
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading

import torch
from torch import Tensor

from qwen3fast.kernels.compiling import may_use_operations
from qwen3fast.kernels.cpu import experts, library, ops, prefill, tiles  # noqa: F401  three of them define operations
from qwen3fast.kernels.cpu.building import NEEDED
from qwen3fast.kernels.cpu.structures import LANES

logger = logging.getLogger(__name__)

_loading = threading.Lock()
_was_tried = False
_is_ready = False  # a plain flag, which torch.compile can read


def load(jobs: int | None = None, may_build: bool = True) -> bool:
    """Build (once per machine: seconds) and open the library of operations, once in a process.

    jobs: compilers that run at the same time; None runs all of them. may_build: False opens one that is there, at once,
    and does not wait for another thread that builds one.
    Returns: whether the operations can be used; if not, the reason is logged. Linux and macOS are tried.
    """
    global _is_ready, _was_tried
    if _loading.acquire(blocking=may_build):
        try:
            if not _was_tried:
                _is_ready = _load(jobs, may_build)
                _was_tried = _is_ready or may_build
        finally:
            _loading.release()
    return is_loaded()


def _forget_parent() -> None:
    """Give up the lock that a thread of the parent process may hold, in a process forked while it builds."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_parent)


def is_loaded() -> bool:
    """Return whether `load` has succeeded in this process."""
    return _is_ready


def _load(jobs: int | None, may_build: bool) -> bool:
    try:
        opened = library.open_library(jobs) if may_build else library.find_library()
    except library.NoCompilerError as err:
        logger.info("C++ operations not built: %s", err)
        return False
    except (OSError, RuntimeError, subprocess.SubprocessError) as err:  # RuntimeError: there is no home directory
        detail = str(err)
        if isinstance(err, subprocess.CalledProcessError):
            detail = err.stderr.strip()[-2000:] or f"exit status {err.returncode}"
            detail = f"{err.cmd[0]} failed: {detail}; set CXX to {NEEDED}, and start again"
        logger.warning("C++ operations could not be built, using slower PyTorch forms: %s", detail)
        return False
    if opened is None:
        return False
    library.use(opened)
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
