"""Wheels with the C++ operations compiled for each level of processors; all else is in pyproject.toml.

`python -m build` and `pip install .` compile them where there is a compiler ($CXX, g++), for the machine that it
compiles for. Without one, if compiling fails, or on other systems than Linux, the wheel holds Python alone, and a
warning says so. Then the first use builds for the very processor, if it can. Editable installs do so at once: the
first use finds it, and builds again when the sources have changed.

QWEN3FAST_BUILD_LEVELS   names of the levels to build (see qwen3fast/kernels/cpu/levels.py); empty: none. Default: all.
                         Editable installs build for this processor, or nothing if it is empty.
CXXFLAGS                 flags behind the project's own.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = "qwen3fast/kernels/cpu"
LIBSTDCXX = ((19, 17), (22, 24), (24, 27), (28, 31), (29, 34), (30, 35), (33, 39))  # newest GLIBCXX_3.4 of manylinux_2
logger = logging.getLogger(__name__)


def load(*names: str) -> list[ModuleType]:
    """Return modules of the kernels. Their package is not run: it would import PyTorch."""
    package = ModuleType("kernels")
    package.__path__ = [str(Path(__file__).parent / KERNELS)]
    sys.modules[package.__name__] = package
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


building, levels, library = load("building", "levels", "library")


def wanted(machine: str) -> list[str]:
    """Return the names of the levels to build for a kind of machine. Raises: ValueError for a name of no level."""
    names = [level.name for level in levels.levels_of(machine)]
    chosen = os.environ.get("QWEN3FAST_BUILD_LEVELS", " ".join(names)).replace(",", " ").split()
    known = [level.name for level in levels.LEVELS]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"QWEN3FAST_BUILD_LEVELS must name levels of {known}, got {unknown[0]!r}")
    return [name for name in names if name in chosen]


def build_libraries(folder: Path) -> str | None:
    """Build the libraries of all wanted levels into a folder, and return the wheel's platform; None without any."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier build, perhaps from other sources
    try:
        compiler = building.find_compiler()
        machine = building.target_machine(compiler) if compiler and sys.platform == "linux" else ""
        names, versions = wanted(machine), [17]  # manylinux_2_17 is the oldest that is still met
        for level in levels.levels_of(machine):
            if level.name in names:
                folder.mkdir(parents=True, exist_ok=True)
                flags = [*level.flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
                built = building.build(compiler, flags, folder, level.name, is_shipped=True)
                versions.append(glibc_version(built))
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("C++ operations not built: %s", reason(error))
        return None
    if not folder.exists():
        logger.warning("C++ operations not built: no compiler for a level of %s", machine or sys.platform)
        return None
    return f"manylinux_2_{max(versions)}_{machine}"


def build_for_this_machine() -> None:
    """Build the library that the first use would build, or warn."""
    if not os.environ.get("QWEN3FAST_BUILD_LEVELS", "native"):
        return
    try:
        library.open_library()
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        logger.warning("C++ operations not built: %s", reason(error))


def reason(error: Exception) -> str:
    """Return what went wrong, and what is needed where a compiler failed."""
    stderr = getattr(error, "stderr", None)
    return f"{stderr}\nneeded: {building.NEEDED}" if stderr else str(error)


def glibc_version(built: Path) -> int:
    """Return the minor version of the oldest glibc 2 that has what a library uses, and comes with its libstdc++.

    Linking libstdc++ into the library would need the glibc that it was built with, which is as new as the compiler's.
    Raises: OSError for a library that only works with an OpenMP library other than PyTorch's, or a newer libstdc++.
    """
    content = built.read_bytes()
    if b"__kmpc_" in content:
        raise OSError("the wheel's libraries must be built by GCC: Clang's OpenMP is another one than PyTorch's")
    used = max(map(int, re.findall(rb"GLIBCXX_3\.4\.(\d+)", content)), default=0)
    fitting = [glibc for newest, glibc in LIBSTDCXX if used <= newest]
    if not fitting:
        raise OSError(f"the libraries need GLIBCXX_3.4.{used}, newer than any manylinux has: build with an older GCC")
    return max([fitting[0], *map(int, re.findall(rb"GLIBC_2\.(\d+)", content))])


class BuildWithLibraries(build_py):
    """Building of the package: with the libraries; of an editable install, with one in the cache folder."""

    platform: str | None = None

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            build_for_this_machine()
        else:
            BuildWithLibraries.platform = build_libraries(Path(self.build_lib) / KERNELS / "lib")


class WheelWithLibraries(bdist_wheel):
    """A wheel for every Python 3, and for the machines that its libraries are for."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", BuildWithLibraries.platform or "any"

    def write_wheelfile(self, wheelfile_base: str, *arguments: str) -> None:
        self.root_is_pure = BuildWithLibraries.platform is None
        super().write_wheelfile(wheelfile_base, *arguments)


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelWithLibraries})
