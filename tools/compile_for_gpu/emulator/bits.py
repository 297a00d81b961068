"""Instructions on bits: logic, shifts, parts of registers and selection."""

from __future__ import annotations

import numpy as np

from compile_for_gpu.emulator.block import Block, instruction
from compile_for_gpu.emulator.numbers import BITS, INTEGERS, PLAIN_BITS, from_bytes, low_bits, to_bytes
from compile_for_gpu.emulator.program import EmulatorError, Instruction


@instruction("and or xor", f"pred {PLAIN_BITS}")
def combine_bits(block: Block, found: Instruction) -> None:
    """Combine the bits of two numbers."""
    operation = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[found.parts[0]]
    x, y = (block.read(operand, found.type) for operand in found.operands[1:])
    block.write(found.operands[0], operation(x, y), found.type)


@instruction("not", f"pred {PLAIN_BITS}")
def invert(block: Block, found: Instruction) -> None:
    """Invert bits."""
    block.write(found.operands[0], ~block.read(found.operands[1], found.type), found.type)


@instruction("lop3", "b32")
def look_up_bits(block: Block, found: Instruction) -> None:
    """Combine the bits of three numbers by a table of eight bits."""
    a, b, c = (block.read(operand, "b32") for operand in found.operands[1:4])
    table, result = int(found.operands[4], 0), np.zeros(block.num_threads, np.uint64)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    block.write(found.operands[0], result, "b32")


@instruction("shl shr", f"{PLAIN_BITS} {INTEGERS}")
def shift(block: Block, found: Instruction) -> None:
    """Shift to the left or the right; by at most the number of bits."""
    x, count = block.read(found.operands[1], found.type), block.read(found.operands[2], "u32")
    size = BITS[found.type]
    if x.dtype == np.int64:
        result = x >> np.minimum(count, np.uint64(size - 1)).astype(np.int64)
    else:
        count, is_out = np.minimum(count, np.uint64(63)), count >= size
        shifted = x << count if found.parts[0] == "shl" else x >> count
        result = np.where(is_out, np.uint64(0), shifted)
    block.write(found.operands[0], result, found.type)


@instruction("shf", "l r wrap b32")
def shift_pair(block: Block, found: Instruction) -> None:
    """Shift two registers as one of 64 bits, and keep the upper half (left) or the lower one (right)."""
    low, high, count = (block.read(operand, "b32") for operand in found.operands[1:])
    pair, count = low | (high << np.uint64(32)), count & np.uint64(31)
    result = pair >> count if "r" in found.parts else (pair << count) >> np.uint64(32)
    block.write(found.operands[0], result, "b32")


@instruction("bfe", "u32 s32 u64")
def extract_bits(block: Block, found: Instruction) -> None:
    """Take bits out of a number; signed ones keep the sign, which is the highest of them."""
    bits = block.read(found.operands[1], f"b{BITS[found.type]}")
    start, size = int(found.operands[2]), int(found.operands[3])
    if size < 1 or start + size > BITS[found.type]:
        raise EmulatorError("unknown instruction")
    result = low_bits(bits >> np.uint64(start), size)
    if found.type == "s32":
        unused = np.int64(64 - size)
        result = (result.view(np.int64) << unused) >> unused
    block.write(found.operands[0], result, found.type)


@instruction("bfi", "b32")
def insert_bits(block: Block, found: Instruction) -> None:
    """Put the lowest bits of one number into another."""
    inserted, base = (block.read(operand, "b32") for operand in found.operands[1:3])
    start, size = int(found.operands[3]), int(found.operands[4])
    mask = np.uint64(((1 << size) - 1) << start)
    block.write(found.operands[0], (base & ~mask) | ((inserted << np.uint64(start)) & mask), "b32")


@instruction("prmt", "b32")
def permute_bytes(block: Block, found: Instruction) -> None:
    """Choose each byte of the result among the eight of two numbers, or repeat its sign."""
    a, b, choice = (block.read(operand, "b32") for operand in found.operands[1:])
    every = to_bytes(a | (b << np.uint64(32)), 8)
    result = np.zeros((block.num_threads, 4), np.uint8)
    for i in range(4):
        digit = low_bits(choice >> np.uint64(4 * i), 4).astype(np.int64)
        byte = every[np.arange(block.num_threads), digit % 8]
        result[:, i] = np.where(digit >= 8, np.where(byte >= 128, 255, 0), byte)
    block.write(found.operands[0], from_bytes(result), "b32")


@instruction("selp", f"{PLAIN_BITS} {INTEGERS} f32 f64")
def select(block: Block, found: Instruction) -> None:
    """Choose between two numbers."""
    kind = f"b{BITS[found.type]}"
    first, second, condition = found.operands[1:]
    x, y, is_first = block.read(first, kind), block.read(second, kind), block.read(condition, "pred").astype(bool)
    known = block.known(condition) & np.where(is_first, block.known(first), block.known(second))
    block.write(found.operands[0], np.where(is_first, x, y), kind, known)
