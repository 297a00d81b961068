"""Forms that were chosen by measurement: all give the same numbers, engines use what was chosen, and keep using it."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_near, random_ids, random_tensor, randomized, small_config

from qwen3fast import Generator
from qwen3fast.engine import Engine, StepKind
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.fast_layers import use_fast_layers
from qwen3fast.engine.forms import BLOCKS, FIELDS, LINEAR_WORK, WAITING, cases_of, row_limits
from qwen3fast.kernels import cpu, forms, forms_file
from qwen3fast.kernels.cases import CPP, DEQUANTIZED, INT8_TILES, LINEAR, ROWS, SDPA, TILES
from qwen3fast.kernels.compiling import operations
from qwen3fast.kernels.cpu import experts as experts_operation
from qwen3fast.kernels.cpu import prefill, tiles
from qwen3fast.kernels.cpu.ops import dequantized_linear
from qwen3fast.kernels.cpu.structures import RowLimits, Tiles, packed_linear
from qwen3fast.model.kv_cache import StaticKVCache, quantize_vectors
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS, quantize

pytestmark = [
    pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine"),
    pytest.mark.usefixtures("one_thread"),
]
CPU = torch.device("cpu")
NEVER = forms.NEVER
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No choices but the test's own."""
    folder = tmp_path / "qwen3fast"
    monkeypatch.setattr(forms_file, "path", lambda: folder / "forms.json")
    monkeypatch.delenv(forms.VARIABLE, raising=False)
    monkeypatch.setattr(forms, "_used", {})


@pytest.fixture
def faster(monkeypatch):
    """Return a function that says which forms are the faster ones from now on; they are not run to measure them."""

    def say(*names):
        monkeypatch.setattr(
            forms, "measure", lambda calls: {name: [1.0 if name in names else 2.0] * 3 for name in calls}
        )

    return say


@pytest.fixture(params=[False, True], ids=["no tiles", "tiles"])
def has_tiles(request, monkeypatch):
    """Return whether the processor has tiles, which work: a test runs for both kinds of processor."""
    monkeypatch.setattr(tiles, "are_announced", lambda: request.param)
    monkeypatch.setattr(tiles, "_are_usable", request.param)
    return request.param


@pytest.fixture
def uncompiled(monkeypatch):
    """Run what engines compile with operations instead: that takes no time to compile."""

    def with_operations(self, function, module, tensors, ranges, is_tuned):
        def run(*arguments):
            with operations():
                return function(*arguments)

        return run

    monkeypatch.setattr(StepCompiler, "compile", with_operations)


def small_model(format=None, **sizes):
    config = small_config(hidden_size=64, intermediate_size=96, head_dim=32, dtype=torch.bfloat16, **sizes)
    model = randomized(config).bfloat16()
    if format is not None:
        quantize_model(model, format, torch.bfloat16)
    return model


def small_engine(model, compile=True, rows=2, **options):
    cache = StaticKVCache(model.config, rows, 200, torch.bfloat16, CPU)
    return Engine(model, cache, CPU, compile, **options)


# ------------------------------------------------------------------------------------------- all forms agree


def cached(dtype, rows=3, positions=90):
    k, v = (random_tensor(rows, 2, positions, 64, seed=seed) for seed in (1, 2))
    if dtype == torch.bfloat16:
        return k.bfloat16(), v.bfloat16(), None, None
    (k, k_scale), (v, v_scale) = quantize_vectors(k), quantize_vectors(v)
    return k, v, k_scale, v_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("rows", "tokens", "start"), [([1], 1, 0), ([2], 70, 0), ([1], 5, 40), ([2, 0], 33, 0), ([0, 2], 7, 9)]
)
def test_both_forms_of_prefill_attention_agree(dtype, rows, tokens, start):
    k, v, *scales = cached(dtype)
    q = random_tensor(len(rows), tokens, 4, 64).bfloat16()
    position = torch.arange(start, start + tokens) + torch.arange(len(rows))[:, None]  # each row at its own
    fixed = (q, k, v, position, torch.tensor(rows), *scales)
    with operations():
        results = [torch.ops.qwen3fast.prefill_attention(*fixed, at) for at in ([], [NEVER] * 3, [0, 0, 0])]
    assert torch.equal(results[0], results[1])
    assert tokens == 1 or not torch.equal(results[0], results[2])  # it is another form
    assert results[2].shape == q.shape and results[2].is_contiguous()
    assert_near(results[2], results[0], torch.bfloat16)


@pytest.mark.parametrize(
    ("tokens", "used", "limits", "expected"),
    [
        (32, 64, [64, NEVER, NEVER], True),
        (32, 64, [65, 0, 0], False),
        (33, 64, [0, 65, 0], False),
        (33, 64, [NEVER, 64, NEVER], True),
        (129, 129, [NEVER, NEVER, 0], True),
        (600, 600, [0, 0, NEVER], False),
    ],
)
def test_prefill_attention_chooses_by_chunk_and_used_length(tokens, used, limits, expected, monkeypatch):
    k = torch.zeros(1, 1, 700, 32, dtype=torch.bfloat16)
    q, calls = torch.zeros(1, tokens, 1, 32, dtype=torch.bfloat16), []
    monkeypatch.setattr(prefill, "sdpa_prefill", lambda q, *rest: calls.append(1) or q)
    torch.ops.qwen3fast.prefill_attention(
        q, k, k, torch.arange(used - tokens, used)[None], torch.tensor([0]), None, None, limits
    )
    assert bool(calls) == expected


@pytest.mark.parametrize(
    ("tokens", "limits", "expected"),
    [
        (32, [32, NEVER, NEVER], [True, True]),
        (32, [33, 0, 0], [True, False]),
        (33, [0, 98, 0], [False, False]),
        (33, [], [False, False]),
    ],
)
def test_each_row_of_prefill_attention_is_multiplied_by_tiles_from_a_used_length(tokens, limits, expected, monkeypatch):
    """Tiles take 32 positions at a time, and vectors 16: what is not a number tells how far the first queries read."""
    monkeypatch.setattr(tiles, "_are_usable", True)
    k, v, *_ = cached(torch.bfloat16, positions=100)
    v[2, :, 84] = v[0, :, 20] = float("nan")
    q, rows = random_tensor(2, tokens, 4, 64).bfloat16(), torch.tensor([2, 0])
    position = torch.arange(tokens) + torch.tensor([[64], [0]])
    run = partial(torch.ops.qwen3fast.prefill_attention, q, k, v, position, rows, None, None, [])
    assert run(limits)[:, :16].isnan().flatten(1).any(dim=1).tolist() == expected
    monkeypatch.setattr(tiles, "_are_usable", False)
    assert not run([0, 0, 0])[:, :16].isnan().any()


def test_prefill_attention_refuses_another_number_of_limits():
    k, q = torch.zeros(1, 1, 8, 32, dtype=torch.bfloat16), torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="prefill_attention: a form needs 3 lengths, or none"):
        torch.ops.qwen3fast.prefill_attention(q, k, k, torch.tensor([[0]]), torch.tensor([0]), None, None, [1])


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_products_with_dequantized_weights_equal_those_with_the_plain_weight(format):
    packed = quantize(random_tensor(48, 96).bfloat16(), FORMATS[format])
    x = random_tensor(2, 5, 96, seed=1).bfloat16()
    expected = x.float() @ FORMATS[format].dequantize(packed).T
    y = dequantized_linear(x, *packed)
    assert_near(y, expected, torch.bfloat16)
    with torch.device("meta"):  # an application's default device
        assert torch.equal(dequantized_linear(x, *packed), y)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantized_products_are_dequantized_from_a_number_of_rows(format):
    weights = [quantize(random_tensor(n, 96, seed=n).bfloat16(), FORMATS[format]) for n in (16, 48)]
    x = random_tensor(6, 96).bfloat16()
    packed, scale = ([w[i] for w in weights] for i in (0, 1))
    limits = [(), *(RowLimits(dequantized=n) for n in (6, 7)), RowLimits(tiles=5, dequantized=6)]
    in_cpp, at_limit, below, before_tiles = (
        torch.ops.qwen3fast.quantized_linear(x, packed, scale, at) for at in limits
    )
    expected = torch.cat([dequantized_linear(x, *weight) for weight in weights], dim=-1)
    assert torch.equal(at_limit, expected) and torch.equal(below, in_cpp) and torch.equal(before_tiles, expected)
    assert not torch.equal(in_cpp, expected)


@pytest.mark.parametrize("format", [None, "int8", "int4"])
@pytest.mark.parametrize("is_loaded", [True, False])
def test_uncompiled_quantized_layers_warn_where_operations_are_missing(format, is_loaded, monkeypatch, recwarn):
    model = small_model(format)
    monkeypatch.setattr(cpu, "load", lambda: is_loaded)
    small_engine(model, compile=False)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (format is not None and not is_loaded)
    assert all("install a wheel of qwen3fast" in text and "apt-get install g++" in text for text in told)


@pytest.mark.parametrize(
    ("format", "sizes"), [(None, {}), ("int4", {}), ("fp8", {}), ("int4", EXPERTS), ("lossless", EXPERTS)]
)
@torch.no_grad()
def test_all_cases_run_in_all_forms(format, sizes, has_tiles):
    model = small_model(format, **sizes)
    use_fast_layers(model)
    cache = StaticKVCache(model.config, 4, 700, torch.bfloat16, CPU)
    cases = cases_of(model, cache)
    products = {f"linear {format or 'bfloat16'}", *({f"experts {format}/{format}", "linear bfloat16"} if sizes else ())}
    assert {case.what for case in cases} == {"prefill attention", "decode"} | products
    assert not any("2048 x 64" in case.key for case in cases)  # all experts' weights are no product
    assert [case.sizes for case in cases if case.what == "decode"] == [(1,), (2,), (4,)]
    assert len({forms.machine_key(case) for case in cases}) == len(cases)
    with_tiles = [case for case in cases if case.what.startswith(("prefill attention", LINEAR_WORK))]
    assert {case.names[:2] == (TILES, CPP) for case in with_tiles} == {has_tiles}
    assert {case.names[0] for case in cases if case not in with_tiles or not has_tiles} == {CPP}
    steps = {case.names for case in cases if case.what == "decode"}
    assert steps == {(CPP, TILES, BLOCKS) if has_tiles and "linear bfloat16" in products else (CPP, BLOCKS)}
    assert has_tiles or not any(TILES in case.names for case in cases)
    for case in cases:
        calls = case.calls()
        assert tuple(calls) == case.names
        for call in calls.values():
            call()


def test_forms_are_measured_on_the_cpu_whatever_an_application_s_default_device_is(monkeypatch):
    model, devices = small_model("int8"), []

    def measure_once(calls):
        devices.extend(y.device for y in (call() for call in calls.values()) if y is not None)
        return {name: [1.0] * 3 for name in calls}

    monkeypatch.setattr(forms, "measure", measure_once)
    use_fast_layers(model)
    cases = cases_of(model, StaticKVCache(model.config, 1, 100, torch.bfloat16, CPU))
    with torch.device("meta"):
        for case in cases:
            forms.measure_and_keep(case)
    assert set(devices) == {CPU}


def test_no_cases_but_for_bfloat16_on_cpus():
    model = randomized(small_config())
    assert cases_of(model, StaticKVCache(model.config, 1, 100, torch.float32, CPU)) == []


# ------------------------------------------------------------------------------------- engines use what was chosen


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_an_engine_uses_the_faster_forms(format, faster):
    faster(SDPA, DEQUANTIZED, LINEAR, BLOCKS)
    engine = small_engine(small_model(format))
    assert engine.parts.forms.sdpa_from == (0, 0, NEVER)  # chunks of 512 do not fit its cache: nothing to measure
    assert engine.parts.forms.block_rows == {1, 2}
    layer = engine.model.model.layers[0].mlp.down_proj
    assert layer.limits.dequantized == ROWS[0]
    faster(
        CPP,
    )
    again = small_engine(small_model(format))
    assert again.parts.forms.sdpa_from == (0, 0, NEVER)  # within a process it does not change


@pytest.mark.parametrize(
    ("format", "won", "limits", "kind"),
    [
        ("int4", TILES, {"tiles": ROWS[0]}, Tiles.BFLOAT16),
        ("int8", TILES, {"tiles": ROWS[0]}, Tiles.BFLOAT16),
        ("int8", INT8_TILES, {"int8_tiles": ROWS[0]}, Tiles.INT8),
        ("int4", INT8_TILES, {"int8_tiles": ROWS[0]}, Tiles.INT8),
        ("int4", CPP, {}, Tiles.NONE),
    ],
)
def test_tiles_are_measured_where_the_processor_announces_them_and_used_where_they_win(
    format, won, limits, kind, faster, monkeypatch
):
    monkeypatch.setattr(tiles, "are_announced", lambda: True)
    monkeypatch.setattr(tiles, "_are_usable", False)
    faster(won)
    engine = small_engine(small_model(format))
    layer = engine.model.model.layers[0].mlp.gate_proj
    names = {name for choice in engine.parts.forms.choices.values() for name in choice.seconds}
    assert {INT8_TILES, TILES} <= names
    assert layer.limits == RowLimits(**limits)
    assert engine.parts.forms.tiles_from == (() if won == CPP else (0, 0, NEVER))
    x = random_tensor(ROWS[0], layer.in_features).bfloat16()
    before = layer(x)  # in C++ without tiles: trying them failed
    monkeypatch.setattr(tiles, "_are_usable", True)
    weight = packed_linear(layer.weight_packed, layer.weight_scale)
    assert torch.equal(layer(x), tiles.tile_linear(x, [weight], kind) if kind else before)
    assert torch.equal(layer(x), before) == (kind == Tiles.NONE)


@pytest.fixture(params=[(TILES, {}, 0), (CPP, {}, NEVER), (CPP, {"forms": "first"}, 0)], ids=str)
def attention_by_tiles(request, faster, uncompiled, monkeypatch):
    """Return an engine on a processor whose tiles work, and the used length from which its attention is by tiles.

    Tiles or the C++ win all measurements.
    """
    won, options, tiles_from = request.param
    monkeypatch.setattr(tiles, "are_announced", lambda: True)
    monkeypatch.setattr(tiles, "_are_usable", True)
    faster(won)
    return small_engine(small_model(), **options), tiles_from


def test_chunks_have_attention_by_tiles_unless_the_cpp_is_faster(attention_by_tiles, monkeypatch):
    (engine, expected), seen, real = attention_by_tiles, [], DecodeLayers.prefill
    monkeypatch.setattr(DecodeLayers, "prefill", lambda *a: seen.append(a[-1]) or real(*a))
    assert engine.prefill_whole(0, random_ids(1, 40)[0].tolist()).isfinite().all()
    assert set(seen) == {expected}


def test_blocks_one_by_one_have_attention_by_tiles_unless_the_cpp_is_faster(attention_by_tiles, monkeypatch):
    (engine, expected), seen, real = attention_by_tiles, [], prefill.tile_length
    monkeypatch.setattr(engine.parts.forms, "of_chunks", lambda *_: None)
    monkeypatch.setattr(prefill, "tile_length", lambda *a: seen.append(real(*a)) or seen[-1])
    assert engine.prefill_whole(0, random_ids(1, 40)[0].tolist()).isfinite().all()
    assert set(seen) == {expected}


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_experts_are_multiplied_one_by_one_from_a_number_of_tokens(format, monkeypatch):
    monkeypatch.setattr(tiles, "_are_usable", True)
    experts = small_model(format, **EXPERTS).model.layers[0].mlp.experts
    rng = torch.Generator().manual_seed(0)
    x, expert = random_tensor(6, 64).bfloat16(), torch.stack([torch.randperm(16, generator=rng)[:2] for _ in range(6)])
    in_cpp, results = experts.grouped(x, expert), {}
    for limits in [{"dequantized": 6}, {"dequantized": 7}, {"tiles": 6}, {"tiles": 5, "dequantized": 6}]:
        experts.limits = RowLimits(**limits)
        results[tuple(limits.items())] = experts.grouped(x, expert)
    dequantized, below, by_tiles, both = results.values()
    gate_up, plain = (experts.dequantize(layer) for layer in (experts.gate_up_proj, experts.down_proj))
    inner = torch.einsum("ne,ncie->nci", x.float(), gate_up[expert])
    gate, up = inner.chunk(2, dim=-1)
    expected = torch.einsum("nci,ncei->nce", torch.nn.functional.silu(gate) * up, plain[expert])
    for y in (in_cpp, dequantized, by_tiles):
        assert_near(y, expected, torch.bfloat16)
    assert torch.equal(below, in_cpp) and torch.equal(both, dequantized) and not torch.equal(dequantized, in_cpp)
    with pytest.raises(ValueError, match="is not one of the 16 experts'"):
        experts.grouped(x, expert + 15)


@pytest.mark.parametrize("won", [DEQUANTIZED, TILES, CPP])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_engine_multiplies_experts_in_the_faster_form(won, is_first, faster, uncompiled, monkeypatch):
    monkeypatch.setattr(tiles, "are_announced", lambda: True)
    monkeypatch.setattr(tiles, "_are_usable", True)
    monkeypatch.setenv(forms.VARIABLE, "first" if is_first else "measured")
    faster(won)
    model = small_model("int4", **EXPERTS)
    engine = small_engine(model)
    choices = {label: choice for label, choice in engine.parts.forms.choices.items() if label.startswith("experts")}
    assert next(iter(choices)) == "experts int4/int4, 32 rows, 2 of 16 experts, 64 x 64" and len(choices) == len(ROWS)
    assert {choice.name for choice in choices.values()} == {CPP if is_first else won}
    calls = []
    real = experts_operation.experts_one_by_one
    monkeypatch.setattr(experts_operation, "experts_one_by_one", lambda *a: calls.append(a[-1]) or real(*a))
    ids = random_ids(1, 40)[0].tolist()
    assert engine.prefill_whole(0, ids).isfinite().all()
    assert bool(calls) == (won != CPP and not is_first)


@pytest.mark.parametrize(
    ("limits", "sdpa_from", "expected"),
    [
        (RowLimits(), (), Tiles.NONE),
        (RowLimits(tiles=64), (), Tiles.BFLOAT16),
        (RowLimits(tiles=65), (), Tiles.NONE),
        (RowLimits(int8_tiles=64, tiles=65), (), Tiles.INT8),
        (RowLimits(int8_tiles=32, tiles=64), (), Tiles.BFLOAT16),
        (RowLimits(int8_tiles=64, tiles=32), (), Tiles.INT8),
        (RowLimits(dequantized=64), (), None),
        (RowLimits(tiles=32, dequantized=65), (), Tiles.BFLOAT16),
        (RowLimits(), (NEVER, 100, NEVER), None),
        (RowLimits(), (0, 101, 0), Tiles.NONE),
    ],
)
def test_chunks_run_in_one_operation_where_no_form_of_pytorch_s_is_faster(limits, sdpa_from, expected, monkeypatch):
    monkeypatch.setattr(tiles, "_are_usable", True)
    chosen = small_engine(small_model(), forms="first").parts.forms
    chosen.sdpa_from = sdpa_from
    for layers in chosen._layers.values():
        for layer in layers:
            layer.limits = limits
    assert chosen.of_chunks(64, 64, 100) == expected
    layers[0].limits = layers[-1].limits = RowLimits(dequantized=64)
    assert chosen.of_chunks(64, 64, 100) is None


BY_INT8, BY_TILES, DEQUANTIZED_FIRST = RowLimits(int8_tiles=32), RowLimits(tiles=32), RowLimits(dequantized=32)


@pytest.mark.parametrize(
    ("of_int8", "other", "of_other", "expected"),
    [
        (BY_INT8, "fp8", BY_TILES, Tiles.INT8),  # fp8 has no tiles of int8
        (BY_INT8, "int4", BY_INT8, Tiles.INT8),
        (BY_INT8, "int4", BY_TILES, None),
        (BY_TILES, "int4", BY_INT8, None),
        (BY_TILES, "int4", BY_TILES, Tiles.BFLOAT16),
        (BY_INT8, "fp8", RowLimits(), None),
        (RowLimits(), "int4", BY_TILES, None),
        (BY_INT8, "fp8", DEQUANTIZED_FIRST, None),
    ],
)
def test_chunks_of_two_formats_run_in_one_operation_where_it_has_both_forms(
    of_int8, other, of_other, expected, monkeypatch
):
    monkeypatch.setattr(tiles, "are_announced", lambda: True)
    monkeypatch.setattr(tiles, "_are_usable", True)
    model = small_model("int8")
    gate_proj = small_model(other).model.layers[0].mlp.gate_proj
    for block in model.model.layers:
        block.mlp.gate_proj = gate_proj
    chosen = small_engine(model, forms="first").parts.forms
    for what, limits in ((LINEAR_WORK + "int8", of_int8), (LINEAR_WORK + other, of_other)):
        for layer in chosen._layers[what]:
            layer.limits = limits
    assert chosen.of_chunks(64, 64, 100) is expected


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([TILES, TILES, INT8_TILES], RowLimits(tiles=32, int8_tiles=512)),
        ([INT8_TILES, TILES, TILES], RowLimits(int8_tiles=32, tiles=128)),
        ([CPP, DEQUANTIZED, INT8_TILES], RowLimits(dequantized=128, int8_tiles=512)),
        ([INT8_TILES, TILES, INT8_TILES], RowLimits(tiles=32, int8_tiles=512)),
        ([TILES, CPP, LINEAR], RowLimits(dequantized=512)),
        ([TILES, TILES, CPP], RowLimits()),
    ],
)
def test_each_form_of_products_serves_from_a_number_of_rows(chosen, expected):
    limits = row_limits(list(zip(ROWS, chosen, strict=True)))
    assert limits == expected
    fields = [FIELDS.get(name) for name in chosen]
    if chosen != [INT8_TILES, TILES, INT8_TILES] and CPP not in chosen[1:]:
        assert [limits.form_at(rows) for rows in ROWS] == fields
        assert limits.form_at(10**6) == fields[-1] and limits.form_at(31) is None


def test_tiles_that_were_refused_are_no_form(monkeypatch):
    monkeypatch.setattr(tiles, "usable_levels", lambda: ())
    monkeypatch.setattr(tiles, "processor_features", lambda: "amx_tile amx_bf16 amx_int8")
    monkeypatch.setattr(tiles, "functions", lambda: SimpleNamespace(qwen3fast_try_tiles=lambda: False))
    for name in ("_are_usable", "_are_refused"):
        monkeypatch.setattr(tiles, name, False)
    chosen = small_engine(small_model(), forms="first").parts.forms
    assert any(TILES in case.names for case in chosen._cases)
    tiles.try_tiles()
    chosen.decide(may_measure=False)
    assert chosen._cases and not any(TILES in case.names for case in chosen._cases)


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("won", [TILES, CPP, BLOCKS])
def test_decode_steps_are_multiplied_by_tiles_where_that_is_faster(format, won, faster, uncompiled, monkeypatch):
    monkeypatch.setattr(tiles, "are_announced", lambda: True)
    monkeypatch.setattr(tiles, "_are_usable", True)
    faster(won)
    engine, kinds = small_engine(small_model(format, vocab_size=96), rows=8), []
    chosen, all_rows = engine.parts.forms, {1, 2, 4, 8}
    by_tiles = format is None and won == TILES
    assert chosen.tile_rows == (all_rows if by_tiles else set())
    assert chosen.block_rows == (all_rows if won == BLOCKS else set())
    for name in ("__call__", "logits", "choose"):  # the last argument of each
        real = getattr(DecodeLayers, name)
        monkeypatch.setattr(DecodeLayers, name, lambda *a, real=real: kinds.append(a[-1]) or real(*a))
    for is_whole in (False, True):
        monkeypatch.setattr(engine.parts.decode_layers, "runs_steps", is_whole)
        engine.decode(2, 1, StepKind())
        engine.decode(2, 1, StepKind(has_logprobs=True))
    assert kinds == ([] if won == BLOCKS else [Tiles.BFLOAT16 if by_tiles else Tiles.NONE] * 4)
    monkeypatch.setattr(tiles, "_are_usable", False)
    assert chosen.of_steps(2) is chosen.of_steps(3) is Tiles.NONE


def test_tiles_are_the_first_form_of_decode_steps_of_many_rows(has_tiles, faster):
    faster(CPP)
    pinned = small_engine(small_model(), rows=12, forms="first").parts.forms
    assert pinned.tile_rows == ({8, 12} if has_tiles else set())
    assert small_engine(small_model(), rows=12).parts.forms.tile_rows == set()


@pytest.mark.parametrize("options", [{"forms": "first"}, {}])
def test_the_first_forms_are_used_where_they_are_faster_or_pinned(options, has_tiles, faster):
    faster(*([SDPA, DEQUANTIZED, BLOCKS] if options else [TILES, CPP]))
    engine = small_engine(small_model("int8"), **options)
    assert (engine.parts.forms.sdpa_from, engine.parts.forms.block_rows) == ((), frozenset())
    assert engine.parts.forms.tiles_from == ((0, 0, NEVER) if has_tiles else ())
    limits = RowLimits(tiles=ROWS[0]) if has_tiles else RowLimits()
    assert engine.model.model.layers[0].mlp.down_proj.limits == limits


def test_an_engine_that_compiles_nothing_has_no_other_form_than_the_cpp(has_tiles, faster):
    faster(SDPA, TILES, DEQUANTIZED, BLOCKS)
    engine = small_engine(small_model("int8"), compile=False)
    chosen = engine.parts.forms
    assert (chosen.sdpa_from, chosen.tiles_from, chosen.block_rows, chosen.choices) == ((), (), frozenset(), {})
    assert engine.model.model.layers[0].mlp.down_proj.limits == RowLimits()


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("chosen", [(CPP,), (SDPA, DEQUANTIZED, BLOCKS)])
def test_the_chosen_forms_run_and_give_the_plain_logits(format, chosen, faster, uncompiled, monkeypatch):
    faster(*chosen)
    calls = []
    spied = [(prefill, "sdpa_prefill"), (cpu.ops, "dequantized_linear"), (DecodeLayers, "__call__")]
    for owner, name in spied:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    model = small_model(format)
    ids = random_ids(1, 40)[0].tolist()
    engine, plain = small_engine(model), small_engine(model, compile=False)
    logits = engine.prefill_whole(0, ids)
    assert_near(logits, plain.prefill_whole(0, ids), torch.bfloat16)
    engine.sample_first(0, logits, StepKind())
    engine.set_row(0, 40)
    engine.decode(1, 41, StepKind())
    expected = {"__call__"} if chosen[0] == CPP else {"sdpa_prefill", *(["dequantized_linear"] if format else [])}
    assert set(calls) == expected


def test_auto_measures_in_the_background_and_uses_it_from_the_next_warmup_or_engine(faster, uncompiled, has_tiles):
    faster(SDPA, DEQUANTIZED, BLOCKS)
    model = small_model()
    engine = small_engine(model, compile="auto")
    parts, choices = engine.parts, engine.parts.forms.choices
    assert {choice.reason for choice in choices.values()} == {"not measured yet"}
    first = {label: choice.name for label, choice in choices.items()}
    assert set(first.values()) == ({TILES, CPP} if has_tiles else {CPP})
    ids = random_ids(1, 40)[0].tolist()
    before = engine.prefill_whole(0, ids)
    parts.forms.measure_ahead(1, engine.compiler.quiet)  # what the thread does behind its first compilation
    assert {choice.reason for choice in choices.values()} == {WAITING}
    assert {label: choice.name for label, choice in choices.items()} == first
    assert (parts.forms.sdpa_from, parts.forms.block_rows) == ((), frozenset())
    assert torch.equal(engine.prefill_whole(0, ids), before)  # a reply does not change
    other = small_engine(model, compile="auto")
    assert other.parts.forms.sdpa_from == (0, 0, NEVER)
    assert engine.parts.forms.sdpa_from == ()
    engine.warmup()
    assert parts.forms.sdpa_from == (0, 0, NEVER) and parts.forms.block_rows == {1, 2}
    for each in (engine, other):
        each.close()


def test_no_step_runs_while_the_thread_of_auto_measures(faster, uncompiled, monkeypatch):
    engine, seen = small_engine(small_model(), compile="auto"), []
    ids = random_ids(1, 40)[0].tolist()

    def measure(calls):
        step = threading.Thread(target=engine.prefill_whole, args=(0, ids))
        step.start()
        step.join(0.05)
        seen.append(step.is_alive())
        steps.append(step)
        return {name: [1.0] * 3 for name in calls}

    steps: list[threading.Thread] = []
    monkeypatch.setattr(forms, "measure", measure)
    engine.parts.forms._cases = engine.parts.forms._cases[:1]
    engine.parts.forms.measure_ahead(1, engine.compiler.quiet)
    steps[0].join(10)
    assert seen == [True] and not steps[0].is_alive()
    engine.close()


def test_a_busy_machine_keeps_the_first_forms_and_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(forms, "measure", lambda calls: {name: [] for name in calls})
    for compile in (True, "auto"):
        engine = small_engine(small_model(), compile=compile)
        engine.parts.forms.measure_ahead(1, engine.compiler.quiet)
        assert {choice.reason for choice in engine.parts.forms.choices.values()} == {forms.BUSY}
        assert (engine.parts.forms.sdpa_from, engine.parts.forms.block_rows) == ((), frozenset())
        engine.close()
    assert not forms_file.path().exists()


def test_the_thread_of_auto_measures_behind_its_first_compilation(faster, uncompiled):
    faster(
        CPP,
    )
    engine = small_engine(small_model(), compile="auto")
    engine.compiler.auto_from_s = 0
    engine.prefill_whole(0, random_ids(1, 40)[0].tolist())
    engine.compiler.thread.shutdown(wait=True)
    assert {choice.reason for choice in engine.parts.forms.choices.values()} == {WAITING}
    engine.close()


def test_warmup_compiles_again_what_a_changed_choice_is_constant_in(faster, uncompiled):
    faster(SDPA, BLOCKS)
    engine = small_engine(small_model(), compile="auto")
    engine.compiler.auto_from_s = 0
    compiled = engine.parts.prefill_block._forms
    compiled["earlier"] = None
    engine.warmup()
    assert "earlier" not in compiled and compiled
    compiled["kept"] = None
    engine.warmup()  # nothing has changed
    assert "kept" in compiled
    engine.close()


def test_measuring_ends_with_its_budget(faster, monkeypatch):
    faster(SDPA, BLOCKS)
    times = iter(range(1000))
    monkeypatch.setattr("qwen3fast.engine.forms.time.perf_counter", lambda: 0.2 * next(times))
    engine = small_engine(small_model())
    reasons = [choice.reason for choice in engine.parts.forms.choices.values()]
    assert reasons.count("measured now") == 3  # one of attention, one of products, one of decoding
    assert set(reasons) == {"measured now", "not measured yet"}
    assert engine.parts.forms.sdpa_from == (NEVER, NEVER, NEVER) or not engine.parts.forms.sdpa_from


def test_stats_tell_the_choices(faster, has_tiles):
    faster(SDPA)
    with Generator(small_model(), max_seq_len=100) as generator:
        chosen = generator.stats.forms
        choice = chosen["prefill attention, 32 tokens at 128, 4/2 heads of 32, bfloat16"]
        seconds = {CPP: 2.0, SDPA: 1.0} | ({TILES: 2.0} if has_tiles else {})
        assert (choice.name, choice.reason, choice.seconds) == (SDPA, "measured now", seconds)
        assert any(name.startswith("decode, 1 row,") for name in chosen)
    with Generator(small_model(), max_seq_len=100, forms="first") as generator:
        pinned = generator.stats.forms.values()
        assert {choice.reason for choice in pinned} == {"pinned"}
        assert {choice.name for choice in pinned} == ({TILES, CPP} if has_tiles else {CPP})
    with pytest.raises(ValueError, match="forms must be 'measured' or 'first', got 'fast'"):
        Generator(small_model(), forms="fast")


def test_compiled_code_with_all_second_forms_gives_the_plain_logits(faster):
    faster(SDPA, DEQUANTIZED, BLOCKS)
    model = small_model("int8")
    ids = random_ids(1, 40)[0].tolist()
    engine, plain = small_engine(model, rows=1), small_engine(model, compile=False, rows=1)
    assert_near(engine.prefill_whole(0, ids), plain.prefill_whole(0, ids), torch.bfloat16)
    compiled = engine.compiler.compilations
    engine.prefill_whole(0, ids * 3)
    assert engine.compiler.compilations == compiled  # another class of chunks, the same code
