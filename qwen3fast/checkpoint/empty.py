"""The model of a checkpoint without its weights: layers, formats and sizes, read from small files and headers."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen3fast.checkpoint.gguf.config import config_of
from qwen3fast.checkpoint.gguf.header import read_header
from qwen3fast.checkpoint.gguf.layout import choose_formats, replace_layers
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.loaders import check_lossless, refuse_other_format
from qwen3fast.checkpoint.safetensors import has_output_projection
from qwen3fast.checkpoint.stored_formats import use_stored_formats
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.quantization.convert import get_format, quantize_model
from qwen3fast.quantization.ordered import add_empty_orders


def empty_model(source: Path, quantization: str | None = None) -> Qwen3:
    """Return the model on meta, its layers in the formats that a `Loader` gives them.

    A folder whose files hold no output projection gets none.

    source: as `resolve_source` returns it. quantization: the format for layers that are quantized in the files; None
    for the usual one. Other layers stay as they are.
    Raises: FileNotFoundError or ValueError, as `load_model`.
    """
    if source.is_file():
        header = read_header(source)
        model = build_on_meta(config_of(header))
        check_lossless(quantization, model.config.dtype, model.config, source)
        formats = choose_formats(header, model.config, None)
        if formats and quantization is not None:
            formats = choose_formats(header, model.config, quantization)
        replace_layers(model, formats, model.config.dtype)
        return model
    stored = CheckpointConfig.from_folder(source)
    refuse_other_format(stored, quantization, source)
    theirs = stored.prequantized
    check_lossless(quantization, torch.bfloat16, stored.model, source if theirs is not None else None)
    format, kept = None, stored.modules_to_not_convert
    if theirs is not None:
        format = theirs.as_format(get_format(quantization or theirs.loaded_as))
        kept = ("model.embed_tokens", "lm_head")  # as usual; only the tensors tell which others are plain
    elif stored.quantization is not None:
        format = get_format(stored.quantization)
    model = build_on_meta(stored.model)
    if any(source.glob("*.safetensors")) and not has_output_projection(stored.model, source):  # else config.json alone
        model.register_module("lm_head", None)
    if format is not None:
        has_orders = theirs is not None and theirs.has_scattered_groups and theirs.keeps_numbers(format.name)
        quantize_model(model, format, model.config.dtype, modules_to_not_convert=kept)
        if has_orders:
            add_empty_orders(model)
        if theirs is not None and quantization is not None:
            quantize_model(model, quantization, model.config.dtype)
    if stored.quantization is not None:
        use_stored_formats(model, source)
    return model
