"""Whole decode steps in C++ against their blocks, the model's output projection and the samplers."""

import copy
import math
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import assert_near, assert_same, engine_of, random_tensor, randomized, small_config
from torch import nn

from qwen3fast import Generator, SamplingParams
from qwen3fast.engine import StepKind
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.state import DecodeState
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.decode_layers import MAX_DECODE_ROWS, LayerWeight
from qwen3fast.kernels.cpu.decode_step import DecodeStepCall, EndTensors, StepTensors
from qwen3fast.kernels.cpu.structures import NotServedError, Tiles
from qwen3fast.model import rope_tables
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.quantization.layers import QuantizedEmbedding
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

CPU = torch.device("cpu")
FORMATS_OF_STEPS = [None, "int8", "int4", "uint4", "fp8", pytest.param(FORMATS["fp8"].with_blocks(), id="fp8 blocks")]
VOCABULARY = 208  # 13 blocks of 16: threads get shares of different sizes
PLACES = (0, 70, 99, 5, 64, -1, 1, 17, 3)

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def step_case(format=None, rows=3, cache_dtype=torch.bfloat16, **changes):
    """A model, a cache full of numbers, and the buffers of a step at various positions, one row of them empty."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": VOCABULARY}
    config = small_config(**sizes | {"dtype": torch.bfloat16} | changes)
    model = randomized(config).bfloat16()
    if format is not None:
        quantize_model(model, format, torch.bfloat16)
    cache = StaticKVCache(config, rows + 1, 100, cache_dtype, CPU)
    sizes_of = {torch.int8: 100.0, torch.float32: 0.02, torch.bfloat16: 1.0}  # float32: scales of int8
    for seed, tensor in enumerate(cache.tensors()):
        tensor.copy_(sizes_of[tensor.dtype] * random_tensor(*tensor.shape, seed=seed).clamp(-1, 1))
    state = DecodeState.allocate(rows + 1, CPU)
    state.input_R.random_(VOCABULARY, generator=torch.Generator().manual_seed(1))
    state.position_R[:rows] = torch.tensor([PLACES[row % len(PLACES)] for row in range(rows)])
    state.advance_R.copy_((state.position_R >= 0).long())
    state.step_R.fill_(7)
    state.temperature_R[::2] = 12.0
    state.top_p_R.fill_(0.98)
    state.seed_R.copy_(torch.arange(rows + 1))
    tables = rope_tables(config.head_dim, 1e4, cache.allocated_len, CPU)
    return model, cache, state, tables


def logits_of(model, cache, state, tables, rows, kind=Tiles.NONE):
    layers = DecodeLayers(model, copy.deepcopy(cache))
    assert layers.serves(rows) and layers.runs_steps
    return layers.logits(copy.deepcopy(state), rows, *tables, kind)


@pytest.mark.parametrize("format", FORMATS_OF_STEPS)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 17, MAX_DECODE_ROWS])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_logits_of_a_step_equal_its_blocks_and_the_output_projection(format, rows, is_tied):
    model, cache, state, tables = step_case(format, rows, tie_word_embeddings=is_tied)
    other = copy.deepcopy(cache)
    x_B1E = DecodeLayers(model, other)(model.embed(state.input_R[:rows, None]), *tables, state.position_R[:rows, None])
    before = copy.deepcopy(state)
    logits_BV = DecodeLayers(model, cache).logits(state, rows, *tables)
    assert_same(list(vars(state).values()), list(vars(before).values()))
    assert_same(cache.tensors(), other.tensors())
    assert logits_BV.shape == (rows, VOCABULARY) and logits_BV.dtype == torch.float32
    assert_same(logits_BV, logits_BV.bfloat16().float())  # rounded where the plain output projection rounds
    assert_near(logits_BV, model.logits(x_B1E)[:, 0], torch.bfloat16)


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("format", "changes"), [("int4", EXPERTS), (None, {"cache_dtype": torch.int8})], ids=["experts", "int8 cache"]
)
def test_steps_with_other_blocks_and_caches(format, changes):
    model, cache, state, tables = step_case(format, 5, **changes)
    other = copy.deepcopy(cache)
    x_B1E = DecodeLayers(model, other)(model.embed(state.input_R[:5, None]), *tables, state.position_R[:5, None])
    logits_BV, before = logits_of(model, cache, state, tables, 5), copy.deepcopy(state)
    assert_near(logits_BV, model.logits(x_B1E)[:, 0], torch.bfloat16)
    DecodeLayers(model, cache).choose(state, 5, *tables, is_greedy=False)
    assert_same(state.output_R[:5], sample(logits_BV, before.sampler_rows(slice(5)), SamplerKind.FULL))
    assert_same(cache.tensors(), other.tensors())


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 15, 16, 17, 31, MAX_DECODE_ROWS])
def test_steps_by_tiles_give_the_same_numbers_up_to_rounding(rows, threads):
    model, cache, state, tables = step_case(
        None, rows, intermediate_size=176
    )  # down: 11 steps of 16 channels, no tiles
    plain, by_tiles = copy.deepcopy(cache), copy.deepcopy(cache)
    x_B1E, position_B1 = model.embed(state.input_R[:rows, None]), state.position_R[:rows, None]
    expected_B1E = DecodeLayers(model, plain)(x_B1E, *tables, position_B1)
    layers = DecodeLayers(model, by_tiles)
    actual_B1E = layers(x_B1E, *tables, position_B1, Tiles.BFLOAT16)
    logits_BV = layers.logits(state, rows, *tables, Tiles.BFLOAT16)
    used = position_B1[:, 0] >= 0
    assert_near(actual_B1E[used], expected_B1E[used], torch.bfloat16)
    assert_near(logits_BV[used], model.logits(actual_B1E)[used, 0], torch.bfloat16)
    for tensor, other, before in zip(by_tiles.tensors(), plain.tensors(), cache.tensors(), strict=True):
        assert_near(tensor, other, torch.bfloat16)
        assert_same(tensor[:rows][~used], before[:rows][~used])


def test_steps_by_tiles_are_another_form():
    model, cache, state, tables = step_case(None, 32, hidden_size=512)  # enough numbers for some to round otherwise
    x_B1E, position_B1 = model.embed(state.input_R[:32, None]), state.position_R[:32, None]
    hidden = [
        DecodeLayers(model, copy.deepcopy(cache))(x_B1E, *tables, position_B1, kind)
        for kind in (Tiles.NONE, Tiles.BFLOAT16)
    ]
    assert not torch.equal(*hidden)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("rows", [7, 16, 19])
def test_a_row_by_tiles_depends_neither_on_the_rows_beside_it_nor_on_the_threads(rows, threads):
    model, cache, state, tables = step_case(None, rows)
    logits_BV = logits_of(model, cache, state, tables, rows, Tiles.BFLOAT16)
    assert_same(logits_of(model, cache, state, tables, 3, Tiles.BFLOAT16), logits_BV[:3])
    torch.set_num_threads(3)
    assert_same(logits_of(model, cache, state, tables, rows, Tiles.BFLOAT16), logits_BV)


def test_a_step_by_tiles_writes_the_sampler_s_tokens():
    model, cache, state, tables = step_case(None, 9)
    logits_BV, before = logits_of(model, cache, state, tables, 9, Tiles.BFLOAT16), copy.deepcopy(state)
    DecodeLayers(model, cache).choose(state, 9, *tables, False, Tiles.BFLOAT16)
    assert_same(state.output_R[:9], sample(logits_BV, before.sampler_rows(slice(9)), SamplerKind.FULL))


@pytest.mark.parametrize("K", [48, 80])
def test_channels_that_tiles_do_not_take_are_multiplied_without(K):
    case = step_case(None, 9, hidden_size=K, intermediate_size=K, num_attention_heads=2, num_key_value_heads=1)
    x_B1E = case[0].embed(case[2].input_R[:9, None])
    with_tiles, without = (
        DecodeLayers(case[0], copy.deepcopy(case[1]))._run(x_B1E, *case[3], case[2].position_R[:9, None], None, kind)
        for kind in (Tiles.BFLOAT16, Tiles.NONE)
    )
    assert_near(with_tiles[:5], without[:5], torch.bfloat16)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "lossless"])
def test_tiles_change_nothing_of_other_formats(format):
    case = step_case(format, 9, tie_word_embeddings=False)
    assert_same(*(logits_of(*case, 9, kind) for kind in (Tiles.BFLOAT16, Tiles.NONE)))


def test_routers_of_quantized_experts_are_multiplied_by_tiles():
    case = step_case("int4", 9, **EXPERTS | {"num_experts_per_tok": 16})  # all: rounding may change the choice of fewer
    with_tiles, without = (logits_of(*case, 9, kind) for kind in (Tiles.BFLOAT16, Tiles.NONE))
    used = case[2].position_R[:9] >= 0
    assert_near(with_tiles[used], without[used], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pytorch_s_default_dtype_changes_no_logits(dtype):
    case = step_case("int4", 3)
    expected = logits_of(*case, 3)
    torch.set_default_dtype(dtype)
    try:
        assert_same(logits_of(*case, 3), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_requests_of_all_kinds_get_the_tokens_of_the_blocks_alone(monkeypatch):
    def replies():
        sampled = {"temperature": 12.0, "seed": 5, "max_tokens": 12}
        every = [
            SamplingParams(temperature=0, max_tokens=12, logprobs=3),
            SamplingParams(**sampled, top_p=0.9, n=2),
            SamplingParams(**sampled, top_k=9, repetition_penalty=1.3, presence_penalty=0.4),
            SamplingParams(**sampled, min_p=0.02, logit_bias={4: 3.0}, logprobs=0),
            SamplingParams(**sampled, allowed_token_ids=[4, 7, 9, 30]),
        ]
        with Generator(step_case(None, 3)[0], max_seq_len=100, max_batch_size=8, compile=True) as generator:
            generator.warmup()
            whole = generator.debug.engine.parts.decode_layers.runs_steps
            results = generator.generate([[5, 6, 7, n] for n in range(len(every))], every)
            assert generator.stats.compilations == 0
        return whole, results

    is_whole, whole = replies()
    monkeypatch.setattr("qwen3fast.engine.decode_layers._ends", mock.Mock(side_effect=NotServedError))
    is_alone, alone = replies()
    assert is_whole and not is_alone
    for a, b in zip(all_of(whole), all_of(alone), strict=True):
        assert a.token_ids == b.token_ids
        for at, other in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert at.logprob == pytest.approx(other.logprob, abs=0.1)
    assert len({tuple(result.token_ids) for result in all_of(whole)}) == 6


def all_of(results):
    return [sample for result in results for sample in result.samples or [result]]


@pytest.mark.parametrize("threads", [1, 2, 3, 14], indirect=True)
@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", [SamplerKind.GREEDY, SamplerKind.FULL])
def test_a_step_writes_the_sampler_s_tokens_and_advances(format, kind, threads):
    model, cache, state, tables = step_case(format, 9)
    state.advance_R[3] = 0  # a row of another batch, which does not move
    logits_BV, before = logits_of(model, cache, state, tables, 8), copy.deepcopy(state)
    DecodeLayers(model, cache).choose(state, 8, *tables, is_greedy=kind is SamplerKind.GREEDY)
    token_B = sample(logits_BV, before.sampler_rows(slice(8)), kind)
    assert len(set(token_B.tolist())) > 4
    assert torch.equal(token_B, logits_BV.argmax(-1)) == (kind is SamplerKind.GREEDY)
    assert_same(state.output_R[:8], token_B)
    assert_same(state.input_R[:8], token_B)
    assert_same(state.position_R[:8], (before.position_R + before.advance_R)[:8])
    assert_same(state.step_R[:8], (before.step_R + before.advance_R)[:8])
    for name, tensor in vars(state).items():
        assert_same(tensor[8:], getattr(before, name)[8:])


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize(
    "scores",
    [
        {5: 2.0, 70: 2.0, 80: 2.0, 207: 2.0},
        {120: 0.5, 200: 0.5},
        {207: 1.0},
        {0: 0.0, 3: -0.0},
        {index: -1.0 - index for index in range(VOCABULARY)},
        {index: -math.inf for index in range(VOCABULARY) if index != 150},
        {index: -math.inf for index in range(VOCABULARY)},
        {100: math.nan, 3: 5.0},
        {207: math.inf},
        {1: math.nan, 200: math.nan, 0: -math.inf},
    ],
)
def test_ties_and_numbers_that_are_not_finite_are_chosen_from_as_by_the_sampler(scores, threads):
    model, cache, state, tables = step_case(None, 1, tie_word_embeddings=False)
    x_11E = DecodeLayers(model, copy.deepcopy(cache))(
        model.embed(state.input_R[:1, None]), *tables, torch.tensor([[0]])
    )
    with torch.no_grad():  # logits are one channel of x times the scores
        model.model.norm.weight.copy_(torch.eye(64)[0])
        model.lm_head.weight.zero_()
        for index, score in scores.items():
            model.lm_head.weight[index, 0] = score * x_11E[0, 0, 0].sign()
    logits_1V = logits_of(model, cache, state, tables, 1)
    expected = sample(logits_1V, state.sampler_rows(slice(1)), SamplerKind.GREEDY)
    torch.testing.assert_close(logits_1V, model.logits(x_11E)[:, 0].float(), rtol=0, atol=0, equal_nan=True)
    DecodeLayers(model, cache).choose(state, 1, *tables, is_greedy=True)
    assert_same(state.output_R[:1], expected)
    assert_same(state.input_R[:1], expected.clamp(min=0))


@pytest.mark.parametrize("format", FORMATS_OF_STEPS)
def test_a_row_has_the_same_logits_alone_and_among_others(format):
    model, cache, state, tables = step_case(format, 19)
    together = logits_of(model, cache, state, tables, 19)
    for row in range(19):
        alone, own = copy.deepcopy(cache), copy.deepcopy(state)
        for tensor in (*alone.keys, *alone.values):
            tensor[0] = tensor[row]
        for tensor in vars(own).values():
            tensor[0] = tensor[row]
        assert_same(logits_of(model, alone, own, tables, 1)[0], together[row])


@pytest.mark.parametrize(
    ("name", "number"), [("input", VOCABULARY), ("input", -1), ("position", "end"), ("position", -2)], ids=str
)
@pytest.mark.parametrize("format", [None, "int4"])
def test_a_step_refuses_tokens_and_positions_that_do_not_exist(name, number, format):
    model, cache, state, tables = step_case(format, 3)
    getattr(state, f"{name}_R")[1] = cache.allocated_len if number == "end" else number
    before = copy.deepcopy((cache.tensors(), list(vars(state).values())))
    layers = DecodeLayers(model, cache)
    for run in (partial(layers.choose, is_greedy=True), partial(layers.choose, is_greedy=False), layers.logits):
        with pytest.raises(ValueError, match="an input token is not in the vocabulary, or a position not in the cache"):
            run(state, 3, *tables)
    assert_same(cache.tensors(), before[0])
    assert_same(list(vars(state).values()), before[1])


@pytest.mark.parametrize("rows", [0, 5])
def test_a_step_refuses_other_numbers_of_rows(rows):
    model, cache, state, tables = step_case(None, 3)
    with pytest.raises(ValueError, match="there must be 1 to 4 rows"):
        DecodeLayers(model, cache).choose(state, rows, *tables, is_greedy=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": torch.ones(64)}, r"norms must be \(64,\) bfloat16"),
        ({"head": LayerWeight(torch.zeros(40, 64).bfloat16())}, r"\(V, E\)"),
        ({"head": LayerWeight(torch.zeros(48, 32).bfloat16())}, r"\(V, E\)"),
        ({"embedding": LayerWeight(torch.zeros(48, 64))}, "weights must be"),
        ({"input": torch.zeros(3, dtype=torch.int64)}, r"buffers must be \(4,\) int64"),
        ({"step": torch.zeros(4, dtype=torch.int32)}, r"buffers must be \(4,\) int64"),
        ({"seed_B": torch.zeros(3, dtype=torch.int64)}, r"seed must be \(4,\) int64"),
        ({"cos_SD": torch.zeros(100, 16)}, "cos and sin"),
    ],
)
def test_steps_refuse_tensors_that_do_not_fit(changes, message):
    model, cache, state, tables = step_case(None, 3)
    weight = LayerWeight(model.lm_head.weight)
    given = {"embedding": weight, "norm": model.model.norm.weight, "head": weight}
    given |= {name: getattr(state, f"{name}_R") for name in StepTensors._fields}
    given |= state.sampler_rows(slice(None))._asdict() | dict(zip(("cos_SD", "sin_SD"), tables, strict=True)) | changes
    parts = [kind(**{name: given[name] for name in kind._fields}) for kind in (EndTensors, StepTensors, SamplerRows)]
    with pytest.raises(ValueError, match=message):
        DecodeStepCall(DecodeLayers(model, cache)._run, *parts, given["cos_SD"], given["sin_SD"])


def plain_embedding(model):
    model.model.embed_tokens = type("Other", (nn.Embedding,), {})(VOCABULARY, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.zeros(VOCABULARY).bfloat16())),
        lambda model: model.model.norm.float(),
        plain_embedding,
        lambda model: setattr(model.model.embed_tokens, "dtype", torch.float32),
    ],
    ids=["bias", "norm in float32", "another embedding", "quantized embedding with other results"],
)
def test_other_ends_keep_the_blocks_in_one_operation(change):
    model, cache, *_ = step_case("int8" if "dtype" in change.__code__.co_consts else None, 3, tie_word_embeddings=False)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding) == ("dtype" in change.__code__.co_consts)
    change(model)
    layers = DecodeLayers(model, cache)
    assert layers.serves(1) and not layers.runs_steps


@pytest.mark.parametrize("vocab_size", [VOCABULARY, VOCABULARY + 1], ids=["whole steps", "blocks alone"])
def test_an_engine_s_steps_give_the_plain_model_s_logits(vocab_size):
    model = step_case(None, 3, vocab_size=vocab_size)[0]
    engine, seen = engine_of(model, 2, 100, compile=True), []
    assert engine.parts.decode_layers.runs_steps == (vocab_size == VOCABULARY)
    tokens = [[5, 9, 2, 7], [1, 1, 4, 4]]
    for row in range(2):
        engine.prefill_whole(row, tokens[row][:3])
        engine.set_row(row, 3)
        engine.state.input_R[row] = tokens[row][3]
    for _ in range(4):  # each position twice: the logits, then the greedy choice
        position_R, input_R = engine.state.position_R.clone(), engine.state.input_R.clone()
        engine.launch(2, 20, StepKind(), hook=lambda logits_BV: seen.append(logits_BV) or logits_BV)
        hooked = engine.collect().tokens
        engine.state.position_R.copy_(position_R)
        engine.state.input_R.copy_(input_R)
        assert engine.decode(2, 20, StepKind()) == hooked
        for row in range(2):
            expected = model(torch.tensor([tokens[row]]))[0, -1]
            assert_near(seen[-1][row], expected, torch.bfloat16)
            tokens[row].append(hooked[row])
    assert engine.compiler.compilations == 0
