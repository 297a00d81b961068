"""Prequantized fp8 checkpoints against transformers, which also dequantizes them on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import assert_near, assert_same, random_ids, small_config
from prequantized_layouts import FP8, write_fp8_experts, write_prequantized
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers import quantizer_finegrained_fp8

from qwen3fast import load_model
from qwen3fast.quantization.layers import QuantizedLinear

CONFIG = small_config(
    vocab_size=96, hidden_size=128, intermediate_size=256, head_dim=32, tie_word_embeddings=False, dtype=torch.bfloat16
)


@pytest.fixture(autouse=True)
def no_accelerate(monkeypatch):
    """Transformers asks for accelerate, which loading to one device makes no use of."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)


def dequantized_by_transformers(folder):
    options = {"dtype": torch.bfloat16, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("files", [1, 3])
def test_weights_and_logits_equal_those_of_transformers(tmp_path, scale_dtype, files):
    write_prequantized(
        tmp_path, CONFIG, {**FP8, "modules_to_not_convert": ["lm_head"]}, scale_dtype=scale_dtype, files=files
    )
    theirs = dequantized_by_transformers(tmp_path)
    ours, packed = (load_model(tmp_path, device="cpu", quantization=name) for name in ("dequantize", None))
    for name, parameter in theirs.named_parameters():
        assert_same(ours.get_parameter(name), parameter.detach())
        layer = packed.get_submodule(name.rpartition(".")[0])
        weight = layer.dequantize().bfloat16() if isinstance(layer, QuantizedLinear) else layer.weight
        assert_same(weight, parameter.detach())
    tokens = random_ids(2, 9, vocab_size=96)
    with torch.no_grad():
        assert_near(ours(tokens), theirs(tokens).logits, torch.bfloat16)
        assert_near(ours.float()(tokens), theirs.float()(tokens).logits)


def test_experts_equal_those_of_transformers(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    write_fp8_experts(tmp_path, replace(CONFIG, **sizes))
    theirs, ours = dequantized_by_transformers(tmp_path), load_model(tmp_path, device="cpu", quantization="dequantize")
    for name, parameter in theirs.named_parameters():
        assert_same(ours.get_parameter(name), parameter.detach())
    tokens = random_ids(2, 9, vocab_size=96)
    with torch.no_grad():
        assert_near(ours.float()(tokens), theirs.float()(tokens).logits)
