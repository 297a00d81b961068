"""config.json of a checkpoint in Hugging Face layout: the numbers of the model, and how its weights are stored.

Features that the model does not support are refused here, by name, before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen3fast.checkpoint.architectures import WITH_TEXT_PART, text_part, why_not
from qwen3fast.checkpoint.choices import DTYPES
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.rope_config import read_rope_theta, read_yarn, refuse_rope, yarn_to_dict
from qwen3fast.files import read_json
from qwen3fast.model.config import ModelConfig
from qwen3fast.quantization.formats import SAVED_FORMATS

# The model_type of each. Qwen3Model and Qwen3ForSequenceClassification have no output projection.
SUPPORTED_ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3Model": "qwen3",
    "Qwen3ForSequenceClassification": "qwen3",
}
OWN_QUANTIZATION = {"quant_method": "qwen3fast", "version": 1}  # a version for each change of the packed layout

_REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_REQUIRED_OF_MOE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
_OF_MOE = _REQUIRED_OF_MOE | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}


@dataclass(frozen=True)
class CheckpointConfig:
    """The contents of config.json.

    model: the numbers of the model. quantization: the format of the linear layers and the embedding in a checkpoint
    that `Generator.save_quantized` wrote, except for `modules_to_not_convert`, which are in `model.dtype`.
    prequantized: the format of the linear layers in a checkpoint that other software quantized.
    calibration_tokens: tokens of the text that 4 bits corrected their errors on; 0 for none, or not known.
    """

    model: ModelConfig
    quantization: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    prequantized: PrequantizedFormat | None = None
    calibration_tokens: int = 0

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> CheckpointConfig:
        """Read the fields of a Hugging Face `config.json` given as a dictionary.

        Raises: ValueError for an architecture, feature or value that is not supported, or a missing field.
        """
        raw = text_part(raw, where)
        _refuse_unsupported(raw, where)
        quantization = _read_quantization(raw, where)
        return cls(_read_model(raw, where), **quantization)

    @classmethod
    def from_folder(cls, folder: Path) -> CheckpointConfig:
        """Read `folder/config.json`.

        Raises: FileNotFoundError if it is not there; ValueError if it is not JSON or not supported.
        """
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    def to_dict(self) -> dict[str, Any]:
        """Return the same config as a Hugging Face `config.json` dictionary; others' formats are never written."""
        assert self.prequantized is None, "weights are saved plain, or in a format of ours"
        plain = {f.name: getattr(self.model, f.name) for f in fields(self.model)}
        eos, yarn, dtype = plain.pop("eos_token_ids"), plain.pop("yarn"), str(plain.pop("dtype")).removeprefix("torch.")
        architecture = "Qwen3MoeForCausalLM" if self.model.num_experts else "Qwen3ForCausalLM"
        if self.model.num_experts:
            plain["mlp_only_layers"] = list(self.model.mlp_only_layers)
        else:
            plain = {name: value for name, value in plain.items() if name not in _OF_MOE}
        return {
            **plain,
            **self._quantization_config(),
            **({"rope_scaling": yarn_to_dict(yarn)} if yarn is not None else {}),
            "architectures": [architecture],
            "model_type": SUPPORTED_ARCHITECTURES[architecture],
            "hidden_act": "silu",
            "dtype": dtype,
            "torch_dtype": dtype,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }

    def _quantization_config(self) -> dict[str, Any]:
        if self.quantization is None:
            return {}
        kept = {"modules_to_not_convert": list(self.modules_to_not_convert)} if self.modules_to_not_convert else {}
        calibrated = {"calibration_tokens": self.calibration_tokens} if self.calibration_tokens else {}
        return {"quantization_config": {**OWN_QUANTIZATION, "format": self.quantization, **kept, **calibrated}}


def as_id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    """Return an id field of a config (one id, a list of ids, or absent) as a tuple.

    Raises: ValueError for anything else.
    """
    if value is None:
        return ()
    ids = (value,) if isinstance(value, int) else value
    if not isinstance(ids, list | tuple) or not all(type(i) is int and -(2**31) <= i < 2**31 for i in ids):
        raise ValueError(f"token ids must be a number or a list of numbers, got {value!r:.200}")
    return tuple(i for i in ids if i >= 0)  # negative ones, which some trainers write for "none", are no token's


def _read_model(raw: dict[str, Any], where: str) -> ModelConfig:
    # A field that is null counts as absent.
    given = {name: value for name, value in raw.items() if value is not None}
    is_moe = _architectures(raw) == ["Qwen3MoeForCausalLM"]
    if "num_local_experts" in given:  # as transformers 5 writes it
        given["num_experts"] = given["num_local_experts"]
    needed = [f.name for f in fields(ModelConfig) if f.name in _REQUIRED or (is_moe and f.name in _REQUIRED_OF_MOE)]
    missing = [name for name in needed if name not in given]
    if missing:
        every = "every Qwen3 config with experts" if is_moe else "every Qwen3 config"
        raise ValueError(f"{where}: missing {', '.join(missing)}; {every} has these fields")
    if is_moe and given["num_experts"] == 0:
        raise ValueError(f"{where}: num_experts must be a positive integer, got 0")
    of_moe = ("norm_topk_prob", "decoder_sparse_step") if is_moe else ()
    dtype_name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise ValueError(f"{where}: dtype {dtype_name!r} is not supported; supported: {', '.join(DTYPES)}")
    try:
        return ModelConfig(
            **{name: given[name] for name in needed},
            **{name: given[name] for name in of_moe if name in given},
            mlp_only_layers=as_id_tuple(given.get("mlp_only_layers")) if is_moe else (),
            num_key_value_heads=given.get("num_key_value_heads", raw["num_attention_heads"]),
            # 128 is Qwen3's default when the field is absent; only with experts transformers divides.
            head_dim=given.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"] if is_moe else 128),
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope_theta=read_rope_theta(given),
            max_position_embeddings=given.get("max_position_embeddings", 40_960),
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            attention_bias=given.get("attention_bias", False),
            dtype=DTYPES[dtype_name],
            eos_token_ids=as_id_tuple(raw.get("eos_token_id")),
            yarn=read_yarn(given),
        )
    except (ValueError, TypeError, ArithmeticError) as err:
        raise ValueError(f"{where}: {err}") from err


def _architectures(raw: dict[str, Any]) -> list[Any]:
    """Return the names in the file, or the name that belongs to its model_type."""
    by_type = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    named, kind = raw.get("architectures"), raw.get("model_type")
    if named:
        return named if isinstance(named, list) else [named]
    return [by_type.get(kind, kind) if isinstance(kind, str) else kind]


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    for name in _architectures(raw):
        if not isinstance(name, str) or name not in SUPPORTED_ARCHITECTURES:
            reason = why_not(name, raw.get("model_type"))
            listed = ", ".join((*SUPPORTED_ARCHITECTURES, *WITH_TEXT_PART))
            raise ValueError(f"{where}: architecture {name!r} is not supported{reason}; supported: {listed}")
    if (activation := raw.get("hidden_act")) not in (None, "silu", "swish"):
        raise ValueError(f"{where}: hidden_act={activation!r} is not supported; only 'silu' is")
    if (sliding := _sliding_field(raw)) is not None:
        raise ValueError(f"{where}: {sliding}={raw[sliding]!r} is not supported; only 'full_attention' is")
    refuse_rope(raw, where)


def _sliding_field(raw: dict[str, Any]) -> str | None:
    """Return the field that gives a layer sliding attention; None if there is no such layer.

    Source: transformers' Qwen3Config: layers from `max_window_layers` on slide if a window is set and used.
    """
    kinds = raw.get("layer_types")
    if kinds:
        is_full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
        return None if is_full else "layer_types"
    first, layers = raw.get("max_window_layers", 28), raw.get("num_hidden_layers")
    has_window = bool(raw.get("use_sliding_window")) and raw.get("sliding_window", 4096) is not None
    is_beyond = isinstance(first, int) and isinstance(layers, int) and first >= layers
    return "use_sliding_window" if has_window and not is_beyond else None


def _read_quantization(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of CheckpointConfig that `quantization_config` sets.

    Raises: ValueError for unsupported values.
    """
    given = raw.get("quantization_config")
    if given is None or given == {}:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: quantization_config must be an object, got {given!r}")
    if given.get("quant_method") != OWN_QUANTIZATION["quant_method"]:
        return {"prequantized": PrequantizedFormat.from_dict(given, where)}
    kept, format = given.get("modules_to_not_convert", []), given.get("format")
    is_known = all(given.get(name) == value for name, value in OWN_QUANTIZATION.items())
    has_names = isinstance(kept, list) and all(isinstance(name, str) for name in kept)
    if not is_known or not has_names or not isinstance(format, str):
        raise ValueError(f"{where}: quantization_config={given!r:.300} is not supported by this version of qwen3fast")
    if format not in SAVED_FORMATS:
        raise ValueError(f"{where}: format {format!r:.50} is not supported; supported: {', '.join(SAVED_FORMATS)}")
    tokens = given.get("calibration_tokens", 0)
    return {
        "quantization": format,
        "modules_to_not_convert": tuple(kept),
        "calibration_tokens": tokens if isinstance(tokens, int) else 0,
    }
