"""Samplers, logits processors and log-probabilities on CPUs: in C++ where that is loaded (kernels/cpu/sampler.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from qwen3fast.engine.compile import Function
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import sampler
from qwen3fast.sampling.processors import log_probabilities


def in_cpp(run: Callable[[Tensor, Sequence[Tensor]], Tensor], plain: Function) -> Function:
    """Return `run_sampler` or `run_processors` (parts.py), in C++ once that is loaded.

    run: the function of kernels/cpu/sampler.py. plain: the part, compiled or not, which serves until then.
    """

    def run_part(_: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
        result: Tensor = run(logits_BV.float(), rows) if cpu.is_loaded() else plain(None, logits_BV, *rows)
        return result

    return run_part


def token_logprobs(logits_BV: Tensor, token_B: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of `log_probabilities`, on CPUs."""
    if not cpu.is_loaded():
        return log_probabilities(logits_BV, token_B, n)
    return sampler.log_probabilities(logits_BV.float(), token_B, n)
