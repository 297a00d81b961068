"""The files that sentence-transformers adds to a checkpoint: how token states become a vector, and named prompts.

Source: the folders that sentence-transformers writes (modules.json, 1_Pooling/config.json,
config_sentence_transformers.json, sentence_bert_config.json).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from qwen3fast.files import read_json, read_optional_json

POOLINGS = ("lasttoken", "mean")
MODULES, PROMPTS, LENGTH = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
# Names of the fields that older versions have in place of `pooling_mode`.
_FIELDS = {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class SentenceSettings:
    """The steps from a text to its vector.

    pooling: "lasttoken", or "mean" over a text's tokens. normalize: vectors have length 1. prompts: texts to put before
    each text, by their names. default_prompt: the name of the prompt to use by default. max_length: tokens per text, if
    the folder states it.
    """

    pooling: str = "lasttoken"
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_length: int | None = None


def find_sentence_settings(folder: Path) -> SentenceSettings | None:
    """Return the settings of a folder that sentence-transformers wrote; None for other checkpoints.

    Raises: FileNotFoundError or ValueError naming the missing or damaged file, or the unsupported feature.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = _read_modules(folder / MODULES)
    unknown = [kind for kind in modules if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ValueError(f"{folder / MODULES}: the module {unknown[0]} is not supported")
    prompts, default = _read_prompts(folder)
    length = read_optional_json(folder / LENGTH).get("max_seq_length")
    pooling = _read_pooling(folder / modules["Pooling"] / "config.json") if "Pooling" in modules else "mean"
    return SentenceSettings(
        pooling, "Normalize" in modules, prompts, default, length if type(length) is int and length > 0 else None
    )


def sentence_files(folder: Path) -> list[str]:
    """Return the names of the files that `find_sentence_settings` reads; none for other checkpoints.

    Raises: ValueError for a damaged modules.json.
    """
    if not (folder / MODULES).is_file():
        return []
    configs = [f"{path}/config.json" for path in _read_modules(folder / MODULES).values() if path]
    return [name for name in (MODULES, PROMPTS, LENGTH, *configs) if (folder / name).is_file()]


def _read_modules(file: Path) -> dict[str, str]:
    """Return the folder of each module by its kind."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in given}
    except (ValueError, RecursionError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is not a list of modules with type and path: {err!r:.200}") from err
    if modules.get("Transformer", "") or any(Path(path).name != path for path in modules.values()):
        raise ValueError(f"{file}: the model must lie in the folder itself, and other modules in folders inside")
    return modules


def _read_pooling(file: Path) -> str:
    given = read_json(file)
    mode = given.get("pooling_mode")
    set_fields = [key for key, value in given.items() if key.startswith("pooling_mode_") and value is True]
    modes = [mode] if mode is not None else [_FIELDS.get(key, key.removeprefix("pooling_mode_")) for key in set_fields]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{file}: pooling {modes} is not supported; supported: one of {', '.join(POOLINGS)}")
    if modes[0] == "mean" and given.get("include_prompt") is False:
        raise ValueError(f"{file}: include_prompt=false is not supported with pooling 'mean'")
    return str(modes[0])


def _read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    file = folder / PROMPTS
    given = read_optional_json(file)
    prompts, default = given.get("prompts") or {}, given.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"{file}: prompts={prompts!r:.200} must be an object of texts")
    if default is not None and default not in prompts:
        raise ValueError(f"{file}: default_prompt_name={default!r:.200} is not among the prompts {sorted(prompts)}")
    return prompts, default
