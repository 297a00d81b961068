"""ModelConfig: which config.json files are read, and how; which are refused, and why."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from conftest import small_config

from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.files import read_json
from qwen3fast.model import build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.yarn import Yarn

# Parameters of the published checkpoints, as their safetensors headers count them.
PUBLISHED = {
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 8_190_735_360,
    "14b": 14_768_307_200,
    "32b": 32_762_123_264,
    "30b-a3b": 30_532_122_624,
    "235b-a22b": 235_093_634_560,
}

# The fields of Qwen3-0.6B's published config.json that matter here.
RAW = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def raw_config(**changes) -> dict:
    """RAW with fields changed; `...` removes a field."""
    return {key: value for key, value in {**RAW, **changes}.items() if value is not ...}


def test_config_reads_the_published_file():
    assert CheckpointConfig.from_dict(RAW).model == ModelConfig.named("0.6b")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5_000_000},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 5_000_000, "rope_type": "default"}},
        {"rope_theta": ..., "rope_scaling": {"rope_theta": 5_000_000, "rope_type": "default"}},
        {"rope_theta": 10_000, "rope_parameters": {"rope_theta": 5_000_000, "rope_type": "default"}},
    ],
    ids=["old place", "rope_parameters", "rope_scaling", "rope_parameters wins"],
)
def test_config_reads_rope_theta(changes):
    assert CheckpointConfig.from_dict(raw_config(**changes)).model.rope_theta == 5_000_000.0


def test_config_rope_theta_defaults_to_a_million():
    assert CheckpointConfig.from_dict(raw_config(rope_theta=...)).model.rope_theta == 1_000_000.0


def test_config_reads_the_2507_variants():
    raw = raw_config(rope_theta=5_000_000, max_position_embeddings=262_144)
    config = CheckpointConfig.from_dict(raw).model
    assert (config.rope_theta, config.longest_context, config.yarn) == (5_000_000.0, 262_144, None)


# The fields of Qwen3-30B-A3B's published config.json that differ.
A3B = {
    **EXPERTS,
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"architectures": ...}, {"num_experts": ..., "num_local_experts": 128}, {"mlp_only_layers": ...}],
    ids=["published", "model_type", "as transformers 5 writes it", "no layers named"],
)
def test_config_reads_a_mixture_of_experts(changes):
    assert CheckpointConfig.from_dict(raw_config(**{**A3B, **changes})).model == ModelConfig.named("30b-a3b")


def test_config_does_not_renormalize_unless_it_says_so():
    assert not CheckpointConfig.from_dict(raw_config(**{**A3B, "norm_topk_prob": ...})).model.norm_topk_prob


def test_config_of_a_dense_model_ignores_fields_of_experts():
    assert (
        CheckpointConfig.from_dict(raw_config(num_experts=128, decoder_sparse_step=2)).model
        == CheckpointConfig.from_dict(RAW).model
    )


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_config_reads_yarn_in_every_spelling(place, kind):
    raw = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = CheckpointConfig.from_dict(raw_config(**{place: raw})).model
    assert config.yarn == Yarn(4.0, 32768)
    assert config.longest_context == 131_072


def test_config_reads_all_fields_of_yarn():
    every = {"attention_factor": 1.1, "beta_fast": 30, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.9}
    config = CheckpointConfig.from_dict(raw_config(rope_scaling={**YARN, **every, "truncate": False})).model
    assert config.yarn == Yarn(4.0, 32768, 1.1, 30, 2, 0.7, 0.9, False)


def test_config_original_length_of_yarn_defaults_to_the_models():
    config = CheckpointConfig.from_dict(raw_config(rope_scaling={"type": "yarn", "factor": 2.0})).model
    assert config.yarn == Yarn(2.0, 40_960)


def test_config_original_length_beside_the_scaling_wins():
    config = CheckpointConfig.from_dict(raw_config(rope_scaling=YARN, original_max_position_embeddings=8192)).model
    assert config.yarn == Yarn(4.0, 8192)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16), ("torch.float32", torch.float32)]
)
def test_config_reads_the_dtype(field, name, dtype):
    assert CheckpointConfig.from_dict(raw_config(**{"torch_dtype": ..., field: name})).model.dtype == dtype


def test_config_dtype_wins_over_torch_dtype():
    assert CheckpointConfig.from_dict(raw_config(dtype="float32", torch_dtype="float16")).model.dtype == torch.float32


def test_config_dtype_defaults_to_bfloat16():
    assert CheckpointConfig.from_dict(raw_config(torch_dtype=...)).model.dtype == torch.bfloat16


@pytest.mark.parametrize(("eos", "ids"), [(7, (7,)), ([7, 9], (7, 9)), (None, ()), (..., ()), (0, (0,))])
def test_config_reads_eos_token_id(eos, ids):
    assert CheckpointConfig.from_dict(raw_config(eos_token_id=eos)).model.eos_token_ids == ids


@pytest.mark.parametrize("absent", [..., None])
def test_config_head_dim_defaults_to_128(absent):
    config = CheckpointConfig.from_dict(raw_config(head_dim=absent)).model
    assert config.head_dim == 128 != config.hidden_size // config.num_attention_heads


def test_config_head_dim_is_read_not_computed():
    assert CheckpointConfig.from_dict(raw_config(head_dim=80)).model.head_dim == 80


def test_config_key_value_heads_default_to_the_query_heads():
    assert CheckpointConfig.from_dict(raw_config(num_key_value_heads=...)).model.num_key_value_heads == 16


def test_config_is_untied_unless_it_says_tied():
    assert not CheckpointConfig.from_dict(raw_config(tie_word_embeddings=...)).model.tie_word_embeddings


def test_config_reads_attention_bias():
    assert CheckpointConfig.from_dict(raw_config(attention_bias=True)).model.attention_bias


def test_config_reads_rms_norm_eps():
    assert CheckpointConfig.from_dict(raw_config(rms_norm_eps=1e-5)).model.rms_norm_eps == 1e-5


def test_config_ignores_fields_it_does_not_know():
    assert CheckpointConfig.from_dict(raw_config(initializer_range=0.02)).model == CheckpointConfig.from_dict(RAW).model


def test_config_accepts_a_model_type_without_architectures():
    assert CheckpointConfig.from_dict(raw_config(architectures=...)).model == CheckpointConfig.from_dict(RAW).model


def test_config_accepts_a_model_without_output_projection():
    assert (
        CheckpointConfig.from_dict(raw_config(architectures=["Qwen3Model"])).model
        == CheckpointConfig.from_dict(RAW).model
    )


def test_config_accepts_layer_types_that_are_all_full_attention():
    assert (
        CheckpointConfig.from_dict(raw_config(layer_types=["full_attention"] * 28)).model
        == CheckpointConfig.from_dict(RAW).model
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3NextForCausalLM"]}, "'Qwen3NextForCausalLM' is not supported"),
        ({"architectures": ["LlamaForCausalLM"]}, "supported: Qwen3ForCausalLM, Qwen3MoeForCausalLM"),
        ({**EXPERTS, "num_experts": ...}, "missing num_experts; every Qwen3 config with experts"),
        ({**EXPERTS, "moe_intermediate_size": None}, "missing moe_intermediate_size"),
        ({**EXPERTS, "num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ({**EXPERTS, "num_experts": -1}, "num_experts must be a positive integer, got -1"),
        ({**EXPERTS, "num_experts": 4}, r"num_experts_per_tok \(8\) exceeds num_experts \(4\)"),
        ({**EXPERTS, "num_experts_per_tok": 0}, "num_experts_per_tok must be a positive integer, got 0"),
        ({**EXPERTS, "decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer, got 0"),
        ({**EXPERTS, "norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
        ({**EXPERTS, "mlp_only_layers": "0"}, "must be a number or a list of numbers"),
        ({"architectures": ..., "model_type": "qwen2"}, "'qwen2' is not supported"),
        ({"architectures": ..., "model_type": ...}, "None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "use_sliding_window=True is not supported",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*only 'full_attention' is"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq' is not supported; load the original"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, got 'fp8'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "YaRN: missing factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "YaRN: missing factor"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "YaRN: factor must be at least 1, got 0.5"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "YaRN: factor must be a positive number up to 1e.06, got '4'"),
        ({"rope_scaling": {**YARN, "factor": True}}, "YaRN: factor must be a positive number .*got True"),
        (
            {"rope_scaling": {**YARN, "factor": float("inf")}},
            "YaRN: factor must be a positive number .*got inf",
        ),
        ({"rope_scaling": {**YARN, "attention_factor": -1.0}}, "YaRN: attention_factor must be a positive number"),
        ({"rope_scaling": {**YARN, "beta_fast": 0}}, "YaRN: beta_fast must be a positive number up to 1e.06, got 0"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, r"beta_fast \(1\) must not be below beta_slow"),
        ({"rope_scaling": {**YARN, "mscale": "1"}}, "YaRN: mscale must be a positive number up to 1e.06, got '1'"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "YaRN: truncate must be true or false, got 1"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings must"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta must be above 1 with YaRN"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "RoPE scaling 'llama3' is not supported; 'yarn' and 'default'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE scaling 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "RoPE scaling 'dynamic' is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported; supported: bfloat16"),
        ({"hidden_size": ...}, "missing hidden_size; every Qwen3"),
        ({"vocab_size": ..., "num_hidden_layers": ...}, "missing vocab_size, num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, got 'many'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers must be a positive integer, got 2.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a positive integer, got -1"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(16\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 65}, r"head_dim must be even \(RoPE rotates pairs\), got 65"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number up to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number up to 1"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"rms_norm_eps": "small"}, "somewhere.json: "),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig.from_dict(raw_config(**changes), "somewhere.json")


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"hidden_size": ...}, {"head_dim": 3}])
def test_config_refusal_names_the_file(changes):
    with pytest.raises(ValueError, match=r"^somewhere\.json: "):
        CheckpointConfig.from_dict(raw_config(**changes), "somewhere.json")


def test_config_cannot_be_changed_after_its_checks():
    with pytest.raises(FrozenInstanceError):
        small_config().head_dim = 3


def test_config_from_folder_reads_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAW), encoding="utf-8")
    assert CheckpointConfig.from_folder(tmp_path).model == CheckpointConfig.from_dict(RAW).model


def test_config_from_folder_without_the_file_says_what_it_expects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json not found; expected a folder in Hugging Face layout"):
        CheckpointConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"), (b"[1]", "must hold a JSON object, got list")],
)
def test_read_json_refuses(tmp_path, content, message):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.json {message}"):
        read_json(tmp_path / "broken.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_shape_has_the_published_size(name):
    assert ModelConfig.named(name).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_num_parameters_counts_a_built_model(name):
    config = ModelConfig.named(name)
    assert config.num_parameters == sum(p.numel() for p in build_on_meta(config).parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters_counts_biases(tied):
    config = small_config(attention_bias=True, tie_word_embeddings=tied)
    assert config.num_parameters == sum(p.numel() for p in build_on_meta(config).parameters())


def test_named_ignores_case():
    assert ModelConfig.named("0.6B") == ModelConfig.named("0.6b")


def test_named_refuses_an_unknown_shape():
    with pytest.raises(ValueError, match=r"unknown Qwen3 shape '7b'; known shapes: 0\.6b, 1\.7b, 4b, 8b, 14b, 32b"):
        ModelConfig.named("7b")


def test_decode_parameters_leave_out_an_untied_embedding():
    config = small_config(tie_word_embeddings=False)
    assert config.num_parameters - config.decode_parameters == config.vocab_size * config.hidden_size


@pytest.mark.parametrize(("name", "billions"), [("30b-a3b", 3.04), ("235b-a22b", 21.57)])
def test_decode_parameters_count_active_experts_only(name, billions):
    config = ModelConfig.named(name)
    stacks = [p for n, p in build_on_meta(config).named_parameters() if ".experts." in n]
    idle = sum(p[0].numel() * (config.num_experts - config.num_experts_per_tok) for p in stacks)
    outer = config.vocab_size * config.hidden_size
    assert config.decode_parameters == config.num_parameters - idle - outer
    assert round(config.decode_parameters / 1e9, 2) == billions
    assert build_on_meta(config).num_bytes(per_token=True) == config.decode_parameters * 2


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": (0, 3)}], ids=str)
def test_num_parameters_counts_layers_with_and_without_experts(changes):
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 4}
    config = small_config(**sizes, **changes)
    assert config.num_parameters == sum(p.numel() for p in build_on_meta(config).parameters())


def test_decode_parameters_of_a_tied_model_are_all():
    assert small_config().decode_parameters == small_config().num_parameters


@pytest.mark.parametrize(("name", "kib"), [("0.6b", 112), ("4b", 144), ("14b", 160), ("32b", 256)])
def test_kv_bytes_per_token_of_published_shapes(name, kib):
    assert ModelConfig.named(name).kv_bytes_per_token(torch.bfloat16) == kib * 1024


@pytest.mark.parametrize(
    "config",
    [
        *(ModelConfig.named(name) for name in PUBLISHED),
        small_config(attention_bias=True, rms_norm_eps=1e-5, rope_theta=12345.0, tie_word_embeddings=False),
        small_config(eos_token_ids=()),
        small_config(eos_token_ids=(5, 6)),
        small_config(dtype=torch.float16),
        small_config(
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            mlp_only_layers=(1,),
        ),
        small_config(num_hidden_layers=1, yarn=Yarn(4.0, 64)),
        small_config(num_hidden_layers=3, yarn=Yarn(4.0, 64, 1.2, 30.0, 2.0, 0.7, 0.9, False)),
    ],
    ids=lambda config: f"{config.num_parameters}-{len(config.eos_token_ids)}",
)
def test_to_dict_round_trip(config):
    assert CheckpointConfig.from_dict(json.loads(json.dumps(CheckpointConfig(config).to_dict()))).model == config


def test_replace_checks_again():
    with pytest.raises(ValueError, match="head_dim must be even"):
        replace(small_config(), head_dim=7)


@pytest.mark.parametrize(
    "changes",
    [{"rope_scaling": "yarn"}, {"layer_types": [["full_attention"]]}, {"eos_token_id": "151645"}],
    ids=str,
)
def test_config_refuses_fields_of_the_wrong_type(changes):
    with pytest.raises(ValueError, match=r"^somewhere\.json: "):
        CheckpointConfig.from_dict(raw_config(**changes), "somewhere.json")
