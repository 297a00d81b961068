"""On a GPU: quantized weights give the tokens of the weights that their bits stand for."""

import copy

import pytest
import torch
from conftest import randomized, small_config
from gpu_check.tokens import check_against_float32
from prequantized_layouts import AWQ, FP8, GPTQ, write_prequantized

from gpu.conftest import DEVICE, assert_captured
from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.kernels.grouped import waits_for_device
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "eos_token_ids": ()}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PARAMS = SamplingParams(temperature=0, max_tokens=30)
BLOCKS = FORMATS["fp8"].with_blocks()
TEXTS = [[1, 2, 3], list(range(70))]


def replies_of(model, is_captured):
    """Tokens of a quantized model on the GPU: in graphs, or eager."""
    sizes = {"max_seq_len": 128, "max_batch_size": 2}
    with Generator(model, compile=is_captured, cuda_graphs=is_captured, **sizes) as generator:
        replies = [r.token_ids for r in generator.generate(TEXTS, PARAMS)]
        if is_captured:
            assert_captured(generator)
    return replies


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", [*FORMATS, BLOCKS], ids=[*FORMATS, "fp8-block"])
def test_tokens_are_those_of_the_dequantized_weights(name, is_captured):
    model = randomized(small_config(**SIZES), seed=5)
    quantize_model(model, name, torch.float32)  # on the CPU: on the GPU, scales may differ in their last bit
    if DEVICE.type == "cpu" and name in ("fp8", BLOCKS):
        pytest.skip("fp8 runs on CUDA devices only")
    check = check_against_float32(model, TEXTS, replies_of(copy.deepcopy(model).to(DEVICE), is_captured))
    assert check["passed"], check


# Compiled once: all formats share the kernel's text.
@pytest.mark.parametrize(("name", "is_captured"), [*((name, False) for name in (*FORMATS, BLOCKS)), ("int4", True)])
def test_tokens_of_quantized_experts_are_those_of_the_plain_form(name, is_captured, monkeypatch):
    monkeypatch.setattr("qwen3fast.kernels.cpu.is_loaded", lambda: False)  # on the CPU, the form in PyTorch
    plain = randomized(small_config(**SIZES, **EXPERTS), seed=5)
    quantize_model(plain, name, torch.float32)
    with Generator(plain, max_seq_len=128, max_batch_size=2, compile=False) as generator:
        expected = [r.token_ids for r in generator.generate(TEXTS, PARAMS)]
    assert replies_of(copy.deepcopy(plain).to(DEVICE), is_captured) == expected


def test_experts_in_bfloat16_give_the_same_tokens_in_graphs():
    """Prompts, too, where PyTorch has a kernel for the tokens of each expert."""
    model = randomized(small_config(**SIZES, **EXPERTS, dtype=torch.bfloat16), seed=5).bfloat16().to(DEVICE)
    replies = {}
    for is_captured in (False, True):
        with Generator(model, max_seq_len=128, compile=True, cuda_graphs=is_captured) as generator:
            replies[is_captured] = [r.token_ids for r in generator.generate(TEXTS, PARAMS)]
            if is_captured and DEVICE.type == "cuda":
                assert_captured(generator)
                waits = waits_for_device(DEVICE, torch.bfloat16, SIZES["hidden_size"])
                assert ("prefill", 32) in generator.debug.engine.graphs._replays or waits
    assert replies[True] == replies[False]


@pytest.mark.parametrize("layout", [FP8, AWQ, GPTQ], ids=lambda layout: layout["quant_method"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_prequantized_weights_are_those_of_the_cpu_up_to_a_level(tmp_path, layout, quantization):
    write_prequantized(
        tmp_path, small_config(vocab_size=96, hidden_size=128, intermediate_size=256, head_dim=32), layout
    )
    loaded = {device: load_model(tmp_path, device, quantization=quantization) for device in ("cpu", str(DEVICE))}
    layers = dict(loaded[str(DEVICE)].named_modules())
    assert all(p.device.type == DEVICE.type for p in loaded[str(DEVICE)].parameters())
    compared = 0
    for name, layer in loaded["cpu"].named_modules():
        if hasattr(layer, "dequantize"):
            expected, actual = layer.dequantize(), layers[name].dequantize().cpu()
        elif getattr(layer, "weight", None) is not None:
            expected, actual = layer.weight, layers[name].weight.cpu()
        else:
            continue
        compared += 1
        # Scales may differ in their last bit, and a weight at the border between two levels by one of them.
        level = expected.float().abs().max() / (127 if quantization == "int8" else 2**7)
        difference = (actual.float() - expected.float()).abs()
        assert difference.max() <= 1.01 * level
        assert (difference > 1e-2 * level).float().mean() < 0.01
    assert compared > 10
