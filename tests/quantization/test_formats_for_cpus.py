"""Weights in int6, uint5 and nl4, for CPUs: layout, products, files, and where they are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, random_tensor, randomized, small_config
from prequantized_layouts import AWQ, write_prequantized
from test_cpu_ops import run_layers, run_layers_plainly
from test_quantization import needs_operation, product_in_plain_pytorch, quantized_layer, relative_error

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.checkpoint.stored_formats import main_format
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.ops import dequantized_linear
from qwen3fast.kernels.cpu.structures import NL4_TABLE, packed_linear
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.model.linears import linears
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.formats import SAVED_FORMATS, SHORT_NL4, Packed, quantize
from qwen3fast.quantization.int6 import pack_int6
from qwen3fast.quantization.nl4 import pack_nl4
from qwen3fast.quantization.uint4 import Layout, pack_minimums

INT6, UINT5, NL4 = (SAVED_FORMATS[name] for name in ("int6", "uint5", "nl4"))
SIZES = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
each = pytest.mark.parametrize("format", [INT6, UINT5, NL4, SHORT_NL4], ids=["int6", "uint5", "nl4", "short nl4"])


SHORT_RECORDS = {
    "Q5_0's": UINT5.with_layout(lambda _: Layout(32, has_zero=True)),
    "Q5_1's": UINT5.with_layout(lambda _: Layout(32)),
    "IQ4_NL's": SHORT_NL4,
}
with_short_records = pytest.mark.parametrize("format", SHORT_RECORDS.values(), ids=SHORT_RECORDS)


def random_packed(format, N: int, K: int) -> tuple[Packed, torch.Tensor]:
    """Return a weight of random levels and scales, and the numbers that its definition gives, (N, K) float32."""
    generator = torch.Generator().manual_seed(N + K)
    level = torch.randint(0, 1 << format.bits, (N, K), generator=generator, dtype=torch.uint8)
    d = torch.rand(N, K // 256, generator=generator).half().float()
    if format is INT6:
        s = torch.randint(-128, 128, (N, K // 16), generator=generator, dtype=torch.int8)
        scale = d.repeat_interleave(16, 1) * s
        return pack_int6(level, d, s), (level.float() - 32) * scale.repeat_interleave(16, 1)
    if format is SHORT_NL4:
        d = torch.rand(N, K // 32, generator=generator).half().float()
        return pack_nl4(level, d), NL4_TABLE[level.int()] * d.repeat_interleave(32, 1)
    if format is NL4:
        s = torch.randint(-128, 128, (N, K // 32), generator=generator, dtype=torch.int8)
        scale = d.repeat_interleave(8, 1) * s
        return pack_nl4(level, d, s), NL4_TABLE[level.int()] * scale.repeat_interleave(32, 1)
    dmin = torch.rand(N, K // 256, generator=generator).half().float()
    s, m = (torch.randint(0, 64, (N, K // 32), generator=generator, dtype=torch.uint8) for _ in range(2))
    scale, minimum = d.repeat_interleave(8, 1) * s, dmin.repeat_interleave(8, 1) * m
    numbers = level.float() * scale.repeat_interleave(32, 1) - minimum.repeat_interleave(32, 1)
    return pack_minimums(level, d, dmin, s, m, is_short=True, bits=5), numbers


def test_levels_lie_where_the_layout_says():
    for bits, channels in ((5, 32), (6, 16)):
        level = torch.randint(0, 1 << bits, (32, 512), dtype=torch.uint8)
        ones = torch.ones(32, 512 // channels, dtype=torch.uint8)
        d = torch.ones(32, 2)
        packed = pack_int6(level, d, ones) if bits == 6 else pack_minimums(level, d, d, ones, ones, True, bits)
        lines, high = channels * bits // 32, bits - 4
        for row, channel in ((0, 0), (5, 37), (17, 255), (31, 511), (16, 300), (30, 9)):
            unit, place = divmod(channel, channels)
            four, byte = divmod(place, 4)
            of_unit = packed.weight[row // 16, unit * lines : (unit + 1) * lines, row % 16, byte].int()
            low = of_unit[four // 2] >> (four % 2 * 4) & 15
            assert low | (of_unit[-1] >> (four * high) & ((1 << high) - 1)) << 4 == level[row, channel]


@each
def test_rows_are_the_numbers_of_the_definition(format):
    packed, numbers = random_packed(format, 48, 512)
    assert_same(format.dequantize(packed), numbers)
    rows = torch.tensor([47, 0, 16, 16, 5])
    assert_same(format.rows(packed, rows), numbers[rows])
    assert format.in_features(packed) == 512


@each
def test_error_on_normal_weights(format):
    weight = random_tensor(64, 1024)
    error = relative_error(format.dequantize(quantize(weight, format)), weight)
    assert error < {"int6": 0.0182, "uint5": 0.0386, "nl4": 0.075}[format.name]  # int8 0.009, int4 0.084


@each
def test_zeros_stay_zero_and_numbers_that_are_none_are_not_hidden(format):
    assert not format.dequantize(quantize(torch.zeros(16, 256), format)).any()
    for number in (torch.nan, torch.inf, -torch.inf):
        weight = random_tensor(32, 512)
        weight[3, 300] = number
        numbers = format.dequantize(quantize(weight, format))
        first = 300 // format.multiple * format.multiple  # of the record
        assert numbers[3, first : first + format.multiple].isnan().all()
        assert numbers[[2, 4]].isfinite().all() and numbers[3, :first].isfinite().all()


def test_int6_keeps_numbers_on_its_grid():
    level = torch.randint(0, 64, (16, 16, 16))
    level[..., 0] = 0  # the end of the range, by which the scale is found
    scale = torch.randint(1, 128, (16, 16, 1))
    scale[:, 0] = 127
    weight = ((level - 32) * scale).float().view(16, 256) * 2**-6
    assert_same(INT6.dequantize(quantize(weight, INT6)), weight)


@needs_operation
@each
@pytest.mark.parametrize(("rows", "N", "K"), [(1, 16, 256), (2, 48, 512), (3, 304, 1024), (5, 64, 256), (8, 16, 512),
                                              (9, 80, 256), (31, 48, 256), (33, 80, 768), (70, 64, 256)])  # fmt: skip
def test_operation_equals_the_plain_form(format, rows, N, K):
    layer, x = quantized_layer(N, K, format), random_tensor(rows, K, seed=1).bfloat16()
    assert relative_error(layer(x), product_in_plain_pytorch(x, layer)) < 4e-3
    exact = F.linear(x.double(), layer.dequantize().double())
    assert relative_error(layer(x), exact) < 9e-3
    assert relative_error(dequantized_linear(x, layer.weight_packed, layer.weight_scale), exact) < 4e-3


@pytest.mark.parametrize("size", [1e-2, 5e-4, 1e-4])
@pytest.mark.parametrize("format", [INT6, NL4, SHORT_NL4], ids=["int6", "nl4", "short nl4"])
def test_small_weights_lose_no_more_than_others(format, size):
    """A record's float16 number may lie below float16's least normal one."""
    weight = random_tensor(64, 1024)
    usual = relative_error(format.dequantize(quantize(weight, format)), weight)
    assert relative_error(format.dequantize(quantize(weight * size, format)), weight * size) < 1.05 * usual


@needs_operation
@with_short_records
@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("in_features", [32, 160])
def test_a_record_per_32_channels_needs_no_multiple_of_256(format, in_features, rows):
    layer, x = quantized_layer(48, in_features, format), random_tensor(rows, in_features).bfloat16()
    assert layer.weight_scale.shape[1] == in_features // 32
    assert relative_error(layer.dequantize(), random_tensor(48, in_features) / in_features**0.5) < 0.08
    assert relative_error(layer(x), product_in_plain_pytorch(x, layer)) < 4e-3
    exact = F.linear(x.double(), layer.dequantize().double())
    assert relative_error(dequantized_linear(x, layer.weight_packed, layer.weight_scale), exact) < 4e-3
    row = torch.tensor([5, 47])
    assert_same(torch.ops.qwen3fast.quantized_rows(*layer.packed, row), layer.dequantize()[row].bfloat16())


@needs_operation
@each
@pytest.mark.parametrize("rows", [*range(9, 15), 33, 40])
def test_a_row_does_not_depend_on_the_rows_beside_it(format, rows):
    layer, x = quantized_layer(80, 512, format), random_tensor(rows, 512).bfloat16()
    assert_same(layer(x), torch.cat([layer(row[None]) for row in x]))


@needs_operation
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_beside_other_formats_in_one_call(rows):
    names = ("int6", "int8", "uint4", "nl4", "uint5", "int4")
    layers = [quantized_layer(48, 256, SAVED_FORMATS[name], seed=i) for i, name in enumerate(names)]
    x = random_tensor(rows, 256).bfloat16()
    for y, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(y, layer(x))


@needs_operation
@each
def test_embedding_operation_gives_the_rows_of_the_plain_form(format):
    packed, numbers = random_packed(format, 96, 512)
    rows = torch.tensor([0, 95, 17, 17])
    assert_same(torch.ops.qwen3fast.quantized_rows(*packed, rows), numbers[rows].bfloat16())


@each
def test_scales_of_another_shape_are_refused(format):
    packed = quantize(random_tensor(32, 512), format)
    for scale in (packed.scale[:, :1], packed.scale[..., :-1], packed.scale[:1]):
        with pytest.raises(ValueError, match="scale must be"):
            packed_linear(packed.weight, scale.contiguous())


def test_layers_whose_channels_make_no_whole_records_stay_plain():
    model = randomized(small_config(**SIZES | {"intermediate_size": 320}))
    quantize_model(model, "int6", torch.float32)
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert model.model.layers[0].mlp.up_proj.format is INT6


@needs_operation
@each
@pytest.mark.parametrize("experts", [{}, {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256}])
def test_blocks_decode_in_one_call_as_one_by_one(format, experts):
    model = randomized(small_config(**SIZES, **experts)).bfloat16()
    quantize_model(model, format, torch.bfloat16)
    cache = StaticKVCache(model.config, 4, 64, torch.bfloat16, torch.device("cpu"))
    # Tokens for which no two experts are nearly as likely, which rounding would exchange.
    x_B1E, position_B1 = model.embed(torch.tensor([[7], [17], [3]])), torch.zeros(3, 1, dtype=torch.int64)
    assert DecodeLayers(model, cache).serves(3)
    expected = run_layers_plainly(model, cache, x_B1E, position_B1)
    assert relative_error(run_layers(model, cache, x_B1E, position_B1), expected) < 0.02


@needs_operation
@each
def test_greedy_tokens_are_the_same_cached_batched_saved_and_uncached(format, tmp_path):
    model = randomized(small_config(**SIZES)).bfloat16()
    quantize_model(model, format, torch.bfloat16)
    prompts = [[5, 17, 3], [8, 1, 40, 2, 77]]
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, "cpu", "bfloat16")
    assert formats_of(loaded) == [format.name]
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)
    replies = []
    for batch_size, use_cache in ((1, True), (2, True), (2, False)):
        with Generator(loaded, max_seq_len=32, compile=False, max_batch_size=batch_size) as generator:
            replies.append([r.token_ids for r in generator.generate(prompts, GREEDY, use_cache=use_cache)])
    assert replies[0] == replies[1] == replies[2]


@each
def test_devices_without_kernels_are_refused(format, tmp_path, monkeypatch):
    whole, mixture = (randomized(small_config(**SIZES)) for _ in range(2))
    quantize_model(whole, format, torch.float32)
    quantize_model(mixture, "uint4", torch.float32, modules_to_not_convert=["model.layers.1.mlp.down_proj"])
    quantize_model(mixture, format, torch.float32)
    assert formats_of(mixture) == sorted(["uint4", format.name]) and main_format(mixture) == "uint4"
    monkeypatch.setattr("qwen3fast.loading.choose_device", lambda device: torch.device("cuda"))
    for name, model in (("whole", whole), ("mixture", mixture)):
        save_model(model, tmp_path / name)
        with pytest.raises(
            ValueError, match=f"{name} has weights in {format.name}, which run on cpu devices, not on cuda"
        ):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match=f"'{format.name}' runs on cpu devices, not on cuda; there, use int8 or"):
        load_model("random:0.6b", quantization=format.name)


@pytest.mark.parametrize("format", [INT6, UINT5, NL4], ids=lambda f: f.name)
def test_a_mixture_with_layers_that_do_not_fit_is_saved(format, tmp_path):
    model = randomized(small_config(**SIZES | {"intermediate_size": 320}))
    quantize_model(model, format, torch.float32)
    quantize_model(model, "int8", torch.float32)  # the layers that are left
    assert formats_of(model) == sorted(["int8", format.name]) and main_format(model) == "int8"
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, "cpu", "float32")
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)


@with_short_records
def test_layouts_that_fit_more_channels_than_their_format_are_saved(format, tmp_path):
    model = randomized(small_config(**SIZES | {"intermediate_size": 320}))
    quantize_model(model, format, torch.float32)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, "cpu", "float32")
    assert formats_of(loaded) == [format.name]
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)


def test_prequantized_layers_that_do_not_fit_become_plain(tmp_path):
    config = small_config(**SIZES | {"intermediate_size": 320})
    write_prequantized(tmp_path, config, AWQ | {"group_size": 64})
    mlp = load_model(tmp_path, "cpu", quantization="int6").model.layers[0].mlp
    assert isinstance(mlp.down_proj, torch.nn.Linear) and mlp.up_proj.format is INT6


@each
def test_nothing_needs_the_operations(format, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    layer, x = quantized_layer(48, 256, format), random_tensor(3, 256)
    assert_same(layer(x), F.linear(x, layer.dequantize()))
