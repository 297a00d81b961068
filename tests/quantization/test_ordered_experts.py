"""Experts whose gate and up read their input channels in orders of their own: every form, whole models, files."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_same, random_ids, random_tensor, randomized, small_config
from prequantized_layouts import GPTQ, write_prequantized
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same_weights
from test_cpu_ops import CPU, rows_with_clear_choices, run_layers, run_layers_plainly
from test_prequantized_models import assert_greedy
from test_quantized_experts import choice, make_experts

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli import main
from qwen3fast.kernels import cpu, cuda
from qwen3fast.model import MoE
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.folding import fold_orders
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear

X, E, INNER = 16, 128, 64
CONFIG = small_config(
    vocab_size=1024,
    hidden_size=E,
    head_dim=32,
    num_experts=X,
    num_experts_per_tok=2,
    moe_intermediate_size=INNER,
    tie_word_embeddings=False,
    dtype=torch.bfloat16,
    eos_token_ids=(),
)
SCATTERED = {**GPTQ, "desc_act": True, "group_size": 32}
needs_operation = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
formats = pytest.mark.parametrize("format", FORMATS)
orders = pytest.mark.parametrize("shared", [True, False], ids=["one order per expert", "two orders"])


def random_orders(count: int, size: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.permutation(size) for _ in range(count)])).int()


def with_orders(experts: QuantizedExperts, shared: bool, seed: int = 0) -> QuantizedExperts:
    """Give gate and up of each expert orders, in place: one for both, or two."""
    layer, count = experts.gate_up_proj, experts.num_experts
    order_MK = random_orders(2 * count, layer.in_features, seed)
    if shared:
        order_MK[1::2] = order_MK[::2]
    experts.gate_up_proj = OrderedLinear(layer.packed, layer.format, order_MK)
    return experts


def with_orders_of_down(experts: QuantizedExperts, seed: int = 9) -> QuantizedExperts:
    """Give down of each expert an order, in place, as before it is folded."""
    layer = experts.down_proj
    order_XF = random_orders(experts.num_experts, layer.in_features, seed)
    experts.down_proj = OrderedLinear(layer.packed, layer.format, order_XF)
    return experts


def plain_weights(experts: QuantizedExperts) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up (X, 2I, E), and down (X, E, I), each column at the channel that the order names, by matrix."""
    weights = []
    for layer, count in ((experts.gate_up_proj, 2 * X), (experts.down_proj, X)):
        sorted_MNK = layer.format.dequantize(layer.packed).unflatten(0, (count, -1))
        weight_MNK = torch.full_like(sorted_MNK, torch.nan)
        order_MK = getattr(layer, "input_order", torch.arange(layer.in_features).expand(count, -1))
        for matrix, order_K in enumerate(order_MK.tolist()):
            weight_MNK[matrix, :, order_K] = sorted_MNK[matrix]
        weights.append(weight_MNK.reshape(X, -1, layer.in_features))
    return weights[0], weights[1]


def expected_outputs(experts: QuantizedExperts, x_NE: torch.Tensor, expert_NC: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(x)) * up(x)) of the dequantized weights, pair by pair."""
    gate_up, down = plain_weights(experts)
    y_NCE = torch.empty(*expert_NC.shape, x_NE.shape[1])
    for n, chosen in enumerate(expert_NC.tolist()):
        for c, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x_NE[n].float()).chunk(2)
            y_NCE[n, c] = down[expert] @ (F.silu(gate) * up)
    return y_NCE


def small_experts(format: str, shared: bool) -> QuantizedExperts:
    return with_orders(make_experts(FORMATS[format], sizes=(X, E, INNER)), shared)


# -------------------------------------------------------------------------------------------------------- the product


@formats
@orders
def test_dequantized_columns_are_for_the_channels_that_each_order_names(format, shared):
    experts = small_experts(format, shared)
    gate_up, down = plain_weights(experts)
    assert_same(experts.dequantize(experts.gate_up_proj), gate_up)
    assert_same(experts.dequantize(experts.down_proj), down)


@formats
@orders
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_plain_forms_gather_as_the_orders_say(format, shared, tokens, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    experts, x_NE, expert_NC = small_experts(format, shared), random_tensor(tokens, E, seed=5), choice(tokens, 2, X)
    expected = expected_outputs(experts, x_NE, expert_NC)
    assert_near(experts.gathered(x_NE, expert_NC), expected)
    assert_near(experts.grouped(x_NE, expert_NC), expected)
    if tokens == (1 if shared else 3):  # tracing takes long: each format with one row and with several
        compiled = torch.compile(experts.gathered, backend="eager", fullgraph=True)
        assert_near(compiled(x_NE, expert_NC), expected)


@needs_operation
@formats
@orders
@pytest.mark.parametrize(("tokens", "threads"), [(1, 1), (3, 2), (7, 3), (130, 2)])
def test_operation_gathers_as_the_orders_say(format, shared, tokens, threads):
    experts, x_NE = small_experts(format, shared), random_tensor(tokens, E, seed=5).bfloat16()
    expert_NC = choice(tokens, 2, X)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y_NCE = experts.gathered(x_NE, expert_NC)
    finally:
        torch.set_num_threads(before)
    expected = expected_outputs(experts, x_NE, expert_NC)
    assert (y_NCE.float() - expected).norm() < 0.02 * expected.norm()  # activations in 8 bits, as without orders
    assert_same(experts.grouped(x_NE, expert_NC), y_NCE)


@needs_operation
@formats
def test_an_order_gives_the_bits_of_an_input_in_that_order(format):
    """With one order for all experts, gathering inside is gathering outside."""
    experts, x_NE = make_experts(FORMATS[format], sizes=(X, E, INNER)), random_tensor(40, E).bfloat16()
    expert_NC, order_E = choice(40, 2, X), random_orders(1, E, 3)[0]
    expected = experts.gathered(x_NE[:, order_E], expert_NC)
    layer = experts.gate_up_proj
    experts.gate_up_proj = OrderedLinear(layer.packed, layer.format, order_E.repeat(2 * X, 1))
    assert_same(experts.gathered(x_NE, expert_NC), expected)


@needs_operation
@orders
def test_only_the_orders_of_active_experts_are_read(shared):
    experts, x_NE = small_experts("int4", shared), random_tensor(1, E).bfloat16()
    expert_NC = torch.tensor([[4, 1]])
    expected = experts.gathered(x_NE, expert_NC)
    order_X2E = experts.gate_up_proj.input_order.view(X, 2, E)
    order_X2E[[e for e in range(X) if e not in (1, 4)]] = -1
    assert_same(experts.gathered(x_NE, expert_NC), expected)
    for place, number in (((1, 0, 5), E), ((4, 1, 0), -1)):
        kept = order_X2E[place].item()
        order_X2E[place] = number
        with pytest.raises(ValueError, match="quantized_experts: an order has other numbers than channels"):
            experts.gathered(x_NE, expert_NC)
        order_X2E[place] = kept


@needs_operation
def test_operation_refuses_orders_of_other_shapes():
    experts, x_NE = small_experts("int4", True), random_tensor(1, E).bfloat16()
    order_MK = experts.gate_up_proj.input_order
    for wrong in (order_MK[:X].contiguous(), order_MK.long(), order_MK.T.contiguous().T):
        experts.gate_up_proj = OrderedLinear(experts.gate_up_proj.packed, FORMATS["int4"], wrong)
        with pytest.raises(ValueError, match=r"quantized_experts: an order must be \(32, 128\) int32, contiguous"):
            experts.gathered(x_NE, torch.tensor([[4, 1]]))


@pytest.mark.triton
@orders
@pytest.mark.parametrize("format", ["int4", "uint4"])
def test_kernel_gathers_as_the_orders_say(format, shared, monkeypatch):
    packed_experts = pytest.importorskip("qwen3fast.kernels.cuda.packed_experts").packed_experts
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    monkeypatch.setattr(cuda, "can_packed_experts", lambda x: True)
    monkeypatch.setattr(QuantizedExperts, "_chosen", None)  # not to be called
    monkeypatch.setattr(torch.ops.qwen3fast, "packed_experts", packed_experts, raising=False)
    experts, x_NE, expert_NC = small_experts(format, shared), random_tensor(2, E, seed=5), choice(2, 2, X)
    assert_near(experts.gathered(x_NE, expert_NC), expected_outputs(experts, x_NE, expert_NC))


# --------------------------------------------------------------------------------------------------------- the fold


@formats
@orders
def test_orders_of_down_are_folded_into_the_rows_of_gate_and_up(format, shared):
    experts = with_orders_of_down(small_experts(format, shared))
    order_XF, order_MK = experts.down_proj.input_order.clone(), experts.gate_up_proj.input_order.clone()
    gate_up, down = plain_weights(experts)
    x_NE, expert_NC = random_tensor(3, E, seed=5), choice(3, 2, X)
    expected = expected_outputs(experts, x_NE, expert_NC)
    fold_orders(experts)
    assert type(experts.down_proj) is QuantizedLinear
    assert_same(experts.gate_up_proj.input_order, order_MK)
    folded_gate_up, folded_down = plain_weights(experts)
    for expert, order_F in enumerate(order_XF.long()):
        assert_same(folded_down[expert], down[expert][:, order_F])
        assert_same(folded_gate_up[expert][:INNER], gate_up[expert][:INNER][order_F])
        assert_same(folded_gate_up[expert][INNER:], gate_up[expert][INNER:][order_F])
    assert_near(expected_outputs(experts, x_NE, expert_NC), expected)


# ---------------------------------------------------------------------------------------------------- a whole model


def make_model(format: str, shared: bool):
    model = randomized(replace(CONFIG, mlp_only_layers=(0,))).bfloat16()
    quantize_model(model, format, torch.bfloat16)
    with_orders(model.model.layers[1].mlp.experts, shared)
    return model


@needs_operation
@formats
@orders
def test_all_blocks_in_one_operation_gather_as_each_block_does(format, shared):
    model, rows = make_model(format, shared), 9
    cache = StaticKVCache(model.config, rows, 64, torch.bfloat16, CPU)
    for i, kept in enumerate((*cache.keys, *cache.values)):
        kept.copy_(random_tensor(*kept.shape, seed=i))
    x_B1E, position_B1 = model.embed(random_ids(rows, 1)), torch.full((rows, 1), 7)
    clear, expected = rows_with_clear_choices(
        model, lambda: run_layers_plainly(model, copy.deepcopy(cache), x_B1E, position_B1)
    )
    assert len(clear) >= 3
    actual = run_layers(model, copy.deepcopy(cache), x_B1E, position_B1)
    assert_near(actual[clear], expected[clear], torch.bfloat16)
    model.model.layers[1].mlp.experts.gate_up_proj.input_order.copy_(random_orders(2 * X, E, 77))
    other = run_layers(model, copy.deepcopy(cache), x_B1E, position_B1)
    assert (other - actual)[clear].abs().max() > 0.1 * actual.abs().max()  # the orders are read


@needs_operation
def test_the_operation_refuses_an_order_of_experts_that_would_read_elsewhere():
    model = make_model("int4", shared=False)
    model.model.layers[1].mlp.experts.gate_up_proj.input_order[3, 7] = E
    cache = StaticKVCache(model.config, 1, 64, torch.bfloat16, CPU)
    with pytest.raises(ValueError, match="an order must be a permutation of 0 to K - 1"):
        run_layers(model, cache, model.embed(random_ids(1, 1)), torch.zeros(1, 1, dtype=torch.int64))


def write_scattered(folder, shared: bool, sym: bool) -> None:
    """A checkpoint of GPTQ with `desc_act`; shared: gate and up of an expert have the same groups."""
    write_prequantized(folder, CONFIG, {**SCATTERED, "sym": sym}, kept=("lm_head", "mlp.gate"))
    if shared:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        ups = [name for name in tensors if name.endswith("up_proj.g_idx")]
        save_file(tensors | {name: tensors[name.replace("up_proj", "gate_proj")].clone() for name in ups}, file)


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    """The folder of such a checkpoint by `shared` and `sym`, written once and not to be changed."""

    @cache
    def folder(shared: bool, sym: bool) -> Path:
        folder = tmp_path_factory.mktemp("scattered")
        write_scattered(folder, shared, sym)
        return folder

    return folder


def with_weights_of(model, plain):
    """Return a plain model with the dequantized weights of a quantized one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedExperts):
            for stack, part in (("gate_up_proj", module.gate_up_proj), ("down_proj", module.down_proj)):
                plain.get_parameter(f"{name}.{stack}").copy_(module.dequantize(part))
        elif isinstance(module, QuantizedLinear) and ".experts." not in name:
            plain.get_submodule(name).weight.copy_(module.dequantize())
    return plain


@orders
@pytest.mark.parametrize("sym", [True, False])
def test_experts_in_4_bits_give_the_tokens_of_the_plain_weights(scattered, shared, sym, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)  # exact products: others may choose other experts
    folder = scattered(shared, sym)
    prompt, params = [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=10)
    plain = load_model(folder, device="cpu", dtype="float32", quantization="dequantize")
    model = load_model(folder, device="cpu", dtype="float32")
    assert formats_of(model) == ["int4" if sym else "uint4"]
    for block in model.model.layers:
        assert isinstance(block.mlp, MoE) and type(block.mlp.experts.down_proj) is QuantizedLinear
        assert type(block.mlp.experts.gate_up_proj) is OrderedLinear
    token_BT = random_ids(2, 9)
    expected = plain(token_BT)
    exact = with_weights_of(model, plain)  # scales of int4 are rounded to bfloat16
    if not sym:
        assert_near(exact(token_BT), expected)
    with Generator(model, max_seq_len=64, compile=False) as generator:
        for use_cache in (True, False):
            ids = [*prompt, *generator.generate(prompt, params, use_cache=use_cache).token_ids]
            assert_greedy(exact, ids, len(prompt), tolerance=1e-3)


@orders
@pytest.mark.parametrize(("sym", "bits"), [(True, 4.5), (False, 4 + 8 * 48 / 16 / 32)])
def test_bits_per_weight_of_experts_are_the_formats(scattered, shared, sym, bits):
    model = load_model(scattered(shared, sym), device="cpu")
    for block in model.model.layers:
        weights, parameters = 3 * X * E * INNER, dict(block.mlp.experts.named_parameters())
        order = parameters.pop("gate_up_proj.input_order")
        assert 8 * sum(p.nbytes for p in parameters.values()) == bits * weights
        assert 8 * order.nbytes == 2 * 32 * E * X  # two orders per expert


@orders
def test_saved_experts_with_orders_load_as_they_were(scattered, tmp_path, shared, capsys):
    theirs = scattered(shared, False)
    model = load_model(theirs, device="cpu")
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours", device="cpu")
    assert_same_weights(loaded, model)
    token_BT = random_ids(1, 6)
    assert_same(loaded(token_BT), model(token_BT))
    for folder in (tmp_path / "ours", theirs):
        assert main(["info", "--model", str(folder)]) == 0
        assert f"{model.num_bytes():,} bytes in uint4" in capsys.readouterr().out
    file, name = tmp_path / "ours" / "model.safetensors", "model.layers.1.mlp.experts.gate_up_proj.input_order"
    tensors = load_file(file)
    tensors[name][7] = 3
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"{name}: it must hold each number from 0 to 127 once"):
        load_model(tmp_path / "ours", device="cpu")
