"""Checkpoints as people have them: left-over files, other spellings, heads of trainers, adapters of other tools."""

from __future__ import annotations

import json
import logging
import time

import pytest
import torch
from conftest import assert_near, assert_same, random_ids, random_tensor, randomized, small_config
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same_weights, tensors_of, write_checkpoint, write_index
from test_lora import modules_of, write_adapter

from qwen3fast import load_model
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.lora.merge import merge_lora
from qwen3fast.checkpoint.save import save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite_config(folder, **changes):
    """Change fields of config.json."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("has_shards", [False, True])
def test_a_whole_file_beside_a_stale_index_is_read(tmp_path, caplog, has_shards):
    old, new = randomized(small_config(), seed=1), randomized(small_config(), seed=2)
    write_checkpoint(tmp_path, old.config, tensors_of(old), files=2)
    if not has_shards:
        for file in tmp_path.glob("model-*.safetensors"):
            file.unlink()
    save_file(tensors_of(new), tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path, device="cpu"), new)
    assert "model.safetensors.index.json describes other files and is ignored" in caplog.text


def test_a_shard_that_is_named_as_a_whole_file_is_a_shard(tmp_path):
    model = randomized(small_config())
    tensors = tensors_of(model)
    write_checkpoint(tmp_path, model.config, {})
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, tmp_path / "model.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "rest.safetensors")
    index = {name: "model.safetensors" if i < 3 else "rest.safetensors" for i, name in enumerate(names)}
    write_index(tmp_path, index)
    assert_same_weights(load_model(tmp_path, device="cpu"), model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "v_head.summary.weight",
        "v_head.weight",
        "score.weight",
        "value_head.0.bias",
        "mtp.layers.0.mlp.down_proj.weight",
        "model.mtp.fc.weight",
        "eagle_module.fc.weight",
        "midlayer.self_attn.q_proj.weight",
        "d2t",
        "medusa_head.0.0.linear.weight",
        "model.visual.blocks.0.attn.qkv.weight",
    ],
)
def test_tensors_without_use_are_skipped_and_named_in_the_log(tmp_path, caplog, name):
    caplog.set_level(logging.WARNING)
    model = randomized(small_config())
    write_checkpoint(tmp_path, model.config, {**tensors_of(model), name: torch.zeros(8)})
    assert_same_weights(load_model(tmp_path, device="cpu"), model)
    assert name in caplog.text


def test_a_tensor_that_nobody_knows_is_still_refused(tmp_path):
    model = randomized(small_config())
    write_checkpoint(tmp_path, model.config, {**tensors_of(model), "model.layers.0.extra.weight": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.extra\.weight in .*unexpected"):
        load_model(tmp_path, device="cpu")


# -------------------------------------------------------------------------------------------------------------- tied


def test_a_tied_model_with_another_output_projection_keeps_both(tmp_path):
    untied = randomized(small_config(tie_word_embeddings=False))
    write_checkpoint(tmp_path, untied.config, tensors_of(untied))
    rewrite_config(tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"lm_head\.weight holds other numbers than the embedding; both are used"):
        model = load_model(tmp_path, device="cpu")
    assert not model.config.tie_word_embeddings
    token_BT = random_ids(2, 5)
    assert_same(model(token_BT), untied(token_BT))


def test_transformers_keeps_both_as_well(tmp_path):
    transformers = pytest.importorskip("transformers")
    untied = randomized(small_config(tie_word_embeddings=False))
    write_checkpoint(tmp_path, untied.config, tensors_of(untied))
    rewrite_config(tmp_path, tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_BT = random_ids(1, 5)
    with torch.no_grad(), pytest.warns(UserWarning, match="both are used"):
        assert_near(load_model(tmp_path, device="cpu")(token_BT), theirs(token_BT).logits)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [(EMBEDDING, HEAD), (EMBEDDING,), (HEAD,)])
def test_tied_weights_are_read_under_either_name(tmp_path, names):
    model = randomized(small_config())
    tensors = tensors_of(model)
    embedding = tensors.pop(EMBEDDING)
    write_checkpoint(tmp_path, model.config, {**tensors, **{name: embedding.clone() for name in names}})
    assert_same_weights(load_model(tmp_path, device="cpu"), model)


# ------------------------------------------------------------------------------------------------------------ config


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": None, "sliding_window": 64},
        {"layer_types": []},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": None}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"quantization_config": {}},
        {"quantization_config": None},
        {"hidden_act": None},
        {"hidden_act": "swish"},
        {"partial_rotary_factor": 1},
    ],
    ids=str,
)
def test_nothing_special_in_any_spelling_is_nothing_special(changes):
    plain = small_config()
    assert CheckpointConfig.from_dict({**CheckpointConfig(plain).to_dict(), **changes}).model == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": "full_attention"},
    ],
    ids=str,
)
def test_layers_that_slide_are_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*is not supported"):
        CheckpointConfig.from_dict({**CheckpointConfig(small_config()).to_dict(), **changes})


def test_settings_of_rope_without_effect_are_told():
    raw = {**CheckpointConfig(small_config()).to_dict(), "rope_scaling": {"rope_type": "default", "factor": 4.0}}
    with pytest.warns(UserWarning, match=r"without effect: \{'factor': 4.0\}"):
        CheckpointConfig.from_dict(raw)


@pytest.mark.parametrize("method", [[], {}, 7, ["fp8"], True])
def test_an_odd_quant_method_is_refused_by_name(method):
    with pytest.raises(ValueError, match=r"quantization_config=.*is not supported"):
        CheckpointConfig.from_dict(
            {**CheckpointConfig(small_config()).to_dict(), "quantization_config": {"quant_method": method}}
        )


# ---------------------------------------------------------------------------------------------------------- adapters


def rename(folder, change):
    """Rename all tensors of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def test_names_with_the_adapters_own_name_in_them_are_read(tmp_path):
    first, second = randomized(small_config()), randomized(small_config())
    write_adapter(tmp_path, first, modules_of(first, ["q_proj", "up_proj"]))
    merge_lora(first, tmp_path)
    rename(tmp_path, lambda name: name.replace(".weight", ".default.weight"))
    merge_lora(second, tmp_path)
    assert_same_weights(second, first)


@pytest.mark.parametrize("name", ["lora_embedding_A", "lora_embedding_A.default"])
def test_an_adapter_of_the_embedding_is_added_row_by_row(tmp_path, name):
    model, before = (randomized(small_config(tie_word_embeddings=False)) for _ in range(2))
    write_adapter(tmp_path, model, [], target_modules=["embed_tokens"])
    a, b = random_tensor(4, 97, seed=1), random_tensor(48, 4, seed=2)
    prefix = "base_model.model.model.embed_tokens"
    tensors = {f"{prefix}.{name}": a, f"{prefix}.{name.replace('_A', '_B')}": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merge_lora(model, tmp_path)
    expected = before.model.embed_tokens.weight.double() + 2 * (b.double() @ a.double()).T
    assert_near(model.model.embed_tokens.weight, expected)
    assert_same(model.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("spelling", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_that_were_trained_whole_take_the_place_of_the_old(tmp_path, spelling):
    model = randomized(small_config(tie_word_embeddings=False))
    saved = {"lm_head": random_tensor(97, 48, seed=5), "model.norm": random_tensor(48, seed=6)}
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]), modules_to_save=["lm_head", "norm"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{name}{spelling}.weight": tensor for name, tensor in saved.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merge_lora(model, tmp_path)
    assert_same(model.lm_head.weight, saved["lm_head"])
    assert_same(model.model.norm.weight, saved["model.norm"])


def test_a_module_to_save_that_is_not_there_is_named(tmp_path):
    model = randomized(small_config(tie_word_embeddings=False))
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing, modules_to_save names it"):
        merge_lora(model, tmp_path)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ("target_modules", "(([a-z_.0-9])*)*X"),
        ("target_modules", "([a-z._0-9]|[a-z._0-9])*X"),
        ("exclude_modules", "([a-z._0-9]|[a-z._0-9])*X"),
        ("rank_pattern", ".*.*.*.*.*.*.*.*.*.*.*.*X"),
        ("alpha_pattern", "(([a-z_.0-9])*)*X"),
    ],
)
def test_a_pattern_that_never_ends_is_refused_soon(tmp_path, monkeypatch, field, pattern):
    monkeypatch.setattr("qwen3fast.checkpoint.lora.patterns.MAX_SECONDS", 0.1)
    model = randomized(small_config())
    value = {pattern: 4} if field.endswith("_pattern") else pattern
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]), **{field: value})
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"matching takes more than 0\.1 s"):
        merge_lora(model, tmp_path)
    assert time.monotonic() - started < 30  # and not for ever


def test_mlx_adapters_are_refused_by_name(tmp_path):
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="mlx-lm"):
        load_model("tiny", adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}})
    )
    with pytest.raises(ValueError, match="mlx-lm"):
        load_model("tiny", adapter=tmp_path)


def test_a_hub_id_of_an_adapter_is_downloaded(tmp_path, monkeypatch):
    model, asked = randomized(small_config()), []
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]))
    monkeypatch.setattr(
        "qwen3fast.checkpoint.source.snapshot_download", lambda name, **options: asked.append(name) or str(tmp_path)
    )
    merge_lora(model, "somebody/adapter")
    assert asked == ["somebody/adapter"]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": 1e39},
        {"lora_alpha": True},
        {"r": True},
        {"r": 10**12},
        {"target_modules": [7]},
        {"modules_to_save": "lm_head"},
        {"layers_to_transform": [None]},
    ],
    ids=str,
)
def test_hostile_values_of_an_adapter_are_refused_by_name(tmp_path, changes):
    model = randomized(small_config())
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]), **changes)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        merge_lora(model, tmp_path)


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("has_copy", [False, True])
def test_an_adapter_of_one_of_two_tied_weights_unties_them(tmp_path, module, has_copy):
    model, before = (randomized(small_config()) for _ in range(2))
    write_adapter(tmp_path, model, [], target_modules=[module.split(".")[-1]])
    is_embedding = module != "lm_head"
    a, b = (random_tensor(4, 97, seed=1), random_tensor(48, 4, seed=2))
    if not is_embedding:
        a, b = random_tensor(4, 48, seed=1), random_tensor(97, 4, seed=2)
    ends = ["lora_embedding_A", "lora_embedding_B"] if is_embedding else ["lora_A.weight", "lora_B.weight"]
    tensors = {f"base_model.model.{module}.{end}": tensor for end, tensor in zip(ends, (a, b), strict=True)}
    if has_copy:
        copy = before.model.embed_tokens.weight.detach().clone()
        tensors[f"base_model.model.{module}.base_layer.weight"] = copy
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    merge_lora(model, tmp_path)
    product = 2 * (b @ a)
    expected = before.lm_head.weight + (product.T if is_embedding else product)
    assert not model.config.tie_word_embeddings
    assert_near(model.get_submodule(module).weight, expected)
    other = "lm_head" if is_embedding else "model.embed_tokens"
    assert_same(model.get_submodule(other).weight, before.lm_head.weight)


@pytest.mark.parametrize("ensures", [False, True])
def test_a_whole_embedding_of_a_tied_model_takes_its_place(tmp_path, ensures):
    model, before = (randomized(small_config()) for _ in range(2))
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": ensures}
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]), **options)
    tensors, saved = load_file(tmp_path / "adapter_model.safetensors"), random_tensor(97, 48, seed=7)
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": saved}, tmp_path / "adapter_model.safetensors")
    merge_lora(model, tmp_path)
    assert_same(model.model.embed_tokens.weight, saved)
    assert_same(model.lm_head.weight, saved if ensures else before.lm_head.weight)
    assert model.config.tie_word_embeddings == ensures


def test_a_copy_of_another_embedding_is_refused(tmp_path):
    model = randomized(small_config())
    write_adapter(tmp_path, model, modules_of(model, ["q_proj"]))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = random_tensor(97, 48, seed=7)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"base_layer\.weight: differs from the model's"):
        merge_lora(model, tmp_path)


def test_an_untied_model_is_quantized_and_saved_with_both_weights(tmp_path):
    untied = randomized(small_config(hidden_size=64, vocab_size=96, tie_word_embeddings=False))
    (tmp_path / "theirs").mkdir()
    write_checkpoint(tmp_path / "theirs", untied.config, tensors_of(untied))
    rewrite_config(tmp_path / "theirs", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="both are used"):
        model = load_model(tmp_path / "theirs", device="cpu", quantization="int8")
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours", device="cpu")
    assert_same_weights(loaded, model)
    assert not torch.equal(loaded.lm_head.dequantize(), loaded.model.embed_tokens(torch.arange(96)[None])[0].float())


def test_an_embedder_needs_no_output_projection_of_its_own(tmp_path):
    untied = randomized(small_config(tie_word_embeddings=False))
    write_checkpoint(tmp_path, untied.config, tensors_of(untied))
    rewrite_config(tmp_path, tie_word_embeddings=True)
    model = load_model(tmp_path, device="cpu", output_projection=False)
    assert_same(model.model.embed_tokens.weight, untied.model.embed_tokens.weight)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'])
def test_a_whole_file_beside_a_damaged_index_is_read(tmp_path, index):
    model = randomized(small_config())
    write_checkpoint(tmp_path, model.config, tensors_of(model))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert_same_weights(load_model(tmp_path, device="cpu"), model)
