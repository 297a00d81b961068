"""The samplers' kernels, and the end of a step that uses them, against `sample` and the plain step."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import engine_of, fill_randomly, small_config
from cuda_static import kernel_checks  # noqa: F401  which skips without Triton
from cuda_static.capture_rules import capture_faults
from cuda_static.program_order import watch_programs
from kernel_device import DEVICE

from qwen3fast.engine import Engine
from qwen3fast.engine.fused_sampler import FusedSampler
from qwen3fast.engine.state import RowSampling, StepKind
from qwen3fast.kernels import cuda
from qwen3fast.kernels.cuda.decode_step import attention, tail
from qwen3fast.kernels.cuda.decode_step import sample as sample_kernels
from qwen3fast.model import Qwen3
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, gumbel_noise, sample

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread", "small_programs")]


@pytest.fixture
def small_programs(monkeypatch):
    """Several programs, and tiles, for a small vocabulary."""
    assert cuda.load()
    monkeypatch.setattr(sample_kernels, "TOKENS_OF_PROGRAM", 128)
    monkeypatch.setattr(sample_kernels, "TILE", 64)


def make_rows(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    """Parameters of `count` rows at consecutive steps; each number may be a list."""

    def full(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=dtype, device=DEVICE)

    real, integer = torch.float32, torch.int64
    steps = torch.arange(count, device=DEVICE)
    return SamplerRows(
        full(temperature, real),
        full(top_k, integer),
        full(top_p, real),
        full(min_p, real),
        full(seed, integer),
        steps,
    )


def normal(*shape, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def tokens_of(logits_BV, rows, kind=SamplerKind.FULL):
    """The kernels' tokens, from a workspace whose unused memory is nonsense."""
    sampler = FusedSampler(len(logits_BV), logits_BV.shape[1], logits_BV.device)
    for tensor in sampler._memory:
        tensor.fill_(-7)
    return sampler.choose(logits_BV, rows, kind).clone()


@pytest.mark.parametrize("rows", [1, 3])
def test_first_tokens_need_no_kernels_of_their_own(rows, monkeypatch):
    """Triton compiles a kernel once more where arguments are not at multiples of 16 bytes; a step has its own there."""
    choose, places = tail.choose, []

    def note(best, *numbers):
        places.extend(tensor.data_ptr() % 16 for tensor in numbers)
        choose(best, *numbers)

    monkeypatch.setattr(tail, "choose", note)
    tokens_of(normal(rows, 300), make_rows(rows))
    assert places == [0] * 5


PARAMETERS = [
    {},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    {"top_k": 100},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.3, "min_p": 0.05},
    {"min_p": 0.2, "temperature": 2.0},
    {"top_k": 1000, "top_p": 0.99},
    {"temperature": 1e-30, "top_k": 3},
    {"temperature": 1e30, "top_p": 0.5},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_draws_are_the_plain_samplers(parameters):
    logits_BV = normal(2, 150)
    rows = make_rows(2, **parameters, seed=[5, 2**62 + 3])
    assert torch.equal(tokens_of(logits_BV, rows), sample(logits_BV, rows, SamplerKind.FULL))


def test_rows_of_a_batch_have_their_own_parameters():
    logits_BV = normal(6, 150)
    rows = make_rows(6, [0.0, 1.0, 0.7, 0.0, 1.5, 1.0], [0, 0, 20, 5, 50, 1], [1.0, 1.0, 0.9, 0.5, 0.2, 1.0], seed=9)
    expected = sample(logits_BV, rows, SamplerKind.FULL)
    assert torch.equal(tokens_of(logits_BV, rows), expected)
    assert torch.equal(expected[[0, 3]], logits_BV[[0, 3]].argmax(-1))
    assert torch.equal(tokens_of(logits_BV[4:5], SamplerRows(*(t[4:5] for t in rows))), expected[4:5])


def test_tokens_that_tie_with_the_last_kept_one_are_kept():
    logits_BV = torch.tensor([2.0] + [1.0] * 99, device=DEVICE).expand(8, -1).contiguous()
    rows = make_rows(8, top_k=[3, 0] * 4, top_p=[1.0, 0.05] * 4)
    tokens = tokens_of(logits_BV, rows)
    assert torch.equal(tokens, sample(logits_BV, rows, SamplerKind.FULL))
    assert min(len(set(tokens[first::2].tolist())) for first in (0, 1)) > 2


@pytest.mark.parametrize("kind", [SamplerKind.GREEDY, SamplerKind.FULL])
def test_invalid_and_forbidden_logits(kind):
    logits_BV = normal(5, 130)
    logits_BV[0, 100], logits_BV[1, 3], logits_BV[2] = math.nan, math.inf, -math.inf
    logits_BV[3] = -math.inf
    logits_BV[3, 129] = -5.0  # in the last program's part
    tokens = tokens_of(logits_BV, make_rows(5, top_k=8, top_p=0.9), kind)
    assert tokens[:4].tolist() == [-1, -1, -1, 129]
    assert tokens[4] == sample(logits_BV, make_rows(5, top_k=8, top_p=0.9), kind)[4]


def test_greedy_steps_take_the_first_of_equal_tokens():
    logits_BV = torch.zeros(2, 150, device=DEVICE)
    logits_BV[0, [70, 71, 140]] = 1.0
    logits_BV[1] = -0.0
    logits_BV[1, 80] = 0.0
    assert tokens_of(logits_BV, make_rows(2), SamplerKind.GREEDY).tolist() == [70, 0]


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_programs_run_in_any_order_and_share_no_address(monkeypatch):
    logits_BV, rows = normal(1, 300), make_rows(1, top_k=20, top_p=0.9)
    expected = tokens_of(logits_BV, rows)
    conflicts = watch_programs(monkeypatch)
    assert torch.equal(tokens_of(logits_BV, rows), expected)
    assert conflicts == []


def test_noise_is_that_of_the_plain_sampler():
    """Without truncation and from equal logits, the token with the largest noise is drawn."""
    rows = make_rows(8, seed=[2**32 * i + 7 * i for i in range(8)])
    noise_BV = gumbel_noise(rows.seed_B, rows.step_B, 100)
    tokens = tokens_of(torch.zeros(8, 100, device=DEVICE), rows)
    assert torch.equal(tokens, noise_BV.argmax(-1))
    assert len(set(tokens.tolist())) > 4


@pytest.mark.parametrize(
    ("kind", "launches"), [(SamplerKind.GREEDY, 2), (SamplerKind.WINDOW, 19), (SamplerKind.FULL, 19)]
)
def test_launches(kind, launches, monkeypatch):
    launched = []
    for module in (sample_kernels, tail):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    tokens_of(normal(2, 150), make_rows(2), kind)
    assert len(launched) == launches and launched[-1] == "choose_kernel"


# ------------------------------------------------------------------------------------------------------ in an engine

PROMPTS = ([1, 2, 3], list(range(2, 40)))


def make_engine(is_fused) -> Engine:
    device = torch.device(DEVICE)
    model = Qwen3(small_config(vocab_size=150, num_hidden_layers=1))
    fill_randomly(model)
    engine = engine_of(model.to(DEVICE), 3, 96)
    assert engine.parts.fused_sampler is None  # on the CPU nothing has changed
    if is_fused:
        engine.parts = replace(engine.parts, fused_sampler=FusedSampler(3, 150, device))
    return engine


def run(engine, kind, temperature, is_processed):
    """Tokens and log-probabilities of two rows, and the state after them."""
    results = []
    for row, prompt in enumerate(PROMPTS):
        logits_1V = engine.prefill_whole(row, prompt)
        top_k = 20 if kind.sampler is SamplerKind.WINDOW else 0
        engine.set_row(row, len(prompt), RowSampling(temperature, top_k, 0.9, seed=row))
        if is_processed:
            engine.set_processors(row, prompt, 1.3, 0.5, 0.2, {5: 3.0})
        results.append(engine.sample_first(row, logits_1V, kind))
    for step in range(2):
        engine.launch(2, 50 + step, kind)
        results.append(engine.collect())
    return [(r.tokens[:2], r.logprobs and r.logprobs[:2]) for r in results], engine


@pytest.mark.parametrize(
    ("kind", "is_processed"),
    [
        (SamplerKind.GREEDY, False),
        (SamplerKind.GREEDY, True),
        (SamplerKind.WINDOW, False),
        (SamplerKind.FULL, True),
    ],
)
def test_an_engine_gives_the_same_with_it(kind, is_processed):
    step = StepKind(kind, is_processed, has_logprobs=is_processed)
    temperature = 0.0 if kind is SamplerKind.GREEDY else 0.9
    (plain, expected), (fused, engine) = (run(make_engine(f), step, temperature, is_processed) for f in (False, True))
    assert fused == plain
    for name, tensor in vars(engine.state).items():
        assert torch.equal(tensor[:2], getattr(expected.state, name)[:2]), name
    if is_processed:
        assert torch.equal(engine.processors.tensors.count_BV, expected.processors.tensors.count_BV)


@pytest.mark.skipif(DEVICE == "cuda", reason="watches operations on the CPU")
@pytest.mark.parametrize("kind", [SamplerKind.GREEDY, SamplerKind.FULL])
def test_it_can_be_captured(kind):
    engine = make_engine(True)
    sampler, state = engine.parts.fused_sampler, engine.state
    logits_BV = normal(3, 150)
    written = (state.advance_R, state.input_R, state.output_R, state.position_R, state.step_R)

    def buffers():
        memory = {f"memory {i}": t for i, t in enumerate([*sampler._memory, logits_BV])}
        return {f"state {name}": t for name, t in vars(state).items()} | memory

    results = {f"state {name}_R" for name in ("input", "output", "position", "step")}
    sampler.choose(logits_BV, state.sampler_rows(slice(3)), kind)  # makes the workspace's views
    faults = capture_faults(
        lambda: sampler.advance(logits_BV, state.sampler_rows(slice(3)), kind, *written), buffers, results
    )
    assert faults == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pytorch_s_default_dtype_changes_no_memory(dtype):
    def memory():
        device = torch.device(DEVICE)
        splits, best = attention.Splits.allocate([2], 4, 2, 200, 16, device)[2], tail.Best.allocate(2, 300, device)
        return [tensor.dtype for tensor in (*splits, *best, *FusedSampler(2, 300, device)._memory)]

    expected = memory()
    torch.set_default_dtype(dtype)
    try:
        assert memory() == expected
    finally:
        torch.set_default_dtype(torch.float32)
