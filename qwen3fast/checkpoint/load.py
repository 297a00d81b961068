"""The bare model of any source, on a device, in a dtype."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen3fast.checkpoint.lora import LoraConfig, merge_lora
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checkpoint.weights import load_weights
from qwen3fast.config import DTYPES, ModelConfig
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.parallel import Ranks, Split, connect
from qwen3fast.quantization import prepare_quantization, quantize_model, refuse_experts


def load_model(
    source: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: bool = False,
    quantization: str | None = None,
    output_projection: bool = True,
    adapter: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Qwen3:
    """The bare model: a hub id, a local folder, "tiny", or "random:0.6b" (a named shape; "random:0.6b:7" has seed 7).

    device: "auto" takes CUDA where there is one. dtype: "auto" takes the checkpoint's. quantization: "int8", "int4"
    or, on CUDA devices, "fp8" rounds the weights while loading; a checkpoint that is quantised already says so itself.
    output_projection: False leaves out an untied one, for which embeddings have no use (and no weights).
    adapter: the folder of a LoRA adapter in PEFT's layout, merged before weights are rounded (see lora.py).
    ranks: the processes to split the model over; each reads, rounds and keeps its part.
    Raises: FileNotFoundError for what is not there; ValueError for what is not supported or damaged.
    """
    chosen_device = choose_device(device)
    if quantization is not None:
        prepare_quantization(quantization, chosen_device)
    if adapter is not None:
        LoraConfig.from_folder(Path(adapter).expanduser())  # refused before weights are read
    if str(source).startswith("random:"):
        name, _, seed = str(source).removeprefix("random:").partition(":")
        if seed and not seed.isdecimal():
            raise ValueError(f"{source!r}: the seed must be a whole number, as in 'random:0.6b:7'")
        config = ModelConfig.named(name)
        refuse_experts(config, quantization)
        split = _split(config, ranks, adapter)
        chosen_dtype = _choose_dtype(dtype, config)
        model = random_model(config, chosen_device, chosen_dtype, int(seed or 0), split)
        if not output_projection:
            _leave_out_projection(model)
    else:
        folder = resolve_source(source, revision)
        config = ModelConfig.from_folder(folder)
        refuse_experts(config, quantization or config.quantization)
        if quantization is not None and config.quantization not in (None, quantization):
            raise ValueError(f"{folder} is in {config.quantization} already; {quantization} needs the original weights")
        split = _split(config, ranks, adapter)
        chosen_dtype = _choose_dtype(dtype, config)
        model = build_on_meta(config) if split is None else split.build_on_meta()
        if not output_projection:
            _leave_out_projection(model)
        if config.quantization is not None:
            prepare_quantization(config.quantization, chosen_device)
            quantize_model(model, config.quantization, chosen_dtype)
        load_weights(model, folder, chosen_device, chosen_dtype, progress, split)
    if adapter is not None:
        merge_lora(model, adapter)
    if quantization is not None and config.quantization is None:
        quantize_model(model, quantization, chosen_dtype, progress)
    if split is not None and ranks is not None:
        connect(model, split, ranks)
    return model


def _split(config: ModelConfig, ranks: Ranks | None, adapter: str | Path | None) -> Split | None:
    """This process's part of the model; None if it is not split.

    Raises: ValueError for what cannot be split, or not yet.
    """
    if ranks is None:
        return None
    if adapter is not None:
        raise ValueError("adapter= is not supported with tensor parallelism yet; merge it into the weights first")
    if config.quantization is not None:
        raise ValueError(
            f"a checkpoint that is in {config.quantization} already cannot be split over processes yet; load the "
            f"original weights with quantization={config.quantization!r}"
        )
    return Split(config, ranks.rank, ranks.size)


def _leave_out_projection(model: Qwen3) -> None:
    if not model.config.tie_word_embeddings:
        model.register_module("lm_head", None)


def choose_device(device: str | torch.device) -> torch.device:
    """The device that a name means; "auto" takes CUDA where there is one. Raises: ValueError if it is not there."""
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
