"""Instructions of whole warps: barriers, shuffles, reductions, and the tensor cores' products and tiles."""

from __future__ import annotations

import numpy as np

from compile_for_gpu.emulator.block import WARP, Block, instruction, registers_of
from compile_for_gpu.emulator.numbers import Array, decode, from_bytes, low_bits, to_bytes
from compile_for_gpu.emulator.program import EmulatorError, Instruction

LANES = np.arange(WARP)
# A thread's numbers in a tile: lane // 4 is a row (of 8), and lane % 4 a pair of columns; of B the other way around.
GROUP, PAIR = LANES // 4, LANES % 4 * 2
TILE_ROWS = 8
SUMS = {"add": np.sum, "min": np.min, "max": np.max}


def _by_warp(numbers: Array) -> Array:
    return numbers.reshape(-1, WARP)


@instruction("bar", "sync warp")
def wait_for_all(block: Block, found: Instruction) -> None:
    """Wait for all threads of the block, or of the warp."""
    warps = block.active_warps
    if "warp" not in found.parts:
        blocks = block.active_blocks
        if found.operands != ("0",):
            raise EmulatorError("unknown instruction")
        if WARP * warps.sum() * block.num_blocks != len(blocks) * block.num_threads:
            raise EmulatorError("not all threads of a block wait")
        block.shared.barrier(blocks)


@instruction("shfl", "sync up down bfly idx b32")
def shuffle(block: Block, found: Instruction) -> None:
    """Read the register of another thread in the warp; a thread's own if there is none."""
    _ = block.active_warps
    target, source, *rest = found.operands
    distance, limits = (_by_warp(low_bits(block.read(operand, "b32"), 13)).astype(np.int64) for operand in rest[:2])
    distance, clamp, segment = distance & 31, limits & 31, limits >> 8
    first, last = LANES & segment, (LANES & segment) | (clamp & ~segment)
    mode = found.parts[2]
    if mode == "up":
        lane = LANES - distance
        is_inside = lane >= last
    else:
        lanes = {"down": LANES + distance, "bfly": LANES ^ distance, "idx": first | (distance & ~segment)}
        lane = lanes[mode]
        is_inside = lane <= last
    lane = np.where(is_inside, lane, LANES)
    numbers, known = (
        np.take_along_axis(_by_warp(every), lane, axis=1).reshape(-1)
        for every in (block.read(source, "b32"), block.known(source))
    )
    if "|" in target:
        raise EmulatorError("unknown instruction")
    block.write(target, numbers, "b32", known)


@instruction("redux", "sync add min max s32 u32")
def reduce(block: Block, found: Instruction) -> None:
    """Compute the sum or an extreme of the numbers of the threads in a mask."""
    _ = block.active_warps
    target, source, members = found.operands
    numbers = _by_warp(block.read(source, found.type, is_used=True))
    masks = _by_warp(block.read(members, "b32", is_used=True))
    is_member = (masks[:, :, None] >> LANES.astype(np.uint64)) & np.uint64(1)  # [warps, of thread, thread]
    result = SUMS[found.parts[2]](
        np.broadcast_to(numbers[:, None, :], is_member.shape), axis=2, where=is_member.astype(bool), **_start(found)
    )
    block.write(target, result.reshape(-1), found.type)


def _start(found: Instruction) -> dict[str, int]:
    limits = np.iinfo(np.int64 if found.type == "s32" else np.uint64)
    return {"add": {}, "min": {"initial": limits.max}, "max": {"initial": limits.min}}[found.parts[2]]


def _tile_places(block: Block, operand: str, tile: int) -> tuple[Array, Array]:
    """Return the addresses of a tile's rows, which eight of each active warp's threads give, and their warps."""
    first, warps = slice(TILE_ROWS * tile, TILE_ROWS * (tile + 1)), block.active_warps
    return tuple(_by_warp(x)[warps, first].reshape(-1) for x in (block.addresses(operand), block.warps))


def _transposed(rows: Array, found: Instruction) -> Array:
    """Return tiles [warps, 8, 8] of two bytes, transposed if the instruction asks for it."""
    return rows.swapaxes(1, 2) if "trans" in found.parts else rows


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared b16")
def load_tiles(block: Block, found: Instruction) -> None:
    """Load tiles of 8 x 8 numbers of two bytes: a thread gets two neighbors of a row."""
    for tile, name in enumerate(registers_of(found.operands[0])):
        rows = block.shared.load(*_split_rows(block, found.operands[1], tile))
        numbers = _transposed(np.ascontiguousarray(rows).view(np.uint16).reshape(-1, TILE_ROWS, TILE_ROWS), found)
        pairs = np.stack([numbers[:, GROUP, PAIR], numbers[:, GROUP, PAIR + 1]], axis=2).reshape(-1, 2)
        block.write(name, block.expand(from_bytes(np.ascontiguousarray(pairs).view(np.uint8))), "b32")


def _split_rows(block: Block, operand: str, tile: int) -> tuple[Array, int, Array]:
    first, warps = _tile_places(block, operand, tile)
    return first, 2 * TILE_ROWS, warps


@instruction("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared b16")
def store_tiles(block: Block, found: Instruction) -> None:
    """Store tiles, as `load_tiles` loads them."""
    warps = block.active_warps
    for tile, name in enumerate(registers_of(found.operands[1])):
        bits = np.ascontiguousarray(to_bytes(block.read(name, "b32", is_used=True), 4))
        pairs = bits.view(np.uint16).reshape(-1, WARP, 2)[warps]
        numbers = np.zeros((len(pairs), TILE_ROWS, TILE_ROWS), np.uint16)
        numbers[:, GROUP, PAIR], numbers[:, GROUP, PAIR + 1] = pairs[:, :, 0], pairs[:, :, 1]
        rows = np.ascontiguousarray(_transposed(numbers, found)).view(np.uint8).reshape(-1, 2 * TILE_ROWS)
        first, of_rows = _tile_places(block, found.operands[0], tile)
        block.shared.store(first, rows, of_rows)


@instruction("mma", "sync aligned m16n8k16 row col f32 bf16 f16")
def multiply_tiles(block: Block, found: Instruction) -> None:
    """Compute A @ B + C for each warp; A: 16 x 16, B: 16 x 8. Source: "Matrix Fragments for mma.m16n8k16"."""
    _ = block.active_warps
    kind = found.parts[-2]
    if found.parts[-4:] != ("f32", kind, kind, "f32"):
        raise EmulatorError("unknown instruction")
    target, *sources = map(registers_of, found.operands)
    warps = block.num_threads // WARP
    a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for i, name in enumerate(sources[0]):
        for half, numbers in enumerate(decode(block.read(name, "b32", is_used=True), f"{kind}x2")):
            a[:, GROUP + i % 2 * 8, PAIR + i // 2 * 8 + half] = _by_warp(numbers)
    for i, name in enumerate(sources[1]):
        for half, numbers in enumerate(decode(block.read(name, "b32", is_used=True), f"{kind}x2")):
            b[:, PAIR + i * 8 + half, GROUP] = _by_warp(numbers)
    for i, name in enumerate(sources[2]):
        c[:, GROUP + i // 2 * 8, PAIR + i % 2] = _by_warp(block.read(name, "f32", is_used=True))
    product = a @ b + c
    for i, name in enumerate(target):
        block.write(name, product[:, GROUP + i // 2 * 8, PAIR + i % 2].reshape(-1), "f32")
