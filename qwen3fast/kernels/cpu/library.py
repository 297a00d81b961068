"""The C++ of this folder as a shared library: built by the system's compiler on first use, then kept.

A library runs with all rights of the process, so it is loaded only if it is what was built: its name holds the SHA-256
of its bytes, and its folder can be written to by nobody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
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
FLAGS = ["-O3", "-fopenmp", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
TARGET_FLAGS = ["-march=native"]
EXTRA_FLAGS = {"rounding.cpp": ["-ffp-contract=off"]}
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# What ops.h declares, all of it.
FUNCTIONS = tuple(
    f"qwen3fast_{name}"
    for name in (
        "matvec",
        "decode_attention",
        "prefill_attention",
        "quantized_linear",
        "quantized_rows",
        "quantized_experts",
        "round_weight",
        "decode_layers",
    )
)


class NoCompilerError(OSError):
    """This machine has nothing to build with."""


def open_library(jobs: int | None = None) -> ctypes.CDLL:
    """Open the library, built first if this source, these flags and this processor have none yet (seconds).

    jobs: compilers that run at the same time, all of them by default. `ops.h` describes the functions.
    Raises: NoCompilerError where it has to be built and there is no compiler (only GCC and Clang on Linux are tried);
    other OSErrors where a file cannot be used; subprocess.CalledProcessError where compiling fails.
    """
    if sys.platform != "linux":
        raise NoCompilerError("they need Linux with g++ or clang++")
    folder, key = cache_folder(), source_key()
    library = _find(folder, key)
    if library is None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise NoCompilerError("they need Linux with g++ or clang++")
        library = ctypes.CDLL(str(_build(compiler, folder, key, jobs)))
    return library


def cache_folder() -> Path:
    """Return the folder that keeps the library, made if it is missing: nobody else can write to it.

    A folder of ours that others can write to is closed to them, and what lies in it is not used. Where that is
    impossible, a temporary folder takes its place, for this process alone.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3fast"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & OTHERS_WRITE:
        logger.warning("others could write to %s: closing it, and building the C++ operations again", folder)
        folder.chmod(0o700)
        for library in folder.glob("ops-*.so"):
            library.unlink()
    if _is_private(folder):
        return folder
    logger.warning("others can write to %s, so the C++ operations are built for this process alone", folder)
    return Path(_temporary_folder().name)


def _is_private(folder: Path) -> bool:
    """Return whether nobody but this user, or root, can change a folder, or put another in its place."""
    status = folder.stat()
    is_open = any(p.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH for p in folder.resolve().parents)
    return status.st_uid in (0, os.getuid()) and not status.st_mode & OTHERS_WRITE and not is_open


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    if not _temporary:
        _temporary.append(tempfile.TemporaryDirectory(prefix="qwen3fast-"))
    return _temporary[0]


def source_key() -> str:
    """Return a name of these sources and flags on this processor: libraries of others have other names."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    return _digest("\n".join([*sources, *FLAGS, *TARGET_FLAGS, _processor()]).encode())[:16]


def _find(folder: Path, key: str) -> ctypes.CDLL | None:
    """Open a library that was built before; remove files that are not what was built."""
    for path in sorted(folder.glob(f"ops-{key}-*.so")):
        if path.stem.endswith(_digest(path.read_bytes())):  # a truncated one would end the process with SIGBUS
            with contextlib.suppress(OSError):  # it is no library of this system
                library = ctypes.CDLL(str(path))
                if all(hasattr(library, name) for name in FUNCTIONS):
                    return library
        logger.warning("%s is not what was built: removing it", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _build(compiler: str, folder: Path, key: str, jobs: int | None) -> Path:
    """Build the library and return its path."""
    logger.info("building C++ operations into %s", folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "ops.so"
        objects = [str(Path(temporary) / f"{name}.o") for name in SOURCES]
        commands = [
            [compiler, *FLAGS, *TARGET_FLAGS, *EXTRA_FLAGS.get(name, ()), "-c", str(FOLDER / name), "-o", file]
            for name, file in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, commands))
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(built)])
        library = folder / f"ops-{key}-{_digest(built.read_bytes())}.so"
        built.replace(library)  # another process may have done the same; either file will do
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _processor() -> str:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
