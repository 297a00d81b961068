"""Splitting prompts into chunks, and chunks of several prompts in one forward pass."""

import pytest
import torch
from conftest import assert_near, engine_of, random_ids, random_tensor, randomized, small_config
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.engine import StepKind
from qwen3fast.engine.parts import CHUNK_SIZES, CPU_CHUNK_SIZES
from qwen3fast.engine.prefill import CHUNK_COST, CPP_CHUNK_COST, Prefill, graph_prompts, max_prompts, split_into_chunks
from qwen3fast.engine.prompt_logprobs import WantedLogprobs
from qwen3fast.engine.state import RowSampling
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.structures import RowLimits
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.sampling.samplers import SamplerKind


@pytest.mark.parametrize("sizes", [CHUNK_SIZES, CPU_CHUNK_SIZES])
@given(blocks=st.integers(1, 40), data=st.data())
def test_chunks_cover_the_prompt_and_fit_the_cache(sizes, blocks, data):
    room = 128 * blocks
    num_tokens = data.draw(st.integers(1, room))
    chunks = split_into_chunks(num_tokens, room, sizes)
    assert set(chunks) <= set(sizes)
    assert sum(chunks[:-1]) < num_tokens <= sum(chunks) <= room


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [(1, [32]), (33, [64]), (70, [64, 32]), (512, [512]), (600, [512, 128]), (300, [256, 64]), (256, [256])],
)
def test_chunks_are_padded_where_that_is_cheaper_than_one_more(num_tokens, chunks):
    assert split_into_chunks(num_tokens, 4096) == chunks


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [(1, [8]), (9, [16]), (33, [48]), (70, [96]), (130, [128, 8]), (300, [256, 48]), (390, [384, 8]), (512, [512])],
)
def test_chunks_on_cpus_have_less_padding(num_tokens, chunks):
    assert split_into_chunks(num_tokens, 4096, CPU_CHUNK_SIZES) == chunks


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [(1, [8]), (33, [32, 8]), (40, [48]), (70, [64, 8]), (100, [96, 8]), (300, [256, 48]), (390, [384, 8])],
)
def test_chunks_have_still_less_where_one_more_costs_little(num_tokens, chunks):
    assert split_into_chunks(num_tokens, 4096, CPU_CHUNK_SIZES, CPP_CHUNK_COST) == chunks


@pytest.mark.skipif(not cpu.load(), reason="no C++ operations here")
@pytest.mark.parametrize(
    ("dtype", "compile", "adapter", "has_tiles", "cost"),
    [
        (torch.bfloat16, True, 0, False, CPP_CHUNK_COST),
        (torch.bfloat16, True, 0, True, CHUNK_COST),
        (torch.bfloat16, True, 1, False, CHUNK_COST),  # block by block
        (torch.bfloat16, False, 0, False, CHUNK_COST),
        (torch.float32, True, 0, False, CHUNK_COST),
    ],
)
def test_one_more_chunk_costs_little_only_in_the_cpp_operation_without_tiles(
    dtype, compile, adapter, has_tiles, cost, monkeypatch
):
    monkeypatch.setenv("QWEN3FAST_FORMS", "first")
    monkeypatch.setattr(tiles, "are_announced", lambda: has_tiles)
    monkeypatch.setattr(tiles, "_are_usable", has_tiles)
    engine = make_engine(dtype, dtype, compile)
    assert engine.begin_prefill(0, [1] * 33, adapter=adapter).chunk_cost == cost


def test_chunks_stay_narrow_where_room_is_short():
    assert sum(split_into_chunks(300, 384)) <= 384


@pytest.mark.parametrize(
    ("slots", "numbers"),
    [
        (1, [[], [], [], [], []]),
        (3, [[3], [3], [3], [2], []]),
        (16, [[4, 16], [4, 8], [4], [2], []]),
        (64, [[4, 16], [4, 8], [4], [2], []]),
    ],
)
def test_graphs_of_several_prompts_are_few_and_serve_every_number(slots, numbers):
    assert CHUNK_SIZES == (32, 64, 128, 256, 512)
    assert [graph_prompts(size, slots) for size in CHUNK_SIZES] == numbers
    for size, found in zip(CHUNK_SIZES, numbers, strict=True):
        assert max_prompts(size, slots) == max(found, default=1)


CPU = torch.device("cpu")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (25, 32, 29)]
REUSED = (0, 70, 40)  # tokens before them


def make_engine(dtype, cache_dtype, compile=False, quantization=None, **changes):
    config = small_config(
        dtype=dtype, hidden_size=64, intermediate_size=96, head_dim=32, max_position_embeddings=512, **changes
    )
    model = randomized(config).to(dtype)
    if quantization is not None:
        quantize_model(model, quantization, dtype)
    return engine_of(model, 4, 256, cache_dtype, compile)


def prefill_all(engine, is_together):
    """Three prompts in rows 3, 1 and 2, behind tokens that are there already. Returns: the logits of each."""
    begun = []
    for row, ids, reused in zip((3, 1, 2), PROMPTS, REUSED, strict=True):
        before = random_ids(1, reused, seed=row)[0].tolist() if reused else []
        if before:
            engine.prefill_whole(row, before)
        begun.append(engine.begin_prefill(row, before + ids, reused))
    if is_together:
        return engine.prefill_together(begun)
    return [engine.prefill_step(prefill) for prefill in begun]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "changes"),
    [
        (torch.float32, torch.float32, {}),
        (torch.float32, torch.int8, {}),
        (torch.bfloat16, torch.bfloat16, {"compile": "auto"}),
        (torch.bfloat16, torch.int8, {"compile": "auto"}),
        (torch.bfloat16, torch.bfloat16, {"compile": True}),
        (torch.bfloat16, torch.bfloat16, {"compile": "auto", "quantization": "int4"}),
        (torch.bfloat16, torch.bfloat16, {"compile": "auto", "quantization": "int8", **EXPERTS}),
    ],
    ids=["float32", "int8 cache", "bf16", "bf16, int8 cache", "compiled", "int4", "experts"],
)
def test_prompts_computed_together_are_computed_as_alone(dtype, cache_dtype, changes):
    """Also behind prefixes of different lengths."""
    engines = [make_engine(dtype, cache_dtype, **changes) for _ in range(2)]
    logits = [prefill_all(engine, is_together) for engine, is_together in zip(engines, (True, False), strict=True)]
    for ours, theirs in zip(*logits, strict=True):
        assert ours.shape == theirs.shape == (1, 97)
        assert_near(ours, theirs, dtype)
    for ours, theirs in zip(engines[0].cache.tensors(), engines[1].cache.tensors(), strict=True):
        for row, ids, reused in zip((3, 1, 2), PROMPTS, REUSED, strict=True):
            used = slice(reused + len(ids))
            assert_near(ours[row, :, used].float(), theirs[row, :, used].float(), dtype)
            if changes.get("quantization") == "int4":  # by kernels whose sums do not depend on the number of rows
                assert torch.equal(ours[row, :, used], theirs[row, :, used])
        assert not ours[0].any()  # no other row was written


def test_prompts_that_are_not_at_their_ends_have_no_logits():
    engine = make_engine(torch.float32, torch.float32)
    ids = random_ids(1, 130)[0].tolist()
    begun = [engine.begin_prefill(0, ids), engine.begin_prefill(1, ids[:120])]  # 128 tokens and more, 128
    first, second = engine.prefill_together(begun)
    assert first is None and second is not None and begun[0].done == 128
    assert_near(engine.prefill_step(begun[0]), engine.prefill_whole(2, ids))
    assert_near(second, engine.prefill_whole(3, ids[:120]))


def test_several_rows_sample_their_first_tokens_as_each_alone():
    logits_BV = 8 * random_tensor(3, 97, seed=5)
    logits_BV[1, 3] = torch.nan
    found = []
    for is_together in (True, False):
        engine = make_engine(torch.float32, torch.float32)
        samplings = [RowSampling(0.7, 20, 0.9, 0.01, 2**40 + row, row) for row in (3, 0, 2)]
        if is_together:
            engine.set_rows([3, 0, 2], [8, 5, 7], samplings)
        else:
            for row, sampling in zip((3, 0, 2), samplings, strict=True):
                engine.set_row(row, 5 + row, sampling)
        kind = StepKind(SamplerKind.WINDOW)
        if is_together:
            tokens = engine.sample_first([3, 0, 2], logits_BV, kind).tokens
        else:
            tokens = [engine.sample_first(row, logits_BV[i : i + 1], kind).tokens[0] for i, row in enumerate((3, 0, 2))]
        found.append((tokens, {name: tensor.tolist() for name, tensor in vars(engine.state).items()}))
    assert found[0] == found[1]
    tokens, state = found[0]
    assert tokens[1] == -1 and state["step_R"] == [1, 0, 1, 1] and state["position_R"] == [5, -1, 7, 8]


def test_more_prompts_do_not_change_the_form_of_a_quantized_product():
    """Where many rows dequantize the weights, which rounds otherwise, as few prompts share a pass as stay below."""
    engine = make_engine(torch.bfloat16, torch.bfloat16, "auto", "int4")
    [layers] = engine.parts.forms._layers.values()
    assert [engine.max_prompts(size) for size in CHUNK_SIZES] == [4, 4, 4, 2, 1]
    for layer in layers:
        layer.limits = RowLimits(dequantized=128)
    assert [engine.max_prompts(size) for size in CHUNK_SIZES] == [3, 1, 4, 2, 1]


@pytest.mark.parametrize(
    ("tokens", "reused", "wanted", "fits"),
    [
        (20, 0, None, [32, 64]),  # padded by 32, not by 96
        (60, 0, None, [64]),  # not by 64
        (70, 0, None, [64]),  # 64 and 32: the first one is whole
        (90, 64, None, [32, 64]),
        (220, 200, None, [32]),  # 200 + 64 tokens have no room
        (20, 0, WantedLogprobs(1, 1), []),
    ],
)
def test_a_chunk_fits_its_size_and_one_that_padding_reaches(tokens, reused, wanted, fits):
    prefill = Prefill.begin(0, [1] * tokens, reused, 256, wanted)
    assert [size for size in CHUNK_SIZES if prefill.fits(size)] == fits


def test_a_padded_chunk_is_computed_as_at_its_own_size():
    engine = make_engine(torch.float32, torch.float32)
    short, long = (random_ids(1, n)[0].tolist() for n in (20, 60))
    together = engine.prefill_together([engine.begin_prefill(row, ids) for row, ids in enumerate((short, long))])
    for row, (ids, logits_1V) in enumerate(zip((short, long), together, strict=True), start=2):
        assert logits_1V is not None
        assert_near(logits_1V, engine.prefill_whole(row, ids))


@pytest.mark.skipif(not cpu.load(), reason="no C++ operations on this machine")
def test_the_form_of_a_prompts_attention_does_not_depend_on_the_lengths_beside_it():
    """Of two prompts, PyTorch's attention serves the longer one, and the C++ the shorter one: to the bit."""
    q_BTHD = random_tensor(2, 32, 4, 32).bfloat16()
    k_RKSD, v_RKSD = (random_tensor(2, 2, 200, 32, seed=seed).bfloat16() for seed in (1, 2))
    position_BT, row_B = torch.arange(32) + torch.tensor([[5], [150]]), torch.tensor([1, 0])

    def run(rows, sdpa_from):
        q, position, row = (x[rows] for x in (q_BTHD, position_BT, row_B))
        return torch.ops.qwen3fast.prefill_attention(q, k_RKSD, v_RKSD, position, row, None, None, sdpa_from)

    first, second = slice(0, 1), slice(1, 2)
    together = run(slice(2), (100, 100, 100))
    assert torch.equal(together[first], run(first, ()))
    assert torch.equal(together[second], run(second, (0, 0, 0)))
    assert not torch.equal(together[second], run(second, ()))  # the two forms round differently
