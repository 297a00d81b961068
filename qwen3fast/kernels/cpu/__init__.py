"""The C++ operations of this folder, `torch.ops.qwen3fast.*`: built by the system's compiler on first use, then kept.

They serve bfloat16 and quantised weights on CPUs. Where they cannot be built, callers use their PyTorch forms.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from qwen3fast.kernels.compiling import is_compiling

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# -ffast-math lets sums be vectorised; infinities and NaN are not relied on there. It must not be given to the linker:
# that would switch off subnormal numbers in the whole process. quantized.cpp rounds by adding and subtracting.
SOURCES = {
    "matvec.cpp": ["-ffast-math"],
    "attention.cpp": ["-ffast-math"],
    "quantized.cpp": [],
    "decode_layers.cpp": [],
    "library.cpp": [],
}
HEADERS = ("vec.h", "products.h", "attend.h", "ops.h")
TARGET_FLAGS = ["-march=native"]
MAX_ROWS = 8
LANES = 16  # channels are processed in vectors of this many


_loading = threading.Lock()
_is_loaded: bool | None = None  # None: not tried yet


def load(jobs: int | None = None) -> bool:
    """Build (once per machine: seconds, more than ten on two cores) and register the operations, once in a process.

    jobs: compilers that run at the same time, all of them by default.
    Returns: whether they can be used; the reason is logged if not. Only GCC and Clang on Linux are tried.
    """
    global _is_loaded
    with _loading:
        if _is_loaded is None:
            _is_loaded = _load(jobs)
        return _is_loaded


def is_loaded() -> bool:
    """Whether `load` has succeeded in this process."""
    return _is_loaded is True


def _load(jobs: int | None) -> bool:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        logger.info("C++ operations not built: they need Linux with g++ or clang++")
        return False
    try:
        torch.ops.load_library(_build(compiler, jobs))
    except (OSError, RuntimeError, subprocess.SubprocessError) as err:
        detail = getattr(err, "stderr", None) or str(err)
        logger.warning("C++ operations could not be built, using slower PyTorch forms: %s", detail.strip()[-2000:])
        return False
    torch.library.register_fake("qwen3fast::matvec", _matvec_shape)
    torch.library.register_fake("qwen3fast::decode_attention", _decode_attention_shape)
    torch.library.register_fake("qwen3fast::prefill_attention", _prefill_attention_shape)
    torch.library.register_fake("qwen3fast::quantized_linear", _quantized_linear_shape)
    return True


def can_matvec(x: Tensor, weight_NK: Tensor) -> bool:
    """Whether `torch.ops.qwen3fast.matvec` serves this product (inside compiled code only)."""
    rows = x.numel() // x.shape[-1]
    return (
        is_compiling()
        and x.device.type == "cpu"
        and rows <= MAX_ROWS
        and x.dtype == weight_NK.dtype == torch.bfloat16
        and x.shape[-1] % LANES == 0
        and is_loaded()
    )


def can_decode_attention(q_BTHD: Tensor, k_RKSD: Tensor) -> bool:
    """Whether `torch.ops.qwen3fast.decode_attention` serves this query (inside compiled code only)."""
    return (
        is_compiling()
        and q_BTHD.device.type == "cpu"
        and q_BTHD.shape[1] == 1
        and q_BTHD.dtype == torch.bfloat16
        and k_RKSD.dtype in (torch.bfloat16, torch.int8)
        and q_BTHD.shape[-1] % LANES == 0
        and is_loaded()
    )


def can_prefill_attention(q_BTHD: Tensor, k_RKSD: Tensor) -> bool:
    """Whether `torch.ops.qwen3fast.prefill_attention` serves these queries (inside compiled code only)."""
    return (
        is_compiling()
        and q_BTHD.device.type == "cpu"
        and q_BTHD.dtype == torch.bfloat16
        and k_RKSD.dtype in (torch.bfloat16, torch.int8)
        and q_BTHD.shape[-1] % (2 * LANES) == 0
        and is_loaded()
    )


def _build(compiler: str, jobs: int | None) -> str:
    """Path of the shared library, built if this source, compiler, PyTorch and processor have none yet."""
    flags = ["-O3", *TARGET_FLAGS, "-fopenmp", "-DAT_PARALLEL_OPENMP=1"]
    flags += ["-std=c++20", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    key = "\n".join([*sources, str(SOURCES), *flags, version, torch.__version__, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3fast"
    library = folder / f"ops-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        from torch.utils.cpp_extension import include_paths, library_paths  # slow to import

        logger.info("building C++ operations into %s", library)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            includes = [f"-I{path}" for path in include_paths()]
            libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
            objects = {name: str(Path(temporary) / f"{name}.o") for name in SOURCES}
            commands = [
                [compiler, *flags, *extra, *includes, "-c", str(FOLDER / name), "-o", objects[name]]
                for name, extra in SOURCES.items()
            ]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(_run, commands))
            _run([compiler, "-shared", "-fopenmp", *objects.values(), "-o", str(built), *libraries])
            built.replace(library)  # another process may have done the same; either file will do
    return str(library)


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _matvec_shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _prefill_attention_shape(q: Tensor, *others: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def _quantized_linear_shape(x: Tensor, packed: list[Tensor], scale: list[Tensor]) -> Tensor:
    return x.new_empty((*x.shape[:-1], sum(p.shape[0] * p.shape[2] for p in packed)))


def _decode_attention_shape(q: Tensor, *others: Tensor | None) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], 1, q.shape[3]))
