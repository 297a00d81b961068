"""Load the bare model of any source: random weights, a folder with safetensors, a GGUF file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwen3fast.checkpoint.assign import OnAssigned
from qwen3fast.checkpoint.choices import choose_dtype
from qwen3fast.checkpoint.fill import FillOptions, load_weights
from qwen3fast.checkpoint.gguf.config import config_of
from qwen3fast.checkpoint.gguf.header import read_header
from qwen3fast.checkpoint.gguf.layout import choose_formats
from qwen3fast.checkpoint.gguf.weights import load_gguf_weights
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.lora.config import LoraConfig
from qwen3fast.checkpoint.lora.merge import merge_lora
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.random_weights import parse_random, random_model
from qwen3fast.checkpoint.safetensors import HEAD, has_other_head, refuse_size
from qwen3fast.checkpoint.stored_formats import use_stored_formats
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Ranks, Split, connect
from qwen3fast.quantization.convert import (
    DEQUANTIZE,
    formats_of,
    get_format,
    prepare_quantization,
    quantize_assigned,
    quantize_experts,
    quantize_model,
)
from qwen3fast.quantization.lossless import LOSSLESS


@dataclass(frozen=True)
class Loader:
    """The options of `qwen3fast.load_model`, as it has resolved them; 4 bits are quantized without calibration."""

    device: torch.device
    dtype: str | torch.dtype = "auto"
    quantization: str | None = None
    output_projection: bool = True
    adapter: Path | None = None
    check_weights: bool = False
    ranks: Ranks | None = None
    progress: bool = False

    def load(self, source: str | Path) -> Qwen3:
        """Return the model; with several processes, this process's shard.

        source: "random:NAME", or what `resolve_source` returns. Errors as in `qwen3fast.load_model`.
        """
        format = None if self.quantization == DEQUANTIZE else self.quantization
        if format is not None:
            prepare_quantization(format, self.device)
        if self.adapter is not None:
            LoraConfig.from_folder(self.adapter)  # refused before weights are read
        if str(source).startswith("random:"):
            model, split = self._load_random(str(source))
        elif (folder := Path(source)).is_file():
            model, split = self._load_gguf(folder), None
        else:
            stored = CheckpointConfig.from_folder(folder)
            model, split = self._load_folder(folder, stored)
            if stored.quantization is not None:
                format = None  # quantized already, except for the layers that are to stay plain
        if self.adapter is not None:
            merge_lora(model, self.adapter, self.check_weights)
        if format is not None:
            quantize_model(model, format, choose_dtype(self.dtype, model.config), self.progress)
        if split is not None and self.ranks is not None:
            connect(model, split, self.ranks)
        return model

    def _load_random(self, source: str) -> tuple[Qwen3, Split | None]:
        """Make the model of "random:NAME" or "random:NAME:SEED"."""
        config, seed = parse_random(source)
        self._refuse_dequantizing(None)
        check_lossless(self.quantization, self.dtype, config)
        split, dtype = self._split(config), choose_dtype(self.dtype, config)
        model = random_model(config, self.device, dtype, seed, self._on_assigned(), split)
        self._leave_out_projection(model)
        return model, split

    def _load_folder(self, folder: Path, stored: CheckpointConfig) -> tuple[Qwen3, Split | None]:
        """Load a folder with safetensors; stored: its config.json."""
        self._refuse_dequantizing(stored.prequantized)
        refuse_other_format(stored, self.quantization, folder)
        quantized_source = folder if stored.prequantized is not None else None
        check_lossless(self.quantization, self.dtype, stored.model, quantized_source)
        self._refuse_splitting(stored)
        if stored.quantization is not None:
            prepare_quantization(stored.quantization, self.device, folder)
        format = self._format_of_prequantized(stored.prequantized, folder)
        refuse_size(stored.model, folder)
        config = self._untied_if_stored_so(stored.model, folder)
        split, dtype = self._split(config), choose_dtype(self.dtype, config)
        model = build_on_meta(config) if split is None else split.build_on_meta()
        self._leave_out_projection(model)
        if stored.quantization is not None:
            kept = stored.modules_to_not_convert
            quantize_model(model, stored.quantization, dtype, modules_to_not_convert=kept)
            use_stored_formats(model, folder)
            for name in formats_of(model):
                prepare_quantization(name, self.device, folder)
        on_assigned = self._on_assigned(is_quantized=stored.quantization is not None)
        how = (format, on_assigned, self.check_weights, split, stored.prequantized)
        load_weights(model, folder, FillOptions(self.device, dtype, *how), self.progress)
        return model, split

    def _load_gguf(self, file: Path) -> Qwen3:
        """Load a GGUF file."""
        if self.ranks is not None:
            raise ValueError(f"{file}: GGUF files cannot be split over processes yet; use safetensors")
        header = read_header(file)
        config = config_of(header)
        check_lossless(self.quantization, self.dtype, config, file)
        wanted = DEQUANTIZE if self.adapter and self.quantization is not None else self.quantization
        formats = choose_formats(header, config, wanted, self.device.type)
        if self.adapter and formats:
            raise ValueError(
                f"an adapter needs plain weights, and the ones of {file} are quantized; add quantization='dequantize'"
            )
        for name in {format.name for format in formats.values()}:
            prepare_quantization(name, self.device)
        model = build_on_meta(config)
        self._leave_out_projection(model)
        dtype = choose_dtype(self.dtype, config)
        load_gguf_weights(model, header, formats, self.device, dtype, self.progress, self.check_weights)
        return model

    def _on_assigned(self, is_quantized: bool = False) -> OnAssigned | None:
        """Quantize each layer as soon as it is loaded: only one is in memory unquantized, which devices may not hold.

        Linear layers wait for an adapter, which is merged into plain weights. is_quantized: what is plain in the
        checkpoint is to stay so.
        """
        if (format := self.quantization) in (None, DEQUANTIZE):
            return None
        quantize = quantize_experts if self.adapter is not None or is_quantized else quantize_assigned
        return lambda model, parameter: quantize(model, str(format), parameter.rpartition(".")[0])

    def _untied_if_stored_so(self, config: ModelConfig, folder: Path) -> ModelConfig:
        if not (config.tie_word_embeddings and self.output_projection and has_other_head(folder)):
            return config
        warnings.warn(
            f"{folder}: config.json says tie_word_embeddings, but {HEAD} holds other numbers than the embedding; "
            "both are used, as in transformers",
            stacklevel=4,
        )
        return replace(config, tie_word_embeddings=False)

    def _leave_out_projection(self, model: Qwen3) -> None:
        if not self.output_projection and not model.config.tie_word_embeddings:
            model.register_module("lm_head", None)

    def _format_of_prequantized(self, stored: PrequantizedFormat | None, folder: Path) -> str | None:
        """Return the format that prequantized layers get; None for plain weights.

        Raises: ValueError for an adapter that would be merged into weights that stay quantized.
        """
        if stored is None:
            return None
        format = self._usual_format(stored) if self.quantization is None else self.quantization
        if self.adapter and self.quantization is None and format is not None:
            raise ValueError(
                f"an adapter needs the original weights; the ones of {folder} ({stored.describe()}) would be loaded in "
                f"{format}. Use quantization='dequantize', or 'int8' or 'int4' to merge first and quantize afterwards; "
                "or load it at run time, which needs no plain weights (adapters= of Generator, --adapter of serve)"
            )
        if self.adapter or format in (None, DEQUANTIZE):
            return None
        prepare_quantization(format, self.device)
        return format

    def _usual_format(self, stored: PrequantizedFormat) -> str | None:
        """Return the format that layers get unless one is asked for; None, for floats that no kernel here reads."""
        is_plain = stored.is_float and self.device.type not in get_format(stored.loaded_as).devices
        return None if is_plain else stored.loaded_as

    def _split(self, config: ModelConfig) -> Split | None:
        """Return this process's shard of the model; None in one process.

        Raises: ValueError for a model that cannot be split, or not yet.
        """
        if self.ranks is None:
            return None
        if self.adapter:
            raise ValueError("adapter= is not supported with tensor parallelism yet; merge it into the weights first")
        return Split(config, self.ranks.rank, self.ranks.size)

    def _refuse_splitting(self, stored: CheckpointConfig) -> None:
        prequantized = stored.prequantized
        if self.ranks is not None and (stored.quantization is not None or prequantized is not None):
            kind = prequantized.method if prequantized is not None else stored.quantization
            format = stored.quantization or (prequantized and self._usual_format(prequantized)) or "int8"
            raise ValueError(
                f"a checkpoint that is quantized already ({kind}) cannot be split over processes yet; load the "
                f"original weights with quantization={format!r}"
            )

    def _refuse_dequantizing(self, stored: PrequantizedFormat | None) -> None:
        if self.quantization == DEQUANTIZE and stored is None:
            raise ValueError(
                f"quantization={DEQUANTIZE!r} is for checkpoints that other software quantized; use None "
                "(no --quantization)"
            )


def check_lossless(
    quantization: str | None, dtype: str | torch.dtype, config: ModelConfig, quantized_source: Path | None = None
) -> None:
    """Raises: ValueError if weights that are to be packed without loss are not in bfloat16."""
    if quantization != LOSSLESS:
        return
    if quantized_source is not None:
        raise ValueError(
            f"quantization={LOSSLESS!r} packs bfloat16 weights of safetensors, and {quantized_source} is a GGUF file "
            "or quantized; use None, which keeps its formats"
        )
    if (chosen := choose_dtype(dtype, config)) != torch.bfloat16:
        raise ValueError(f"quantization={LOSSLESS!r} packs bfloat16 weights, got {chosen}; add dtype='bfloat16'")


def refuse_other_format(stored: CheckpointConfig, quantization: str | None, folder: Path) -> None:
    """Raises: ValueError for a folder that `save_quantized` wrote in another format than the one asked for."""
    if quantization is not None and stored.quantization not in (None, quantization):
        raise ValueError(f"{folder} is in {stored.quantization} already; {quantization} needs the original weights")
