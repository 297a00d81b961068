"""A block of threads that execute a program in lockstep."""

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
    """The registers, the shared memory and the progress of a block's threads.

    Threads that a branch sends elsewhere wait until all others have come as far: those that are behind run first.

    Attributes:
        active: the threads that execute the instruction. threads: their numbers. warps: the warp of each thread.
    """

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int],
        place: tuple[int, int],
        shared_bytes: int,
        memory: GlobalMemory,
        parameters: Sequence[int],
    ) -> None:
        self.memory, self.shared, self.parameters = memory, SharedMemory(shared_bytes), parameters
        self.num_threads = program.num_threads
        self.threads = np.arange(self.num_threads, dtype=np.uint64)
        self.warps = self.threads // np.uint64(WARP)
        self.active = np.ones(self.num_threads, bool)
        self._program = program
        self._next = np.zeros(self.num_threads, np.int64)  # each thread's next instruction
        self._registers = {"%tid.x": self.threads, "global_smem": np.zeros(self.num_threads, np.uint64)}
        for axis, size, number in zip("xy", grid, place, strict=True):
            self._registers[f"%nctaid.{axis}"] = np.full(self.num_threads, size, np.uint64)
            self._registers[f"%ctaid.{axis}"] = np.full(self.num_threads, number, np.uint64)
        self._partly: dict[str, Array] = {}  # of registers that not all threads have written: which have

    @property
    def is_whole(self) -> bool:
        """Whether all threads execute the instruction."""
        return bool(self.active.all())

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
                        self.active = arrived & (self.read(self._guard(found), "pred").astype(bool) ^ found.is_negated)
                    self._execute(found)
                except EmulatorError as err:
                    raise EmulatorError(f"{err}, at: {found.text}") from err

    def _guard(self, found: Instruction) -> str:
        return found.guard if found.guard in self._registers else f"%{found.guard}"

    def _execute(self, found: Instruction) -> None:
        known = INSTRUCTIONS.get(found.parts[0])
        if known is None or not known.parts.issuperset(found.parts[1:]):
            raise EmulatorError("unknown instruction")
        known.execute(self, found)

    def go(self, label: str | None) -> None:
        """Let the active threads continue at a label; for None, end."""
        end = len(self._program.instructions)
        self._next[self.active] = end if label is None else self._program.labels[label]

    def read(self, operand: str, kind: str, *, is_moved: bool = False) -> Array:
        """Return the numbers of a register or an immediate, of all threads.

        is_moved: a register that nothing wrote is all ones, which is NaN: compilers move halves that are not used.
        """
        bits = self._registers.get(operand)
        is_written = operand not in self._partly or self._partly[operand][self.active].all()
        if bits is None:
            value = next((parse(operand) for known, parse in IMMEDIATES if known.fullmatch(operand)), None)
            is_written, value = value is not None, -1 if value is None else value
            bits = np.full(self.num_threads, value & (2**64 - 1), np.uint64)
        if not is_written and not is_moved:
            raise EmulatorError(f"{operand} is read before it is written")
        return decode(bits, kind)

    def write(self, operand: str, numbers: Array, kind: str) -> None:
        """Write numbers of all threads to a register; those of threads that are not active are ignored."""
        if operand == "_":
            return
        bits = encode(numbers, kind)
        if self.is_whole:
            self._registers[operand] = bits
            self._partly.pop(operand, None)
            return
        before = self._registers.get(operand)
        if before is None:
            before, self._partly[operand] = np.full(self.num_threads, 2**64 - 1, np.uint64), self.active.copy()
        elif operand in self._partly:
            self._partly[operand] |= self.active
        self._registers[operand] = np.where(self.active, bits, before)

    def addresses(self, operand: str) -> Array:
        """Return the addresses, of all threads, that an operand such as "[ %rd1 + 16 ]" stands for."""
        found = ADDRESS.fullmatch(operand)
        if found is None:
            raise EmulatorError(f"unknown address {operand}")
        return self.read(found[1], "s64") + int(found[2] or "0", 0)

    def expand(self, numbers: Array) -> Array:
        """Return rows, which the active threads have, as rows of all threads."""
        every = np.zeros((self.num_threads, *numbers.shape[1:]), numbers.dtype)
        every[self.active] = numbers
        return every


def registers_of(operand: str) -> list[str]:
    """Return the registers of an operand such as "{ %r1, %r2 }" or "%r1"."""
    return [name.strip() for name in operand.strip("{ }").split(",")]
