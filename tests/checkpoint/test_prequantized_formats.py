"""Prequantized checkpoints: the weights of each layout, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_near, assert_same, random_ids, randomized, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from prequantized_layouts import (
    AWQ,
    FP8,
    GPTQ,
    compressed,
    drawn_layer,
    fp8_layer,
    in_hidden_order,
    is_of_layer,
    write_fp8_experts,
    write_prequantized,
    write_tensors,
)
from safetensors.torch import load_file, save_file
from test_checkpoint import tensors_of
from test_expert_checkpoints import tensors_by_expert
from torch import nn

from qwen3fast import load_model
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.prequantized.layer import PrequantizedLayer, expected_tensors
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli import main
from qwen3fast.kernels import cpu
from qwen3fast.model import stacking
from qwen3fast.quantization.convert import formats_of, plain_modules
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import ALL_FORMATS, FORMATS, Packed
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.packed import bytes_of_rows
from qwen3fast.quantization.uint4 import Layout

CONFIG = small_config(
    vocab_size=96, hidden_size=128, intermediate_size=256, head_dim=32, tie_word_embeddings=False, dtype=torch.bfloat16
)
# Sizes that are no multiples of a block: 160 and 224 of 128.
CUT = replace(CONFIG, hidden_size=160, intermediate_size=224)
LAYOUTS = {
    "fp8": (CONFIG, FP8, {}),
    "fp8, cut blocks": (CUT, FP8, {}),
    "fp8, bfloat16 scales": (CUT, FP8, {"scale_dtype": torch.bfloat16}),
    "awq": (CONFIG, AWQ, {}),
    "awq, 64": (CONFIG, {**AWQ, "group_size": 64, "version": "GEMM", "modules_to_not_convert": None}, {}),
    "awq, 32": (CUT, {**AWQ, "group_size": 32}, {}),
    "gptq": (CONFIG, GPTQ, {}),
    "gptq, 32, second format": (CUT, {**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"}, {}),
    "gptq, cut group": (CUT, GPTQ, {}),
    "gptq without g_idx": (CONFIG, {**GPTQ, "group_size": 64}, {"with_g_idx": False}),
    "gptq, a group a row": (CONFIG, {**GPTQ, "group_size": -1}, {}),
    "gptq, zero points": (CONFIG, {**GPTQ, "sym": False}, {}),
    "gptq, zero points, second format": (CONFIG, {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}, {}),
    "gptq, zero points, cut group": (CUT, {**GPTQ, "sym": False}, {}),
    "gptq, zero points, a group a row": (CUT, {**GPTQ, "sym": False, "desc_act": True, "group_size": -1}, {}),
    "gptq, act order": (CONFIG, {**GPTQ, "desc_act": True, "group_size": 32}, {}),
    "gptq, zero points, act order": (CUT, {**GPTQ, "sym": False, "desc_act": True, "group_size": 32}, {}),
    "gptq, 8 bits": (CONFIG, {**GPTQ, "bits": 8}, {}),
    "gptq, 8 bits, zero points, act order": (CONFIG, {**GPTQ, "bits": 8, "sym": False, "desc_act": True}, {}),
    "gptq, 8 bits, a group a row": (CONFIG, {**GPTQ, "bits": 8, "group_size": -1}, {}),
    "compressed, W4A16": (CONFIG, compressed("pack-quantized", "group", 4, group_size=128), {}),
    "compressed, W4A16, 32": (CUT, compressed("pack-quantized", "group", 4, group_size=32, actorder="weight"), {}),
    "compressed, W4A16, rows": (CUT, compressed("pack-quantized", "channel", 4), {}),
    "compressed, W4A16, zero points": (
        CONFIG,
        compressed("pack-quantized", "group", 4, group_size=64, symmetric=False),
        {},
    ),
    "compressed, W4A16, act order": (
        CONFIG,
        compressed("pack-quantized", "group", 4, group_size=32, actorder="group"),
        {},
    ),
    "compressed, W4A16, zero points, act order": (
        CONFIG,
        compressed("pack-quantized", "group", 4, group_size=64, symmetric=False, actorder="group"),
        {},
    ),
    "compressed, W8A16": (CONFIG, compressed("pack-quantized", "group", 8, group_size=128), {}),
    "compressed, W8A16, rows, zero points": (CUT, compressed("pack-quantized", "channel", 8, symmetric=False), {}),
    "compressed, W8A8": (CUT, compressed("int-quantized", "channel"), {}),
    "compressed, W8A8, tensors, zero points": (CUT, compressed("int-quantized", "tensor", symmetric=False), {}),
    "compressed, W8A8, groups": (CONFIG, compressed("int-quantized", "group", group_size=32), {}),
    "compressed, fp8, rows": (CUT, compressed("float-quantized", "channel"), {}),
    "compressed, fp8, tensors": (CUT, compressed("float-quantized", "tensor"), {}),
    "compressed, fp8, blocks": (CUT, compressed("float-quantized", "block", block_structure=[128, 128]), {}),
}
TAKEN_OVER = [
    "gptq",
    "gptq, 32, second format",
    "gptq, cut group",
    "gptq without g_idx",
    "gptq, a group a row",
    "gptq, act order",
    "compressed, W4A16",
    "compressed, W4A16, act order",
    "compressed, W4A16, 32",
    "compressed, W4A16, rows",
]
EXACT = {  # the channels that a record of scales covers, by the channels of a row
    "awq": {128: 128, 256: 128},
    "awq, 64": {128: 64, 256: 64},
    "awq, 32": {96: 32, 128: 32, 160: 32, 224: 32},
    "gptq, zero points": {128: 128, 256: 128},
    "gptq, zero points, second format": {128: 128, 256: 128},
    "gptq, zero points, cut group": {128: 128, 160: 32, 224: 32},
    "gptq, zero points, a group a row": {128: 128, 160: 160, 224: 224},
    "gptq, zero points, act order": {96: 32, 128: 32, 160: 32, 224: 32},
    "compressed, W4A16, zero points": {128: 64, 256: 64},
    "compressed, W4A16, zero points, act order": {128: 64, 256: 64},
}
FLOATS = [name for name in LAYOUTS if "fp8" in name]
G_IDX = ("g_idx", "weight_g_idx")
ROUNDED = [name for name in LAYOUTS if name not in {*TAKEN_OVER, *EXACT, *FLOATS}]
UP = "model.layers.1.mlp.up_proj"
MOE = small_config(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=False)


def write_layout(name: str, folder, **options):
    """A checkpoint in a layout of LAYOUTS; the model that it stands for."""
    config, quantization_config, more = LAYOUTS[name]
    return write_prequantized(folder, config, quantization_config, **more, **options)


def layers_of(model) -> dict[str, nn.Module]:
    """The linear layers of a model's blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear) and n != "lm_head"}


# ----------------------------------------------------------------------------------------------------- plain weights


@pytest.mark.parametrize(("name", "files"), [(name, 3 if i % 2 else 1) for i, name in enumerate(LAYOUTS)])
def test_dequantized_weights_are_what_the_tensors_stand_for(tmp_path, name, files):
    reference = write_layout(name, tmp_path, files=files)
    model = load_model(tmp_path, device="cpu", dtype="float32", quantization="dequantize")
    assert model.config == reference.config
    assert dict(model.named_parameters()).keys() == dict(reference.named_parameters()).keys()
    for parameter_name, expected in reference.named_parameters():
        actual = model.get_parameter(parameter_name)
        # In float64 the reference was not rounded; a product of float32 numbers is, once.
        torch.testing.assert_close(actual, expected, rtol=2**-24, atol=0)
    assert_near(model(random_ids(2, 9, vocab_size=96)), reference(random_ids(2, 9, vocab_size=96)))


def test_dequantized_weights_are_rounded_once_to_the_dtype(tmp_path):
    reference = write_layout("fp8, cut blocks", tmp_path)
    model = load_model(tmp_path, device="cpu", quantization="dequantize")
    assert not formats_of(model)
    for name, parameter in model.named_parameters():
        assert_same(parameter, reference.get_parameter(name).bfloat16())


def test_the_layout_is_the_described_one():
    # One layer of each kind, where the place of single numbers is known beforehand.
    level = torch.arange(16)
    awq = {
        "qweight": torch.zeros(32, 1, dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    awq["qweight"][5, 0] = 0x70005301  # half bytes from the lowest on: rows 0 2 4 6 1 3 5 7 are 1 0 3 5 0 0 0 7
    stored = PrequantizedFormat.from_dict({**AWQ, "group_size": 32}, "")
    assert PrequantizedLayer(stored, (8, 32), awq).plain(torch.float32)[:, 5].tolist() == [1, 0, 0, 0, 3, 0, 5, 7]
    gptq = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    gptq["qweight"][1, 3] = -0x12345679  # 0xEDCBA987: channels 8 to 15 of row 3
    stored = PrequantizedFormat.from_dict({**GPTQ, "group_size": 32}, "")
    assert PrequantizedLayer(stored, (8, 32), gptq).plain(torch.float32)[3, 8:16].tolist() == (level[7:15] - 8).tolist()


def test_a_zero_point_of_zero_is_read_as_it_was_subtracted_from_whole_words():
    zero = 0x76543210  # zero points 0 to 7 of eight rows
    tensors = {
        "qweight": torch.zeros(4, 8, dtype=torch.int32),
        "qzeros": torch.full((1, 1), zero - 0x11111111, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    stored = PrequantizedFormat.from_dict({**GPTQ, "group_size": 32, "sym": False}, "")
    assert PrequantizedLayer(stored, (8, 32), tensors).plain(torch.float32)[:, 0].tolist() == [-z for z in range(8)]


@settings(max_examples=30)
@given(
    layout=st.sampled_from([FP8, AWQ, GPTQ, {**GPTQ, "bits": 8}, {**GPTQ, "sym": False, "desc_act": True}]),
    group_size=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 20),
    groups=st.integers(1, 3),
    at_once=st.sampled_from([1, 3000, 2**18]),
    seed=st.integers(0, 99),
)
def test_layers_of_any_size_are_read_in_parts_without_a_difference(layout, group_size, rows, groups, at_once, seed):
    config = layout if layout is FP8 else {**layout, "group_size": group_size}
    shape = (8 * rows, group_size * groups)
    tensors, weight = drawn_layer(np.random.default_rng(seed), *shape, config)
    stored = PrequantizedFormat.from_dict(config, "")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        n: p.shape for n, p in expected_tensors(stored, *shape).items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3fast.quantization.formats.WEIGHTS_AT_ONCE", at_once)
        assert_same(PrequantizedLayer(stored, shape, tensors).plain(torch.float32), weight.float())


# ------------------------------------------------------------------------------------------------------- our formats


@pytest.mark.parametrize(("name", "quantization"), [(name, None) for name in TAKEN_OVER] + [("gptq", "int4")])
def test_symmetric_levels_of_4_bits_are_taken_over(tmp_path, name, quantization):
    reference = write_layout(name, tmp_path)
    model = load_model(tmp_path, device="cpu", quantization=quantization)
    assert formats_of(model) == ["int4"]
    tensors = load_file(tmp_path / "model.safetensors")
    for layer_name, layer in layers_of(model).items():
        assert layer.format is FORMATS["int4"]
        assert type(layer) is QuantizedLinear or "down_proj" not in layer_name
        weight = reference.get_submodule(layer_name).weight
        is_gptq = f"{layer_name}.scales" in tensors
        scale_NG = tensors[f"{layer_name}.scales"].T if is_gptq else tensors[f"{layer_name}.weight_scale"]
        group = next(
            size for size in (32, 64, 128, weight.shape[1]) if -(-weight.shape[1] // size) == scale_NG.shape[1]
        )
        group_K = torch.arange(weight.shape[1]) // group
        group_K = next((tensors[f"{layer_name}.{n}"] for n in G_IDX if f"{layer_name}.{n}" in tensors), group_K)
        scale_NK = scale_NG.float()[:, group_K]
        level_NK = torch.round(weight / scale_NK)
        expected = in_hidden_order(model, layer_name, level_NK * scale_NK.bfloat16().float())
        assert_same(layer.dequantize(), expected)
        weight = in_hidden_order(model, layer_name, weight)
        assert ((layer.dequantize() - weight).abs() <= weight.abs() * 2**-8).all()


@pytest.mark.parametrize(
    ("name", "quantization"), [(name, None) for name in EXACT] + [("awq", "uint4"), ("gptq", "uint4")]
)
def test_levels_of_4_bits_with_zero_points_are_taken_over_exactly(tmp_path, name, quantization):
    reference = write_layout(name, tmp_path)
    model = load_model(tmp_path, device="cpu", quantization=quantization)
    assert formats_of(model) == ["uint4"]
    spans = EXACT.get(name, {128: 128, 256: 128})
    for layer_name, layer in layers_of(model).items():
        weight = reference.get_submodule(layer_name).weight
        layout = Layout.of(Packed(layer.weight_packed, layer.weight_scale))
        assert layout == Layout(spans[weight.shape[1]], has_zero=True)
        assert_same(layer.dequantize(), in_hidden_order(model, layer_name, weight))  # bit for bit


@pytest.mark.parametrize(("name", "quantization"), [(name, None) for name in FLOATS] + [("fp8", "fp8")])
def test_floats_are_taken_over_exactly(tmp_path, name, quantization):
    reference = write_layout(name, tmp_path, files=2)
    model = load_model(tmp_path, device="cpu", quantization=quantization)
    assert formats_of(model) == ["fp8"]
    assert isinstance(model.lm_head, nn.Linear) == (quantization is None)
    for layer_name, layer in layers_of(model).items():
        weight = reference.get_submodule(layer_name).weight
        N, K = weight.shape
        has_blocks = name.startswith("fp8") or "blocks" in name
        assert layer.format.has_blocks == has_blocks
        assert layer.weight_scale.shape == ((N // 16, -(-K // 128)) if has_blocks else (N,))
        assert_same(layer.dequantize(), weight)  # bit for bit


def floats_stored_as(strategy, N, K, seed):
    """A layer of all bytes, NaN included, with scales far apart: its format, tensors, and what they stand for."""
    rng = torch.Generator().manual_seed(seed)
    byte_NK = torch.randint(256, (N, K), dtype=torch.uint8, generator=rng)
    shape = {"tensor": (1,), "channel": (N, 1)}.get(strategy, (-(-N // 128), -(-K // 128)))
    scale = 2.0 ** torch.randint(-12, 12, shape, generator=rng) * 1.37
    scale_NK = scale if strategy == "tensor" else scale[torch.arange(N) // (1 if strategy == "channel" else 128)]
    if strategy in ("fp8", "block"):
        scale_NK = scale_NK[:, torch.arange(K) // 128]
    stored = PrequantizedFormat.from_dict(FP8 if strategy == "fp8" else compressed("float-quantized", strategy), "")
    end = "weight_scale_inv" if strategy == "fp8" else "weight_scale"
    tensors = {"weight": byte_NK.view(torch.float8_e4m3fn), end: scale}
    return stored, tensors, tensors["weight"].float() * scale_NK


@settings(max_examples=40)
@given(
    strategy=st.sampled_from(["fp8", "block", "channel", "tensor"]),
    blocks=st.integers(1, 20),
    groups=st.integers(1, 9),
    at_once=st.sampled_from([1, 3000, 2**18]),
    seed=st.integers(0, 99),
)
def test_floats_of_any_size_keep_all_of_their_bits(strategy, blocks, groups, at_once, seed):
    N, K = 16 * blocks, 32 * groups
    stored, tensors, expected = floats_stored_as(strategy, N, K, seed)
    layer, format = PrequantizedLayer(stored, (N, K), tensors), stored.as_format(FORMATS["fp8"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen3fast.quantization.formats.WEIGHTS_AT_ONCE", at_once)
        packed, plain = layer.packed(format), layer.plain(torch.float32)
    assert_same(bytes_of_rows(packed, torch.arange(N)), tensors["weight"].view(torch.uint8))
    for weight in (plain, format.dequantize(packed)):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any() or N * K < 4096


def test_layers_with_blocks_of_scales_are_stacked_whatever_rows_the_blocks_end_at():
    parts, expected = [], []
    for seed, rows in enumerate((208, 48, 48)):  # such as q_proj, k_proj and v_proj
        stored, tensors, weight = floats_stored_as("fp8", rows, 160, seed)
        format = stored.as_format(FORMATS["fp8"])
        parts.append(QuantizedLinear(PrequantizedLayer(stored, (rows, 160), tensors).packed(format), format))
        expected.append(weight)
    assert stacking.can_stack(parts)
    whole = stacking.stack(parts)
    weight = format.dequantize(Packed(whole["weight_packed"], whole["weight_scale"]))
    torch.testing.assert_close(weight, torch.cat(expected), rtol=0, atol=0, equal_nan=True)


def test_floats_become_plain_on_devices_without_kernels_for_them(tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_FORMATS, "fp8", replace(FORMATS["fp8"], devices=("cuda",)))
    reference = write_layout("fp8, cut blocks", tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert not formats_of(model)
    assert_same(model.get_submodule(UP).weight, reference.get_submodule(UP).weight.bfloat16())
    with pytest.raises(ValueError, match="quantization='fp8' runs on cuda devices, not on cpu"):
        load_model(tmp_path, device="cpu", quantization="fp8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_zero_points_are_rounded_to_float16_where_they_are_not(tmp_path, dtype):
    write_layout("awq", tmp_path)
    rewrite(tmp_path, lambda t: t.update({n: s.to(dtype) * 1.001 for n, s in t.items() if n.endswith("scales")}))
    model = load_model(tmp_path, device="cpu")
    plain = load_model(tmp_path, device="cpu", dtype="float32", quantization="dequantize")
    for layer_name, layer in layers_of(model).items():
        exact = plain.get_submodule(layer_name).weight
        assert ((layer.dequantize() - exact).abs() <= exact.abs() * 2**-11).all()
        assert dtype == torch.float32 or torch.equal(layer.dequantize(), exact)  # of usual size, they fit


def test_scales_beyond_float16_are_refused_by_name(tmp_path):
    write_layout("awq", tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].float() * 1e9}))
    with pytest.raises(
        ValueError, match=r"up_proj\.weight: scales beyond the range of float16; use quantization='int8'"
    ):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ROUNDED)
def test_other_levels_become_int8_within_half_a_step(tmp_path, name):
    reference = write_layout(name, tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert formats_of(model) == ["int8"]
    for layer_name, layer in layers_of(model).items():
        weight = reference.get_submodule(layer_name).weight
        if name in ("gptq, 8 bits, a group a row", "compressed, W8A8"):
            assert_same(layer.dequantize(), weight)  # our own format, so the same numbers
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((layer.dequantize() - weight).abs() <= step * 0.501).all()


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("fp8", "int4"),
        ("fp8", "int8"),
        ("awq", "fp8"),
        ("awq", "int8"),
        ("gptq", "int4"),
        ("gptq", "int8"),
        ("gptq, zero points, act order", "int4"),
    ],
)
def test_a_format_that_is_asked_for_rounds_the_dequantized_weights(tmp_path, name, format):
    write_layout(name, tmp_path)
    model = load_model(tmp_path, device="cpu", dtype="float32", quantization=format)
    plain = load_model(tmp_path, device="cpu", dtype="float32", quantization="dequantize")
    assert formats_of(model) == [format]
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    for layer_name, layer in {**layers_of(model), "lm_head": model.lm_head}.items():
        if (name, format) == ("gptq", "int4") and layer_name != "lm_head":
            continue  # taken over
        expected = FORMATS[format].quantize(plain.get_submodule(layer_name).weight)
        assert_same(layer.weight_packed, expected.weight)
        assert_same(layer.weight_scale, expected.scale)


@pytest.mark.parametrize(("name", "tied"), [("awq", True), ("gptq", False), ("fp8", True)])
def test_embedding_and_output_projection_stay_as_they_are(tmp_path, name, tied):
    config, quantization_config, _ = LAYOUTS[name]
    reference = write_prequantized(tmp_path, replace(config, tie_word_embeddings=tied), quantization_config)
    model = load_model(tmp_path, device="cpu")
    assert_same(model.model.embed_tokens.weight, reference.model.embed_tokens.weight.bfloat16())
    assert_same(model.lm_head.weight, reference.lm_head.weight.bfloat16())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert set(plain_modules(model)) == {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq, act order", "fp8", "compressed, fp8, rows"])
def test_layers_that_were_not_quantized_are_read_as_they_are(tmp_path, name):
    kept = ("lm_head", "o_proj", "layers.0.mlp.up_proj")
    reference = write_layout(name, tmp_path, kept=kept)
    model = load_model(tmp_path, device="cpu", dtype="float32")
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(plain) == 4 and all(n.endswith(kept) for n in plain)
    assert set(plain_modules(model)) == {*plain, "model.embed_tokens"}
    for layer_name in plain:
        expected = in_hidden_order(model, layer_name, reference.get_submodule(layer_name).weight)
        assert_same(model.get_submodule(layer_name).weight, expected)


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("awq", True),
        ("gptq", False),
        ("gptq, 8 bits", False),
        ("gptq, act order", True),
        ("fp8, cut blocks", True),
        ("compressed, fp8, tensors", False),
    ],
)
def test_logits_are_near_those_of_the_dequantized_model(tmp_path, name, bias, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)  # the plain form: no rounding of activations
    config, quantization_config, _ = LAYOUTS[name]
    config = replace(config, attention_bias=bias)
    reference = write_prequantized(tmp_path, config, quantization_config, files=2)
    model = load_model(tmp_path, device="cpu", dtype="float32")
    tokens = random_ids(2, 9, vocab_size=96)
    error = (model(tokens) - reference(tokens)).abs().max() / reference(tokens).abs().max()
    assert error < 1e-5 if name == "awq" or name in FLOATS else 0 < error < 0.02
    for layer_name, layer in layers_of(model).items():
        reference.get_submodule(layer_name).weight.copy_(layer.dequantize())
    assert_near(model(tokens), reference(tokens))


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("sizes", [{"hidden_size": 144}, {"intermediate_size": 168}])  # not a multiple of 32, of 16
def test_shapes_that_cannot_be_packed_become_plain(tmp_path, sizes, quantization):
    reference = write_prequantized(tmp_path, replace(CUT, **sizes), FP8)
    model = load_model(tmp_path, device="cpu", quantization=quantization)
    assert_same(model.model.layers[0].mlp.up_proj.weight, reference.model.layers[0].mlp.up_proj.weight.bfloat16())
    o_proj = model.model.layers[0].self_attn.o_proj  # 128 -> 144 or 160
    assert isinstance(o_proj, QuantizedLinear)
    assert formats_of(model) == [quantization or "fp8"]
    if quantization is None:
        assert_same(o_proj.dequantize(), reference.model.layers[0].self_attn.o_proj.weight)


# ------------------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("files", [1, 3])
def test_fp8_experts_are_dequantized(tmp_path, files):
    config = replace(MOE, hidden_size=160, moe_intermediate_size=160, dtype=torch.bfloat16)
    tensors, expected = write_fp8_experts(tmp_path, config, files)
    model = load_model(tmp_path, device="cpu", quantization="dequantize")
    for name, tensor in tensors_by_expert(model).items():
        assert_same(tensor, expected[name])
    quantized = load_model(tmp_path, device="cpu", quantization="int8").model.layers[1].mlp.experts
    assert isinstance(quantized, QuantizedExperts)
    exact = model.model.layers[1].mlp.experts.down_proj.float()
    assert (quantized.dequantize(quantized.down_proj) - exact).norm() < 0.01 * exact.norm()
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    write_tensors(tmp_path, config, FP8, tensors, files)
    with pytest.raises(ValueError, match=r"2\.up_proj\.weight_scale_inv: missing, expected shape \(2, 2\)") as error:
        load_model(tmp_path, device="cpu")
    assert str(error.value).count("missing") == 1


@pytest.mark.parametrize("kept", [(), ("down_proj",)])  # a stack that was not quantized
@pytest.mark.parametrize("quantization", [None, "fp8", "int8", "dequantize"])
def test_stacked_fp8_experts_are_taken_over(tmp_path, quantization, kept):
    # gate_proj and up_proj of an expert share a block of scales.
    config = replace(MOE, hidden_size=128, moe_intermediate_size=64, num_experts=3, dtype=torch.bfloat16)
    rng, tensors = np.random.default_rng(0), tensors_of(randomized(config))
    expected = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    for name in [name for name in tensors if ".experts." in name and not name.endswith(kept)]:
        layers = [fp8_layer(rng, *expert.shape) for expert in tensors[name]]
        tensors[name], tensors[f"{name}_scale_inv"] = (
            torch.stack([t[end] for t, _ in layers]) for end in ("weight", "weight_scale_inv")
        )
        expected[name] = torch.stack([weight for _, weight in layers]).float()
    tensors = {n: t if is_of_layer(n, t) or n.endswith("_inv") else t.bfloat16() for n, t in tensors.items()}
    write_tensors(tmp_path, config, FP8, tensors, files=2)
    model = load_model(tmp_path, device="cpu", quantization=quantization)
    for name in (name for name in expected if ".experts." in name):
        module, _, stack = name.rpartition(".")
        experts = model.get_submodule(module)
        if quantization == "dequantize":
            assert_same(getattr(experts, stack), expected[name].bfloat16())
            continue
        assert isinstance(experts, QuantizedExperts)
        actual = experts.dequantize(getattr(experts, stack))
        if quantization == "int8" or name.endswith(kept):
            assert_near_8_bits(actual, expected[name])
        else:
            assert_same(actual, expected[name])


def test_stacked_fp8_experts_that_do_not_fit_are_refused_by_name(tmp_path):
    config = replace(MOE, hidden_size=128, moe_intermediate_size=96, dtype=torch.bfloat16)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(randomized(config)).items()}
    stack = "model.layers.1.mlp.experts.gate_up_proj"  # 192 rows per expert: its last block has 64
    tensors |= {stack: tensors[stack].to(torch.float8_e4m3fn), f"{stack}_scale_inv": torch.ones(4, 2, 1)}
    write_tensors(tmp_path, config, FP8, tensors)
    with pytest.raises(ValueError, match=r"gate_up_proj in model\.safetensors: dtype F8_E4M3, expected one of"):
        load_model(tmp_path, device="cpu")
    config = replace(config, moe_intermediate_size=64)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(randomized(config)).items()}
    tensors[stack] = tensors[stack].to(torch.float8_e4m3fn)
    write_tensors(tmp_path, config, FP8, tensors)
    with pytest.raises(ValueError, match=r"gate_up_proj_scale_inv: missing, expected shape \(4, 1, 1\)"):
        load_model(tmp_path, device="cpu")


def write_experts(folder, quantization_config, kept=()):
    """A checkpoint whose experts are stored in a layout, except for `kept`. Returns: the dequantized tensors."""
    # A block of scales ends in the middle of an expert's rows: 128 of 160 for down_proj, none of 64 for the others.
    is_float = "float-quantized" in quantization_config.values() or quantization_config is FP8
    hidden_size = 160 if is_float else 128
    config = replace(MOE, hidden_size=hidden_size, moe_intermediate_size=64, dtype=torch.bfloat16)
    rng, tensors = np.random.default_rng(0), tensors_by_expert(randomized(config))
    expected = dict(tensors)
    for name in [name for name in tensors if ".experts." in name and name not in kept]:
        parts, expected[name] = drawn_layer(rng, *tensors.pop(name).shape, quantization_config)
        tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
    tensors = {n: t if is_of_layer(n, t) else t.bfloat16() for n, t in tensors.items()}
    write_tensors(folder, config, quantization_config, tensors, files=2)
    return expected


EXPERT_LAYOUTS = {
    "awq": {**AWQ, "group_size": 32},
    "gptq": {**GPTQ, "group_size": 32},
    "gptq, zero points": {**GPTQ, "sym": False, "group_size": 128},
    "gptq, 8 bits": {**GPTQ, "bits": 8, "group_size": 64},
    "gptq, act order": {**GPTQ, "desc_act": True, "group_size": 32},
    "gptq, zero points, act order": {**GPTQ, "sym": False, "desc_act": True, "group_size": 32},
    "compressed": compressed("pack-quantized", "group", 4, group_size=32),
    "compressed, act order": compressed("pack-quantized", "group", 4, group_size=32, actorder="group"),
    "fp8": FP8,
    "compressed, fp8": compressed("float-quantized", "channel"),
    "compressed, fp8, tensors": compressed("float-quantized", "tensor"),
    "compressed, fp8, blocks": compressed("float-quantized", "block"),
}


@pytest.mark.parametrize(
    ("name", "quantization", "format"),
    [
        ("awq", None, "uint4"),
        ("awq", "uint4", "uint4"),
        ("awq", "int8", "int8"),
        ("gptq", "uint4", "uint4"),
        ("gptq, zero points", None, "uint4"),
        ("awq", "int4", "int4"),
        ("gptq", None, "int4"),
        ("gptq, 8 bits", None, "int8"),
        ("gptq, act order", None, "int4"),
        ("gptq, act order", "int4", "int4"),
        ("gptq, act order", "uint4", "uint4"),
        ("gptq, act order", "int8", "int8"),
        ("gptq, zero points, act order", None, "uint4"),
        ("compressed", None, "int4"),
        ("compressed, act order", None, "int4"),
        ("fp8", None, "fp8"),
        ("fp8", "fp8", "fp8"),
        ("fp8", "dequantize", None),
        ("compressed, fp8", None, "fp8"),
        ("compressed, fp8", "int8", "int8"),
        ("compressed, fp8, tensors", None, "fp8"),
        ("compressed, fp8, blocks", None, "fp8"),
        ("gptq", "dequantize", None),
    ],
)
def test_experts_are_read_in_every_layout(tmp_path, name, quantization, format):
    kept = ("model.layers.1.mlp.experts.2.up_proj.weight",)  # one that was not quantized
    expected = write_experts(tmp_path, EXPERT_LAYOUTS[name], kept)
    model = load_model(tmp_path, device="cpu", quantization=quantization)
    orders = hidden_orders(tmp_path) if format in ("int4", "uint4") else {}
    assert bool(orders) == ("act order" in name and format != "int8")
    assert isinstance(model.model.layers[1].mlp.gate, nn.Linear)
    for layer, block in enumerate(model.model.layers):
        experts, stacks = block.mlp.experts, {}
        assert isinstance(experts, QuantizedExperts) == (format is not None)
        for stack in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, stack)
            stacks[stack] = weight.float() if format is None else experts.dequantize(weight)
        for expert in range(MOE.num_experts):
            gate, up = stacks["gate_up_proj"][expert].chunk(2)
            for projection, actual in (("gate", gate), ("up", up), ("down", stacks["down_proj"][expert])):
                weight_name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
                weight = expected[weight_name].float()
                if (order_F := orders.get(f"{layer}.{expert}")) is not None:  # hidden units are sorted
                    weight = weight[:, order_F] if projection == "down" else weight[order_F]
                if format is None:
                    assert_same(actual, weight.bfloat16().float())
                elif format == "int4" and weight_name not in kept and (quantization is None or "act order" in name):
                    assert ((actual - weight).abs() <= weight.abs() * 2**-8).all()  # the same levels
                elif format == "uint4":
                    assert_same(actual, weight) if weight_name not in kept else assert_near_4_bits(actual, weight)
                elif format == "fp8":
                    assert_same(actual, weight) if weight_name not in kept else assert_near_8_bits(actual, weight)
                else:
                    weight = weight.bfloat16().float() if weight_name in kept else weight
                    same = (actual == weight).all()  # levels of a row that are our own format's
                    assert same or torch.equal(actual, again(weight, format))


def hidden_orders(folder) -> dict[str, torch.Tensor]:
    """The order of down_proj's input channels in which their groups are neighbors, by "layer.expert"."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {
        f"{name.split('.')[2]}.{name.split('.')[5]}": group_F.argsort(stable=True)
        for name, group_F in tensors.items()
        if name.endswith(("down_proj.g_idx", "down_proj.weight_g_idx")) and (group_F.diff() < 0).any()
    }


def assert_near_4_bits(actual, weight):
    """Within the error of 4 bits: one that was not quantized is quantized in the layout of the others."""
    assert 0 < (actual - weight).norm() < 0.12 * weight.norm()


def assert_near_8_bits(actual, weight):
    """Within the error of e4m3."""
    assert 0 < (actual - weight).norm() < 0.04 * weight.norm()


def again(weight, format):
    """A weight quantized and dequantized."""
    packed = FORMATS[format].quantize(weight)
    return FORMATS[format].dequantize(packed)


def test_experts_of_a_layout_that_are_missing_are_named(tmp_path):
    write_experts(tmp_path, EXPERT_LAYOUTS["gptq"])
    gone = "model.layers.1.mlp.experts.2.up_proj.scales"
    file = next(file for file in tmp_path.glob("*.safetensors") if gone in load_file(file))
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    write_index_without(tmp_path, gone)
    with pytest.raises(ValueError, match=f"{gone}: missing, expected shape".replace(".", r"\.")) as error:
        load_model(tmp_path, device="cpu")
    assert str(error.value).count("missing") == 1


def write_index_without(folder, name: str) -> None:
    """Take a tensor out of the index."""
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    del index["weight_map"][name]
    file.write_text(json.dumps(index), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (FP8, {"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\] .*'fp8'; supported: \[128, 128\]"),
        (FP8, {"weight_block_size": None}, "weight_block_size=None is not supported"),
        (FP8, {"activation_scheme": "static"}, "activation_scheme='static' is not supported.*supported: 'dynamic'"),
        (FP8, {"fmt": "e5m2"}, "fmt='e5m2' is not supported.*supported: 'e4m3'"),
        (FP8, {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' is not supported"),
        (FP8, {"expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported"),
        (FP8, {"modules_to_convert": ["model.embed_tokens"]}, "modules_to_convert=.*embed_tokens.* is not supported"),
        (AWQ, {"bits": 8}, "bits=8 is not supported with quant_method='awq'; supported: 4"),
        (AWQ, {"group_size": 16}, "group_size=16 is not supported.*supported: 32, 64, 128"),
        (AWQ, {"group_size": -1}, "group_size=-1 is not supported"),
        (AWQ, {"zero_point": False}, "zero_point=False is not supported.*supported: True"),
        (AWQ, {"version": "gemv"}, "version='gemv' is not supported.*supported: 'gemm'"),
        (AWQ, {"version": "marlin"}, "version='marlin' is not supported"),
        (AWQ, {"version": None}, "version=None is not supported"),
        (GPTQ, {"bits": 3}, "bits=3 is not supported with quant_method='gptq'; supported: 4, 8"),
        (GPTQ, {"bits": 2}, "bits=2 is not supported"),
        (GPTQ, {"group_size": 256}, "group_size=256 is not supported.*supported: 32, 64, 128, -1"),
        (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported.*'gptq', 'gptq_v2'"),
        (GPTQ, {"sym": None}, "sym=None is not supported.*supported: True, False"),
        (GPTQ, {"desc_act": "yes"}, "desc_act='yes' is not supported"),
        (GPTQ, {"pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
        (GPTQ, {"dynamic": {"-:lm_head": {}, "+:.*down.*": {"bits": 8}}}, r"dynamic=\['\+:\.\*down\.\*'\] is not"),
        ({}, {"bits": 4}, "={'bits': 4} is not supported; supported: quant_method"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_before_any_weight_is(tmp_path, layout, changes, message):
    write_tensors(tmp_path, CONFIG, {**layout, **changes}, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config.*{message}"):
        load_model(tmp_path, device="cpu", quantization="dequantize")


W4 = compressed("pack-quantized", "group", 4, group_size=128)


def scheme_with(**changes) -> dict:
    """W4 with its one scheme changed."""
    return {"config_groups": {"group_0": {**W4["config_groups"]["group_0"], **changes}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized' is not supported; .*quantization='int4'"),
        ({"format": "mxfp4-pack-quantized"}, "format='mxfp4-pack-quantized' is not supported; .*quantization='int4'"),
        ({"format": "marlin-24"}, "format='marlin-24' is not supported; sparse weights"),
        ({"format": "new"}, "format='new' is not supported; supported: 'pack-quantized', 'int-q"),
        ({"format": ["x"]}, r"format=\['x'\] is not supported"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format='sparse-24-bitmask'"),
        ({"config_groups": {}}, "config_groups={} is not supported"),
        ({"config_groups": [1]}, r"config_groups=\[1\] is not supported"),
        (
            {"config_groups": {"a": W4["config_groups"]["group_0"], "b": {"weights": {"num_bits": 8}}}},
            r"several schemes \(a, b\) is not supported",
        ),
        (scheme_with(weights=None), "weights=None is not supported; weights must be"),
        (scheme_with(weights={"num_bits": 3}), "weights.num_bits=3 is not supported; supported: 4, 8"),
        (scheme_with(weights={"num_bits": 4, "type": "float"}), "weights.type='float' is not supported"),
        (scheme_with(weights={"num_bits": 4, "group_size": 16}), "weights.group_size=16 .* supported: 32, 64, 128"),
        (scheme_with(weights={"num_bits": 4, "strategy": "block"}), "weights.strategy='block' is not supported"),
        (scheme_with(weights={"num_bits": 4, "strategy": ["x"]}), r"weights.strategy=\['x'\] is not supported"),
        (scheme_with(weights={"num_bits": 4, "symmetric": 1, "group_size": 32}), "weights.symmetric=1 is not"),
    ],
)
def test_other_variants_of_compressed_tensors_are_refused_by_name(tmp_path, changes, message):
    write_tensors(tmp_path, CONFIG, {**W4, **changes}, {})
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config of compressed-tensors: {message}"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "mxfp4", "modelopt", "torchao", "quanto", "eetq"])
def test_other_methods_are_refused_saying_what_to_use(tmp_path, method):
    write_tensors(tmp_path, CONFIG, {"quant_method": method}, {})
    with pytest.raises(ValueError, match=rf"quant_method '{method}' is not supported; load the original weights with"):
        load_model(tmp_path, device="cpu")


def test_scales_of_activations_and_caches_are_not_used(tmp_path):
    reference = write_layout("compressed, fp8, tensors", tmp_path)
    attention = "model.layers.0.self_attn"
    more = {
        f"{UP}.input_scale": torch.ones(1),
        f"{attention}.k_scale": torch.ones(1),
        f"{attention}.v_scale": torch.ones(1),
    }
    rewrite(tmp_path, lambda tensors: tensors.update(more))
    model = load_model(tmp_path, device="cpu", dtype="float32")
    assert_same(model.get_submodule(UP).dequantize(), reference.get_submodule(UP).weight)


def test_rules_that_leave_layers_out_are_read(tmp_path):
    dynamic = {"-:.*o_proj": {}}
    reference = write_prequantized(tmp_path, CONFIG, {**GPTQ, "dynamic": dynamic}, kept=("lm_head", "o_proj"))
    model = load_model(tmp_path, device="cpu", dtype="float32")
    assert_same(model.model.layers[0].self_attn.o_proj.weight, reference.model.layers[0].self_attn.o_proj.weight)


def rewrite(folder, change) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "messages"),
    [
        (
            "fp8",
            lambda t: t.pop(f"{UP}.weight_scale_inv"),
            [r"weight_scale_inv: missing, expected shape \(2, 1\), F16 or"],
        ),
        ("fp8", lambda t: t.pop(f"{UP}.weight"), [r"up_proj\.weight: missing, expected shape \(256, 128\), F8_E4M3"]),
        (
            "fp8",
            lambda t: t.update({f"{UP}.weight_scale_inv": torch.ones(2, 2)}),
            [r"up_proj\.weight_scale_inv in model\.safetensors: shape \(2, 2\), expected \(2, 1\)"],
        ),
        (
            "fp8",
            lambda t: t.update({"model.norm.weight": torch.ones(128).to(torch.float8_e4m3fn)}),
            [r"model\.norm\.weight in model\.safetensors: dtype F8_E4M3, expected one of F64, F32, F16, BF16"],
        ),
        (
            "fp8",
            lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(1, 1)}),  # of a plain weight
            [r"lm_head\.weight: missing, expected shape \(96, 128\), F8_E4M3"],
        ),
        ("awq", lambda t: t.pop(f"{UP}.qzeros"), [r"up_proj\.qzeros: missing, expected shape \(1, 32\), I32"]),
        (
            "awq",
            lambda t: [t.pop(f"{UP}.{end}") for end in ("qweight", "qzeros", "scales")],
            [r"up_proj\.weight: missing, expected shape \(256, 128\)"],
        ),
        (
            "awq",
            lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()}),
            [r"up_proj\.scales in model\.safetensors: dtype I32, expected F16 or BF16"],
        ),
        (
            "gptq",
            lambda t: (
                t.pop(f"{UP}.scales"),
                t.update({"surplus": torch.ones(1), f"{UP}.qzeros": torch.ones(2).int()}),
            ),
            [
                r"surplus in model\.safetensors: unexpected",
                r"up_proj\.qzeros in model\.safetensors: shape \(2,\), expected \(1, 32\)",
                r"up_proj\.scales: missing, expected shape \(1, 256\)",
            ],
        ),
        ("gptq, act order", lambda t: t.pop(f"{UP}.g_idx"), [r"up_proj\.g_idx: missing, expected shape \(128,\), I32"]),
        (
            "gptq, act order",
            lambda t: t[f"{UP}.g_idx"].add_(1),
            [r"up_proj\.weight: g_idx must be from 0 to 3, got 1 to 4"],
        ),
        (
            "gptq",
            lambda t: t.update({f"{UP}.weight": torch.ones(256, 128), f"{UP}.qweight": t[f"{UP}.qweight"]}),
            [r"up_proj\.\w+ in model\.safetensors: .* was loaded already"],
        ),
        (
            "gptq",
            lambda t: t[f"{UP}.qzeros"].add_(0x11111111),
            ["up_proj.weight: zero points other than 8, though 'sym' is true; use quantization='int8' or 'dequantize'"],
        ),
        (
            "gptq without g_idx",
            lambda t: t.update({f"{UP}.g_idx": torch.arange(128).int() % 2}),
            ["up_proj.weight: g_idx mixes channels, though 'desc_act' is false; use quantization='int8'"],
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_message(tmp_path, name, change, messages):
    write_layout(name, tmp_path)
    rewrite(tmp_path, change)
    for message in messages:
        with pytest.raises(ValueError, match=message) as error:
            load_model(tmp_path, device="cpu")
    assert len(str(error.value).splitlines()) == 1 + len(messages)


def test_tensors_of_a_layout_that_the_config_does_not_name_are_refused(tmp_path):
    write_prequantized(tmp_path, CONFIG, GPTQ)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"down_proj\.qweight in model\.safetensors: unexpected"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("source", ["tiny", "ours"])
def test_dequantize_is_for_checkpoints_of_others(tmp_path, source):
    write_layout("gptq", tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs", device="cpu"), tmp_path / "ours")
    with pytest.raises(
        ValueError, match="quantization='dequantize' is for checkpoints that other software quantized; use None"
    ):
        load_model("tiny" if source == "tiny" else tmp_path / "ours", device="cpu", quantization="dequantize")


# ---------------------------------------------------------------------------------------------------- config and info


@pytest.mark.parametrize("name", LAYOUTS)
def test_config_reads_the_prequantized_format(name):
    config, quantization_config, _ = LAYOUTS[name]
    read = CheckpointConfig.from_dict(
        {**CheckpointConfig(config).to_dict(), "quantization_config": quantization_config}
    )
    assert read.prequantized == PrequantizedFormat.from_dict(quantization_config, "")
    assert read.quantization is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp8", ["bytes in fp8, bfloat16", "fp8, one scale per 128 x 128 weights"]),
        ("gptq, act order", ["bytes in int4", "gptq, 4 bits, a scale per 32 channels, channels out of order"]),
        ("compressed, fp8, rows", ["bytes in fp8, bfloat16", "compressed-tensors, fp8, one scale per row"]),
        ("awq", ["bytes in uint4", "awq, 4 bits, a scale and a zero point per 128 channels"]),
        ("gptq", ["bytes in int4", "gptq, 4 bits, a scale per 128 channels"]),
        ("gptq, a group a row", ["bytes in int4", "gptq, 4 bits, a scale per row"]),
    ],
)
def test_info_states_what_is_loaded_and_how_it_is_stored(tmp_path, capsys, name, expected):
    write_layout(name, tmp_path)
    for quantization, bytes_in in ((None, expected[0]), ("int8", "bytes in int8"), ("uint4", "bytes in uint4")):
        options = [] if quantization is None else ["--quantization", quantization]
        assert main(["info", "--model", str(tmp_path), *options]) == 0
        text = capsys.readouterr().out
        model = load_model(tmp_path, device="cpu", quantization=quantization)
        for part in [f"{model.num_bytes():,} {bytes_in}", expected[1]]:
            assert part in text
