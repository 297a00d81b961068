"""The host's loop on graphs that are recorded and replayed, with a recorder that does so on the CPU."""

import gc
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import assert_near, engine_of, randomized, small_config
from test_steps import Remainder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3fast.engine import engine as engine_module
from qwen3fast.engine.cuda_graph import ATTEMPTS, GraphCache
from qwen3fast.engine.prompt_logprobs import WantedLogprobs
from qwen3fast.engine.state import RowSampling
from qwen3fast.kernels import attention
from qwen3fast.sampling.processors import ProcessorRows
from qwen3fast.sampling.samplers import SamplerKind
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


class Tape(TorchDispatchMode):
    """The operations of a step with the very tensors they read and wrote."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.entries.append((operation, args, kwargs or {}, result))
        return result


class CpuRecorder:
    """Records a step as CUDA does: numbers of the host and addresses stay as they were, the work is not done.

    buffers: gives what a step writes to; put back after recording, which on a CPU has to run the step.
    """

    def __init__(self, buffers):
        self.buffers, self.recorded = buffers, 0

    def warm_up(self, step):
        step()

    def record(self, step):
        buffers = self.buffers()
        before = [buffer.clone() for buffer in buffers]
        with Tape() as tape:
            step()
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
        self.recorded += 1
        return lambda: replay(tape.entries)


@torch.no_grad()
def replay(entries):
    """Run recorded operations again, each result into the tensors that later operations read."""
    for operation, args, kwargs, result in entries:
        if operation._schema.is_mutable:
            operation(*args, **kwargs)
            continue
        new = operation(*args, **kwargs)
        for old, fresh in zip(tree_leaves(result), tree_leaves(new), strict=True):
            if (
                isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr()
            ):  # a view shows what it is a view of
                old.copy_(fresh)


@pytest.fixture(scope="module")
def model():
    return randomized(small_config(max_position_embeddings=1024, eos_token_ids=()), seed=3)


def make_engine(model, lookahead=0, recorder=None):
    engine = engine_of(model, lookahead=lookahead)
    if recorder is not None:
        engine._use_graphs(GraphCache(recorder))
    elif lookahead:
        engine._use_graphs(GraphCache(CpuRecorder(lambda: buffers_of(engine))))
    return engine


def buffers_of(engine):
    """Return the buffers that steps write to; some are allocated when a request first needs them."""
    processors = engine.processors.tensors if engine.processors is not None else []
    logprobs = vars(engine.logprobs).values() if engine.logprobs is not None else []
    chunks = [engine.captured._logits_BV] if engine.captured is not None else []
    return [*engine.cache.tensors(), *vars(engine.state).values(), *processors, *logprobs, *chunks]


def requests():
    """Greedy and sampled ones of different lengths, one of which crosses the border of a cache bucket."""
    stop_ids = frozenset([3, 50])
    return [
        Request([1, 2, 3], RowSampling(0.0), 30, stop_ids),
        Request(list(range(90)), RowSampling(30.0, seed=1), 45, stop_ids),
        Request([7], RowSampling(30.0, seed=2), 5, stop_ids),
        Request([9, 9], RowSampling(30.0, 20, seed=3), 25, stop_ids),
    ]


def processed_requests():
    """Beside plain ones: penalties, which count tokens; a bias; log-probabilities; a constraint on the host."""
    plain = requests()
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.5}
    return [
        plain[1],
        Request([4, 5, 6], RowSampling(30.0, seed=4), 25, **penalties),
        Request([9, 8], max_tokens=20, logprobs=3, logit_bias={5: 20.0, 6: -torch.inf}),
        plain[0],
        Request([2, 2], RowSampling(30.0, seed=6), 15, logprobs=1, constraint=Remainder(), **penalties),
        plain[3],
    ]


def run(engine, running=None):
    scheduler, running = Scheduler(engine), requests() if running is None else running
    for request in running:
        scheduler.add(request)
    while any(request.finish_reason is None for request in running):
        scheduler.step()
    return [(request.output_ids, request.finish_reason) for request in running]


@pytest.mark.parametrize("lookahead", [1, 4])
def test_replayed_steps_give_the_same_tokens(model, lookahead):
    expected = run(make_engine(model))
    engine = make_engine(model, lookahead)
    assert run(engine) == expected
    recorded = engine.graphs._recorder.recorded
    assert recorded == len(engine.graphs) >= 3
    assert run(engine) == expected  # all replayed
    assert engine.graphs._recorder.recorded == recorded
    engine.close()
    assert len(engine.graphs) == 0


@pytest.mark.parametrize("lookahead", [1, 4])
def test_replayed_steps_with_processors_give_the_same_tokens_and_log_probabilities(model, lookahead):
    expected, reference = processed_requests(), make_engine(model)
    run(reference, expected)
    assert len({tuple(request.output_ids) for request in expected}) == len(expected)
    engine = make_engine(model, lookahead)
    for _ in range(2):  # recorded, then all replayed
        actual = processed_requests()
        assert run(engine, actual) == [(request.output_ids, request.finish_reason) for request in expected]
        for request, other in zip(actual, expected, strict=True):
            assert len(request.output_logprobs) == len(other.output_logprobs)
            for at, there in zip(request.output_logprobs, other.output_logprobs, strict=True):
                assert at.ids == there.ids
                assert [at.chosen, *at.values] == pytest.approx([there.chosen, *there.values], abs=1e-4)
        kinds = {key[2] for key in engine.graphs._replays if key[0] != "prefill"}
        assert {(kind.is_processed, kind.has_logprobs) for kind in kinds} >= {
            (False, False),
            (True, False),
            (True, True),
        }
        recorded = engine.graphs._recorder.recorded
    assert recorded == len(engine.graphs)
    assert run(engine) == run(reference)  # plain ones, on the same graphs, after all that
    neutral = ProcessorRows.neutral(3, 97, CPU)
    for name in ("repetition_penalty_B", "presence_penalty_B", "frequency_penalty_B", "bias_BV", "allowed_BW"):
        assert torch.equal(getattr(engine.processors.tensors, name), getattr(neutral, name))


@pytest.fixture
def used_length(monkeypatch):
    """Attention that stops at each query's position by itself, as the GPU's does, in PyTorch."""

    def run(q_BTHD, cache, position_BT, mask_BTL):
        k_BKSD, v_BKSD = cache.read(len(q_BTHD), cache.k_RKSD.shape[2], q_BTHD.dtype)
        mask_BTS = torch.arange(k_BKSD.shape[2]) <= position_BT.clamp(min=0)[..., None]
        return attention.attend(q_BTHD, k_BKSD, v_BKSD, mask_BTS)

    form = attention.AttentionForm("used length", lambda q, cache: cache.row_B is None, run)
    monkeypatch.setattr(attention, "FORMS", (form, *attention.FORMS))
    monkeypatch.setattr("qwen3fast.engine.parts.finds_used_length", lambda *_: True)


def test_where_attention_finds_the_used_length_warmup_captures_all_graphs(model, used_length):
    """One for each chunk size that fits, and for each batch and sampler: none for each bucket, and none later."""
    engine = make_engine(model, 2)
    assert not engine.parts.needs_mask
    engine.warmup()
    batches = engine.batch_buckets()
    assert len(engine.graphs) == engine.graphs._recorder.recorded == 4 + len(batches) * len(SamplerKind)
    assert run(engine) == run(make_engine(model))  # requests of one bucket and of two
    assert engine.graphs._recorder.recorded == len(engine.graphs) == 4 + len(batches) * len(SamplerKind)


def test_first_chunks_are_replayed_with_their_own_tokens_row_and_end(model):
    engine, plain = make_engine(model, 2), make_engine(model)
    prompts = [[i % 97 for i in range(n)] for n in (3, 30, 32, 90, 20, 230)]  # chunks of 32, 128 and 256
    for row, prompt in enumerate(prompts):
        expected_1V = plain.prefill_whole(row % 3, prompt)
        assert_near(engine.prefill_whole(row % 3, prompt), expected_1V)
    assert {key for key in engine.graphs._replays} == {("prefill", 32), ("prefill", 128), ("prefill", 256)}
    for ours, theirs in zip(engine.cache.tensors(), plain.cache.tensors(), strict=True):
        for row, prompt in enumerate(prompts[3:]):  # padding differs
            assert_near(ours[row, :, : len(prompt)], theirs[row, :, : len(prompt)])


def test_chunks_are_not_captured_where_their_experts_make_the_host_wait(monkeypatch):
    """Their steps are: a step's experts are known on the device."""
    model = randomized(small_config(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24), seed=3)
    expected = run(make_engine(model))
    for waits in (False, True):
        monkeypatch.setattr(engine_module, "waits_for_device", lambda *_, waits=waits: waits)
        engine = make_engine(model, 2)
        assert run(engine) == expected
        kinds = {key[0] for key in engine.graphs._replays}
        assert ("prefill" in kinds) == (not waits) and kinds & {1, 2, 3}
        engine.warmup()
        assert engine.graphs.failures == {}


def test_logits_of_one_prompt_stay_when_the_next_is_computed(model):
    engine = make_engine(model, 2)
    first_1V = engine.prefill_whole(0, [1, 2, 3])
    kept_1V = first_1V.clone()
    engine.prefill_whole(1, [4, 5])
    assert torch.equal(first_1V, kept_1V)


def test_steps_with_a_hook_are_in_no_graph(model):
    """It runs on the host at every token; other requests get the same tokens as with graphs."""
    plain = Request([1, 2, 3], RowSampling(30.0, seed=7), 40)
    hooked = Request([5, 6], RowSampling(30.0, seed=8), 10, logits_processor=lambda x_V, ids: x_V.roll(len(ids)))
    requests = [replace(request, output_ids=[]) for request in (plain, hooked)]
    expected = run(make_engine(model), requests)
    engine = make_engine(model, 2)
    assert run(engine, [plain, hooked]) == expected
    assert len(engine.graphs) == engine.graphs._recorder.recorded > 0
    # Recorded before and after the two were together.
    assert {key[0] for key in engine.graphs._replays} == {"prefill", 1}


def test_the_recorder_of_this_test_freezes_what_the_host_decides(model):
    """The test above can fail: a number counted up on the host stays what it was."""
    counter, total = [0], torch.zeros(1)

    def step():
        counter[0] += 1
        total.add_(counter[0])

    graphs = GraphCache(CpuRecorder(lambda: [total]))
    for _ in range(3):
        graphs.run("key", step)
    assert (counter, total.item()) == ([2], 5.0)  # 1 at warm-up, recorded with 2, replayed twice


class RefusingRecorder:
    """A recorder for which some steps fail. refuses: tells by the number of a call whether it fails; error: how."""

    def __init__(self, refuses=lambda number: True, error=RuntimeError, buffers=None):
        self.refuses, self.error, self.calls = refuses, error, 0
        self.recorder = CpuRecorder(buffers)

    def warm_up(self, step):
        assert not gc.isenabled()
        step()

    def record(self, step):
        self.calls += 1
        assert not gc.isenabled()
        if self.refuses(self.calls):
            raise self.error("operation not permitted when stream is capturing")
        return self.recorder.record(step)


def refusing_engine(model, **options):
    engine = make_engine(model)
    engine._use_graphs(GraphCache(RefusingRecorder(buffers=lambda: buffers_of(engine), **options)))
    return engine


def test_steps_that_cannot_be_recorded_run_uncaptured_with_one_warning(model):
    expected = run(make_engine(model))
    engine = refusing_engine(model)
    with pytest.warns(UserWarning, match=r"runs without, slower: operation not permitted.*cuda_graphs=False"):
        assert run(engine) == expected
    calls = engine.graphs._recorder.calls
    assert calls == ATTEMPTS * len(engine.graphs.failures) > ATTEMPTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(engine) == expected
    assert len(engine.graphs) == 0 and engine.graphs._recorder.calls == calls
    assert set(engine.graphs.failures.values()) == {"operation not permitted when stream is capturing"}
    assert gc.isenabled()


def test_a_capture_that_another_thread_breaks_is_tried_once_more(model):
    engine = refusing_engine(model, refuses=lambda number: number % 2 == 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(engine) == run(make_engine(model))
    assert len(engine.graphs) >= 3 and not engine.graphs.failures


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_step_that_cannot_be_captured_costs_its_own_graph_alone(model, error):
    """The request that ran into it, and all others, go on."""
    engine = refusing_engine(model, refuses=lambda number: number <= 2, error=error)
    with pytest.warns(UserWarning, match=r"could not be captured.*cuda_graphs=False \(--no-cuda-graphs\)"):
        assert run(engine) == run(make_engine(model))
    assert len(engine.graphs.failures) == (1 if error is RuntimeError else 2)
    assert len(engine.graphs) >= 2
    assert not set(engine.graphs.failures) & set(engine.graphs._replays)


def test_captures_of_two_engines_wait_for_each_other():
    started, go, order = threading.Event(), threading.Event(), []

    class Slow:
        def __init__(self, name):
            self.name = name

        def warm_up(self, step):
            order.append(f"{self.name} begins")
            started.set()
            assert go.wait(30)

        def record(self, step):
            order.append(f"{self.name} ends")
            return step

    caches = [GraphCache(Slow(name)) for name in ("first", "second")]
    threads = [threading.Thread(target=graphs.run, args=("key", lambda: None)) for graphs in caches]
    threads[0].start()
    assert started.wait(30)
    threads[1].start()
    threads[1].join(0.05)
    go.set()
    for thread in threads:
        thread.join(30)
    assert order == ["first begins", "first ends", "second begins", "second ends"]


def test_garbage_collection_that_was_off_stays_off():
    gc.disable()
    try:
        GraphCache(CpuRecorder(list)).run("key", lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_first_chunk_whose_logprobs_are_wanted_runs_uncaptured_and_others_are_replayed(model):
    engine = make_engine(model, lookahead=1)
    plain = make_engine(model)
    ids = [(5 * i) % 97 for i in range(150)]
    wanted = WantedLogprobs(1, 2)
    for prompt, first in ((ids[:20], 1), (ids, 1), (ids, 140)):  # in one chunk; from the first on; in the last only
        found, expected = [], plain.prompt_logprobs_uncached(prompt, replace(wanted, first=first))
        recorded = len(engine.graphs)
        prefill, logits_1V = engine.begin_prefill(0, prompt, 0, replace(wanted, first=first)), None
        while logits_1V is None:
            logits_1V = engine.prefill_step(prefill)
        found = prefill.logprobs
        assert len(engine.graphs) - recorded == (first > 1)
        assert [at.ids for at in found] == [at.ids for at in expected]
        assert_near(torch.tensor([at.chosen for at in found]), torch.tensor([at.chosen for at in expected]))
        assert_near(logits_1V, plain.logits_uncached(prompt))
