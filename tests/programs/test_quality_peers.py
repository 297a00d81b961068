"""The tool that compares the errors of formats: llama.cpp's types, AWQ's scaling, and its record on tiny."""

import copy
import json
import re
import shutil
import sys

import awq_scaling
import gguf
import numpy as np
import pytest
import quality_formats
import quality_peers
import torch
from awq_scaling import scale_channels
from bench_fakes import quick_probes  # noqa: F401  a fixture
from conftest import random_ids, random_tensor, randomized, small_config
from ggml_quants import Ggml, bits, type_of
from quality_formats import OURS
from safetensors.torch import load_file, save_file
from tiny_text import tiny_text

from qwen3fast.bench.record import load_record
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.quantization.calibrate import second_moments
from qwen3fast.quantization.formats import FORMATS, quantize


def test_types_are_those_of_llama_quantize():
    """Of Qwen3-0.6B in Q4_K_M (28 layers, tied), v_proj and down_proj of these layers are in Q6_K."""
    layers = [n for n in range(28) if type_of("Q4_K_M", f"model.layers.{n}.mlp.down_proj", 28, True) == "Q6_K"]
    assert layers == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert type_of("Q4_K_M", "model.layers.0.self_attn.q_proj", 28, True) == "Q4_K"
    assert type_of("Q4_0", "model.embed_tokens", 28, True) == "Q6_K"
    assert type_of("Q4_0", "model.embed_tokens", 28, False) == "Q4_0"
    assert type_of("Q4_0", "lm_head", 28, False) == "Q6_K"
    assert type_of("Q4_0 pure", "model.embed_tokens", 28, True) == "Q4_0"


@pytest.mark.parametrize(("name", "expected"), [("Q4_0", 4.5), ("Q8_0", 8.5), ("Q4_K", 4.5), ("Q6_K", 6.5625)])
def test_bits_of_a_weight(name, expected):
    assert bits(name) == expected


def test_without_a_library_the_package_gguf_quantizes():
    weight, ggml = random_tensor(4, 64), Ggml(None)
    assert ggml.can("Q8_0", 64) and not ggml.can("Q8_0", 65) and not ggml.can("Q4_K", 256)
    kind = gguf.GGMLQuantizationType.Q4_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    assert np.array_equal(ggml.dequantized(weight, "Q4_0").numpy(), expected)


@torch.no_grad()
def test_scaled_channels_compute_the_same_and_quantize_better():
    model = randomized(small_config(vocab_size=96, hidden_size=64, intermediate_size=96))
    model.model.layers[0].input_layernorm.weight[::7] *= 30  # channels with large activations
    scaled, token_BT = copy.deepcopy(model), random_ids(2, 32, vocab_size=96)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = second_moments(layers, model, [window[None] for window in token_BT])
    upper = {name: moment.upper().triu() for name, moment in found.items()}
    moments = {name: mean_KK + mean_KK.triu(1).T for name, mean_KK in upper.items()}
    scale_channels(scaled, moments)
    torch.testing.assert_close(scaled(token_BT), model(token_BT), rtol=1e-4, atol=1e-4)
    name = "model.layers.0.self_attn.q_proj"
    weight, format = model.get_submodule(name).weight, FORMATS["int4"]
    scale_E = model.model.layers[0].input_layernorm.weight / scaled.model.layers[0].input_layernorm.weight
    assert not torch.allclose(scale_E, torch.ones_like(scale_E))

    def error(dequantized):
        difference = dequantized - weight
        return float(((difference @ moments[name]) * difference).sum())

    ours = format.dequantize(quantize(scaled.get_submodule(name).weight, format)) / scale_E
    assert error(ours) < error(format.dequantize(quantize(weight, format)))


@pytest.fixture
def two_layers(tmp_path):
    """The first two layers of tiny, with its tokenizer."""
    shutil.copytree(TINY_FOLDER, folder := tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(r"model\.layers\.[2-9]", name)}
    save_file(kept, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.usefixtures("quick_probes")
def test_the_record_has_the_suite_and_the_formats(two_layers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(awq_scaling, "POWERS", (0.0, 0.5))
    monkeypatch.setattr(quality_formats, "TOKENS", 512)
    for name, seed in (("text", 5), ("calibration", 77)):
        (tmp_path / f"{name}.txt").write_text(tiny_text(rounds=6, seed=seed), encoding="utf-8")
    options = ["--text", str(tmp_path / "text.txt"), "--calibrate", str(tmp_path / "calibration.txt")]
    options += ["--formats", "plain,int4", "--contexts", "96", "--repetitions", "4", "--threads", "1"]
    options += ["--calibration-tokens", "512", "--output", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", ["quality_peers.py", "--model", str(two_layers), *options])
    monkeypatch.setattr(quality_peers, "find_library", lambda: None)
    assert quality_peers.main() == 0
    record = load_record(tmp_path / "r.json")
    kl = {case.labels["format"]: case.metrics["kl_divergence"].median for case in record.cases}
    alone = [f"{name} weights" for name in OURS] + [
        "int4 AWQ-scaled",
        "int4 calibrated",
        "int4 on own text",
        "uint4 on own text",
    ]
    assert list(kl) == ["bf16", "int4", *alone, "Q8_0", "Q4_0 pure"]
    assert kl["Q8_0"] < kl["int8 weights"] < kl["int4 calibrated"] < kl["int4 weights"]
    assert record.run["command"].startswith(f"python tools/quality_peers.py --model {two_layers} --text ")
    bits_of = {case.labels["format"]: case.facts.get("bits_per_weight") for case in record.cases}
    assert bits_of["Q4_0 pure"] == bits_of["int4 calibrated"] == 4.5
    assert record.notes["calibration"]["tokens"] >= 512 and (tmp_path / "r.png").exists()
    assert "int4 calibrated" in capsys.readouterr().out
