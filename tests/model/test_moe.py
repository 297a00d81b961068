"""Mixture of experts: routing and both ways of computing it, on every path of the engine; what a decode step reads.

test_quantized_experts.py has those in 8 and 4 bits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, engine_of, fill_randomly, random_ids, random_tensor, randomized, small_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3fast import Generator, SamplingParams
from qwen3fast.engine import RowSampling, fast_layers
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.fast_layers import FastExperts, use_fast_layers
from qwen3fast.kernels.grouped import waits_for_device
from qwen3fast.kernels.linear import Linear
from qwen3fast.model import MoE
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.samplers import SamplerKind

CPU = torch.device("cpu")
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIG = small_config(**EXPERTS)
MIXED = {"mlp_only_layers": (0,)}  # one layer without experts, one with


def make_moe(seed=0, **changes) -> MoE:
    """A mixture of experts, every weight random."""
    moe = MoE(replace(CONFIG, **changes))
    fill_randomly(moe, seed)
    return moe


def reference(moe: MoE, x_E: torch.Tensor) -> torch.Tensor:
    """One token in float64, expert by expert."""
    x_E = x_E.double()
    chance_X = (moe.gate.weight.double() @ x_E).softmax(0)
    chosen = sorted(range(len(chance_X)), key=lambda expert: -chance_X[expert])[: moe.num_chosen]
    total = sum(chance_X[expert] for expert in chosen) if moe.is_renormalized else 1.0
    y_E = torch.zeros_like(x_E)
    for expert in chosen:
        gate, up = (moe.experts.gate_up_proj[expert].double() @ x_E).chunk(2)
        y_E += chance_X[expert] / total * (moe.experts.down_proj[expert].double() @ (F.silu(gate) * up))
    return y_E


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "in_features", "waits"),
    [
        ("cuda", (9, 0), torch.bfloat16, 768, False),
        ("cuda", (10, 3), torch.bfloat16, 768, False),
        ("cuda", (8, 0), torch.bfloat16, 768, True),
        ("cuda", (12, 0), torch.bfloat16, 768, True),
        ("cuda", (9, 0), torch.float32, 768, True),
        ("cuda", (9, 0), torch.bfloat16, 12, True),
        ("cpu", None, torch.float32, 12, False),
    ],
)
def test_the_host_waits_for_groups_where_pytorch_has_no_kernel(
    device, capability, dtype, in_features, waits, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert waits_for_device(torch.device(device), dtype, in_features) == waits


@pytest.mark.parametrize(
    ("batch", "tokens", "norm_topk_prob"), [(1, 1, False), (3, 1, True), (5, 1, False), (1, 2, True), (2, 17, False)]
)
def test_moe_is_the_sum_of_its_chosen_experts(norm_topk_prob, batch, tokens):
    moe, x_BTE = make_moe(norm_topk_prob=norm_topk_prob), random_tensor(batch, tokens, 48)
    expected = torch.stack([reference(moe, x_E) for x_E in x_BTE.flatten(0, 1)]).view(x_BTE.shape)
    assert_near(moe(x_BTE), expected)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_shares_sum_to_one_only_if_renormalized(norm_topk_prob):
    share_NC, _ = make_moe(norm_topk_prob=norm_topk_prob).route(random_tensor(20, 48))
    total_N = share_NC.sum(dim=1)
    assert torch.allclose(total_N, torch.ones(20)) == norm_topk_prob
    assert norm_topk_prob or (total_N < 1).all()


def test_routing_is_in_float32():
    share_NC, _ = make_moe().bfloat16().route(random_tensor(3, 48).bfloat16())
    assert share_NC.dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("is_fast", [False, True])
def test_few_and_many_are_the_same(is_fast, tokens):
    plain, moe, x_NE = make_moe(), make_moe(), random_tensor(tokens, 48)
    if is_fast:
        use_fast_layers(moe)
    _, expert_NC = moe.route(x_NE)
    expected = plain.experts.gathered(x_NE, expert_NC)
    assert_near(moe.experts.grouped(x_NE, expert_NC), expected)
    assert_near(moe.experts.gathered(x_NE, expert_NC), expected)


def test_on_cpus_uncompiled_experts_of_few_tokens_do_not_copy_weights(monkeypatch):
    moe = make_moe()
    use_fast_layers(moe)
    monkeypatch.setattr(fast_layers, "run_gathered", lambda *_: pytest.fail("weights are copied"))
    moe(random_tensor(1, 1, 48))


@pytest.mark.parametrize("is_fast", [False, True])
def test_many_serves_experts_without_tokens_and_all_tokens_of_one(is_fast):
    moe, x_NE = make_moe(), random_tensor(6, 48)
    if is_fast:
        use_fast_layers(moe)
    for expert in (0, 5, 7):
        expert_NC = torch.full((6, 1), expert)
        assert_near(moe.experts.grouped(x_NE, expert_NC), moe.experts.gathered(x_NE, expert_NC))


def test_a_token_does_not_depend_on_those_beside_it():
    moe, x_BTE = make_moe(), random_tensor(1, 30, 48)
    whole = moe(x_BTE)
    for t in (0, 13, 29):
        assert_near(moe(x_BTE[:, t : t + 1]), whole[:, t : t + 1])


@pytest.mark.parametrize("layers", [(True, True, True, True), (False, True, False, True), (False, False, False, True)])
def test_layers_with_experts_are_those_the_config_names(layers):
    changes = {0: {}, 2: {"decoder_sparse_step": 2}, 3: {"decoder_sparse_step": 2, "mlp_only_layers": (1,)}}
    config = replace(CONFIG, num_hidden_layers=4, **changes[layers.count(False)])
    assert tuple(isinstance(block.mlp, MoE) for block in randomized(config).model.layers) == layers
    assert tuple(config.is_sparse(layer) for layer in range(4)) == layers


# -------------------------------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize(
    ("length", "changes"), [(1, {}), (2, MIXED), (33, {"norm_topk_prob": True}), (150, MIXED)], ids=str
)
def test_prefill_logits_equal_the_plain_model(changes, length):
    model = randomized(replace(CONFIG, **changes))
    ids = random_ids(length).tolist()
    expected_V = model(torch.tensor([ids]))[0, -1]
    assert_near(engine_of(model).prefill_whole(1, ids)[0], expected_V)


def check_replies(model, generator, prompts):
    """Replies together, alone and without a cache are those of the plain model."""
    params = SamplingParams(temperature=0, max_tokens=8)
    together = [result.token_ids for result in generator.generate(prompts, params)]
    for prompt, ids in zip(prompts, together, strict=True):
        logits_TV = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        assert logits_TV.argmax(-1).tolist() == ids
    assert [generator.generate(prompt, params).token_ids for prompt in prompts] == together
    assert generator.generate(prompts[1], params, use_cache=False).token_ids == together[1]


@pytest.mark.parametrize("changes", [{"norm_topk_prob": True}, MIXED], ids=["experts", "mixed"])
def test_cached_and_batched_tokens_are_those_of_the_plain_model(changes):
    model = randomized(replace(CONFIG, eos_token_ids=(), **changes), seed=3)
    with Generator(model, max_seq_len=128, max_batch_size=5, compile=False) as generator:
        check_replies(model, generator, [random_ids(n, seed=n).tolist() for n in (1, 5, 40, 63, 2)])


def test_compiled_tokens_are_those_of_the_plain_model():
    model = randomized(replace(CONFIG, eos_token_ids=(), **MIXED), seed=3)
    prompts = [random_ids(n, seed=n).tolist() for n in (40, 5)]
    with Generator(model, max_seq_len=128, max_batch_size=2, compile=True) as generator:
        check_replies(model, generator, prompts)
        compilations = generator.stats.compilations
        check_replies(model, generator, [prompt[1:] for prompt in prompts])
        assert generator.stats.compilations == compilations


def test_a_compiled_model_in_bfloat16_is_near_the_plain_one():
    config = small_config(hidden_size=64, head_dim=32, **EXPERTS, dtype=torch.bfloat16)
    model = randomized(config).bfloat16()
    ids = random_ids(40).tolist()
    compiled, eager = engine_of(model, compile=True), engine_of(model)
    assert_near(compiled.prefill_whole(0, ids), eager.prefill_whole(0, ids), torch.bfloat16)


def test_an_engine_uses_the_fast_layers_and_keeps_the_weights():
    model = randomized(CONFIG)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    engine_of(model)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    assert type(model.model.layers[0].mlp.experts) is FastExperts
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {Linear}


def test_blocks_with_plain_experts_are_not_run_in_one_operation():
    for changes in ({}, MIXED):
        model = randomized(replace(CONFIG, head_dim=32, **changes)).bfloat16()
        assert not DecodeLayers(model, StaticKVCache(model.config, 1, 128, torch.bfloat16, CPU)).serves(1)


# ------------------------------------------------------------------------------------- what a decode step reads


class ExpertReads(TorchDispatchMode):
    """Counts the elements of stacked expert weights that each operation reads."""

    def __init__(self, model) -> None:
        super().__init__()
        experts = [m.mlp.experts for m in model.model.layers if isinstance(m.mlp, MoE)]
        self._stacks = {p.untyped_storage()._cdata for m in experts for p in m.parameters()}
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._stacks:
                is_grouped = operation is torch.ops.qwen3fast.grouped_linear.default
                made = result.untyped_storage()._cdata if isinstance(result, torch.Tensor) else None
                if made != tensor.untyped_storage()._cdata:  # a view reads nothing
                    share = len(set(args[2].tolist()) - {0}) / len(args[2]) if is_grouped else 1  # groups with rows
                    self.elements[str(operation)] += int(share * tensor.numel())
        return result


def decode_reads(rows, **changes):
    """Elements of expert weights that a decode step of so many rows reads."""
    model = randomized(replace(CONFIG, num_experts=32, **changes))
    engine = engine_of(model, rows=rows)
    for row in range(rows):
        engine.prefill_whole(row, [5, 7, 11 + row])
        engine.set_row(row, 3, RowSampling(0.8, 20, 0.9, seed=7))
    reads = ExpertReads(model)
    with torch.no_grad(), reads:
        decode_step(engine.forward_args(), engine.state, rows, 128, SamplerKind.GREEDY)
    return reads.elements


@pytest.mark.parametrize(("rows", "changes"), [(1, {}), (2, {"num_experts_per_tok": 5}), (4, MIXED)], ids=str)
def test_a_decode_step_reads_the_chosen_experts_only(rows, changes):
    config = replace(CONFIG, num_experts=32, **changes)
    one_expert, layers = 3 * config.hidden_size * config.moe_intermediate_size, 2 - len(config.mlp_only_layers)
    reads = decode_reads(rows, **changes)
    most = rows * config.num_experts_per_tok * layers * one_expert  # rows may share experts
    assert list(reads) == ["qwen3fast.grouped_linear.default"]
    assert most / rows <= reads.total() <= most


def test_reads_of_one_row_are_those_that_decode_parameters_count():
    config = replace(CONFIG, num_experts=32)
    inactive = config.num_parameters - config.decode_parameters
    all_experts = 2 * 32 * 3 * config.hidden_size * config.moe_intermediate_size
    assert decode_reads(1).total() == all_experts - inactive


def test_reads_do_not_grow_with_the_number_of_experts():
    model = randomized(replace(CONFIG, num_experts=64))
    experts = model.model.layers[0].mlp.experts
    assert decode_reads(1).total() == 2 * 2 * (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel())
