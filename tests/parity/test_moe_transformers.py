"""Mixture of experts against transformers' Qwen3Moe, from the same state dict; checkpoints that it writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import assert_near, assert_same, engine_of, random_ids, randomized, small_config
from safetensors import safe_open
from test_quantization import relative_error
from test_quantized_experts import with_dequantized_weights
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3fast import load_model
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.engine import StepKind
from qwen3fast.kernels import cpu
from qwen3fast.model import Qwen3
from qwen3fast.model.yarn import Yarn
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS

CONFIG = small_config(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=False)
SHAPES = {
    "plain": {},
    "renormalized": {"norm_topk_prob": True},
    "every second layer": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "dense layers": {"mlp_only_layers": (0, 2), "num_hidden_layers": 3, "norm_topk_prob": True},
    "step and dense layers": {"mlp_only_layers": (1,), "decoder_sparse_step": 2, "num_hidden_layers": 4},
    "one expert a token": {"num_experts_per_tok": 1},
    "all experts": {"num_experts_per_tok": 8, "norm_topk_prob": True},
    "tied, bias": {"tie_word_embeddings": True, "attention_bias": True},
    "yarn": {"yarn": Yarn(4.0, 16)},
}


def reference_of(model: Qwen3, dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    """transformers' model with our config and weights, expert by expert, attention in plain products."""
    settings = {
        **CheckpointConfig(model.config).to_dict(),
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    reference = Qwen3MoeForCausalLM._from_config(Qwen3MoeConfig(**settings), dtype=dtype)
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 21), (1, 1), (3, 1)])
def test_logits_equal_transformers(shape, batch, tokens):
    model = randomized(replace(CONFIG, **SHAPES[shape]))
    token_BT = random_ids(batch, tokens)
    assert_near(model(token_BT), reference_of(model)(token_BT).logits)


@pytest.mark.parametrize("shape", ["plain", "renormalized", "dense layers"])
def test_prefill_and_decode_equal_transformers(shape):
    """Two rows of different lengths, decoded together on tokens of their own."""
    model = randomized(replace(CONFIG, **SHAPES[shape]))
    reference, prompts = reference_of(model), [random_ids(n, seed=n).tolist() for n in (37, 5)]
    engine = engine_of(model, 2, 128)
    for row, prompt in enumerate(prompts):
        logits_V = engine.prefill_whole(row, prompt)[0]
        assert_near(logits_V, reference(torch.tensor([prompt])).logits[0, -1])
        prompt.append(int(logits_V.argmax()))
        engine.set_row(row, len(prompt) - 1)
        engine.state.input_R[row] = prompt[-1]
    for _ in range(6):
        expected = [reference(torch.tensor([prompt])).logits[0, -1].argmax().item() for prompt in prompts]
        engine.decode(2, 128, StepKind())
        assert engine.state.output_R.tolist() == expected
        for prompt, token in zip(prompts, expected, strict=True):
            prompt.append(token)


def test_bfloat16_is_within_rounding_of_transformers():
    # All experts are active: rounding cannot change the choice.
    model = randomized(replace(CONFIG, **SHAPES["all experts"])).bfloat16()
    token_BT = random_ids(2, 21)
    assert_near(model(token_BT), reference_of(model, torch.bfloat16)(token_BT).logits, torch.bfloat16)


@pytest.mark.parametrize(
    ("format", "shape", "batch", "tokens"),
    [
        ("int8", "plain", 2, 21),
        ("int8", "all experts", 3, 1),
        ("int4", "renormalized", 3, 1),
        ("int4", "dense layers", 2, 21),
        ("fp8", "renormalized", 2, 21),
        ("fp8", "plain", 3, 1),
    ],
)
def test_quantized_experts_equal_transformers_with_the_same_numbers(format, shape, batch, tokens, monkeypatch):
    """Quantized weights in the plain form, against transformers with the dequantized weights."""
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    config = replace(CONFIG, vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
    config = replace(config, **SHAPES[shape])
    model = randomized(config)
    quantize_model(model, format, torch.float32)
    token_BT = random_ids(batch, tokens, vocab_size=96)
    reference = reference_of(with_dequantized_weights(model, config))
    assert_near(model(token_BT), reference(token_BT).logits)


@pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
@pytest.mark.parametrize("format", [FORMATS["int8"], FORMATS["int4"]], ids=lambda f: f.name)
def test_rounded_experts_of_the_operation_are_near_transformers(format):
    """The operation also quantizes activations. All experts are active: rounding cannot change the choice."""
    config = replace(CONFIG, vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32)
    config = replace(config, **SHAPES["all experts"])
    model = randomized(config)
    quantize_model(model, format.name, torch.float32)
    token_BT = random_ids(2, 21, vocab_size=96)
    logits_BTV = reference_of(with_dequantized_weights(model, config))(token_BT).logits
    assert relative_error(model(token_BT), logits_BTV) < 2e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_and_config_are_those_of_transformers(shape):
    config = replace(CONFIG, **SHAPES[shape])
    theirs = Qwen3MoeConfig(**CheckpointConfig(config).to_dict())
    ours = {name: tuple(tensor.shape) for name, tensor in Qwen3(config).state_dict().items()}
    assert ours == {name: tuple(t.shape) for name, t in Qwen3MoeForCausalLM(theirs).state_dict().items()}
    assert CheckpointConfig.from_dict({**theirs.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}).model == config


def test_head_dim_that_the_config_does_not_name_is_transformers():
    raw = {name: value for name, value in CheckpointConfig(CONFIG).to_dict().items() if name != "head_dim"}
    reference = Qwen3MoeForCausalLM(Qwen3MoeConfig(**raw))
    assert CheckpointConfig.from_dict(raw).model.head_dim == reference.model.layers[0].self_attn.head_dim


@pytest.mark.parametrize("shape", ["renormalized", "dense layers"])
def test_checkpoint_that_transformers_writes_is_read(tmp_path, shape):
    model = randomized(replace(CONFIG, **SHAPES[shape]))
    reference_of(model).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert "model.layers.1.mlp.experts.7.gate_proj.weight" in tensors.keys()  # noqa: SIM118
    loaded = load_model(tmp_path, device="cpu", dtype="float32")
    for name, tensor in model.state_dict().items():
        assert_same(loaded.state_dict()[name], tensor)
