"""torch.compile for the parts of a step: what is compiled, how often, and what happens without a C++ compiler.

The unit is one transformer block: compiled once, it serves all layers (their weights are inputs of the compiled code).
Lengths that vary at run time are marked dynamic by the caller, so that no request causes a compilation.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx

from qwen3fast.kernels import cpu

logger = logging.getLogger(__name__)

# Variants of one function: batch sizes times dtypes. Dynamo's default of 8 is soon reached, and reaching it is an error
# under fullgraph=True.
RECOMPILE_LIMIT = 1024


class StepCompiler:
    """Compiles functions with Inductor and counts what it did.

    Attributes:
        enabled: False if compilation was not asked for or cannot work here; functions are then returned as they are.
        compilations: graphs compiled so far through this object.
        seconds: time spent compiling them.
    """

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled and (device.type != "cpu" or _has_cpp_compiler())
        if self.enabled and device.type == "cpu":
            cpu.load()
        self.compilations = 0
        self.seconds = 0.0

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled form of a function: one graph without breaks, shapes static unless marked dynamic."""
        if not self.enabled:
            return function
        # Captured by us as a whole step, not by Inductor part by part.
        inductor_options = {"triton.cudagraphs": False}

        def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            started = time.perf_counter()
            compiled = compile_fx(graph, example_inputs, config_patches=inductor_options)
            self.compilations += 1
            self.seconds += time.perf_counter() - started
            return compiled

        settings: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            # What a module holds is not checked again at each call: the blocks of a model are alike, and this compiled
            # code is for one Generator's model only.
            options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
            settings |= {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True, "options": options}
            return torch.compile(function, **settings)
        # Older PyTorch: one cache for all Generators, and the limit is a global setting (17 us a call).
        compiled = torch.compile(function, **settings)
        limits: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}

        def call(*args: Any) -> Any:
            with torch._dynamo.config.patch(**limits):
                return compiled(*args)

        return call


def _has_cpp_compiler() -> bool:
    """Whether Inductor's CPU backend can build; warns once if not."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if any(candidate and shutil.which(candidate) for candidate in candidates):
        return True
    warnings.warn(
        "no C++ compiler found, so steps run uncompiled, several times slower. Install one (Debian, Ubuntu: "
        "apt-get install g++; macOS: xcode-select --install) or set CXX; compile=False silences this.",
        stacklevel=2,
    )
    return False
