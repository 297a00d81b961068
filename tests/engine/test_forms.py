"""How many forms a step is compiled into, and that they serve every chunk, bucket and batch: with the code as
`torch.compile` traces it, but run uncompiled, which takes no time.

For CUDA devices tensors have no memory ("meta") and the sizes of released models.
"""

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import engine_of, randomized, small_config
from torch import nn

from qwen3fast.engine import Engine, StepKind
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.dynamic_sizes import Dynamic
from qwen3fast.engine.fast_layers import use_fast_layers
from qwen3fast.engine.parts import (
    CHUNK_SIZES,
    MAX_ELEMENTS,
    MAX_TOKENS,
    Forward,
    Parts,
    _max_uncached,
    chunk_sizes,
    row_ranges,
)
from qwen3fast.engine.prefill import max_prompts, prefill_chunk
from qwen3fast.engine.state import DecodeState
from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.cpu.structures import RowLimits
from qwen3fast.kernels.linear import Linear
from qwen3fast.model import build_on_meta, rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.model.stacking import STACKS, stack, stack_layers
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.sampling.processors import ProcessorRows
from qwen3fast.sampling.samplers import SamplerKind

CPU, META = torch.device("cpu"), torch.device("meta")
ROWS = 6
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "hidden_size": 64}


def prefill(engine, size, start, prompts=1, length=None):
    row_B, token_BT = (
        torch.zeros(*shape, dtype=torch.int64, device=engine.cos_SD.device) for shape in ((prompts,), (prompts, size))
    )
    forward = Forward(engine.model, engine.parts, engine.cache, engine.cos_SD, engine.sin_SD)
    prefill_chunk(forward, row_B, token_BT, start, length)


def prefill_together(engine, size, prompts):
    """Several prompts: where attention needs a mask, it reads as many positions as the longest has."""
    is_cpu = engine.cos_SD.device.type == "cpu"
    for start in (0, 37) if is_cpu else (0,):  # elsewhere shapes do not tell where prompts begin
        start_B = torch.full((prompts,), start, dtype=torch.int64, device=engine.cos_SD.device)
        length = start + size if is_cpu else None
        prefill(engine, size, start_B, prompts, length)


def decode(engine, rows, length, sampler=SamplerKind.GREEDY):
    forward = Forward(engine.model, engine.parts, engine.cache, engine.cos_SD, engine.sin_SD)
    decode_step(forward, engine.state, rows, length, sampler)


def run_everything(engine, samplers=tuple(SamplerKind)):
    """Every chunk size, also behind tokens that are there already; every batch, bucket and sampler; no cache."""
    is_cpu = engine.cos_SD.device.type == "cpu"
    for size in chunk_sizes(engine.cos_SD.device):
        for start in (0, 1, 37, engine.cache.allocated_len - size)[:: 1 if is_cpu else 3]:
            prefill(engine, size, start)
        for prompts in range(2, max_prompts(size, ROWS) + 1):
            prefill_together(engine, size, prompts)
    for rows in range(1, ROWS + 1):
        for length in engine.cache.buckets[:: 3 if rows > 1 else 1]:
            decode(engine, rows, length)
        for sampler in samplers:
            decode(engine, rows, engine.cache.buckets[0], sampler)


def on_meta(size, quantization, cache_dtype=torch.bfloat16):
    """Return the parts of an engine that a step on a CUDA device uses."""
    config = replace(ModelConfig.named(size), num_hidden_layers=2)
    model = build_on_meta(config)
    if quantization is not None:
        quantize_model(model, quantization, config.dtype)
    cache = StaticKVCache(config, ROWS, 1024, cache_dtype, META)
    compiler = StepCompiler(True, META)
    cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, META)
    parts, state = Parts.build(compiler, model, cache), DecodeState.allocate(ROWS, META)
    return SimpleNamespace(
        model=model, parts=parts, cache=cache, state=state, cos_SD=cos_SD, sin_SD=sin_SD, compiler=compiler
    )


@pytest.mark.parametrize(
    ("size", "quantization", "cache_dtype"),
    [
        ("0.6b", None, torch.bfloat16),
        ("8b", "int4", torch.int8),
        ("30b-a3b", "fp8", torch.bfloat16),  # int8 differs in one argument of the same operations
    ],
)
def test_on_cuda_the_forms_of_one_chunk_and_two_batches_serve_all(size, quantization, cache_dtype, graphs, monkeypatch):
    pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.setenv("QWEN3FAST_FUSED_STEP", "0")
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "meta")
    monkeypatch.setattr(cuda, "_has_flash", True)
    monkeypatch.setattr("qwen3fast.kernels.attention.attend", None)  # not to be called: it needs the length
    # Samplers are the same functions for every model: one suffices.
    samplers = tuple(SamplerKind) if quantization is None else (SamplerKind.GREEDY,)
    with torch.no_grad():
        engine = on_meta(size, quantization, cache_dtype)
        assert not engine.parts.needs_mask
        later = torch.zeros(1, dtype=torch.int64, device=META)  # where a captured chunk begins
        prefill(engine, 32, 0)
        prefill(engine, 32, later)
        prefill_together(engine, 32, 2)
        for rows in (1, 2):
            for sampler in samplers:
                decode(engine, rows, 128, sampler)
        # Blocks for a prompt's first chunk, a later one, and chunks of several prompts. For steps of one row and of
        # more: embedding, block, logits, the rest, and two samplers, or one.
        assert engine.compiler.compilations == len(graphs) == 3 + 2 * (4 + min(len(samplers), 2))
        with torch.compiler.set_stance("fail_on_recompile"):
            run_everything(engine, samplers)
            for size in CHUNK_SIZES:
                prefill(engine, size, later)
    assert engine.compiler.compilations == len(graphs)


class Recorder:
    """Makes a graph of a step by running it, as capture does."""

    def warm_up(self, step):
        step()

    def record(self, step):
        step()
        return step


@pytest.fixture
def on_cuda(monkeypatch):
    """Return a function that makes a whole engine as for CUDA devices, on tensors without memory."""
    triton = pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # the fused step asks for a CUDA device or this
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "meta")
    monkeypatch.setattr(cuda, "_has_flash", True)
    monkeypatch.setattr("qwen3fast.engine.engine.move_to_huge_pages", lambda *_: None)
    monkeypatch.setattr("qwen3fast.engine.fused_step.compile_ahead", lambda steps: steps())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [0] * len(tensor))  # no numbers to read

    def make(size, rows, length, fused, quantization=None):
        monkeypatch.setenv("QWEN3FAST_FUSED_STEP", "1" if fused else "0")
        config = replace(ModelConfig.named(size), num_hidden_layers=2)
        model = build_on_meta(config)
        if quantization is not None:
            quantize_model(model, quantization, config.dtype)
        engine = Engine(model, StaticKVCache(config, rows, length, torch.bfloat16, META), META)
        engine.compiler._is_cuda = True
        engine._use_graphs(GraphCache(Recorder()))
        engine.in_flight = MagicMock()
        return engine

    return make


@pytest.mark.parametrize(
    ("rows", "fused", "forms", "captured"),
    [(1, True, 6, 13), (8, True, 11, 28), (1, False, 11, 13), (8, False, 21, 28), (16, True, 13, 31)],
)
def test_on_cuda_warmup_makes_all_forms_and_graphs(rows, fused, forms, captured, on_cuda, graphs):
    """Of prompts for one and for several, of steps for one row and for more.

    Kernels are tuned for blocks of steps of one row alone.
    """
    engine = on_cuda("0.6b", rows, 4096, fused)
    assert (engine.parts.fused_step is not None) == fused
    page = (Path(__file__).parents[2] / "docs" / "how_it_works" / "compilation.md").read_text(encoding="utf-8")
    assert not fused or f"\n| {rows} | {forms} | {captured} |\n" in page
    engine.warmup()
    assert (engine.compiler.compilations, len(engine.graphs)) == (forms, captured)
    blocks = [[node.target for node in graph.graph.nodes].count(F.linear) for graph in graphs]
    assert set(blocks) - {0, 1} == {4}  # products: of query, key and value; of gate and up; and two more
    assert len(graphs) == forms and graphs.tuned == (not fused)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in CHUNK_SIZES:
            for prompts in range(2, engine.max_prompts(size) + 1):
                engine.prefill_together([engine.begin_prefill(row, [0] * size) for row in range(prompts)])
            for prompt in (size, 4096 - size, 700 + size):
                engine.prefill_whole(0, [0] * prompt)
        for batch in range(1, rows + 1):
            for sampler in SamplerKind:
                for used in (1, 128, 129, 4096):
                    engine.decode(batch, used, StepKind(sampler))
        assert (engine.compiler.compilations, len(engine.graphs)) == (forms, captured)
        for batch in range(1, rows + 1):  # captured at the first request that needs it
            engine.decode(batch, 128, StepKind(is_processed=True, has_logprobs=True))
    assert engine.compiler.compilations == len(graphs) == forms


@pytest.mark.parametrize(
    ("dtype", "quantization", "changes"),
    [
        (torch.float32, None, {}),
        (torch.bfloat16, None, {"head_dim": 32}),
        (torch.bfloat16, "int4", EXPERTS | {"head_dim": 32}),
    ],
    ids=["float32", "bfloat16", "int4 experts"],
)
def test_on_cpus_the_forms_of_warmup_serve_all(dtype, quantization, changes, graphs, monkeypatch, one_thread):
    for served in ("serves", "serves_chunks"):
        monkeypatch.setattr(f"qwen3fast.engine.decode_layers.DecodeLayers.{served}", lambda self, rows: False)
    config = small_config(max_position_embeddings=1024, num_hidden_layers=3, dtype=dtype, **changes)
    model = randomized(config).to(dtype)
    if quantization is not None:
        quantize_model(model, quantization, dtype)
    engine = engine_of(model, ROWS, 1024, compile=True)
    engine.warmup()
    forms = engine.compiler.compilations
    batches = 1 + len(row_ranges(config, CPU, ROWS))
    # Block, and logits in float32, for each range of batches; blocks for one prompt, and for several.
    plain = 0 if cpu.is_loaded() else len(SamplerKind) + 1  # samplers and processors
    assert forms == len(graphs) == 2 + batches * (1 + (dtype == torch.float32) + plain)
    assert batches == 3
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        run_everything(engine)
        for rows in range(1, ROWS + 1):
            neutral = ProcessorRows.neutral(rows, config.vocab_size, CPU)
            engine.parts.processors(None, torch.zeros(rows, config.vocab_size), *neutral)
        for row in range(ROWS):  # a row's first token
            engine.sample_first(row, torch.zeros(1, config.vocab_size), StepKind(SamplerKind.WINDOW))
            engine.sample_first(list(range(row + 1)), torch.zeros(row + 1, config.vocab_size), StepKind())
    assert engine.compiler.compilations == len(graphs) == forms


@pytest.mark.parametrize("limits", [RowLimits(), RowLimits(dequantized=128)], ids=["C++", "F.linear from 128 rows"])
def test_blocks_of_prompts_are_compiled_only_where_the_operation_does_not_serve_all(limits, graphs, monkeypatch):
    if not cpu.load():
        pytest.skip("no compiler for the C++ operations on this machine")
    monkeypatch.setattr("qwen3fast.engine.forms.Forms.decide", lambda self, may_measure: False)
    config = small_config(max_position_embeddings=1024, num_hidden_layers=3, dtype=torch.bfloat16, head_dim=32)
    engine = engine_of(randomized(config).bfloat16(), ROWS, 1024, compile=True)
    for layer in engine.model.model.layers.modules():
        if isinstance(layer, Linear):
            layer.limits = limits
    engine.warmup()
    assert len(engine.parts.prefill_block._forms) == (0 if limits == RowLimits() else 2)
    count = len(graphs)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for size in chunk_sizes(CPU):
            prefill(engine, size, 0)
            for prompts in range(2, max_prompts(size, ROWS) + 1):
                prefill_together(engine, size, prompts)
    assert len(graphs) == count


def test_without_a_cache_one_form_serves_all_lengths(graphs, one_thread):
    config = small_config(num_hidden_layers=3, max_position_embeddings=1024)
    engine = engine_of(randomized(config), 1, 1024, compile=True)
    engine.logits_uncached([1])
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (2, 16, 17, 96, 500, 1024):
            engine.logits_uncached([1] * length)
    assert len(graphs) == 2  # block, logits


def test_engines_of_other_sizes_use_what_inductor_kept_of_earlier_ones(one_thread):
    """Ranges that depend on the engine made the code of one violate the ranges of the next."""
    config = small_config(num_hidden_layers=2, max_position_embeddings=1024)
    model = randomized(config)
    expected_V = model(torch.arange(300)[None] % config.vocab_size)[0, -1]
    for rows, length in ((3, 128), (8, 384), (2, 64)):
        engine = engine_of(model, rows, length, compile=True)
        engine.logits_uncached([1] * 40)
        for batch in {2, rows}:
            neutral = ProcessorRows.neutral(batch, config.vocab_size, CPU)
            engine.parts.processors(None, torch.zeros(batch, config.vocab_size), *neutral)
            engine.parts.logits(engine.parts.head, torch.zeros(batch, 1, config.hidden_size))
        if length >= 300:
            found_V = engine.logits_uncached([i % config.vocab_size for i in range(300)])[0]
            torch.testing.assert_close(found_V, expected_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [{"intermediate_size": 25_600}, {"num_attention_heads": 64, "head_dim": 512}])
def test_products_of_long_uncached_texts_are_counted_in_32_bits(sizes):
    model = build_on_meta(small_config(num_hidden_layers=1, **sizes))
    block = model.model.layers[0]
    stacked = [stack([getattr(block.get_submodule(part), name) for name in names]) for part, names in STACKS.items()]
    widths = [len(weights["weight"]) for weights in stacked]
    assert MAX_TOKENS > _max_uncached(model.config) == MAX_ELEMENTS // max(widths)


@pytest.mark.parametrize("attention_bias", [False, True])
def test_stacked_layers_are_one_product_in_compiled_code(attention_bias, graphs, one_thread):
    """With biases the attention's layers are not stacked."""
    model = randomized(small_config(num_hidden_layers=3, attention_bias=attention_bias))
    expected_1V = engine_of(model, 1, 128).logits_uncached([1, 2, 3])
    stack_layers(model)
    torch.testing.assert_close(engine_of(model, 1, 128).logits_uncached([1, 2, 3]), expected_1V)
    compiled_1V = engine_of(model, 1, 128, compile=True).logits_uncached([1, 2, 3])
    torch.testing.assert_close(compiled_1V, expected_1V, rtol=1e-4, atol=1e-4)
    block, _ = graphs
    assert [node.target for node in block.graph.nodes].count(F.linear) == (6 if attention_bias else 4)


@pytest.mark.parametrize("change", [nn.Module.double, copy.deepcopy])
def test_a_model_that_is_converted_or_copied_leaves_its_stacked_weights(change):
    model = randomized(small_config(num_hidden_layers=1))
    use_fast_layers(model)
    stack_layers(model)
    old = weakref.ref(model.model.layers[0].self_attn.q_proj.stacked)
    model = change(model)
    assert old() is None
    attention, weight = model.model.layers[0].self_attn, model.model.norm.weight
    with torch.no_grad():
        attention.v_proj.weight.mul_(2)
    x_1TE, tables = torch.randn(1, 3, len(weight), dtype=weight.dtype), torch.zeros(2, 1, 3, model.config.head_dim)
    compiled = torch.compile(attention, backend="eager")
    torch.testing.assert_close(compiled(x_1TE, *tables), attention(x_1TE, *tables))


@pytest.mark.parametrize(
    ("max_rows", "experts", "expected"),
    [
        (1, {}, []),
        (2, {}, []),
        (3, {}, [(2, 3)]),
        (15, {}, [(2, 4), (5, 15)]),
        (40, {}, [(2, 4), (5, 40)]),
        (40, EXPERTS | {"num_experts": 64, "num_experts_per_tok": 8}, [(2, 4), (5, 8), (9, 40)]),
    ],
)
def test_ranges_of_rows_end_where_another_product_begins(max_rows, experts, expected):
    ranges = row_ranges(small_config(**experts), CPU, max_rows)
    assert [(size.min, size.max) for size in ranges] == expected
    assert all(size.min < size.example <= size.max for size in ranges)


@pytest.mark.parametrize(
    ("size", "slots", "expected"),
    [("0.6b", 128, [(2, 64), (65, 128)]), ("30b-a3b", 128, [(2, 64), (65, 85)]), ("235b-a22b", 64, [(2, 21)])],
)
def test_on_cuda_compiled_code_can_count_the_weights_of_a_steps_experts(size, slots, expected, monkeypatch):
    """In 32 bits, or `torch.compile` refuses the range; more rows have a form for their own number."""
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "meta")
    config = replace(ModelConfig.named(size), num_hidden_layers=1)
    model, cache = build_on_meta(config), StaticKVCache(config, slots, 32, torch.bfloat16, META)
    parts = Parts.build(StepCompiler(True, META), model, cache)
    [rows] = parts.decode_block.dynamic[0].values()
    assert [(each.min, each.max) for each in rows] == expected
    if config.num_experts:
        active = torch.zeros(config.num_experts_per_tok, dtype=torch.int64, device=META)
        gathered = model.model.layers[0].mlp.experts.gate_up_proj[active].numel()  # of one row
        assert rows[-1].max * gathered <= MAX_ELEMENTS < (rows[-1].max + 1) * gathered


@torch.no_grad()
def test_ranges_of_one_function_do_not_meet_in_inductors_cache():
    """Code of one range came back for the other, with the wrong guard."""
    for most in (128, 384, 64):
        compiler = StepCompiler(True, CPU)
        part = compiler.part(lambda _, x: (x @ x.mT).relu(), dynamic=({1: (Dynamic(41, 16, most),)},))
        for size in (16, 41, most):
            x = torch.ones(1, size, 3)
            assert torch.equal(part(None, x), (x @ x.mT).relu())
        assert compiler.compilations == 1


@torch.no_grad()
def test_strides_that_are_not_those_of_a_new_tensor_have_a_form_of_their_own(graphs):
    """Even of single rows, where they tell nothing."""
    compiler = StepCompiler(True, CPU)
    part = compiler.part(lambda _, x: x * 2, dynamic=({1: (Dynamic(11),)},))
    table = torch.ones(40, 3)
    part(None, table[None, :5].clone(memory_format=torch.contiguous_format))
    assert table[None, :7].stride() == (120, 3, 1) and table[None, :7].is_contiguous()
    part(None, table[None, :7])
    with torch.compiler.set_stance("fail_on_recompile"):
        part(None, table[None, :7])
        part(None, torch.ones(1, 30, 3))
    assert compiler.compilations == len(graphs) == 2


@torch.no_grad()
def test_a_form_that_is_compiled_again_is_noticed(graphs):
    """The tests above can fail."""
    factor = [2.0]
    part = StepCompiler(True, CPU).part(lambda _, x: x * factor[0])
    part(None, torch.ones(3))
    factor[0] = 3.0
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        part(None, torch.ones(3))
    part(None, torch.ones(3))
    assert len(graphs) > 1
