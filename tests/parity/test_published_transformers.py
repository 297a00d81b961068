"""Published fp8 checkpoints against transformers, which dequantises them on the CPU, too."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_near, assert_same, random_ids, small_config
from published_layouts import FP8, publish
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers import quantizer_finegrained_fp8

from qwen3fast import load_model

CONFIG = small_config(
    vocab_size=96, hidden_size=128, intermediate_size=256, head_dim=32, tie_word_embeddings=False, dtype=torch.bfloat16
)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("files", [1, 3])
def test_weights_and_logits_equal_those_of_transformers(tmp_path, monkeypatch, scale_dtype, files):
    # It asks for accelerate, which loading to one device makes no use of.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    publish(tmp_path, CONFIG, {**FP8, "modules_to_not_convert": ["lm_head"]}, scale_dtype=scale_dtype, files=files)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ours = load_model(tmp_path, device="cpu")
    for name, parameter in theirs.named_parameters():
        assert_same(ours.get_parameter(name), parameter.detach())
    tokens = random_ids(2, 9, vocab_size=96)
    with torch.no_grad():
        assert_near(ours(tokens), theirs(tokens).logits, torch.bfloat16)
        assert_near(ours.float()(tokens), theirs.float()(tokens).logits)
