"""The decode step, prefill and samplers on fake CUDA tensors in every published size: what a GPU would refuse."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from cuda_static.capture_rules import HostWatch
from cuda_static.fake_cuda import fake_cuda, fake_model
from torch import nn

from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.parts import Forward, Parts
from qwen3fast.engine.prefill import CHUNK_SIZES, prefill_chunk
from qwen3fast.engine.state import DecodeState, LogprobState, ProcessorState
from qwen3fast.kernels import cuda
from qwen3fast.model import rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.ordered import OrderedLinear
from qwen3fast.sampling.samplers import SamplerKind

SIZES = ("0.6b", "1.7b", "4b", "8b", "14b", "32b", "30b-a3b")
ROWS, MAX_SEQ_LEN = 8, 8192
SMALLEST = "0.6b"
FEW_EXPERTS = {"num_hidden_layers": 1, "num_experts": 16}  # each is dequantized alone; all 128 have the same shapes
BLOCKS = FORMATS["fp8"].with_blocks()


def make_engine(device, size, quantization=None, cache_dtype=torch.bfloat16, **changes):
    """Return the parts of an engine that a step uses; other parts (pinned memory, events) need a real GPU."""
    config = replace(ModelConfig.named(size), **({"num_hidden_layers": 2} | changes))  # layers are alike
    model = fake_model(config, device, quantization)
    cache = StaticKVCache(config, ROWS, MAX_SEQ_LEN, cache_dtype, device)
    cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device)
    parts, state = Parts.build(StepCompiler(False, device), model, cache), DecodeState.allocate(ROWS, device)
    return SimpleNamespace(model=model, parts=parts, cache=cache, state=state, cos_SD=cos_SD, sin_SD=sin_SD)


def forward_of(engine):
    return Forward(engine.model, engine.parts, engine.cache, engine.cos_SD, engine.sin_SD)


def run_step(engine, rows, length, kind, *extras):
    """The step, which is to be done without asking the host for anything."""
    with HostWatch() as watch:
        decode_step(forward_of(engine), engine.state, rows, length, kind, *extras)
    return watch.faults


@pytest.mark.parametrize("size", SIZES)
def test_decode_step_runs_on_cuda_tensors(size):
    with fake_cuda() as device:
        engine = make_engine(device, size)
        devices = {t.device for t in (*engine.model.parameters(), *engine.cache.keys, *vars(engine.state).values())}
        assert devices == {device}
        for rows in (1, 2, 4, ROWS) if size == SMALLEST else (1, ROWS):
            assert run_step(engine, rows, engine.cache.buckets[-1], SamplerKind.GREEDY) == []


@pytest.mark.parametrize(
    "changes",
    [{}, {"cache_dtype": torch.int8}, *({"quantization": f} for f in ("int8", "int4", "fp8", BLOCKS))],
    ids=["bf16", "int8 cache", "int8", "int4", "fp8", "fp8-block"],
)
def test_every_format_and_sampler_runs_on_cuda_tensors(changes):
    with fake_cuda() as device:
        engine = make_engine(device, SMALLEST, **changes)
        lengths = engine.cache.buckets[0], engine.cache.buckets[-1]
        for i, kind in enumerate(SamplerKind):
            assert run_step(engine, 2, lengths[i % 2], kind) == []


def test_on_a_second_device_nothing_is_made_on_the_first():
    """Operations refuse tensors of two devices."""
    with fake_cuda(index=1) as device:
        engine = make_engine(device, SMALLEST, "int4")
        processors = ProcessorState(ROWS, engine.model.config.vocab_size, device)
        logprobs = LogprobState.allocate(ROWS, engine.model.config.vocab_size, device)
        for kind in SamplerKind:
            assert run_step(engine, 2, engine.cache.buckets[0], kind, processors, logprobs) == []
        row_1, token_1T = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((1,), (1, 32)))
        assert prefill_chunk(forward_of(engine), row_1, token_1T, 5).device == device


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_quantized_experts_run_on_cuda_tensors(format, has_triton, monkeypatch):
    if has_triton:
        pytest.importorskip("triton", reason="the triton package is not installed")
        monkeypatch.setattr(QuantizedExperts, "_chosen", None)  # not to be called
    else:
        monkeypatch.setattr(cuda, "can_packed_experts", lambda x: False)
    with fake_cuda() as device:
        engine = make_engine(device, "30b-a3b", format, **FEW_EXPERTS | {"num_hidden_layers": 2})
        for rows in (1, ROWS):
            assert run_step(engine, rows, engine.cache.buckets[0], SamplerKind.GREEDY) == []


def test_experts_with_orders_of_channels_run_on_cuda_tensors(monkeypatch):
    pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.setattr(QuantizedExperts, "_chosen", None)  # not to be called
    with fake_cuda() as device:
        engine = make_engine(device, "30b-a3b", "uint4", **FEW_EXPERTS)
        experts = engine.model.model.layers[0].mlp.experts
        order_MK = torch.zeros(2 * experts.num_experts, 2048, dtype=torch.int32, device=device)
        experts.gate_up_proj = OrderedLinear(experts.gate_up_proj.packed, experts.gate_up_proj.format, order_MK)
        for rows in (1, ROWS):
            assert run_step(engine, rows, engine.cache.buckets[0], SamplerKind.GREEDY) == []
        with HostWatch() as watch:
            x_NE, expert_NC = (torch.zeros(64, n, dtype=d, device=device) for n, d in ((2048, None), (8, torch.int64)))
            assert experts.grouped(x_NE.bfloat16(), expert_NC).shape == (64, 8, 2048)
        assert watch.faults == []


@pytest.mark.parametrize("format", FORMATS)
def test_prefill_of_quantized_experts_runs_on_cuda_tensors(format):
    with fake_cuda() as device:
        engine = make_engine(device, "30b-a3b", format, **FEW_EXPERTS)
        row_1, token_1T = (torch.zeros(*shape, dtype=torch.int64, device=device) for shape in ((1,), (1, 64)))
        with HostWatch() as watch:
            x_1TE = prefill_chunk(forward_of(engine), row_1, token_1T, 512)
        assert watch.faults == [] and x_1TE.shape == (1, 64, 2048) and x_1TE.device == device


def test_processors_and_log_probabilities_run_on_cuda_tensors():
    """Any two of a sampler, a number of rows, and processors or log-probabilities or both together."""
    with fake_cuda() as device:
        engine = make_engine(device, SMALLEST, num_hidden_layers=1)
        vocab_size = engine.model.config.vocab_size
        extras = ProcessorState(ROWS, vocab_size, device), LogprobState.allocate(ROWS, vocab_size, device)
        assert {t.device for t in (*extras[0].tensors, *vars(extras[1]).values())} == {device}
        some = (extras, (extras[0], None), (None, extras[1]))
        for (i, kind), (j, rows) in product(enumerate(SamplerKind), enumerate((1, 2, ROWS))):
            assert run_step(engine, rows, engine.cache.buckets[0], kind, *some[(i + j) % 3]) == []


def test_a_request_with_processors_begins_and_ends_on_cuda_tensors():
    """Numbers of the host go to the device, and none come back."""
    with fake_cuda() as device:
        processors = ProcessorState(ROWS, 151_936, device)
        with HostWatch() as watch:
            processors.begin(1, [5, 7, 7], 1.3, 0.5, -0.4, {3: 5.0, 4: -torch.inf}, [1, 2, 3])
            processors.begin(2, [5], logit_bias={3: 1.0})
            processors.clear(1)
        assert watch.faults == []


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_split_attention_takes_the_place_of_pytorchs(cache_dtype, monkeypatch):
    pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.setattr(cuda, "decode_attention", "split")
    monkeypatch.setattr("qwen3fast.kernels.attention.attend", None)  # not to be called
    with fake_cuda() as device:
        engine = make_engine(device, SMALLEST, cache_dtype=cache_dtype)
        assert run_step(engine, 2, engine.cache.buckets[-1], SamplerKind.GREEDY) == []


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_weights_are_quantized_on_their_device(format):
    with fake_cuda() as device:
        packed = quantize(torch.empty(64, 96, device=device), format)
        assert {packed.weight.device, packed.scale.device, format.dequantize(packed).device} == {device}


@pytest.mark.parametrize("size", SIZES)
def test_prefill_runs_on_cuda_tensors_with_flash_attention(size, monkeypatch):
    monkeypatch.setattr("qwen3fast.kernels.attention.attend", None)  # not to be called
    with fake_cuda() as device:
        engine = make_engine(device, size)
        row_1 = torch.zeros(1, dtype=torch.int64, device=device)
        for tokens in CHUNK_SIZES if size == SMALLEST else (CHUNK_SIZES[0], CHUNK_SIZES[-1]):
            token_1T = torch.zeros(1, tokens, dtype=torch.int64, device=device)
            x_1TE = prefill_chunk(forward_of(engine), row_1, token_1T, 512)
            assert x_1TE.shape == (1, tokens, engine.model.config.hidden_size) and x_1TE.device == device


# ---------------------------------------------------------------------------------------------------- planted faults


class Planted(nn.Module):
    """A final norm that does something else besides."""

    def __init__(self, norm, fault):
        super().__init__()
        self.norm, self.fault = norm, fault

    def forward(self, x):
        return self.fault(self.norm(x))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x + torch.ones(x.shape[-1]), "found at least two devices|found two different devices"),
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense|data-dependent"),
        (lambda x: x + torch.ops.aten.nonzero(x).sum(), "nonzero"),
    ],
    ids=["tensor on the host", "item", "branch on data", "nonzero"],
)
def test_planted_fault_is_refused(fault, message):
    with fake_cuda() as device:
        engine = make_engine(device, SMALLEST)
        head = engine.parts.head
        head[0] = Planted(head[0], fault)
        with pytest.raises(RuntimeError, match=message):
            run_step(engine, 1, 128, SamplerKind.GREEDY)


@pytest.mark.parametrize(
    ("fault", "name"),
    [(lambda x: x + x.cpu().to(x.device), "cpu"), (lambda x: x + torch.zeros(()), "zeros without device")],
    ids=["copy to the host", "scalar on the host"],
)
def test_planted_host_tensor_is_noticed(fault, name):
    with fake_cuda() as device:
        engine = make_engine(device, SMALLEST)
        head = engine.parts.head
        head[0] = Planted(head[0], fault)
        assert any(name in found for found in run_step(engine, 1, 128, SamplerKind.GREEDY))
