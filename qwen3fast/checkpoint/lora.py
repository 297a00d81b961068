"""LoRA adapters in PEFT's layout -> added to a model's weights once, so that running costs nothing more.

adapter_config.json says which layers were trained and how they are scaled; adapter_model.safetensors holds two thin
matrices a layer. What we do not compute as PEFT does is refused by name.
Source: LoRA, arXiv:2106.09685, equation 3; rank-stabilised scale (rsLoRA), arXiv:2312.03732; PEFT's LoraConfig.

N out_features   K in_features   R rank
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen3fast._json import read_json
from qwen3fast.checkpoint.checks import dtype_problem, non_finite
from qwen3fast.checkpoint.weights import assign, open_tensors, refuse
from qwen3fast.model import Qwen3
from qwen3fast.quantization import formats_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrappers around the model
OUTPUT_COPY = f"{PREFIX}lm_head.base_layer.weight"  # PEFT writes the weight itself beside an adapter of this layer
NO_PLACE = "unexpected, this model has no place for it"
TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Fields of adapter_config.json that change what is computed, or which weights it is meant for.
REFUSED = (
    "use_dora modules_to_save fan_in_fan_out lora_bias target_parameters layer_replication trainable_token_indices "
    "alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config"
).split()
# Ways to begin training that leave the base model's weights as they are; PiSSA and its like change them.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


Shape = tuple[int, ...]


class Adapter(NamedTuple):
    """One layer's: the names of its tensors in the file, and what their product is multiplied by."""

    module: str
    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json says, by PEFT's names. `from_folder` refuses what is not supported."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> LoraConfig:
        """Read `folder/adapter_config.json`.

        Raises: FileNotFoundError if it is not there; ValueError if it is not one of LoRA, or has unsupported features.
        """
        file = folder / CONFIG_FILE
        raw = read_json(file)
        _refuse_unsupported(raw, file)
        layers = raw.get("layers_to_transform")
        return cls(
            r=raw["r"],
            lora_alpha=raw["lora_alpha"],
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            target_modules=raw.get("target_modules"),
            exclude_modules=raw.get("exclude_modules"),
            layers_to_transform=[layers] if isinstance(layers, int) else layers,
        )

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return _of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B @ A is multiplied by."""
        rank = self.rank(module)
        return _of_pattern(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether the module is to have an adapter."""
        if not _names(self.target_modules, module) or _names(self.exclude_modules, module):
            return False
        number = re.search(r"\.layers\.(\d+)\.", f".{module}")
        chosen = self.layers_to_transform
        return chosen is None or (number is not None and int(number[1]) in chosen)


def merge_lora(model: Qwen3, folder: str | Path, check_weights: bool = False) -> None:
    """Add a PEFT adapter's scale * B @ A to the weights of `model`, computed in float32 and rounded once.

    Changed weights are new tensors: those that are memory-mapped stay as they are on disk. Nothing changes on an error.
    check_weights: refuse NaN and infinity in the adapter.
    Raises: FileNotFoundError for missing files; ValueError for a quantised model, what is not supported, and tensors
    that are missing, unexpected, misshaped or of a wrong dtype, all named in one message.
    """
    folder = Path(folder).expanduser()
    if formats := formats_of(model):
        raise ValueError(f"an adapter needs the original weights; these are in {', '.join(formats)} already")
    config = LoraConfig.from_folder(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS_FILE} not found; save the adapter with safe_serialization=True")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if model.config.tie_word_embeddings:
        layers.pop("lm_head")  # its weight is the embedding's, too, which an adapter must not change
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if OUTPUT_COPY in shapes and _are_same(tensors.get_tensor(OUTPUT_COPY), layers.get("lm_head")):
            del shapes[OUTPUT_COPY]
        adapters = _match(config, layers, shapes)
        problems = [
            f"{name}: {wrong}"
            for name in shapes
            if (wrong := dtype_problem(tensors.get_slice(name).get_dtype(), None)) is not None
            or (check_weights and (wrong := non_finite(tensors.get_tensor(name))) is not None)
        ]
        refuse(problems, f"the numbers in {folder / WEIGHTS_FILE} cannot be used")
        for adapter in adapters:
            weight = layers[adapter.module].weight
            a_RK, b_NR = (tensors.get_tensor(n).to(weight.device, torch.float32) for n in (adapter.a, adapter.b))
            assign(model, f"{adapter.module}.weight", merged(weight, a_RK, b_NR, adapter.scale))


def merged(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scale: float) -> Tensor:
    """weight + scale * B @ A as a new tensor of the weight's dtype; A and B are in float32."""
    return torch.addmm(weight_NK.detach().float(), b_NR, a_RK, alpha=scale).to(weight_NK.dtype)


def _match(config: LoraConfig, layers: dict[str, nn.Linear], shapes: dict[str, Shape]) -> list[Adapter]:
    """Which tensors of the file belong to which layer.

    Raises: ValueError naming all tensors that are missing, unexpected or misshaped.
    """
    matches = {name: TENSOR_NAME.fullmatch(name) for name in shapes}
    # Adapters of a Qwen3Model (for embeddings) leave "model." out, in the file and for the patterns of the config.
    is_bare = any(match and match[1].startswith("layers.") for match in matches.values())
    modules = {module.removeprefix("model.") if is_bare else module: module for module in layers}
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for name, shape in shapes.items():
        match = matches[name]
        if match is None or match[1] not in modules:
            is_copy = name == OUTPUT_COPY and "lm_head" in layers
            reason = "differs from the model's; the adapter is for another one" if is_copy else NO_PLACE
            problems.append(f"{name}: {reason}")
            continue
        own, side = match[1], match[2]
        out_features, in_features = layers[modules[own]].weight.shape
        expected = (config.rank(own), in_features) if side == "A" else (out_features, config.rank(own))
        if shape != expected:
            problems.append(f"{name}: shape {shape}, expected {expected}")
        found.setdefault(own, {})[side] = name
    for own in modules:
        if own in found or config.targets(own):
            missing = [side for side in "AB" if side not in found.get(own, {})]
            problems += [f"{PREFIX}{own}.lora_{side}.weight: missing" for side in missing]
    if not found and not problems:
        problems.append("it holds no tensors")
    refuse(problems, "the adapter's tensors do not fit the model and adapter_config.json")
    return [Adapter(modules[own], sides["A"], sides["B"], config.scale(own)) for own, sides in found.items()]


def _are_same(tensor: Tensor, layer: nn.Linear | None) -> bool:
    return layer is not None and torch.equal(tensor.to(layer.weight.device, layer.weight.dtype), layer.weight)


def _refuse_unsupported(raw: dict[str, Any], file: Path) -> None:
    if str(raw.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"{file}: peft_type={raw['peft_type']!r} is not supported; only 'LORA' is")
    for name in REFUSED:
        if raw.get(name):
            raise ValueError(f"{file}: {name}={raw[name]!r} is not supported")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={raw['bias']!r} is not supported; only 'none' is")
    if raw.get("init_lora_weights", True) not in INITIALISATIONS:
        raise ValueError(
            f"{file}: init_lora_weights={raw['init_lora_weights']!r} is not supported: such adapters may fit base "
            "weights that were changed before training; convert it to an ordinary LoRA with PEFT first"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "r": (int,),
        "lora_alpha": (int, float),
        "rank_pattern": (dict, type(None)),
        "alpha_pattern": (dict, type(None)),
        "target_modules": (list, str, type(None)),
        "exclude_modules": (list, str, type(None)),
        "layers_to_transform": (list, int, type(None)),
    }
    for name, kind in kinds.items():
        if not isinstance(raw.get(name), kind):
            raise ValueError(f"{file}: {name}={raw.get(name)!r} is not what a LoRA adapter has there")
    patterns = [*(raw.get("rank_pattern") or {}), *(raw.get("alpha_pattern") or {})]
    patterns += [raw[name] for name in ("target_modules", "exclude_modules") if isinstance(raw.get(name), str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as err:
            raise ValueError(f"{file}: {pattern!r} is not a regular expression: {err}") from err
    if not all(isinstance(alpha, int | float) for alpha in (raw.get("alpha_pattern") or {}).values()):
        raise ValueError(f"{file}: alpha_pattern={raw['alpha_pattern']!r} must hold numbers")
    ranks = [raw["r"], *(raw.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
        raise ValueError(f"{file}: ranks must be whole numbers from 1, got {ranks}")


def _names(chosen: list[str] | str | None, module: str) -> bool:
    """Whether a list of (ends of) names, or a regular expression, means the module."""
    if isinstance(chosen, str):
        return module != "lm_head" if chosen == "all-linear" else re.fullmatch(chosen, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in chosen or ())


def _of_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first key, a regular expression for the end of a name, that means the module."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
