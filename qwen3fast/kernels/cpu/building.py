"""How the C++ of this folder becomes a shared library: on a machine that needs it, and for wheels (setup.py).

Standard library only: setup.py reads this file where PyTorch is not installed.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (
    "quantized.cpp",
    "fp8.cpp",
    "lossless.cpp",
    "decode_layers.cpp",
    "dequantize.cpp",
    "sampler.cpp",
    "processors.cpp",
    "prefill_attention.cpp",
    "decode_attention.cpp",
    "matvec.cpp",
    "linear.cpp",
    "tiles.cpp",
    "experts.cpp",
    "quantize_weight.cpp",
    "prefill_layers.cpp",
)  # what takes longest first
HEADERS = (
    *("vec.h", "parallel.h", "ops.h", "products.h", "attend.h", "block.h", "input.h"),
    *("sampler.h", "experts.h", "fp8.h", "lossless.h", "low_rank.h", "records.h", "tiles.h"),
)
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
NEEDED = "g++ 11 or newer, or a clang++ with a standard library as new"  # for std::atomic::wait, -march=x86-64-v4
EXTRA_FLAGS = {name: ["-ffp-contract=off"] for name in ("quantize_weight.cpp", "processors.cpp")}


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, g++ or clang++; empty if there is none.

    Raises: OSError for a CXX with an open quotation.
    """
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    try:
        return shlex.split(found) if found else []
    except ValueError as err:
        raise OSError(f"CXX={found!r} is no command: {err}") from err


def target_machine(compiler: Sequence[str]) -> str:
    """Return the kind of machine that a compiler compiles for, "x86_64" or "aarch64" as a rule.

    Raises: OSError or subprocess.CalledProcessError where it cannot be asked.
    """
    done = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True)
    return done.stdout.partition("-")[0].strip()


def threads_flag(compiler: Sequence[str]) -> str:
    """Return the flag for threads: GCC's OpenMP, which PyTorch uses on Linux; other compilers build parallel.h's own.

    Clang's OpenMP would be another one than PyTorch's, and is missing on macOS.
    Raises: OSError or subprocess.CalledProcessError where the compiler cannot be asked.
    """
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    return "-fopenmp" if "Free Software Foundation" in done.stdout else "-pthread"


def build(
    compiler: Sequence[str],
    target_flags: Sequence[str],
    folder: Path,
    prefix: str,
    jobs: int | None = None,
    is_shipped: bool = False,
) -> Path:
    """Build a library and return its path: the prefix, the SHA-256 of its bytes, ".so".

    It appears in the folder when it is whole, under a name that tells whether it still is: an interrupted build leaves
    none, and of several at the same time either one's will do.
    target_flags: what the processor is. jobs: compilers that run at the same time; None runs all of them.
    is_shipped: for other machines. It is stripped, and takes the OpenMP functions from the library that PyTorch has
    loaded, under whatever name, instead of one of its own: two of them would each keep a thread for every core.
    Raises: subprocess.CalledProcessError where compiling fails, OSError where there is no such compiler.
    """
    threads = threads_flag(compiler)
    flags = (*FLAGS, threads, *target_flags)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "ops.so"
        objects = [str(Path(temporary) / f"{name}.o") for name in SOURCES]
        commands = [
            [*compiler, *flags, *EXTRA_FLAGS.get(name, ()), "-c", str(FOLDER / name), "-o", file]
            for name, file in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(_run, commands))
        _run([*compiler, "-shared", "-s" if is_shipped else threads, *objects, "-o", str(built)])
        library = folder / f"{prefix}-{digest(built.read_bytes())}.so"
        built.replace(library)
    return library


def is_what_was_built(library: Path) -> bool:
    """Return whether a library's bytes are those that its name was made of."""
    return library.stem.endswith(digest(library.read_bytes()))


def digest(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)
