"""The levels of processors that a wheel has a library for, and which of them this machine has.

Standard library only: setup.py reads this file where PyTorch is not installed.
"""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Level:
    """What a library may expect of a processor.

    needs: names in the line "flags" (x86) or "Features" (ARM) of /proc/cpuinfo, all of which the processor must have.
    flags: what tells GCC and Clang of it.
    """

    name: str
    machine: str  # as platform.machine() and the first part of the compiler's target name it
    needs: frozenset[str]
    flags: tuple[str, ...]


_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe".split())
_V4 = _V3 | frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
_ARM = frozenset("asimd atomics crc32 asimdrdm".split())

_VNNI, _VNNI_FLAGS = _V4 | {"avx512_vnni"}, ("-march=x86-64-v4", "-mavx512vnni")
_AVX512, _AVX512_FLAGS = _VNNI | {"avx512_bf16", "avx512vbmi"}, (*_VNNI_FLAGS, "-mavx512bf16", "-mavx512vbmi")
_AMX = ("tile", "bf16", "int8")

# Of each kind of machine, the best comes first.
LEVELS = (
    Level(
        "amx",
        "x86_64",
        _AVX512 | {f"amx_{part}" for part in _AMX},
        (*_AVX512_FLAGS, *(f"-mamx-{part}" for part in _AMX)),
    ),
    Level("avx512", "x86_64", _AVX512, _AVX512_FLAGS),
    Level("avx512vnni", "x86_64", _VNNI, _VNNI_FLAGS),
    Level("avxvnni", "x86_64", _V3 | {"avx_vnni"}, ("-march=x86-64-v3", "-mavxvnni")),
    Level("avx2", "x86_64", _V3, ("-march=x86-64-v3",)),
    Level("i8mm", "aarch64", _ARM | {"asimddp", "i8mm", "bf16"}, ("-march=armv8.2-a+dotprod+i8mm+bf16",)),
    Level("dotprod", "aarch64", _ARM | {"asimddp"}, ("-march=armv8.2-a+dotprod",)),
)

# Of macOS's list. All of Apple's own processors for it have the first ones.
APPLE = {"arm64": _ARM | {"asimddp"}, "arm.FEAT_I8MM": {"i8mm"}, "arm.FEAT_BF16": {"bf16"}}


def levels_of(machine: str) -> tuple[Level, ...]:
    """Return the levels of a kind of machine (as platform.machine() names it), the best first."""
    machine = {"arm64": "aarch64"}.get(machine, machine)  # macOS's name
    return tuple(level for level in LEVELS if level.machine == machine)


def usable_levels(machine: str, features: Iterable[str]) -> tuple[Level, ...]:
    """Return the levels whose libraries a processor with these features can run, the best first."""
    features = frozenset(features)
    return tuple(level for level in levels_of(machine) if level.needs <= features)


def cpu_info(field: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return a field of the first processor, such as "model name", as Linux lists it; empty where it does not."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")


def processor_features() -> str:
    """Return the features of this processor, separated by spaces, in Linux's names; empty if the system lists none."""
    return cpu_info("flags") or cpu_info("Features") or apple_features(_sysctl())


def apple_features(listed: str) -> str:
    """Return the features of a processor of Apple's, in Linux's names. listed: what `sysctl hw.optional` prints."""
    features = (names for line, names in APPLE.items() if f"hw.optional.{line}: 1" in listed.splitlines())
    return " ".join(sorted(frozenset().union(*features)))


@functools.cache
def _sysctl() -> str:
    if sys.platform != "darwin":
        return ""
    try:
        command = ["/usr/sbin/sysctl", "hw.optional"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def this_machine() -> tuple[Level, ...]:
    """Return the levels whose libraries this machine can run, the best first."""
    return usable_levels(platform.machine(), processor_features().split())


def pinned_level(name: str) -> Level:
    """Return the level of this name.

    Raises: ValueError if there is none, or if this machine cannot run its library.
    """
    known = {level.name: level for level in this_machine()}
    if name not in known:
        raise ValueError(f"QWEN3FAST_CPU_LEVEL must be native or a level of this machine ({list(known)}), got {name!r}")
    return known[name]
