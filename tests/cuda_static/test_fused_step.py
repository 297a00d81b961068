"""The whole fused decode step of a small model against the plain decode step, and what it launches."""

from dataclasses import replace

import pytest
import torch
from conftest import engine_of, fill_randomly, randomized, small_config
from cuda_static.capture_rules import HostWatch, capture_faults
from cuda_static.fake_cuda import fake_cuda, fake_model
from cuda_static.program_order import watch_programs
from kernel_device import DEVICE
from torch import nn

from qwen3fast.engine import Engine
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.fused_step import MAX_ROWS, FusedDecodeStep, _obstacle
from qwen3fast.engine.parts import Forward, Parts
from qwen3fast.engine.state import DecodeState, RowSampling, StepKind
from qwen3fast.kernels import cuda
from qwen3fast.kernels.cuda import split_attention
from qwen3fast.kernels.cuda.decode_step import attention, linear, tail
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.model.stacking import STACKS, can_stack, stack
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.quantization.ordered import OrderedLinear
from qwen3fast.sampling.samplers import SamplerKind

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread")]

PROMPTS = ([1], list(range(2, 72)))
BLOCKS = FORMATS["fp8"].with_blocks()


def make_model(quantization=None, **changes) -> Qwen3:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 80, "max_position_embeddings": 160}
    model = randomized(small_config(**{**sizes, "tie_word_embeddings": False, **changes}))
    if quantization is not None:
        quantize_model(model, BLOCKS if quantization == "fp8-block" else quantization, torch.float32)
    return model.to(DEVICE)


def make_engine(model, cache_dtype=torch.float32, rows=2) -> Engine:
    """An engine whose first two rows hold prompts; a third one is empty."""
    engine = engine_of(model, rows, 120, cache_dtype)
    for row, prompt in enumerate(PROMPTS[:rows]):
        engine.set_row(row, len(prompt))
        engine.sample_first(row, engine.prefill_whole(row, prompt), StepKind())
        engine.set_row(row, len(prompt))
    return engine


def greedy(fused, engine, rows):
    """One fused greedy step on the engine's state. Returns the tokens."""
    s = engine.state
    own = [t[:rows] for t in (s.input_R, s.position_R, s.advance_R, s.output_R, s.step_R)]
    fused.greedy(own[0], engine.cos_SD, engine.sin_SD, *own[1:])
    return own[3].tolist()


def tensors_of(engine):
    return [*engine.cache.tensors(), *vars(engine.state).values()]


@pytest.mark.parametrize(
    ("quantization", "cache_dtype", "changes"),
    [
        (None, torch.float32, {}),
        (None, torch.int8, {"head_dim": 64, "num_key_value_heads": 1}),
        (None, torch.float32, {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 97}),
        ("int8", torch.float32, {"num_hidden_layers": 1}),
        ("int4", torch.int8, {"num_hidden_layers": 1, "tie_word_embeddings": True}),
        ("fp8", torch.float32, {"num_hidden_layers": 1}),
        ("fp8-block", torch.float32, {"num_hidden_layers": 1, "hidden_size": 160}),
        ("fp8-block", torch.int8, {"num_hidden_layers": 1, "tie_word_embeddings": True}),
        ("uint4", torch.float32, {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    ],
)
def test_greedy_steps_give_the_plain_tokens(quantization, cache_dtype, changes, monkeypatch):
    monkeypatch.setattr("qwen3fast.quantization.layers.can_use_operations", lambda *_: False)  # these round x
    engine = make_engine(make_model(quantization, **changes), cache_dtype, rows=3)
    before = [t.clone() for t in tensors_of(engine)]
    plain = [engine.decode(3, 80, StepKind())[:2] for _ in range(2)]
    expected = [t.clone() for t in tensors_of(engine)]
    for tensor, old in zip(tensors_of(engine), before, strict=True):
        tensor.copy_(old)
    fused = FusedDecodeStep(engine.model, engine.cache)
    assert fused.obstacle == "" and fused.serves(3)
    conflicts = watch_programs(monkeypatch) if DEVICE == "cpu" else []
    assert [greedy(fused, engine, 3)[:2] for _ in range(2)] == plain
    assert conflicts == []
    # Tokens that never change would show little; a tied model as small as this one repeats its input.
    assert engine.model.config.tie_word_embeddings or len({tuple(tokens) for tokens in plain}) > 1
    for new, old in zip(tensors_of(engine), expected, strict=True):
        if new.dim() == 1:  # the state, of the rows in use
            assert torch.equal(new[:2], old[:2])
        elif new.dtype == torch.int8:  # a half may go either way
            assert (new[:2, :, :-1].int() - old[:2, :, :-1].int()).abs().max() <= 1
        else:
            torch.testing.assert_close(new[:2, :, :-1], old[:2, :, :-1], rtol=1e-4, atol=1e-4)


def test_logits_equal_the_plain_ones():
    engine = make_engine(make_model())
    fused, rows = FusedDecodeStep(engine.model, engine.cache), len(PROMPTS)
    position, token = engine.state.position_R.clone(), engine.state.input_R.clone()
    logits = fused.logits(token, engine.cos_SD, engine.sin_SD, position)
    for row, prompt in enumerate(PROMPTS):
        expected = engine.model(torch.tensor([[*prompt, int(token[row])]], device=DEVICE))[:, -1]
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert logits.shape == (rows, engine.model.config.vocab_size)


@pytest.mark.parametrize("kind", [StepKind(), StepKind(SamplerKind.FULL)], ids=["greedy", "sampled"])
def test_an_engine_gives_the_same_tokens_with_it(kind):
    temperature = 0.0 if kind == StepKind() else 0.8
    tokens, lengths = [], []
    for is_fused in (False, True):
        engine = make_engine(make_model(num_hidden_layers=1))
        for row, prompt in enumerate(PROMPTS):
            engine.set_row(row, len(prompt), RowSampling(temperature, top_p=0.9, seed=row))
        assert engine.parts.fused_step is None  # on the CPU nothing has changed
        if is_fused:
            engine.parts = replace(engine.parts, fused_step=FusedDecodeStep(engine.model, engine.cache))
        lengths.append(engine.read_length(2, 80))
        tokens.append([engine.decode(2, 80 + i, kind) for i in range(2)])
        assert engine.state.step_R[:2].tolist() == [2, 2]
    assert tokens[0] == tokens[1]
    assert lengths == [128, 128]


def test_the_graph_of_a_fused_step_serves_every_length():
    engine = make_engine(make_model())
    engine.parts = replace(engine.parts, needs_mask=True)
    engine.cache.buckets = [32, 64, 128]
    assert engine.read_length(2, 20) == 32
    engine.parts = replace(engine.parts, fused_step=FusedDecodeStep(engine.model, engine.cache))
    assert engine.read_length(2, 20) == engine.cache.allocated_len
    assert engine.read_length(MAX_ROWS + 1, 20) == 32


@pytest.mark.parametrize(("value", "is_on"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_switches_it_off(value, is_on, monkeypatch):
    if value is None:
        monkeypatch.delenv("QWEN3FAST_FUSED_STEP", raising=False)
    else:
        monkeypatch.setenv("QWEN3FAST_FUSED_STEP", value)
    assert cuda.use_fused_step() == is_on
    monkeypatch.setenv("QWEN3FAST_FUSED_STEP", "off")
    with pytest.raises(ValueError, match="QWEN3FAST_FUSED_STEP must be '1' or '0', or unset, got 'off'"):
        cuda.use_fused_step()


@pytest.mark.skipif(DEVICE == "cuda", reason="needs no GPU")
@pytest.mark.parametrize("is_on", [True, False])
def test_engines_on_cuda_select_it(is_on, monkeypatch):
    monkeypatch.setenv("QWEN3FAST_FUSED_STEP", str(int(is_on)))
    with fake_cuda() as device:
        config = replace(ModelConfig.named("0.6b"), num_hidden_layers=1)
        model = fake_model(config, device)
        cache = StaticKVCache(config, 16, 256, config.dtype, device)
        parts = Parts.build(StepCompiler(True, device), model, cache)
        assert Parts.build(StepCompiler(False, device), model, cache).fused_step is None
        if not is_on:
            assert parts.fused_step is None and parts.fused_sampler is None
            return
        assert [parts.fused_step.serves(rows) for rows in (1, 8, 16)] == [True, True, False]
        state = DecodeState.allocate(16, device)
        cos_SD, sin_SD = (torch.zeros(cache.allocated_len, config.head_dim, device=device) for _ in range(2))
        with HostWatch() as watch:
            for sampler in (SamplerKind.GREEDY, SamplerKind.FULL):
                decode_step(Forward(model, parts, cache, cos_SD, sin_SD), state, 8, 256, sampler)
            logits = parts.fused_step.logits(state.input_R[:1], cos_SD, sin_SD, state.position_R[:1])
            token = parts.fused_sampler.choose(logits, state.sampler_rows(slice(3, 4)), SamplerKind.WINDOW)
        assert token.shape == (1,) and token.dtype == torch.int64
        assert watch.faults == [] and logits.shape == (1, config.vocab_size)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs no GPU")
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}], ids=["stacked", "with biases"])
def test_a_later_engine_of_the_same_model_moves_no_weights(changes):
    """Graphs that an earlier one has captured, here one that compiles nothing, read them where they are."""
    with fake_cuda() as device:
        config = replace(ModelConfig.named("0.6b"), num_hidden_layers=1, **changes)
        model, places = fake_model(config, device), []
        cache = StaticKVCache(config, 1, 256, config.dtype, device)
        for compile in (False, True):
            parts = Parts.build(StepCompiler(compile, device), model, cache)
            places.append([p.untyped_storage()._cdata for p in model.parameters()])
        assert bool(parts.fused_step.obstacle) == bool(changes)
        assert places[0] == places[1]


# ------------------------------------------------------------------------------------------------------- launches


def count_launches(monkeypatch):
    """A list that each launch's kernel is put into from now on; nothing runs."""
    launched = []
    for module in (attention, linear, tail):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    return launched


@pytest.mark.parametrize("rows", [1, MAX_ROWS])
def test_a_step_launches_six_kernels_a_layer_and_three_beside(rows, monkeypatch):
    config = small_config(num_hidden_layers=28, hidden_size=16, intermediate_size=16)
    model = Qwen3(config)
    fill_randomly(model)
    cache = StaticKVCache(config, MAX_ROWS, 4096, torch.float32, torch.device(DEVICE))
    fused = FusedDecodeStep(model.to(DEVICE), cache)
    launched = count_launches(monkeypatch)
    state = [torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(5)]
    tables = [torch.zeros(cache.allocated_len, config.head_dim, device=DEVICE)] * 2
    fused.greedy(state[0], *tables, *state[1:])
    assert len(launched) == 6 * 28 + 3 <= 175
    assert launched.count("combine_kernel") == 28


def test_a_short_cache_needs_no_combining(monkeypatch):
    model = make_model()
    cache = StaticKVCache(model.config, 1, 40, torch.float32, torch.device(DEVICE), granularity=32)
    for module in (attention, split_attention):
        monkeypatch.setattr(module, "BLOCK", 128)
    fused = FusedDecodeStep(model, cache)
    launched = count_launches(monkeypatch)
    state = [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(5)]
    fused.greedy(state[0], *[torch.zeros(64, model.config.head_dim, device=DEVICE)] * 2, *state[1:])
    assert launched == [
        "embed_kernel",
        *(["linear_kernel", "attention_kernel", "linear_kernel", "linear_kernel", "linear_kernel"] * 2),
        "vocabulary_kernel",
        "choose_kernel",
    ]


@pytest.mark.skipif(DEVICE == "cuda", reason="watches operations on the CPU")
def test_a_step_can_be_captured():
    engine = make_engine(make_model(num_hidden_layers=1), rows=1)
    fused = FusedDecodeStep(engine.model, engine.cache)
    work = fused._workspaces[1]
    workspace = [work.x, work.qkv, work.attended, work.hidden, *work.splits, *work.best, work.logits]
    weights = [t for block in fused._blocks for part in vars(block).values() for t in _tensors(part)]
    weights += [fused._final_norm, *_tensors(fused._embedding), *_tensors(fused._head)]

    def buffers():
        named = {f"state {name}": t for name, t in vars(engine.state).items()}
        every = [*workspace, *weights, *engine.cache.tensors(), engine.cos_SD, engine.sin_SD]
        return named | {f"tensor {i}": t for i, t in enumerate(every)}

    results = {f"state {name}_R" for name in ("input", "output", "position", "step")}
    assert capture_faults(lambda: greedy(fused, engine, 1) and None, buffers, results) == [
        "tolist copies to the host"  # by `greedy` of this test, not by the step
    ]


def _tensors(part):
    return [t for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, torch.Tensor)]


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled for the CPU")
def test_a_step_is_one_graph_for_torch_compile():
    engine = make_engine(make_model(num_hidden_layers=1), rows=1)
    fused, state = FusedDecodeStep(engine.model, engine.cache), engine.state
    arguments = (state.input_R, engine.cos_SD, engine.sin_SD, state.position_R)
    plain = fused.logits(*arguments).clone()
    compiled = torch.compile(fused.logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), plain, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------- what it does not serve


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"attention_bias": True}, "biases"),
        ({"head_dim": 24}, "16, 32, 64 or 128"),
        ({"head_dim": 256}, "16, 32, 64 or 128"),  # would need too much shared memory
        ({"num_attention_heads": 34, "num_key_value_heads": 2}, "at most 16 query heads"),
        (
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            "experts",
        ),
    ],
)
def test_other_models_are_not_served_and_left_as_they_are(changes, part):
    model = make_model(**changes)
    cache = StaticKVCache(model.config, 1, 64, torch.float32, torch.device(DEVICE))
    before = [parameter.data_ptr() for parameter in model.parameters()]
    fused = FusedDecodeStep(model, cache)
    assert part in fused.obstacle and not fused.serves(1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_wrapped_layers_and_other_dtypes_are_not_served():
    model = make_model()
    cache = StaticKVCache(model.config, 1, 64, torch.float32, torch.device(DEVICE))
    model.model.layers[1].self_attn.o_proj = nn.Sequential(model.model.layers[1].self_attn.o_proj)
    assert "among several" in FusedDecodeStep(model, cache).obstacle
    half = StaticKVCache(model.config, 1, 64, torch.float16, torch.device(DEVICE))
    assert "float16" in FusedDecodeStep(make_model(), half).obstacle


def test_weights_with_other_strides_are_not_served():
    """The kernels read a weight row by row."""
    model = make_model()
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.T.contiguous().T, requires_grad=False)
    cache = StaticKVCache(model.config, 1, 64, torch.float32, torch.device(DEVICE))
    assert "other strides" in FusedDecodeStep(model, cache).obstacle


def test_layers_with_an_order_of_channels_are_not_served():
    model = make_model("int4")
    layer = model.model.layers[1].mlp.down_proj
    order_K = torch.arange(layer.in_features, dtype=torch.int32, device=DEVICE)
    model.model.layers[1].mlp.down_proj = OrderedLinear(layer.packed, layer.format, order_K)
    cache = StaticKVCache(model.config, 1, 64, torch.float32, torch.device(DEVICE))
    assert "an order of channels" in FusedDecodeStep(model, cache).obstacle


def test_it_serves_few_rows():
    model = make_model()
    cache = StaticKVCache(model.config, 12, 64, torch.float32, torch.device(DEVICE))
    fused = FusedDecodeStep(model, cache)
    assert [rows for rows in range(1, 13) if fused.serves(rows)] == list(range(1, MAX_ROWS + 1))


# ------------------------------------------------------------------------------------------------ stacked weights


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "uint4", "fp8-block"])
def test_stacked_layers_share_one_weight_and_give_the_same(quantization):
    model, plain = make_model(quantization), make_model(quantization)
    tokens = torch.tensor([[1, 2, 3]], device=DEVICE)
    for block in model.model.layers:
        for part, names in STACKS.items():
            layers = [getattr(block.get_submodule(part), name) for name in names]
            assert can_stack(layers)
            whole = stack(layers)
            again = stack(layers)
            for name, tensor in whole.items():
                parts = [layer.get_parameter(name) for layer in layers]
                assert torch.equal(tensor, torch.cat(parts))
                assert again[name].data_ptr() == tensor.data_ptr() == parts[0].data_ptr()
                assert {p.untyped_storage().data_ptr() for p in parts} == {tensor.data_ptr()}
    assert torch.equal(model(tokens), plain(tokens))
    saved, expected = model.state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[n], expected[n]) for n in saved)


def test_layers_of_different_formats_are_not_stacked():
    mixed = make_model("int8").model.layers[0].self_attn, make_model().model.layers[0].self_attn
    assert not can_stack([mixed[0].q_proj, mixed[1].k_proj])
    assert can_stack([mixed[0].q_proj, mixed[0].k_proj])


def test_layers_whose_bytes_only_the_format_tells_apart_are_not_stacked():
    formats = [make_model(name).model.layers[0].self_attn for name in ("int8", "fp8", "fp8-block")]
    assert formats[0].q_proj.weight_scale.shape == formats[1].q_proj.weight_scale.shape
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not can_stack([formats[one].q_proj, formats[other].k_proj])


def test_prequantized_dense_sizes_are_served():
    for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b"):
        config = ModelConfig.named(size)
        model = build_on_meta(replace(config, num_hidden_layers=1))
        cache = StaticKVCache(replace(config, num_hidden_layers=1), 1, 128, config.dtype, torch.device(DEVICE))
        for together in STACKS.items():
            layers = [getattr(model.model.layers[0].get_submodule(together[0]), n) for n in together[1]]
            assert can_stack(layers)
        assert _obstacle(model, cache) == ""
