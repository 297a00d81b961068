"""The bare model of any source, on a device, in a dtype."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qwen3fast.checkpoint.lora import LoraConfig, merge_lora
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checkpoint.weights import OnAssigned, load_weights
from qwen3fast.config import DTYPES, ModelConfig
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.quantization import DEQUANTIZE, plain_modules, prepare_quantization, quantize_experts, quantize_model


def load_model(
    source: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: bool = False,
    quantization: str | None = None,
    output_projection: bool = True,
    adapter: str | Path | None = None,
) -> Qwen3:
    """The bare model: a hub id, a local folder, "tiny", or "random:0.6b" (a named shape; "random:0.6b:7" has seed 7).

    device: "auto" takes CUDA where there is one. dtype: "auto" takes the checkpoint's. quantization: "int8", "int4"
    or, on CUDA devices, "fp8" rounds the weights while loading; a checkpoint that is quantised already says so itself.
    Of checkpoints that others quantised (fp8, AWQ, GPTQ), None gives symmetric 4-bit GPTQ in int4 (the same levels,
    scales rounded to bfloat16), other AWQ and GPTQ in int8 and fp8 in plain weights, embedding and output projection as
    they are; "dequantize" gives plain weights of all; a format rounds what the published weights stand for.
    output_projection: False leaves out an untied one, for which embeddings have no use (and no weights).
    adapter: the folder of a LoRA adapter in PEFT's layout, merged before weights are rounded (see lora.py).
    Raises: FileNotFoundError for what is not there; ValueError for what is not supported or damaged.
    """
    chosen_device = _choose_device(device)
    rounded_to = None if quantization == DEQUANTIZE else quantization
    on_assigned: OnAssigned | None = None
    if rounded_to is not None:
        prepare_quantization(rounded_to, chosen_device)
        on_assigned = partial(_round_experts, rounded_to)
    if adapter is not None:
        LoraConfig.from_folder(Path(adapter).expanduser())  # refused before weights are read
    if str(source).startswith("random:"):
        name, _, seed = str(source).removeprefix("random:").partition(":")
        if seed and not seed.isdecimal():
            raise ValueError(f"{source!r}: the seed must be a whole number, as in 'random:0.6b:7'")
        config = ModelConfig.named(name)
        chosen_dtype = _choose_dtype(dtype, config)
        model = random_model(config, chosen_device, chosen_dtype, int(seed or 0), on_assigned)
        if not output_projection:
            _leave_out_projection(model)
    else:
        folder = resolve_source(source, revision)
        config = ModelConfig.from_folder(folder)
        if quantization == DEQUANTIZE and config.published is None:
            raise ValueError(f"quantization={quantization!r} is for checkpoints that others quantised; use None")
        if quantization is not None and config.quantization not in (None, quantization):
            raise ValueError(f"{folder} is in {config.quantization} already; {quantization} needs the original weights")
        chosen_dtype = _choose_dtype(dtype, config)
        model = build_on_meta(config)
        if not output_projection:
            _leave_out_projection(model)
        if config.quantization is not None:
            prepare_quantization(config.quantization, chosen_device)
            quantize_model(model, config.quantization, chosen_dtype)
        _load(model, folder, chosen_device, chosen_dtype, progress, quantization, adapter is not None, on_assigned)
    if adapter is not None:
        merge_lora(model, adapter)
    if rounded_to is not None and config.quantization is None:
        quantize_model(model, rounded_to, chosen_dtype, progress)
    return model


def _load(
    model: Qwen3,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool,
    quantization: str | None,
    has_adapter: bool,
    on_assigned: OnAssigned | None,
) -> None:
    """Fill the model; layers that others quantised get the weights that `load_model` promises.

    Raises: ValueError for an adapter that would be merged into weights that stay rounded, and what `load_weights` does.
    """
    published = model.config.published
    if published is None:
        load_weights(model, folder, device, dtype, progress, on_assigned=on_assigned)
        return
    format = published.loaded_as if quantization is None else quantization
    if has_adapter and quantization is None and format is not None:
        raise ValueError(
            f"an adapter needs the original weights; those of {folder} ({published.describe()}) would be loaded in "
            f"{format}. Use quantization='dequantize', or 'int8' or 'int4' to merge first and round afterwards"
        )
    if has_adapter or format == DEQUANTIZE:
        format = None
    if format is not None:
        prepare_quantization(format, device)
    load_weights(model, folder, device, dtype, progress, format, on_assigned)
    kept = plain_modules(model) if format is not None and quantization is None else ()
    in_format = format if quantization is None else None  # else the rest is to be quantised, too
    model.config = replace(model.config, published=None, quantization=in_format, modules_to_not_convert=kept)


def _round_experts(quantization: str, model: Qwen3, parameter_name: str) -> None:
    quantize_experts(model, quantization, parameter_name.rpartition(".")[0])


def _leave_out_projection(model: Qwen3) -> None:
    if not model.config.tie_word_embeddings:
        model.register_module("lm_head", None)


def _choose_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device; use device='cpu'")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index != torch.cuda.current_device():
        raise ValueError(
            f"device {device!r} is not the current CUDA device; set CUDA_VISIBLE_DEVICES={chosen.index}, or call "
            f"torch.cuda.set_device({chosen.index}), and use device='cuda'"
        )
    return chosen


def _choose_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return config.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
