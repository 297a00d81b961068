"""The outline of a checkpoint on the hub that is not downloaded: config.json, and the headers of its weights.

Its files of weights are as large as the real ones and hold no numbers: whatever reads headers takes them for real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from qwen3fast.checkpoint.safetensors import INDEX_FILE, tensors_by_file
from qwen3fast.checkpoint.source import HUB_ERRORS, HUB_ID, HUB_PATTERNS, NO_SAFETENSORS, not_on_hub, resolve_source


@contextmanager
def find_outline(source: str, revision: str | None = None) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of a checkpoint, or its GGUF file, and whether it is an outline, which is deleted afterwards.

    source, revision: as in `load_model`, random weights excluded.
    Raises: as `resolve_source`; FileNotFoundError for a hub id without safetensors.
    """
    folder = _downloaded(source, revision)
    if folder is not None:
        yield folder, False
        return
    with TemporaryDirectory(prefix="qwen3fast-") as temporary:
        outline = Path(temporary)
        try:
            patterns = ["config.json", INDEX_FILE]
            snapshot_download(source, revision=revision, allow_patterns=patterns, local_dir=outline)
            files = get_safetensors_metadata(source, revision=revision).files_metadata
        except HUB_ERRORS as err:
            raise not_on_hub(f"{source!r}", err) from err
        except (NotASafetensorsRepoError, SafetensorsParsingError) as err:
            raise FileNotFoundError(
                f"{source!r} has no safetensors on the hub that can be read ({err}); {NO_SAFETENSORS}"
            ) from err
        for name, header in files.items():
            if Path(name).name != name:
                raise ValueError(f"{source!r}, {INDEX_FILE}: {name!r:.300} must be a file name without folders")
            _write(outline / name, header.tensors)
        yield outline, True


def _downloaded(source: str, revision: str | None) -> Path | None:
    """Return the local folder or file of a checkpoint; None for a hub id whose weights are not all cached."""
    if Path(source).expanduser().exists() or not HUB_ID.fullmatch(source):
        return resolve_source(source, revision)
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=HUB_PATTERNS, local_files_only=True))
        tensors_by_file(folder)
    except (*HUB_ERRORS, ValueError):
        return None
    return folder


def _write(file: Path, tensors: dict[str, Any]) -> None:
    """Write a safetensors file of which only the header takes room on the disk. tensors: TensorInfo by name."""
    fields = ("dtype", "shape", "data_offsets")
    raw = json.dumps({name: {field: getattr(tensor, field) for field in fields} for name, tensor in tensors.items()})
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw.encode())
        out.truncate(out.tell() + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0))
