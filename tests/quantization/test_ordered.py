"""Layers with an order of input channels: every form gives the products of the same weight; files that hold them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_near, assert_same, random_ids, random_tensor, randomized, small_config
from prequantized_layouts import GPTQ, in_hidden_order, write_prequantized
from safetensors.torch import load_file, save_file
from test_adapter_layers import SLOTS, make_engine, outputs, write_adapters
from test_checkpoint import assert_same_weights
from test_cpu_ops import run_layers, run_layers_plainly
from test_lora import modules_of, write_adapter
from test_prequantized_models import assert_greedy

from qwen3fast import Generator, Reranker, SamplingParams, load_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli import main
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.structures import RowLimits
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.model.linears import linears
from qwen3fast.model.stacking import STACKS
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.folding import fold_orders
from qwen3fast.quantization.formats import FORMATS, SAVED_FORMATS, SHORT_NL4, quantize
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.quantization.ordered import OrderedLinear, find_shared_orders
from qwen3fast.quantization.uint4 import Layout

CPU = torch.device("cpu")
CONFIG = small_config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    head_dim=32,
    tie_word_embeddings=False,
    dtype=torch.bfloat16,
    eos_token_ids=(),
)
FOLLOWERS = ("k_proj", "v_proj", "up_proj")  # they may share the order of the layer before
ZEROS = FORMATS["uint4"].with_layout(lambda _: Layout(32, has_zero=True))
SHORT = FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True))
SCATTERED = {**GPTQ, "desc_act": True, "group_size": 32}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = "The capital of France is"
needs_operation = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
orders = pytest.mark.parametrize("shared", [True, False], ids=["one order per input", "an order per layer"])


def write_scattered(folder, shared: bool, config=CONFIG, **options) -> None:
    """A checkpoint of GPTQ with `desc_act`; shared: layers with the same input have the same groups."""
    write_prequantized(folder, config, {**SCATTERED, **options.pop("layout", {})}, **options)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for i in range(config.num_hidden_layers if shared else 0):
        for part, names in STACKS.items():
            places = [f"model.layers.{i}.{part}.{name}.g_idx" for name in names]
            places = [place for place in places if place in tensors]
            tensors |= {place: tensors[places[0]].clone() for place in places}
    save_file(tensors, file)


def with_orders(model, shared: bool):
    """Give the quantized layers of a model's blocks random orders, in place."""
    for i, block in enumerate(model.model.layers):
        for j, (name, layer) in enumerate(list(block.named_modules())):
            if isinstance(layer, QuantizedLinear):
                size = layer.in_features
                seed = i + (size if shared and not name.endswith(("o_proj", "down_proj")) else 100 * j)
                order_K = torch.from_numpy(np.random.default_rng(seed).permutation(size)).int()
                block.set_submodule(name, OrderedLinear(layer.packed, layer.format, order_K))
    find_shared_orders(model)
    return model


def ordered_layers(model) -> dict[str, OrderedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OrderedLinear)}


def make_ordered(format: str, shared: bool):
    model = randomized(CONFIG).bfloat16()
    quantize_model(model, format, torch.bfloat16)
    return with_orders(model, shared)


# -------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("format", FORMATS)
def test_columns_are_for_the_channels_that_the_order_names(format):
    order_K = torch.arange(64).flip(0).int()
    packed = quantize(random_tensor(32, 64), FORMATS[format])
    layer = OrderedLinear(packed, FORMATS[format], order_K)
    expected_NK, row_R = FORMATS[format].dequantize(packed).flip(1), torch.tensor([3, 31, 3])
    assert_same(layer.dequantize(), expected_NK)
    assert_same(layer.rows(row_R), expected_NK[row_R])
    x = random_tensor(2, 5, 64, seed=1)
    assert_near(layer(x), x @ expected_NK.T, torch.bfloat16)
    assert_same(layer(x), QuantizedLinear(packed, FORMATS[format])(x.flip(-1)))


@orders
def test_layers_of_one_input_give_what_each_gives_alone(shared):
    attention = make_ordered("int4", shared).model.layers[1].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert {layer.shares_order for layer in layers} == {shared}
    assert not attention.o_proj.shares_order
    x = random_tensor(2, 3, CONFIG.hidden_size).bfloat16()
    for y, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(y, layer(x))
    layers[1].limits = RowLimits(dequantized=1)  # another form of its own
    for y, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(y, layer(x))


# ---------------------------------------------------------------------------------------------------- a whole model


@needs_operation
@orders
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_all_blocks_in_one_operation_gather_as_each_block_does(format, shared, rows):
    model = make_ordered(format, shared)
    cache = StaticKVCache(model.config, rows, 64, torch.bfloat16, CPU)
    for i, kept in enumerate((*cache.keys, *cache.values)):
        kept.copy_(random_tensor(*kept.shape, seed=i))
    x_B1E, position_B1 = model.embed(random_ids(rows, 1)), torch.full((rows, 1), 7)
    expected = run_layers_plainly(model, copy.deepcopy(cache), x_B1E, position_B1)
    actual = run_layers(model, cache, x_B1E, position_B1)
    assert_near(actual, expected, torch.bfloat16)
    for name, layer in ordered_layers(model).items():  # each layer's own order is read, or the first layer's
        own = layer.input_order.clone()
        layer.input_order.copy_(own.flip(0))
        difference = (run_layers(model, cache, x_B1E, position_B1) - actual).abs().max()
        assert (difference > 0) == (layer.shares_order is False or not name.endswith(FOLLOWERS)), name
        layer.input_order.copy_(own)


@needs_operation
def test_the_operation_refuses_an_order_that_would_read_elsewhere():
    model = make_ordered("int4", shared=False)
    model.model.layers[1].mlp.down_proj.input_order[7] = CONFIG.intermediate_size
    with pytest.raises(ValueError, match="an order must be a permutation of 0 to K - 1"):
        DecodeLayers(model, StaticKVCache(model.config, 1, 64, torch.bfloat16, CPU))


@needs_operation
def test_of_three_layers_two_may_share_an_order():
    model = make_ordered("int4", shared=False)
    for block in model.model.layers:
        block.self_attn.v_proj.input_order.copy_(block.self_attn.q_proj.input_order)
    find_shared_orders(model)
    assert not model.model.layers[0].self_attn.v_proj.shares_order
    cache = StaticKVCache(model.config, 1, 64, torch.bfloat16, CPU)
    x_B1E, position_B1 = model.embed(random_ids(1, 1)), torch.zeros(1, 1, dtype=torch.int64)
    expected = run_layers_plainly(model, copy.deepcopy(cache), x_B1E, position_B1)
    assert_near(run_layers(model, cache, x_B1E, position_B1), expected, torch.bfloat16)


@needs_operation
@orders
def test_adapters_read_the_inputs_in_their_own_order(shared):
    engine = make_engine("int4", reorder=lambda model: with_orders(model, shared))
    adapted, expected = outputs(engine, True)
    largest = expected.abs().max()
    assert (adapted - expected).abs().max() < 0.05 * largest  # measured: up to 0.033 with any order, 0.013 without
    plain, _ = outputs(engine, False)
    assert (adapted - plain)[SLOTS.index(1)].abs().max() > 0.2 * largest


@orders
@pytest.mark.parametrize("sym", [True, False])
def test_eager_and_compiled_give_the_tokens_of_the_plain_weights(tmp_path, tokenizer_folder, graphs, shared, sym):
    write_scattered(tmp_path, shared, layout={"sym": sym}, tokenizer_folder=tokenizer_folder)
    options = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}
    with Generator.from_pretrained(tmp_path, compile=False, **options) as generator:
        assert formats_of(generator.model) == ["int4" if sym else "uint4"]
        names = {name.rpartition(".")[2] for name in ordered_layers(generator.model)}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}  # down_proj has none
        assert {x.shares_order for n, x in ordered_layers(generator.model).items() if "q_proj" in n} == {shared}
        expected = generator.generate(PROMPT, GREEDY).token_ids
        plain = load_model(tmp_path, device="cpu", dtype="float32", quantization="dequantize")
        for name, layer in generator.model.named_modules():
            if isinstance(layer, QuantizedLinear):
                weight = in_hidden_order(generator.model, name, plain.get_submodule(name).weight)
                assert ((layer.dequantize() - weight).abs() <= weight.abs() * (2**-8 if sym else 0)).all()
                plain.get_submodule(name).weight.copy_(layer.dequantize())
        prompt = generator.tokenizer.encode(PROMPT)
        for ids in (expected, generator.generate(PROMPT, GREEDY, use_cache=False).token_ids):
            assert_greedy(plain, [*prompt, *ids], len(prompt), tolerance=0.04)
    if not sym:  # the same code
        return
    with Generator.from_pretrained(tmp_path, compile=True, **options) as generator:
        assert generator.generate(PROMPT, GREEDY).token_ids == expected
        assert generator.stats.compilations == len(graphs) > 0


@needs_operation
@orders
def test_in_bfloat16_decode_steps_run_in_one_operation(tmp_path, tokenizer_folder, shared):
    write_scattered(tmp_path, shared, tokenizer_folder=tokenizer_folder)
    plain = load_model(tmp_path, device="cpu", dtype="float32", quantization="dequantize")
    with Generator.from_pretrained(tmp_path, device="cpu", compile=False, max_seq_len=64) as generator:
        layers = DecodeLayers(generator.model, StaticKVCache(CONFIG, 1, 32, torch.bfloat16, CPU))
        assert layers.serves(1) and not layers.serves_chunks(32)  # prompts run block by block
        prompt = generator.tokenizer.encode(PROMPT)
        for use_cache in (True, False):
            ids = [*prompt, *generator.generate(prompt, GREEDY, use_cache=use_cache).token_ids]
            assert_greedy(plain, ids, len(prompt), tolerance=0.04)


# --------------------------------------------------------------------------------------------------------- the fold


def fold(model):
    """Fold the orders of a model that down_proj has; check that it has none then."""
    order_F = [block.mlp.down_proj.input_order.clone() for block in model.model.layers]
    fold_orders(model)
    for block, own_F in zip(model.model.layers, order_F, strict=True):
        assert type(block.mlp.down_proj) is QuantizedLinear
        assert_same(block.mlp.hidden_order, own_F)
    return model


@needs_operation
@orders
@pytest.mark.parametrize("format", FORMATS)
def test_a_folded_model_gives_the_bits_of_the_unfolded_one(format, shared):
    model, token_BT = make_ordered(format, shared), random_ids(2, 9)
    cache = StaticKVCache(model.config, 2, 64, torch.bfloat16, CPU)
    step = (model.embed(random_ids(2, 1)), torch.zeros(2, 1, dtype=torch.int64))
    expected, num_bytes = (model(token_BT), run_layers(model, copy.deepcopy(cache), *step)), model.num_bytes()
    per_token = model.num_bytes(per_token=True)
    fold(model)
    assert_same(model(token_BT), expected[0])
    assert_same(run_layers(model, cache, *step), expected[1])
    assert model.num_bytes() == num_bytes
    assert model.num_bytes(per_token=True) == per_token


@pytest.mark.parametrize(
    "format",
    [*SAVED_FORMATS.values(), SHORT_NL4, ZEROS, SHORT],
    ids=[*SAVED_FORMATS, "nl4, short", "uint4, zeros", "uint4, short"],
)
@pytest.mark.parametrize("kept", ["", "up_proj"])
def test_rows_of_gate_and_up_are_sorted_in_every_format(format, kept, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    model = randomized(replace(CONFIG, hidden_size=256, intermediate_size=512, dtype=torch.float32))
    kept_names = [n for n, _ in model.named_modules() if ".mlp." not in n or (kept and n.endswith(kept))]
    quantize_model(model, format, torch.float32, modules_to_not_convert=kept_names)
    with_orders(model, shared=False)
    mlp, token_BT = model.model.layers[0].mlp, random_ids(2, 9)
    before = [weight_of(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    expected = model(token_BT)
    fold(model)
    gate, up, down = (weight_of(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    order_F = mlp.hidden_order.long()
    assert_same(gate, before[0][order_F])
    assert_same(up, before[1][order_F])
    assert_same(down, before[2][:, order_F])
    assert isinstance(mlp.up_proj, torch.nn.Linear) == bool(kept)
    assert_near(model(token_BT), expected)


def weight_of(layer):
    return layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight.clone()


@needs_operation
def test_adapters_are_for_the_hidden_units_before_the_fold():
    expected, _ = outputs(make_engine("int4", reorder=lambda model: with_orders(model, True)), True)
    engine = make_engine("int4", reorder=lambda model: fold(with_orders(model, True)))
    adapted, alone = outputs(engine, True)
    assert_near(adapted, expected, torch.bfloat16)
    largest = expected.abs().max()
    assert (alone - expected).abs().max() < 0.05 * largest  # as in the test above
    engine.adapters._hidden_orders.clear()  # the test can fail
    write_adapters(engine)
    other, _ = outputs(engine, True)
    assert (other - expected).abs().max() > 0.2 * largest


@orders
@pytest.mark.parametrize("is_saved", [False, True])
def test_a_folded_checkpoint_with_adapters_gives_the_tokens_of_the_merged_one(tmp_path, shared, is_saved, monkeypatch):
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)  # exact products
    folder, plain = tmp_path / "theirs", {"device": "cpu", "dtype": "float32", "quantization": "dequantize"}
    write_scattered(folder, shared, layout={"sym": False})
    base = load_model(folder, **plain)
    write_adapter(tmp_path / "adapter", base, modules_of(base, ["gate_proj", "up_proj", "down_proj"]))
    merged = load_model(folder, adapter=tmp_path / "adapter", **plain)
    assert not hasattr(base.model.layers[0].mlp, "hidden_order")
    if is_saved:
        save_model(load_model(folder, device="cpu"), tmp_path / "ours")
        folder = tmp_path / "ours"
    options = {"device": "cpu", "dtype": "float32", "compile": False, "max_seq_len": 64}
    replies = {}
    with Generator.from_pretrained(folder, adapters={"one": tmp_path / "adapter"}, **options) as generator:
        assert generator.model.model.layers[0].mlp.hidden_order is not None
        for name, expected in ((None, base), ("one", merged)):
            replies[name] = generator.generate([5, 6, 7], replace(GREEDY, adapter=name)).token_ids
            assert_greedy(expected, [5, 6, 7, *replies[name]], 3, tolerance=1e-3)
    assert replies[None] != replies["one"]


# ------------------------------------------------------------------------------------------------------------ files


def test_folders_that_were_saved_before_the_fold_load(tmp_path, monkeypatch):
    write_scattered(tmp_path / "theirs", True)
    with monkeypatch.context() as patch:
        patch.setattr("qwen3fast.checkpoint.fill.fold_orders", lambda model: None)
        before = load_model(tmp_path / "theirs", device="cpu")
    assert type(before.model.layers[0].mlp.down_proj) is OrderedLinear
    save_model(before, tmp_path / "ours")
    with torch.device("meta"):  # an application's default device
        ours = load_model(tmp_path / "ours", device="cpu")
    assert_same_weights(ours, load_model(tmp_path / "theirs", device="cpu"))


@pytest.mark.parametrize("kept", [("lm_head",), ("lm_head", "q_proj", "o_proj")])
def test_saved_model_loads_as_it_was(tmp_path, kept, capsys):
    write_scattered(tmp_path / "theirs", True, kept=kept)
    model = load_model(tmp_path / "theirs", device="cpu")
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours", device="cpu")
    assert_same_weights(loaded, model)
    assert ordered_layers(loaded).keys() == ordered_layers(model).keys()
    for name, layer in ordered_layers(loaded).items():
        assert layer.shares_order == model.get_submodule(name).shares_order
    for folder in ["ours"] if len(kept) > 1 else ["ours", "theirs"]:
        assert main(["info", "--model", str(tmp_path / folder)]) == 0
        assert f"{model.num_bytes():,} bytes in int4" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["self_attn.o_proj.input_order", "mlp.hidden_order"])
@pytest.mark.parametrize(
    "change", [lambda order: order.fill_(3), lambda order: order.add_(1), lambda order: order.neg_()]
)
def test_an_order_that_is_no_permutation_is_refused(tmp_path, change, name):
    write_scattered(tmp_path / "theirs", True)
    save_model(load_model(tmp_path / "theirs", device="cpu"), tmp_path / "ours")
    file, name = tmp_path / "ours" / "model.safetensors", f"model.layers.1.{name}"
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file)
    last = 255 if "mlp" in name else 127
    with pytest.raises(ValueError, match=rf"{name}: it must hold each number from 0 to {last} once"):
        load_model(tmp_path / "ours", device="cpu")


def test_groups_that_are_neighbors_already_need_no_order(tmp_path):
    write_prequantized(tmp_path, CONFIG, {**SCATTERED, "desc_act": False})
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"]["desc_act"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    model = load_model(tmp_path, device="cpu")
    assert formats_of(model) == ["int4"] and not ordered_layers(model)


def test_groups_of_unequal_sizes_are_refused_with_another_format(tmp_path):
    write_scattered(tmp_path, False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"][:20] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"up_proj\.weight: groups must be multiples of 32 channels; use quantization='int8'"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, device="cpu")
    assert formats_of(load_model(tmp_path, device="cpu", quantization="int8")) == ["int8"]


def test_reranker_reads_an_output_projection_with_an_order(tmp_path, yes_no_folder):
    config = replace(CONFIG, vocab_size=1040, max_position_embeddings=512, dtype=torch.float32)
    write_scattered(tmp_path, True, config, kept=(), tokenizer_folder=yes_no_folder)
    reranker = Reranker.from_pretrained(tmp_path, device="cpu")
    assert type(reranker.model.lm_head) is OrderedLinear
    plain = load_model(tmp_path, device="cpu", dtype="float32", quantization="dequantize")
    expected = Reranker(plain, reranker.tokenizer).score("Where?", ["Paris.", "x"])
    assert reranker.score("Where?", ["Paris.", "x"]) == pytest.approx(expected, abs=0.05)
