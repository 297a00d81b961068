"""The tensors that a prequantized layer is expected to have."""

from typing import NamedTuple

FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of scales and plain weights, as safetensors spells them


class ExpectedTensor(NamedTuple):
    """Shape and dtypes (as safetensors spells them) of one tensor. is_optional: a layer may lack it."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False
