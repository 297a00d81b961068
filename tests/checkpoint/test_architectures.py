"""Relatives of Qwen3 that are refused: in one sentence that says what is different."""

from __future__ import annotations

import pytest
from conftest import small_config

from qwen3fast.checkpoint.hf_config import CheckpointConfig

RAW = CheckpointConfig(small_config()).to_dict()


@pytest.mark.parametrize(
    ("architecture", "model_type", "reason"),
    [
        ("Qwen3NextForCausalLM", "qwen3_next", "gated delta networks"),
        ("Qwen3_5ForConditionalGeneration", "qwen3_5", "gated delta networks"),
        ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", "gated delta networks"),
        (None, "qwen3_5", "gated delta networks"),
        ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", "experts are stored transposed"),
        ("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe", "sound, images and speech"),
        ("Qwen2ForCausalLM", "qwen2", "biases and does not normalize queries and keys"),
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "biases and does not normalize queries and keys"),
    ],
)
def test_relatives_are_refused_with_what_is_different(architecture, model_type, reason):
    raw = RAW | {"architectures": [architecture] if architecture else None, "model_type": model_type}
    with pytest.raises(
        ValueError, match=rf"architecture .* is not supported: .*{reason}.*; supported: Qwen3ForCausalLM"
    ):
        CheckpointConfig.from_dict(raw)


def test_strangers_are_refused_without_a_reason():
    with pytest.raises(ValueError, match="architecture 'LlamaForCausalLM' is not supported; supported: Qwen3For"):
        CheckpointConfig.from_dict(RAW | {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("text", [None, 5, []])
def test_qwen3_vl_without_a_text_config_is_refused(text):
    raw = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": text}
    with pytest.raises(ValueError, match="text_config"):
        CheckpointConfig.from_dict(raw)
