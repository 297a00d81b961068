"""Issue slots per weight: whether a product is bound by reading its weight, or by its instructions.

A multiprocessor issues 4 instructions of 32 threads per clock: 128 slots. Each thread of an instruction takes one, of a
shuffle, which runs at a quarter of the rate, four. An H200 has 132 multiprocessors at 1.98 GHz, its highest clock, and
reads 4.24 TB/s (benchmarks/gpu_model.md): 7.9 slots per byte. Instructions of machine code are counted as often as
loops run them; stalls are not in the count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

from compile_for_gpu.binaries import CUOBJDUMP
from compile_for_gpu.cases import KernelCase
from qwen3fast.kernels.cuda.decode_step import linear, tail
from qwen3fast.kernels.cuda.decode_step.weights import num_groups

SLOTS_PER_BYTE = 132 * 128 * 1.98e9 / 4.24e12
THREADS = 128
LOADED_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # otherwise 4


def slots_per_weight(case: KernelCase, cubin: bytes) -> float | None:
    """Return the slots per weight of a product of the fused step in 16 bits; None for other kernels."""
    if case.kernel not in (linear.linear_kernel, tail.vocabulary_kernel) or case.signature["x"] == "*fp32":
        return None
    constants = case.constants
    BN, BK, K, ROWS = (constants[name] for name in ("BN", "BK", "K", "ROWS"))
    weights = 2 if constants.get("USE") == linear.GATE else 1
    tiles = -(-K // BK)
    instructions, loops = _disassembled(cubin)
    runs = [1.0] * len(instructions)
    # A compiler may unroll loops: a tile's instructions of tensor cores are known, and so are the bytes of a tile of x.
    warps = min(THREADS // 32, num_groups(constants["KIND"], BK))  # that share the work
    products = weights * max(BN, 16) * BK / (16 * 16) / warps
    inside = {i for first, last in loops for i in range(first, last + 1)}
    before = sum(_is_product(name) for i, name in enumerate(instructions) if i not in inside)
    for first, last in loops:
        names = instructions[first : last + 1]
        count = sum(map(_is_product, names))
        if count:
            times = (products * tiles - before) / count
        else:
            loaded = sum(map(_loaded_bytes, names))
            times = (tiles - 1) / max(1, round(loaded / (ROWS * BK * 2 / THREADS)))
        runs[first : last + 1] = [times] * len(names)
    cost = sum(n * (4 if name.startswith("SHFL") else 1) for n, name in zip(runs, instructions, strict=True))
    return float(cost * THREADS / (weights * BN * BK * tiles))


def _is_product(name: str) -> bool:
    return name.startswith("HMMA.16816")


def _loaded_bytes(name: str) -> int:
    parts = name.split(".")
    return max((LOADED_BYTES.get(part, 0) for part in parts), default=0) or 4 if parts[0] == "LDG" else 0


def _disassembled(cubin: bytes) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the names of a kernel's instructions, and its loops: their first and last instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP.with_name("nvdisasm")), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);", line):
            target = re.search(r"\.L_x_\d+", found[2])
            if found[1].startswith("BRA") and target and labels.get(target[0], len(names)) < len(names) - 3:
                loops.append((labels[target[0]], len(names)))
            if found[1] != "NOP":
                names.append(found[1])
    return names, loops


def budget(bits: float) -> float:
    """Return the slots that an H200 has for a weight of so many bits while it reads it."""
    return SLOTS_PER_BYTE * bits / 8
