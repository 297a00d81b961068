"""The safetensors files of a folder: the files to read, and their headers."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen3fast.checkpoint.checks import no_weights
from qwen3fast.files import read_json
from qwen3fast.model.config import ModelConfig

logger = logging.getLogger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors_by_file(folder: Path) -> dict[Path, list[str]]:
    """Return the files to read, each with the names of the tensors that it should hold.

    A whole model.safetensors is read in place of an index that does not name it, as transformers does: merging or
    quantizing in place leaves such an index behind.
    Raises: FileNotFoundError for missing files; ValueError for an index that is damaged or leaves the folder.
    """
    whole, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not index.is_file():
        if not whole.is_file():
            raise no_weights(folder, f"{SINGLE_FILE} or {INDEX_FILE}")
        return {whole: names_in(whole)}
    try:
        by_file = _read_index(index)
    except ValueError:
        if not whole.is_file():
            raise
        by_file = {}
    if whole.is_file() and whole not in by_file:
        _tell_of_stale_index(folder)
        return {whole: names_in(whole)}
    absent = [file.name for file in by_file if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {INDEX_FILE}; download it again")
    return by_file


@functools.cache  # loading asks for the files several times
def _tell_of_stale_index(folder: Path) -> None:
    logger.warning("%s: reading %s; %s describes other files and is ignored", folder, SINGLE_FILE, INDEX_FILE)


def names_in(file: Path) -> list[str]:
    """Return the names of the tensors in a file. Raises: ValueError if it is damaged."""
    with open_tensors(file) as tensors:
        return list(tensors.keys())


def place_of(name: str) -> str:
    """Return the name that a tensor of a file has in a Qwen3ForCausalLM.

    Checkpoints of Qwen3Model leave "model." out; Qwen3-VL has "model.language_model." in its place.
    """
    if name.startswith("lm_head."):
        return name
    prefix = next((prefix for prefix in ("model.language_model.", "model.") if name.startswith(prefix)), "")
    return f"model.{name.removeprefix(prefix)}"


def open_tensors(file: Path) -> Any:
    """Open a safetensors file, memory-mapped.

    Raises: ValueError if it is damaged.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file} is damaged or truncated ({err}); download it again") from err


def refuse_size(config: ModelConfig, folder: Path) -> None:
    """Refuse a config.json of a model far larger than its files: its modules alone could fill the memory.

    Raises: ValueError if there is less than one bit per parameter, or a file is damaged.
    """
    files = tensors_by_file(folder)
    num_bytes = sum(file.stat().st_size for file in files)
    if config.num_parameters > 8 * num_bytes:
        for file in files:
            with open_tensors(file):
                pass  # a truncated file has an error of its own
        raise ValueError(
            f"{folder}: config.json describes {config.num_parameters:,} parameters, but the weights are {num_bytes:,} "
            "bytes; one of them is damaged or of another model: download both again"
        )


def has_output_projection(config: ModelConfig, folder: Path) -> bool:
    """Return whether a checkpoint has an output projection, tied or of its own. Raises: as `tensors_by_file`."""
    if config.tie_word_embeddings:
        return True
    return any(name.startswith("lm_head.") for names in tensors_by_file(folder).values() for name in names)


def has_other_head(folder: Path) -> bool:
    """Return whether the files hold an output projection that differs from the embedding.

    With tie_word_embeddings, transformers 5 warns of such a file and reads the model as untied.
    Raises: as `tensors_by_file`; ValueError for a damaged file.
    """
    places = {name: file for file in tensors_by_file(folder) for name in names_in(file)}
    embedding = next((name for name in places if place_of(name) == EMBEDDING), None)
    if embedding is None or HEAD not in places:
        return False
    stored = []
    for name in (embedding, HEAD):
        with open_tensors(places[name]) as tensors:
            stored.append(tensors.get_tensor(name))
    return stored[0].shape != stored[1].shape or not torch.equal(stored[0], stored[1].to(stored[0].dtype))


def _read_index(index: Path) -> dict[Path, list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map'")
    by_file: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or len(file) > 200:
            raise ValueError(f"{index}: {file!r:.300} must be a file name without folders")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index}: {file!r} is not a safetensors file; no others are read")
        by_file.setdefault(index.parent / file, []).append(name)
    return by_file
