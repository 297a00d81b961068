"""Instructions that move data or the threads themselves: moves, loads, stores, copies and branches."""

from __future__ import annotations

import re

import numpy as np

from compile_for_gpu.emulator.block import Block, instruction, registers_of
from compile_for_gpu.emulator.numbers import BITS, INTEGERS, PLAIN_BITS, from_bytes, low_bits, to_bytes
from compile_for_gpu.emulator.program import EmulatorError, Instruction

CACHING = "L1::evict_first L1::evict_last L2::cache_hint"


@instruction("ret")
def end(block: Block, _: Instruction) -> None:
    """End the threads."""
    block.go(None)


@instruction("bra", "uni")
def branch(block: Block, found: Instruction) -> None:
    """Continue elsewhere."""
    block.go(found.operands[0])


@instruction("call trap", "uni")
def fail(block: Block, found: Instruction) -> None:
    """Fail: a kernel calls nothing but the function for assertions that do not hold."""
    if block.active.any():
        raise EmulatorError("an assertion of the kernel does not hold")


@instruction("griddepcontrol", "wait launch_dependents")
def order_kernels(block: Block, found: Instruction) -> None:
    """Wait for the previous kernel, or let the next one start."""
    if found.type == "wait":
        block.memory.may_access_all = True


@instruction("createpolicy", "fractional L2::evict_first L2::evict_last b64")
def create_policy(block: Block, found: Instruction) -> None:
    """Make a policy of caches, which changes no number."""
    block.write(found.operands[0], np.zeros(block.num_threads, np.uint64), "b64")


@instruction("mov", f"pred {PLAIN_BITS} {INTEGERS} f32 f64")
def move(block: Block, found: Instruction) -> None:
    """Copy a register, join several into one, or part one into several."""
    targets, sources = map(registers_of, found.operands)
    kind = "pred" if found.type == "pred" else f"b{BITS[found.type]}"
    if len(sources) > 1:
        size = BITS[kind] // len(sources)
        parts = [low_bits(block.read(name, "b64", is_moved=True), size) for name in sources]
        joined = [part << np.uint64(size * i) for i, part in enumerate(parts)]
        block.write(targets[0], np.bitwise_or.reduce(joined), kind)
        return
    bits, size = block.read(sources[0], kind), BITS[kind] // len(targets)
    for i, name in enumerate(targets):
        block.write(name, bits >> np.uint64(size * i), f"b{size}" if len(targets) > 1 else kind)


@instruction("cvta", "global u64")
def name_constant(block: Block, found: Instruction) -> None:
    """Take the address of a text for a failed assertion, which nothing reads."""
    block.write(found.operands[0], np.zeros(block.num_threads, np.uint64), "b64")


@instruction("ld", f"global shared shared::cta param v2 v4 {CACHING} {PLAIN_BITS} {INTEGERS} f32 f64")
def load(block: Block, found: Instruction) -> None:
    """Load one or more registers from memory, or a parameter."""
    if "param" in found.parts:
        number = re.search(r"_param_(\d+)", found.operands[1])
        if number is None or int(number[1]) >= len(block.parameters):
            raise EmulatorError("no such parameter")
        bits = np.full(block.num_threads, block.parameters[int(number[1])], np.uint64)
        block.write(found.operands[0], bits, f"b{BITS[found.type]}")
        return
    targets, size = registers_of(found.operands[0]), BITS[found.type] // 8
    if not block.active.any():
        return
    first, warps = block.addresses(found.operands[1])[block.active], block.warps[block.active]
    is_global, width = "global" in found.parts, size * len(targets)
    data = block.memory.load(first, width) if is_global else block.shared.load(first, width, warps)
    for i, name in enumerate(targets):
        block.write(name, block.expand(from_bytes(data[:, i * size : (i + 1) * size])), f"b{8 * size}")


@instruction("st", f"global param shared shared::cta v2 v4 {PLAIN_BITS} {INTEGERS} f32 f64")
def store(block: Block, found: Instruction) -> None:
    """Store one or more registers to memory."""
    if "param" in found.parts or not block.active.any():  # arguments of calls are of no interest
        return
    size = BITS[found.type] // 8
    bits = [block.read(name, f"b{8 * size}", is_used=True)[block.active] for name in registers_of(found.operands[1])]
    data = np.concatenate([to_bytes(part, size) for part in bits], axis=1)
    first = block.addresses(found.operands[0])[block.active]
    if "global" in found.parts:
        block.memory.store(first, data)
    else:
        block.shared.store(first, data, block.warps[block.active])


@instruction("cp", f"async ca cg shared global commit_group wait_group wait_all bulk prefetch L2 {CACHING}")
def copy(block: Block, found: Instruction) -> None:
    """Begin or end asynchronous copies from global to shared memory, or prefetch, which only must be possible."""
    operands, modifiers = found.operands, set(found.parts[1:])
    if "commit_group" in modifiers:
        block.shared.commit_copies(block.active_blocks)
    elif "wait_group" in modifiers:
        block.shared.wait_for_copies(block.active_blocks, int(operands[0]))
    elif "wait_all" in modifiers:
        block.shared.commit_copies(block.active_blocks)
        block.shared.wait_for_copies(block.active_blocks, 0)
    elif "prefetch" in modifiers:
        pairs = zip(
            block.addresses(operands[0])[block.active],
            block.read(operands[1], "u32", is_used=True)[block.active],
            strict=True,
        )
        for first, size in pairs:
            if first % 16 or size % 16:
                raise EmulatorError("prefetch that is not aligned to 16 bytes")
            block.memory.check(np.arange(int(first), int(first) + int(size)), 1)
    else:
        _copy_to_shared(block, found)


def _copy_to_shared(block: Block, found: Instruction) -> None:
    """Copy some bytes, of which those beyond the fourth operand are zeros."""
    to, source, size = found.operands[:3]
    width = int(size, 0)
    has_count = len(found.operands) - ("L2::cache_hint" in found.parts) > 3
    counts = (
        block.read(found.operands[3], "u32", is_used=True)
        if has_count
        else np.full(block.num_threads, width, np.uint64)
    )
    is_read = block.active & (counts > 0)
    if not set(counts[block.active]) <= {0, width}:
        raise EmulatorError("copy of a part of its bytes")
    data = np.zeros((block.num_threads, width), np.uint8)
    if is_read.any():
        data[is_read] = block.memory.load(block.addresses(source)[is_read], width)
    if block.active.any():
        block.shared.copy(block.addresses(to)[block.active], data[block.active], block.warps[block.active])
