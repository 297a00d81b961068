"""Samplers, logits processors and log-probabilities on CPUs: in C++ where that is loaded (kernels/cpu/sampler.h,
processors.cpp, logprobs.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen3fast.engine.compile import StepPart
from qwen3fast.kernels import cpu
from qwen3fast.sampling.processors import log_probabilities
from qwen3fast.sampling.samplers import SamplerKind


@dataclass(frozen=True)
class CpuSampler:
    """A sampler of one kind. plain: `sample`, compiled or not, which serves until the C++ is loaded."""

    kind: SamplerKind
    plain: StepPart

    def __call__(self, _: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
        """Return a token for each row, (B,); arguments as of `run_sampler`."""
        if not cpu.is_loaded():
            token_B: Tensor = self.plain(None, logits_BV, *rows)
            return token_B
        return cpu.sample(logits_BV.float(), None if self.kind is SamplerKind.GREEDY else rows)


@dataclass(frozen=True)
class CpuProcessors:
    """Logits processors. plain: `process_logits`, as for a sampler."""

    plain: StepPart

    def __call__(self, _: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
        """Return the logits to sample from, (B, V) float32; arguments as of `run_processors`."""
        if not cpu.is_loaded():
            processed_BV: Tensor = self.plain(None, logits_BV, *rows)
            return processed_BV
        return cpu.process_logits(logits_BV.float(), rows)


def token_logprobs(logits_BV: Tensor, token_B: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `log_probabilities` does, on CPUs."""
    if not cpu.is_loaded():
        return log_probabilities(logits_BV, token_B, n)
    return cpu.log_probabilities(logits_BV.float(), token_B, n)
