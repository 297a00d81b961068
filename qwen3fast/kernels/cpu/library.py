"""The C++ of this folder as a shared library: built by the system's compiler on first use, then kept."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (
    "quantized.cpp",
    "decode_layers.cpp",
    "attention.cpp",
    "matvec.cpp",
    "experts.cpp",
    "rounding.cpp",
)  # what takes longest first
HEADERS = ("vec.h", "parallel.h", "ops.h", "products.h", "attend.h")
TARGET_FLAGS = ["-march=native"]
EXTRA_FLAGS = {"rounding.cpp": ["-ffp-contract=off"]}


class NoCompilerError(OSError):
    """This machine has nothing to build with."""


def open_library(jobs: int | None = None) -> ctypes.CDLL:
    """Build (once per machine: seconds) and open the library; `ops.h` describes its functions.

    jobs: compilers that run at the same time, all of them by default.
    Raises: NoCompilerError where there is none (only GCC and Clang on Linux are tried); other OSErrors where a file
    cannot be used; subprocess.CalledProcessError where compiling fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        raise NoCompilerError("they need Linux with g++ or clang++")
    return ctypes.CDLL(_build(compiler, jobs))


def _build(compiler: str, jobs: int | None) -> str:
    """Path of the shared library, built if this source, compiler and processor have none yet."""
    flags = ["-O3", *TARGET_FLAGS, "-fopenmp", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    key = "\n".join([*sources, *flags, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3fast"
    library = folder / f"ops-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        logger.info("building C++ operations into %s", library)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / library.name
            objects = [str(Path(temporary) / f"{name}.o") for name in SOURCES]
            commands = [
                [compiler, *flags, *EXTRA_FLAGS.get(name, ()), "-c", str(FOLDER / name), "-o", file]
                for name, file in zip(SOURCES, objects, strict=True)
            ]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(_run, commands))
            _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(built)])
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
