"""Checkpoints of models with experts: each expert's tensors of their own, as published, or stacked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import randomized, small_config
from test_checkpoint import assert_same_weights, tensors_of, write_checkpoint

from qwen3fast import load_model
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.model import Qwen3

CONFIG = small_config(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, tie_word_embeddings=False)
PREFIX = "model.layers.1.mlp.experts"


def tensors_by_expert(model: Qwen3) -> dict[str, torch.Tensor]:
    """The tensors as published checkpoints hold them, each expert apart."""
    apart = {}
    for name, tensor in tensors_of(model).items():
        prefix, _, stack = name.rpartition(".")
        if not prefix.endswith(".mlp.experts"):
            apart[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            names = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
            for projection, part in zip(names, weight.chunk(len(names)), strict=True):
                apart[f"{prefix}.{expert}.{projection}.weight"] = part.clone()
    return apart


@pytest.fixture
def model() -> Qwen3:
    """A random model, one layer with experts and one without."""
    return randomized(replace(CONFIG, mlp_only_layers=(0,)))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("layout", [tensors_of, tensors_by_expert])
def test_load_reads_both_layouts(tmp_path, model, layout, files):
    write_checkpoint(tmp_path, model.config, layout(model), files)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_the_published_layout_is_what_the_names_say(model):
    names = {name for name in tensors_by_expert(model) if "layers.1.mlp" in name}
    assert len(names) == 1 + 4 * 3
    assert {f"{PREFIX}.3.{part}_proj.weight" for part in ("gate", "up", "down")} <= names
    assert "model.layers.1.mlp.gate.weight" in names


def test_load_converts_experts_to_the_dtype(tmp_path, model):
    write_checkpoint(tmp_path, model.config, tensors_by_expert(model))
    loaded = load_model(tmp_path, device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_load_names_the_missing_tensors_of_experts(tmp_path, model):
    tensors = tensors_by_expert(model)
    del tensors[f"{PREFIX}.2.up_proj.weight"], tensors[f"{PREFIX}.3.down_proj.weight"]
    write_checkpoint(tmp_path, model.config, tensors)
    with pytest.raises(ValueError, match="do not fit its config") as error:
        load_model(tmp_path, device="cpu")
    assert f"{PREFIX}.2.up_proj.weight: missing, expected shape (24, 48)" in str(error.value)
    assert f"{PREFIX}.3.down_proj.weight: missing, expected shape (48, 24)" in str(error.value)
    assert str(error.value).count("missing, expected") == 2


def test_load_names_experts_that_are_missing_altogether(tmp_path, model):
    tensors = {name: t for name, t in tensors_by_expert(model).items() if ".experts." not in name}
    write_checkpoint(tmp_path, model.config, tensors)
    with pytest.raises(ValueError, match=r"mlp\.experts\.gate_up_proj: missing, expected shape \(4, 48, 48\)"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{PREFIX}.4.up_proj.weight", (24, 48), "unexpected, this Qwen3 has no such tensor"),
        ("model.layers.0.mlp.experts.0.up_proj.weight", (24, 48), "unexpected, this Qwen3 has no such tensor"),
        (f"{PREFIX}.0.up_proj.weight", (48, 24), r"shape \(48, 24\), expected \(24, 48\)"),
        (f"{PREFIX}.0.down_proj.weight", (48, 25), r"shape \(48, 25\), expected \(48, 24\)"),
    ],
)
def test_load_names_tensors_that_do_not_fit(tmp_path, model, name, shape, message):
    tensors = {**tensors_by_expert(model), name: torch.zeros(shape)}
    write_checkpoint(tmp_path, model.config, tensors)
    with pytest.raises(ValueError, match=rf"{name} in model\.safetensors: {message}") as error:
        load_model(tmp_path, device="cpu")
    assert str(error.value).count(name) == 1


def test_saved_models_load_again(tmp_path, model):
    save_model(model, tmp_path / "saved")
    assert_same_weights(load_model(tmp_path / "saved", device="cpu"), model)


def test_random_experts_differ_from_each_other():
    model = random_model(CONFIG, torch.device("cpu"), torch.float32)
    stack = model.model.layers[0].mlp.experts.down_proj
    assert not torch.equal(stack[0], stack[1])
    assert abs(stack.std().item() - 0.02) < 2e-3
