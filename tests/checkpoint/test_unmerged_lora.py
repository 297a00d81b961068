"""Adapters that are read to be applied at run time: the numbers of the merged form, over quantized weights as well."""

import pytest
import torch
from conftest import assert_near, randomized, small_config
from safetensors.torch import load_file, save_file
from test_lora import ALL, delta, modules_of, write_adapter

from qwen3fast.checkpoint.lora.unmerged import largest_rank, read_lora
from qwen3fast.engine.adapters import AdapterSlots
from qwen3fast.quantization.convert import quantize_model


def adaptable_layers(model):
    return list(AdapterSlots(model, 1, 1, torch.zeros(1, dtype=torch.int64)).layers)


def read(folder, model, max_rank=16):
    return read_lora(folder, model, adaptable_layers(model), max_rank)


@pytest.mark.parametrize(
    ("rank", "config", "scale"),
    [
        (4, {}, lambda module: 2),
        (9, {"r": 9, "use_rslora": True}, lambda module: 8 / 3),
        (
            lambda module: 2 if module.endswith("q_proj") else 4,
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 16}},
            lambda module: 16 / 4 if module.endswith("down_proj") else 8 / 2 if module.endswith("q_proj") else 2,
        ),
    ],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_the_product_is_what_merging_adds(tmp_path, rank, config, scale, quantization):
    model = randomized(small_config(hidden_size=64, intermediate_size=96))
    tensors = write_adapter(tmp_path, model, modules_of(model, ALL), rank, **config)
    if quantization is not None:
        quantize_model(model, quantization, torch.float32)
    found = read(tmp_path, model)
    assert set(found) == set(modules_of(model, ALL)) == set(adaptable_layers(model))
    for module, (a_RK, b_NR) in found.items():
        assert_near(b_NR.double() @ a_RK.double(), delta(tensors, module, scale(module)))


def test_adapters_of_models_without_output_projection_are_read(tmp_path):
    model = randomized(small_config())
    tensors = write_adapter(tmp_path, model, modules_of(model, ["q_proj"]))
    bare = {name.replace("model.model.", "model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    assert set(read(tmp_path, model)) == set(modules_of(model, ["q_proj"]))


def test_of_experts_only_attention_can_be_adapted(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = randomized(small_config(**experts))
    assert {name.split(".")[-1] for name in adaptable_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    write_adapter(tmp_path, model, modules_of(model, ["q_proj", "gate"]))
    with pytest.raises(ValueError, match=r"mlp\.gate is not a linear layer of a block's attention or feed-forward"):
        read(tmp_path, model)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_embedding_and_output_projection_can_only_be_merged(tmp_path, module):
    model = randomized(small_config(tie_word_embeddings=False))
    write_adapter(tmp_path, model, [*modules_of(model, ["q_proj"]), module])
    if module == "model.embed_tokens":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors = {name.replace("tokens.lora_A.weight", "tokens.lora_embedding_A"): t for name, t in tensors.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"merge this adapter instead.*of serve.*\n.*{module} is not a linear layer"):
        read(tmp_path, model)


def test_ranks_beyond_the_room_are_all_named(tmp_path):
    model = randomized(small_config())
    ranks = {"rank_pattern": {"k_proj": 6}}
    write_adapter(
        tmp_path, model, modules_of(model, ["q_proj", "k_proj"]), lambda m: 6 if "k_proj" in m else 4, **ranks
    )
    assert largest_rank(tmp_path) == 6
    assert len(read(tmp_path, model, 6)) == 4
    with pytest.raises(ValueError, match="exceeds max_adapter_rank 5") as error:
        read(tmp_path, model, 5)
    assert str(error.value).splitlines()[1:] == [f"  model.layers.{i}.self_attn.k_proj: rank 6" for i in range(2)]


def test_tensors_that_do_not_fit_are_named_as_in_merging(tmp_path):
    model, other = randomized(small_config()), randomized(small_config(num_hidden_layers=3))
    write_adapter(tmp_path, other, modules_of(other, ["q_proj"]))
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight: unexpected"):
        read(tmp_path, model)
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"])[1:])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.weight: missing"):
        read(tmp_path, model)
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: t.to(torch.int32) for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="cannot be used"):
        read(tmp_path, model)
