"""Weights in 8 and 4 bits: the formats, the product, models that are quantized, saved and loaded."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_tasks
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_same, random_ids, random_tensor, randomized, small_config
from hypothesis import given
from hypothesis import strategies as st
from test_tiny import GREEDY, share_right, task_examples
from torch import nn

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.save import CACHE_LINE, save_model
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.ops import quantize_weight
from qwen3fast.kernels.cpu.structures import RowLimits
from qwen3fast.model.linears import linears
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.formats import FORMATS, GROUP, INT4_RANGES, LANES, Packed, quantize
from qwen3fast.quantization.fp8 import from_fp8
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.packed import levels_of_rows, short_scales
from qwen3fast.quantization.uint4 import Layout

SHORT = Layout(256, is_short=True)  # Q4_K's
INT8, INT4, UINT4, FP8 = (FORMATS[name] for name in ("int8", "int4", "uint4", "fp8"))
PACKABLE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
formats = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
rounded_in_cpp = pytest.mark.parametrize("format", [INT8, INT4], ids=lambda f: f.name)
needs_operation = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def quantized_layer(out_features: int, in_features: int, format, seed: int = 0) -> QuantizedLinear:
    weight = random_tensor(out_features, in_features, seed=seed) / in_features**0.5
    return QuantizedLinear(quantize(weight, format), format)


@needs_operation
@pytest.mark.parametrize("quantization", [None, "int4", "lossless"])
def test_a_default_device_of_the_application_changes_no_reply(quantization):
    def reply():
        options = {"dtype": "bfloat16", "quantization": quantization, "calibrate": False, "max_seq_len": 64}
        with Generator.from_pretrained("tiny", device="cpu", **options) as generator:
            return generator.generate("What is 17 + 25?", SamplingParams(temperature=0, max_tokens=8)).token_ids

    expected = reply()
    with torch.device("meta"):
        assert reply() == expected


# ---------------------------------------------------------------------------------------------------------- formats


@given(rows=st.integers(1, 4), groups=st.integers(1, 4), exponent=st.integers(-12, 4), seed=st.integers(0, 99))
def test_int8_is_within_half_a_step(rows, groups, exponent, seed):
    weight = random_tensor(rows * LANES, groups * GROUP, seed=seed) * 2.0**exponent
    packed = quantize(weight, INT8)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((INT8.dequantize(packed) - weight).abs() <= step * 0.501).all()


@given(rows=st.integers(1, 4), groups=st.integers(1, 4), exponent=st.integers(-12, 4), seed=st.integers(0, 99))
def test_int4_is_never_worse_than_its_widest_range(rows, groups, exponent, seed):
    weight = random_tensor(rows * LANES, groups * GROUP, seed=seed) * 2.0**exponent
    group = weight.view(-1, GROUP)
    largest = group.gather(1, group.abs().argmax(dim=1, keepdim=True))
    scale = short_scales(largest / -8, torch.zeros(()))
    plain = torch.round(group / scale).clamp(-8, 7) * scale
    ours = INT4.dequantize(quantize(weight, INT4)).view(-1, GROUP)
    assert ((ours - group).square().sum(1) <= (plain - group).square().sum(1) * (1 + 1e-6)).all()
    assert INT4_RANGES[0] == 1.0


@needs_operation
def test_all_fp8_numbers_are_read_from_their_bits():
    byte = torch.arange(256, dtype=torch.uint8)
    for convert in (from_fp8, torch.compile(from_fp8, fullgraph=True)):
        torch.testing.assert_close(
            convert(byte), byte.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(("N", "K"), [(16, 32), (48, 160), (272, 256)])
def test_fp8_blocks_have_the_scale_of_their_16_rows_and_128_channels(N, K):
    format = FP8.with_blocks()
    weight = random_tensor(N, K)
    packed = quantize(weight, format)
    assert packed.scale.shape == format.empty(N, K).scale.shape == (N // 16, -(-K // 128))
    assert packed.scale.dtype == torch.float32
    rows = format.dequantize(packed)
    for n, k in itertools.product(range(0, N, 16), range(0, K, 128)):
        block = weight[n : n + 16, k : k + 128]
        scale = block.abs().max() / 448
        expected = (block / scale).to(torch.float8_e4m3fn).float() * scale
        assert_same(packed.scale[n // 16, k // 128], scale)
        assert_same(rows[n : n + 16, k : k + 128], expected)
    row = torch.tensor([N - 1, 0, 5])
    assert_same(format.rows(packed, row), rows[row])


@pytest.mark.parametrize("threads", [1, 3])
@rounded_in_cpp
@given(
    rows=st.integers(1, 4), groups=st.integers(1, 5), exponent=st.sampled_from([-130, -126, -40, -7, 0, 9, 120]),
    seed=st.integers(0, 999), kind=st.sampled_from(["normal", "few values", "mostly zero"]),
)  # fmt: skip
def test_the_operation_rounds_as_the_plain_form_does(format, threads, rows, groups, exponent, seed, kind):
    weight = random_tensor(rows * LANES, groups * GROUP, seed=seed)
    if kind == "few values":  # many of equal size, of both signs
        weight = weight.mul(2).round().div(2)
    elif kind == "mostly zero":
        weight = weight * (weight > 1.5)
    weight = torch.ldexp(weight, torch.tensor(exponent)).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    actual = quantize(weight, format)
    torch.set_num_threads(before)
    for result, expected in zip(actual, format.quantize(weight), strict=True):
        assert_same(result, expected)
        assert torch.equal(result.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))  # -0 as well


@needs_operation
def test_the_operation_rounds_numbers_that_are_none_as_the_plain_form_does():
    weight = random_tensor(2 * LANES, 2 * GROUP).bfloat16()
    weight[3, 5], weight[20, 40] = torch.nan, torch.inf
    for result, expected in zip(quantize(weight, INT4), INT4.quantize(weight), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    quantized, plain = (INT8.dequantize(packed) for packed in (quantize(weight, INT8), INT8.quantize(weight)))
    sound = [row for row in range(2 * LANES) if row not in (3, 20)]
    assert_same(quantized[sound], plain[sound])
    assert quantized[[3, 20]].isnan().all() and plain[3].isnan().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@formats
def test_no_format_hides_a_number_that_is_none(format, dtype, number):
    weight = random_tensor(2 * LANES, 2 * GROUP).to(dtype)
    weight[3, 5] = number
    for packed in (quantize(weight, format), format.quantize(weight)):
        result = format.dequantize(packed)
        assert not result[3, :GROUP].isfinite().all()
        assert result[[*range(3), *range(4, 2 * LANES)]].isfinite().all()


@needs_operation
def test_the_operation_refuses_what_it_cannot_round():
    packed = INT8.empty(LANES, GROUP)
    for weight in (
        torch.zeros(LANES, GROUP),
        torch.zeros(LANES, 2 * GROUP).bfloat16(),
        torch.zeros(GROUP, LANES).bfloat16().T,
    ):
        with pytest.raises(ValueError, match=r"quantize_weight: weight must be \(16, 32\) bfloat16, contiguous"):
            quantize_weight(weight, *packed)


@pytest.mark.parametrize(("format", "limit"), [(INT8, 0.009), (INT4, 0.084), (UINT4, 0.078), (FP8, 0.027)], ids=FORMATS)
def test_error_on_normal_weights(format, limit):
    # 4 bits: below the 0.086 that the plain rule (scale = largest / -8) has on the same numbers.
    weight = random_tensor(256, 1024)
    assert relative_error(format.dequantize(quantize(weight, format)), weight) < limit


@rounded_in_cpp
def test_numbers_on_the_grid_come_back_exactly(format):
    levels = 8 if format is INT4 else 127
    grid = torch.randint(1 - levels, levels, (3 * LANES, 2 * GROUP), generator=torch.Generator().manual_seed(0))
    grid[:, ::GROUP] = -levels  # the end of the range is met in each group
    weight = grid * 0.125
    assert_same(format.dequantize(quantize(weight, format)), weight)


@formats
def test_zero_groups_stay_zero(format):
    weight = random_tensor(LANES, 2 * GROUP)
    weight[3] = 0
    weight[5, :GROUP] = 0
    dense = format.dequantize(quantize(weight, format))
    assert not dense[3].any() and not dense[5, :GROUP].any() and dense.isfinite().all()


def test_layout_on_disk_is_the_described_one():
    weight = random_tensor(2 * LANES, 2 * GROUP)
    row, channel = 19, 45
    byte = quantize(weight, INT8).weight[row // 16, channel // 4, row % 16, channel % 4]
    assert int(byte) - 128 == round(float(weight[row, channel] / weight[row].abs().max() * 127))
    packed = quantize(weight, INT4)
    # Channel 45 = 8 * 5 + 4 + 1: the high half of byte 1; its neighbor 41 = 8 * 5 + 1 is the low half.
    byte = int(packed.weight[row // 16, 5, row % 16, 1])
    scale = float(packed.scale[row // 16, channel // 32, row % 16])
    dense = INT4.dequantize(packed)
    assert (byte >> 4) - 8 == pytest.approx(float(dense[row, 45]) / scale)
    assert (byte & 15) - 8 == pytest.approx(float(dense[row, 41]) / scale)


@formats
def test_rows_are_those_of_the_whole(format):
    packed = quantize(random_tensor(3 * LANES, GROUP), format)
    ids = torch.tensor([47, 0, 16, 16])
    assert_same(format.rows(packed, ids), format.dequantize(packed)[ids])


@formats
def test_large_weights_are_quantized_in_parts_without_a_difference(format, monkeypatch):
    weight = random_tensor(5 * LANES, GROUP)
    whole = quantize(weight, format)
    monkeypatch.setattr("qwen3fast.quantization.formats.WEIGHTS_AT_ONCE", 2 * LANES * GROUP)
    for a, b in zip(quantize(weight, format), whole, strict=True):
        assert_same(a, b)


# ---------------------------------------------------------------------------------------------------------- product


def product_in_plain_pytorch(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """Compute the C++ operation's result in float64: activations in 8 bits as well, one scale per 32 channels.

    Not for fp8.
    """
    if layer.format.name == "fp8":
        return x.double() @ layer.dequantize().double().T
    groups = x.double().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    rounded = torch.round(groups / scale.where(scale > 0, 1)) * scale
    return rounded.flatten(-2) @ layer.dequantize().double().T


@needs_operation
@formats
@pytest.mark.parametrize(
    ("rows", "out_features", "in_features"),
    [(rows, *[(16, 32), (48, 96), (304, 1024)][i % 3]) for i, rows in enumerate([1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 37])],
)
def test_operation_equals_the_plain_form(format, rows, out_features, in_features):
    layer = quantized_layer(out_features, in_features, format)
    x = random_tensor(rows, in_features, seed=1).bfloat16()
    # The result is rounded to bfloat16 (2^-9); a rounding of x that falls the other way moves it a little more.
    assert relative_error(layer(x), product_in_plain_pytorch(x, layer)) < 4e-3


@needs_operation
@formats
def test_operation_is_near_the_unrounded_product(format):
    layer = quantized_layer(256, 512, format)
    x = random_tensor(5, 512, seed=1).bfloat16()
    assert relative_error(layer(x), F.linear(x.float(), layer.dequantize())) < 8e-3


@needs_operation
@formats
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), groups=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_row_does_not_depend_on_the_rows_beside_it(format, rows, blocks, groups, seed):
    layer = quantized_layer(blocks * LANES, groups * GROUP, format, seed)
    x = random_tensor(rows, groups * GROUP, seed=seed + 1).bfloat16()
    assert_same(layer(x), torch.cat([layer(row[None]) for row in x]))


@needs_operation
@formats
def test_a_product_does_not_depend_on_the_ones_before(format):
    """A thread keeps the room for quantized activations; a new thread has none."""
    for rows, in_features in ((40, 1024), (3, 96), (50, 512), (9, 1024)):
        layer, x = quantized_layer(48, in_features, format), random_tensor(rows, in_features).bfloat16()
        with ThreadPoolExecutor(1) as new_thread:
            assert_same(layer(x), new_thread.submit(layer, x).result())
        x[0, 0] = float("nan")  # left behind
        assert layer(x)[0].isnan().all() and not layer(x)[1:].isnan().any()


@needs_operation
@formats
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20])
def test_layers_together_give_what_each_gives_alone(format, rows):
    layers = [quantized_layer(n, 64, format, seed=n) for n in (48, 16, 80)]
    x = random_tensor(rows, 64).bfloat16()
    for y, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(y, layer(x))


@needs_operation
@formats
def test_operation_on_zeros_extremes_and_strides(format):
    layer = quantized_layer(32, 64, format)
    assert not layer(torch.zeros(2, 64).bfloat16()).any()
    for size in (1e-30, 1e30):
        huge = (random_tensor(1, 64) * size).bfloat16()
        assert relative_error(layer(huge), product_in_plain_pytorch(huge, layer)) < 4e-3
    assert layer(torch.full((1, 64), torch.inf).bfloat16()).isnan().all()
    x = random_tensor(64, 2, 3).bfloat16().permute(1, 2, 0)
    assert layer(x).shape == (2, 3, 32)
    assert_same(layer(x), layer(x.contiguous()))
    assert layer(torch.full((1, 64), torch.nan).bfloat16()).isnan().all()


@needs_operation
@pytest.mark.parametrize(
    ("x", "weight", "scale"),
    [
        (torch.zeros(1, 32), torch.zeros(1, 8, 16, 4).byte(), torch.zeros(16)),
        (torch.zeros(1, 64).bfloat16(), torch.zeros(1, 8, 16, 4).byte(), torch.zeros(16)),
        (torch.zeros(1, 32).bfloat16(), torch.zeros(1, 8, 16, 4), torch.zeros(16)),
        (torch.zeros(1, 32).bfloat16(), torch.zeros(1, 8, 16, 4).byte(), torch.zeros(32)),
        (torch.zeros(1, 16).bfloat16(), torch.zeros(1, 4, 16, 4).byte(), torch.zeros(16)),
    ],
    ids=["float32", "other width", "float weight", "scales of other rows", "half a group"],
)
def test_operation_refuses_what_it_cannot_do(x, weight, scale):
    with pytest.raises(ValueError, match="quantized_linear: "):
        torch.ops.qwen3fast.quantized_linear(x, [weight], [scale])


# ----------------------------------------------------------------------------------------------------------- models


def quantized_model(format, **changes):
    model = randomized(small_config(**PACKABLE, **changes))
    quantize_model(model, format.name, torch.float32)
    return model


@formats
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_model_equals_the_model_of_its_dequantized_weights(format, tied, bias, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)  # the plain form: no rounding of activations
    model = quantized_model(format, tie_word_embeddings=tied, attention_bias=bias)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 2 * 7 + 1 and isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert not [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    reference = randomized(small_config(**PACKABLE, tie_word_embeddings=tied, attention_bias=bias))
    with torch.no_grad():
        for name, module in reference.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(model.get_submodule(name).dequantize())
        if not tied:
            embedding = model.model.embed_tokens
            packed = Packed(embedding.weight_packed, embedding.weight_scale)
            reference.model.embed_tokens.weight.copy_(format.dequantize(packed))
    tokens = random_ids(2, 9, vocab_size=96)
    assert_near(model(tokens), reference(tokens))


@formats
def test_tied_weights_are_stored_once(format):
    model = quantized_model(format)
    assert model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
    assert [name for name, _ in model.named_parameters() if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight_packed",
        "model.embed_tokens.weight_scale",
    ]


def test_layers_that_cannot_be_packed_stay_as_they_are():
    model = randomized(small_config())  # hidden_size 48, vocab_size 97
    quantize_model(model, "int8", torch.float32)
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert "lm_head" in kept and "model.layers.0.self_attn.q_proj" in kept
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert isinstance(model.model.layers[0].self_attn.o_proj, QuantizedLinear)  # 64 -> 48
    assert_near(model(random_ids(1, 5)), randomized(small_config())(random_ids(1, 5)), torch.bfloat16)


@formats
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_model_loads_as_it_was(format, tied, dtype, tmp_path):
    model = quantized_model(format, tie_word_embeddings=tied)
    save_model(model, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["folder"]
    loaded = load_model(tmp_path / "new" / "folder", dtype=dtype)
    assert formats_of(loaded) == [format.name]
    assert dict(loaded.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert_same(parameter, model.get_parameter(name).to(parameter.dtype))
    assert loaded.lm_head.weight_scale.dtype == model.lm_head.weight_scale.dtype
    tokens = random_ids(1, 6, vocab_size=96, seed=2)
    assert loaded(tokens).dtype == loaded.embed(tokens).dtype == getattr(torch, dtype)
    assert_near(loaded(tokens), model(tokens), getattr(torch, dtype))


@formats
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_tensor_of_a_saved_model_begins_at_a_cache_line(format, tied, tmp_path):
    save_model(quantized_model(format, tie_word_embeddings=tied), tmp_path)
    header_bytes = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert (8 + header_bytes) % CACHE_LINE == 0


def test_broken_quantized_checkpoints_are_refused_by_name(tmp_path):
    model = quantized_model(INT8)
    del model.model.layers[1].mlp.up_proj.weight_scale
    model.model.layers[0].mlp.up_proj.weight_packed = nn.Parameter(
        torch.zeros(1, 2, 16, 4, dtype=torch.uint8), requires_grad=False
    )
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight_scale: missing") as error:
        load_model(tmp_path)
    assert "layers.0.mlp.up_proj.weight_packed in model.safetensors: shape (1, 2, 16, 4)" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "is not supported"),
        ({"format": ["int8"]}, "is not supported"),
        ({"format": "int3"}, "format 'int3' is not supported; supported: int8, int4"),
    ],
)
def test_other_versions_and_formats_are_refused(changes, message, tmp_path):
    save_model(quantized_model(INT8), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    save_model(quantized_model(INT8), tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def disk_full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("qwen3fast.checkpoint.save.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_model(quantized_model(INT4), tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unknown_and_conflicting_formats_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match="quantization='int3' is not supported; supported: int8, int4, uint4, fp8, int6, uint5, nl4, lossless",
    ):
        load_model("no/such/folder/is/looked/for", quantization="int3")
    save_model(quantized_model(INT8), tmp_path)
    with pytest.raises(ValueError, match="is in int8 already; int4 needs the original weights"):
        load_model(tmp_path, quantization="int4")
    assert formats_of(load_model(tmp_path, quantization="int8")) == ["int8"]


def test_devices_without_kernels_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    save_model(quantized_model(FP8), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    monkeypatch.setattr("qwen3fast.loading.choose_device", lambda device: torch.device("mps"))
    with pytest.raises(ValueError, match="has weights in fp8, which run on cpu and cuda devices, not on mps"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="'int8' runs on cpu and cuda devices, not on mps; use device='cpu'"):
        load_model("random:0.6b", quantization="int8")


def test_info_states_the_bytes_of_a_quantized_checkpoint(tmp_path, capsys):
    model = quantized_model(INT4)
    save_model(model, tmp_path)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert main(["info", "--model", str(tmp_path)]) == 0
    assert f"{size:,} bytes in int4" in capsys.readouterr().out


def test_command_line_quantizes(capsys, opened):
    assert main(["generate", "What is 17 + 25?", "--quantization", "int8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "42\n"
    assert [formats_of(generator.model) for generator in opened] == [["int8"]]


def test_config_keeps_the_format():
    stored = CheckpointConfig(small_config(), quantization="int4", modules_to_not_convert=("lm_head",))
    assert CheckpointConfig.from_dict(stored.to_dict()) == stored
    assert "quantization_config" not in CheckpointConfig(small_config()).to_dict()


# ---------------------------------------------------------------------------------------------------------- tiny


@pytest.fixture(scope="module", params=["int8", "int4"])
def tiny(request):
    with Generator.from_pretrained("tiny", quantization=request.param, max_batch_size=4, compile=False) as generator:
        yield generator


def test_quantized_tiny_is_smaller(tiny):
    bf16_bytes = load_model("tiny").config.num_parameters * 2
    limit = {"int8": 0.52, "int4": 0.29}[formats_of(tiny.model)[0]]
    assert tiny.stats.weight_bytes < bf16_bytes * limit


@pytest.mark.parametrize(
    "make", [lambda rng: tiny_tasks.addition(rng, held_out=True), tiny_tasks.copying], ids=["addition", "copying"]
)
def test_quantized_tiny_is_right(tiny, make):
    assert share_right(tiny, task_examples(make, 40)) >= 0.9


def test_quantized_tiny_saves_and_chats_again(tiny, tmp_path):
    tiny.save_quantized(tmp_path / "saved")
    with pytest.raises(ValueError, match="is the folder of the model, whose weights would be overwritten"):
        tiny.save_quantized(TINY_FOLDER)
    assert (tmp_path / "saved" / "tokenizer_config.json").read_bytes() == (
        TINY_FOLDER / "tokenizer_config.json"
    ).read_bytes()
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    with Generator.from_pretrained(tmp_path / "saved", compile=False) as again:
        assert again.chat(messages, GREEDY, enable_thinking=False).text == "42"
        assert again.default_params == tiny.default_params


def test_quantized_tiny_compiled_batched_and_uncached_agree():
    prompts = ["The capital of France is", "Once upon a time, Alice had", "Copy"]
    params = SamplingParams(temperature=0, max_tokens=12)
    options = {"quantization": "int8", "dtype": "float32", "max_batch_size": 4}
    with Generator.from_pretrained("tiny", compile=True, **options) as compiled:
        together = [r.token_ids for r in compiled.generate(prompts, params)]
        assert together == [compiled.generate(p, params).token_ids for p in prompts]
        assert together == [r.token_ids for r in compiled.generate(prompts, params, use_cache=False)]
    with Generator.from_pretrained("tiny", compile=False, **options) as eager:
        assert together == [r.token_ids for r in eager.generate(prompts, params)]


def test_only_quantized_models_can_be_saved(tmp_path):
    with (
        Generator.from_pretrained("tiny", compile=False) as generator,
        pytest.raises(ValueError, match="not quantized"),
    ):
        generator.save_quantized(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@needs_operation
@formats
def test_embedding_operation_gives_the_rows_of_the_plain_form(format):
    packed = quantize(random_tensor(48, 96), format)
    row_R = torch.tensor([0, 47, 15, 16, 31, 16])
    expected, packed = format.rows(packed, row_R).bfloat16(), format.operands(packed)
    assert torch.equal(torch.ops.qwen3fast.quantized_rows(*packed, row_R), expected)
    for row in (-1, 48):
        with pytest.raises(ValueError, match=rf"\[{row}\] is not one of the weight's 48"):
            torch.ops.qwen3fast.quantized_rows(*packed, torch.tensor([row]))


@pytest.mark.parametrize("has_zero", [False, True])
def test_uint4_is_dequantized_by_compiled_code_as_by_uncompiled(has_zero):
    packed = UINT4.with_layout(lambda _: Layout(64, has_zero)).quantize(random_tensor(32, 128))
    layer = QuantizedLinear(packed, UINT4)
    assert_same(torch.compile(layer.dequantize, fullgraph=True)(), layer.dequantize())


def test_short_records_hold_6_bits_as_described():
    """Each number of a record from its bytes: s and the high bits of m together, the low bits of two m in a byte."""
    packed = UINT4.with_layout(lambda _: SHORT).quantize(random_tensor(2 * LANES, 512))
    assert packed.scale.shape == (2, 2, 256)
    level_RGC, actual_RGC = levels_of_rows(packed, torch.arange(32)), UINT4.dequantize(packed).view(32, 16, 32)
    for row, group in itertools.product((0, 7, 19, 31), range(16)):
        record, lane, i = packed.scale[row // 16, group // 8], row % 16, group % 8
        d, dmin = (record[32 * j : 32 * j + 32].view(torch.float16)[lane].float() for j in (0, 1))
        first, low = int(record[64 + 16 * i + lane]), int(record[192 + 16 * (i % 4) + lane]) >> 4 * (i // 4) & 15
        s, m = first % 64, low + 16 * (first // 64)
        assert_same(actual_RGC[row, group], level_RGC[row, group].float() * (d * s) - dmin * m)


def test_uint4_layout_is_the_described_one():
    """A number at a time, from the bytes: minimums of 32 channels, then a zero point per span."""
    weight, row, channel = random_tensor(2 * LANES, 256), 19, 173
    for layout in (Layout(128), Layout(128, has_zero=True)):
        packed = UINT4.with_layout(lambda _: layout).quantize(weight)  # noqa: B023
        record = packed.scale[row // 16, channel // 128]
        byte = int(packed.weight[row // 16, channel // 8, row % 16, channel % 4])
        level = byte >> 4 if channel % 8 >= 4 else byte & 15
        d, second = (record[32 * i : 32 * i + 32].view(torch.float16)[row % 16].float() for i in (0, 1))
        if layout.has_zero:
            expected = d * (level - int(record[32 + row % 16]))
        else:
            s, m = (int(record[64 + 32 * (channel % 128 // 32) + 16 * i + row % 16]) for i in (0, 1))
            expected = d * s * level - second * m
        assert packed.scale.shape == (2, 2, 48 if layout.has_zero else 192)
        assert UINT4.dequantize(packed)[row, channel] == expected
        assert_same(UINT4.rows(packed, torch.tensor([row])), UINT4.dequantize(packed)[[row]])
        if cpu.is_loaded():
            rows = torch.ops.qwen3fast.quantized_rows(*packed, torch.tensor([row]))
            assert_same(rows, UINT4.dequantize(packed)[[row]].bfloat16())


LAYOUTS = [Layout(32), Layout(96), Layout(32, True), Layout(96, True), Layout(288, True), SHORT]


@needs_operation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_every_uint4_layout_is_multiplied_and_dequantized(layout, rows):
    K = 512 if layout.is_short else 288
    packed = UINT4.with_layout(lambda _: layout).quantize(random_tensor(48, K))
    assert Layout.of(packed) == layout
    layer, x = QuantizedLinear(packed, UINT4), random_tensor(rows, K, seed=1).bfloat16()
    assert relative_error(layer(x), product_in_plain_pytorch(x, layer)) < 4e-3
    assert_same(layer(x), torch.cat([layer(row[None]) for row in x]))
    dense = torch.ops.qwen3fast.quantized_linear(x, [packed.weight], [packed.scale], RowLimits(dequantized=0))
    assert_same(dense, F.linear(x, layer.dequantize().bfloat16()))


@needs_operation
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_layers_of_several_formats_together_give_what_each_gives_alone(rows):
    layers = [quantized_layer(48, 64, format, seed=i) for i, format in enumerate((UINT4, INT8, INT4, UINT4))]
    x = random_tensor(rows, 64).bfloat16()
    for y, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(y, layer(x))
    layers[1].limits = RowLimits(dequantized=2)  # another form of its own
    for y, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(y, layer(x))


@needs_operation
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 96), (1, 1, 47), (1, 3, 128), (2, 1, 128), (1, 0, 96), (1, 64, 96), (1, 2, 128)],
    ids=["other record", "no record", "parts of a group", "other rows", "none", "too many", "span of another"],
)
def test_scales_of_no_layout_are_refused(shape):
    packed = torch.zeros(1, 8, 16, 4, dtype=torch.uint8)  # (16, 64)
    with pytest.raises(ValueError, match="quantized_linear: scale must be"):
        torch.ops.qwen3fast.quantized_linear(
            torch.zeros(1, 64).bfloat16(), [packed], [torch.zeros(shape, dtype=torch.uint8)]
        )
