"""Weights in our formats and llama.cpp's as plain models again, for tools/quality_peers.py: the formats' error alone.

K in_features
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from awq_scaling import scale_channels
from ggml_quants import Ggml, bits, type_of
from torch import Tensor, nn

from qwen3fast import load_model
from qwen3fast.calibrated import TOKENS
from qwen3fast.checkpoint.metadata import find_tokenizer
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.engine.own_text import own_text
from qwen3fast.model import Qwen3
from qwen3fast.quantization.calibrate import CALIBRATED, quantize_calibrated, second_moments
from qwen3fast.quantization.convert import plain_modules, quantize_model
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear

OURS = ("int8", "int4", "uint4")
MIXTURES = ("Q8_0", "Q4_0 pure", "Q4_0", "Q4_K_M")  # pure: no matrix is kept in more bits


class Formats:
    """The formats of one checkpoint. windows: calibration tokens, (B, T) int64."""

    def __init__(self, source: str, windows: Tensor, ggml: Ggml) -> None:
        self._source, self._windows, self._ggml = source, windows, ggml
        self.exact = self._plain()
        layers = {n: m for n, m in self.exact.named_modules() if isinstance(m, nn.Linear)}
        with torch.no_grad():
            moments = second_moments(layers, self.exact, list(windows[:, None].unbind()))
        upper = {name: moment.upper().triu() for name, moment in moments.items()}
        self._moments = {name: mean_KK + mean_KK.triu(1).T for name, mean_KK in upper.items()}

    def __iter__(self) -> Iterator[tuple[str, float, Qwen3]]:
        """Yield (name, bits per weight of the matrices, float32 model); one model at a time is in memory."""
        for name in OURS:
            model = self._plain()
            quantize_model(model, name, torch.float32)
            yield f"{name} weights", *self._dequantized(model, self._plain())
        scaled, model = self._plain(), self._plain()
        scale_channels(scaled, self._moments)
        model.load_state_dict(scaled.state_dict())
        quantize_model(model, "int4", torch.float32)
        yield "int4 AWQ-scaled", *self._dequantized(model, scaled)
        own_BT = own_text(self.exact, find_tokenizer(resolve_source(self._source)), TOKENS)
        for name, text_BT in (("int4", self._windows), *((name, own_BT) for name in CALIBRATED)):
            model = self._plain()
            quantize_calibrated(model, text_BT, name)
            kind = "calibrated" if text_BT is self._windows else "on own text"
            yield f"{name} {kind}", *self._dequantized(model, self._plain())
        for mixture in filter(self._can, MIXTURES):
            yield mixture, *self._in_types(self._types(mixture), with_importance=False)
        if self._can("Q4_K_M"):
            yield "Q4_K_M imatrix", *self._in_types(self._types("Q4_K_M"), with_importance=True)

    def _can(self, mixture: str) -> bool:
        types = self._types(mixture)
        return all(self._ggml.can(kind, self.exact.get_submodule(n).weight.shape[1]) for n, kind in types.items())

    def _plain(self) -> Qwen3:
        return load_model(self._source, "cpu", "float32", calibrate=False)

    def _types(self, mixture: str) -> dict[str, str]:
        """Return the type of each matrix; a tied output projection is the embedding."""
        config = self.exact.config
        tied = config.tie_word_embeddings
        names = [name for name in plain_modules(self.exact) if not (tied and name == "lm_head")]
        return {name: type_of(mixture, name, config.num_hidden_layers, tied) for name in names}

    @torch.no_grad()
    def _in_types(self, types: dict[str, str], with_importance: bool) -> tuple[float, Qwen3]:
        model, total_bits, weights = self._plain(), 0.0, 0
        for name, kind in types.items():
            weight = model.get_submodule(name).weight
            importance_K = self._moments[name].diagonal() if with_importance and name in self._moments else None
            weight.copy_(self._ggml.dequantized(weight, kind, importance_K))
            total_bits, weights = total_bits + bits(kind) * weight.numel(), weights + weight.numel()
        return total_bits / weights, model

    @staticmethod
    @torch.no_grad()
    def _dequantized(quantized: Qwen3, plain: Qwen3) -> tuple[float, Qwen3]:
        """Return the bits per weight of the quantized layers, and `plain` with the dequantized weights."""
        size, weights = 0, 0
        for name, module in quantized.named_modules():
            if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
                continue
            weight = plain.get_submodule(name).weight
            if isinstance(module, QuantizedLinear):
                weight.copy_(module.dequantize())
            elif not plain.config.tie_word_embeddings:
                weight.copy_(module(torch.arange(plain.config.vocab_size)))
            if not (isinstance(module, QuantizedEmbedding) and plain.config.tie_word_embeddings):
                size, weights = size + sum(p.nbytes for p in module.parameters()), weights + weight.numel()
        return size * 8 / weights, plain
