"""LoRA adapters: merged as in float64 arithmetic, for every layer; misfits are named; files stay."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    assert_near,
    assert_same,
    random_ids,
    random_tensor,
    randomized,
    small_config,
    write_text_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.lora.merge import merge_lora
from qwen3fast.model import Qwen3
from qwen3fast.quantization.convert import quantize_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def modules_of(model: Qwen3, targets: list[str]) -> list[str]:
    """Full names of the layers whose last part is in `targets`."""
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in targets]


def write_adapter(folder: Path, model: Qwen3, modules: list[str], rank: Any = 4, **config: Any) -> dict[str, Tensor]:
    """An adapter as PEFT saves it, its matrices random; `rank` is a number or a function of a module's name."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for seed, module in enumerate(modules):
        out_features, in_features = model.get_submodule(module).weight.shape
        r = rank(module) if callable(rank) else rank
        tensors[f"base_model.model.{module}.lora_A.weight"] = random_tensor(r, in_features, seed=2 * seed)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random_tensor(out_features, r, seed=2 * seed + 1)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.split(".")[-1] for module in modules})
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw), encoding="utf-8")
    return tensors


def delta(tensors: dict[str, Tensor], module: str, scale: float) -> Tensor:
    """scale * B @ A in float64."""
    a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return scale * b @ a


def assert_merged(merged: Qwen3, base: Qwen3, tensors: dict[str, Tensor], scale_of: Any) -> None:
    """Adapted weights are base + scale * B @ A, all other parameters the same bits."""
    before = dict(base.named_parameters())
    for name, weight in merged.named_parameters():
        module = name.removesuffix(".weight")
        if f"base_model.model.{module}.lora_A.weight" in tensors:
            expected = before[name].double() + delta(tensors, module, scale_of(module))
            assert_near(weight, expected)
            assert not torch.equal(weight, before[name])
        else:
            assert_same(weight, before[name])


@pytest.mark.parametrize("target", ALL)
def test_merge_adds_the_product_to_each_kind_of_layer(tmp_path, target):
    base, merged = randomized(small_config()), randomized(small_config())
    tensors = write_adapter(tmp_path, base, modules_of(base, [target]))
    merge_lora(merged, tmp_path)
    assert_merged(merged, base, tensors, lambda module: 8 / 4)


def test_merge_adapts_the_output_projection_of_an_untied_model(tmp_path):
    config = small_config(tie_word_embeddings=False)
    base, merged = randomized(config), randomized(config)
    tensors = write_adapter(tmp_path, base, ["lm_head"])
    merge_lora(merged, tmp_path)
    assert_merged(merged, base, tensors, lambda module: 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_accepts_the_copy_of_the_output_projection_that_peft_writes_beside_it(tmp_path, dtype):
    base = randomized(small_config(tie_word_embeddings=False))
    tensors = write_adapter(tmp_path, base, ["lm_head"])
    copy = "base_model.model.lm_head.base_layer.weight"
    save_file({**tensors, copy: base.lm_head.weight.detach().clone()}, tmp_path / "adapter_model.safetensors")
    merged = randomized(small_config(tie_word_embeddings=False)).to(dtype)
    merge_lora(merged, tmp_path)
    assert_near(merged.lm_head.weight, base.lm_head.weight.double() + delta(tensors, "lm_head", 2), dtype)
    save_file({**tensors, copy: 1 + base.lm_head.weight.detach()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"base_layer\.weight: differs from the model's; the adapter is for another one"
    ):
        merge_lora(randomized(small_config(tie_word_embeddings=False)), tmp_path)


def test_merge_scales_by_the_root_of_the_rank_for_rslora(tmp_path):
    base, merged = randomized(small_config()), randomized(small_config())
    tensors = write_adapter(tmp_path, base, modules_of(base, ALL), rank=9, r=9, use_rslora=True)
    merge_lora(merged, tmp_path)
    assert_merged(merged, base, tensors, lambda module: 8 / 3)


def test_merge_follows_patterns_of_rank_and_alpha(tmp_path):
    def rank(module: str) -> int:
        return 2 if module.endswith("q_proj") else 6 if ".1." in module and "mlp" in module else 4

    def alpha(module: str) -> float:
        return 3 if module == "model.layers.0.self_attn.k_proj" else 16 if module.endswith("down_proj") else 8

    base, merged = randomized(small_config()), randomized(small_config())
    patterns = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 3, "down_proj": 16, "proj": 5},  # "proj" means no layer
    }
    tensors = write_adapter(tmp_path, base, modules_of(base, ALL), rank, **patterns)
    merge_lora(merged, tmp_path)
    assert_merged(merged, base, tensors, lambda module: alpha(module) / rank(module))


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        ({"target_modules": "all-linear"}, lambda module: True),
        ({"target_modules": r".*\.self_attn\.[qv]_proj"}, lambda module: module.endswith(("q_proj", "v_proj"))),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, lambda module: module == "model.layers.1.mlp.up_proj"),
        ({"target_modules": ALL, "layers_to_transform": 1}, lambda module: ".1." in module),
        ({"target_modules": ALL, "layers_to_transform": [0]}, lambda module: ".0." in module),
        ({"target_modules": ALL, "exclude_modules": ["q_proj"]}, lambda module: not module.endswith("q_proj")),
        ({"target_modules": ALL, "exclude_modules": r".*mlp\..*"}, lambda module: "mlp" not in module),
        ({"target_modules": [*ALL, "c_attn"]}, lambda module: True),
        ({"target_modules": None}, lambda module: "up_proj" in module),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "chosen",
)
def test_merge_wants_just_the_layers_that_the_config_names(tmp_path, config, chosen):
    base, merged = randomized(small_config()), randomized(small_config())
    modules = [module for module in modules_of(base, ALL) if chosen(module)]
    tensors = write_adapter(tmp_path, base, modules, **config)
    merge_lora(merged, tmp_path)
    assert_merged(merged, base, tensors, lambda module: 2)
    if config["target_modules"] is not None:
        write_adapter(tmp_path, base, modules[1:], **config)
        with pytest.raises(ValueError, match=rf"base_model\.model\.{modules[0]}\.lora_A\.weight: missing"):
            merge_lora(merged, tmp_path)


def test_merge_reads_adapters_of_models_without_output_projection(tmp_path):
    base, merged = randomized(small_config()), randomized(small_config())
    # Patterns mean the names that the adapter itself uses.
    config = {"alpha_pattern": {"^layers.0.self_attn.q_proj": 4}, "target_modules": r"layers\.\d+\.self_attn\.q_proj"}
    tensors = write_adapter(tmp_path, base, modules_of(base, ["q_proj"]), **config)
    bare = {name.replace("model.model.", "model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "adapter_model.safetensors")
    merge_lora(merged, tmp_path)
    assert_merged(merged, base, tensors, lambda module: 1 if ".0." in module else 2)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once_to_the_dtype_of_the_weight(tmp_path, adapter_dtype):
    base, merged = randomized(small_config()).bfloat16(), randomized(small_config()).bfloat16()
    tensors = write_adapter(tmp_path, base, modules_of(base, ["q_proj"]))
    tensors = {name: tensor.to(adapter_dtype) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merge_lora(merged, tmp_path)
    for module in modules_of(base, ["q_proj"]):
        exact = base.get_submodule(module).weight.double() + delta(tensors, module, 2)
        weight = merged.get_submodule(module).weight
        assert weight.dtype == torch.bfloat16
        assert (weight != exact.bfloat16()).float().mean() < 0.01  # except for ties of float32


def test_merged_logits_are_those_of_base_and_adapter_side_by_side(tmp_path):
    base, merged = randomized(small_config()), randomized(small_config())
    tensors = write_adapter(tmp_path, base, modules_of(base, ALL), lora_alpha=1)
    merge_lora(merged, tmp_path)

    def add_low_rank(module: str):
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        return lambda layer, args, output: output + 0.25 * (args[0] @ a.T) @ b.T

    for module in modules_of(base, ALL):
        base.get_submodule(module).register_forward_hook(add_low_rank(module))
    token_BT = random_ids(2, 11)
    assert_near(merged(token_BT), base(token_BT))


def digests(folder: Path) -> dict[str, str]:
    """A hash of each file."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_load_merges_before_quantizing_and_leaves_the_files_alone(tmp_path, tokenizer_folder, quantization):
    config = small_config(vocab_size=1024, hidden_size=64, intermediate_size=96)
    base, expected = randomized(config), randomized(config)
    checkpoint = write_text_checkpoint(tmp_path / "base", base, tokenizer_folder)
    tensors = write_adapter(tmp_path / "adapter", base, modules_of(base, ALL))
    before = digests(checkpoint), digests(tmp_path / "adapter")
    loaded = load_model(checkpoint, device="cpu", quantization=quantization, adapter=str(tmp_path / "adapter"))
    merge_lora(expected, tmp_path / "adapter")
    merged_folder = write_text_checkpoint(tmp_path / "merged", expected, tokenizer_folder)
    again = load_model(merged_folder, device="cpu", quantization=quantization)
    theirs = dict(again.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert_same(parameter, theirs[name])
    assert (digests(checkpoint), digests(tmp_path / "adapter")) == before
    assert_merged(expected, base, tensors, lambda module: 2)


def test_merge_leaves_weights_without_adapter_mapped(tmp_path, tokenizer_folder):
    model = randomized(small_config(vocab_size=1024))
    checkpoint = write_text_checkpoint(tmp_path / "base", model, tokenizer_folder)
    write_adapter(tmp_path / "adapter", model, modules_of(model, ["q_proj"]))
    loaded = load_model(checkpoint, device="cpu")
    before = {name: parameter.data_ptr() for name, parameter in loaded.named_parameters()}
    merge_lora(loaded, tmp_path / "adapter")
    moved = {name for name, parameter in loaded.named_parameters() if parameter.data_ptr() != before[name]}
    assert moved == {f"{module}.weight" for module in modules_of(model, ["q_proj"])}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_generator_answers_with_the_merged_weights(tmp_path, tokenizer_folder):
    model = randomized(small_config(vocab_size=1024))
    checkpoint = write_text_checkpoint(tmp_path / "base", model, tokenizer_folder)
    write_adapter(tmp_path / "adapter", model, modules_of(model, ALL))
    merge_lora(model, tmp_path / "adapter")
    merged = write_text_checkpoint(tmp_path / "merged", model, tokenizer_folder)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    options = {"device": "cpu", "compile": False, "max_seq_len": 64}
    replies = []
    for source, adapter in ((checkpoint, tmp_path / "adapter"), (merged, None), (checkpoint, None)):
        with Generator.from_pretrained(source, adapter=adapter, **options) as generator:
            replies.append(generator.generate("Hello", params).token_ids)
    assert replies[0] == replies[1] != replies[2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported; only 'none' is"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; only 'LORA' is"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"r": None}, "r=None is not valid in a LoRA adapter"),
        ({"lora_alpha": "8"}, "lora_alpha='8' is not valid"),
        ({"r": 0}, r"ranks must be whole numbers from 1 to 65536, got \[0\]"),
        ({"rank_pattern": {"q_proj": -1}}, r"ranks must be whole numbers from 1 to 65536, got \[4, -1\]"),
        ({"alpha_pattern": {"q_proj": "x"}}, "lora_alpha, alpha_pattern must be numbers up to"),
        ({"target_modules": "("}, r"'\(' is not a regular expression"),
    ],
    ids=str,
)
def test_merge_refuses_what_is_not_supported_by_name(tmp_path, config, message):
    model = randomized(small_config())
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]), **config)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        merge_lora(model, tmp_path)
    with pytest.raises(ValueError, match=message):  # before weights are looked for
        load_model("tiny", adapter=tmp_path)


def test_merge_names_all_tensors_that_do_not_fit_at_once(tmp_path):
    model, untouched = randomized(small_config()), randomized(small_config())
    write_adapter(tmp_path, model, modules_of(model, ["q_proj", "up_proj"]))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = "base_model.model.model.layers.0"
    del tensors[f"{first}.self_attn.q_proj.lora_B.weight"]
    tensors[f"{first}.mlp.up_proj.lora_A.weight"] = torch.zeros(3, 48)
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 48)
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 97)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="the adapter's tensors do not fit") as error:
        merge_lora(model, tmp_path)
    lines = str(error.value).splitlines()[1:]
    assert sorted(line.strip() for line in lines) == [
        "base_model.model.model.embed_tokens.lora_embedding_B: missing",
        f"{first}.mlp.up_proj.lora_A.weight: shape (3, 48), expected (4, 48)",
        f"{first}.self_attn.q_proj.lora_B.weight: missing",
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight: unexpected, this model has no place for it",
    ]
    for name, parameter in untouched.named_parameters():
        assert_same(model.get_parameter(name), parameter)


def test_merge_refuses_an_adapter_without_tensors(tmp_path):
    model = randomized(small_config())
    write_adapter(tmp_path, model, [], target_modules=["c_attn"])
    with pytest.raises(ValueError, match="it holds no tensors"):
        merge_lora(model, tmp_path)


def test_merge_says_which_file_is_missing(tmp_path):
    model = randomized(small_config())
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json not found"):
        merge_lora(model, tmp_path)
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors not found; save the adapter with"):
        merge_lora(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        merge_lora(model, tmp_path)


def test_merge_refuses_quantized_weights(tmp_path):
    config = small_config(hidden_size=64, intermediate_size=96)
    model = randomized(config)
    write_adapter(tmp_path / "adapter", model, modules_of(model, ["q_proj"]))
    quantize_model(model, "int8", torch.float32)
    with pytest.raises(ValueError, match="needs the original weights; these are in int8 already"):
        merge_lora(model, tmp_path / "adapter")
