"""Where weights come from: a hub id, a local folder, the shipped tiny model or random numbers -> a Qwen3 module."""

from qwen3fast.checkpoint.load import choose_device, load_model
from qwen3fast.checkpoint.lora import merge_lora
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checkpoint.weights import load_weights

__all__ = ["choose_device", "load_model", "load_weights", "merge_lora", "random_model", "resolve_source"]
