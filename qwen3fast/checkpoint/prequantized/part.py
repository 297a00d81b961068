"""What there is to say of each tensor of a published layer."""

from typing import NamedTuple


class Part(NamedTuple):
    """Shape and dtype, by safetensors' names, that a tensor must have. is_optional: a layer may lack it."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


# The dtypes of numbers that nobody quantised.
FLOATS = ("F16", "BF16", "F32", "F64")
