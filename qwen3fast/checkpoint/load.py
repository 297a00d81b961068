"""The bare model of any source, on a device, in a dtype."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from qwen3fast.checkpoint.choices import choose_device, choose_dtype
from qwen3fast.checkpoint.gguf import choose_formats, config_of, load_gguf_weights, read_header, replace_layers
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.lora import LoraConfig, merge_lora, resolve_adapter
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.random_weights import parse_random, random_model
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checkpoint.weights import HEAD, load_weights, refuse_size, stored_head
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Ranks, Split, connect
from qwen3fast.quantization import DEQUANTIZE, prepare_quantization, quantize_experts, quantize_model


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
    ranks: the processes to split the model over; each reads, rounds and keeps its part.
    Raises: FileNotFoundError for what is not there; ValueError for what is not supported or damaged.
    """
    chosen_device = choose_device(device)
    new_format = None if quantization == DEQUANTIZE else quantization
    if new_format is not None:
        prepare_quantization(new_format, chosen_device)
    if adapter is not None:
        adapter = resolve_adapter(adapter)
        LoraConfig.from_folder(adapter)  # refused before weights are read
    options = _Options(
        chosen_device, dtype, quantization, output_projection, adapter is not None, check_weights, ranks, progress
    )
    if str(source).startswith("random:"):
        model, split = options.load_random(str(source))
    elif (folder := resolve_source(source, revision)).is_file():
        model, split = options.load_gguf(folder), None
    else:
        stored = CheckpointConfig.from_folder(folder)
        model, split = options.load_folder(folder, stored)
        if stored.quantization is not None:
            new_format = None  # quantized already, except for the layers that are to stay as they are
    if adapter is not None:
        merge_lora(model, adapter, check_weights)
    if new_format is not None:
        quantize_model(model, new_format, choose_dtype(dtype, model.config), progress)
    if split is not None and ranks is not None:
        connect(model, split, ranks)
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
    stored = CheckpointConfig.from_folder(source)
    format, kept = stored.quantization, stored.modules_to_not_convert
    if stored.prequantized is not None:  # as it is loaded; of the rest, the tensors would have to be looked at
        format, kept = stored.prequantized.loaded_as, ("model.embed_tokens", "lm_head")
    model = build_on_meta(stored.model)
    if format is not None:
        quantize_model(model, format, model.config.dtype, modules_to_not_convert=kept)
    return model


@dataclass(frozen=True)
class _Options:
    """What `load_model` was asked for, whatever the source. has_adapter: one is to be merged into the weights."""

    device: torch.device
    dtype: str | torch.dtype
    quantization: str | None
    output_projection: bool
    has_adapter: bool
    check_weights: bool
    ranks: Ranks | None
    progress: bool

    def load_random(self, source: str) -> tuple[Qwen3, Split | None]:
        """Of "random:NAME" or "random:NAME:SEED"."""
        config, seed = parse_random(source)
        self._refuse_dequantizing(None)
        split, dtype = self._split(config), choose_dtype(self.dtype, config)
        model = random_model(config, self.device, dtype, seed, self._on_assigned, split)
        self._leave_out_projection(model)
        return model, split

    def load_folder(self, folder: Path, stored: CheckpointConfig) -> tuple[Qwen3, Split | None]:
        """Of a folder with safetensors."""
        config = stored.model
        self._refuse_dequantizing(stored.prequantized)
        if self.quantization is not None and stored.quantization not in (None, self.quantization):
            raise ValueError(
                f"{folder} is in {stored.quantization} already; {self.quantization} needs the original weights"
            )
        self._refuse_splitting(stored)
        split, dtype = self._split(config), choose_dtype(self.dtype, config)
        if stored.quantization is not None:
            prepare_quantization(stored.quantization, self.device)
        format = self._format_of_prequantized(stored.prequantized, folder)
        refuse_size(config, folder)
        if config.tie_word_embeddings and stored_head(folder):
            warnings.warn(
                f"{folder}: config.json says tie_word_embeddings, but {HEAD} holds other numbers than the embedding; "
                "both are used, as transformers does",
                stacklevel=2,
            )
            config = replace(config, tie_word_embeddings=False)
        model = build_on_meta(config) if split is None else split.build_on_meta()
        self._leave_out_projection(model)
        if stored.quantization is not None:
            kept = stored.modules_to_not_convert
            quantize_model(model, stored.quantization, dtype, modules_to_not_convert=kept)
        load_weights(
            model,
            folder,
            self.device,
            dtype,
            self.progress,
            format,
            self._on_assigned,
            self.check_weights,
            split,
            stored.prequantized,
        )
        return model, split

    def load_gguf(self, file: Path) -> Qwen3:
        """Of a GGUF file."""
        if self.ranks is not None:
            raise ValueError(f"{file}: GGUF files cannot be split over processes yet; use safetensors")
        header = read_header(file)
        config = config_of(header)
        rounding = DEQUANTIZE if self.has_adapter and self.quantization is not None else self.quantization
        formats = choose_formats(header, config, rounding)
        names = {format.name for format in formats.values()}
        if self.has_adapter and names:
            raise ValueError(f"an adapter needs plain weights, which {file} has not; add quantization='dequantize'")
        for name in names:
            prepare_quantization(name, self.device)
        model = build_on_meta(config)
        self._leave_out_projection(model)
        load_gguf_weights(model, header, formats, self.device, choose_dtype(self.dtype, config), self.progress)
        return model

    @property
    def _on_assigned(self) -> partial[None] | None:
        """Experts are rounded as soon as a layer's are there."""
        name = self.quantization
        return None if name in (None, DEQUANTIZE) else partial(_round_experts, name)

    def _refuse_dequantizing(self, prequantized: PrequantizedFormat | None) -> None:
        if self.quantization == DEQUANTIZE and prequantized is None:
            raise ValueError(f"quantization={DEQUANTIZE!r} is for checkpoints that others quantised; use None")

    def _leave_out_projection(self, model: Qwen3) -> None:
        if not self.output_projection and not model.config.tie_word_embeddings:
            model.register_module("lm_head", None)

    def _format_of_prequantized(self, prequantized: PrequantizedFormat | None, folder: Path) -> str | None:
        """The format that layers which others quantised get; None for plain weights.

        Raises: ValueError for an adapter that would be merged into weights that stay rounded.
        """
        if prequantized is None:
            return None
        format = prequantized.loaded_as if self.quantization is None else self.quantization
        if self.has_adapter and self.quantization is None and format is not None:
            raise ValueError(
                f"an adapter needs the original weights; those of {folder} ({prequantized.describe()}) would be "
                f"loaded in {format}. Use quantization='dequantize', or 'int8' or 'int4' to merge first and round "
                "afterwards"
            )
        if self.has_adapter or format in (None, DEQUANTIZE):
            return None
        prepare_quantization(format, self.device)
        return format

    def _split(self, config: ModelConfig) -> Split | None:
        """This process's part of the model; None if it is not split.

        Raises: ValueError for what cannot be split, or not yet.
        """
        if self.ranks is None:
            return None
        if self.has_adapter:
            raise ValueError("adapter= is not supported with tensor parallelism yet; merge it into the weights first")
        return Split(config, self.ranks.rank, self.ranks.size)

    def _refuse_splitting(self, stored: CheckpointConfig) -> None:
        prequantized = stored.prequantized
        if self.ranks is not None and (stored.quantization is not None or prequantized is not None):
            kind = prequantized.method if prequantized is not None else stored.quantization
            format = stored.quantization or (prequantized and prequantized.loaded_as) or "int8"
            raise ValueError(
                f"a checkpoint that is quantized already ({kind}) cannot be split over processes yet; load the "
                f"original weights with quantization={format!r}"
            )


def _round_experts(quantization: str, model: Qwen3, parameter_name: str) -> None:
    quantize_experts(model, quantization, parameter_name.rpartition(".")[0])
