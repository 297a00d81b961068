"""Calibrated checkpoints that are kept in the cache folder: written once, as a download is, and read by later loads.

A copy's name holds a digest of everything that its weights follow from: the files of the source, format, dtypes, and
the version of the quantizer. A source that changes gets another copy, in place of the one before. Copies that no load
has read for a long time are deleted when another one is written: other revisions of the hub, for example, and copies of
folders that were moved or deleted. Copies may be deleted at any time.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from qwen3fast.checkpoint.safetensors import tensors_by_file
from qwen3fast.checkpoint.save import COMPANIONS, save_model
from qwen3fast.kernels import forms_file
from qwen3fast.model import Qwen3

logger = logging.getLogger(__name__)

VERSION = 2  # of calibration: one more whenever the same source gets other weights
SPARE = 2**26  # bytes of the disk that stay free
UNREAD_DAYS = 90  # of a copy that is deleted
PRESET = "generation_config.json"  # for replies alone: calibration samples at temperature 1
FIRST_PART = re.compile(r"-00001-of-(\d{5}\.gguf)$")


def kept_root() -> Path:
    """Return the folder of all copies: `calibrated` in `$XDG_CACHE_HOME/qwen3fast`, or in `~/.cache/qwen3fast`.

    Raises: RuntimeError if there is no home folder.
    """
    return forms_file.path().parent / "calibrated"


@dataclass(frozen=True)
class KeptCopy:
    """The place of a calibrated copy.

    folder: a checkpoint in it, whole, or nothing. others: a pattern of the names of all copies of these files: this
    one, and older ones of files that have changed since.
    """

    folder: Path
    others: str

    @classmethod
    def of(cls, source: Path, adapter: Sequence[Path] = (), **made_with: Any) -> KeptCopy:
        """Return the place of a source's copy.

        source: a folder or GGUF file, as `resolve_source` returns it. adapter: files of one that is merged into it.
        made_with: what else the weights follow from.
        Raises: FileNotFoundError or ValueError for missing or damaged files of the source; RuntimeError if there is no
        home folder.
        """
        names = {"config.json", *COMPANIONS} - {PRESET} if source.is_dir() else set()  # a GGUF file has them in it
        small = {name: _digest(file.read_bytes()) for name in sorted(names) if (file := source / name).is_file()}
        way = {name: str(value) for name, value in made_with.items()}
        files = _statuses([*_weight_files(source), *adapter])
        made = _digest(json.dumps([[path for path, *_ in files], way], sort_keys=True).encode())[:12]
        identity = [VERSION, files, small, way]
        digest = _digest(json.dumps(identity, sort_keys=True).encode())[:20]
        name = re.sub(r"[^\w.-]", "_", _name_of(source))[:80].lstrip(".")
        return cls(kept_root() / f"{name}-{made}-{digest}", f"{name}-{made}-*")

    def exists(self) -> bool:
        """Return whether there is a copy that can be read."""
        return os.access(self.folder / "config.json", os.R_OK)  # Path.is_file raises in another user's folder

    def why_not(self, num_bytes: int) -> str | None:
        """Return why no copy of this size can be written; None if it can."""
        root = self.folder.parent
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
            free = shutil.disk_usage(root).free
        except OSError as err:
            return f"{root} cannot be written ({err})"
        if free < num_bytes + SPARE:
            return f"{root} has {free / 1e9:.1f} GB of free space, and {(num_bytes + SPARE) / 1e9:.1f} GB are needed"
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process writes this copy, and keep others waiting; parts that a killed one left go.

        The lock file stays, empty: a waiting process may have opened it, and once it were unlinked, a third process
        would lock another file of that name. Only recent versions of filelock notice that.
        """
        root, name = self.folder.parent, self.folder.name
        with WeakFileLock(root / f".{name}.lock"):
            for left in root.glob(f".{name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    def write(self, model: Qwen3, calibration_tokens: int) -> None:
        """Write the copy, whole or not at all. Raises: OSError if that fails."""
        root, name = self.folder.parent, self.folder.name
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as temporary:
            whole = Path(temporary) / "copy"
            save_model(model, whole, calibration_tokens=calibration_tokens)
            if self.folder.exists():
                shutil.rmtree(self.folder)
            whole.rename(self.folder)
        self.mark_as_read()
        oldest = time.time() - UNREAD_DAYS * 24 * 3600
        changed = set(root.glob(self.others)) - {self.folder}
        for other in sorted(changed):
            _delete(other, "a newer copy replaces it")
        for other in sorted(set(root.iterdir()) - changed):  # hidden ones are parts that a killed process left
            with suppress(OSError):
                if other.is_dir() and other.stat().st_mtime < oldest:
                    _delete(other, f"no load has read it for {UNREAD_DAYS} days")

    def mark_as_read(self) -> None:
        """Set the time of the last load, by which unread copies are found."""
        with suppress(OSError):  # of a folder that cannot be written
            os.utime(self.folder)


def _delete(copy: Path, reason: str) -> None:
    logger.info("%s is deleted: %s", copy, reason)
    shutil.rmtree(copy, ignore_errors=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _weight_files(source: Path) -> list[Path]:
    """Return the files of a folder with weights, or a GGUF file, or all of its parts."""
    if source.is_dir():
        return list(tensors_by_file(source))
    begin, *end = FIRST_PART.split(source.name)
    return list(source.parent.glob(f"{glob.escape(begin)}-*-of-{end[0]}")) if end else [source]


def _statuses(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of the last change, in nanoseconds, of each file; links are followed."""
    resolved = sorted(file.resolve() for file in files)
    return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in resolved]


def _name_of(source: Path) -> str:
    """Return a name for people: of the model on the hub, or the folder or file."""
    source = source.resolve()
    in_hub_cache = [part for part in source.parts if part.startswith("models--")]
    if in_hub_cache:
        return in_hub_cache[-1].removeprefix("models--")
    return source.name if source.is_dir() else source.stem
