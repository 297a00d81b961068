"""Relatives of Qwen3: checkpoints with a Qwen3 inside, and models that differ in what they compute."""

from __future__ import annotations

from typing import Any

# The language model inside is a Qwen3. Images and videos cannot be read, so their part of the weights is not loaded.
WITH_TEXT_PART = {"Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM"}
_TYPES_WITH_TEXT_PART = {"qwen3_vl": "Qwen3ForCausalLM"}

_HYBRID = "most of its layers are gated delta networks (linear attention with a recurrent state), not attention"
_OMNI = "it is a system of several models for sound, images and speech"
_TRANSPOSED = "its experts are stored transposed, which is not read yet"
_QWEN2 = "its attention has biases and does not normalize queries and keys"
# Differences from Qwen3, by model_type. The architectures of a type begin with its name, without underscores.
_DIFFERENT = {
    "qwen3_next": _HYBRID,
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": _HYBRID,
    "qwen3_vl_moe": _TRANSPOSED,
    "qwen3_omni": _OMNI,
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2,
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
}

# M-RoPE rotates by the positions of text, height and width; for text, all three are the token's position.
_OF_MROPE = ("mrope_section", "mrope_interleaved")
_OUTER = ("quantization_config", "tie_word_embeddings")  # which stand outside text_config
_FALLBACKS = ("eos_token_id", "dtype", "torch_dtype")  # which may stand outside


def text_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the config.json of the Qwen3 in a checkpoint of WITH_TEXT_PART; any other config as it is.

    Raises: ValueError without a text_config.
    """
    named, text = raw.get("architectures"), raw.get("text_config")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    kind = raw.get("model_type")
    inner = WITH_TEXT_PART.get(name) if isinstance(name, str) else None
    if name is None and isinstance(kind, str):
        inner = _TYPES_WITH_TEXT_PART.get(kind)
    if inner is None:
        return raw
    if not isinstance(text, dict):
        raise ValueError(f"{where}: text_config must be an object, got {text!r:.200}")
    outer = {key: raw[key] for key in _OUTER if raw.get(key) is not None}
    fallbacks = {key: raw[key] for key in _FALLBACKS if key in raw}
    given = {key: value for key, value in text.items() if value is not None}
    rope = {key: _without_mrope(given[key]) for key in ("rope_scaling", "rope_parameters") if key in given}
    return {**fallbacks, **given, **rope, **outer, "architectures": [inner], "model_type": "qwen3"}


def why_not(architecture: Any, model_type: Any) -> str:
    """Return how an architecture differs, as the end of a sentence; "" if that is not known."""
    names = [str(name).replace("_", "").lower() for name in (architecture, model_type)]
    for kind in sorted(_DIFFERENT, key=len, reverse=True):
        if any(name.startswith(kind.replace("_", "")) for name in names):
            return f": {_DIFFERENT[kind]}"
    return ""


def _without_mrope(rope: Any) -> Any:
    return {key: value for key, value in rope.items() if key not in _OF_MROPE} if isinstance(rope, dict) else rope
