"""The header of a GGUF file: metadata and where each tensor lies. Every size is checked against the file's.

The reader of the package gguf trusts the sizes that a file states: a few damaged bytes make it loop for hours. Only its
names and sizes of types are used and, in tensors.py, its dequantization.
Source: the GGUF specification, docs/gguf.md of github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen3fast.checkpoint.gguf.tensors import StoredTensor, import_gguf

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT, MAX_DIMENSIONS = 32, 4
# Types of metadata by number, as struct names them.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Header:
    """Metadata by key, and tensors by name in the order of the file (of all files, where it is split)."""

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a value of the metadata, or the default.

        Raises: ValueError for a value of another type.
        """
        value = self.metadata.get(key, default)
        is_wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if key in self.metadata and is_wrong:
            raise ValueError(f"{self.file}: {key} has an unexpected type, got {value!r:.100}")
        return value


def read_header(file: Path) -> Header:
    """Return the header of a GGUF file; of a split one, given its first part, of all parts.

    Raises: ImportError without the package gguf; FileNotFoundError for a missing part; ValueError for a damaged file.
    """
    header = _read_one(file)
    count = header.get("split.count", int, 1)
    if count <= 1:
        return header
    name = PART_NAME.fullmatch(file.name)
    if name is None or int(name[3]) != count:
        raise ValueError(f"{file} is one of {count} parts, and must be named so: model-00001-of-{count:05}.gguf")
    parts = [file.with_name(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    if file != parts[0]:
        raise ValueError(f"{file} is not the first part; load {parts[0].name}")
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(f"{file.parent} lacks {', '.join(missing[:3])}{more}, parts of {file.name}")
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        for tensor in (header if part == file else _read_one(part)).tensors.values():
            if tensor.name in tensors:
                raise ValueError(f"{part}: {tensor.name} is in an earlier part already")
            tensors[tensor.name] = tensor
    return replace(header, tensors=tensors)


def _read_one(file: Path) -> Header:
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found")
    import_gguf()
    try:
        # Copy on write: changes of a tensor stay in memory.
        data = np.memmap(file, mode="c") if file.stat().st_size else np.empty(0, np.uint8)
        return _Reader(file, data).header()
    except ValueError as err:
        raise ValueError(f"{file} is not a GGUF file, or damaged or truncated: {err}") from err


class _Reader:
    """A walk through the bytes of a header. Whatever a file states, no more is read than it holds."""

    def __init__(self, file: Path, data: np.ndarray) -> None:
        self.file, self.data, self.view = file, data, memoryview(data.data)
        self.offset = 0

    def header(self) -> Header:
        """Read everything up to the tensors' data."""
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        version = self.number("I")
        if version not in VERSIONS:
            if struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS:
                raise ValueError("it is big-endian, which is not supported")
            raise ValueError(f"version {version} is not supported; supported: {VERSIONS}")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.strings(1)[0]
            if key in metadata:
                raise ValueError(f"{key!r} appears twice")
            metadata[key] = self.value(self.number("I"))
        stated = [self.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment must be a power of two from 8, got {alignment!r:.100}")
        start = -(-self.offset // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, type_number, offset in stated:
            if name in tensors:
                raise ValueError(f"tensor {name!r} appears twice")
            if offset % alignment:
                raise ValueError(f"tensor {name!r} begins at {offset}, not a multiple of {alignment}")
            tensors[name] = StoredTensor.of_file(self.file.name, name, shape, type_number, self.data, start + offset)
        return Header(self.file, metadata, tensors)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's name, shape in PyTorch's order, number of its type, and offset of its data."""
        name = self.strings(1)[0]
        dims = self.number("I")
        if not 1 <= dims <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]  # the fastest comes first in GGUF
        if math.prod(shape) < 1:
            raise ValueError(f"tensor {name!r} has shape {shape}")
        return name, shape, self.number("I"), self.number("Q")

    def take(self, count: int) -> memoryview:
        """Return the next bytes."""
        end = self.offset + count
        if end > len(self.view):
            raise ValueError(f"it ends at byte {len(self.view)}, inside its header")
        taken = self.view[self.offset : end]
        self.offset = end
        return taken

    def number(self, letter: str) -> Any:
        """Return the next number; letter: as in struct."""
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def value(self, kind: int) -> Any:
        """Return the next value of metadata, of this type."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.strings(1)[0]
        if kind != ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == STRING:
            return self.strings(count)
        if item not in SCALARS:
            raise ValueError(f"an array of the type {item}, which is not supported")
        letter = SCALARS[item]
        size = struct.calcsize("<" + letter)
        return np.frombuffer(self.take(count * size), np.dtype(letter).newbyteorder("<")).tolist()

    def strings(self, count: int) -> list[str]:
        """Return the next strings; a tokenizer has hundreds of thousands."""
        if count > len(self.view) // 8:
            raise ValueError(f"it states {count} strings, more than its size allows")
        view, offset, found = self.view, self.offset, []
        for _ in range(count):
            start = offset + 8
            length = int.from_bytes(view[offset:start], "little")
            offset = start + length
            if offset > len(view):
                raise ValueError(f"it ends at byte {len(view)}, inside its header")
            found.append(str(view[start:offset], "utf-8"))
        self.offset = offset
        return found
