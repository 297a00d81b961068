"""Global memory, and a block's shared memory, both of which check each access."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from compile_for_gpu.emulator.numbers import Array
from compile_for_gpu.emulator.program import EmulatorError

OUTSIDE, EMPTY, WRITTEN, CONSTANT = range(4)  # a byte's state
GAP = 4096  # bytes between buffers, which are aligned to as many
POISON = 0xFF  # of bytes that nothing wrote


class GlobalMemory:
    """The buffers of kernels.

    may_access_all: False until a kernel has waited for the previous one: it may only read constants.
    """

    def __init__(self) -> None:
        self._bytes, self._state = np.zeros(GAP, np.uint8), np.full(GAP, OUTSIDE, np.uint8)
        self.may_access_all = True

    def place(self, array: Array, is_constant: bool = False) -> int:
        """Return the address of a copy. is_constant: kernels must not write it, and may read it at any time."""
        address = self.reserve(array.nbytes)
        self._bytes[address : address + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self._state[address : address + array.nbytes] = CONSTANT if is_constant else WRITTEN
        return address

    def reserve(self, size: int) -> int:
        """Return the address of memory that must be written before it is read."""
        address = len(self._bytes)
        padded = -(-size // GAP) * GAP + GAP
        self._bytes = np.concatenate([self._bytes, np.full(padded, POISON, np.uint8)])
        self._state = np.concatenate([self._state, np.full(padded, OUTSIDE, np.uint8)])
        self._state[address : address + size] = EMPTY
        return address

    def read(self, address: int, size: int) -> Array:
        """Return a buffer's bytes; `POISON` where nothing was written."""
        return self._bytes[address : address + size].copy()

    def check(self, first: Array, size: int, *, is_write: bool = False) -> Array:
        """Return the places of `size` bytes from each address, which a kernel may access."""
        places = _places(first, size, len(self._bytes))
        states = self._state[places]
        if (states == OUTSIDE).any():
            raise EmulatorError("access outside of the buffers")
        if is_write and (states == CONSTANT).any():
            raise EmulatorError("write to a constant")
        if not is_write and (states == EMPTY).any():
            raise EmulatorError("read of memory that nothing wrote")
        if not self.may_access_all and (is_write or (states != CONSTANT).any()):
            raise EmulatorError("access before waiting for the previous kernel")
        return places

    def load(self, first: Array, size: int) -> Array:
        """Return the bytes at each address, [addresses, size]."""
        return self._bytes[self.check(first, size)]

    def store(self, first: Array, data: Array) -> None:
        """Write bytes [addresses, size]."""
        places = self.check(first, data.shape[1], is_write=True)
        self._bytes[places], self._state[places] = data, WRITTEN


class SharedMemory:
    """The shared memory of blocks.

    Between two barriers, one warp must not access what another of its block writes, unless both write the same.
    Of each byte it holds the warps that have read and written it since the last barrier, a bit each. An asynchronous
    copy is written when it is waited for.
    """

    def __init__(self, size: int, blocks: int = 1, warps: int = 32) -> None:
        """size: bytes of a block. warps: of a block."""
        self._size, self._warps = size, warps
        self._bytes, self._is_written = np.full(blocks * size, POISON, np.uint8), np.zeros(blocks * size, bool)
        self._readers, self._writers = np.zeros(blocks * size, np.uint32), np.zeros(blocks * size, np.uint32)
        self._copies = np.zeros(blocks * size, np.uint32)  # of each byte, on their way
        self._issued: list[list[tuple[Array, Array, Array]]] = [[] for _ in range(blocks)]
        self._groups: list[list[list[tuple[Array, Array, Array]]]] = [[] for _ in range(blocks)]

    def load(self, first: Array, size: int, warps: Array) -> Array:
        """Return the bytes at each address, [addresses, size]; warps: which of all blocks' warps read each."""
        places, own = self._located(first, size, warps)
        if not self._is_written[places].all():
            raise EmulatorError("read of shared memory that nothing wrote")
        if (self._writers[places] & ~own).any():
            raise EmulatorError("read of shared memory that another warp writes, without a barrier")
        if self._copies[places].any():
            raise EmulatorError("read of shared memory that a copy is on its way to")
        np.bitwise_or.at(self._readers, places, own)
        return self._bytes[places]

    def store(self, first: Array, data: Array, warps: Array) -> None:
        """Write bytes [addresses, size]."""
        places, own = self._checked(first, data.shape[1], warps)
        others = self._writers[places] & ~own
        if (others.astype(bool) & (self._bytes[places] != data)).any():
            raise EmulatorError("write to shared memory that another warp writes, without a barrier")
        self._write(places, data, own)

    def copy(self, first: Array, data: Array, warps: Array) -> None:
        """Begin to write bytes [addresses, size]."""
        places, own = self._checked(first, data.shape[1], warps)
        np.add.at(self._copies, places, 1)
        blocks = warps // self._warps
        for block in np.unique(blocks):
            of_block = blocks == block
            self._issued[int(block)].append((places[of_block], data[of_block], own[of_block]))

    def commit_copies(self, blocks: Iterable[int]) -> None:
        """Make a group of the copies that each block has begun since its last group."""
        for block in blocks:
            self._groups[block].append(self._issued[block])
            self._issued[block] = []

    def wait_for_copies(self, blocks: Iterable[int], groups: int) -> None:
        """End the copies of all groups of each block except for the last ones."""
        for block in blocks:
            while len(self._groups[block]) > groups:
                for places, data, own in self._groups[block].pop(0):
                    np.subtract.at(self._copies, places, 1)
                    self._write(places, data, own)

    def barrier(self, blocks: Array) -> None:
        """Make all writes of blocks visible to all their warps."""
        for bits in (self._readers, self._writers):
            bits.reshape(len(self._groups), self._size)[blocks] = 0

    def _located(self, first: Array, size: int, warps: Array) -> tuple[Array, Array]:
        """Return the places of bytes and the bits of their warps."""
        block, warp = np.divmod(warps.astype(np.int64), self._warps)
        places = _places(first, size, self._size) + (block * self._size)[:, None]
        return places, (np.uint32(1) << warp.astype(np.uint32))[:, None]

    def _checked(self, first: Array, size: int, warps: Array) -> tuple[Array, Array]:
        places, own = self._located(first, size, warps)
        if (self._readers[places] & ~own).any():
            raise EmulatorError("write to shared memory that another warp reads, without a barrier")
        return places, own

    def _write(self, places: Array, data: Array, own: Array) -> None:
        self._bytes[places], self._is_written[places] = data, True
        np.bitwise_or.at(self._writers, places, own)


def _places(first: Array, size: int, limit: int) -> Array:
    """Return the places of bytes, [addresses, size]."""
    first = first.astype(np.int64)
    if (first < 0).any() or (first + size > limit).any():
        raise EmulatorError("access outside of the buffers")
    if (first % size).any():
        raise EmulatorError(f"access of {size} bytes that is not aligned to them")
    return first[:, None] + np.arange(size)
