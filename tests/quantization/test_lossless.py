"""lossless: bfloat16 in 12 bits. All bits come back, and every product and step has the bits of the plain weights'."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_same, random_tensor, randomized, small_config

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint import empty, loaders
from qwen3fast.checkpoint.save import save_model
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.state import DecodeState
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.lossless import pack_lossless, packed_shape
from qwen3fast.kernels.cpu.ops import dequantized_linear
from qwen3fast.kernels.cpu.structures import CODED, RECORD, LinearPointers, Tiles, packed_linear
from qwen3fast.model import rope_tables
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.convert import formats_of, prepare_quantization, quantize_model
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import ALL_FORMATS, Packed, quantize
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.quantization.lossless import rows_lossless

FORMAT = ALL_FORMATS["lossless"]
SHAPES = [(16, 64), (48, 192), (32, 128), (304, 1024)]
in_cpp = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")


def weight_with_exceptions(N, K):
    """Numbers of which each row has some outside of the window, at its ends and beside each other."""
    weight_NK = (0.02 * random_tensor(N, K)).bfloat16()
    for n, k in itertools.product(range(N), (0, 5, 6, 63, K - 1)):
        weight_NK[n, (k + n * (k == 5)) % K] = 10.0 ** (n % 9 - 4 - 20 * (k % 2))
    weight_NK[3] = 0
    return weight_NK


def pack_plainly(weight_NK):
    """The reference packer: a weight in bfloat16, (N, K), as the bytes that lossless.h describes."""
    N, K = weight_NK.shape
    coded = K // CODED * CODED
    bits_NK = weight_NK[:, :coded].view(torch.int16).int() & 0xFFFF
    exponent_NK = bits_NK >> 7 & 0xFF
    base_N = bases(exponent_NK)
    code_NK = torch.where(exponent_NK == 0, 0, exponent_NK - base_N[:, None])
    is_exception_NK = (code_NK < 0) | (code_NK > 15) | ((code_NK == 0) & (exponent_NK != 0))
    code_NK = code_NK.masked_fill(is_exception_NK, 0)
    twelve_NK = code_NK | bits_NK >> 15 << 4 | (bits_NK & 0x7F) << 5
    three, last = twelve_NK.view(N, -1, 4, CODED // 4).split([3, 1], dim=2)
    shift = torch.tensor([0, 4, 8], device=weight_NK.device)[:, None]
    words_NW = (three | (last >> shift & 15) << 12).flatten(1)
    words_NW = torch.cat([int16(words_NW), weight_NK[:, coded:].view(torch.int16)], dim=1)

    row, channel = is_exception_NK.nonzero().unbind(1)
    count_N = is_exception_NK.sum(dim=1)
    first_N = torch.arange(N, 0, -1, device=weight_NK.device) * (RECORD // 4) + count_N.cumsum(0) - count_N
    records_N4 = torch.cat(
        [first_N.int()[:, None].view(torch.int16), int16(torch.stack([count_N, base_N << 7], dim=1))], dim=1
    )
    exceptions = torch.stack([int16(channel), int16(bits_NK[row, channel])], dim=1)
    scale = torch.cat([records_N4.flatten(), exceptions.flatten()]).view(torch.uint8)
    return Packed(words_NW.contiguous().view(torch.uint8).view(packed_shape(N, K)), scale)


def bases(exponent_NK):
    """The exponent before the window that most numbers of each row are in, (N,); of equal ones the first."""
    count_N256 = torch.zeros(len(exponent_NK), 256, dtype=torch.int64, device=exponent_NK.device)
    count_N256.scatter_add_(1, exponent_NK.long(), torch.ones_like(exponent_NK, dtype=torch.int64))
    total_N257 = F.pad(count_N256.cumsum(1), (1, 0))
    inside = total_N257[:, 16:] - total_N257[:, 1:242]  # of exponents base + 1 to base + 15
    most = inside.amax(dim=1, keepdim=True)
    return (inside == most).int().argmax(dim=1)


def int16(number):
    """Numbers from 0 to 65535 as the 16 bits that they have."""
    return torch.where(number < 2**15, number, number - 2**16).to(torch.int16)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_same(actual.view(torch.int16), expected.view(torch.int16))  # NaN and -0 count


@in_cpp
def test_both_packers_keep_every_number():
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for weight_NK in (every.view(64, 1024), every[torch.randperm(2**16)].view(1024, 64), every.view(512, 128).roll(7)):
        weight_NK = weight_NK.view(torch.bfloat16)
        packed = Packed(*pack_lossless(weight_NK))
        assert_same(list(packed), list(pack_plainly(weight_NK)))
        row_N = torch.arange(len(weight_NK))
        assert_same_bits(torch.ops.qwen3fast.quantized_rows(*packed, row_N), weight_NK)
        assert_same(rows_lossless(packed, row_N).view(torch.int32), weight_NK.float().view(torch.int32))


@in_cpp
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_both_packers_write_the_same_bytes(N, K):
    for weight_NK in (weight_with_exceptions(N, K), torch.zeros(N, K).bfloat16(), random_tensor(N, K).bfloat16()):
        assert_same(pack_lossless(weight_NK), tuple(pack_plainly(weight_NK)))


@in_cpp
def test_rows_come_in_any_order():
    weight_NK = weight_with_exceptions(48, 192)
    for rows in ([7, 0, 47, 7, 3], []):
        row_R = torch.tensor(rows, dtype=torch.int64)
        assert_same(rows_lossless(quantize(weight_NK, FORMAT), row_R), weight_NK[row_R].float())


@in_cpp
def test_usual_weights_take_12_bits():
    packed = quantize((0.02 * random_tensor(64, 4096)).bfloat16(), FORMAT)
    assert packed.weight.nbytes == 64 * 4096 * 12 / 8
    assert packed.scale.nbytes < 64 * 4096 / 100


@in_cpp
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 33, 64])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_products_have_the_bits_of_the_plain_weight_s(rows, N, K, monkeypatch):
    weight_NK, x = weight_with_exceptions(N, K).clamp(-9, 9), random_tensor(rows, K, seed=1).bfloat16()
    packed = quantize(weight_NK, FORMAT)
    operation = torch.ops.qwen3fast.quantized_linear
    assert_same_bits(operation(x, [packed.weight], [packed.scale]), torch.ops.qwen3fast.linear(x, weight_NK))
    plain = LinearPointers(weight_NK.data_ptr(), None, N, K, 16)
    assert_same_bits(tiles.tile_linear(x, [packed_linear(*packed)]), tiles.tile_linear(x, [plain]))
    assert_same_bits(dequantized_linear(x, *packed), F.linear(x, weight_NK))
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    assert_same_bits(QuantizedLinear(packed, FORMAT)(x), F.linear(x, weight_NK))


@in_cpp
def test_weights_side_by_side():
    """Of one call: lossless ones of different sizes, and one in int8 beside them."""
    weights = [weight_with_exceptions(N, 192).clamp(-9, 9) for N in (48, 16)]
    others = [ALL_FORMATS["int8"].operands(quantize(random_tensor(32, 192), ALL_FORMATS["int8"]))]
    packed = [*(quantize(w, FORMAT) for w in weights), *others]
    for rows in (1, 5, 20):
        x = random_tensor(rows, 192).bfloat16()
        together = torch.ops.qwen3fast.quantized_linear(x, [p.weight for p in packed], [p.scale for p in packed])
        alone = [torch.ops.qwen3fast.quantized_linear(x, [p.weight], [p.scale]) for p in packed]
        if rows < 8:
            assert_same_bits(together, torch.cat(alone, dim=1))
        assert_near(together, torch.cat(alone, dim=1).float(), torch.bfloat16)
        for order in (packed, packed[::-1]):
            by_tiles = tiles.tile_linear(x, [packed_linear(*p) for p in order])
            apart = [tiles.tile_linear(x, [packed_linear(*p)]) for p in order]
            assert_same_bits(by_tiles, torch.cat(apart, dim=1))
            assert_near(by_tiles, torch.cat(alone if order is packed else alone[::-1], dim=1).float(), torch.bfloat16)


def models(**changes):
    """The same weights, plain and packed; and sizes of which some end with half a group of channels."""
    sizes = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 64, "vocab_size": 208, "dtype": torch.bfloat16}
    plain = randomized(small_config(**sizes | changes)).bfloat16()
    packed = copy.deepcopy(plain)
    quantize_model(packed, "lossless", torch.bfloat16)
    assert formats_of(packed) == ["lossless"] and formats_of(plain) == []
    return plain, packed


def filled_cache(config, rows, dtype):
    cache = StaticKVCache(config, rows, 100, dtype, torch.device("cpu"))
    for seed, tensor in enumerate(cache.tensors()):
        tensor.copy_((0.02 if tensor.dtype == torch.float32 else 1) * random_tensor(*tensor.shape, seed=seed))
    return cache


@in_cpp
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 19])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_decode_steps_have_the_bits_of_the_plain_model_s(rows, cache_dtype, is_tied):
    config = (pair := models(tie_word_embeddings=is_tied))[0].config
    tables = rope_tables(config.head_dim, 1e4, 100, torch.device("cpu"))
    results = []
    for model in pair:
        cache, state = filled_cache(config, rows, cache_dtype), DecodeState.allocate(rows, torch.device("cpu"))
        state.input_R.copy_(torch.arange(rows) * 11)
        state.position_R.copy_(torch.arange(rows) * 5)
        layers = DecodeLayers(model, cache)
        assert layers.serves(rows) and layers.runs_steps
        results.append([layers.logits(state, rows, *tables), *cache.tensors()])
    assert_same(*results)


@in_cpp
@pytest.mark.parametrize("kind", [Tiles.NONE, Tiles.BFLOAT16])
def test_chunks_have_the_bits_of_the_plain_model_s(kind):
    config = (pair := models())[0].config
    tables = rope_tables(config.head_dim, 1e4, 100, torch.device("cpu"))
    x_BTE, position_BT = random_tensor(2, 33, 192).bfloat16(), torch.arange(33) + torch.tensor([[0], [40]])
    results = []
    for model in pair:
        cache = filled_cache(config, 2, torch.bfloat16)
        layers = DecodeLayers(model, cache)
        results.append(
            [layers.prefill(x_BTE, *tables, position_BT, torch.tensor([1, 0]), tiles=kind), *cache.tensors()]
        )
    assert_same(*results)


@in_cpp
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_equal_the_plain_ones(tokens):
    experts = models(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)[0].model.layers[0].mlp.experts
    packed = QuantizedExperts.of(experts, FORMAT)
    x_NE, expert_NC = random_tensor(tokens, 192).bfloat16(), torch.arange(2 * tokens).view(tokens, 2) % 4
    assert_near(packed.gathered(x_NE, expert_NC), experts.gathered(x_NE, expert_NC).float(), torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(packed.dequantize(packed.down_proj, dtype), experts.down_proj.to(dtype))


@in_cpp
def test_tiny_replies_with_the_same_tokens_and_logprobs():
    replies, sizes = [], []
    sampling = SamplingParams(max_tokens=20, logprobs=3, temperature=0.8, seed=3, ignore_eos=True)
    for quantization in (None, "lossless"):
        options = {"quantization": quantization, "max_batch_size": 3, "compile": True}
        with Generator.from_pretrained("tiny", **options) as generator:
            results = generator.generate(["12 + 30 =", "The capital of France", "a"], sampling)
            replies.append([(r.token_ids, r.logprobs) for r in results])
            sizes.append(generator.model.num_bytes())
    assert replies[0] == replies[1]
    assert 0.7 < sizes[1] / sizes[0] < 0.85  # some channels of tiny's sizes are left over, which are stored as they are


@in_cpp
def test_layers_whose_channels_do_not_fit_stay_plain():
    model = randomized(small_config(hidden_size=64, intermediate_size=96, dtype=torch.bfloat16)).bfloat16()
    quantize_model(model, "lossless", torch.bfloat16)
    block = model.model.layers[0].mlp
    assert isinstance(block.gate_proj, QuantizedLinear) and not isinstance(block.down_proj, QuantizedLinear)
    assert FORMAT.fits(16, 2**16 - 64) and not FORMAT.fits(16, 2**16)


def test_without_the_operations_it_is_refused(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: False)
    with pytest.raises(ValueError, match=r"'lossless' needs the C\+\+ operations: install"):
        load_model("tiny", quantization="lossless")
    prepare_quantization("int8", torch.device("cpu"))


@in_cpp
def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"packs bfloat16 weights, got torch\.float32; add dtype='bfloat16'"):
        load_model("tiny", dtype="float32", quantization="lossless")
    with pytest.raises(ValueError, match="lossless weights are not saved"):
        save_model(load_model("tiny", quantization="lossless"), tmp_path / "saved")
    save_model(load_model("tiny", quantization="int8"), tmp_path / "int8")
    with pytest.raises(ValueError, match="is in int8 already; lossless needs the original weights"):
        load_model(tmp_path / "int8", quantization="lossless")


def test_gguf_files_are_refused(tmp_path, monkeypatch):
    for module in (loaders, empty):
        monkeypatch.setattr(module, "read_header", lambda file: None)
        monkeypatch.setattr(module, "config_of", lambda header: small_config())
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for load in (load_model, empty.empty_model):  # the latter as `info` calls it
        with pytest.raises(ValueError, match="is a GGUF file or quantized; use None"):
            load(file, quantization="lossless")


@in_cpp
@pytest.mark.parametrize("change", ["short", "odd", "groups"])
def test_tensors_that_are_no_lossless_weight_are_refused(change):
    weight, scale = quantize(random_tensor(32, 192).bfloat16(), FORMAT)
    broken = {
        "short": (weight, scale[:200]),
        "odd": (weight, scale[:-1]),
        "groups": (weight[:, 1:].contiguous(), scale),
    }
    with pytest.raises(ValueError, match="lossless weights must have rows of whole groups"):
        torch.ops.qwen3fast.quantized_rows(*broken[change], torch.tensor([0]))
    with pytest.raises(ValueError, match="N a multiple of 16, K of 64"):
        pack_lossless(torch.zeros(16, 96).bfloat16())
