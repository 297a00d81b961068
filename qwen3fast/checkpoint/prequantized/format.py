"""PrequantizedFormat: how other software stored the linear layers of a checkpoint (`quantization_config`).

A variant that cannot be read is refused here, by name, before any weight is read.
Source: config.json as written by transformers (fp8), AutoAWQ (awq), AutoGPTQ and GPTQModel (gptq), and llm-compressor
(compressed-tensors, see compressed_config.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qwen3fast.checkpoint.prequantized.compressed_config import COMPRESSED, read_compressed
from qwen3fast.quantization.formats import GROUP, Format
from qwen3fast.quantization.uint4 import Layout

BLOCK = 128  # fp8: rows and channels that share a scale
FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of scales and plain weights, as safetensors spells them

# The supported values of each field; None: the field may be missing.
_READABLE: dict[str, dict[str, tuple[Any, ...]]] = {
    "fp8": {
        "weight_block_size": ([BLOCK, BLOCK],),
        "fmt": ("e4m3", None),
        "activation_scheme": ("dynamic", None),
        "scale_fmt": ("float", None),
        "expert_dtype": ("fp8", None),
        "modules_to_convert": ([], None),
    },
    "awq": {"bits": (4,), "group_size": (32, 64, 128), "zero_point": (True,), "version": ("gemm",)},
    "gptq": {
        "bits": (4, 8),
        "group_size": (32, 64, 128, -1),
        "sym": (True, False),
        "desc_act": (True, False),
        "checkpoint_format": ("gptq", "gptq_v2", None),
        "pack_dtype": ("int32", None),
    },
}
_ORIGINAL = "load the original weights with quantization="
# Methods that are not read -> what to use instead.
_INSTEAD = {
    "bitsandbytes": f"{_ORIGINAL}'int4' (for nf4) or 'int8', or save the model dequantized (model.dequantize())",
    "hqq": f"{_ORIGINAL}'int4' or 'int8'",
    "mxfp4": f"{_ORIGINAL}'int4'",
    "modelopt": f"{_ORIGINAL}'fp8' or 'int4'",
    "torchao": f"{_ORIGINAL}'int8' or 'int4'",
    "quanto": f"{_ORIGINAL}'int8' or 'int4'",
    "eetq": f"{_ORIGINAL}'int8'",
}
# Other names that fields have had.
_OTHER_NAMES = {"version": ("checkpoint_format", "format"), "checkpoint_format": ("format",)}


class ExpectedTensor(NamedTuple):
    """Shape and dtypes (as safetensors spells them) of one tensor of a layer. is_optional: a layer may lack it."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True)
class PrequantizedFormat:
    """The storage of prequantized linear layers; embedding, norms and usually the output projection are plain.

    Attributes:
        method: "fp8" (float8_e4m3fn, one scale per 128 x 128 weights), "awq" or "gptq" (unsigned levels, a scale and a
            zero point per group of channels of a row), or "compressed-tensors" (one of its layouts).
        bits: of a level. group_size: channels that share a scale; -1: all.
        layout, strategy: of compressed-tensors; see compressed_config.py.
        is_symmetric: all zero points are the middle level.
        has_act_order: the channels of a group are not neighbors.
        zeros_less_one: zero points are stored less one.
    """

    method: str
    bits: int = 8
    group_size: int = -1
    is_symmetric: bool = True
    has_act_order: bool = False
    zeros_less_one: bool = False
    layout: str = ""
    strategy: str = ""

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str) -> PrequantizedFormat:
        """Read `quantization_config`.

        Raises: ValueError naming the field that is not supported, and the values that are.
        """
        method = raw.get("quant_method")
        if method == COMPRESSED:
            return cls(COMPRESSED, **read_compressed(raw, where))
        if isinstance(method, str) and method in _INSTEAD:
            raise ValueError(f"{where}: quant_method {method!r} is not supported; {_INSTEAD[method]}")
        if not isinstance(method, str) or method not in _READABLE:
            raise ValueError(
                f"{where}: quantization_config={raw!r:.300} is not supported; supported: quant_method "
                f"{', '.join(map(repr, [*_READABLE, COMPRESSED]))}, and what save_quantized wrote"
            )
        values = {name: _value(raw, name) for name in _READABLE[method]}
        for name, readable in _READABLE[method].items():
            if not any(type(value) is type(values[name]) and value == values[name] for value in readable):
                listed = ", ".join(repr(value) for value in readable if value is not None)
                raise ValueError(
                    f"{where}: quantization_config: {name}={values[name]!r} is not supported with "
                    f"quant_method={method!r}; supported: {listed}"
                )
        rules = raw.get("dynamic") or ()
        if not isinstance(rules, dict | list | tuple):
            raise ValueError(f"{where}: quantization_config: dynamic={rules!r:.100} must be an object")
        changed = [rule for rule in rules if not str(rule).startswith("-:")]
        if changed:  # rules with "-:" leave layers as they were, which their tensors tell
            raise ValueError(f"{where}: quantization_config: dynamic={changed} is not supported; only '-:' rules are")
        if method == "fp8":
            return cls(method)
        return cls(
            method,
            bits=values["bits"],
            group_size=values["group_size"],
            is_symmetric=values.get("sym", False),
            has_act_order=values.get("desc_act", False),
            zeros_less_one=method == "gptq" and values["checkpoint_format"] != "gptq_v2",
        )

    @property
    def is_float(self) -> bool:
        """Return whether the stored numbers are floating point, not levels."""
        return self.method == "fp8" or self.layout == "float-quantized"

    @property
    def has_blocks(self) -> bool:
        """Return whether floats have a scale per block; otherwise per row, or one for the tensor."""
        return self.method == "fp8" or self.strategy == "block"

    @property
    def loaded_as(self) -> str:
        """Return the format that weights are loaded in by default, on devices that have kernels for it.

        "fp8", "int4" and "uint4" take over the stored numbers or levels; "int8" quantizes the dequantized weights.
        """
        return next((name for name in ("fp8", "int4", "uint4") if self.keeps_numbers(name)), "int8")

    @property
    def has_scattered_groups(self) -> bool:
        """Return whether groups are neighbors only after sorting the channels, which has an order of them as result."""
        return self.has_act_order and self.group_size != -1

    def keeps_numbers(self, name: str) -> bool:
        """Return whether our format of this name can hold the stored floats, or the stored levels of 4 bits."""
        if self.is_float:
            return name == "fp8"
        return self.bits == 4 and (name == "uint4" or (name == "int4" and self.is_symmetric))

    def layout_of(self, in_features: int) -> Layout:
        """Return the layout of uint4's scales that holds the groups of K channels, each with its zero point."""
        if self.group_size == -1:
            return Layout(in_features, has_zero=True)
        return Layout(self.group_size if in_features % self.group_size == 0 else GROUP, has_zero=True)

    def as_format(self, format: Format) -> Format:
        """Return one of our formats as these layers get it: with their groups or blocks if it keeps their numbers."""
        if not self.keeps_numbers(format.name):
            return format
        if format.name == "fp8":
            return format.with_blocks() if self.has_blocks else format
        return format.with_layout(self.layout_of) if format.name == "uint4" else format

    def describe(self) -> str:
        """Return the format in words."""
        if self.is_float:
            shared = {"tensor": "tensor", "channel": "row"}.get(self.strategy, f"{BLOCK} x {BLOCK} weights")
            return f"{'fp8' if self.method == 'fp8' else f'{self.method}, fp8'}, one scale per {shared}"
        group = "row" if self.group_size == -1 else f"{self.group_size} channels"
        zeros = "" if self.is_symmetric else " and a zero point"
        order = ", channels out of order" if self.has_act_order else ""
        return f"{self.method}, {self.bits} bits, a scale{zeros} per {group}{order}"


def _value(raw: dict[str, Any], name: str) -> Any:
    """Return a field by any of its names; names of formats become lower case."""
    value = next((raw[n] for n in (name, *_OTHER_NAMES.get(name, ())) if raw.get(n) is not None), None)
    return value.lower() if isinstance(value, str) else value
