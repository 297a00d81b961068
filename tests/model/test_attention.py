"""Attention: against loops over heads and positions, and with a KV cache against without one.

B batch rows   T tokens   S cache positions   L positions read   H query heads   K key/value heads   D head_dim
"""

import pytest
import torch
from conftest import assert_near, assert_same, fill_randomly, random_tensor, small_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen3fast.kernels.attention import attend
from qwen3fast.model import Attention, rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import CacheLayer

SLOTS = 24
GROUPINGS = [(4, 4), (4, 2), (4, 1), (8, 1)]  # query heads, key/value heads


def random_attention(**changes) -> tuple[Attention, ModelConfig]:
    """An attention part with random weights, biases and norm weights, and its config."""
    config = small_config(**changes)
    attention = Attention(config)
    fill_randomly(attention)
    return attention, config


def uncached(attention: Attention, config: ModelConfig, x_BTE: Tensor) -> Tensor:
    """Plain causal attention from position 0."""
    cos_TD, sin_TD = rope_tables(config.head_dim, config.rope_theta, x_BTE.shape[1], x_BTE.device)
    return attention(x_BTE, cos_TD[None], sin_TD[None])


def cached(
    attention: Attention, config: ModelConfig, x_BTE: Tensor, position_BT: Tensor, cache: CacheLayer, length: int
) -> Tensor:
    """Attention through a cache: each token sees the positions up to its own."""
    cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, SLOTS, x_BTE.device)
    mask_BTL = torch.arange(length) <= position_BT[..., None]
    return attention(x_BTE, cos_SD[position_BT], sin_SD[position_BT], position_BT, mask_BTL, cache)


def noisy_cache(config: ModelConfig, rows: int, row_B: Tensor | None = None, seed: int = 9) -> CacheLayer:
    """A cache in which every slot holds large finite numbers left by somebody else."""
    shape = (rows, config.num_key_value_heads, SLOTS, config.head_dim)
    return CacheLayer(1e4 * random_tensor(*shape, seed=seed), 1e4 * random_tensor(*shape, seed=seed + 1), row_B)


def reference_attention(
    attention: Attention, config: ModelConfig, x_TE: Tensor, norm_before_rope: bool = True
) -> Tensor:
    """One row: project, normalize each head, rotate, then for each head and token a softmax over the past."""

    def project(layer: torch.nn.Linear, x_E: Tensor) -> Tensor:
        y = layer.weight.double() @ x_E
        return y if layer.bias is None else y + layer.bias.double()

    def norm(x_D: Tensor, weight_D: Tensor) -> Tensor:
        return x_D / ((x_D**2).mean() + config.rms_norm_eps).sqrt() * weight_D.double()

    def rotate(x_D: Tensor, position: int) -> Tensor:
        half = len(x_D) // 2
        angles = torch.tensor([position * config.rope_theta ** (-i / half) for i in range(half)]).double()
        pairs = torch.complex(x_D[:half], x_D[half:]) * torch.polar(torch.ones(half).double(), angles)
        return torch.cat([pairs.real, pairs.imag])

    def place(x_D: Tensor, weight_D: Tensor, position: int) -> Tensor:
        if norm_before_rope:
            return rotate(norm(x_D, weight_D), position)
        return norm(rotate(x_D, position), weight_D)

    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x_TE = x_TE.double()
    q, k, v = ([project(p, x) for x in x_TE] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    rows = []
    for t in range(len(x_TE)):
        heads = []
        for h in range(H):
            group = h // (H // K)
            own, theirs = slice(h * D, (h + 1) * D), slice(group * D, (group + 1) * D)
            query = place(q[t][own], attention.q_norm.weight, t)
            keys = [place(k[s][theirs], attention.k_norm.weight, s) for s in range(t + 1)]
            weights = torch.softmax(torch.stack([query @ key for key in keys]) / D**0.5, dim=0)
            heads.append(sum(w * v[s][theirs] for s, w in enumerate(weights)))
        rows.append(project(attention.o_proj, torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPINGS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_attention_equals_loops(heads, kv_heads, bias):
    attention, config = random_attention(
        num_attention_heads=heads, num_key_value_heads=kv_heads, attention_bias=bias, rope_theta=100.0
    )
    x_BTE = random_tensor(2, 7, config.hidden_size)
    expected = torch.stack([reference_attention(attention, config, x_TE) for x_TE in x_BTE])
    assert_near(uncached(attention, config, x_BTE), expected)


def test_attention_normalizes_heads_before_rope():
    attention, config = random_attention(rope_theta=100.0)
    x_BTE = random_tensor(1, 7, config.hidden_size)
    y_TE = uncached(attention, config, x_BTE)[0]
    error = {
        order: (y_TE - reference_attention(attention, config, x_BTE[0], norm_before_rope=order)).abs().max().item()
        for order in (True, False)
    }
    assert 1000 * error[True] < error[False]


def test_attention_sizes_come_from_head_dim_not_from_hidden_size():
    attention, config = random_attention()
    assert attention.q_proj.weight.shape == (config.num_attention_heads * config.head_dim, config.hidden_size)
    assert attention.o_proj.weight.shape == (config.hidden_size, config.num_attention_heads * config.head_dim)


@given(changed=st.integers(0, 8), seed=st.integers(0, 1000))
def test_attention_is_causal(changed, seed):
    attention, config = random_attention()
    x_BTE = random_tensor(1, 9, config.hidden_size, seed=seed)
    other = x_BTE.clone()
    other[:, changed] += 1.0
    difference = (uncached(attention, config, x_BTE) - uncached(attention, config, other)).abs().amax(dim=(0, 2))
    assert difference[:changed].sum() == 0
    assert (difference[changed:] > 0).all()


def test_attention_rows_of_a_batch_are_independent():
    attention, config = random_attention()
    x_BTE = random_tensor(3, 5, config.hidden_size)
    alone = torch.cat([uncached(attention, config, x_BTE[b : b + 1]) for b in range(3)])
    assert_near(uncached(attention, config, x_BTE), alone)


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPINGS)
@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [8, 1], [3, 1, 5]], ids=str)
def test_cached_attention_equals_uncached(heads, kv_heads, chunks):
    attention, config = random_attention(num_attention_heads=heads, num_key_value_heads=kv_heads)
    x_BTE = random_tensor(2, sum(chunks), config.hidden_size)
    cache, pieces, start = noisy_cache(config, rows=2), [], 0
    for size in chunks:
        position_BT = torch.arange(start, start + size).expand(2, size)
        x_chunk = x_BTE[:, start : start + size]
        pieces.append(cached(attention, config, x_chunk, position_BT, cache, length=16))
        start += size
    assert_near(torch.cat(pieces, dim=1), uncached(attention, config, x_BTE))


@pytest.mark.parametrize("rows", [None, [0, 1, 2], [3, 0, 2]], ids=["in order", "first rows", "any rows"])
@pytest.mark.parametrize("last", [1, 3], ids=["one token", "several tokens"])
def test_cached_attention_of_ragged_rows_equals_each_row_alone(rows, last):
    attention, config = random_attention()
    row_B = None if rows is None else torch.tensor(rows)
    lengths = [11, 4, 7]
    sequences = [random_tensor(1, n, config.hidden_size, seed=n) for n in lengths]
    cache = noisy_cache(config, rows=4, row_B=row_B)
    for b, x_1TE in enumerate(sequences):
        one_row = cache._replace(row_B=torch.tensor([b if rows is None else rows[b]]))
        past = torch.arange(x_1TE.shape[1] - last)[None]
        cached(attention, config, x_1TE[:, :-last], past, one_row, length=16)
    position_BT = torch.tensor([[n - last + t for t in range(last)] for n in lengths])
    x_BTE = torch.cat([x_1TE[:, -last:] for x_1TE in sequences])
    expected = torch.cat([uncached(attention, config, x_1TE)[:, -last:] for x_1TE in sequences])
    assert_near(cached(attention, config, x_BTE, position_BT, cache, length=16), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_cached_attention_does_not_see_stale_slots(tokens):
    attention, config = random_attention()
    x_BTE = random_tensor(2, tokens, config.hidden_size)
    position_BT = torch.arange(tokens).expand(2, tokens)
    outputs = [
        cached(attention, config, x_BTE, position_BT, noisy_cache(config, rows=2, seed=seed), length=16)
        for seed in (1, 2)
    ]
    assert_same(outputs[0], outputs[1])


def test_cached_attention_does_not_depend_on_the_length_read():
    attention, config = random_attention()
    x_BTE, position_BT = random_tensor(1, 3, config.hidden_size), torch.arange(3)[None]
    outputs = [cached(attention, config, x_BTE, position_BT, noisy_cache(config, 1), n) for n in (3, 8, SLOTS)]
    assert_near(outputs[1], outputs[0])
    assert_near(outputs[2], outputs[0])


@pytest.mark.parametrize(
    ("position", "message"), [(None, "a cache needs positions"), (0, "this form needs a mask")], ids=str
)
def test_cached_attention_needs_positions_and_a_mask(position, message):
    attention, config = random_attention()
    cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, 1, torch.device("cpu"))
    position_BT = None if position is None else torch.tensor([[position]])
    inputs = random_tensor(1, 1, config.hidden_size), cos_SD[None], sin_SD[None], position_BT
    with pytest.raises(AssertionError, match=message):
        attention(*inputs, cache=noisy_cache(config, 1))


@pytest.mark.parametrize(("heads", "kv_heads"), GROUPINGS)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_attend_equals_loops(heads, kv_heads, tokens):
    B, L, D = 2, 6, 8
    q_BTHD = random_tensor(B, tokens, heads, D)
    k_BKLD, v_BKLD = random_tensor(2, B, kv_heads, L, D, seed=1)
    mask_BTL = random_tensor(B, tokens, L, seed=2) > 0
    mask_BTL[..., 0] = True  # each query sees something
    expected = torch.empty(B, heads, tokens, D, dtype=torch.float64)
    for b in range(B):
        for h in range(heads):
            for t in range(tokens):
                seen = mask_BTL[b, t].nonzero().flatten().tolist()
                kv_head = h // (heads // kv_heads)
                scores = [(q_BTHD[b, t, h].double() @ k_BKLD[b, kv_head, s].double()) / D**0.5 for s in seen]
                weights = torch.softmax(torch.stack(scores), dim=0)
                expected[b, h, t] = sum(w * v_BKLD[b, kv_head, s].double() for w, s in zip(weights, seen, strict=True))
    assert_near(attend(q_BTHD, k_BKLD, v_BKLD, mask_BTL), expected)
