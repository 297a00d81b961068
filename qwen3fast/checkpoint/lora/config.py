"""adapter_config.json of a LoRA adapter: which modules were trained, and how their products are scaled.

A feature that would change the result is refused by name.
Source: PEFT's LoraConfig; rank-stabilized scale (rsLoRA), arXiv:2312.03732.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qwen3fast.checkpoint.lora.patterns import Matches, match_patterns
from qwen3fast.files import read_json

CONFIG_FILE = "adapter_config.json"
MAX_ALPHA, MAX_RANK = 1e6, 2**16  # far beyond any adapter
# Fields that change the result, or the weights that the adapter belongs to.
REFUSED = (
    "use_dora fan_in_fan_out lora_bias target_parameters layer_replication trainable_token_indices "
    "alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config"
).split()
# Ways to begin training that leave the base model's weights as they are; PiSSA and its like change them.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
NOT_MLX = "whose format is not read; convert it to PEFT's (or merge it with mlx_lm.fuse)"
NONE = type(None)
KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "rank_pattern": (dict, NONE),
    "alpha_pattern": (dict, NONE),
    "target_modules": (list, str, NONE),
    "exclude_modules": (list, str, NONE),
    "layers_to_transform": (list, int, NONE),
    "modules_to_save": (list, NONE),
}


@dataclass(frozen=True)
class LoraConfig:
    """The fields of adapter_config.json that matter to merging, under PEFT's names.

    matches: the modules that each regular expression matches, see `for_modules`.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    modules_to_save: list[str] = field(default_factory=list)
    ensure_weight_tying: bool = False
    matches: Matches = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> LoraConfig:
        """Read `folder/adapter_config.json`.

        Raises: FileNotFoundError if it is not there; ValueError for other adapters than LoRA, for unsupported features
        and for bad values.
        """
        file = folder / CONFIG_FILE
        if not file.is_file() and (folder / "adapters.safetensors").is_file():
            raise FileNotFoundError(f"{file} not found; {folder} seems to hold an adapter of mlx-lm, {NOT_MLX}")
        raw = read_json(file)
        if "lora_parameters" in raw or "fine_tune_type" in raw:
            raise ValueError(f"{file} is of an adapter of mlx-lm, {NOT_MLX}")
        _refuse_features(raw, file)
        _refuse_values(raw, file)
        given = {name: raw[name] for name in _FIELDS if raw.get(name) is not None}
        if isinstance(layer := given.get("layers_to_transform"), int):
            given["layers_to_transform"] = [layer]
        return cls(**given)

    def for_modules(self, modules: Iterable[str]) -> LoraConfig:
        """Return the same config with its regular expressions matched against the names of modules.

        Raises: ValueError for an expression that takes too long.
        """
        whole = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str) and p != "all-linear"]
        ends = [_end(key) for key in (*self.rank_pattern, *self.alpha_pattern)]
        return replace(self, matches=match_patterns([*whole, *ends], list(modules)))

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        rank: int = self._of_pattern(self.rank_pattern, module, self.r)
        return rank

    def scale(self, module: str) -> float:
        """Return the scale of a module's product B @ A."""
        rank = self.rank(module)
        alpha: float = self._of_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Return whether the module must have an adapter."""
        if not self._names(self.target_modules, module) or self._names(self.exclude_modules, module):
            return False
        number = re.search(r"\.layers\.(\d+)\.", f".{module}")
        chosen = self.layers_to_transform
        is_chosen = chosen is None or (number is not None and int(number[1]) in chosen)
        return is_chosen and not self.saves(module)

    def saves(self, module: str) -> bool:
        """Return whether the module was trained as a whole, and its weight is in the file."""
        return any(module == name or module.endswith(f".{name}") for name in self.modules_to_save)

    def _names(self, chosen: list[str] | str | None, module: str) -> bool:
        """Return whether a list of (ends of) names, or a regular expression, means the module."""
        if chosen == "all-linear":
            return module != "lm_head" and not module.endswith("embed_tokens")
        if isinstance(chosen, str):
            return module in self.matches[chosen]
        return any(module == name or module.endswith(f".{name}") for name in chosen or ())

    def _of_pattern(self, pattern: dict[str, Any], module: str, default: Any) -> Any:
        """Return the value of the first key, a regular expression for the end of a name, that matches the module."""
        return next((value for key, value in pattern.items() if module in self.matches[_end(key)]), default)


_FIELDS = [f.name for f in fields(LoraConfig) if f.name != "matches"]  # in the file


def _end(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _refuse_features(raw: dict[str, Any], file: Path) -> None:
    if str(raw.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"{file}: peft_type={raw['peft_type']!r:.100} is not supported; only 'LORA' is")
    for name in REFUSED:
        if raw.get(name):
            raise ValueError(f"{file}: {name}={raw[name]!r:.100} is not supported")
    if raw.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias={raw['bias']!r:.100} is not supported; only 'none' is")
    if raw.get("init_lora_weights", True) not in INITIALIZATIONS:
        raise ValueError(
            f"{file}: init_lora_weights={raw['init_lora_weights']!r:.100} is not supported: such adapters may fit base "
            "weights that were changed before training; convert it to an ordinary LoRA with PEFT first"
        )


def _refuse_values(raw: dict[str, Any], file: Path) -> None:
    for name, kinds in KINDS.items():
        if not isinstance(raw.get(name), kinds) or isinstance(raw.get(name), bool):
            raise ValueError(f"{file}: {name}={raw.get(name)!r:.100} is not valid in a LoRA adapter")
    patterns = [*(raw.get("rank_pattern") or {}), *(raw.get("alpha_pattern") or {})]
    patterns += [raw[name] for name in ("target_modules", "exclude_modules") if isinstance(raw.get(name), str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as err:
            raise ValueError(f"{file}: {pattern!r:.100} is not a regular expression: {err}") from err
    alphas = [raw["lora_alpha"], *(raw.get("alpha_pattern") or {}).values()]
    if not all(type(alpha) in (int, float) and abs(alpha) <= MAX_ALPHA for alpha in alphas):  # false for NaN
        raise ValueError(
            f"{file}: lora_alpha, alpha_pattern must be numbers up to {MAX_ALPHA:.0e}, got {alphas!r:.200}"
        )
    ranks = [raw["r"], *(raw.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and 1 <= rank <= MAX_RANK for rank in ranks):
        raise ValueError(f"{file}: ranks must be whole numbers from 1 to {MAX_RANK}, got {ranks!r:.200}")
    lists = [raw.get(key) for key in ("target_modules", "exclude_modules", "modules_to_save")]
    names = [name for value in lists if isinstance(value, list) for name in value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: lists of modules must hold names, got {names!r:.200}")
    numbers = raw.get("layers_to_transform")
    if isinstance(numbers, list) and not all(type(i) is int for i in numbers):
        raise ValueError(f"{file}: layers_to_transform={numbers!r:.200} must hold numbers of layers")
