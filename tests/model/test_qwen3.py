"""The whole model: how its parts are joined, and what any causal language model must satisfy."""

import pytest
import torch
from conftest import assert_near, assert_same, random_ids, randomized, small_config
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.model import build_on_meta

MODEL = randomized(small_config())


@given(changed=st.integers(0, 11), seed=st.integers(0, 1000))
def test_qwen3_is_causal(changed, seed):
    token_BT = random_ids(1, 12, seed=seed)
    other = token_BT.clone()
    other[:, changed] = (other[:, changed] + 1) % 97
    difference = (MODEL(token_BT) - MODEL(other)).abs().amax(dim=(0, 2))
    assert difference[:changed].sum() == 0
    assert (difference[changed:] > 0).all()


def test_qwen3_rows_of_a_batch_are_independent():
    token_BT = random_ids(3, 7)
    assert_near(MODEL(token_BT), torch.cat([MODEL(token_BT[b : b + 1]) for b in range(3)]))


def test_qwen3_normalizes_before_the_output_projection():
    hidden = MODEL.hidden(random_ids(1, 4))
    assert_same(MODEL.logits(hidden), MODEL.model.norm(hidden) @ MODEL.lm_head.weight.T)


def test_qwen3_looks_embeddings_up():
    token_BT = random_ids(2, 5)
    assert_same(MODEL.embed(token_BT), MODEL.model.embed_tokens.weight[token_BT])


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_ties_the_output_projection_where_the_config_says_so(tied):
    model = randomized(small_config(tie_word_embeddings=tied))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_build_on_meta_takes_no_memory():
    assert {p.device.type for p in build_on_meta(small_config()).parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_build_on_meta_has_the_dtype_of_the_config(dtype):
    assert {p.dtype for p in build_on_meta(small_config(dtype=dtype)).parameters()} == {dtype}


def test_build_on_meta_keeps_the_tie():
    model = build_on_meta(small_config(tie_word_embeddings=True, dtype=torch.bfloat16))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_num_bytes_leave_an_untied_embedding_out_of_what_a_token_reads(tied, dtype):
    config = small_config(tie_word_embeddings=tied, dtype=dtype)
    model = build_on_meta(config)
    assert model.num_bytes() == config.num_parameters * dtype.itemsize
    assert model.num_bytes(per_token=True) == config.decode_parameters * dtype.itemsize
