"""On a GPU: prompts in bfloat16, whole and in chunks."""

import copy

import pytest
import torch
from conftest import assert_near, random_ids, random_tensor, randomized, small_config

from gpu.conftest import DEVICE
from qwen3fast import Generator, SamplingParams
from qwen3fast.kernels import cuda
from qwen3fast.kernels.attention import attend, attend_last


@pytest.mark.skipif(DEVICE.type == "cpu", reason="FlashAttention is on CUDA devices only")
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (32, 32), (32, 96), (33, 1000), (512, 1536)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (16, 8), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attention_over_the_last_positions_equals_the_masked_form(tokens, length, heads, kv_heads, head_dim):
    q_BTHD = random_tensor(1, tokens, heads, head_dim).bfloat16().to(DEVICE)
    k, v = (random_tensor(1, kv_heads, length, head_dim, seed=s).bfloat16().to(DEVICE) for s in (1, 2))
    cuda.load(DEVICE)
    assert cuda.can_flash_attention(q_BTHD)
    mask_BTL = torch.arange(length) <= torch.arange(length - tokens, length)[None, :, None]
    expected = attend(q_BTHD.float(), k.float(), v.float(), mask_BTL.to(DEVICE))
    assert_near(attend_last(q_BTHD, k, v), expected, torch.bfloat16)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_prefill_in_bfloat16_equals_the_plain_model(compile):
    """In chunks, the later ones over what is in the cache already."""
    sizes = {"head_dim": 64, "hidden_size": 128, "max_position_embeddings": 2048}
    model = randomized(small_config(**sizes, dtype=torch.bfloat16), seed=3)
    ids = random_ids(1, 1100)
    with Generator(copy.deepcopy(model).bfloat16().to(DEVICE), max_seq_len=1300, compile=compile) as generator:
        logits_1V = generator.debug.engine.prefill_whole(0, ids[0].tolist())
    assert_near(logits_1V.cpu(), model(ids)[:, -1], torch.bfloat16)


def test_prompts_that_come_together_get_the_tokens_that_each_gets_alone():
    """In float32, captured where there is a GPU; two of them in two chunks."""
    model = randomized(small_config(head_dim=64, hidden_size=128, max_position_embeddings=512), seed=3).to(DEVICE)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 20, 31, 70, 72, 50, 33, 12)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    options = {"max_seq_len": 256, "max_batch_size": 8, "prefix_reuse": False}
    with Generator(model, compile=DEVICE.type == "cuda", **options) as generator:
        together = [result.token_ids for result in generator.generate(prompts, params)]
        alone = [generator.generate(prompt, params).token_ids for prompt in prompts]
        graphs = generator.debug.engine.graphs
        assert graphs is None or any(key[0] == "prompts" for key in graphs._replays)
    assert together == alone
