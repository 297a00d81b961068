"""Blocks of threads that execute a program in lockstep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from compile_for_gpu.emulator.memory import GlobalMemory, SharedMemory
from compile_for_gpu.emulator.numbers import Array, decode, encode
from compile_for_gpu.emulator.program import EmulatorError, Instruction, Program

WARP = 32  # threads
ADDRESS = re.compile(r"\[\s*(%?[\w@]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
IMMEDIATES = (
    (re.compile(r"-?\d+"), lambda text: int(text)),
    (re.compile(r"0[xX][0-9a-fA-F]+U?"), lambda text: int(text.rstrip("U"), 16)),
    (re.compile(r"0[fd][0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
)

Execute = Callable[["Block", Instruction], None]


class Known(NamedTuple):
    """A known instruction: its meaning, and the parts that its name may have."""

    execute: Execute
    parts: frozenset[str]


INSTRUCTIONS: dict[str, Known] = {}


def instruction(names: str, parts: str = "") -> Callable[[Execute], Execute]:
    """Return a decorator: the function executes instructions with these names and no other parts than these."""

    def register(execute: Execute) -> Execute:
        for name in names.split():
            INSTRUCTIONS[name] = Known(execute, frozenset(parts.split()))
        return execute

    return register


class Block:
    """The registers, the shared memory and the progress of the threads of one or more blocks of a grid.

    Threads that a branch sends elsewhere wait until all others have come as far: those that are behind run first.
    NumPy takes hardly longer for many threads than for few: the blocks run side by side.

    Attributes:
        active: the threads that execute the instruction. num_threads: of all blocks. warps: the warp of each thread.
        blocks: the block of each thread, from 0.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        places: Sequence[tuple[int, int, int]],
        shared_bytes: int,
        memory: GlobalMemory,
        parameters: Sequence[int],
    ) -> None:
        count, size = len(places), program.num_threads
        self.memory, self.parameters = memory, parameters
        self.shared = SharedMemory(shared_bytes, count, -(-size // WARP))
        self.num_blocks, self.num_threads = count, count * size
        threads = np.arange(self.num_threads, dtype=np.uint64)
        self.warps, self.blocks = threads // np.uint64(WARP), (threads // np.uint64(size)).astype(np.int64)
        self._everywhere = np.ones(self.num_threads, bool)
        self.active = self._everywhere
        self._program = program
        self._next = np.zeros(self.num_threads, np.int64)  # each thread's next instruction
        self._registers = {"%tid.x": threads % np.uint64(size), "global_smem": np.zeros(self.num_threads, np.uint64)}
        for i, axis in enumerate("xyz"):
            self._registers[f"%nctaid.{axis}"] = np.full(self.num_threads, grid[i], np.uint64)
            self._registers[f"%ctaid.{axis}"] = np.array([place[i] for place in places], np.uint64)[self.blocks]
        self._known: dict[str, Array] = {}  # of registers whose number is not known in all threads: in which it is
        self._operands_known = self._everywhere  # in which threads all that the instruction has read is known

    @property
    def is_whole(self) -> bool:
        """True if all threads execute the instruction."""
        return bool(self.active.all())

    @property
    def active_warps(self) -> Array:
        """For each warp, True if it executes the instruction. Raises: EmulatorError if only some of its threads do."""
        by_warp = self.active.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any():
            raise EmulatorError("not all threads execute an instruction of whole warps")
        return by_warp.all(1)

    @property
    def active_blocks(self) -> Array:
        """The numbers of the blocks of which threads execute the instruction."""
        return np.unique(self.blocks[self.active])

    def run(self) -> None:
        """Execute the program, until all threads have returned."""
        program = self._program
        self.memory.may_access_all = all(found.parts[0] != "griddepcontrol" for found in program.instructions)
        with np.errstate(all="ignore"):
            while (place := int(self._next.min())) < len(program.instructions):
                found, arrived = program.instructions[place], self._next == place
                self._next[arrived] = place + 1
                self.active = arrived
                try:
                    if found.guard:
                        guard = self.read(found.guard, "pred", is_used=True).astype(bool)
                        self.active = arrived & (guard ^ found.is_negated)
                    self._operands_known = self._everywhere
                    self._execute(found)
                except EmulatorError as err:
                    raise EmulatorError(f"{err}, at: {found.text}") from err

    def _execute(self, found: Instruction) -> None:
        known = INSTRUCTIONS.get(found.parts[0])
        if known is None or not known.parts.issuperset(found.parts[1:]):
            raise EmulatorError("unknown instruction")
        known.execute(self, found)

    def go(self, label: str | None) -> None:
        """Let the active threads continue at a label; for None, end."""
        end = len(self._program.instructions)
        self._next[self.active] = end if label is None else self._program.labels[label]

    def known(self, operand: str) -> Array:
        """Return in which threads the number of an operand is known: computed from numbers that were written."""
        if operand in self._known:
            return self._known[operand]
        is_there = operand in self._registers or any(form.fullmatch(operand) for form, _ in IMMEDIATES)
        return self._everywhere if is_there else ~self._everywhere

    def read(self, operand: str, kind: str, *, is_used: bool = False, is_moved: bool = False) -> Array:
        """Return the numbers of a register or an immediate, of all threads. Unknown ones are all ones (NaN) at first.

        is_used: unknown numbers are an error; otherwise what the instruction writes is unknown as well. Compilers
        compute with them where the result is not needed. is_moved: they are NaN from now on, and count as known: such
        are halves of registers that are not needed.
        """
        bits = self._registers.get(operand)
        known = self.known(operand)
        if is_used and not known[self.active].all():
            raise EmulatorError(f"{operand} depends on a register that nothing wrote")
        if not is_moved:
            self._operands_known = self._operands_known & known
        if bits is None:
            value = next((parse(operand) for form, parse in IMMEDIATES if form.fullmatch(operand)), -1)
            bits = np.full(self.num_threads, value & (2**64 - 1), np.uint64)
        return decode(bits, kind)

    def write(self, operand: str, numbers: Array, kind: str, known: Array | None = None) -> None:
        """Write numbers of all threads to a register; numbers of threads that are not active are ignored.

        known: in which threads they are; by default where all operands are.
        """
        if operand == "_":
            return
        bits, known = encode(numbers, kind), self._operands_known if known is None else known
        if not self.is_whole:
            before = self._registers.get(operand, np.full(self.num_threads, 2**64 - 1, np.uint64))
            bits, known = np.where(self.active, bits, before), np.where(self.active, known, self.known(operand))
        self._registers[operand] = bits
        if known.all():
            self._known.pop(operand, None)
        else:
            self._known[operand] = known

    def addresses(self, operand: str) -> Array:
        """Return the addresses, of all threads, that an operand such as "[ %rd1 + 16 ]" stands for."""
        found = ADDRESS.fullmatch(operand)
        if found is None:
            raise EmulatorError(f"unknown address {operand}")
        return self.read(found[1], "s64", is_used=True) + int(found[2] or "0", 0)

    def expand(self, numbers: Array) -> Array:
        """Return rows, which the active threads have, as rows of all threads."""
        every = np.zeros((self.num_threads, *numbers.shape[1:]), numbers.dtype)
        every[self.active] = numbers
        return every


def registers_of(operand: str) -> list[str]:
    """Return the registers of an operand such as "{ %r1, %r2 }" or "%r1"."""
    return [name.strip() for name in operand.strip("{ }").split(",")]
