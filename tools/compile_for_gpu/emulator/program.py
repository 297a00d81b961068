"""The instructions of a kernel, read from its PTX."""

from __future__ import annotations

import re
from typing import NamedTuple

STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
LABEL = re.compile(r"(\$\w+):")
IGNORED = (".loc", ".file", ".pragma", ".section")


class EmulatorError(Exception):
    """A kernel that the emulator does not know how to run, or one that does what it must not."""


class Instruction(NamedTuple):
    """An instruction: `parts` are its name and modifiers; operands in braces or brackets are one each.

    guard: the predicate of the threads that execute it, or that do not if it is negated; "" for all.
    """

    guard: str
    is_negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def type(self) -> str:
        """The last part, the type of the operands."""
        return self.parts[-1]


class Program(NamedTuple):
    """A kernel's instructions, its labels as places between them, and its number of threads."""

    instructions: list[Instruction]
    labels: dict[str, int]
    num_threads: int

    @classmethod
    def parse(cls, ptx: str) -> Program:
        """Return the program of PTX with one kernel. Raises: EmulatorError if a statement cannot be read."""
        threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
        if threads is None or ptx.count(".entry") != 1:
            raise EmulatorError("expected PTX with one kernel and its number of threads")
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        scopes = _Scopes()
        for statement in _statements(ptx[ptx.index(".entry") :]):
            if label := LABEL.fullmatch(statement):
                labels[label[1]] = len(instructions)
            elif statement in ("{", "}"):
                scopes.enter() if statement == "{" else scopes.leave()
                if scopes.depth == 0:
                    break
            elif statement.startswith(".reg"):
                scopes.declare(statement)
            elif statement.startswith(".param"):  # an argument of a call
                continue
            elif found := STATEMENT.fullmatch(statement):
                negated, guard, name, operands = found.groups()
                split = tuple(_split(scopes.renamed(operands)))
                parts = tuple(name.split("."))
                instructions.append(Instruction(scopes.renamed(guard or ""), negated == "!", parts, split, statement))
            else:
                raise EmulatorError(f"cannot read: {statement}")
        return cls(instructions, labels, int(threads[1]))


class _Scopes:
    """The blocks in braces that inline assembly has: each has names of its own."""

    def __init__(self) -> None:
        self._names: list[dict[str, str]] = []
        self._count = 0

    @property
    def depth(self) -> int:
        return len(self._names)

    def enter(self) -> None:
        self._names.append(dict(self._names[-1]) if self._names else {})
        self._count += 1

    def leave(self) -> None:
        self._names.pop()

    def declare(self, statement: str) -> None:
        """Take note of names such as "a, b<3>"; registers of the compiler begin with % and have one scope."""
        for name, count in re.findall(r"(?<![%.\w])([A-Za-z]\w*)(?:<(\d+)>)?", statement.split(None, 2)[2]):
            for own in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                self._names[-1][own] = f"{own}@{self._count}"

    def renamed(self, operands: str) -> str:
        """Return operands in which local names are unique."""
        names = self._names[-1]
        return re.sub(r"(?<![%.\w])[A-Za-z]\w*", lambda found: names.get(found[0], found[0]), operands)


def _statements(kernel: str) -> list[str]:
    """Return statements, labels and braces of scopes; without comments and debug information."""
    found, unfinished = [], ""
    lines = [line.partition("//")[0].strip() for line in kernel[kernel.index("{") :].splitlines()]
    for line in lines:
        if not line or line.startswith(IGNORED):
            continue
        if not unfinished and (line in ("{", "}") or LABEL.fullmatch(line)):
            found.append(line)
            continue
        *ended, unfinished = f"{unfinished} {line}".strip().split(";")
        found += [statement.strip() for statement in ended if statement.strip()]
    return found


def _split(operands: str) -> list[str]:
    """Return operands between commas, in order; a comma in brackets or braces does not separate."""
    found = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands)
    return [operand.strip() for operand in found if operand.strip()]
