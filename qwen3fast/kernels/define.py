"""Definitions of operations, `torch.ops.qwen3fast.*`, which code that is compiled calls without looking into them."""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("qwen3fast", "FRAGMENT")


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any] | None, key: str = "CPU") -> None:
    """Define an operation, once per process.

    schema: as of `torch.library.Library.define`. fake: returns an empty result of the right shape, for
    `torch.compile`; None for an operation that is never compiled. key: of the dispatcher, for the function.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, function, key)
    if fake is not None:
        torch.library.register_fake(f"qwen3fast::{name}", fake, lib=_library)
