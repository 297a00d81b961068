"""Adapters in the C++ operation for all blocks, beside the blocks run one by one."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_near, engine_of, random_tensor, randomized, small_config

from qwen3fast.engine import adapters, staging
from qwen3fast.engine.decode import _run_blocks
from qwen3fast.engine.state import RowSampling, StepKind
from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import operations
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.scheduling.request import Request

CPU = torch.device("cpu")
SLOTS = [2, 0, 1, 2, 0]

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no C++ operations on this machine")


def make_engine(quantization=None, rank=6, reorder=lambda model: None):
    """An engine with prompts in all rows, with adapters and without. reorder: changes the quantized model."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "dtype": torch.bfloat16, "eos_token_ids": ()}
    model = randomized(small_config(**sizes)).bfloat16()
    if quantization is not None:
        quantize_model(model, quantization, torch.bfloat16)
    reorder(model)
    engine = engine_of(model, len(SLOTS), 64, compile="auto", max_adapters=2, max_adapter_rank=rank)
    write_adapters(engine)
    for row, slot in enumerate(SLOTS):
        engine.sample_first(row, engine.prefill_whole(row, [5, 6, 7 + row], slot), StepKind())
        engine.set_row(row, 3, RowSampling(adapter=slot))
    return engine


def write_adapters(engine):
    """Fill both slots with random matrices, the same for each engine."""
    rank = engine.adapters.max_rank
    for slot in (1, 2):
        found = {}
        for i, (name, layer) in enumerate(engine.adapters.layers.items()):
            k, n = layer.base.in_features, layer.base.out_features
            a_RK = random_tensor(rank, k, seed=100 * slot + i) / k**0.5
            found[name] = (a_RK, random_tensor(n, rank, seed=200 * slot + i) / rank**0.5)
        engine.write_adapter(slot, found)


def outputs(engine, has_adapters):
    """The last block's output of the next step, by the operation and block by block."""
    forward = engine.forward_args(has_adapters)
    rows, tables = slice(len(SLOTS)), (engine.cos_SD, engine.sin_SD)
    x_B1E = forward.model.embed(engine.state.input_R[rows, None])
    together = forward.parts.decode_layers(x_B1E, *tables, engine.state.position_R[rows, None])
    with torch.no_grad(), operations():
        alone = _run_blocks(forward, engine.state, rows, 64)
    return together, alone


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_all_blocks_together_add_what_each_block_adds(quantization, threads):
    engine = make_engine(quantization)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        adapted, expected = outputs(engine, True)
        plain, _ = outputs(engine, False)
    finally:
        torch.set_num_threads(before)
    assert_near(adapted, expected, torch.bfloat16)
    for row, slot in enumerate(SLOTS):
        change = (adapted[row] - plain[row]).abs().max() / plain[row].abs().max()
        assert change == 0 if slot == 0 else change > 0.1


def test_each_layers_product_is_added_at_its_place():
    """With one adapted layer at a time: none hides behind the others."""
    engine = make_engine()
    for layer in engine.adapters.layers.values():
        layer.lora_B.zero_()
    for name, layer in engine.adapters.layers.items():
        layer.lora_B.copy_(random_tensor(*layer.lora_B.shape, seed=3))
        layer.lora_B[0].zero_()
        adapted, expected = outputs(engine, True)
        assert_near(adapted, expected, torch.bfloat16)
        plain, _ = outputs(engine, False)
        assert (adapted[0] - plain[0]).abs().max() > 0.02 * plain[0].abs().max(), name
        layer.lora_B.zero_()


@pytest.mark.parametrize("rank", [1, 4, 7, 16])
def test_every_rank_is_served(rank):
    assert_near(*outputs(make_engine(rank=rank), True), torch.bfloat16)


def test_all_that_is_copied_to_a_running_pipeline_is_staged(monkeypatch):
    """In pinned memory, in the order and dtype of its place: any other copy to a CUDA device waits for it."""
    seen = []
    engine = make_engine()
    monkeypatch.setattr(adapters, "staged", lambda tensor, device: seen.append(tensor) or tensor)
    write_adapters(engine)
    assert len(seen) % (2 * len(engine.adapters.layers)) == 0 < len(seen)
    assert all(x.is_contiguous() and x.dtype == engine.model.model.norm.weight.dtype for x in seen)
    monkeypatch.setattr(staging, "staged", lambda tensor, device: seen.append(tensor) or tensor)
    Request([1], output_ids=[4, 5], logits_processor=lambda logits_V, output_T: logits_V).process(torch.zeros(3))
    assert seen[-1].tolist() == [4, 5]


def test_matrices_of_other_shapes_are_refused():
    engine = make_engine()
    run = engine.parts.decode_layers._run
    pairs = [(layer.lora_A, layer.lora_B) for layer in engine.adapters.layers.values()]
    slot_R = engine.state.adapter_R
    for bad in (pairs[1:], [(a, b.float()) for a, b in pairs], [(b, a) for a, b in pairs]):
        with pytest.raises(ValueError, match="decode_layers: "):
            run.adapters(bad, slot_R)
    for bad_slots in (slot_R[1:], slot_R.int()):
        with pytest.raises(ValueError, match=r"decode_layers: slots must be \(\d,\) int64"):
            run.adapters(pairs, bad_slots)


def test_with_experts_steps_with_adapters_run_block_by_block():
    """The operation has no adapters beside experts: it is left to steps without."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes = {"hidden_size": 64, "head_dim": 32, "dtype": torch.bfloat16, "eos_token_ids": ()}
    model = randomized(small_config(**sizes, **experts)).bfloat16()
    quantize_model(model, "int8", torch.bfloat16)
    engine = engine_of(model, 2, 64, compile="auto", max_adapters=1)
    found = {}
    for i, (name, layer) in enumerate(engine.adapters.layers.items()):
        k, n = layer.base.in_features, layer.base.out_features
        found[name] = (random_tensor(4, k, seed=i) / k**0.5, random_tensor(n, 4, seed=10 + i))
    engine.write_adapter(1, found)
    for row, slot in enumerate((1, 0)):
        engine.sample_first(row, engine.prefill_whole(row, [5, 6, 7], slot), StepKind())
        engine.set_row(row, 3, RowSampling(adapter=slot))
    parts = engine.forward_args(True).parts
    assert parts.decode_layers is None
    prompt = [5, 6, 7, int(engine.state.input_R[0])]
    assert engine.decode(2, 4, StepKind(has_adapters=True))[0] == int(engine.logits_uncached(prompt, 1)[0].argmax())
