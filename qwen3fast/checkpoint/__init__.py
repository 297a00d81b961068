"""Checkpoints: a hub id, a folder, a GGUF file, the shipped tiny model or random numbers -> a model."""

from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.checkpoint.empty import empty_model
from qwen3fast.checkpoint.fill import load_weights
from qwen3fast.checkpoint.hf_config import CheckpointConfig, as_id_tuple
from qwen3fast.checkpoint.lora import merge_lora
from qwen3fast.checkpoint.metadata import (
    find_tokenizer,
    has_tokenizer,
    read_checkpoint_config,
    read_config,
    read_generation_config,
    read_tokenizer,
)
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.source import resolve_source

__all__ = [
    "CheckpointConfig",
    "as_id_tuple",
    "choose_device",
    "empty_model",
    "find_tokenizer",
    "has_tokenizer",
    "load_weights",
    "merge_lora",
    "random_model",
    "read_checkpoint_config",
    "read_config",
    "read_generation_config",
    "read_tokenizer",
    "resolve_source",
]
