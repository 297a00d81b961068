"""Load the bare model of any source, on a device, in a dtype."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from qwen3fast.checkpoint.choices import choose_device, choose_dtype
from qwen3fast.checkpoint.gguf import choose_formats, config_of, read_header, replace_layers
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.checkpoint.lora import LoraConfig, merge_lora
from qwen3fast.checkpoint.source import resolve_adapter, resolve_source
from qwen3fast.checkpoint.stored_formats import use_stored_formats
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.parallel import Ranks, connect
from qwen3fast.quantization import DEQUANTIZE, get_format, prepare_quantization, quantize_model
from qwen3fast.quantization.calibrate import CALIBRATED
from qwen3fast.quantization.ordered import add_empty_orders

logger = logging.getLogger(__name__)


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
    """Load the bare model: a hub id, a local folder or .gguf file, "tiny", or "random:0.6b".

    "random:0.6b" is a named shape with random weights; "random:0.6b:7" has seed 7.

    Args:
        source: see above.
        device: "auto" takes CUDA where there is one.
        dtype: of weights and activations: "auto" (the checkpoint's), "bfloat16", "float16", "float32", or a dtype.
        revision: a branch, tag or commit on the hub.
        progress: show a bar while weights load.
        quantization: "int8", "int4", "uint4" or, on CUDA devices, "fp8" quantizes the weights while loading;
            `python -m qwen3fast quantize` corrects errors of 4 bits, in minutes instead of seconds. None keeps
            the format of checkpoints that `save_quantized` wrote. Of checkpoints that other software quantized (fp8,
            AWQ, GPTQ, compressed-tensors), None loads symmetric 4-bit levels in int4 (the same levels, scales rounded
            to bfloat16), the ones with zero points in uint4, other levels in int8, and fp8 in plain weights, embedding
            and output projection as they are. Of GGUF files, None keeps Q4_0 in int4, Q4_1 and Q4_K in uint4, and loads
            other quantized types in int8. For both, "dequantize" loads plain weights throughout, and the name of a
            format takes over levels that it can hold, and otherwise quantizes the dequantized weights.
        output_projection: False leaves out an untied one, which embeddings do not need (it may lack weights).
        adapter: a LoRA adapter in PEFT's layout, a folder or a hub id, merged before weights are quantized.
        check_weights: refuse NaN and infinity, which reads all weights once (mapped ones are otherwise read when first
            used).
        ranks: the processes to split the model over; each reads, quantizes and keeps its shard.

    Raises: FileNotFoundError if source or adapter does not exist; ValueError for unsupported options, and for
    unsupported or damaged checkpoints.
    """
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
        if format in CALIBRATED:
            logger.debug(
                "%s without calibration: `python -m qwen3fast quantize` writes a more exact %s", source, format
            )
    if split is not None and ranks is not None:
        connect(model, split, ranks)
    return model


def empty_model(source: Path) -> Qwen3:
    """Return the model on meta, its layers in the formats that `load_model` gives them.

    source: as `resolve_source` returns it.
    Raises: FileNotFoundError or ValueError, as `load_model`.
    """
    if source.is_file():
        header = read_header(source)
        model = build_on_meta(config_of(header))
        replace_layers(model, choose_formats(header, model.config, None), model.config.dtype)
        return model
    stored = CheckpointConfig.from_folder(source)
    format, kept = (
        None if stored.quantization is None else get_format(stored.quantization),
        stored.modules_to_not_convert,
    )
    theirs = stored.prequantized
    if theirs is not None and theirs.loaded_as is not None:  # as usual; only the tensors tell which others are plain
        format, kept = theirs.as_format(get_format(theirs.loaded_as)), ("model.embed_tokens", "lm_head")
    model = build_on_meta(stored.model)
    if format is not None:
        has_orders = theirs is not None and theirs.has_scattered_groups and theirs.loaded_as != "int8"
        quantize_model(model, format, model.config.dtype, modules_to_not_convert=kept)
        if has_orders:
            add_empty_orders(model)
    if stored.quantization is not None:
        use_stored_formats(model, source)
    return model
