"""The C++ of this folder as a shared library: the wheel's, or one built on first use and kept.

A wheel brings a library for each level of processors (levels.py) in the folder `lib`; elsewhere the system's compiler
builds one for this very processor. QWEN3FAST_CPU_LEVEL pins the choice: a level's name, or "native" for the latter.

A library runs with all rights of the process, so it is loaded only if it is what was built: its name holds the SHA-256
of its bytes, and the cache folder can be written to by nobody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Iterable, Sequence
from ctypes import c_bool, c_double, c_int64, c_void_p
from pathlib import Path

from qwen3fast.kernels.cpu.building import (
    FLAGS,
    FOLDER,
    HEADERS,
    SOURCES,
    build,
    digest,
    find_compiler,
    is_what_was_built,
)
from qwen3fast.kernels.cpu.levels import Level, pinned_level, processor_features, this_machine

logger = logging.getLogger(__name__)

SHIPPED = FOLDER / "lib"  # in wheels only
TARGET_FLAGS = ["-march=native"]
PIN = "QWEN3FAST_CPU_LEVEL"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
DECLARATION = re.compile(r"QWEN3FAST_API (\w+) (\w+)\((.*?)\);", re.DOTALL)  # in ops.h
TYPES = {"void": None, "bool": c_bool, "double": c_double, "int64_t": c_int64, "Tiles": c_int64}


class NoCompilerError(OSError):
    """This machine has nothing to build with."""


_used: ctypes.CDLL | None = None


def functions() -> ctypes.CDLL:
    """Return the functions of ops.h; only after `use`."""
    assert _used is not None, "load() must come first"
    return _used


def use(library: ctypes.CDLL) -> None:
    """Have `functions` return the ones of this library from now on."""
    global _used
    _used = library


def open_library(jobs: int | None = None) -> ctypes.CDLL:
    """Open the wheel's library, or the one in the cache, built first if there is none yet for this source (seconds).

    jobs: compilers that run at the same time; None runs all of them. `ops.h` describes the functions.
    Raises: NoCompilerError where it has to be built and there is no compiler (only GCC and Clang are tried);
    other OSErrors where a file cannot be used; subprocess.CalledProcessError where compiling fails; ValueError where
    QWEN3FAST_CPU_LEVEL names no level of this machine.
    """
    if sys.platform not in ("linux", "darwin"):
        raise NoCompilerError("they need Linux or macOS")
    candidates = usable_levels()
    library = _find_shipped(candidates)
    if library is None:
        is_level = os.environ.get(PIN) or sys.platform == "darwin"  # Xcode's older compilers know no native ARM
        flags = candidates[0].flags if candidates and is_level else TARGET_FLAGS
        folder, key = cache_folder(), source_key(flags)
        library = _find(folder, key)
    if library is None:
        compiler = find_compiler()
        if not compiler:
            raise NoCompilerError("they need g++ or clang++")
        logger.info("building C++ operations into %s", folder)
        library = with_types(ctypes.CDLL(str(build(compiler, flags, folder, f"ops-{key}", jobs))))
    return library


def usable_levels() -> tuple[Level, ...]:
    """Return the levels whose libraries may be used, the best first. Raises: ValueError as `pinned_level`."""
    pin = os.environ.get(PIN)
    return this_machine() if not pin else () if pin == "native" else (pinned_level(pin),)


def own_folder() -> Path:
    """Return `$XDG_CACHE_HOME/qwen3fast`, or `~/.cache/qwen3fast`. A relative path is ignored, as XDG wants it.

    Raises: RuntimeError if there is no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "qwen3fast"


def cache_folder() -> Path:
    """Return the folder that keeps the library, made if it is missing: nobody else can write to it.

    A folder of ours that others can write to is closed to them, and what lies in it is not used. Where that is
    impossible, a temporary folder takes its place, for this process alone.
    """
    folder = own_folder()
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


def with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library whose functions have the types that ops.h declares.

    Raises: AttributeError if it lacks one of them.
    """
    for result, name, arguments in DECLARATION.findall((FOLDER / "ops.h").read_text(encoding="utf-8")):
        function = getattr(library, name)
        function.restype = TYPES[result]
        function.argtypes = [c_void_p if "*" in a else TYPES[a.split()[0]] for a in arguments.split(",") if a]
    return library


def _is_private(folder: Path) -> bool:
    """Return whether nobody but this user, or root, can change a folder, or put another in its place."""
    status = folder.stat()
    is_open = any(p.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH for p in folder.resolve().parents)
    return status.st_uid in (0, os.getuid()) and not status.st_mode & OTHERS_WRITE and not is_open


@functools.cache  # it is removed when the process ends
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qwen3fast-")


def source_key(flags: Sequence[str] = TARGET_FLAGS) -> str:
    """Return a name of these sources and flags on this processor: libraries of others have other names."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    return digest("\n".join([*sources, *FLAGS, *flags, processor_features() or platform.processor()]).encode())[:16]


def _find_shipped(candidates: Iterable[Level]) -> ctypes.CDLL | None:
    """Open the wheel's library of the first level that has one which is whole."""
    for level in candidates:
        for path in sorted(SHIPPED.glob(f"{level.name}-*.so")):
            library = _open(path)
            if library is not None:
                logger.info("C++ operations of the level %s: %s", level.name, path)
                return library
            logger.warning("%s is not what was built: install qwen3fast again", path)
    return None


def _find(folder: Path, key: str) -> ctypes.CDLL | None:
    """Open a library that was built before; remove files that are not what was built."""
    for path in sorted(folder.glob(f"ops-{key}-*.so")):
        library = _open(path)
        if library is not None:
            return library
        logger.warning("%s is not what was built: removing it", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _open(path: Path) -> ctypes.CDLL | None:
    """Open a library if it is what was built, and has all functions."""
    if is_what_was_built(path):  # a truncated one would end the process with SIGBUS
        with contextlib.suppress(OSError, AttributeError):  # it is no library of this system, or of other functions
            return with_types(ctypes.CDLL(str(path)))
    return None
