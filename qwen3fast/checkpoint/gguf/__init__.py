"""GGUF files of llama.cpp (optional package gguf): header, config, tokenizer, layout of tensors, weights."""

from qwen3fast.checkpoint.gguf.config import config_of, generation_config_of
from qwen3fast.checkpoint.gguf.header import Header, read_header
from qwen3fast.checkpoint.gguf.layout import choose_formats, replace_layers
from qwen3fast.checkpoint.gguf.tokenizer import tokenizer_of
from qwen3fast.checkpoint.gguf.weights import load_gguf_weights

__all__ = [
    "Header",
    "choose_formats",
    "config_of",
    "generation_config_of",
    "load_gguf_weights",
    "read_header",
    "replace_layers",
    "tokenizer_of",
]
