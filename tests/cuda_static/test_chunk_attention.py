"""The attention kernel for chunks of prompts against PyTorch's attention, and later chunks captured with it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import engine_of, random_tensor, randomized, small_config
from cuda_static.capture_rules import HostWatch, capture_faults
from cuda_static.fake_cuda import fake_cuda, fake_model
from cuda_static.kernel_checks import TOLERANCES, assert_near
from cuda_static.program_order import watch_programs
from cuda_static.test_capture_rules import buffers_of
from cuda_static.test_replay import CpuRecorder
from cuda_static.test_replay import buffers_of as written_by
from kernel_device import DEVICE

from qwen3fast.engine import Engine
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.parts import Forward, Parts
from qwen3fast.engine.prefill import prefill_chunk
from qwen3fast.engine.state import EMPTY, GREEDY, DecodeState, RowSampling
from qwen3fast.kernels import cuda
from qwen3fast.kernels.attention import finds_used_length_of_chunks
from qwen3fast.kernels.cuda import chunk_attention as kernel
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache, quantize_vectors
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread")]

POSITIONS = 200


def case(heads, kv_heads, head_dim, tokens, starts, dtype=torch.float32):
    """Queries at these starts, in the last rows of a cache in reverse order; what is not in use is NaN."""
    B = len(starts)
    q = random_tensor(B, tokens, heads, head_dim).to(dtype)
    k, v = (random_tensor(B + 1, kv_heads, POSITIONS, head_dim, seed=s).to(dtype) for s in (1, 2))
    row_B = torch.arange(B, 0, -1)
    position_BT = torch.arange(tokens) + torch.tensor(starts)[:, None]
    k[0] = v[0] = torch.nan
    for row, start in zip(row_B.tolist(), starts, strict=True):
        k[row, :, start + tokens :] = v[row, :, start + tokens :] = torch.nan
    return [t.to(DEVICE) for t in (q, k, v, position_BT, row_B)]


def expected(q_BTHD, k_RKSD, v_RKSD, position_BT, row_B):
    """In float32, over the used positions only."""
    mask_BTS = torch.arange(POSITIONS, device=q_BTHD.device) <= position_BT[..., None]
    used_B11S = mask_BTS[:, -1][:, None, :, None]
    k, v = (torch.where(used_B11S, x[row_B].float(), 0.0) for x in (k_RKSD, v_RKSD))
    q_BHTD = q_BTHD.transpose(1, 2).float()
    return F.scaled_dot_product_attention(q_BHTD, k, v, attn_mask=mask_BTS[:, None], enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tokens", "starts"),
    [
        (4, 4, 16, 32, [0]),
        (4, 2, 64, 64, [1, 100]),
        (6, 2, 32, 37, [63, 0, 163]),
        (2, 1, 128, 130, [70]),
    ],
)
def test_chunk_attention_equals_sdpa(dtype, heads, kv_heads, head_dim, tokens, starts):
    arguments = case(heads, kv_heads, head_dim, tokens, starts, dtype)
    actual = kernel.chunk_attention(*arguments)
    assert actual.dtype == dtype
    assert_near(actual, expected(*arguments), dtype)


def test_chunk_attention_reads_an_int8_cache():
    q, k, v, position_BT, row_B = case(4, 2, 32, 40, [90, 5])
    k, v = k.nan_to_num(), v.nan_to_num()
    (k, k_scale), (v, v_scale) = quantize_vectors(k), quantize_vectors(v)
    for scale in (k_scale, v_scale):
        scale[0] = scale[1, :, 45:] = scale[2, :, 130:] = torch.nan
    plain = [(x * scale[..., None]).nan_to_num() for x, scale in ((k, k_scale), (v, v_scale))]
    actual = kernel.chunk_attention(q, k, v, position_BT, row_B, k_scale, v_scale)
    assert_near(actual, expected(q, *plain, position_BT, row_B))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    q, k, v, position_BT, row_B = case(4, 2, 32, 40, [90, 5])
    together = kernel.chunk_attention(q, k, v, position_BT, row_B)
    alone = kernel.chunk_attention(q[1:], k, v, position_BT[1:], row_B[1:])
    assert torch.equal(together[1:], alone)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_programs_run_in_any_order_and_share_no_address(monkeypatch):
    arguments = case(2, 1, 16, 70, [30])
    conflicts = watch_programs(monkeypatch)
    assert_near(kernel.chunk_attention(*arguments), expected(*arguments))
    assert conflicts == []


class Replays:
    """A recorder that keeps steps as they are: each replay runs one again, with what is in its buffers then."""

    def warm_up(self, step):
        step()

    def record(self, step):
        return step


def make_engine(is_captured, slots=2, positions=384, layers=2) -> Engine:
    model = randomized(small_config(max_position_embeddings=512, head_dim=16, num_hidden_layers=layers)).to(DEVICE)
    engine = engine_of(model, slots, positions)
    if is_captured:
        engine._use_graphs(GraphCache(Replays()))
    return engine


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu captures on a GPU")
def test_later_chunks_of_one_size_share_a_graph(monkeypatch):
    assert cuda.load()
    prompts = [[i * 7 % 90 for i in range(n)] for n in (60, 276, 320)]
    plain = make_engine(False)
    expected = [plain.prefill_whole(1, prompt) for prompt in prompts]
    assert not finds_used_length_of_chunks(torch.device("cpu"), 16)
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr("qwen3fast.kernels.attention.cuda.can_split_attention", lambda q: False)
    engine = make_engine(True)
    for prompt, logits_1V in zip(prompts, expected, strict=True):
        torch.testing.assert_close(engine.prefill_whole(1, prompt), logits_1V, rtol=1e-4, atol=1e-4)
    # 64; 256 + 32; 256 + 64.
    assert set(engine.graphs._replays) == {
        ("prefill", 64), ("prefill", 256), ("later chunk", 32), ("later chunk", 64)
    }  # fmt: skip
    shared = engine.begin_prefill(0, prompts[1], reused=216)  # a prefix that is there already
    engine.copy_row(1, 0, 216)
    logits_1V = engine.prefill_step(shared)
    assert set(engine.graphs._replays) >= {("later chunk", 64)} and shared.done == 276
    torch.testing.assert_close(logits_1V, expected[1], rtol=1e-4, atol=1e-4)


def test_on_cuda_later_chunks_ask_the_host_for_nothing():
    with fake_cuda() as device:
        assert cuda.load()
        config = ModelConfig.named("0.6b")
        cache = StaticKVCache(config, 2, 1024, config.dtype, device)
        model = fake_model(config, device)
        parts = Parts.build(StepCompiler(False, device), model, cache)
        cos_SD, sin_SD = (torch.zeros(cache.allocated_len, config.head_dim, device=device) for _ in range(2))
        row_1, start_1, token_1T = (torch.zeros(*n, dtype=torch.int64, device=device) for n in ((1,), (1,), (1, 64)))
        x_1TE = prefill_chunk(Forward(model, parts, cache, cos_SD, sin_SD), row_1, token_1T, start_1)
        assert x_1TE.shape == (1, 64, config.hidden_size)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_prompts_of_unequal_starts_and_a_row_without_a_prompt(is_quantized):
    """As in a graph of four prompts with three: the fourth has no positions, in a row of the cache that another has."""
    q, k, v, position_BT, row_B = case(4, 2, 32, 32, [0, 137, 40, 0])
    position_BT[3], row_B[3] = EMPTY, row_B[0]
    scales = ()
    if is_quantized:
        (k, k_scale), (v, v_scale) = (quantize_vectors(x.nan_to_num()) for x in (k, v))
        scales = (k_scale, v_scale)
        for scale in scales:
            scale[0] = torch.nan
            for row, position_T in zip(row_B.tolist()[:3], position_BT, strict=False):
                scale[row, :, int(position_T[-1]) + 1 :] = torch.nan
        plain = [(x * scale[..., None]).nan_to_num() for x, scale in ((k, k_scale), (v, v_scale))]
    else:
        plain = [k, v]
    actual = kernel.chunk_attention(q, k, v, position_BT, row_B, *scales)
    assert_near(actual[:3], expected(q[:3], *plain, position_BT[:3], row_B[:3]))
    assert not actual[3].any()
    for b in range(3):
        one = [x[b : b + 1] for x in (q, position_BT, row_B)]
        assert torch.equal(kernel.chunk_attention(one[0], k, v, *one[1:], *scales)[0], actual[b])


def read_starts(monkeypatch):
    """Let attention of chunks be the kernel's from now on, on tensors of the CPU."""
    assert cuda.load()
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "can_split", lambda device, head_dim: False)


def requests():
    """Prompts that share graphs, some behind common prefixes; greedy and sampled."""
    common = [i * 7 % 90 for i in range(40)]
    prompts = [[i * (n + 3) % 90 for i in range(n)] for n in (20, 31, 60, 50, 25, 30, 18)]
    prompts += [[*common, *prompt[:20]] for prompt in prompts[1:4]]
    return [Request(prompt, RowSampling(0.0 if i % 2 else 30.0, seed=i), 5) for i, prompt in enumerate(prompts)]


def run(engine, mine, reuse=True):
    scheduler = Scheduler(engine, reuse)
    for request in mine:
        scheduler.add(request)
    while not scheduler.is_idle:
        scheduler.step()
    return [(request.output_ids, request.finish_reason) for request in mine]


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu captures on a GPU")
def test_prompts_share_graphs_and_get_the_tokens_that_each_gets_alone(monkeypatch):
    """Recorded with the numbers of the host frozen, then replayed: no graph is made after the warm-up."""
    alone = make_engine(False, slots=1, layers=1)
    expected = [result for request in requests() for result in run(alone, [request], reuse=False)]
    read_starts(monkeypatch)
    engine = make_engine(False, slots=6, positions=128, layers=1)
    engine._use_graphs(GraphCache(CpuRecorder(lambda: written_by(engine))))
    engine._warm_up_prefill(0)
    recorded, used = set(engine.graphs._replays), set()
    together = {key for key in recorded if key[0] == "prompts"}
    assert together == {("prompts", *sizes) for sizes in ((32, 4), (32, 6), (64, 4), (64, 6), (128, 4))}
    run_graph = engine.graphs.run
    engine.graphs.run = lambda key, step: (used.add(key), run_graph(key, step))[1]
    assert run(engine, requests()) == expected
    assert len(used & together) >= 2
    assert {key for key in engine.graphs._replays if isinstance(key[0], str)} == recorded  # others are decode steps


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU with Triton has such attention")
def test_without_attention_that_reads_starts_graphs_hold_one_prompt():
    engine = make_engine(True, slots=4)
    assert not engine.captured.serves_later and engine.max_prompts(32) == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="about the rules of capture")
def test_a_graph_of_several_prompts_can_be_captured(monkeypatch):
    read_starts(monkeypatch)
    engine = make_engine(True, slots=4)
    captured, steps = engine.captured, []
    captured._graphs = SimpleNamespace(run=lambda key, step: steps.append(step))
    begun = [engine.begin_prefill(row, [row + 1] * (20 + row)) for row in range(3)]
    engine.prefill_together(begun)
    [step] = steps

    def buffers():
        own = {"token": captured._token, "number": captured._number, "logits": captured._logits_BV}
        return {**buffers_of(engine), **own}

    assert capture_faults(step, buffers, {"logits", "keys.0", "values.1"}) == []


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_on_cuda_several_prompts_ask_the_host_for_nothing(quantization, cache_dtype):
    with fake_cuda() as device:
        assert cuda.load()
        config = replace(ModelConfig.named("0.6b"), num_hidden_layers=2)
        cache = StaticKVCache(config, 8, 1024, cache_dtype, device)
        model = fake_model(config, device, quantization)
        parts = Parts.build(StepCompiler(False, device), model, cache)
        cos_SD, sin_SD = (torch.zeros(cache.allocated_len, config.head_dim, device=device) for _ in range(2))
        row_B, start_B, token_BT = (torch.zeros(*n, dtype=torch.int64, device=device) for n in ((4,), (4,), (4, 64)))
        with HostWatch() as watch:
            x_BTE = prefill_chunk(Forward(model, parts, cache, cos_SD, sin_SD), row_B, token_BT, start_B)
            DecodeState.allocate(8, device).begin([3, 1], [64, 64], [GREEDY, RowSampling(0.7)])
        assert watch.faults == [] and x_BTE.shape == (4, 64, config.hidden_size) and x_BTE.device == device
