"""RoPE's settings in config.json: `rope_theta` and `rope_scaling` in older files, `rope_parameters` in newer ones."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from qwen3fast.model.yarn import Yarn

# Keys that stand beside YaRN's own: read or checked elsewhere, or of no effect on the tables.
WITHOUT_EFFECT = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "extrapolation_factor", "finetuned"}


def refuse_rope(raw: dict[str, Any], where: str) -> None:
    """Raises: ValueError naming a RoPE setting of a config.json that is not supported."""
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            raise ValueError(f"{where}: {name} must be an object, got {raw[name]!r}")
    kind = _rope_type(raw)
    if kind not in ("default", "yarn"):
        raise ValueError(f"{where}: RoPE scaling {kind!r} is not supported; 'yarn' and 'default' (no scaling) are")
    unread = {name: value for name, value in _rope_fields(raw).items() if name not in WITHOUT_EFFECT}
    if kind == "default" and any(value not in (None, 1) for value in unread.values()):
        warnings.warn(f"{where}: RoPE is not scaled (rope_type 'default'); without effect: {unread}", stacklevel=2)
    rotated = _rope_fields(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1.0):
        raise ValueError(f"{where}: partial_rotary_factor={rotated!r} is not supported; only 1 is")


def read_rope_theta(raw: dict[str, Any]) -> float:
    """Return rope_theta; 1,000,000 where the file has none."""
    return float(_rope_fields(raw).get("rope_theta", raw.get("rope_theta", 1_000_000.0)))


def read_yarn(raw: dict[str, Any]) -> Yarn | None:
    """Return the scaling of RoPE, None without one; a field that is null counts as absent.

    Raises: ValueError for a missing or bad field.
    """
    if _rope_type(raw) != "yarn":
        return None
    settings = _rope_fields(raw)
    given = {f.name: settings[f.name] for f in fields(Yarn) if settings.get(f.name) is not None}
    if settings.get("extrapolation_factor") not in (None, 1):
        raise ValueError(f"YaRN: extrapolation_factor={settings['extrapolation_factor']!r} is not supported; only 1 is")
    if unknown := sorted(set(settings) - {f.name for f in fields(Yarn)} - WITHOUT_EFFECT):
        raise ValueError(f"YaRN: {', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not supported")
    if "factor" not in given:
        raise ValueError("YaRN: missing factor, how many times longer than the original a context may be")
    original = raw.get("original_max_position_embeddings")
    if original is not None:
        given["original_max_position_embeddings"] = original
    given.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 40_960))
    return Yarn(**given)


def yarn_to_dict(yarn: Yarn) -> dict[str, Any]:
    """Return the same scaling as `rope_scaling` of a config.json."""
    given = {f.name: getattr(yarn, f.name) for f in fields(yarn) if f.name != "attn_factor" or yarn.attn_factor != 1}
    return {"rope_type": "yarn", **{name: value for name, value in given.items() if value is not None}}


def _rope_fields(raw: dict[str, Any]) -> dict[str, Any]:
    return {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}


def _rope_type(raw: dict[str, Any]) -> Any:
    settings = _rope_fields(raw)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return "default" if kind in ("linear", "dynamic") and settings.get("factor") == 1 else kind  # nothing is scaled
