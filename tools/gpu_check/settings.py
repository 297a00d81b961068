"""The settings of a variant, applied to this process: options of Inductor, switches of the package."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor

from qwen3fast.kernels import cuda


class UnavailableError(Exception):
    """The error for something that this machine or this PyTorch does not have; names it."""


def apply_options(options: dict[str, Any]) -> None:
    """Set options of Inductor for everything that this process compiles, over those that the package passes.

    Raises: UnavailableError for an option that this PyTorch does not have.
    """
    if not options:
        return
    known = torch._inductor.list_options()
    for name in options:
        if name not in known:
            raise UnavailableError(f"torch {torch.__version__} has no Inductor option {name}")
    from torch._inductor import config

    config.patch(dict(options)).__enter__()  # type: ignore[attr-defined]  # for the rest of the process
    torch.compile = _with_options(torch.compile, options)  # type: ignore[assignment]


def _with_options(compile: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return `torch.compile` with these options over those it is called with."""

    def compile_with_options(*arguments: Any, **keywords: Any) -> Any:
        mode = keywords.pop("mode", None)
        given = torch._inductor.list_mode_options(mode) if mode is not None else {}
        keywords["options"] = given | (keywords.get("options") or {}) | options
        return compile(*arguments, **keywords)

    return compile_with_options


def apply_switches(switches: dict[str, Any]) -> None:
    """Set switches of the package.

    "attention": of decode steps that are not fused ("split", "sdpa"). "fused": whether steps are fused. "pdl": whether
    their kernels overlap.
    """
    cuda.decode_attention = switches.get("attention", cuda.decode_attention)
    for name, variable in (("fused", "QWEN3FAST_FUSED_STEP"), ("pdl", "QWEN3FAST_PDL")):
        if name in switches:
            os.environ[variable] = str(int(switches[name]))
