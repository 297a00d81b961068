"""The C++ operations against their plain PyTorch forms, alone and inside a compiled model."""

import copy
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import test_cpu_sampler
import torch
import torch.nn.functional as F
from conftest import TOLERANCES, assert_near, assert_same, engine_of, random_tensor, randomized, small_config
from test_cpu_steps import step_case

from qwen3fast.engine import StepKind
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.decode_layers import MAX_DECODE_ROWS, DecodeLayersCall, LayerTensors
from qwen3fast.kernels.cpu.decode_step import StepTensors
from qwen3fast.kernels.cpu.ops import pack_scales
from qwen3fast.kernels.cpu.structures import RowLimits, Tiles
from qwen3fast.kernels.cpu.tiles import are_usable
from qwen3fast.model import MoE, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache, quantize_vectors
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import ALL_FORMATS, FORMATS, SHORT_NL4, pack_int4, pack_int8, quantize
from qwen3fast.quantization.int6 import pack_int6
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.quantization.nl4 import pack_nl4
from qwen3fast.quantization.uint4 import pack_minimums

CPU = torch.device("cpu")
PACKED = ["int8", "int4", "uint4", "fp8", pytest.param(FORMATS["fp8"].with_blocks(), id="fp8 blocks")]

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")


@pytest.mark.parametrize("rows", [*range(1, 18), 31, 33, 48, 49, 95, 260])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 16), (7, 48), (304, 1024), (1001, 80), (24, 112)])
def test_linear_equals_the_plain_product(rows, out_features, in_features):
    x = random_tensor(rows, in_features).bfloat16()
    weight = random_tensor(out_features, in_features, seed=1).bfloat16()
    expected = F.linear(x.float(), weight.float())
    assert_near(torch.ops.qwen3fast.linear(x, weight), expected, torch.bfloat16)


def test_rows_of_a_product_do_not_depend_on_each_other():
    x, weight = random_tensor(100, 96).bfloat16(), random_tensor(40, 96, seed=1).bfloat16()
    y = torch.ops.qwen3fast.linear(x, weight)
    for first, last in ((0, 16), (3, 20), (50, 100)):
        assert torch.equal(torch.ops.qwen3fast.linear(x[first:last], weight), y[first:last])


@pytest.mark.parametrize("in_features", [16, 80, 1040, 3072, 8720])
def test_a_row_of_a_product_is_the_same_alone_and_among_few(in_features):
    """Up to 7 rows, and any number if outputs are no multiple of 8, pass over single rows and blocks of the weight."""
    outputs = 128 * torch.get_num_threads() + 15  # enough per thread for a copy of x
    x, weight = random_tensor(70, in_features).bfloat16(), random_tensor(outputs, in_features, seed=1).bfloat16()
    run = torch.ops.qwen3fast.linear
    alone = torch.cat([run(row, weight) for row in x.split(1)])
    for rows in (*range(2, 20), 24, 25, 29, 32, 33, 70):
        assert torch.equal(run(x[:rows], weight), alone[:rows])


def test_linear_uses_the_forms_that_limits_name():
    x, weight = random_tensor(40, 96).bfloat16(), random_tensor(48, 96, seed=1).bfloat16()
    run = torch.ops.qwen3fast.linear
    assert torch.equal(run(x, weight, RowLimits(dequantized=40)), F.linear(x, weight))
    assert torch.equal(run(x, weight, RowLimits(dequantized=41)), run(x, weight))


def test_linear_keeps_leading_dimensions_and_accepts_strides():
    x = random_tensor(32, 2, 3).bfloat16().permute(1, 2, 0)
    weight = random_tensor(5, 32, seed=1).bfloat16()
    y = torch.ops.qwen3fast.linear(x, weight)
    assert y.shape == (2, 3, 5)
    assert_near(y, F.linear(x.float(), weight.float()), torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(1, 20).bfloat16(), torch.zeros(4, 20).bfloat16()),
        (torch.zeros(1, 16), torch.zeros(4, 16)),
        (torch.zeros(1, 32).bfloat16(), torch.zeros(4, 16).bfloat16()),
    ],
    ids=["odd width", "float32", "other width"],
)
def test_linear_refuses_what_it_cannot_do(x, weight):
    with pytest.raises(ValueError, match="linear: "):
        torch.ops.qwen3fast.linear(x, weight)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(
    ("format", "level", "weight"),
    [
        ("int8", 0, -128), ("int8", 255, 127), ("int6", 0, -32), ("int6", 63, 31), ("uint5", 31, 30), ("int4", 0, -8),
        ("int4", 15, 7), ("nl4", 0, -127), ("nl4", 15, 113),
    ],
)  # fmt: skip
def test_the_largest_levels_do_not_overflow(format, level, weight, rows):
    levels, one = torch.full((32, 256), level, dtype=torch.uint8), torch.ones(32, 16)
    packed = {
        "int8": lambda: pack_int8(levels, one[:, 0].contiguous()),
        "int6": lambda: pack_int6(levels, one[:, :1], one),
        "uint5": lambda: pack_minimums(levels, one[:, :1], one[:, :1], one[:, :8], one[:, :8], is_short=True, bits=5),
        "int4": lambda: pack_int4(levels, one[:, :8]),
        "nl4": lambda: pack_nl4(levels, one[:, :1], one[:, :8]),
    }[format]()
    x = torch.tensor([1.0, -1.0] * rows)[:rows, None].expand(rows, 256).bfloat16().contiguous()
    y = torch.ops.qwen3fast.quantized_linear(x, [packed.weight], [packed.scale])
    assert_near(y, (x.float().sum(dim=1, keepdim=True) * weight).expand(rows, 32), torch.bfloat16)


def stored(x_RKSD, dtype):
    """Keys or values as a cache of this dtype holds them, and their scales."""
    return quantize_vectors(x_RKSD) if dtype == torch.int8 else (x_RKSD, None)


def as_read(x_RKSD, scale_RKS):
    return x_RKSD.float() if scale_RKS is None else x_RKSD.float() * scale_RKS[..., None]


def attend_plainly(q_BTHD, k_RKSD, v_RKSD, position_B1):
    """Return SDPA's attention of one query per row, (B, H, 1, D); what lies beyond the used length may be anything."""
    mask_BTL = torch.arange(k_RKSD.shape[2]) <= position_B1[..., None]
    k, v = (torch.where(mask_BTL[..., None], x[: len(q_BTHD)], 0.0) for x in (k_RKSD, v_RKSD))
    q = q_BTHD.transpose(1, 2).float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTL[:, None], enable_gqa=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (8, 2), (7, 1), (16, 2)])
@pytest.mark.parametrize("head_dim", [32, 96, 128, 160])
@pytest.mark.parametrize("lengths", [[1], [2, 63], [64, 65, 300], [15, 16, 17, 33, 127]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_decode_attention_equals_sdpa(heads, kv_heads, head_dim, lengths, dtype):
    batch = len(lengths)
    q_BTHD = random_tensor(batch, 1, heads, head_dim).bfloat16()
    k_RKSD, v_RKSD = (random_tensor(batch + 1, kv_heads, 301, head_dim, seed=s).bfloat16() for s in (1, 2))
    position_B1 = torch.tensor(lengths)[:, None] - 1
    for row, length in enumerate(lengths):  # what lies beyond the used length must not be read
        k_RKSD[row, :, length:] = v_RKSD[row, :, length:] = 1e30
    (k_RKSD, k_scale), (v_RKSD, v_scale) = stored(k_RKSD, dtype), stored(v_RKSD, dtype)
    expected = attend_plainly(q_BTHD, as_read(k_RKSD, k_scale), as_read(v_RKSD, v_scale), position_B1)
    actual = torch.ops.qwen3fast.decode_attention(q_BTHD, k_RKSD, v_RKSD, position_B1, k_scale, v_scale)
    assert_near(actual, expected, torch.bfloat16)


def test_decode_attention_survives_large_scores():
    q = torch.full((1, 1, 1, 32), 100.0).bfloat16()
    k = torch.zeros(1, 1, 4, 32).bfloat16()
    k[0, 0, 2] = 100.0
    v = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 32).bfloat16().contiguous()
    assert torch.equal(
        torch.ops.qwen3fast.decode_attention(q, k, v, torch.tensor([[3]])), torch.full((1, 1, 1, 32), 2.0).bfloat16()
    )


@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
def test_attention_passes_nan_on(spoiled):
    tensors = {name: random_tensor(1, 2, 40, 32, seed=i).bfloat16() for i, name in enumerate("qkv")}
    tensors["q"] = tensors["q"].transpose(1, 2).contiguous()  # (1, 40, 2, 32)
    tensors[spoiled][0, 0, 0, 0] = float("nan")  # the first token's, or the first head's first position
    position, row = torch.arange(40)[None], torch.tensor([0])
    prefill = torch.ops.qwen3fast.prefill_attention(*tensors.values(), position, row)
    assert prefill[0, 0, 0].isnan().any() and not prefill[0, :, 1].isnan().any()
    q_B1HD = tensors.pop("q")[:, :1]
    decode = torch.ops.qwen3fast.decode_attention(q_B1HD, *tensors.values(), position[:, -1:])
    assert decode[0, 0].isnan().any() and not decode[0, 1].isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_decode_attention_over_an_int8_cache_passes_nan_on(value):
    q_BTHD = random_tensor(1, 1, 4, 32).bfloat16()
    (k, k_scale), (v, v_scale) = (quantize_vectors(random_tensor(1, 2, 40, 32, seed=s)) for s in (1, 2))
    q_BTHD[0, 0, 1, 3] = value
    y_BHTD = torch.ops.qwen3fast.decode_attention(q_BTHD, k, v, torch.tensor([[39]]), k_scale, v_scale)
    assert y_BHTD[0, 1].isnan().all() and y_BHTD[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_results_do_not_depend_on_which_thread_does_a_part(format):
    """A product and attention are bit for bit as one thread computes them."""
    x, weight = random_tensor(70, 256).bfloat16(), random_tensor(1040, 256, seed=1).bfloat16()
    packed = format and operands(weight, FORMATS[format])
    q, k, v = (random_tensor(1, *shape, seed=2).bfloat16() for shape in ((70, 8, 32), (4, 80, 32), (4, 80, 32)))
    position, row, threads = torch.arange(70)[None], torch.tensor([0]), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            if packed is None:
                y = torch.ops.qwen3fast.linear(x, weight)
            else:
                y = torch.ops.qwen3fast.quantized_linear(x, [packed.weight], [packed.scale])
            results.append((y, torch.ops.qwen3fast.prefill_attention(q, k, v, position, row)))
    finally:
        torch.set_num_threads(threads)
    for other, attention in results[1:]:
        assert torch.equal(other, results[0][0])
        assert torch.equal(attention, results[0][1])


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_decode_attention_of_an_empty_row_leaves_the_others_as_they_are(row, dtype):
    q_BTHD = random_tensor(3, 1, 4, 32).bfloat16()
    k_RKSD, v_RKSD = (random_tensor(3, 2, 301, 32, seed=s).bfloat16() for s in (1, 2))
    (k, k_scale), (v, v_scale) = stored(k_RKSD, dtype), stored(v_RKSD, dtype)
    position_B1 = torch.tensor([[40], [299], [130]])
    expected = torch.ops.qwen3fast.decode_attention(q_BTHD, k, v, position_B1, k_scale, v_scale)
    position_B1[row] = -1
    actual = torch.ops.qwen3fast.decode_attention(q_BTHD, k, v, position_B1, k_scale, v_scale)
    others = [b for b in range(3) if b != row]
    assert_same(actual[others], expected[others])
    assert actual[row].isfinite().all()


@pytest.mark.parametrize("lengths", [[1], [255], [256], [511, 512], [2000], [5000, 1, 700], [40, 5000]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_decode_attention_does_not_depend_on_threads_or_other_rows(lengths, dtype):
    rows, attend = len(lengths), torch.ops.qwen3fast.decode_attention
    q_BTHD = random_tensor(rows, 1, 4, 32).bfloat16()
    k_RKSD, v_RKSD = (random_tensor(rows, 2, 5003, 32, seed=s).bfloat16() for s in (1, 2))
    (k, k_scale), (v, v_scale) = stored(k_RKSD, dtype), stored(v_RKSD, dtype)
    position_B1 = torch.tensor(lengths)[:, None] - 1
    expected = attend_plainly(q_BTHD, as_read(k, k_scale), as_read(v, v_scale), position_B1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(attend(q_BTHD, k, v, position_B1, k_scale, v_scale))
    finally:
        torch.set_num_threads(threads)
    assert_near(results[0], expected, torch.bfloat16)
    for b in range(rows):
        scales = [None if scale is None else scale[b : b + 1] for scale in (k_scale, v_scale)]
        alone = attend(q_BTHD[b : b + 1], k[b : b + 1], v[b : b + 1], position_B1[b : b + 1], *scales)
        for result in results:
            assert_same(result[b : b + 1], alone)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1), (8, 1)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 5), (0, 33), (7, 32), (100, 96), (250, 50)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_prefill_attention_equals_sdpa(heads, kv_heads, head_dim, start, tokens, dtype):
    rows, used = torch.tensor([2, 0]), start + tokens
    q_BTHD = random_tensor(2, tokens, heads, head_dim).bfloat16()
    k_RKSD, v_RKSD = (random_tensor(3, kv_heads, 301, head_dim, seed=s).bfloat16() for s in (1, 2))
    k_RKSD[:, :, used:] = v_RKSD[:, :, used:] = 1e30  # what lies beyond the used length must not be read
    position_BT = torch.arange(start, used).expand(2, tokens)
    mask_BTL = torch.arange(used) <= position_BT[..., None]
    (k_RKSD, k_scale), (v_RKSD, v_scale) = stored(k_RKSD, dtype), stored(v_RKSD, dtype)
    k, v = (as_read(x, scale)[rows, :, :used] for x, scale in ((k_RKSD, k_scale), (v_RKSD, v_scale)))
    expected = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2).float(), k, v, attn_mask=mask_BTL[:, None], enable_gqa=True
    )
    actual = torch.ops.qwen3fast.prefill_attention(q_BTHD, k_RKSD, v_RKSD, position_BT, rows, k_scale, v_scale)
    assert_near(actual.transpose(1, 2), expected, torch.bfloat16)


@pytest.mark.parametrize(
    ("q", "k"),
    [
        (torch.zeros(1, 2, 2, 48).bfloat16(), torch.zeros(1, 1, 4, 48).bfloat16()),
        (torch.zeros(1, 2, 2, 32), torch.zeros(1, 1, 4, 32)),
        (torch.zeros(1, 2, 3, 32).bfloat16(), torch.zeros(1, 2, 4, 32).bfloat16()),
    ],
    ids=["odd head size", "float32", "heads that do not divide"],
)
def test_prefill_attention_refuses_what_it_cannot_do(q, k):
    with pytest.raises(ValueError, match="prefill_attention: "):
        torch.ops.qwen3fast.prefill_attention(q, k, k, torch.tensor([[0, 1]]), torch.tensor([0]))


def operands(weight, format):
    """Quantize a weight, and return it as operations take it."""
    return format.operands(quantize(weight, format))


def layers_case(format=None, rows=3, positions=300, cache_dtype=torch.bfloat16, **changes):
    """A model of two blocks, a cache full of other numbers, and inputs for a decode step at various positions."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "dtype": torch.bfloat16} | changes
    model = randomized(small_config(**sizes)).bfloat16()
    if format is not None:
        quantize_model(model, format, torch.bfloat16)
    cache = StaticKVCache(model.config, rows + 1, positions, cache_dtype, CPU)
    for i, layer in enumerate(cache.layers()):
        for seed, tensor, scale in ((i, layer.k_RKSD, layer.k_scale_RKS), (-1 - i, layer.v_RKSD, layer.v_scale_RKS)):
            numbers, scales = stored(random_tensor(*tensor.shape, seed=seed), cache_dtype)
            tensor.copy_(numbers)
            if scale is not None:
                scale.copy_(scales)
    places = [0, 130, positions - 1, 5, 64, 1, 17, 128, 3]
    position_B1 = torch.tensor([[places[row % len(places)]] for row in range(rows)])
    return model, cache, random_tensor(rows, 1, sizes["hidden_size"]).bfloat16(), position_B1


def run_layers(model, cache, x_B1E, position_B1):
    cos_SD, sin_SD = rope_tables(model.config.head_dim, 1e4, cache.allocated_len, CPU)
    layers = DecodeLayers(model, cache)
    assert layers.serves(len(x_B1E))
    return layers(x_B1E, cos_SD, sin_SD, position_B1)


def layers_arguments(model, cache):
    """Return the layers that `DecodeLayersCall` takes, as lists that can be changed: LayerTensors(*list) each."""
    layers = []
    for i, block in enumerate(model.model.layers):
        a, f = block.self_attn, block.mlp
        norms = [n.weight for n in (block.input_layernorm, a.q_norm, a.k_norm, block.post_attention_layernorm)]
        weights = [
            (*linear.format.operands(linear.packed),) if isinstance(linear, QuantizedLinear) else (linear.weight, None)
            for linear in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, f.gate_proj, f.up_proj, f.down_proj)
        ]
        scales = [cache.key_scales[i], cache.value_scales[i]] if cache.key_scales else []
        layers.append([norms, weights[:4], weights[4:], [cache.keys[i], cache.values[i], *scales]])
    return layers


def make_call(layers):
    return DecodeLayersCall([LayerTensors(*layer) for layer in layers], 1e-6)


def run_layers_plainly(model, cache, x_B1E, position_B1):
    cos_SD, sin_SD = rope_tables(model.config.head_dim, 1e4, cache.allocated_len, CPU)
    mask_B1L = torch.arange(cache.allocated_len) <= position_B1[..., None]
    for block, layer in zip(model.model.layers, cache.layers(), strict=True):
        x_B1E = block(x_B1E, cos_SD[position_B1], sin_SD[position_B1], position_B1, mask_B1L, layer)
    return x_B1E


@pytest.mark.parametrize("format", [None, *PACKED])
@pytest.mark.parametrize("rows", [*range(1, 10), 17, MAX_DECODE_ROWS])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_decode_layers_equal_the_blocks(format, rows, cache_dtype):
    model, cache, x_B1E, position_B1 = layers_case(format, rows, cache_dtype=cache_dtype)
    other = copy.deepcopy(cache)
    expected = run_layers_plainly(model, other, x_B1E, position_B1)
    assert_near(run_layers(model, cache, x_B1E, position_B1), expected, torch.bfloat16)
    for layer, other_layer in zip(cache.layers(), other.layers(), strict=True):
        is_new = torch.zeros(rows + 1, layer.k_RKSD.shape[2], dtype=torch.bool)
        is_new[torch.arange(rows), position_B1[:, 0]] = True
        for i, scale in ((0, 3), (1, 4)):
            actual, expected = (as_read(x[i], x[scale]).transpose(1, 2) for x in (layer, other_layer))
            # Numbers that differ by their rounding to bfloat16 may be a step of 1/127 apart in 8 bits.
            step = 1 / 127 if cache_dtype == torch.int8 else 0.0
            atol = (TOLERANCES[torch.bfloat16] + step) * expected[is_new].abs().max().item()
            torch.testing.assert_close(actual[is_new], expected[is_new], rtol=0, atol=atol)
            assert_same(actual[~is_new], expected[~is_new])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128},
        {"hidden_size": 160, "intermediate_size": 32, "head_dim": 96},
    ],
    ids=["one key head", "as many key heads", "three queries a key", "odd sizes"],
)
@pytest.mark.parametrize("format", [None, "int4", "uint4", PACKED[-1]])
@pytest.mark.parametrize("threads", [1, 3, 7])
def test_decode_layers_serve_other_shapes_and_threads(changes, format, threads):
    model, cache, x_B1E, position_B1 = layers_case(format, 2, 600, **changes)
    position_B1[1] = 599  # long enough for threads to share the positions of a head
    expected = run_layers_plainly(model, copy.deepcopy(cache), x_B1E, position_B1)
    before, alone = torch.get_num_threads(), copy.deepcopy(cache)
    try:
        torch.set_num_threads(threads)
        actual = run_layers(model, cache, x_B1E, position_B1)
        torch.set_num_threads(1)
        assert_same(actual, run_layers(model, alone, x_B1E, position_B1))
    finally:
        torch.set_num_threads(before)
    assert_near(actual, expected, torch.bfloat16)


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
EXPERT_LAYERS = [{"norm_topk_prob": True}, {"mlp_only_layers": (0,)}, {"mlp_only_layers": (1,)}]


def rows_with_clear_choices(model, run):
    """Return the rows in which no rounding changes the choice of experts, and the result of `run()`."""
    margins = []

    def measure(gate, inputs, logits_NX):
        ordered_NX = logits_NX.float().sort(descending=True).values
        C = model.config.num_experts_per_tok
        margins.append((ordered_NX[:, C - 1] - ordered_NX[:, C]) / logits_NX.float().abs().amax(dim=1))

    hooks = [
        block.mlp.gate.register_forward_hook(measure) for block in model.model.layers if isinstance(block.mlp, MoE)
    ]
    result = run()
    for hook in hooks:
        hook.remove()
    return (torch.stack(margins).amin(dim=0) > TOLERANCES[torch.bfloat16]).nonzero().flatten().tolist(), result


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("changes", EXPERT_LAYERS, ids=str)
def test_decode_layers_run_experts(format, threads, changes):
    model, cache, x_B1E, position_B1 = layers_case(format, 9, **EXPERTS, **changes)
    other = copy.deepcopy(cache)
    clear, expected = rows_with_clear_choices(model, lambda: run_layers_plainly(model, other, x_B1E, position_B1))
    assert len(clear) >= 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run_layers(model, copy.deepcopy(cache), x_B1E, position_B1)
        assert_near(actual[clear], expected[clear], torch.bfloat16)
        position_B1[[0, 3]] = -1  # empty rows have no experts
        in_use = [1, 2, 4, 5, 6, 7, 8]
        assert_same(run_layers(model, copy.deepcopy(cache), x_B1E, position_B1)[in_use], actual[in_use])
        position_B1[:] = -1
        assert run_layers(model, copy.deepcopy(cache), x_B1E, position_B1).isfinite().all()
    finally:
        torch.set_num_threads(before)


def test_decode_layers_keep_nan_in_the_rows_of_experts():
    model, cache, x_B1E, position_B1 = layers_case("int4", 3, **EXPERTS)
    expected = run_layers(model, copy.deepcopy(cache), x_B1E, position_B1)
    x_B1E[1, 0, 3] = float("nan")
    y_B1E = run_layers(model, cache, x_B1E, position_B1)
    assert y_B1E[1].isnan().any()
    assert_same(y_B1E[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("format", [None, *PACKED])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_decode_layers_give_a_row_the_same_alone_and_among_others(format, cache_dtype):
    model, cache, x_B1E, position_B1 = layers_case(format, 19, cache_dtype=cache_dtype)
    together = run_layers(model, copy.deepcopy(cache), x_B1E, position_B1)
    for row in range(19):
        alone = copy.deepcopy(cache)
        for tensor in (*alone.keys, *alone.values, *alone.key_scales, *alone.value_scales):
            tensor[0] = tensor[row]
        assert_same(run_layers(model, alone, x_B1E[row : row + 1], position_B1[row : row + 1])[0], together[row])


@pytest.mark.parametrize("format", [None, *PACKED])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("empty", [[0], [1, 3], [0, 1, 2, 3]], ids=str)
def test_decode_layers_leave_the_cache_of_empty_rows_and_the_other_rows_alone(format, cache_dtype, empty):
    model, cache, x_B1E, position_B1 = layers_case(format, 4, cache_dtype=cache_dtype)
    other, in_use = copy.deepcopy(cache), [row for row in range(5) if row not in empty]
    before = [tensor.clone() for tensor in cache.tensors()]
    expected = run_layers(model, other, x_B1E, position_B1)
    position_B1[empty] = -1
    actual = run_layers(model, cache, x_B1E, position_B1)
    assert_same(actual[in_use[:-1]], expected[in_use[:-1]])  # the last row of the cache takes no part
    assert actual[empty].isfinite().all()
    for tensor, alike, old in zip(cache.tensors(), other.tensors(), before, strict=True):
        assert_same(tensor[in_use], alike[in_use])
        assert_same(tensor[empty], old[empty])  # all of it, the last position too


def test_decode_layers_pass_nan_on():
    for format, cache_dtype in product((None, *FORMATS), (torch.bfloat16, torch.int8)):
        model, cache, x_B1E, position_B1 = layers_case(format, 2, cache_dtype=cache_dtype)
        x_B1E[0, 0, 3] = float("nan")
        y_B1E = run_layers(model, cache, x_B1E, position_B1)
        assert y_B1E[0].isnan().any() and not y_B1E[1].isnan().any()


def test_decode_layers_leave_other_models_alone():
    for changes in ({"attention_bias": True}, {"head_dim": 16}, {"hidden_size": 72}):
        model, cache, *_ = layers_case(**changes)
        assert not DecodeLayers(model, cache).serves(1)
    model, cache, *_ = layers_case()
    assert not DecodeLayers(model, cache).serves(MAX_DECODE_ROWS + 1)
    assert not DecodeLayers(model.float(), cache).serves(1)
    for format in (None, *FORMATS):  # as on a CUDA device
        model, cache, *_ = layers_case(format)
        assert not DecodeLayers(model.to("meta"), cache).serves(1)
        cache = StaticKVCache(model.config, 1, 64, torch.bfloat16, torch.device("meta"))
        assert not DecodeLayers(model, cache).serves(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.clear(), "there must be layers"),
        (lambda a: a[0][0].insert(0, a[0][0].pop(1)), r"norms must be \(\d+,\) bfloat16"),
        (lambda a: a[1][3].__setitem__(0, a[1][3][0][:, :, ::2]), "one shape and dtype"),
        (lambda a: a[0][3].__setitem__(1, a[0][3][1][:, :, :9]), "keys and values"),
        (lambda a: a[0][2].__setitem__(0, (a[0][2][0][0][:32], None)), "sizes multiples of 16"),
        (lambda a: a[0][3].extend([torch.zeros(3, 2, 385)] * 2), "scales of keys and values"),
        (lambda a: [x[3].__setitem__(0, x[3][0].to(torch.int8)) for x in a], "keys and values"),
    ],
)
def test_decode_layers_refuse_weights_and_caches_that_do_not_fit(spoil, message):
    model, cache, *_ = layers_case(None, 2)
    layers = layers_arguments(model, cache)
    spoil(layers)
    with pytest.raises(ValueError, match=message):
        make_call(layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_B1": torch.tensor([[1], [400]])}, "position 400 is not in the cache"),
        ({"position_B1": torch.tensor([[-2], [4]])}, "position -2 is not in the cache"),
        ({"position_B1": torch.tensor([[1]])}, r"positions must be \(B, T\) int64"),
        ({"x_B1E": torch.zeros(2, 1, 64)}, r"x must be \(B, T, E\) bfloat16"),
        ({"x_B1E": torch.zeros(2, 2, 64).bfloat16()}, r"x must be \(1 to \d+, 1, E\)"),
        ({"x_B1E": torch.zeros(4, 1, 64).bfloat16()}, r"x must be \(1 to \d+, 1, E\)"),
        ({"cos_SD": torch.zeros(300, 16)}, "cos and sin"),
    ],
)
def test_decode_layers_refuse_inputs_that_do_not_fit(changes, message):
    model, cache, x_B1E, position_B1 = layers_case(None, 2)
    cos_SD, sin_SD = rope_tables(32, 1e4, cache.allocated_len, CPU)
    arguments = {"x_B1E": x_B1E, "cos_SD": cos_SD, "sin_SD": sin_SD, "position_B1": position_B1} | changes
    with pytest.raises(ValueError, match=message):
        DecodeLayers(model, cache)(**arguments)


def chunks_case(format, starts, size, cache_dtype=torch.bfloat16, **changes):
    """Return a model, a filled cache, and chunks of prompts: x (B, T, E), positions (B, T) and rows (B,)."""
    model, cache, *_ = layers_case(format, len(starts), cache_dtype=cache_dtype, **changes)
    x_BTE = random_tensor(len(starts), size, model.config.hidden_size).bfloat16()
    position_BT = torch.tensor(starts)[:, None] + torch.arange(size)
    return model, cache, x_BTE, position_BT, torch.arange(len(starts)).flip(0)


def run_chunks(model, cache, x_BTE, position_BT, row_B, last_B=None, tiles=Tiles.NONE):
    cos_SD, sin_SD = rope_tables(model.config.head_dim, 1e4, cache.allocated_len, CPU)
    layers = DecodeLayers(model, cache)
    assert layers.serves_chunks(x_BTE.shape[0] * x_BTE.shape[1])
    return layers.prefill(x_BTE, cos_SD, sin_SD, position_BT, row_B, tiles, last_B)


@pytest.mark.parametrize("format", [None, *PACKED])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("starts", "size", "changes"),
    [
        ([0], 8, {}),
        ([130], 33, {}),
        ([0, 200, 17], 48, {}),
        ([5], 19, {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 128}),
        ([0, 9], 70, {"hidden_size": 160, "intermediate_size": 32, "head_dim": 96}),
    ],
    ids=str,
)
def test_prefill_layers_equal_the_blocks(format, cache_dtype, starts, size, changes):
    model, cache, x_BTE, position_BT, row_B = chunks_case(format, starts, size, cache_dtype, **changes)
    other, before = copy.deepcopy(cache), copy.deepcopy(cache)
    cos_SD, sin_SD = rope_tables(model.config.head_dim, 1e4, cache.allocated_len, CPU)
    mask_BTL, expected = torch.arange(cache.allocated_len) <= position_BT[..., None], x_BTE
    for block, layer in zip(model.model.layers, other.layers(row_B), strict=True):
        expected = block(expected, cos_SD[position_BT], sin_SD[position_BT], position_BT, mask_BTL, layer)
    assert_near(run_chunks(model, cache, x_BTE, position_BT, row_B), expected, torch.bfloat16)
    for layer, plain, old in zip(cache.layers(), other.layers(), before.layers(), strict=True):
        is_new = torch.zeros(layer.k_RKSD.shape[0], layer.k_RKSD.shape[2], dtype=torch.bool)
        is_new[row_B[:, None], position_BT] = True
        for i, scale in ((0, 3), (1, 4)):
            actual, wanted, earlier = (as_read(x[i], x[scale]).transpose(1, 2) for x in (layer, plain, old))
            step = 1 / 127 if cache_dtype == torch.int8 else 0.0  # of 8 bits
            atol = (TOLERANCES[torch.bfloat16] + step) * wanted[is_new].abs().max().item()
            torch.testing.assert_close(actual[is_new], wanted[is_new], rtol=0, atol=atol)
            assert_same(actual[~is_new], earlier[~is_new])


@pytest.mark.parametrize(
    ("format", "changes"),
    [(None, {}), (None, {"intermediate_size": 48}), (None, {"hidden_size": 48}), ("int8", {}), ("int4", {})],
    ids=str,
)
def test_prefill_layers_by_tiles_equal_those_without(format, changes):
    model, cache, *chunks = chunks_case(format, [0, 130], 40, **changes)
    plain, in_bfloat16, in_int8 = (run_chunks(model, copy.deepcopy(cache), *chunks, tiles=kind) for kind in Tiles)
    for y in (in_bfloat16, in_int8):
        assert_near(y, plain, torch.bfloat16)
    is_same_sum = not are_usable() or "hidden_size" in changes  # AMX rounds sums otherwise; 48 channels have no tiles
    assert torch.equal(in_bfloat16, plain) == (format is None and is_same_sum)
    assert torch.equal(in_int8, in_bfloat16) == (format is None)


@pytest.mark.parametrize("format", [None, *PACKED])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_prefill_layers_give_a_prompt_the_same_alone_and_with_any_threads(format, cache_dtype):
    sizes = {"hidden_size": 256, "intermediate_size": 1024}  # products have several parts per thread with 128 tokens
    model, cache, x_BTE, position_BT, row_B = chunks_case(format, [0, 130, 7], 128, cache_dtype, **sizes)
    before, threads = copy.deepcopy(cache), torch.get_num_threads()
    together = run_chunks(model, cache, x_BTE, position_BT, row_B)
    try:
        for b, number in enumerate((1, 3, 8)):  # others take the parts of threads that wait for a core
            torch.set_num_threads(number)
            alone, one = copy.deepcopy(before), slice(b, b + 1)
            assert_same(run_chunks(model, alone, x_BTE[one], position_BT[one], row_B[one])[0], together[b])
            for tensor, expected in zip(alone.tensors(), cache.tensors(), strict=True):
                assert_same(tensor[row_B[b]], expected[row_B[b]])
    finally:
        torch.set_num_threads(threads)


def test_operations_take_fewer_threads_than_asked_for():
    """Where the system has no more: each test of the threads again, in a process that gets two at most."""
    prefill = test_prefill_layers_give_a_prompt_the_same_alone_and_with_any_threads
    sampler = test_cpu_sampler.test_tokens_of_a_real_vocabulary_are_the_sampler_s
    tests = [f"{sys.modules[test.__module__].__file__}::{test.__name__}" for test in (prefill, sampler)]
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_THREAD_LIMIT": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "failed" not in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("format", "changes"),
    [(None, {}), ("int8", {}), ("int4", {}), ("uint4", {}), ("fp8", {}), ("int4", EXPERTS)],
    ids=str,
)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [8, 9, 40])
def test_prefill_layers_compute_the_last_token_alone(format, changes, cache_dtype, size):
    model, cache, x_BTE, position_BT, row_B = chunks_case(format, [0, 130, 7], size, cache_dtype, **changes)
    other, last_B = copy.deepcopy(cache), torch.tensor([size - 1, 3, 0])
    expected = run_chunks(model, other, x_BTE, position_BT, row_B)
    actual = run_chunks(model, cache, x_BTE, position_BT, row_B, last_B)
    assert_same(actual[torch.arange(3), last_B], expected[torch.arange(3), last_B])
    assert_same(cache.tensors(), other.tensors())
    assert torch.equal(actual, expected) == (size == 8)  # of longer chunks, the last block leaves tokens out


def test_prefill_layers_pass_nan_on():
    for format, cache_dtype in product((None, *FORMATS), (torch.bfloat16, torch.int8)):
        model, cache, x_BTE, position_BT, row_B = chunks_case(format, [0, 3], 9, cache_dtype)
        x_BTE[0, 4, 3] = float("nan")
        y_BTE = run_chunks(model, cache, x_BTE, position_BT, row_B)
        assert y_BTE[0, 4:].isnan().any(dim=-1).all() and not y_BTE[1].isnan().any()


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": True}], ids=str)
def test_prefill_layers_run_experts(format, changes):
    """Experts in the last block alone: what a near choice changes there, no other token sees."""
    changes = EXPERTS | {"mlp_only_layers": (0,)} | changes
    model, cache, x_BTE, position_BT, row_B = chunks_case(format, [0, 130], 20, **changes)
    other, mask_BTL = copy.deepcopy(cache), torch.arange(cache.allocated_len) <= position_BT[..., None]
    cos_SD, sin_SD = rope_tables(model.config.head_dim, 1e4, cache.allocated_len, CPU)

    def run_plainly():
        y_BTE = x_BTE
        for block, layer in zip(model.model.layers, other.layers(row_B), strict=True):
            y_BTE = block(y_BTE, cos_SD[position_BT], sin_SD[position_BT], position_BT, mask_BTL, layer)
        return y_BTE

    clear, expected = rows_with_clear_choices(model, run_plainly)
    assert len(clear) > 20
    actual = run_chunks(model, cache, x_BTE, position_BT, row_B)
    assert_near(actual.flatten(0, 1)[clear], expected.flatten(0, 1)[clear], torch.bfloat16)
    one = slice(1, 2)
    assert_same(run_chunks(model, cache, x_BTE[one], position_BT[one], row_B[one])[0], actual[1])


def test_prefill_layers_leave_other_models_alone():
    model, cache, *_ = chunks_case(None, [0], 9)
    assert not DecodeLayers(model, cache).serves_chunks(7)
    assert not DecodeLayers(model.float(), cache).serves_chunks(9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_BT": torch.arange(376, 385)[None]}, "position 384 is not in the cache"),
        ({"position_BT": torch.arange(-1, 8)[None]}, "position -1 is not in the cache"),
        ({"position_BT": torch.arange(9)}, r"positions must be \(B, T\) int64"),
        ({"row_B": torch.tensor([2])}, "a row of the cache for each batch row"),
        ({"last_B": torch.tensor([9])}, "a token for each batch row"),
        ({"last_B": torch.tensor([-1])}, "a token for each batch row"),
        ({"last_B": torch.tensor([0, 0])}, "a token for each batch row"),
        ({"row_B": torch.tensor([0, 0])}, "a row of the cache for each batch row"),
        ({"x_BTE": torch.zeros(1, 9, 48).bfloat16()}, r"x must be \(B, T, E\) bfloat16"),
        ({"x_BTE": torch.zeros(1, 7, 64).bfloat16()}, "at least 8 tokens"),
        ({"sin_SD": torch.zeros(300, 16)}, "cos and sin"),
    ],
)
def test_prefill_layers_refuse_inputs_that_do_not_fit(changes, message):
    model, cache, x_BTE, position_BT, row_B = chunks_case(None, [0], 9)
    cos_SD, sin_SD = rope_tables(32, 1e4, cache.allocated_len, CPU)
    arguments = {"x_BTE": x_BTE, "cos_SD": cos_SD, "sin_SD": sin_SD, "position_BT": position_BT, "row_B": row_B}
    with pytest.raises(ValueError, match=message):
        DecodeLayers(model, cache).prefill(**arguments | changes, tiles=Tiles.NONE)


# Not optimized much: that takes over a minute, most of it for products without vector instructions of 32 bytes.
CPU_FORMATS = [*FORMATS.values(), FORMATS["fp8"].with_blocks()]
PROCESSORS = {"AVX2": ("-march=x86-64-v3", "-O1"), "any": ("-O0",)}
ON_ANOTHER_PROCESSOR = """
import torch
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import sampler
from qwen3fast.kernels.cpu.decode_layers import DecodeLayersCall, LayerTensors, LayerWeight
from qwen3fast.kernels.cpu.decode_step import DecodeStepCall, EndTensors, StepTensors
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample
cpu.library.TARGET_FLAGS = {flags}
assert cpu.load()
def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
operations, layers, steps = torch.load({path!r})
for name, arguments, expected in operations:
    assert_near(getattr(torch.ops.qwen3fast, name)(*arguments), expected)
for arguments, inputs, expected in layers:
    call = DecodeLayersCall([LayerTensors(*layer) for layer in arguments], 1e-6)
    assert_near(call(*inputs), expected)
one = torch.arange(60)
for size in (97, 1000):
    limits = (one % 3 * 350, torch.linspace(0.2, 1.1, 60).clamp(max=1), one % 2 * 0.02)
    rows = SamplerRows(torch.full((60,), 0.9), *limits, one, one)
    logits = 3 * torch.randn(60, size)
    assert torch.equal(sampler.sample(logits, rows), sample(logits, rows, SamplerKind.FULL))
for arguments, ends, state, sampling, tables, expected in steps:
    ends = EndTensors(*(LayerWeight(*w) if isinstance(w, tuple) else w for w in ends))
    blocks = DecodeLayersCall([LayerTensors(*layer) for layer in arguments], 1e-6)
    step = DecodeStepCall(blocks, ends, StepTensors(*state), sampling, *tables)
    logits = step.logits(3)
    assert_near(logits, expected)
    token = sample(logits, SamplerRows(*(tensor[:3] for tensor in sampling)), SamplerKind.FULL)
    step.choose(3, is_greedy=False)
    assert torch.equal(state[2][:3], token)
"""


def step_to_save(format):
    """Return the tensors of a whole step of three rows, and its logits."""
    model, cache, state, tables = step_case(format, 3)
    weight = model.lm_head.format.operands(model.lm_head.packed) if format else (model.lm_head.weight, None)
    buffers = [getattr(state, f"{name}_R") for name in StepTensors._fields]
    ends = [tuple(weight), model.model.norm.weight, tuple(weight)]
    sampling = tuple(state.sampler_rows(slice(None)))
    saved = copy.deepcopy((layers_arguments(model, cache), ends, buffers, sampling, tables))
    return *saved, DecodeLayers(model, cache).logits(state, 3, *tables)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_operations_for_other_processors(processor, tmp_path):
    """The forms that this machine's own instructions hide, built and run in a process of their own."""
    k, v = (random_tensor(1, 2, 150, 64, seed=s).bfloat16() for s in (1, 2))
    position = torch.arange(100, 140)[None]
    cases = [
        *(("linear", (random_tensor(m, 64).bfloat16(), random_tensor(24, 64).bfloat16())) for m in (3, 12, 50)),
        *(("linear", (random_tensor(m, 48).bfloat16(), random_tensor(27, 48).bfloat16())) for m in (1, 2, 6)),
        ("decode_attention", (random_tensor(1, 1, 4, 64).bfloat16(), k, v, position[:, -1:])),
        ("prefill_attention", (random_tensor(1, 40, 4, 64).bfloat16(), k, v, position, torch.tensor([0]))),
    ]
    (k, k_scale), (v, v_scale) = quantize_vectors(k), quantize_vectors(v)
    quantized = (k, v, position, torch.tensor([0]), k_scale, v_scale)
    cases.append(("prefill_attention", (random_tensor(1, 40, 4, 64).bfloat16(), *quantized)))
    k, v = (random_tensor(1, 2, 150, 128, seed=s).bfloat16() for s in (1, 2))
    (rounded_k, k_scale), (rounded_v, v_scale) = quantize_vectors(k), quantize_vectors(v)
    for *cached, scales in ((k, v, ()), (rounded_k, rounded_v, (k_scale, v_scale))):
        cases.append(("decode_attention", (random_tensor(1, 1, 4, 128).bfloat16(), *cached, position[:, -1:], *scales)))
    for format in CPU_FORMATS:
        packed = operands(random_tensor(48, 96), format)
        cases += [
            ("quantized_linear", (random_tensor(rows, 96).bfloat16(), [packed.weight], [packed.scale]))
            for rows in (1, 4, 11)
        ]
        gate_up, down = operands(random_tensor(5 * 64, 64), format), operands(random_tensor(5 * 64, 32), format)
        expert_NC = torch.tensor([[3, 1], [3, 4]])
        cases.append(("quantized_experts", (random_tensor(2, 64).bfloat16(), expert_NC, list(gate_up), list(down))))
    names = ("int4", "lossless", "int6", "uint5", "nl4")
    in_bytes, *others = (quantize(0.02 * random_tensor(48, 256), ALL_FORMATS[name]) for name in names)
    in_bytes = in_bytes._replace(scale=pack_scales(in_bytes.scale))
    others.append(quantize(0.02 * random_tensor(48, 256), SHORT_NL4))
    for rows, packed in product((1, 4, 11), (in_bytes, *others)):
        cases.append(("quantized_linear", (random_tensor(rows, 256).bfloat16(), [packed.weight], [packed.scale])))
    for packed in others[1:]:
        packed.weight.fill_(255)  # the largest levels
        cases.append(("quantized_linear", (torch.ones(4, 256).bfloat16(), [packed.weight], [packed.scale])))
    operations = [(name, arguments, getattr(torch.ops.qwen3fast, name)(*arguments)) for name, arguments in cases]
    layers = []
    for format, cache_dtype in product((None, *CPU_FORMATS), (torch.bfloat16, torch.int8)):
        model, cache, x_B1E, position_B1 = layers_case(format, 2, cache_dtype=cache_dtype)
        inputs = (x_B1E, *rope_tables(32, 1e4, cache.allocated_len, CPU), position_B1)
        layers.append((layers_arguments(model, cache), inputs, DecodeLayers(model, cache)(*inputs)))
    torch.save((operations, layers, list(map(step_to_save, (None, *CPU_FORMATS)))), tmp_path / "values.pt")
    program = ON_ANOTHER_PROCESSOR.format(flags=PROCESSORS[processor], path=str(tmp_path / "values.pt"))
    environment = os.environ | {cpu.library.PIN: "native"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [1, 2])
def test_compiled_bfloat16_decode_equals_the_plain_model(rows):
    """Through the engine, which uses the operations: logits of the same forced ids."""
    config = small_config(hidden_size=64, head_dim=32, vocab_size=128, attention_bias=True)
    model = randomized(config).bfloat16()
    engine = engine_of(model, rows, 200, compile=True)
    logits = []
    prompts = [[5, 9, 2 + row] * (10 + 30 * row) for row in range(rows)]
    sequences = [list(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        first_1V = engine.prefill_whole(row, prompt)
        engine.set_row(row, len(prompt))
        sequences[row] += engine.sample_first(row, first_1V, StepKind()).tokens
    for _ in range(5):
        length = max(len(s) for s in sequences)
        engine.launch(rows, length, StepKind(), hook=lambda logits_BV: logits.append(logits_BV) or logits_BV)
        tokens = engine.collect().tokens
        for row, sequence in enumerate(sequences):
            assert_near(logits[-1][row], model(torch.tensor([sequence]))[0, -1], torch.bfloat16)
            sequence.append(tokens[row])


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {}], ids=["block by block", "all blocks at once"])
def test_compiled_int8_cache_equals_the_eager_one(changes):
    config = small_config(hidden_size=64, head_dim=32, vocab_size=128, dtype=torch.bfloat16, **changes)
    model, logits = randomized(config).bfloat16(), []
    for compile in (True, False):
        engine = engine_of(model, 2, 200, torch.int8, compile)
        logits.append([])
        for row, length in enumerate((30, 150)):
            engine.prefill_whole(row, list(range(length % 100)) + [5] * 70)
            engine.set_row(row, length % 100 + 70)
        for token in (3, 9, 4):
            engine.state.input_R[:] = token
            engine.launch(2, 130, StepKind(), hook=lambda logits_BV: logits[-1].append(logits_BV) or logits_BV)
            engine.collect()
    for compiled, eager in zip(*logits, strict=True):
        assert_near(compiled, eager, torch.bfloat16)


def test_loading_the_operations_leaves_subnormal_numbers_alone():
    assert float(np.float32(1e-40) * np.float32(0.5)) > 0


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("false", "false failed: exit status 1; set CXX to g++ 11 or newer"),
        ("/there/is/none", "No such file or directory: '/there/is/none'"),
        ("g++ 'open", 'CXX="g++ \'open" is no command: No closing quotation'),
    ],
)
def test_broken_compiler_is_reported_once_and_not_fatal(compiler, words, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv(cpu.library.PIN, "native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_was_tried", False)
    monkeypatch.setattr(cpu, "_is_ready", False)
    assert cpu.load() is False and cpu.load() is False
    assert caplog.text.count("C++ operations could not be built, using slower PyTorch forms") == 1
    assert words in caplog.text
    assert not cpu.is_loaded()
