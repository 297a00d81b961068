"""RoPE's settings in config.json: each key is used, checked or named."""

from __future__ import annotations

import pytest

from qwen3fast.checkpoint.rope_config import read_rope_theta, read_yarn, refuse_rope, yarn_to_dict

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_attn_factor_is_read_and_written():
    yarn = read_yarn({"rope_scaling": {**YARN, "attn_factor": 0.875}})
    assert yarn.attn_factor == 0.875
    assert read_yarn({"rope_scaling": yarn_to_dict(yarn)}) == yarn
    assert "attn_factor" not in yarn_to_dict(read_yarn({"rope_scaling": YARN}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"attn_factor": 0}, "attn_factor must be a positive number"),
        ({"attn_factor": 2, "attention_factor": 1.1}, "only one of them can be given"),
        ({"extrapolation_factor": 2}, "extrapolation_factor=2 is not supported"),
        ({"mrope_section": [1], "x": 2}, "mrope_section, x are not supported"),
    ],
)
def test_no_key_of_yarn_is_ignored(extra, message):
    with pytest.raises(ValueError, match=message):
        read_yarn({"rope_scaling": {**YARN, **extra}})


def test_settings_per_kind_of_layer_are_refused():
    raw = {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}
    with pytest.raises(ValueError, match="RoPE settings of their own for full_attention are not supported"):
        refuse_rope(raw, "x")


def test_null_settings_are_absent():
    raw = {"rope_scaling": {"rope_theta": None, "rope_type": None, "factor": None, "unknown": None}, "rope_theta": 5.0}
    refuse_rope(raw, "x")
    assert read_yarn(raw) is None and read_rope_theta(raw) == 5.0
