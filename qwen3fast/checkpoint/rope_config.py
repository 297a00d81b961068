"""RoPE's settings in config.json: `rope_theta` and `rope_scaling` in older files, `rope_parameters` in newer ones.

Each key is used, refused by name, or named in a warning; a key that is null counts as absent.
"""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any

from qwen3fast.model.config import ModelConfig
from qwen3fast.model.yarn import Yarn

# Keys beside YaRN's own: used or checked elsewhere, or without effect on the tables.
OTHER_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "extrapolation_factor", "finetuned"}
DEFAULT_THETA, DEFAULT_LENGTH = 1_000_000.0, 40_960


def refuse_rope(raw: dict[str, Any], where: str) -> None:
    """Check RoPE's settings of a config.json.

    Raises: ValueError naming a setting that is not supported. Warns of settings without effect.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"{where}: {name} must be an object, got {raw[name]!r:.200}")
    settings, kind = _settings(raw), _rope_type(raw)
    if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
        raise ValueError(f"{where}: RoPE settings of their own for {', '.join(nested)} are not supported")
    if kind not in ("default", "yarn"):
        raise ValueError(f"{where}: RoPE scaling {kind!r:.100} is not supported; 'yarn' and 'default' (no scaling) are")
    unused = {name: value for name, value in settings.items() if name not in OTHER_KEYS and value != 1}
    if kind == "default" and unused:
        warnings.warn(f"{where}: RoPE is not scaled (rope_type 'default'); without effect: {unused}", stacklevel=2)
    rotated = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor={rotated!r:.100} is not supported; only 1 is")


def read_rope_theta(raw: dict[str, Any]) -> Any:
    """Return rope_theta; 1,000,000 where the file has none."""
    theta = _settings(raw).get("rope_theta", raw.get("rope_theta"))
    return DEFAULT_THETA if theta is None else theta


def read_yarn(raw: dict[str, Any]) -> Yarn | None:
    """Return the scaling of RoPE, None without one.

    Raises: ValueError for a missing, unknown or bad key.
    """
    if _rope_type(raw) != "yarn":
        return None
    settings, names = _settings(raw), {f.name for f in fields(Yarn)}
    if settings.get("extrapolation_factor", 1) != 1:
        raise ValueError(f"YaRN: extrapolation_factor={settings['extrapolation_factor']!r} is not supported; only 1 is")
    if unknown := sorted(set(settings) - names - OTHER_KEYS):
        raise ValueError(f"YaRN: {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not supported")
    if "factor" not in settings:
        raise ValueError("YaRN: missing factor, how many times longer than the original a context may be")
    original = raw.get("original_max_position_embeddings")
    if original is None:
        original = settings.get("original_max_position_embeddings", raw.get("max_position_embeddings", DEFAULT_LENGTH))
    given = {name: settings[name] for name in names & set(settings)}
    return Yarn(**given | {"original_max_position_embeddings": original})


def with_rope_scaling(config: ModelConfig, rope_scaling: dict[str, Any] | None) -> ModelConfig:
    """Return a config with another scaling of RoPE than the checkpoint's; None leaves it.

    rope_scaling: as in config.json; {"rope_type": "default"} scales nothing.
    Raises: ValueError for a setting that is missing, unknown, unsupported or out of range.
    """
    if rope_scaling is None:
        return config
    raw = {"rope_scaling": rope_scaling, "max_position_embeddings": config.max_position_embeddings}
    refuse_rope(raw, "rope_scaling")
    theta = rope_scaling.get("rope_theta")
    return replace(config, yarn=read_yarn(raw), rope_theta=config.rope_theta if theta is None else theta)


def yarn_to_dict(yarn: Yarn) -> dict[str, Any]:
    """Return the scaling as `rope_scaling` of a config.json."""
    given = {f.name: getattr(yarn, f.name) for f in fields(yarn) if f.name != "attn_factor" or yarn.attn_factor != 1}
    return {"rope_type": "yarn", **{name: value for name, value in given.items() if value is not None}}


def _settings(raw: dict[str, Any]) -> dict[str, Any]:
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    return {name: value for name, value in merged.items() if value is not None}


def _rope_type(raw: dict[str, Any]) -> Any:
    settings = _settings(raw)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return "default" if kind in ("linear", "dynamic") and settings.get("factor") == 1 else kind  # nothing is scaled
