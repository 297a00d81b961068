"""Experts in 8 and 4 bits: the operation and its plain forms, models, what is read, loading and saving."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_same, random_ids, random_tensor, randomized, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import tensors_of, write_checkpoint
from test_expert_checkpoints import tensors_by_expert
from test_moe import check_replies
from test_quantization import formats, needs_operation, relative_error
from torch import nn

from qwen3fast import Generator, load_model
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli import main
from qwen3fast.kernels import cpu
from qwen3fast.model import MoE
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.moe import Experts
from qwen3fast.quantization.convert import formats_of, quantize_assigned, quantize_model
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import FORMATS, LANES, Packed
from qwen3fast.quantization.layers import QuantizedLinear

X, E, INNER = 12, 64, 96
CONFIG = small_config(
    vocab_size=96,
    hidden_size=E,
    intermediate_size=96,
    num_experts=X,
    num_experts_per_tok=3,
    moe_intermediate_size=INNER,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    eos_token_ids=(),
)
MIXED = replace(CONFIG, mlp_only_layers=(0,))  # one layer without experts, one with


@pytest.fixture
def plainly(monkeypatch):
    """As where there is no compiler: without the operation."""
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)


def make_experts(format, seed=0, sizes=(X, E, INNER)) -> QuantizedExperts:
    return QuantizedExperts.of(random_experts(seed, sizes), format)


def random_experts(seed=0, sizes=(X, E, INNER)) -> Experts:
    experts = Experts(*sizes).requires_grad_(False)
    for i, weight in enumerate(experts.parameters()):
        weight.copy_(random_tensor(*weight.shape, seed=seed + i) / weight.shape[-1] ** 0.5)
    return experts


def dequantized(quantized: QuantizedExperts) -> Experts:
    """The weights that the bits stand for as plain experts."""
    gate_up, down = quantized.dequantize(quantized.gate_up_proj), quantized.dequantize(quantized.down_proj)
    experts = Experts(len(down), down.shape[1], down.shape[2]).requires_grad_(False)
    experts.gate_up_proj.copy_(gate_up)
    experts.down_proj.copy_(down)
    return experts


def choice(tokens, chosen=3, num_experts=X, seed=0) -> torch.Tensor:
    """Different experts for each token, (N, C)."""
    return random_tensor(tokens, num_experts, seed=seed).argsort(dim=1)[:, :chosen]


def one_by_one(experts: QuantizedExperts, x_NE, expert_NC):
    """Each pair by two quantized linear layers of its expert alone."""

    def layer(tall: QuantizedLinear, expert: int) -> QuantizedLinear:
        parts = (p.chunk(experts.num_experts)[expert].clone() for p in (tall.weight_packed, tall.weight_scale))
        return QuantizedLinear(Packed(*parts), tall.format)

    def run(x_E, expert):
        gate, up = layer(experts.gate_up_proj, expert)(x_E[None]).chunk(2, dim=-1)
        return layer(experts.down_proj, expert)(F.silu(gate) * up)[0]

    rows = zip(x_NE, expert_NC.tolist(), strict=True)
    return torch.stack([torch.stack([run(x_E, expert) for expert in chosen]) for x_E, chosen in rows])


# -------------------------------------------------------------------------------------------------------- the product


@needs_operation
@formats
@pytest.mark.parametrize(
    ("tokens", "sizes", "chosen"),
    [(1, (X, E, INNER), 3), (2, (3, 128, 32), 1), (7, (5, 32, 160), 5), (40, (X, E, INNER), 3)],
)
def test_operation_equals_linear_layers_one_by_one(format, tokens, sizes, chosen):
    experts = make_experts(format, sizes=sizes)
    x_NE, expert_NC = random_tensor(tokens, sizes[1], seed=5).bfloat16(), choice(tokens, chosen, sizes[0])
    y_NCE = experts.gathered(x_NE, expert_NC)
    assert y_NCE.dtype == torch.bfloat16 and y_NCE.shape == (tokens, chosen, sizes[1])
    # silu's last bit differs; a rounding that falls the other way then moves a result a little.
    assert relative_error(y_NCE, one_by_one(experts, x_NE, expert_NC)) < 4e-3
    assert_same(experts.grouped(x_NE, expert_NC), y_NCE)


@needs_operation
@formats
def test_operation_is_near_the_unrounded_products(format):
    experts, x_NE, expert_NC = make_experts(format), random_tensor(5, E, seed=5), choice(5)
    assert relative_error(experts.gathered(x_NE, expert_NC), dequantized(experts).gathered(x_NE, expert_NC)) < 1.6e-2


@formats
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_plain_forms_equal_experts_with_the_dequantized_weights(format, tokens, plainly):
    experts, x_NE, expert_NC = make_experts(format), random_tensor(tokens, E, seed=5), choice(tokens)
    expected = dequantized(experts).gathered(x_NE, expert_NC)
    assert_near(experts.gathered(x_NE, expert_NC), expected)
    assert_near(experts.grouped(x_NE, expert_NC), expected)


@formats
def test_each_expert_is_quantized_by_itself(format):
    whole = random_experts()
    whole_stack = dequantized(QuantizedExperts.of(whole, format))
    alone = Experts(1, E, INNER).requires_grad_(False)
    for expert in (0, 5, X - 1):
        for mine, one in zip(whole.parameters(), alone.parameters(), strict=True):
            one.copy_(mine[expert : expert + 1])
        for a, b in zip(
            dequantized(QuantizedExperts.of(alone, format)).parameters(), whole_stack.parameters(), strict=True
        ):
            assert_same(a[0], b[expert])


@needs_operation
@formats
@settings(max_examples=15)
@given(tokens=st.integers(2, 30), chosen=st.integers(1, X), seed=st.integers(0, 9))
def test_a_token_does_not_depend_on_those_beside_it(format, tokens, chosen, seed):
    experts, x_NE = make_experts(format), random_tensor(tokens, E, seed=seed).bfloat16()
    expert_NC = choice(tokens, chosen, seed=seed)
    alone = [experts.gathered(x_NE[n : n + 1], expert_NC[n : n + 1]) for n in range(tokens)]
    assert_same(experts.gathered(x_NE, expert_NC), torch.cat(alone))


@needs_operation
@formats
def test_operation_on_zeros_and_what_is_not_finite(format):
    experts, expert_NC = make_experts(format), choice(3)
    x_NE = random_tensor(3, E).bfloat16()
    expected = experts.gathered(x_NE, expert_NC)
    x_NE[1] = torch.inf
    y_NCE = experts.gathered(x_NE, expert_NC)
    assert y_NCE[1].isnan().all()
    assert_same(y_NCE[[0, 2]], expected[[0, 2]])
    assert not experts.gathered(torch.zeros(3, E).bfloat16(), expert_NC).any()


@needs_operation
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"].float()), "x must be bfloat16"),
        (lambda a: a.update(expert=a["expert"].int()), "expert must be"),
        (lambda a: a.update(expert=a["expert"][:1]), "expert must be"),
        (lambda a: a.update(expert=a["expert"] + X), rf"is not one of the {X} experts'"),
        (lambda a: a.update(expert=a["expert"] - X), rf"is not one of the {X} experts'"),
        (lambda a: a.update(x=a["x"][:, :32]), "fit x's 32 channels"),
        (lambda a: a.update(gate_up=[part[: len(part) // 2] for part in a["gate_up"]]), "gate_up must have 2304 rows"),
        (lambda a: a.update(down=[a["down"][0].float(), a["down"][1]]), "packed must be"),
    ],
    ids=["float32", "int32", "other tokens", "too large", "negative", "narrow", "half the rows", "float weight"],
)
def test_operation_refuses_what_it_cannot_do(change, message):
    experts = make_experts(FORMATS["int8"])
    arguments = {"x": torch.zeros(2, E).bfloat16(), "expert": choice(2)}
    for name in ("gate_up", "down"):
        layer = getattr(experts, f"{name}_proj")
        arguments[name] = [layer.weight_packed, layer.weight_scale]
    change(arguments)
    with pytest.raises(ValueError, match=f"quantized_experts: .*{message}"):
        torch.ops.qwen3fast.quantized_experts(*arguments.values())


# ------------------------------------------------------------------------------------------------------ what is read


def poison(experts: QuantizedExperts, chosen: set[int]) -> None:
    """Makes the weights of all other experts NaN."""
    for layer in (experts.gate_up_proj, experts.down_proj):
        scale = layer.weight_scale.data.clone()
        for expert, part in enumerate(scale.chunk(experts.num_experts)):
            if expert not in chosen:
                part.fill_(255 if part.dtype == torch.uint8 else torch.nan)  # bytes of 255 are NaN in float16, too
        layer.weight_scale.data = scale


@formats
@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
def test_experts_that_are_not_chosen_are_not_read(format, is_plain, tokens, monkeypatch):
    if is_plain:
        monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    experts, x_NE, expert_NC = make_experts(format), random_tensor(tokens, E), choice(tokens, 2)
    expected = experts.gathered(x_NE, expert_NC)
    poison(experts, set(expert_NC.flatten().tolist()))
    assert_same(experts.gathered(x_NE, expert_NC), expected)
    assert expected.isfinite().all()
    assert experts.gathered(x_NE, choice(tokens, X)).isnan().any()  # the test can fail


@formats
def test_bytes_that_a_token_reads_are_those_of_chosen_experts(format):
    model = randomized(CONFIG)
    quantize_model(model, format.name, torch.float32)
    one = sum(p.numel() * p.element_size() for p in model.model.layers[0].mlp.experts.parameters()) / X
    embedding = sum(p.numel() * p.element_size() for p in model.model.embed_tokens.parameters())
    assert model.num_bytes() - model.num_bytes(per_token=True) == embedding + 2 * (X - 3) * one
    bits = {"int8": 8 * E * 3 * INNER + 32 * (2 * INNER + E), "int4": 4.5 * E * 3 * INNER}
    bits["uint4"] = 2 * E * INNER * (4 + 8 * (64 + 64) / 16 / 64) + E * INNER * (4 + 8 * (64 + 32) / 16 / 32)
    bits["fp8"] = bits["int8"]
    bits = bits[format.name]
    assert one == bits / 8


# -------------------------------------------------------------------------------------------------------------- models


def with_dequantized_weights(model, config):
    """Return a plain model with the dequantized weights of a quantized one, and its routers."""
    plain = randomized(config)
    with torch.no_grad():
        for name, module in plain.named_modules():
            twin = model.get_submodule(name)
            if isinstance(twin, QuantizedLinear):
                module.weight.copy_(twin.dequantize())
            elif isinstance(twin, QuantizedExperts):
                for weight, exact in zip(module.parameters(), dequantized(twin).parameters(), strict=True):
                    weight.copy_(exact)
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(twin.format.dequantize(Packed(twin.weight_packed, twin.weight_scale)))
    return plain


@formats
@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["experts", "mixed"])
def test_quantized_model_equals_the_model_of_its_dequantized_weights(format, config, plainly):
    model = randomized(config)
    quantize_model(model, format.name, torch.float32)
    assert formats_of(model) == [format.name]
    sparse = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    assert len(sparse) == 2 - len(config.mlp_only_layers)
    for moe in sparse:
        assert isinstance(moe.experts, QuantizedExperts) and isinstance(moe.gate, nn.Linear)
    token_BT = random_ids(2, 9, vocab_size=96)
    plain = with_dequantized_weights(model, config)
    assert_near(model(token_BT), plain(token_BT))
    assert_near(model(token_BT[:, :1]), plain(token_BT[:, :1]))


def test_experts_that_cannot_be_packed_stay_as_they_are():
    model = randomized(replace(CONFIG, moe_intermediate_size=24))
    quantize_model(model, "int8", torch.float32)
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert_near(model(random_ids(1, 5)), randomized(model.config)(random_ids(1, 5)), torch.bfloat16)


@pytest.mark.parametrize(("format", "config", "compile"), [("int8", MIXED, False), ("int4", CONFIG, True)])
def test_cached_batched_and_compiled_tokens_are_those_of_the_plain_model(format, config, compile):
    """Compiled without dense blocks, whose forms would take as long again; test_moe.py compiles both kinds."""
    model = randomized(config, seed=3)
    quantize_model(model, format, torch.float32)
    prompts = [random_ids(n, vocab_size=96, seed=n).tolist() for n in (40, 5)]
    with Generator(model, max_seq_len=128, max_batch_size=2, compile=compile) as generator:
        check_replies(model, generator, prompts)
        compilations = generator.stats.compilations
        check_replies(model, generator, [prompt[1:] for prompt in prompts])
        assert generator.stats.compilations == compilations and bool(compilations) == compile


# ------------------------------------------------------------------------------------------------- loading and saving


def assert_same_parameters(actual, expected):
    assert dict(actual.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert_same(actual.get_parameter(name), parameter)


@formats
@pytest.mark.parametrize("layout", [tensors_of, tensors_by_expert], ids=["stacked", "published"])
def test_experts_are_quantized_while_loading(format, layout, tmp_path, monkeypatch):
    """As afterwards, but with no more than one layer's experts in memory as they were, as layers come in turn."""
    config = replace(CONFIG, num_hidden_layers=3)
    expected = randomized(config)
    write_checkpoint(tmp_path, config, layout(expected))
    quantize_model(expected, format.name, torch.float32)
    whole = watch_experts(monkeypatch)
    assert_same_parameters(load_model(tmp_path, device="cpu", quantization=format.name), expected)
    assert max(whole) == 1 and whole[-1] == 0


def watch_experts(monkeypatch) -> list[int]:
    """Count the layers with unquantized experts, before and after each loaded parameter."""
    whole: list[int] = []

    def count(model):
        whole.append(sum(not w.is_meta for m in model.modules() if isinstance(m, Experts) for w in [m.down_proj]))

    def watched(model, *names):
        count(model)
        quantize_assigned(model, *names)
        count(model)

    monkeypatch.setattr("qwen3fast.checkpoint.loaders.quantize_assigned", watched)
    return whole


@pytest.mark.parametrize("source", ["folder", "random"])
def test_linear_layers_are_quantized_while_loading(source, tmp_path, monkeypatch):
    """Devices need not hold the plain weights; the embedding comes last."""
    plain, real = [], quantize_assigned

    def watched(model, *names):
        linears = (module for module in model.model.modules() if isinstance(module, nn.Linear))
        plain.append(sum(not linear.weight.is_meta for linear in linears))
        real(model, *names)

    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    config = small_config(num_hidden_layers=3, **sizes)
    monkeypatch.setattr(ModelConfig, "named", lambda name: config)
    monkeypatch.setattr("qwen3fast.checkpoint.loaders.quantize_assigned", watched)
    if source == "folder":
        expected = randomized(config)
        write_checkpoint(tmp_path, config, tensors_of(expected))
    else:
        expected = random_model(config, torch.device("cpu"), torch.float32)
    quantize_model(expected, "int4", torch.float32)
    model = load_model(tmp_path if source == "folder" else "random:small", device="cpu", quantization="int4")
    assert_same_parameters(model, expected)
    assert max(plain) == 1


def test_random_experts_are_quantized_layer_by_layer(monkeypatch):
    monkeypatch.setattr(ModelConfig, "named", lambda name: replace(CONFIG, num_hidden_layers=3))
    whole = watch_experts(monkeypatch)
    model = load_model("random:small", device="cpu", quantization="int4")
    expected = random_model(ModelConfig.named("small"), torch.device("cpu"), torch.float32)
    quantize_model(expected, "int4", torch.float32)
    assert_same_parameters(model, expected)
    assert max(whole) == 1 and whole[-1] == 0


@formats
def test_saved_experts_load_as_they_were(format, tmp_path, capsys):
    model = randomized(MIXED)
    quantize_model(model, format.name, torch.float32)
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", device="cpu")
    assert loaded.config == model.config
    assert_same_parameters(loaded, model)
    token_BT = random_ids(1, 6, vocab_size=96)
    assert_same(loaded(token_BT), model(token_BT))
    assert main(["info", "--model", str(tmp_path / "saved")]) == 0
    assert f"{model.num_bytes():,} bytes in {format.name}" in capsys.readouterr().out


def test_damaged_quantized_experts_are_refused_by_name(tmp_path):
    model = randomized(CONFIG)
    quantize_model(model, "int8", torch.float32)
    layers = model.model.layers
    layers[1].mlp.experts.down_proj.weight_packed = nn.Parameter(
        torch.zeros(1, 2, LANES, 4, dtype=torch.uint8), requires_grad=False
    )
    del layers[0].mlp.experts.gate_up_proj.weight_scale
    save_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj\.weight_scale: missing") as error:
        load_model(tmp_path, device="cpu")
    assert "layers.1.mlp.experts.down_proj.weight_packed in model.safetensors: shape (1, 2, 16, 4)" in str(error.value)


def test_info_states_what_a_published_shape_would_take(capsys):
    assert main(["info", "--model", "random:30b-a3b", "--quantization", "int4"]) == 0
    text = capsys.readouterr().out
    assert "17,1" in text and "bytes in int4" in text
