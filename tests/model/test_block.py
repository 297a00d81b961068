"""One block is its parts in pre-norm order, with a residual around each half."""

import torch
from conftest import assert_near, assert_same, fill_randomly, random_tensor, small_config

from qwen3fast.model import Block, rope_tables
from qwen3fast.model.kv_cache import CacheLayer

CONFIG = small_config()


def random_block() -> Block:
    """A block with every parameter random."""
    block = Block(CONFIG)
    fill_randomly(block)
    return block


def tables(num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE tables for a batch that starts at position 0."""
    cos_TD, sin_TD = rope_tables(CONFIG.head_dim, CONFIG.rope_theta, num_positions, torch.device("cpu"))
    return cos_TD[None], sin_TD[None]


def test_block_is_its_parts_with_residuals():
    block, x_BTE = random_block(), random_tensor(2, 5, CONFIG.hidden_size)
    cos_BTD, sin_BTD = tables(5)
    middle = x_BTE + block.self_attn(block.input_layernorm(x_BTE), cos_BTD, sin_BTD)
    expected = middle + block.mlp(block.post_attention_layernorm(middle))
    assert_same(block(x_BTE, cos_BTD, sin_BTD), expected)


def test_block_passes_the_residual_stream_through():
    block, x_BTE = random_block(), random_tensor(2, 5, CONFIG.hidden_size)
    block.self_attn.o_proj.weight.zero_()
    block.mlp.down_proj.weight.zero_()
    assert_same(block(x_BTE, *tables(5)), x_BTE)


def test_block_with_a_cache_equals_without():
    block, x_BTE = random_block(), random_tensor(2, 5, CONFIG.hidden_size)
    cos_BTD, sin_BTD = tables(5)
    shape = (2, CONFIG.num_key_value_heads, 8, CONFIG.head_dim)
    cache = CacheLayer(1e4 * random_tensor(*shape, seed=1), 1e4 * random_tensor(*shape, seed=2))
    pieces = []
    for start, end in ((0, 3), (3, 4), (4, 5)):
        position_BT = torch.arange(start, end).expand(2, end - start)
        mask_BTL = torch.arange(8) <= position_BT[..., None]
        cos, sin = cos_BTD[:, start:end], sin_BTD[:, start:end]
        pieces.append(block(x_BTE[:, start:end], cos, sin, position_BT, mask_BTL, cache))
    assert_near(torch.cat(pieces, dim=1), block(x_BTE, cos_BTD, sin_BTD))


def test_block_does_not_change_its_input():
    block, x_BTE = random_block(), random_tensor(1, 3, CONFIG.hidden_size)
    before = x_BTE.clone()
    block(x_BTE, *tables(3))
    assert_same(x_BTE, before)
