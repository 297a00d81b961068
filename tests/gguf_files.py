"""GGUF files for tests, written with the package gguf: names, sizes and layouts are llama.cpp's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_metadata import add_config, add_tokenizer
from torch import Tensor

from qwen3fast.model import Qwen3

Kind = gguf.GGMLQuantizationType
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where the scales in float16 stand in a block of those types that gguf cannot write; other bytes may be anything.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
          "IQ4_XS": (0,)}  # fmt: skip


def encode(weight: Tensor, kind: str, seed: int = 0) -> np.ndarray:
    """A matrix in a type: rounded where gguf can do that, otherwise random numbers of that type and like size."""
    if kind in SCALES:
        block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
        rng = np.random.default_rng(seed)
        rows = int(np.prod(weight.shape[:-1]))
        bytes_RBS = rng.integers(0, 256, (rows, weight.shape[-1] // block, size), dtype=np.uint8)
        for place in SCALES[kind]:
            scale = rng.uniform(1e-4, 4e-4, bytes_RBS.shape[:2]).astype(np.float16)
            bytes_RBS[..., place : place + 2] = scale[..., None].view(np.uint8)
        return bytes_RBS.reshape(*weight.shape[:-1], -1)
    return gguf.quants.quantize(weight.float().numpy(), Kind[kind])


def decode(data: np.ndarray, kind: str) -> Tensor:
    """Return the values of a tensor in a file, in float32, by the package gguf."""
    return torch.from_numpy(np.array(gguf.quants.dequantize(data, Kind[kind]), np.float32))


def gguf_tensors(model: Qwen3) -> dict[str, Tensor]:
    """The tensors of a model under llama.cpp's names."""
    arch = gguf.MODEL_ARCH.QWEN3MOE if model.config.num_experts else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        parts = {name: parameter.detach()}
        if name.endswith("gate_up_proj"):
            gate, up = parameter.detach().chunk(2, dim=1)
            parts = {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
        for part, tensor in parts.items():
            found = names.get_name(part.removesuffix(".weight"))
            assert found is not None, part
            tensors[f"{found}.weight"] = tensor.contiguous()
    return tensors


def write_gguf(
    file: Path,
    model: Qwen3,
    kind: str | Callable[[str], str] = "F32",
    *,
    tokenizer_folder: Path | None = None,
    pre: str = "qwen3fast-tiny",
    architecture: str | None = None,
    change: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    tensors: dict[str, Tensor] | None = None,
    **options: Any,
) -> dict[str, tuple[np.ndarray, str]]:
    """Write a model; kind: the type of all matrices, or of each by name (vectors stay F32).

    change: what to do to the writer before tensors come. tensors: those to write instead of the model's.
    Returns: what was written under each name, and its type.
    """
    architecture = architecture or ("qwen3moe" if model.config.num_experts else "qwen3")
    writer = gguf.GGUFWriter(file, architecture, **options)
    add_config(writer, model.config)
    if tokenizer_folder is not None:
        add_tokenizer(writer, tokenizer_folder, model.config.vocab_size, pre)
    change(writer)
    written = {}
    for i, (name, tensor) in enumerate((gguf_tensors(model) if tensors is None else tensors).items()):
        chosen = "F32" if tensor.dim() < 2 else kind(name) if callable(kind) else kind
        data = encode(tensor, chosen, i)
        writer.add_tensor(name, data, raw_dtype=Kind[chosen])
        written[name] = (data, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}


def add_yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(YARN["factor"])
    writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(YARN["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(YARN["beta_slow"])
