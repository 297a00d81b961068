"""llama.cpp's quantized types, applied to a tensor: its own code quantizes, the package gguf dequantizes.

The K-quants need llama.cpp's library libggml-base.so; Q4_0 and Q8_0 are also in the package gguf. Which tensor of a
model gets which type is as in llama.cpp's `llama-quantize` (src/llama-quant.cpp of llama-cpp-python 0.3.36), for dense
Qwen3 models; where a width is not a multiple of 256, llama.cpp would take other types, so those mixtures are left out.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

Type = gguf.GGMLQuantizationType
IN_GGUF = ("Q4_0", "Q8_0")  # types that the package gguf quantizes


def find_library() -> Path | None:
    """Return the libggml-base.so of an installed llama-cpp-python, or None."""
    spec = find_spec("llama_cpp")
    found = sorted(Path(spec.origin).parent.glob("lib/libggml-base.so*")) if spec and spec.origin else []
    return found[0] if found else None


class Ggml:
    """The quantizer in llama.cpp's library, or without one, the package gguf's."""

    def __init__(self, library: Path | None) -> None:
        self._quantize = None
        if library is not None:
            self._quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
            self._quantize.restype = ctypes.c_size_t
            pointers = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            self._quantize.argtypes = [ctypes.c_int, *pointers]

    def can(self, name: str, in_features: int) -> bool:
        """Return whether a type can be written, for rows of this width."""
        block, _ = gguf.GGML_QUANT_SIZES[Type[name]]
        return in_features % block == 0 and (self._quantize is not None or name in IN_GGUF)

    def dequantized(self, weight_NK: Tensor, name: str, importance_K: Tensor | None = None) -> Tensor:
        """Return a weight, quantized to a type and dequantized, (N, K) float32.

        importance_K: mean squares of the input channels, as in an importance matrix.
        """
        weight = np.ascontiguousarray(weight_NK.detach().float().numpy())
        kind = Type[name]
        if self._quantize is None:
            data = gguf.quants.quantize(weight, kind)
        else:
            N, K = weight.shape
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = np.zeros((N, K // block * size), dtype=np.uint8)
            importance = None if importance_K is None else np.ascontiguousarray(importance_K.float().numpy())
            pointer = None if importance is None else importance.ctypes.data
            written = self._quantize(int(kind), weight.ctypes.data, data.ctypes.data, 0, N, K, pointer)
            if written != data.nbytes:
                raise RuntimeError(f"llama.cpp wrote {written} bytes of {name}, expected {data.nbytes}")
        return torch.from_numpy(np.array(gguf.quants.dequantize(data, kind), np.float32))


def bits(name: str) -> float:
    """Return a type's bits per weight."""
    block, size = gguf.GGML_QUANT_SIZES[Type[name]]
    return size * 8 / block


def type_of(mixture: str, module: str, num_layers: int, tied: bool) -> str:
    """Return the type that llama-quantize gives the weight of a module. mixture: Q8_0, Q4_0, Q4_K_M, or "Q4_0 pure"."""
    if mixture in ("Q8_0", "Q4_0 pure"):
        return mixture.removesuffix(" pure")
    if module == ("model.embed_tokens" if tied else "lm_head"):
        return "Q6_K"
    if mixture == "Q4_K_M":
        is_sensitive = module.endswith(("v_proj", "down_proj"))
        return "Q6_K" if is_sensitive and _gets_more_bits(int(module.split(".")[2]), num_layers) else "Q4_K"
    return mixture


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    """Return llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
