"""ModelConfig: the shape of a Qwen3 model, read from a checkpoint's `config.json`.

Field names are Hugging Face's. What we cannot compute is refused here, by name, before any weight is read.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qwen3fast.model.published import PublishedFormat
from qwen3fast.model.yarn import WITHOUT_EFFECT, Yarn

# And the model_type of each. Qwen3Model: without an output projection.
SUPPORTED_ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe", "Qwen3Model": "qwen3"}
OWN_QUANTIZATION = {"quant_method": "qwen3fast", "version": 1}  # a version for each change of the packed layout
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a Qwen3, dense or (num_experts > 0) with a mixture of experts.

    `head_dim` is a field of its own: in Qwen3-0.6B it is 128 although hidden_size / num_attention_heads is 64.
    `dtype` is the dtype that the checkpoint was saved in; `quantization` names the format of the linear layers and the
    embedding in a checkpoint that `Generator.save_quantized` wrote, but for `modules_to_not_convert`, which are in
    `dtype`; `published` is how others stored a quantised checkpoint. `eos_token_ids` are the ids named by config.json
    only; the Generator adds those of generation_config.json. `yarn` is the scaling of RoPE, if there is one.

    Of the layers that are not in `mlp_only_layers`, every `decoder_sparse_step`-th has experts (`is_sparse`), of which
    a token runs `num_experts_per_tok`; `norm_topk_prob`: what these count sums to 1.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40_960
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    eos_token_ids: tuple[int, ...] = ()
    quantization: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()
    published: PublishedFormat | None = None
    yarn: Yarn | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shapes that no Qwen3 can have.

        Raises: ValueError naming the field, its value and what was expected.
        """
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings"
        )
        if self.num_experts != 0:
            sizes += " num_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step"
        for name in sizes.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            most = _LARGEST.get(name, 10**9)
            if value > most:
                raise ValueError(f"{name} must be at most {most:,}, far beyond any Qwen3, got {value}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts ({self.num_experts})"
            )
        for name in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if self.yarn is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 with YaRN, got {self.rope_theta!r}")

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the fields of a Hugging Face `config.json` given as a dictionary.

        Raises: ValueError for an architecture, feature or value that is not supported, or a missing field.
        """
        _refuse_unsupported(raw, where)
        quantization = _quantization(raw, where)
        # A field that is null counts as absent.
        given = {name: value for name, value in raw.items() if value is not None}
        is_moe = _architectures(raw) == ["Qwen3MoeForCausalLM"]
        if "num_local_experts" in given:  # as transformers 5 writes it
            given["num_experts"] = given["num_local_experts"]
        needed = [f.name for f in fields(cls) if f.name in _REQUIRED or (is_moe and f.name in _REQUIRED_OF_MOE)]
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
            return cls(
                **{name: given[name] for name in needed},
                **{name: given[name] for name in of_moe if name in given},
                mlp_only_layers=as_id_tuple(given.get("mlp_only_layers")) if is_moe else (),
                num_key_value_heads=given.get("num_key_value_heads", raw["num_attention_heads"]),
                # 128 is Qwen3's default when the field is absent; only with experts transformers divides.
                head_dim=given.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"] if is_moe else 128),
                rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
                rope_theta=_rope_theta(given),
                max_position_embeddings=given.get("max_position_embeddings", 40_960),
                tie_word_embeddings=given.get("tie_word_embeddings", False),
                attention_bias=given.get("attention_bias", False),
                dtype=DTYPES[dtype_name],
                eos_token_ids=as_id_tuple(raw.get("eos_token_id")),
                **quantization,
                yarn=_yarn(given),
            )
        except (ValueError, TypeError, ArithmeticError) as err:
            raise ValueError(f"{where}: {err}") from err

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json`.

        Raises: FileNotFoundError if it is not there; ValueError if it is not JSON or not supported.
        """
        return cls.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """The shape of a published Qwen3: "0.6b", "1.7b", "4b", "8b", "14b", "32b", or with a mixture of experts
        "30b-a3b" or "235b-a22b" (case does not matter).

        Raises: ValueError for any other name.
        """
        shape = _NAMED_SHAPES.get(name.lower())
        if shape is None:
            raise ValueError(f"unknown Qwen3 shape {name!r}; known shapes: {', '.join(_NAMED_SHAPES)}")
        layers, heads, kv_heads, hidden, intermediate, tied, *experts = shape
        num_experts, per_token, moe_intermediate = experts or (0, 0, 0)
        return cls(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=128,
            tie_word_embeddings=tied,
            eos_token_ids=(151_645,),
            num_experts=num_experts,
            num_experts_per_tok=per_token,
            moe_intermediate_size=moe_intermediate,
            norm_topk_prob=num_experts > 0,
        )

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward part of this layer, counted from 0, is a mixture of experts."""
        is_chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and is_chosen

    @property
    def longest_context(self) -> int:
        """Positions that the model can tell apart: max_position_embeddings, or more with YaRN."""
        return max(self.max_position_embeddings, self.yarn.longest_context if self.yarn is not None else 0)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied output projection counts once."""
        outer = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return outer + sum(self._layer_size(layer, self.num_experts) for layer in range(self.num_hidden_layers))

    @property
    def decode_parameters(self) -> int:
        """Parameters that one decode step of one row reads: all, but of an untied embedding only the looked-up row
        (left out), and of experts only those that the token runs."""
        outer = self.vocab_size * self.hidden_size + self.hidden_size
        return outer + sum(self._layer_size(layer, self.num_experts_per_tok) for layer in range(self.num_hidden_layers))

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one position takes in a KV cache of `dtype`, all layers, keys and values.

        int8 vectors have a factor of 4 bytes each.
        """
        bytes_per_vector = self.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * self.num_hidden_layers * self.num_key_value_heads * bytes_per_vector

    def to_dict(self) -> dict[str, Any]:
        """The same config as a Hugging Face `config.json` dictionary."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        eos, yarn = plain.pop("eos_token_ids"), plain.pop("yarn")
        quantization = [plain.pop(name) for name in ("quantization", "modules_to_not_convert", "published")]
        architecture = "Qwen3MoeForCausalLM" if self.num_experts else "Qwen3ForCausalLM"
        if self.num_experts:
            plain["mlp_only_layers"] = list(self.mlp_only_layers)
        else:
            plain = {name: value for name, value in plain.items() if name not in _OF_MOE}
        return {
            **plain,
            **_quantization_config(*quantization),
            **({"rope_scaling": yarn.to_dict()} if yarn is not None else {}),
            "architectures": [architecture],
            "model_type": SUPPORTED_ARCHITECTURES[architecture],
            "hidden_act": "silu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }

    def _layer_size(self, layer: int, experts: int) -> int:
        """Parameters of a layer, of so many experts where it has any."""
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = (q_size + 2 * kv_size + self.hidden_size) if self.attention_bias else 0
        attention = self.hidden_size * (2 * q_size + 2 * kv_size) + 2 * self.head_dim + bias
        rows = self.intermediate_size
        router = 0
        if self.is_sparse(layer):
            rows, router = experts * self.moe_intermediate_size, self.num_experts * self.hidden_size
        return attention + router + 3 * self.hidden_size * rows + 2 * self.hidden_size


# A module is made for each of these, before any weight is read.
_LARGEST = {"num_hidden_layers": 10_000, "num_experts": 100_000}
_REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
_REQUIRED_OF_MOE = {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
_OF_MOE = _REQUIRED_OF_MOE | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}

# layers, heads, kv heads, hidden_size, intermediate_size, tied; num_experts, num_experts_per_tok,
# moe_intermediate_size. Source: the published config.json files.
_NAMED_SHAPES: dict[str, tuple[Any, ...]] = {
    "0.6b": (28, 16, 8, 1024, 3072, True),
    "1.7b": (28, 16, 8, 2048, 6144, True),
    "4b": (36, 32, 8, 2560, 9728, True),
    "8b": (36, 32, 8, 4096, 12288, False),
    "14b": (40, 40, 8, 5120, 17408, False),
    "32b": (64, 64, 8, 5120, 25600, False),
    "30b-a3b": (48, 32, 4, 2048, 6144, False, 128, 8, 768),
    "235b-a22b": (94, 64, 4, 4096, 12288, False, 128, 8, 1536),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: FileNotFoundError if the file is missing; ValueError naming the file if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; expected a folder in Hugging Face layout")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:  # not UTF-8, not JSON, a number or nesting too long for Python
        raise ValueError(f"{path} is not valid JSON: {err}; if it was downloaded, download it again") from err
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def as_id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    """An id field of a config (one id, a list of ids, or absent) as a tuple.

    Raises: ValueError for anything else.
    """
    if value is None:
        return ()
    ids = (value,) if isinstance(value, int) else value
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"token ids must be a number or a list of numbers, got {value!r}")
    return tuple(ids)


def _architectures(raw: dict[str, Any]) -> list[Any]:
    """What the file names, or what its model_type stands for."""
    by_type = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    named, kind = raw.get("architectures"), raw.get("model_type")
    if named:
        return named if isinstance(named, list) else [named]
    return [by_type.get(kind, kind) if isinstance(kind, str) else kind]


def _refuse_unsupported(raw: dict[str, Any], where: str) -> None:
    for name in _architectures(raw):
        if not isinstance(name, str) or name not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"{where}: architecture {name!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
    sliding = _sliding_field(raw)
    unsupported = {
        "hidden_act": (raw.get("hidden_act") not in (None, "silu", "swish"), "only 'silu' is"),
        "layer_types": (sliding == "layer_types", "only 'full_attention' is"),
        "use_sliding_window": (sliding == "use_sliding_window", "only full attention is"),
    }
    for name, (is_set, supported) in unsupported.items():
        if is_set:
            raise ValueError(f"{where}: {name}={raw.get(name)!r} is not supported; {supported}")
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"{where}: {name} must be an object, got {raw[name]!r}")
    kind = _rope_kind(raw)
    if kind not in ("default", "yarn"):
        raise ValueError(f"{where}: RoPE scaling {kind!r} is not supported; 'yarn' and 'default' (no scaling) are")
    unread = {name: value for name, value in _rope_fields(raw).items() if name not in WITHOUT_EFFECT}
    if kind == "default" and any(value not in (None, 1) for value in unread.values()):
        warnings.warn(f"{where}: RoPE is not scaled (rope_type 'default'); without effect: {unread}", stacklevel=2)
    rotated = _rope_fields(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor={rotated!r} is not supported; only 1 is")


def _sliding_field(raw: dict[str, Any]) -> str | None:
    """Return the field that gives a layer another attention than a full one; None if there is no such layer.

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


def _quantization(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of ModelConfig that `quantization_config` gives.

    Raises: ValueError for what is not supported.
    """
    given = raw.get("quantization_config")
    if given is None or given == {}:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: quantization_config must be an object, got {given!r}")
    if given.get("quant_method") != OWN_QUANTIZATION["quant_method"]:
        published = PublishedFormat.from_dict(given, where)
        if published.method != "fp8" and _architectures(raw) == ["Qwen3MoeForCausalLM"]:
            raise ValueError(
                f"{where}: quant_method={published.method!r} is not supported for a mixture of experts; supported: "
                "'fp8', and unquantised checkpoints"
            )
        return {"published": published}
    kept = given.get("modules_to_not_convert", [])
    is_known = all(given.get(name) == value for name, value in OWN_QUANTIZATION.items())
    if not is_known or not isinstance(given.get("format"), str) or not isinstance(kept, list):
        raise ValueError(f"{where}: quantization_config={given!r} is not supported by this version of qwen3fast")
    return {"quantization": given["format"], "modules_to_not_convert": tuple(kept)}


def _quantization_config(quantization: str | None, kept: tuple[str, ...], published: Any) -> dict[str, Any]:
    """What `_quantization` reads."""
    if published is not None:
        return {"quantization_config": published.to_dict()}
    if quantization is None:
        return {}
    beside = {"modules_to_not_convert": list(kept)} if kept else {}
    return {"quantization_config": {**OWN_QUANTIZATION, "format": quantization, **beside}}


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings: older files have rope_theta and rope_scaling, newer ones rope_parameters holding both."""
    return {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}


def _rope_kind(raw: dict[str, Any]) -> Any:
    rope = _rope_fields(raw)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return "default" if kind in ("linear", "dynamic") and rope.get("factor") == 1 else kind  # nothing is scaled


def _yarn(raw: dict[str, Any]) -> Yarn | None:
    if _rope_kind(raw) != "yarn":
        return None
    original = raw.get("original_max_position_embeddings")
    beside = {} if original is None else {"original_max_position_embeddings": original}
    return Yarn.from_dict({**_rope_fields(raw), **beside}, raw.get("max_position_embeddings", 40_960))


def _rope_theta(raw: dict[str, Any]) -> float:
    return float(_rope_fields(raw).get("rope_theta", raw.get("rope_theta", 1_000_000.0)))
