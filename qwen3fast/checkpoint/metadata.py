"""Config, tokenizer and sampling preset of a checkpoint: a folder in Hugging Face layout, or a GGUF file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from qwen3fast.checkpoint.gguf.config import config_of, generation_config_of
from qwen3fast.checkpoint.gguf.header import read_header
from qwen3fast.checkpoint.gguf.tokenizer import tokenizer_of
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.random_weights import parse_random
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checkpoint.vocab_files import has_vocab_files, tokenizer_from_vocab
from qwen3fast.files import read_json
from qwen3fast.model.config import ModelConfig
from qwen3fast.text.tokenizer import Tokenizer

TOKENIZER_FILES = "tokenizer.json, or vocab.json and merges.txt"


def read_config(source: str | Path, revision: str | None = None) -> ModelConfig:
    """Return the numbers of a model without loading its weights.

    source, revision: as in `load_model`.
    Raises: FileNotFoundError if it does not exist; ValueError for a config that is damaged or not supported.
    """
    if str(source).startswith("random:"):
        return parse_random(str(source))[0]
    return read_checkpoint_config(resolve_source(source, revision)).model


def read_checkpoint_config(source: Path) -> CheckpointConfig:
    """Return the numbers of the model and the storage of its weights; source: as `resolve_source` gives it.

    Raises: FileNotFoundError or ValueError, as `read_config`.
    """
    if source.is_file():
        return CheckpointConfig(config_of(read_header(source)))
    return CheckpointConfig.from_folder(source)


def read_tokenizer(source: Path) -> Tokenizer:
    """Return the tokenizer with its chat template; without tokenizer.json, the one of vocab.json and merges.txt.

    Raises: FileNotFoundError or ValueError, as `Tokenizer.from_folder`.
    """
    if source.is_file():
        return tokenizer_of(read_header(source))
    if not (source / "tokenizer.json").is_file() and has_vocab_files(source):
        return Tokenizer.from_folder(source, tokenizer_from_vocab(source))
    return Tokenizer.from_folder(source)


def has_tokenizer(source: Path) -> bool:
    """Return whether a checkpoint has a tokenizer; in a GGUF file, it may be one that is not supported."""
    return source.is_file() or (source / "tokenizer.json").is_file() or has_vocab_files(source)


def find_tokenizer(source: Path) -> Tokenizer | None:
    """Return the tokenizer, or None, with a warning, for a folder that holds none.

    Raises: ValueError for a tokenizer that cannot be read.
    """
    if has_tokenizer(source):
        return read_tokenizer(source)
    warnings.warn(
        f"{source} holds no tokenizer ({TOKENIZER_FILES}): prompts must be token ids, and replies have no text",
        stacklevel=3,
    )
    return None


def read_generation_config(source: Path) -> dict[str, Any] | None:
    """Return the preset for sampling, None if there is none.

    Raises: ValueError if it cannot be read.
    """
    if source.is_file():
        return generation_config_of(read_header(source))
    file = source / "generation_config.json"
    return read_json(file) if file.is_file() else None


def write_tokenizer_files(source: Path, folder: Path) -> None:
    """Write tokenizer and sampling preset of a GGUF file as the files of a folder in Hugging Face layout."""
    tokenizer, preset = read_tokenizer(source), read_generation_config(source)
    tokenizer.base.save(str(folder / "tokenizer.json"))
    settings = {**tokenizer.special_tokens, "chat_template": tokenizer.chat_template}
    _write_json(folder / "tokenizer_config.json", settings)
    if preset is not None:
        _write_json(folder / "generation_config.json", preset)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
