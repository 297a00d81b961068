"""The bare model of any source, on a device, in a dtype."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qwen3fast.checkpoint.gguf import Header, choose_formats, config_of, load_gguf_weights, read_header, replace_layers
from qwen3fast.checkpoint.lora import LoraConfig, merge_lora
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checkpoint.weights import OnAssigned, load_weights, refuse_size
from qwen3fast.config import DTYPES, ModelConfig
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.quantization import DEQUANTIZE, plain_modules, prepare_quantization, quantize_experts, quantize_model
from qwen3fast.quantization.formats import fits
from qwen3fast.quantization.linear import QuantizedLinear


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
) -> Qwen3:
    """The bare model: a hub id, a local folder or .gguf file, "tiny", or "random:0.6b".

    "random:0.6b" is a named shape with random weights; "random:0.6b:7" has seed 7.
    device: "auto" takes CUDA where there is one. dtype: "auto" takes the checkpoint's. quantization: "int8", "int4"
    or, on CUDA devices, "fp8" rounds the weights while loading; a checkpoint that is quantised already says so itself.
    Of checkpoints that others quantised (fp8, AWQ, GPTQ), None gives symmetric 4-bit GPTQ in int4 (the same levels,
    scales rounded to bfloat16), other AWQ and GPTQ in int8 and fp8 in plain weights, embedding and output projection as
    they are; "dequantize" gives plain weights of all; a format rounds what the published weights stand for.
    Of GGUF files, None keeps Q4_0 in 4 bits and other quantised types in int8; "dequantize" makes plain weights of all.
    output_projection: False leaves out an untied one, for which embeddings have no use (and no weights).
    adapter: the folder of a LoRA adapter in PEFT's layout, merged before weights are rounded (see lora.py).
    check_weights: refuse NaN and infinity in weights, which reads all of them once (mapped ones are otherwise read when
    they are first used).
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
        if quantization == DEQUANTIZE:
            raise ValueError(f"quantization={quantization!r} is for checkpoints that others quantised; use None")
        config = ModelConfig.named(name)
        chosen_dtype = _choose_dtype(dtype, config)
        model = random_model(config, chosen_device, chosen_dtype, int(seed or 0), on_assigned)
        if not output_projection:
            _leave_out_projection(model)
    elif (folder := resolve_source(source, revision)).is_file():
        header = read_header(folder)
        chosen_dtype = _choose_dtype(dtype, config_of(header))
        rounding = DEQUANTIZE if adapter is not None and quantization is not None else quantization
        model = _load_gguf(header, chosen_device, chosen_dtype, rounding, output_projection, progress)
        if adapter is not None and any(isinstance(module, QuantizedLinear) for module in model.modules()):
            raise ValueError(f"an adapter needs plain weights, which {folder} has not; add quantization='dequantize'")
    else:
        config = ModelConfig.from_folder(folder)
        if quantization == DEQUANTIZE and config.published is None:
            raise ValueError(f"quantization={quantization!r} is for checkpoints that others quantised; use None")
        if quantization is not None and config.quantization not in (None, quantization):
            raise ValueError(f"{folder} is in {config.quantization} already; {quantization} needs the original weights")
        chosen_dtype = _choose_dtype(dtype, config)
        if config.quantization is not None:
            prepare_quantization(config.quantization, chosen_device)
        refuse_size(config, folder)
        model = build_on_meta(config)
        if not output_projection:
            _leave_out_projection(model)
        if config.quantization is not None:
            quantize_model(model, config.quantization, chosen_dtype)
        _load(
            model, folder, chosen_device, chosen_dtype, progress, quantization, adapter is not None, on_assigned,
            check_weights,
        )  # fmt: skip
    if adapter is not None:
        merge_lora(model, adapter, check_weights)
    if rounded_to is not None and model.config.quantization is None:
        quantize_model(model, rounded_to, chosen_dtype, progress)
    return model


def empty_model(source: Path) -> Qwen3:
    """The model on meta, its layers in the formats that `load_model` gives them; source: as `resolve_source` gives it.

    Raises: FileNotFoundError or ValueError, as `load_model`.
    """
    if source.is_file():
        header = read_header(source)
        model = build_on_meta(config_of(header))
        rounding = DEQUANTIZE if model.config.num_experts else None  # experts are loaded plain only
        replace_layers(model, choose_formats(header, model.config, rounding), model.config.dtype)
        return model
    config = ModelConfig.from_folder(source)
    if config.published is not None:  # as it is loaded; of the rest, the tensors would have to be looked at
        kept = ("model.embed_tokens", "lm_head")
        config = replace(config, published=None, quantization=config.published.loaded_as, modules_to_not_convert=kept)
    model = build_on_meta(config)
    if config.quantization is not None:
        quantize_model(model, config.quantization, config.dtype)
    return model


def _load_gguf(
    header: Header,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    output_projection: bool,
    progress: bool,
) -> Qwen3:
    config = config_of(header)
    formats = choose_formats(header, config, quantization)
    names = {format.name for format in formats.values()}
    for name in names:
        prepare_quantization(name, device)
    model = build_on_meta(config)
    if not output_projection:
        _leave_out_projection(model)
    load_gguf_weights(model, header, formats, device, dtype, progress)
    packable = [name for name, t in header.tensors.items() if len(t.shape) == 2 and fits(*t.shape)]
    if len(names) == 1 and all(name in formats for name in packable):
        model.config = replace(config, quantization=names.pop())  # as if we had rounded it
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
    check_weights: bool,
) -> None:
    """Fill the model; layers that others quantised get the weights that `load_model` promises.

    Raises: ValueError for an adapter that would be merged into weights that stay rounded, and what `load_weights` does.
    """
    published = model.config.published
    if published is None:
        load_weights(model, folder, device, dtype, progress, None, on_assigned, check_weights)
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
    load_weights(model, folder, device, dtype, progress, format, on_assigned, check_weights)
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
