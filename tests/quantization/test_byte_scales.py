"""Scales of int4 in bytes: the same numbers as in bfloat16, and the same bits of every result."""

from __future__ import annotations

import time

import pytest
import torch
from conftest import assert_same, random_ids, random_tensor, randomized, small_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.ops import dequantized_linear, pack_scales
from qwen3fast.kernels.cpu.structures import bfloat16_scales, packed_linear
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS, Packed, quantize
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear, fit_scales

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")

INT4 = FORMATS["int4"]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def weight_in_both(N: int, K: int, seed: int = 0) -> tuple[Packed, Packed]:
    """Return a weight with scales in bfloat16, and with the same in bytes."""
    packed = quantize(random_tensor(N, K, seed=seed).bfloat16(), INT4)
    return packed, packed._replace(scale=pack_scales(packed.scale))


def quantized_model(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 96, "dtype": torch.bfloat16}
    model = randomized(small_config(**(sizes | changes)), seed=3).bfloat16()
    quantize_model(model, "int4", torch.bfloat16)
    return model


def scales_of(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight_scale for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]


@given(
    blocks=st.integers(1, 3), groups=st.integers(1, 40), exponent=st.integers(-90, 100), spread=st.integers(0, 15),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_scales_come_back_as_they_were(blocks, groups, exponent, spread, seed):
    random = torch.Generator().manual_seed(seed)
    shape = (blocks, groups, 16)
    fraction = 1 + torch.randint(8, shape, generator=random) / 8
    power = exponent - torch.randint(spread + 1, shape, generator=random)
    sign = 1 - 2.0 * torch.randint(2, shape, generator=random)
    scale = (sign * torch.ldexp(fraction, power)).bfloat16()
    scale[0, :, 3] = 0
    scale[0, :, 4] = -0.0
    in_bytes = pack_scales(scale)
    assert in_bytes is not None and in_bytes.shape == (blocks, 1 + groups, 16)
    assert torch.equal(bfloat16_scales(in_bytes).view(torch.int16), scale.view(torch.int16))
    assert torch.equal(bfloat16_scales(in_bytes[:, :, 5]), scale[:, :, 5])  # of rows
    assert bfloat16_scales(scale) is scale


@pytest.mark.parametrize(
    "number", [1.0625, 2.0**-16, 0.0, torch.nan, torch.inf, 2.0**16, 2.0**-130],
    ids=["fraction", "too small", "zero", "nan", "infinity", "too large", "denormal"],
)  # fmt: skip
def test_other_numbers_stay_in_bfloat16(number):
    scale = torch.ones(3, 40, 16).bfloat16()
    assert pack_scales(scale) is not None
    scale[2, 39, 15] = number
    assert pack_scales(scale) is None


def test_a_row_of_small_numbers_stays_in_bfloat16():
    assert pack_scales(torch.full((1, 4, 16), 2.0**-112).bfloat16()) is None  # 2^-15 of it would be a denormal number
    assert pack_scales(torch.full((1, 4, 16), 2.0**-111).bfloat16()) is not None


@pytest.mark.parametrize("scale", [torch.ones(2, 3, 16), torch.ones(2, 16, 3).bfloat16().transpose(1, 2)])
def test_what_is_not_scales_of_int4_is_refused(scale):
    with pytest.raises(ValueError, match=r"pack_scales: scale must be \(\d+, \d+, 16\) bfloat16, contiguous"):
        pack_scales(scale)


@pytest.mark.parametrize("groups_of_zeros", [0, 3])
@pytest.mark.parametrize("exponent", [-60, -7, 0, 60])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_that_is_quantized_to_int4_has_such_scales(dtype, exponent, groups_of_zeros):
    """In the C++ and in the plain form: rows of zeros, groups of zeros, and groups far below the row's largest."""
    weight = torch.ldexp(random_tensor(64, 320), torch.tensor(exponent))
    weight[:, : 32 * groups_of_zeros] = 0
    weight[5], weight[7, 64:96] = 0, weight[7, 64:96] * 2.0**-30
    weight[9, 100] *= 2.0**12
    packed = quantize(weight.to(dtype), INT4)
    assert pack_scales(packed.scale) is not None
    error = INT4.dequantize(packed) - weight
    assert (error[[5, 7]].norm() <= 0.1 * weight[[5, 7]].norm()).all()
    assert not error[:, : 32 * groups_of_zeros].any() and not error[5].any()


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 33, 40, 70])
@pytest.mark.parametrize(("N", "K"), [(16, 32), (48, 160), (272, 1024)])
def test_products_have_the_same_bits(rows, N, K):
    plain, in_bytes = weight_in_both(N, K)
    x = random_tensor(rows, K, seed=1).bfloat16()
    for run in (
        lambda w: torch.ops.qwen3fast.quantized_linear(x, [w.weight], [w.scale]),
        lambda w: tiles.tile_linear(x, [packed_linear(*w)]),
        lambda w: dequantized_linear(x, *w),
        lambda w: torch.ops.qwen3fast.quantized_rows(*w, torch.tensor([N - 1, 0, 5, 5])),
        INT4.dequantize,
        lambda w: torch.cat(INT4.steps(w)),
    ):
        assert torch.equal(run(in_bytes), run(plain))


def test_weights_with_either_kind_of_scales_go_in_one_call():
    weights = [weight_in_both(N, 96, seed=N)[i] for i, N in enumerate((48, 32))]
    x = random_tensor(3, 96).bfloat16()
    together = torch.ops.qwen3fast.quantized_linear(x, [w.weight for w in weights], [w.scale for w in weights])
    alone = [torch.ops.qwen3fast.quantized_linear(x, [w.weight], [w.scale]) for w in weights]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_experts_have_the_same_bits(tokens):
    gate_up, down = weight_in_both(5 * 64, 64, seed=1), weight_in_both(5 * 64, 32, seed=2)
    x_NE, expert_NC = random_tensor(tokens, 64).bfloat16(), random_ids(tokens, 2, vocab_size=5)
    first, second = (
        torch.ops.qwen3fast.quantized_experts(x_NE, expert_NC, list(gate_up[i]), list(down[i])) for i in (0, 1)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}])
def test_engines_use_them_and_files_do_not(tied, experts, tmp_path, monkeypatch):
    model = quantized_model(tie_word_embeddings=tied, **experts)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with monkeypatch.context() as without:
        without.setattr("qwen3fast.engine.parts.fit_scales", lambda model: False)
        with Generator(model, max_seq_len=64, compile="auto") as generator:
            expected = generator.generate([[1, 2, 3], [4] * 30], GREEDY)
    assert {scale.dtype for scale in scales_of(model)} == {torch.bfloat16}
    for mode in ("auto", False):
        with Generator(model, max_seq_len=64, compile=mode) as generator:
            assert {scale.dtype for scale in scales_of(model)} == {torch.int8}
            if mode:
                results = generator.generate([[1, 2, 3], [4] * 30], GREEDY)
                assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert not tied or model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    save_model(model, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert_same(load_model(tmp_path / "saved", device="cpu").lm_head.dequantize(), model.lm_head.dequantize())


@pytest.mark.parametrize("by", ["warmup", "thread"])
def test_auto_stores_them_when_the_operations_are_loaded(by, monkeypatch):
    model = quantized_model()
    with Generator(quantized_model(), max_seq_len=64, compile=True) as generator:
        expected = generator.generate([1, 2, 3], GREEDY).token_ids
    with monkeypatch.context() as not_built:
        not_built.setattr(cpu, "_is_ready", False)
        generator = Generator(model, max_seq_len=64, compile="auto")
        assert {scale.dtype for scale in scales_of(model)} == {torch.bfloat16}
        layers = generator.debug.engine.parts.decode_layers
        old = layers._run
    with generator:
        if by == "warmup":
            generator.warmup()
        else:
            generator.debug.engine.compiler.auto_from_s = 0
            ends = time.monotonic() + 60
            while layers._run is old and time.monotonic() < ends:
                assert generator.generate([1, 2, 3], GREEDY).token_ids == expected
        assert {scale.dtype for scale in scales_of(model)} == {torch.int8} and layers._run is not old
        assert generator.generate([1, 2, 3], GREEDY).token_ids == expected


def test_other_devices_and_missing_operations_have_bfloat16(monkeypatch):
    model = quantized_model()
    before = [scale.clone() for scale in scales_of(model)]
    assert fit_scales(model) and not fit_scales(model)
    assert {scale.dtype for scale in scales_of(model)} == {torch.int8}
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    assert fit_scales(model) and not fit_scales(model)
    for scale, expected in zip(scales_of(model), before, strict=True):
        assert torch.equal(scale, expected)
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    assert not fit_scales(model)
