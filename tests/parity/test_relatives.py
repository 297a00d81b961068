"""Checkpoints of Qwen3's relatives against transformers: the language model of Qwen3-VL, resized vocabularies."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from conftest import assert_near, random_ids
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from qwen3fast import load_model, read_config

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def vision_model(request, tmp_path):
    """A small Qwen3-VL, saved."""
    torch.manual_seed(0)
    text = {**SIZES, "rope_parameters": MROPE, "eos_token_id": 7}
    config = Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=request.param)
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    return model


def test_language_model_of_qwen3_vl_gives_the_logits_of_transformers(vision_model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ours = load_model(tmp_path, device="cpu", dtype="float32")
    tokens = random_ids(2, 9, vocab_size=96)
    with torch.no_grad():
        assert_near(ours(tokens), vision_model(input_ids=tokens).logits)
    assert ours.config.rope_theta == 5e6
    assert ours.config.eos_token_ids == (7,)
    assert ours.config.tie_word_embeddings == vision_model.config.tie_word_embeddings
    assert "tensors not used: " in caplog.text and "visual" in caplog.text and "more" in caplog.text


def test_language_model_of_qwen3_vl_is_found_with_the_published_rope_settings(vision_model, tmp_path, recwarn):
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    text = raw["text_config"]
    text["rope_theta"] = text["rope_scaling"] = None
    text.pop("rope_parameters")
    text |= {"rope_theta": 5e6, "rope_scaling": {key: MROPE[key] for key in MROPE if key != "rope_theta"}}
    file.write_text(json.dumps(raw))
    ours = load_model(tmp_path, device="cpu", dtype="float32")
    tokens = random_ids(1, 5, vocab_size=96)
    with torch.no_grad():
        assert_near(ours(tokens), vision_model(input_ids=tokens).logits)
    assert not [w for w in recwarn if "RoPE" in str(w.message)]
    raw.pop("architectures")
    file.write_text(json.dumps(raw))
    assert read_config(tmp_path) == ours.config


@pytest.mark.parametrize("size", [70, 96, 101])
@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabularies_give_the_logits_of_transformers(tmp_path, size, tied):
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).eval()
    theirs.resize_token_embeddings(size)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu", dtype="float32")
    assert ours.config.vocab_size == size
    tokens = random_ids(2, 9, vocab_size=70)
    with torch.no_grad():
        assert_near(ours(tokens), theirs(tokens).logits)
