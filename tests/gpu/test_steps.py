"""On a GPU: what a step launches, and steps that run ahead of the host."""

import pytest
import torch
from conftest import engine_of
from gpu_check.replay import step_profile

from gpu.conftest import DEVICE, MAX_SEQ_LEN, assert_captured
from qwen3fast import SamplingParams
from qwen3fast.engine import RowSampling
from qwen3fast.engine.cuda_graph import CudaRecorder
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler

LAYERS = 2
MAX_KERNELS = 20 * LAYERS + 40  # of a step; captured eagerly, it has about 60 a layer
PROMPT = list(range(90))


def profile(generator):
    """Return the kernels that a greedy step of one request launches."""

    def run(tokens):
        generator.generate(PROMPT, SamplingParams(temperature=0, max_tokens=tokens))

    return step_profile(run, DEVICE)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no kernels on the CPU")
def test_a_step_is_one_graph_of_compiled_kernels(generators):
    step = profile(generators["graphs"])
    assert step["graph_launches"] == 1
    assert 0 < step["kernels"] <= MAX_KERNELS, step["by_name"]
    assert step["eager_kernels"] == [], "operations that no compiler has fused were captured"
    assert_captured(generators["graphs"])


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no kernels on the CPU")
def test_without_graphs_the_same_kernels_are_launched_one_by_one(generators):
    graphs, compiled, eager = (profile(generators[mode]) for mode in ("graphs", "compiled", "eager"))
    assert compiled["graph_launches"] == eager["graph_launches"] == 0
    assert compiled["kernels"] == graphs["kernels"]
    assert compiled["launches"] >= compiled["kernels"]
    assert eager["kernels"] > 1.5 * graphs["kernels"]
    assert eager["eager_kernels"] != []  # a compiled step's lack of them then means something


def test_steps_run_ahead_and_stop_tokens_are_never_passed(twin):
    engine = engine_of(twin, 2, MAX_SEQ_LEN, compile=True)
    scheduler = Scheduler(engine)

    def run(stop_ids):
        request = Request([1, 2, 3], RowSampling(30.0, seed=7), 30, stop_ids)
        scheduler.add(request)
        while request.finish_reason is None:
            scheduler.step()
        return request.output_ids

    reply = run(frozenset())
    stop = next(token for i, token in enumerate(reply) if i >= 8 and token not in reply[:i])
    assert reply.index(stop) < 20
    assert run(frozenset([stop])) == reply[: reply.index(stop) + 1]
    assert scheduler.dropped_tokens == engine.lookahead
    engine.close()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no capture on the CPU")
def test_a_capture_that_breaks_leaves_the_device_usable():
    recorder, count = CudaRecorder(DEVICE), torch.zeros(4, device=DEVICE)

    def waits():
        count.add_(1)
        torch.cuda.synchronize()  # forbidden during capture, which it breaks

    with pytest.raises(RuntimeError):
        recorder.record(waits)
    assert torch.rand(3, device=DEVICE).shape == (3,)  # the default generator is in no capture
    replay = recorder.record(lambda: count.add_(1))
    before = count.tolist()
    replay()
    assert count.tolist() == [number + 1 for number in before]
