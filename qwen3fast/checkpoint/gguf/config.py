"""Metadata of a GGUF file -> ModelConfig, and the preset for sampling.

Source: constants.py of gguf-py in github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from qwen3fast.checkpoint.gguf.header import Header
from qwen3fast.checkpoint.gguf.layout import EMBEDDING, OUTPUT
from qwen3fast.checkpoint.gguf.tokenizer import stop_ids
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model.config import ModelConfig

# Of Qwen3-VL, files hold the language model; what reads images is in a file of its own, of the architecture "clip".
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3vl": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen3vlmoe": "Qwen3MoeForCausalLM",
}
WITH_EXPERTS = ("qwen3moe", "qwen3vlmoe")
MAX_SIZE = 2**18  # no Qwen3 comes near it, and products of a few sizes still fit 64 bits
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Settings of YaRN that programs read in different ways, or that are not computed here; and values without effect.
REFUSED_SCALING = {
    "attn_factor": (1.0,),
    "yarn_attn_factor": (),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
    "alpha": (0.0,),
}


def config_of(header: Header) -> ModelConfig:
    """Return the numbers of the model.

    Raises: ValueError for an architecture or a feature that is not supported, and for missing or impossible values.
    """
    kind = header.get("general.architecture", str)
    if kind not in ARCHITECTURES:
        hint = "; it reads images: load the language model's file" if kind == "clip" else ""
        raise ValueError(
            f"{header.file}: architecture {kind!r} is not supported{hint}; supported: {', '.join(ARCHITECTURES)}"
        )
    if EMBEDDING not in header.tensors or len(header.tensors[EMBEDDING].shape) != 2:
        raise ValueError(f"{header.file}: {EMBEDDING} is missing, or not a matrix")
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        **_sizes(header, kind),
        "rms_norm_eps": _number(header, f"{kind}.attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": _number(header, f"{kind}.rope.freq_base", 1e6),
        "max_position_embeddings": header.get(f"{kind}.context_length", int, 40_960),
        "tie_word_embeddings": OUTPUT not in header.tensors,
        "rope_scaling": _yarn(header, kind),
        "dtype": _dtype(header),
        "eos_token_id": list(stop_ids(header)),
    }
    if kind in WITH_EXPERTS:
        raw["norm_topk_prob"] = True  # llama.cpp's graphs of both always do
    return CheckpointConfig.from_dict(raw, str(header.file)).model


def generation_config_of(header: Header) -> dict[str, Any] | None:
    """Return the sampling preset, as generation_config.json would have it; most files have none."""
    found = {ours: header.metadata.get(f"general.sampling.{name}") for name, ours in SAMPLING.items()}
    preset = {name: value for name, value in found.items() if value is not None}
    return {"top_k": 0, **preset, "do_sample": preset.get("temperature", 1.0) != 0} if preset else None


def _sizes(header: Header, kind: str) -> dict[str, int]:
    """Return all sizes except the vocabulary's, by their names in config.json."""
    heads = _size(header, f"{kind}.attention.head_count")
    sizes = {
        "hidden_size": _size(header, f"{kind}.embedding_length"),
        "intermediate_size": _size(header, f"{kind}.feed_forward_length"),
        "num_hidden_layers": _size(header, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(header, f"{kind}.attention.head_count_kv", heads),
        "head_dim": _size(header, f"{kind}.attention.key_length", 128),
    }
    if kind in WITH_EXPERTS:
        sizes["num_experts"] = _size(header, f"{kind}.expert_count")
        sizes["num_experts_per_tok"] = _size(header, f"{kind}.expert_used_count")
        sizes["moe_intermediate_size"] = _size(header, f"{kind}.expert_feed_forward_length")
    layers, tensors, head_dim = sizes["num_hidden_layers"], len(header.tensors), sizes["head_dim"]
    if layers > tensors:
        raise ValueError(f"{header.file}: {kind}.block_count is {layers}, but there are {tensors} tensors")
    for name in ("attention.value_length", "rope.dimension_count"):
        if header.get(f"{kind}.{name}", int, head_dim) != head_dim:
            raise ValueError(f"{header.file}: {kind}.{name} must be {kind}.attention.key_length, {head_dim}")
    return sizes


def _size(header: Header, key: str, default: int | None = None) -> int:
    value: int | None = header.get(key, int, default)
    if value is None or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{header.file}: {key} must be from 1 to {MAX_SIZE}, got {value!r}")
    return value


def _number(header: Header, key: str, default: float) -> float:
    value: float = header.get(key, (int, float), default)
    if not 0 < value < math.inf:
        raise ValueError(f"{header.file}: {key} must be a positive number, got {value!r}")
    return value


def _yarn(header: Header, kind: str) -> dict[str, Any] | None:
    prefix = f"{kind}.rope.scaling."
    if (scaling := header.get(prefix + "type", str, "none")) == "none":
        return None
    for name, harmless in REFUSED_SCALING.items():
        if (value := header.metadata.get(prefix + name)) is not None and value not in harmless:
            raise ValueError(f"{header.file}: {prefix}{name}={value!r} is not supported")
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    given = {ours: header.metadata.get(prefix + name) for name, ours in names.items()}
    return {"rope_type": scaling, **given}


def _dtype(header: Header) -> str:
    """Return the dtype of the matrices, or of most numbers where they differ; bfloat16 if a matrix is quantized."""
    matrices = [tensor for tensor in header.tensors.values() if len(tensor.shape) > 1]
    if not all(tensor.is_float for tensor in matrices):
        return "bfloat16"
    sizes: Counter[str] = Counter()
    for tensor in matrices:
        sizes[tensor.type] += math.prod(tensor.shape)
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[sizes.most_common(1)[0][0]]
