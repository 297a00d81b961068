"""The host's loop on graphs that are recorded and replayed, with a recorder that does so on the CPU."""

import warnings

import pytest
import torch
from conftest import randomised, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3fast.engine import Engine, Request, Scheduler
from qwen3fast.engine.cuda_graph import GraphCache, LastOperation
from qwen3fast.kv_cache import StaticKVCache

CPU = torch.device("cpu")


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

    buffers: what a step writes to; put back after recording, which on a CPU has to run the step.
    """

    def __init__(self, buffers):
        self.buffers, self.recorded = buffers, 0

    def warm_up(self, step):
        step()

    def record(self, step):
        before = [buffer.clone() for buffer in self.buffers]
        with Tape() as tape:
            step()
        for buffer, old in zip(self.buffers, before, strict=True):
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
    return randomised(small_config(max_position_embeddings=1024, eos_token_ids=()), seed=3)


def make_engine(model, lookahead=0, recorder=None):
    cache = StaticKVCache(model.config, 3, 256, torch.float32, CPU)
    engine = Engine(model, cache, CPU, compile=False, lookahead=lookahead)
    if recorder is not None:
        engine.graphs = GraphCache(recorder)
    elif lookahead:
        buffers = [*cache.keys, *cache.values, *vars(engine.state).values()]
        engine.graphs = GraphCache(CpuRecorder(buffers))
    return engine


def requests():
    """Greedy and sampled ones of different lengths, one of which crosses the border of a cache bucket."""
    sampled = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "stop_ids": frozenset([3, 50])}
    return [
        Request([1, 2, 3], 0.0, max_tokens=30, seed=0, **sampled),
        Request(list(range(90)), 30.0, max_tokens=80, seed=1, **sampled),
        Request([7], 30.0, max_tokens=5, seed=2, **sampled),
        Request([9, 9], 30.0, max_tokens=50, seed=3, **(sampled | {"top_k": 20})),
    ]


def run(engine):
    scheduler, running = Scheduler(engine), requests()
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


def test_the_recorder_of_this_test_freezes_what_the_host_decides(model):
    """So that the test above could fail: a number counted up on the host stays what it was."""
    counter, total = [0], torch.zeros(1)

    def step():
        counter[0] += 1
        total.add_(counter[0])

    graphs = GraphCache(CpuRecorder([total]))
    for _ in range(3):
        graphs.run("key", step)
    assert (counter, total.item()) == ([2], 5.0)  # 1 at warm-up, recorded with 2, replayed twice


class RefusingRecorder:
    """A recorder for which every step fails."""

    def warm_up(self, step):
        step()

    def record(self, step):
        with LastOperation() as operations:
            torch.zeros(2).nonzero()
        raise RuntimeError(f"{operations.name}: operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_recorded_runs_as_it_is_with_one_warning(model):
    expected = run(make_engine(model))
    engine = make_engine(model, 2, RefusingRecorder())
    with pytest.warns(
        UserWarning, match=r"runs without, slower; failed at aten\.nonzero\.default: .*cuda_graphs=False"
    ):
        assert run(engine) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(engine) == expected
    assert len(engine.graphs) == 0
