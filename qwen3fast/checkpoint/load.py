"""Load the bare model of any source, on a device, in a dtype."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen3fast.checkpoint.choices import choose_device, choose_dtype
from qwen3fast.checkpoint.gguf import choose_formats, config_of, read_header, replace_layers
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.loaders import Loader, refuse_other_format
from qwen3fast.checkpoint.lora import LoraConfig, merge_lora
from qwen3fast.checkpoint.safetensors import has_output_projection
from qwen3fast.checkpoint.source import resolve_adapter, resolve_source
from qwen3fast.checkpoint.stored_formats import use_stored_formats
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.parallel import Ranks, connect
from qwen3fast.quantization import DEQUANTIZE, get_format, prepare_quantization, quantize_model
from qwen3fast.quantization.ordered import add_empty_orders


def load_model(
    source: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: bool = False,
    quantization: str | None = None,
    output_projection: bool = True,
    adapter: str | Path | None = None,
    check_weights: bool = False,
    ranks: Ranks | None = None,
) -> Qwen3:
    """Load the bare model, in 4 bits without calibration; arguments and errors as in `qwen3fast.load_model`."""
    chosen_device = choose_device(device)
    format = None if quantization == DEQUANTIZE else quantization
    if format is not None:
        prepare_quantization(format, chosen_device)
    if adapter is not None:
        adapter = resolve_adapter(adapter)
        LoraConfig.from_folder(adapter)  # refused before weights are read
    loader = Loader(
        chosen_device, dtype, quantization, output_projection, adapter is not None, check_weights, ranks, progress
    )
    if str(source).startswith("random:"):
        model, split = loader.load_random(str(source))
    elif (folder := resolve_source(source, revision)).is_file():
        model, split = loader.load_gguf(folder), None
    else:
        stored = CheckpointConfig.from_folder(folder)
        model, split = loader.load_folder(folder, stored)
        if stored.quantization is not None:
            format = None  # quantized already, except for the layers that are to stay plain
    if adapter is not None:
        merge_lora(model, adapter, check_weights)
    if format is not None:
        quantize_model(model, format, choose_dtype(dtype, model.config), progress)
    if split is not None and ranks is not None:
        connect(model, split, ranks)
    return model


def empty_model(source: Path, quantization: str | None = None) -> Qwen3:
    """Return the model on meta, its layers in the formats that `load_model` gives them.

    A folder whose files hold no output projection gets none.

    source: as `resolve_source` returns it. quantization: the format for layers that are quantized in the files; None
    for the usual one. Other layers stay as they are.
    Raises: FileNotFoundError or ValueError, as `load_model`.
    """
    if source.is_file():
        header = read_header(source)
        model = build_on_meta(config_of(header))
        formats = choose_formats(header, model.config, None)
        if formats and quantization is not None:
            formats = choose_formats(header, model.config, quantization)
        replace_layers(model, formats, model.config.dtype)
        return model
    stored = CheckpointConfig.from_folder(source)
    refuse_other_format(stored, quantization, source)
    format, kept = (
        None if stored.quantization is None else get_format(stored.quantization),
        stored.modules_to_not_convert,
    )
    theirs = stored.prequantized
    if theirs is not None:  # as usual; only the tensors tell which others are plain
        format, kept = theirs.as_format(get_format(quantization or theirs.loaded_as)), ("model.embed_tokens", "lm_head")
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
