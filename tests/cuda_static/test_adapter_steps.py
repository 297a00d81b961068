"""Steps with adapters keep the fast path's rules: nothing asked of the host, no new address, graphs of their own."""

from dataclasses import replace

import pytest
import torch
from conftest import engine_of, random_tensor, randomized, small_config
from cuda_static.capture_rules import HostWatch
from cuda_static.fake_cuda import fake_cuda, fake_model
from cuda_static.test_replay import CpuRecorder, buffers_of

from qwen3fast.engine.adapters import AdapterSlots
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.parts import Forward, Parts
from qwen3fast.engine.prefill import prefill_chunk
from qwen3fast.engine.state import DecodeState, RowSampling, StepKind
from qwen3fast.model import rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.samplers import SamplerKind
from qwen3fast.scheduling.request import Adapter, Request
from qwen3fast.scheduling.scheduler import Scheduler

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def matrices(engine, seed):
    """An adapter for all layers; every second one of rank 3, which leaves a part of its slot empty."""
    found = {}
    for i, (name, layer) in enumerate(engine.adapters.layers.items()):
        rank, (k, n) = 4 - i % 2, (layer.base.in_features, layer.base.out_features)
        found[name] = (random_tensor(rank, k, seed=seed + 2 * i), random_tensor(n, rank, seed=seed + 2 * i + 1) / 4)
    return found


def make_engine(lookahead=0, rows=3):
    model = randomized(small_config(max_position_embeddings=1024, eos_token_ids=(), tie_word_embeddings=False), seed=3)
    engine = engine_of(model, rows, lookahead=lookahead, max_adapters=2, max_adapter_rank=4)
    for slot in (1, 2):
        engine.write_adapter(slot, matrices(engine, 100 * slot))
    if lookahead:
        engine._use_graphs(GraphCache(CpuRecorder(lambda: buffers_of(engine))))
    return engine


def requests():
    """Of both adapters and of none, in rows that are filled again, greedy and sampled."""
    one, two = Adapter("one", 1), Adapter("two", 2)
    stop_ids = frozenset([3, 50])
    return [
        Request([1, 2, 3], RowSampling(0.0), 30, stop_ids, adapter=one),
        Request(list(range(90)), RowSampling(30.0, seed=1), 60, stop_ids),
        Request([7], RowSampling(30.0, seed=2), 5, stop_ids, adapter=two),
        Request([9, 9], RowSampling(0.0), 40, stop_ids, adapter=two),
        Request([1, 2, 3], RowSampling(0.0), 20, stop_ids),
    ]


def run(engine):
    scheduler, mine = Scheduler(engine), requests()
    for request in mine:
        scheduler.add(request)
    while not scheduler.is_idle:
        scheduler.step()
    assert all(request.error is None for request in mine)
    return [request.output_ids for request in mine]


def test_replayed_steps_with_adapters_give_the_tokens_of_launched_ones():
    expected = run(make_engine())
    engine = make_engine(2)
    assert run(engine) == expected
    assert run(engine) == expected  # everything is replayed now
    kinds = {key[2].has_adapters for key in engine.graphs._replays if isinstance(key[-1], StepKind)}
    assert kinds == {True, False}
    assert {key[0] for key in engine.graphs._replays} >= {"prefill", "prefill with adapter"}


def test_warmup_captures_the_graphs_of_both_kinds():
    engine = make_engine(2, rows=1)
    reported = []
    engine.warmup(reported.append)
    assert len(reported) == engine.num_warmup_parts()
    before = len(engine.graphs)
    assert before == 2 * (4 + len(engine.batch_buckets()) * len(engine.cache.buckets) * len(SamplerKind))
    assert run(engine) == run(make_engine(rows=1))
    assert len(engine.graphs) == before


def test_matrices_and_slots_stay_at_their_addresses():
    engine = make_engine()
    tensors = [*engine.adapters.model.parameters(), *engine.adapters.model.buffers(), *vars(engine.state).values()]
    before = [tensor.data_ptr() for tensor in tensors]
    run(engine)
    engine.write_adapter(1, {})
    engine.write_adapter(1, matrices(engine, 7))
    assert [tensor.data_ptr() for tensor in tensors] == before
    shared = {p.data_ptr() for p in engine.model.parameters()}
    assert shared <= set(before)  # no weight of the model is stored twice


def test_swapped_and_cleared_rows_take_their_adapter_along():
    engine = make_engine()
    engine.set_row(0, 3, RowSampling(adapter=2))
    engine.swap_rows(0, 2, 1)
    assert engine.state.adapter_R.tolist() == [0, 0, 2]
    engine.clear_row(2)
    assert engine.state.adapter_R.tolist() == [0, 0, 0]


def test_a_fused_step_is_left_to_steps_without_adapters():
    """It reads the base model's weights alone."""

    class Fused:
        """A fused step that refuses to run."""

        def serves(self, num_rows):
            return True

        def greedy(self, *arguments):
            raise AssertionError("it knows no adapters")

    engine = make_engine()
    for row, slot in enumerate((1, 0, 2)):
        logits_1V = engine.prefill_whole(row, [5, 6, 7 + row], slot)
        engine.set_row(row, 3, RowSampling(adapter=slot))
        engine.sample_first(row, logits_1V, StepKind())
    engine.cache.buckets = [32, 256]
    engine.parts = replace(engine.parts, fused_step=Fused())
    assert engine.read_length(3, 20) == engine.cache.allocated_len
    assert engine.read_length(3, 20, has_adapters=True) == 32
    assert len(engine.decode(3, 8, StepKind(has_adapters=True))) == 3
    with pytest.raises(AssertionError, match="it knows no adapters"):
        engine.decode(3, 8, StepKind())


@pytest.mark.parametrize(
    ("size", "quantization"), [("0.6b", None), ("0.6b", "int8"), ("0.6b", "int4"), ("8b", None), ("30b-a3b", None)]
)
def test_steps_and_chunks_with_adapters_run_on_cuda_tensors(size, quantization):
    with fake_cuda() as device:
        config = replace(ModelConfig.named(size), num_hidden_layers=2)
        model = fake_model(config, device, quantization)
        cache = StaticKVCache(config, 8, 1024, torch.bfloat16, device)
        cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device)
        parts, state = Parts.build(StepCompiler(False, device), model, cache), DecodeState.allocate(8, device)
        slots = AdapterSlots(model, 3, 16, state.adapter_R)
        assert {p.device for p in (*slots.model.parameters(), *slots.model.buffers())} == {device}
        forward = Forward(slots.model, parts, cache, cos_SD, sin_SD)
        row_1, token_1T = (torch.zeros(*shape, dtype=torch.int64, device=device) for shape in ((1,), (1, 64)))
        with HostWatch() as watch:
            for rows in (1, 8):
                decode_step(forward, state, rows, cache.buckets[0], SamplerKind.GREEDY)
            assert prefill_chunk(forward, row_1, token_1T, 512).shape == (1, 64, config.hidden_size)
        assert watch.faults == []
