"""Check the C++ operations at every level of processors against their plain PyTorch forms.

python tools/check_cpu_levels.py

Each level that this machine has runs TESTS, and so do NATIVE processors: about 45 s each on two cores of Zen 5, with
the library's build. With qemu-user and a compiler for the machine (Debian: g++-aarch64-linux-gnu), each level also runs
the cases below in an emulator, with 1, 2 and 3 threads; the expected results are computed here, by PyTorch in float32.
AMX's instructions are emulated on any machine that has the rest of that level (emulate_amx.cpp). Emulation says nothing
about speed. With clang++ in PATH, all of it is done a second time by Clang, without OpenMP. Names as arguments choose
among levels, processors and compilers.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.state import DecodeState
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.building import EXTRA_FLAGS, FOLDER, SOURCES, threads_flag
from qwen3fast.kernels.cpu.levels import LEVELS, Level, processor_features, this_machine
from qwen3fast.kernels.cpu.lossless import pack_lossless
from qwen3fast.kernels.cpu.ops import pack_scales
from qwen3fast.kernels.cpu.sampler import sampling_pointers
from qwen3fast.kernels.cpu.structures import LinearPointers, ProcessingPointers, Tiles, cache, packed_linear
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache, quantize_vectors
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import ALL_FORMATS, FORMATS, SHORT_NL4, quantize
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.quantization.uint4 import Layout
from qwen3fast.sampling.processors import ProcessorRows, process_logits
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

ROOT = Path(__file__).parents[1]
FLAGS = ("-O2", "-std=c++20", "-static", "-Wno-psabi")
# Processors that have a level's instructions and no later ones that change the result of a check. QEMU has no AVX-512.
EMULATED = {"avx2": "Haswell", "i8mm": "max", "dotprod": "neoverse-n1"}
ADDRESS = 0x51A7E001 << 32  # kAddress of kernel_cases.cpp
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
CPU = torch.device("cpu")

# Name, integers, tensors and structures of ops.h, expected, tolerance in thousandths of the largest number: of expected
# numbers in float32. Others, and all with a tolerance of 0, must be the same bytes.
Case = tuple[str, Sequence[int], Sequence[Any], Tensor] | tuple[str, Sequence[int], Sequence[Any], Tensor, int]


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def product_cases() -> Iterator[Case]:
    """Yield products."""
    for M, N, K in ((1, 7, 48), (3, 20, 64), (15, 33, 1024), (8, 24, 112), (50, 32, 64)):
        x, weight = bfloat16(M, K), bfloat16(N, K)
        yield "plain", (M, N, K), (x, weight), F.linear(x.float(), weight.float())
    zeros = FORMATS["uint4"].with_layout(lambda K: Layout(K, has_zero=True))
    short = FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True))
    for format in (*ALL_FORMATS.values(), SHORT_NL4, FORMATS["fp8"].with_blocks(), zeros, short):
        K = 256 if format is short else 320 if format.is_lossless else max(160, format.multiple)
        for name, M in (("linear", 1), ("linear", 4), ("linear", 11), ("tiles", 33)):
            x, packed = bfloat16(M, K), quantize(torch.randn(48, K), format)
            weight = format.dequantize(packed).float()
            expected, packed = F.linear(x.float(), weight), format.operands(packed)
            yield name, (M,), (x, packed_linear(*packed), *packed), expected
            if format.name == "int4":
                packed = packed._replace(scale=pack_scales(packed.scale))
                yield name, (M,), (x, packed_linear(*packed), *packed), expected
        row = torch.tensor([47, 0, 16, 18])
        yield "rows", (4,), (row, packed_linear(*packed), *packed), weight[row]
    for M, N, K in ((1, 16, 64), (16, 48, 320), (33, 64, 576), (70, 48, 256)):
        x, packed = bfloat16(M, K), quantize(torch.randn(N, K), FORMATS["int8"])
        expected = F.linear(x.float(), FORMATS["int8"].dequantize(packed).float())
        yield "tiles8", (M,), (x, packed_linear(*packed), *packed), expected
    for K in (32, 96):
        x, weight = bfloat16(33, K), bfloat16(48, K)
        linear = LinearPointers(weight.data_ptr(), None, 48, K, 16)
        yield "tiles", (33,), (x, linear, weight), F.linear(x.float(), weight.float())


def packing_cases() -> Iterator[Case]:
    """Yield weights to quantize and to pack. The bytes of the last two are this machine's, which its tests compare."""
    weight = bfloat16(80, 320) * torch.logspace(-6, 0, 80)[:, None].bfloat16()
    for name in ("int8", "int4"):
        packed = FORMATS[name].quantize(weight)
        expected = torch.cat([x.view(torch.uint8).flatten() for x in packed])
        yield "quantize", (80, 320, FORMATS[name].bits), (weight,), expected
    yield "scales", packed.scale.shape[:2], (packed.scale,), pack_scales(packed.scale)
    weight[::3, ::50] *= 1e20  # exceptions
    yield "lossless", (80, 320), (weight,), torch.cat([x.flatten() for x in pack_lossless(weight)[::-1]])


def attention_cases() -> Iterator[Case]:
    """Yield attention over a cache, in bfloat16 and int8."""
    for D, is_rounded, (H, K, S, first) in product((64, 128), (False, True), ((4, 2, 150, 100), (4, 1, 600, 520))):
        k, v, scales = bfloat16(1, K, S, D), bfloat16(1, K, S, D), (None, None)
        keys, values = k.float(), v.float()
        if is_rounded:
            (k, k_scale), (v, v_scale) = quantize_vectors(k), quantize_vectors(v)
            keys, values, scales = k * k_scale[..., None], v * v_scale[..., None], (k_scale, v_scale)
        for name, tokens in (("decode", 1), ("prefill", 40), ("tiledpre", 40)):
            q, position = bfloat16(1, tokens, H, D), torch.arange(first, first + tokens)
            mask = torch.arange(S) <= position[:, None]
            heads = q.transpose(1, 2).float()
            expected = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, enable_gqa=True)
            arrays = (q, cache(k, v, *scales), position, torch.tensor([0]), k, v, *(x for x in scales if x is not None))
            integers = (1, H, K, S, D) if name == "decode" else (1, tokens, H, K, S, D)
            yield name, integers, arrays, expected.transpose(1, 2)


def sampling_cases() -> Iterator[Case]:
    """Yield logits to process and to choose from."""
    top_k, top_p, min_p = map(torch.tensor, zip(*product((0, 20, 700), (1.0, 0.95, 0.3), (0.0, 0.02)), strict=True))
    B, V = len(top_k), 1003
    logits = 4 * torch.randn(B, V)
    rows = SamplerRows(torch.full((B,), 0.7), top_k, top_p, min_p, torch.arange(B) << 33, torch.arange(B))
    yield "sample", (B, V), (logits, sampling_pointers(rows, B), *rows), sample(logits, rows, SamplerKind.FULL)
    yield "sample", (B, V), (logits, NONE), logits.argmax(dim=1)
    processing = ProcessorRows.neutral(B, V, CPU)
    for tensor in processing[:3]:
        tensor.copy_(1 + torch.rand(B))
    processing.in_prompt_BV.random_(2)
    processing.count_BV.random_(3)
    processing.bias_BV.copy_(torch.randn(B, V).relu())
    processing.allowed_BW.random_(-(2**31), 2**31 - 1)
    pointers = ProcessingPointers(*(tensor.data_ptr() for tensor in processing))
    yield "process", (B, V), (logits, pointers, *processing), process_logits(logits, processing), 0


def model_cases() -> Iterator[Case]:
    """Yield whole blocks, and whole steps, of small models; the plain model has the dequantized weights in float32."""
    # All experts are chosen: rounding may change the choice of fewer.
    experts = {"num_experts": 16, "num_experts_per_tok": 16, "moe_intermediate_size": 32, "norm_topk_prob": True}
    for name, D, tiles, dtype, changes in (
        (None, 64, Tiles.NONE, torch.bfloat16, {}),
        (None, 128, Tiles.BFLOAT16, torch.int8, {"intermediate_size": 192}),
        ("int8", 64, Tiles.INT8, torch.bfloat16, {"intermediate_size": 192}),
        ("int8", 128, Tiles.NONE, torch.int8, {}),
        ("int4", 64, Tiles.BFLOAT16, torch.int8, {}),
        ("int4", 128, Tiles.NONE, torch.bfloat16, {"intermediate_size": 192}),
        ("int4", 64, Tiles.NONE, torch.bfloat16, experts),
        ("lossless", 64, Tiles.BFLOAT16, torch.bfloat16, {"intermediate_size": 192}),
    ):
        B, T, V = 2, 21, 208
        sizes = {"hidden_size": 128, "intermediate_size": 96, "vocab_size": V, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": D}
        model = Qwen3(ModelConfig(**sizes | heads | changes)).bfloat16().requires_grad_(False)
        for parameter in model.parameters():
            is_norm = parameter.dim() == 1
            parameter.normal_(float(is_norm), 0.3 if is_norm else parameter.shape[-1] ** -0.5)
        plain = copy.deepcopy(model).float()
        if name is not None:
            quantize_model(model, name, torch.bfloat16)
        for layer_name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                weight = plain.get_parameter(layer_name if ".experts." in layer_name else f"{layer_name}.weight")
                weight.copy_(layer.dequantize().view_as(weight))
        token_BT = torch.randint(V, (B, T))
        x_BTE, hidden_BTE = plain.embed(token_BT), plain.hidden(token_BT)

        state = DecodeState.allocate(B, CPU)
        state.input_R.copy_(token_BT[:, -1])
        state.position_R.fill_(T - 1)
        state.temperature_R.fill_(0.8)
        state.top_p_R.fill_(0.9)
        keys = StaticKVCache(model.config, B, T, dtype, CPU, granularity=T)
        layers, tables = DecodeLayers(model, keys), rope_tables(D, model.config.rope_theta, T, CPU)
        step, run = layers._step(state, *tables), layers._run
        structures = (run._layers, run.sizes, *tables, x_BTE.bfloat16(), step._ends, step._sampling)
        arrays = (*structures, *run._tensors, *step._tensors)
        tolerance = 40 if name in (None, "lossless") else 80  # C++ quantizes activations as well
        yield "blocks", (B, T, 9, tiles), arrays, hidden_BTE, tolerance
        yield "last", (B, T, T, tiles), arrays, hidden_BTE[:, -1:], tolerance
        yield "step", (B, T, T - 1, tiles), arrays, plain.logits(hidden_BTE)[:, -1], tolerance


def image(array: Any, number_of: dict[int, int]) -> bytes:
    """Return an array as kernel_cases.cpp reads it. number_of: the number of the array at each address."""
    if isinstance(array, Tensor):
        content = array.contiguous().flatten().view(torch.uint8).numpy().tobytes() if array.numel() else b""
        return struct.pack("<qq", len(content), 0) + content
    words = memoryview(bytes(array)).cast("q")
    words = [ADDRESS + number_of[word] if word in number_of else word for word in words]
    return struct.pack(f"<qq{len(words)}q", len(words) * 8, 1, *words)


def write_cases(path: Path) -> None:
    """Write the cases as kernel_cases.cpp reads them."""
    torch.manual_seed(0)
    every = (product_cases(), packing_cases(), attention_cases(), sampling_cases(), model_cases())
    with path.open("wb") as file:
        for name, integers, arrays, expected, *tolerance in (case for cases in every for case in cases):
            number_of = {x.data_ptr(): i for i, x in enumerate(arrays) if isinstance(x, Tensor) and x.numel()}
            file.write(name.encode().ljust(8, b"\0") + struct.pack(f"<{len(integers) + 1}q", len(integers), *integers))
            file.write(struct.pack("<q", len(arrays)) + b"".join(image(array, number_of) for array in arrays))
            [allowed] = tolerance or [20 if expected.dtype == torch.float32 else 0]
            content = image(expected.bfloat16() if allowed else expected, {})
            file.write(content[:8] + struct.pack("<q", allowed) + content[16:])


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
    program, tools = folder / level.name, [ROOT / "tools" / name for name in ("kernel_cases.cpp", *others)]
    commands = []
    for source in (*(FOLDER / name for name in SOURCES), *tools):
        own = (*level.flags, *EXTRA_FLAGS.get(source.name, ()))
        object_file = str(folder / f"{level.name}-{source.stem}.o")
        commands.append([*compiler, *flags, *own, "-c", str(source), "-o", object_file])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    wraps = ["-Wl,--wrap=syscall,--wrap=signal"] if others else []
    subprocess.run([*compiler, *flags, *wraps, *(command[-1] for command in commands), "-o", str(program)], check=True)
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
    levels = (*LEVELS, *NATIVE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*(level.name for level in levels), *COMPILERS]
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}; all without any")
    chosen = set(parser.parse_args().names)
    if unknown := chosen.difference(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    cpu.load()  # which packs the scales of cases
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
