"""`quantization_config` of compressed-tensors, the format of llm-compressor: which of its many variants can be read.

Activations that a variant quantizes at run time stay in the model's dtype here, which is more exact; so do keys and
values. Scales for them in a checkpoint are not used.
Source: compressed-tensors' QuantizationConfig and QuantizationScheme.
"""

from __future__ import annotations

from typing import Any

COMPRESSED = "compressed-tensors"
LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized")
_ORIGINAL = "load the original weights with quantization="
# Layouts that are not read -> what to use instead.
_INSTEAD = {
    "nvfp4-pack-quantized": f"{_ORIGINAL}'int4'",
    "mxfp4-pack-quantized": f"{_ORIGINAL}'int4'",
    "mxfp6-pack-quantized": f"{_ORIGINAL}'int8'",
    "mxfp8-quantized": f"{_ORIGINAL}'fp8' or 'int8'",
    "marlin-24": "sparse weights are not supported; use a checkpoint without sparsity",
    "sparse-24-bitmask": "sparse weights are not supported; use a checkpoint without sparsity",
    "sparse-bitmask": "sparse weights are not supported; use a checkpoint without sparsity",
    "mixed-precision": f"only one scheme for all layers is supported; {_ORIGINAL}'int4' or 'int8'",
}
# Layout -> its supported bits, strategies and group sizes.
_BITS = {"pack-quantized": (4, 8), "int-quantized": (8,), "float-quantized": (8,)}
_STRATEGIES = {
    "pack-quantized": ("group", "channel"),
    "int-quantized": ("group", "channel", "tensor"),
    "float-quantized": ("channel", "tensor", "block"),
}
_GROUP_SIZES = (32, 64, 128)
_BLOCK = [128, 128]


def read_compressed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a PrequantizedFormat.

    layout "pack-quantized": levels in int32 words. "int-quantized": int8 levels. "float-quantized": float8_e4m3fn.
    strategy: the unit of a scale: "group" (channels of a row), "channel" (a row), "tensor", or "block" (128 x 128).
    Raises: ValueError naming the unsupported value, and the supported ones or a replacement.
    """

    def refuse(what: str, instead: str) -> ValueError:
        return ValueError(f"{where}: quantization_config of {COMPRESSED}: {what} is not supported; {instead}")

    sparsity = raw.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise refuse(f"sparsity_config.format={sparsity['format']!r}", "use a checkpoint without sparsity")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise refuse(f"config_groups={groups!r:.100}", "it must be an object with at least one scheme")
    schemes = [(group.get("format") or raw.get("format"), group.get("weights")) for group in groups.values()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise refuse(f"several schemes ({', '.join(groups)})", "all layers that are quantized must share one")
    layout, weights = schemes[0]
    if not isinstance(weights, dict):
        raise refuse(f"weights={weights!r:.100}", "weights must be quantized; activations alone cannot be")
    if layout == "naive-quantized":
        layout = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if layout not in LAYOUTS:
        instead = _INSTEAD.get(layout) if isinstance(layout, str) else None
        raise refuse(f"format={layout!r}", instead or f"supported: {', '.join(map(repr, LAYOUTS))}")
    return {"layout": layout, **_read_weights(weights, layout, refuse)}


def _read_weights(weights: dict[str, Any], layout: str, refuse: Any) -> dict[str, Any]:
    kind = "float" if layout == "float-quantized" else "int"
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    supported: dict[str, tuple[Any, Any]] = {
        "type": (weights.get("type", "int"), (kind,)),
        "num_bits": (weights.get("num_bits", 8), _BITS[layout]),
        "strategy": (strategy, _STRATEGIES[layout]),
        "symmetric": (weights.get("symmetric", True), (True, False) if kind == "int" else (True,)),
        "dynamic": (weights.get("dynamic", False), (False,)),
        "actorder": (weights.get("actorder"), (None, False, "weight", "static", "group", "dynamic")),
    }
    if strategy == "group":
        supported["group_size"] = (size, _GROUP_SIZES)
    if strategy == "block":
        supported["block_structure"] = (weights.get("block_structure", _BLOCK), (_BLOCK, "128x128"))
    for name, (value, readable) in supported.items():
        if not any(type(value) is type(x) and value == x for x in readable):
            raise refuse(f"weights.{name}={value!r:.100}", f"supported: {', '.join(map(repr, readable))}")
    return {
        "bits": supported["num_bits"][0],
        "group_size": size if strategy == "group" else -1,
        "is_symmetric": supported["symmetric"][0],
        "has_act_order": supported["actorder"][0] in ("group", "dynamic"),
        "strategy": strategy,
    }
