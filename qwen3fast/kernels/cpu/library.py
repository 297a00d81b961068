"""The C++ of this folder as a shared library: the wheel's, or one built on first use and kept.

A wheel brings a library for each level of processors (levels.py) in the folder `lib`; elsewhere the system's compiler
builds one for this very processor. QWEN3FAST_CPU_LEVEL pins the choice: a level's name, or "native" for the latter.

A library runs with all rights of the process, so it is loaded only if it is what was built: its name holds the SHA-256
of its bytes, and the cache folder can be written to by nobody else.

Standard library only, and relative imports: setup.py runs this file where PyTorch is not installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_bool, c_double, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

from .building import (
    FLAGS,
    FOLDER,
    HEADERS,
    SOURCES,
    build,
    digest,
    find_compiler,
    is_what_was_built,
)
from .levels import Level, pinned_level, processor_features, this_machine

logger = logging.getLogger(__name__)

SHIPPED = FOLDER / "lib"  # in wheels only
TARGET_FLAGS = ("-march=native",)
PIN = "QWEN3FAST_CPU_LEVEL"
VERSION = len("ops-") + 16  # letters of a name: of a library built here, the key of its sources
UNUSED_S, ABANDONED_S = 30 * 24 * 3600, 24 * 3600
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
DECLARATION = re.compile(r"QWEN3FAST_API (\w+) (\w+)\((.*?)\);", re.DOTALL)  # in ops.h
STRUCTURE = re.compile(r"^struct (\w+) \{\n(.*?)^\};", re.DOTALL | re.MULTILINE)  # the same
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
    library = find_library()
    if library is None:
        flags, folder, compiler = _flags(usable_levels()), cache_folder(), find_compiler()
        if not compiler:
            raise NoCompilerError("they need g++ or clang++")
        if not os.access(folder, os.W_OK):
            folder = _temporary_folder(f"{folder} cannot be written to")
        logger.info("building C++ operations into %s", folder)
        library = with_types(ctypes.CDLL(str(build(compiler, flags, folder, f"ops-{source_key(flags)}", jobs))))
        _remove_unused(folder)
    return library


def find_library() -> ctypes.CDLL | None:
    """Open the wheel's library, or the one in the cache; None if it has to be built. Raises: as `open_library`."""
    if sys.platform not in ("linux", "darwin"):
        raise NoCompilerError("they need Linux or macOS")
    candidates = usable_levels()
    shipped = _find_shipped(candidates)
    return shipped if shipped is not None else _find(cache_folder(), source_key(_flags(candidates)))


def version() -> str:
    """Return what tells the library in use from others; before one is, the library that `open_library` tries first.

    Raises: ValueError as `usable_levels`.
    """
    if _used is not None:
        return Path(_used._name).stem[:VERSION]
    candidates = usable_levels()
    built = f"ops-{source_key(_flags(candidates))}"
    return next((path.stem for _, path in _shipped(candidates)), built)[:VERSION]


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
    impossible, or no folder can be made, a temporary folder takes its place, for this process alone.
    """
    try:
        folder = own_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and folder.stat().st_mode & OTHERS_WRITE:
            logger.warning("others could write to %s: closing it, and building the C++ operations again", folder)
            folder.chmod(0o700)
            for library in folder.glob("ops-*.so"):
                library.unlink()
        if _is_private(folder):
            return folder
    except (OSError, RuntimeError) as err:  # RuntimeError: there is no home folder
        return _temporary_folder(str(err))
    return _temporary_folder(f"others can write to {folder}")


def with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return a library whose functions have the types that ops.h declares.

    Raises: AttributeError if it lacks one of them.
    """
    for result, name, arguments in DECLARATION.findall((FOLDER / "ops.h").read_text(encoding="utf-8")):
        function = getattr(library, name)
        function.restype = TYPES[result]
        function.argtypes = [c_void_p if "*" in a else TYPES[a.split()[0]] for a in arguments.split(",") if a]
    return library


def structures() -> dict[str, type[ctypes.Structure]]:
    """Return the structures that ops.h declares, by name, with its fields; pointers are addresses."""
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in STRUCTURE.findall((FOLDER / "ops.h").read_text(encoding="utf-8")):
        fields: list[tuple[str, Any]] = []
        for declaration in re.sub("//.*", "", body).split(";")[:-1]:
            kind, _, declared = declaration.strip().removeprefix("const ").partition(" ")
            for field in declared.split(","):
                of_kind = c_void_p if "*" in kind + field else {**TYPES, "float": c_float, **found}[kind]
                fields.append((field.strip(" *"), of_kind))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def _is_private(folder: Path) -> bool:
    """Return whether nobody but this user, or root, can change a folder, or put another in its place."""
    status = folder.stat()
    is_open = any(p.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH for p in folder.resolve().parents)
    return status.st_uid in (0, os.getuid()) and not status.st_mode & OTHERS_WRITE and not is_open


@functools.cache  # one warning
def _temporary_folder(why: str) -> Path:
    """Return the folder in place of the cache folder. why: that one cannot be used."""
    logger.warning(
        "%s: the C++ operations are built for this process alone; set XDG_CACHE_HOME to a folder of your own", why
    )
    return Path(_made_temporary_folder().name)


@functools.cache  # it is removed when the process ends
def _made_temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qwen3fast-")


def _remove_unused(folder: Path) -> None:
    """Remove libraries that no process has opened for UNUSED_S, and what builds left that did not end."""
    now = time.time()
    for pattern, age in (("ops-*.so", UNUSED_S), ("tmp*", ABANDONED_S)):
        for path in folder.glob(pattern):  # a process that has mapped a library keeps it
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > age:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flags(candidates: Sequence[Level]) -> tuple[str, ...]:
    """Return the flags of the library to build: of the pinned level, or for this processor."""
    is_level = os.environ.get(PIN) or sys.platform == "darwin"  # Xcode's older compilers know no native ARM
    return candidates[0].flags if candidates and is_level else TARGET_FLAGS


@functools.cache
def source_key(flags: tuple[str, ...] = TARGET_FLAGS) -> str:
    """Return a name of these sources and flags on this processor: libraries of others have other names."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*HEADERS, *SOURCES)]
    return digest("\n".join([*sources, *FLAGS, *flags, processor_features() or platform.processor()]).encode())[:16]


def _shipped(candidates: Iterable[Level]) -> Iterator[tuple[Level, Path]]:
    """Yield the wheel's libraries of some levels."""
    return ((level, path) for level in candidates for path in sorted(SHIPPED.glob(f"{level.name}-*.so")))


def _find_shipped(candidates: Iterable[Level]) -> ctypes.CDLL | None:
    """Open the first of the wheel's libraries that works here."""
    for level, path in _shipped(candidates):
        try:
            library = _open(path)
        except OSError as err:
            logger.warning("%s is not used: %s", path, err)
        else:
            logger.info("C++ operations of the level %s: %s", level.name, path)
            return library
    return None


def _find(folder: Path, key: str) -> ctypes.CDLL | None:
    """Open a library that was built before; remove files that cannot be opened."""
    for path in sorted(folder.glob(f"ops-{key}-*.so")):
        try:
            library = _open(path)
        except OSError as err:
            logger.warning("removing %s: %s", path, err)
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            with contextlib.suppress(OSError):
                os.utime(path)  # it is in use: see _remove_unused
            return library
    return None


def _open(path: Path) -> ctypes.CDLL:
    """Open a library. Raises: OSError if it is not what was built, lacks a function, or cannot be loaded here."""
    if not is_what_was_built(path):  # a truncated one would end the process with SIGBUS
        raise OSError("it is not what was built (a wheel's: install qwen3fast again)")
    try:
        return with_types(ctypes.CDLL(str(path)))
    except AttributeError as err:
        raise OSError(f"it is of another version: {err}") from err
