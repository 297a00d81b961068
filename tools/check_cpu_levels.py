"""Check the C++ operations at every level of processors against their plain PyTorch forms.

python tools/check_cpu_levels.py

Each level that this machine has runs TESTS, and so do NATIVE processors: about 45 s each on two cores of Zen 5, with
the library's build. With qemu-user and a compiler for the machine (Debian: g++-aarch64-linux-gnu), each level also runs
the cases below in an emulator; the expected results are computed here, by PyTorch in float32. AMX's instructions are
emulated on any machine that has the rest of that level (emulate_amx.cpp). Emulation says nothing about speed. With
clang++ in PATH, all of it is done a second time by Clang, without OpenMP. Names as arguments choose among levels,
processors and compilers.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.building import EXTRA_FLAGS, FOLDER, SOURCES, threads_flag
from qwen3fast.kernels.cpu.levels import LEVELS, Level, processor_features, this_machine
from qwen3fast.kernels.cpu.ops import pack_scales
from qwen3fast.kernels.cpu.structures import BYTE_SCALES, packed_linear
from qwen3fast.model.kv_cache import quantize_vectors
from qwen3fast.quantization.formats import ALL_FORMATS, FORMATS, SHORT_NL4, quantize
from qwen3fast.quantization.uint4 import Layout

ROOT = Path(__file__).parents[1]
FLAGS = ("-O2", "-std=c++20", "-static", "-Wno-psabi")
# Processors that have a level's instructions and no later ones that change the result of a check. QEMU has no AVX-512.
EMULATED = {"avx2": "Haswell", "i8mm": "max", "dotprod": "neoverse-n1"}
NONE = torch.empty(0)
# Processors of no level, or with more than theirs: what a library that is built on them may use.
V4, VNNI, VBMI = "-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi"
NATIVE = (
    Level("skylake-x", "x86_64", frozenset({"avx512bw"}), (V4,)),
    Level("ice-lake", "x86_64", frozenset({"avx512bw", "avx512_vnni", "avx512vbmi"}), (V4, VNNI, VBMI)),
)
TESTS = [f"tests/kernels/test_{name}.py" for name in ("cpu_ops", "fp8", "tiles")]
TESTS += [f"tests/quantization/test_{name}.py" for name in ("byte_scales", "formats_for_cpus", "lossless")]
COMPILERS = ("g++", "clang++")
BUILD = """
from qwen3fast.kernels import cpu
cpu.library.TARGET_FLAGS = {flags}
assert cpu.load()
"""
RUN_TESTS = (
    BUILD
    + """
import sys
import pytest
sys.exit(pytest.main(["-q", "-x", "-n0", "-k", "not other_processors and not fewer_threads", *{tests}]))
"""
)

Case = tuple[str, Sequence[int], Sequence[Tensor], Tensor]


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def product_cases() -> Iterator[Case]:
    """Yield products: name, integers, arrays, expected."""
    for M, N, K in ((1, 7, 48), (3, 20, 64), (15, 33, 1024), (8, 24, 112), (50, 32, 64)):
        x, weight = bfloat16(M, K), bfloat16(N, K)
        yield "plain", (M, N, K), (x, weight), F.linear(x.float(), weight.float())
    for M, N, K in ((8, 16, 48), (51, 40, 64)):
        x, gate, up = bfloat16(M, K), bfloat16(N, K), bfloat16(N, K)
        gated = F.linear(x.float(), gate.float()).bfloat16()
        yield "gated", (M, N, K), (x, gate, up), F.silu(gated).float() * F.linear(x.float(), up.float())
    zeros = FORMATS["uint4"].with_layout(lambda K: Layout(K, has_zero=True))
    short = FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True))
    for format in (*ALL_FORMATS.values(), SHORT_NL4, FORMATS["fp8"].with_blocks(), zeros, short):
        K = 256 if format is short else 320 if format.is_lossless else max(160, format.multiple)
        for name, M in (("linear", 1), ("linear", 4), ("linear", 11), ("tiles", 33)):
            x, packed = bfloat16(M, K), quantize(torch.randn(48, K), format)
            expected = F.linear(x.float(), format.dequantize(packed).float())
            packed = format.operands(packed)
            linear = packed_linear(*packed)
            yield name, (M, 48, K, linear.bits, linear.span, linear.record), (x, *packed), expected
            if format.name == "int4":
                yield name, (M, 48, K, 4, 0, BYTE_SCALES), (x, packed.weight, pack_scales(packed.scale)), expected
    for M, N, K in ((1, 16, 64), (16, 48, 320), (33, 64, 576), (70, 48, 256)):
        x, packed = bfloat16(M, K), quantize(torch.randn(N, K), FORMATS["int8"])
        expected = F.linear(x.float(), FORMATS["int8"].dequantize(packed).float())
        yield "tiles8", (M, N, K, 8, 0, 0), (x, *packed), expected
    for K in (48, 96):
        x, weight = bfloat16(33, K), bfloat16(48, K)
        yield "tiles", (33, 48, K, 16, 0, 0), (x, weight, NONE), F.linear(x.float(), weight.float())


def attention_cases() -> Iterator[Case]:
    """Yield attention over a cache, in bfloat16 and int8: name, integers, arrays, expected."""
    H, K, S = 4, 2, 150
    for D, is_rounded in product((64, 128), (False, True)):
        k, v, scales = bfloat16(1, K, S, D), bfloat16(1, K, S, D), (NONE, NONE)
        keys, values = k.float(), v.float()
        if is_rounded:
            (k, k_scale), (v, v_scale) = quantize_vectors(k), quantize_vectors(v)
            keys, values, scales = k * k_scale[..., None], v * v_scale[..., None], (k_scale, v_scale)
        for name, tokens in (("decode", 1), ("prefill", 40), ("tiledpre", 40)):
            q, position = bfloat16(1, tokens, H, D), torch.arange(100, 100 + tokens)
            mask = torch.arange(S) <= position[:, None]
            heads = q.transpose(1, 2).float()
            expected = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, enable_gqa=True)
            arrays = (q, k, v, *scales, position, torch.tensor([0]))
            integers = (1, H, K, S, D) if name == "decode" else (1, tokens, H, K, S, D)
            yield name, integers, arrays, expected.transpose(1, 2)


def write_cases(path: Path) -> None:
    """Write the cases as kernel_cases.cpp reads them."""
    torch.manual_seed(0)
    with path.open("wb") as file:
        for name, integers, arrays, expected in (*product_cases(), *attention_cases()):
            file.write(name.encode().ljust(8, b"\0") + struct.pack(f"<{len(integers) + 1}q", len(integers), *integers))
            file.write(struct.pack("<q", len(arrays)))
            for array in (*arrays, expected.bfloat16()):
                content = array.contiguous().view(torch.uint8).numpy().tobytes() if array.numel() else b""
                file.write(struct.pack("<q", len(content)) + content)


def emulator_of(level: Level) -> tuple[list[str], list[str], str] | None:
    """Return a command before the program, further sources, and what it is; None for a level that is not emulated."""
    here, qemu = this_machine(), shutil.which(f"qemu-{level.machine}")
    if level.name == "amx" and level not in here and "avx512" in [usable.name for usable in here]:
        return [], ["emulate_amx.cpp"], "this processor, with AMX's instructions emulated"
    if level.name in EMULATED and qemu is not None:
        return [qemu, "-cpu", EMULATED[level.name]], [], f"{EMULATED[level.name]} ({Path(qemu).name})"
    return None


def emulate(level: Level, cases: Path, folder: Path, name: str) -> str:
    """Run the cases in an emulator. name: of the compiler. Returns: what came of it, in a line."""
    target, emulator = f"{level.machine}-linux-gnu", emulator_of(level)
    if shutil.which(f"{target}-g++") is None or emulator is None:  # Clang takes its libraries
        return "not emulated"
    if name != "g++" and level.name == "avx2":  # QEMU 7.2 ends at a masked load of a null pointer, which reads nothing
        return "not emulated"
    compiler = [f"{target}-g++"] if name == "g++" else [name, f"--target={target}"]
    flags = (*FLAGS, threads_flag(compiler))
    before, others, where = emulator
    program, objects = folder / level.name, []
    tools = (ROOT / "tools" / name for name in ("kernel_cases.cpp", *others))
    for source in (*(FOLDER / name for name in SOURCES), *tools):
        objects.append(str(folder / f"{level.name}-{source.stem}.o"))
        own = (*level.flags, *EXTRA_FLAGS.get(source.name, ()))
        subprocess.run([*compiler, *flags, *own, "-c", str(source), "-o", objects[-1]], check=True)
    subprocess.run([*compiler, *flags, *objects, "-o", str(program)], check=True)
    done = subprocess.run([*before, str(program), str(cases)], capture_output=True, text=True)
    print(done.stdout + done.stderr, end="", flush=True)
    return f"{'passed' if done.returncode == 0 else f'FAILED ({done.returncode})'} on {where}"


def run_tests(level: Level, folder: Path, name: str) -> str:
    """Run TESTS on this machine, with a library of this level. As `emulate`; folder: keeps the library."""
    if platform.machine() != level.machine or not level.needs <= set(processor_features().split()):
        return "not run here"
    variables = os.environ | {"QWEN3FAST_CPU_LEVEL": "native", "XDG_CACHE_HOME": str(folder / name)}
    build = [sys.executable, "-c", BUILD.format(flags=level.flags)]
    subprocess.run(build, cwd=ROOT, env=variables | {"CXX": name}, check=True)  # Inductor's Clang would need OpenMP
    program = RUN_TESTS.format(flags=level.flags, tests=TESTS)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables)
    return "passed on this machine" if done.returncode == 0 else "FAILED on this machine"


def main() -> int:
    """Check all levels and print a table; return 1 if one fails."""
    cpu.load()  # which packs the scales of cases
    chosen, levels = set(sys.argv[1:]), (*LEVELS, *NATIVE)
    levels = [level for level in levels if level.name in chosen] or levels
    compilers = [name for name in chosen.intersection(COMPILERS) or COMPILERS if shutil.which(name)]
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        cases = Path(temporary) / "cases.bin"
        write_cases(cases)
        for level, name in product(levels, compilers):
            arguments = (Path(temporary), name)
            results[level.name, name] = (run_tests(level, *arguments), emulate(level, cases, *arguments))
    for (level_name, name), (tests, emulated) in results.items():
        print(f"{level_name:10} {name:8} tests: {tests}; cases: {emulated}")
    return int(any("FAILED" in line for lines in results.values() for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
