"""Logits and parts of random models against transformers' Qwen3, from the same state dict.

The parts are compared on the inputs that transformers itself gave them, so a failure names the part.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import assert_near, random_ids, randomized, small_config
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.yarn import Yarn

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "bias": {"attention_bias": True},
    "ratio 1": {"num_key_value_heads": 4},
    "ratio 4": {"num_key_value_heads": 1},
    "ratio 8": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "head_dim below hidden_size / heads": {"head_dim": 8},
    "head_dim 128": {"head_dim": 128, "rope_theta": 1e6},
    "eps": {"rms_norm_eps": 1e-2},
    "everything": {
        "num_attention_heads": 8,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 500.0,
    },
}
PARTS = [
    "model.layers.0.input_layernorm",
    "model.layers.1.post_attention_layernorm",
    "model.layers.0.self_attn.q_norm",
    "model.layers.1.self_attn.k_norm",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn",
    "model.layers.1.self_attn",
    "model.layers.0.mlp",
    "model.layers.1.mlp",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "lm_head",
]


def reference_of(model: Qwen3, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """transformers' model with our config and weights, computing attention in plain products."""
    settings = {**CheckpointConfig(model.config).to_dict(), "attn_implementation": "eager"}
    # Built in its dtype, not converted: `.to(bfloat16)` would round the RoPE frequencies too.
    reference = Qwen3ForCausalLM._from_config(Qwen3Config(**settings), dtype=dtype)
    reference.load_state_dict(model.state_dict(), strict=True)
    return reference.eval().requires_grad_(False)


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest expected value."""
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_in_float32(shape):
    model = randomized(small_config(**SHAPES[shape]))
    token_BT = random_ids(2, 21)
    assert_near(model(token_BT), reference_of(model)(token_BT).logits)


@pytest.mark.parametrize("seed", range(4))
def test_logits_equal_transformers_for_other_weights(seed):
    model = randomized(small_config(), seed=seed)
    token_BT = random_ids(1, 40, seed=seed)
    assert_near(model(token_BT), reference_of(model)(token_BT).logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_within_rounding_of_transformers_in_bfloat16(shape):
    model = randomized(small_config(**SHAPES[shape])).bfloat16()
    token_BT = random_ids(2, 21)
    assert_near(model(token_BT), reference_of(model, torch.bfloat16)(token_BT).logits, torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_errors_are_no_larger_than_those_of_transformers(shape):
    model = randomized(small_config(**SHAPES[shape])).bfloat16()
    token_BT = random_ids(2, 21)
    ours, theirs = model(token_BT), reference_of(model, torch.bfloat16)(token_BT).logits
    exact = model.float()(token_BT)
    assert largest_error(ours, exact) < 1.5 * largest_error(theirs, exact)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_part_equals_transformers(part, bias):
    model = randomized(small_config(attention_bias=bias))
    reference, token_BT = reference_of(model), random_ids(2, 9)
    seen = {}

    def record(_, args, kwargs, output):
        seen["input"] = args[0] if args else kwargs["hidden_states"]
        seen["output"] = output[0] if isinstance(output, tuple) else output

    reference.get_submodule(part).register_forward_hook(record, with_kwargs=True)
    reference(token_BT)
    needs_positions = part.endswith("self_attn") or part.split(".")[-1].isdigit()
    cos_TD, sin_TD = rope_tables(model.config.head_dim, model.config.rope_theta, 9, token_BT.device)
    positions = (cos_TD[None], sin_TD[None]) if needs_positions else ()
    assert_near(model.get_submodule(part)(seen["input"], *positions), seen["output"])


@pytest.mark.parametrize(("head_dim", "theta"), [(16, 10_000.0), (128, 1_000_000.0), (64, 5_000_000.0)])
def test_rope_tables_equal_transformers(head_dim, theta):
    model = randomized(small_config(head_dim=head_dim, rope_theta=theta))
    ours = torch.stack(rope_tables(head_dim, theta, 500, torch.device("cpu")))
    theirs = torch.cat(reference_of(model).model.rotary_emb(torch.zeros(1), torch.arange(500)[None]))
    assert_near(ours, theirs)


YARNS = {
    "as Qwen3 says": Yarn(4.0, 32768),
    "short": Yarn(2.5, 64),
    "attention_factor": Yarn(4.0, 512, attention_factor=1.3),
    "betas": Yarn(8.0, 4096, beta_fast=16.0, beta_slow=2.0),
    "mscale": Yarn(4.0, 1024, mscale=0.7, mscale_all_dim=0.9),
    "mscale alone": Yarn(4.0, 1024, mscale=0.7),
    "not truncated": Yarn(4.0, 2048, truncate=False),
    "narrow": Yarn(4.0, 2048, beta_fast=1.0, beta_slow=1.0, truncate=False),
    "factor 1": Yarn(1.0, 256),
}


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 10_000.0), (128, 1_000_000.0)])
def test_yarn_tables_equal_transformers(head_dim, theta, yarn):
    config = small_config(head_dim=head_dim, rope_theta=theta, yarn=yarn)
    ours = torch.stack(rope_tables(head_dim, theta, 500, torch.device("cpu"), yarn))
    theirs = torch.cat(reference_of(randomized(config)).model.rotary_emb(torch.zeros(1), torch.arange(500)[None]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
def test_yarn_logits_equal_transformers_beyond_the_original_length(yarn):
    yarn = replace(yarn, original_max_position_embeddings=32)
    model, token_BT = randomized(small_config(yarn=yarn)), random_ids(2, 100)
    expected = reference_of(model)(token_BT).logits
    assert_near(model(token_BT), expected)
    plain = randomized(replace(model.config, yarn=None))(token_BT)
    assert yarn.factor == 1 or largest_error(plain, expected) > 1e-2


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
def test_yarn_that_transformers_writes_is_read_back(yarn):
    config = small_config(yarn=yarn)
    assert CheckpointConfig.from_dict(Qwen3Config(**CheckpointConfig(config).to_dict()).to_dict()).model == config


@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_names_and_shapes_are_those_of_transformers(shape):
    config = small_config(**SHAPES[shape])
    ours = {name: tuple(tensor.shape) for name, tensor in Qwen3(config).state_dict().items()}
    theirs = Qwen3ForCausalLM(Qwen3Config(**CheckpointConfig(config).to_dict())).state_dict()
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_config_that_transformers_writes_is_read_back(shape):
    config = small_config(**SHAPES[shape])
    assert CheckpointConfig.from_dict(Qwen3Config(**CheckpointConfig(config).to_dict()).to_dict()).model == config
