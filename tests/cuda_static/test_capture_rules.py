"""The decode step keeps the rules of CUDA-graph capture; the checker finds a planted fault of each kind."""

import re

import numpy as np
import pytest
import torch
from conftest import engine_of, random_tensor, randomized, small_config
from cuda_static.capture_rules import capture_faults
from torch.profiler import ProfilerActivity, profile

from qwen3fast.engine import RowSampling, decode
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.parts import Parts
from qwen3fast.engine.state import LogprobState, ProcessorState
from qwen3fast.kernels import cpu, cuda
from qwen3fast.model import MoE
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.sampling.samplers import SamplerKind

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
PACKABLE_EXPERTS = EXPERTS | {"hidden_size": 64, "moe_intermediate_size": 32}
RESULTS = {"state.output_R", "state.input_R", "state.position_R", "state.step_R", "keys.0", "values.1"}
PROCESSOR_RESULTS = {"processors.count_BV"}
LOGPROB_RESULTS = {"logprobs.chosen_R", "logprobs.id_RN", "logprobs.value_RN"}


def make_engine(rows=4, cache_dtype=torch.float32, quantization=None, **changes):
    """An uncompiled engine with two rows in use."""
    model = randomized(small_config(max_position_embeddings=1024, **changes)).to(changes.get("dtype", torch.float32))
    if quantization is not None:
        quantize_model(model, quantization, model.config.dtype)
    engine = engine_of(model, rows, 200, cache_dtype)
    for row in range(min(rows, 2)):
        engine.prefill_whole(row, [5, 7, 11 + row])
        engine.set_row(row, 3, RowSampling(0.8, 20, 0.9, seed=7))
    return engine


def make_processors(engine):
    """For two requests with all that can be asked for; the rows after them are neutral."""
    processors = ProcessorState(engine.cache.max_batch_size, 97, CPU)
    for row in range(min(engine.cache.max_batch_size, 2)):
        processors.begin(row, [5, 7, 11 + row], 1.3, 0.5, 0.4 + row, {3: 5.0, 4: -torch.inf}, range(1, 80))
        processors.allow(row, np.full(4, 0x55555555, dtype=np.int32))
    return processors


def make_logprobs(engine):
    return LogprobState.allocate(engine.cache.max_batch_size, 97, CPU)


def buffers_of(engine, processors=None, logprobs=None):
    """All that a step may read or write: parameters, cache, rotary tables, state, and what requests asked for."""
    cache = engine.cache
    lists = {"keys": cache.keys, "values": cache.values, "key_scales": cache.key_scales}
    lists["value_scales"] = cache.value_scales
    return {
        **dict(engine.model.named_parameters()),
        **{f"{name}.{i}": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)},
        **{f"state.{name}": tensor for name, tensor in vars(engine.state).items()},
        "cos": engine.cos_SD,
        "sin": engine.sin_SD,
        **({f"processors.{name}": t for name, t in processors.tensors._asdict().items()} if processors else {}),
        **({f"logprobs.{name}": t for name, t in vars(logprobs).items()} if logprobs else {}),
    }


def run_step(engine, rows=2, length=128, kind=SamplerKind.GREEDY, *extras):
    decode_step(engine.forward_args(), engine.state, rows, length, kind, *extras)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"cache_dtype": torch.int8},
        EXPERTS,
        EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": (0,)},
        EXPERTS | {"dtype": torch.bfloat16, "cache_dtype": torch.bfloat16},
        PACKABLE_EXPERTS | {"quantization": "int8"},
        PACKABLE_EXPERTS | {"quantization": "int4"},
        PACKABLE_EXPERTS | {"quantization": "fp8", "mlp_only_layers": (0,)},
    ],
    ids=(
        "tied|biases, untied|one query a key|int8 cache|experts|experts in one layer|bf16 experts|int8 experts|"
        "int4 experts|fp8 experts in one layer"
    ).split("|"),
)
def test_decode_step_can_be_captured(rows, changes, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)  # as on a CUDA device, which has no C++ operations
    engine = make_engine(**changes)
    assert capture_faults(lambda: run_step(engine, rows), lambda: buffers_of(engine), RESULTS) == []


@pytest.mark.parametrize("kind", [SamplerKind.WINDOW, SamplerKind.FULL])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_decode_step_with_a_sampler_can_be_captured(kind, rows, monkeypatch):
    """A sampler reads the logits alone, whatever the model."""
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    engine = make_engine()
    assert capture_faults(lambda: run_step(engine, rows, 128, kind), lambda: buffers_of(engine), RESULTS) == []


@pytest.mark.parametrize("kind", SamplerKind)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(("is_processed", "has_logprobs"), [(True, False), (False, True), (True, True)])
def test_steps_with_processors_and_log_probabilities_can_be_captured(kind, rows, is_processed, has_logprobs):
    engine = make_engine()
    extras = (make_processors(engine) if is_processed else None, make_logprobs(engine) if has_logprobs else None)
    results = RESULTS | (PROCESSOR_RESULTS if is_processed else set()) | (LOGPROB_RESULTS if has_logprobs else set())
    faults = capture_faults(
        lambda: run_step(engine, rows, 128, kind, *extras), lambda: buffers_of(engine, *extras), results
    )
    assert faults == []


@torch.no_grad()
def test_what_requests_ask_for_is_recorded_by_compiled_code(monkeypatch):
    """As on a CUDA device: the same counts and log-probabilities; of operations, only top-k remains one of its own."""
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "use_fused_step", lambda: False)
    engine = make_engine()
    parts = Parts.build(StepCompiler(True, CPU), engine.model, engine.cache)
    logits_BV, token_B = random_tensor(4, 97), torch.tensor([8, 0, -1, 96])
    engine.state.advance_R.copy_(torch.tensor([1, 1, 1, 0]))
    found = []
    for form in (engine.forward_args().parts, parts):
        processors, logprobs = make_processors(engine), make_logprobs(engine)
        for _ in range(2):  # compiles, then only runs
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                decode._record(form, logits_BV, token_B, engine.state, slice(4), processors, logprobs)
        found.append([processors.tensors.count_BV, *vars(logprobs).values()])
    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].sum(1).tolist() == [2, 2, 0, 0]
    names = {event.name for event in profiler.events() if event.name.startswith("aten::")}
    assert names - {"aten::slice", "aten::as_strided", "aten::empty", "aten::empty_strided"} == {"aten::topk"}


def test_replayed_steps_count_tokens_on_the_device():
    """As positions, so penalties: the host takes no part, and rows without a request count nothing."""
    engine = make_engine()
    processors, tokens = make_processors(engine), []
    for _ in range(3):
        run_step(engine, 4, 128, SamplerKind.WINDOW, processors)
        tokens.append(engine.state.output_R[:2].clone())
    expected_RV = torch.zeros(4, 97, dtype=torch.int32)
    for token_R in tokens:
        expected_RV[[0, 1], token_R] += 1
    assert torch.equal(processors.tensors.count_BV, expected_RV)


def test_replayed_positions_advance_on_the_device():
    """A graph learns nothing from the host: after three steps, the rows in use are three tokens further."""
    engine = make_engine()
    for _ in range(3):
        run_step(engine, rows=4)
    assert engine.state.position_R.tolist() == [6, 6, -1, -1]


def grow(engine):
    engine.grown = torch.zeros(getattr(engine, "grown", torch.zeros(1)).shape[0] + 1)


def move(engine):
    object.__setattr__(engine.state, "temperature_R", engine.state.temperature_R.clone())


def count(engine):
    engine.counter = getattr(engine, "counter", 0) + 1
    engine.state.step_R.add_(engine.counter)


def use_the_outside(engine):
    engine.outside = getattr(engine, "outside", None)
    if engine.outside is None:
        engine.outside = torch.ones(4, dtype=torch.int64)
    engine.state.step_R.add_(engine.outside)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda e: e.state.output_R[0].item(), "_local_scalar_dense.default makes the host wait"),
        (lambda e: e.state.output_R.tolist(), "tolist copies to the host"),
        (lambda e: e.state.output_R.cpu(), "cpu copies to the host"),
        (lambda e: e.state.output_R.to("cpu", torch.float32).sum(), "to copies to the host"),
        (lambda e: e.state.step_R.add_(torch.ones(4, dtype=torch.int64)), "ones without device="),
        (lambda e: e.state.output_R.nonzero().sum().zero_(), "nonzero.default makes the host wait"),
        (lambda e: e.state.output_R[e.state.output_R > 0].zero_(), "with a boolean mask"),
        (
            lambda e: e.state.output_R.masked_select(e.state.output_R > 0).zero_(),
            "masked_select.default makes",
        ),
        (lambda e: e.state.step_R.add_(torch.tensor([1, 0, 0, 0])), "a tensor made of host data"),
        (lambda e: e.state.output_R.resize_(4), "resize_.default moves a buffer"),
        (lambda e: e.state.output_R.clone(), r"a returned tensor \(4,\) is not in a static buffer"),
        (grow, r"becomes .* in the next step"),
        (move, "state.temperature_R has moved"),
        (count, r"add_.Tensor.* becomes .* in the next step"),
        (use_the_outside, r"add_.Tensor reads a tensor \(4,\) that is no static buffer"),
    ],
    ids=lambda value: value.__name__ if callable(value) and value.__name__ != "<lambda>" else "",
)
def test_planted_faults_are_found(fault, message):
    engine = make_engine()

    def step():
        run_step(engine)
        return fault(engine)

    faults = capture_faults(step, lambda: buffers_of(engine), RESULTS)
    assert any(re.search(message, fault) for fault in faults), faults


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_chosen_experts_change_from_replay_to_replay_without_the_host(quantization, monkeypatch):
    """The operations of two steps are the same ones, though the experts that they read are not."""
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    engine, chosen = make_engine(**PACKABLE_EXPERTS, quantization=quantization, tie_word_embeddings=False), []
    gathered = QuantizedExperts.gathered

    def note(self, x_NE, expert_NC):
        chosen.append(expert_NC.clone())
        return gathered(self, x_NE, expert_NC)

    monkeypatch.setattr(QuantizedExperts, "gathered", note)
    assert capture_faults(lambda: run_step(engine), lambda: buffers_of(engine), RESULTS) == []
    layers = sum(isinstance(block.mlp, MoE) for block in engine.model.model.layers)
    assert len(chosen) == 3 * layers and not torch.equal(chosen[layers], chosen[2 * layers])


def test_a_hook_is_not_for_graphs():
    """The tests above can fail: what runs on the host, from Python, is found."""
    engine = make_engine()
    faults = capture_faults(
        lambda: run_step(engine, 2, 128, SamplerKind.GREEDY, None, None, lambda x_BV: x_BV + torch.ones(97)),
        lambda: buffers_of(engine),
        RESULTS,
    )
    assert any("ones without device=" in fault for fault in faults), faults


@pytest.mark.parametrize("missing", ["processors", "logprobs"])
def test_buffers_of_requests_that_could_move_are_found(missing):
    engine = make_engine()
    extras = {"processors": make_processors(engine), "logprobs": make_logprobs(engine)}

    def step():
        run_step(engine, 2, 128, SamplerKind.GREEDY, *extras.values())

    faults = capture_faults(step, lambda: buffers_of(engine, **(extras | {missing: None})), RESULTS)
    assert any("that is no static buffer" in fault for fault in faults), faults


def test_a_result_that_is_not_written_is_found():
    engine = make_engine()

    def step():
        engine.model(engine.state.input_R[:2, None])

    assert "state.output_R is not written" in capture_faults(step, lambda: buffers_of(engine), RESULTS)
