"""LoRA adapters in PEFT's layout -> added to a model's weights once, so that running costs nothing more.

adapter_config.json says which layers were trained and how they are scaled; adapter_model.safetensors holds two thin
matrices a layer. What we do not compute as PEFT does is refused by name.
Source: LoRA, arXiv:2106.09685, equation 3; rank-stabilised scale (rsLoRA), arXiv:2312.03732; PEFT's LoraConfig.

N out_features   K in_features   R rank
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor, nn

from qwen3fast._json import read_json
from qwen3fast.checkpoint.checks import dtype_problem, non_finite
from qwen3fast.checkpoint.weights import assign, open_tensors, refuse
from qwen3fast.model import Qwen3, RMSNorm
from qwen3fast.quantization import formats_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrappers around the model
OUTPUT_COPY = f"{PREFIX}lm_head.base_layer.weight"  # PEFT writes the weight itself beside an adapter of this layer
NO_PLACE = "unexpected, this model has no place for it"
# Some versions of PEFT and some trainers write the adapter's name, "default" as a rule, into the tensors' names.
TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.[^.]+)?(?(2)|\.weight)")
SAVED_NAME = re.compile(r"base_model\.model\.(.+?)(\.modules_to_save(\.[^.]+)?)?\.weight")
HUB_FILES = ["adapter_config.json", "adapter_model.safetensors"]

# Fields of adapter_config.json that change what is computed, or which weights it is meant for.
REFUSED = (
    "use_dora fan_in_fan_out lora_bias target_parameters layer_replication trainable_token_indices "
    "alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config"
).split()
# Ways to begin training that leave the base model's weights as they are; PiSSA and its like change them.
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


MAX_ALPHA, MAX_RANK = 1e6, 2**16  # far beyond any adapter
PATTERN_SECONDS = 5
NOT_MLX = "whose format is not read; convert it to PEFT's (mlx_lm.fuse gives a merged model)"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Shape = tuple[int, ...]
Layers = dict[str, nn.Linear | nn.Embedding]
Matches = dict[str, set[str]]  # a regular expression -> the names of modules that it means


class Adapter(NamedTuple):
    """One layer's adapter: the names of its tensors in the file, and what their product is multiplied by.

    whole: the name of a tensor that takes the weight's place (`modules_to_save`); a and b are empty then.
    """

    module: str
    a: str
    b: str
    scale: float
    whole: str = ""


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
    modules_to_save: list[str] = field(default_factory=list)
    matches: Matches = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> LoraConfig:
        """Read `folder/adapter_config.json`.

        Raises: FileNotFoundError if it is not there; ValueError if it is not one of LoRA, or has unsupported features.
        """
        file = folder / CONFIG_FILE
        if not file.is_file() and (folder / "adapters.safetensors").is_file():
            raise FileNotFoundError(f"{file} not found; {folder} seems to hold an adapter of mlx-lm, {NOT_MLX}")
        raw = read_json(file)
        if "lora_parameters" in raw or "fine_tune_type" in raw:
            raise ValueError(f"{file} is of an adapter of mlx-lm, {NOT_MLX}")
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
            modules_to_save=raw.get("modules_to_save") or [],
        )

    def for_modules(self, modules: Iterable[str]) -> LoraConfig:
        """Return the same with all of its regular expressions matched against these names of modules.

        Raises: ValueError for an expression that takes too long.
        """
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str) and p != "all-linear"]
        ends = [rf"(.*\.)?({key})$" for key in (*self.rank_pattern, *self.alpha_pattern)]
        return replace(self, matches=match_patterns([*whole, *ends], list(modules)))

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self._of_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B @ A is multiplied by."""
        rank = self.rank(module)
        return self._of_pattern(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether the module is to have an adapter."""
        if not self._names(self.target_modules, module) or self._names(self.exclude_modules, module):
            return False
        number = re.search(r"\.layers\.(\d+)\.", f".{module}")
        chosen = self.layers_to_transform
        return chosen is None or (number is not None and int(number[1]) in chosen)

    def saves(self, module: str) -> bool:
        """Return whether the module's whole weight was trained, and stands in the file."""
        return any(module == name or module.endswith(f".{name}") for name in self.modules_to_save)

    def _names(self, chosen: list[str] | str | None, module: str) -> bool:
        """Return whether a list of (ends of) names, or a regular expression, means the module."""
        if chosen == "all-linear":
            return module not in ("lm_head", "model.embed_tokens", "embed_tokens")
        if isinstance(chosen, str):
            return module in self.matches[chosen]
        return any(module == name or module.endswith(f".{name}") for name in chosen or ())

    def _of_pattern(self, pattern: dict[str, Any], module: str, default: Any) -> Any:
        """Return the value of the first key, a regular expression for the end of a name, that means the module."""
        found = (value for key, value in pattern.items() if module in self.matches[rf"(.*\.)?({key})$"])
        return next(found, default)


def match_patterns(patterns: list[str], names: list[str]) -> Matches:
    """Return which names each regular expression matches as a whole.

    An expression of a stranger's can take longer than anybody waits, and Python's engine cannot be stopped: they are
    matched in a process of their own, for PATTERN_SECONDS at most.
    Raises: ValueError naming the expressions if they take longer.
    """
    if not patterns:
        return {}
    program = (
        "import json, re, sys; patterns, names = json.load(sys.stdin); "
        "json.dump([[n for n in names if re.fullmatch(p, n)] for p in patterns], sys.stdout)"
    )
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        listed = ", ".join(f"{pattern!r:.100}" for pattern in patterns)
        limit = f"matching takes more than {PATTERN_SECONDS} s"
        raise ValueError(f"{limit}: {listed}; name the modules in a list") from None
    return {pattern: set(found) for pattern, found in zip(patterns, json.loads(result.stdout), strict=True)}


def merge_lora(model: Qwen3, folder: str | Path, check_weights: bool = False) -> None:
    """Add a PEFT adapter's scale * B @ A to the weights of `model`, computed in float32 and rounded once.

    Changed weights are new tensors: those that are memory-mapped stay as they are on disk. Nothing changes on an error.
    check_weights: refuse NaN and infinity in the adapter.
    Raises: FileNotFoundError for missing files; ValueError for a quantised model, what is not supported, and tensors
    that are missing, unexpected, misshaped or of a wrong dtype, all named in one message.
    """
    folder = resolve_adapter(folder)
    if formats := formats_of(model):
        raise ValueError(f"an adapter needs the original weights; these are in {', '.join(formats)} already")
    config = LoraConfig.from_folder(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS_FILE} not found; save the adapter with safe_serialization=True")
    layers: Layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, RMSNorm)}
    if model.config.tie_word_embeddings:  # an adapter of one of them must not change the other
        del layers["lm_head"], layers["model.embed_tokens"]
    with open_tensors(folder / WEIGHTS_FILE) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        if OUTPUT_COPY in shapes and _are_same(tensors.get_tensor(OUTPUT_COPY), layers.get("lm_head")):
            del shapes[OUTPUT_COPY]
        adapters = _match(config, layers, norms, shapes)
        problems = [
            f"{name}: {wrong}"
            for name in shapes
            if (wrong := dtype_problem(tensors.get_slice(name).get_dtype(), None)) is not None
            or (check_weights and (wrong := non_finite(tensors.get_tensor(name))) is not None)
        ]
        refuse(problems, f"the numbers in {folder / WEIGHTS_FILE} cannot be used")
        for adapter in adapters:
            layer = layers.get(adapter.module) or norms[adapter.module]
            weight = layer.weight
            if adapter.whole:
                whole = tensors.get_tensor(adapter.whole).to(weight.device, weight.dtype)
                assign(model, f"{adapter.module}.weight", whole)
                continue
            a_RK, b_NR = (tensors.get_tensor(n).to(weight.device, torch.float32) for n in (adapter.a, adapter.b))
            if isinstance(layer, nn.Embedding):  # a row per token: the product is the other way round
                a_RK, b_NR = b_NR.T, a_RK.T
            assign(model, f"{adapter.module}.weight", merged(weight, a_RK, b_NR, adapter.scale))
    model.tie_weights()


def merged(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scale: float) -> Tensor:
    """weight + scale * B @ A as a new tensor of the weight's dtype; A and B are in float32."""
    return torch.addmm(weight_NK.detach().float(), b_NR, a_RK, alpha=scale).to(weight_NK.dtype)


def resolve_adapter(source: str | Path) -> Path:
    """Return the local folder of an adapter: an existing folder, or a hub id that is downloaded (or found cached).

    Raises: FileNotFoundError if there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(str(source)):
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as err:
        raise FileNotFoundError(
            f"adapter {str(source)!r} is neither a local folder nor on the hub ({type(err).__name__}: {err})"
        ) from err


def _match(config: LoraConfig, layers: Layers, norms: dict[str, RMSNorm], shapes: dict[str, Shape]) -> list[Adapter]:
    """Return which tensors of the file belong to which layer.

    Raises: ValueError naming all tensors that are missing, unexpected or misshaped.
    """
    matches = {name: TENSOR_NAME.fullmatch(name) for name in shapes}
    # Adapters of a Qwen3Model (for embeddings) leave "model." out, in the file and for the patterns of the config.
    is_bare = any(match and match[1].startswith("layers.") for match in matches.values())
    bare = {module.removeprefix("model.") if is_bare else module: module for module in (*layers, *norms)}
    modules = {own: module for own, module in bare.items() if module in layers}
    config = config.for_modules(modules)
    found: dict[str, dict[str, str]] = {}
    whole: list[Adapter] = []
    problems: list[str] = []
    for name, shape in shapes.items():
        match, saved = matches[name], SAVED_NAME.fullmatch(name)
        if match is None and saved is not None and config.saves(saved[1]) and saved[1] in bare:
            module = bare[saved[1]]
            expected = tuple((layers.get(module) or norms[module]).weight.shape)
            if shape != expected:
                problems.append(f"{name}: shape {shape}, expected {expected}")
            whole.append(Adapter(module, "", "", 1.0, name))
            continue
        if match is None or match[1] not in modules:
            is_copy = name == OUTPUT_COPY and "lm_head" in layers
            reason = "differs from the model's; the adapter is for another one" if is_copy else NO_PLACE
            problems.append(f"{name}: {reason}")
            continue
        own, side = match[1], match[3]
        layer, rank = layers[modules[own]], config.rank(own)
        rows, columns = layer.weight.shape
        if isinstance(layer, nn.Embedding) != bool(match[2]):
            problems.append(f"{name}: {NO_PLACE}")
            continue
        if isinstance(layer, nn.Embedding):
            expected = (rank, rows) if side == "A" else (columns, rank)
        else:
            expected = (rank, columns) if side == "A" else (rows, rank)
        if shape != expected:
            problems.append(f"{name}: shape {shape}, expected {expected}")
        found.setdefault(own, {})[side] = name
    for own in modules:
        if own in found or config.targets(own):
            missing = [side for side in "AB" if side not in found.get(own, {})]
            problems += [f"{PREFIX}{own}.lora_{side}.weight: missing" for side in missing]
    saved_modules = {adapter.module for adapter in whole}
    for own, module in bare.items():
        if config.saves(own) and module not in saved_modules:
            problems.append(f"{PREFIX}{own}.weight: missing, modules_to_save names it")
    if not found and not whole and not problems:
        problems.append("it holds no tensors")
    refuse(problems, "the adapter's tensors do not fit the model and adapter_config.json")
    return [*whole, *(Adapter(modules[own], sides["A"], sides["B"], config.scale(own)) for own, sides in found.items())]


def _are_same(tensor: Tensor, layer: nn.Module | None) -> bool:
    if layer is None or not isinstance(weight := layer.weight, Tensor):
        return False
    return torch.equal(tensor.to(weight.device, weight.dtype), weight)


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
        "modules_to_save": (list, type(None)),
    }
    for name, kind in kinds.items():
        if not isinstance(raw.get(name), kind) or isinstance(raw.get(name), bool):
            raise ValueError(f"{file}: {name}={raw.get(name)!r} is not what a LoRA adapter has there")
    patterns = [*(raw.get("rank_pattern") or {}), *(raw.get("alpha_pattern") or {})]
    patterns += [raw[name] for name in ("target_modules", "exclude_modules") if isinstance(raw.get(name), str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as err:
            raise ValueError(f"{file}: {pattern!r} is not a regular expression: {err}") from err
    alphas = [raw["lora_alpha"], *(raw.get("alpha_pattern") or {}).values()]
    if not all(type(alpha) in (int, float) and abs(alpha) <= MAX_ALPHA for alpha in alphas):  # NaN is not
        raise ValueError(
            f"{file}: lora_alpha, alpha_pattern must be numbers up to {MAX_ALPHA:.0e}, got {alphas!r:.200}"
        )
    ranks = [raw["r"], *(raw.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= MAX_RANK for rank in ranks):
        raise ValueError(f"{file}: ranks must be whole numbers from 1 to {MAX_RANK}, got {ranks!r:.200}")
    lists = [raw.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save")]
    names = [name for value in lists if isinstance(value, list) for name in value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: lists of modules must hold names, got {names!r:.200}")
    numbers = raw.get("layers_to_transform")
    if isinstance(numbers, list) and any(isinstance(i, bool) or not isinstance(i, int) for i in numbers):
        raise ValueError(f"{file}: layers_to_transform={numbers!r:.200} must hold numbers of layers")
