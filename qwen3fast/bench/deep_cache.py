"""A cache filled with a long prompt once, for tests behind more and more of its tokens."""

from __future__ import annotations

import time

from torch import Tensor

from qwen3fast.bench.measure import Workbench, make_prompts
from qwen3fast.bench.probes import synchronize
from qwen3fast.engine import StepKind


class DeepCache:
    """A row of an engine's cache, filled with one long prompt as far as the deepest test so far needed.

    Each test overwrites what stands behind its depth, so tests of growing depths fill it only once.
    """

    def __init__(self, bench: Workbench, mode: str, vocab_size: int, longest: int) -> None:
        self._engine = bench.engine(mode)
        self._prompt = make_prompts(vocab_size, longest, 1)[0]
        self._filled = 0

    def prefill_s(self, depth: int, tokens: int) -> float:
        """Return the seconds that `tokens` more tokens take behind `depth` ones."""
        self._fill(depth)
        synchronize(self._engine.device)
        started = time.perf_counter()
        self._compute(depth, depth + tokens)
        synchronize(self._engine.device)
        return time.perf_counter() - started

    def decode_s(self, depth: int, tokens: int) -> list[float]:
        """Return the seconds of each of `tokens` new tokens behind `depth` ones (behind one, at depth 0)."""
        engine, kind, step_s = self._engine, StepKind(), []
        self._fill(depth)
        logits_1V = self._compute(depth, depth + 1)
        self._filled = depth
        length = depth + 1
        engine.set_row(0, length)
        engine.sample_first(0, logits_1V, kind)
        synchronize(engine.device)
        ended, launched = time.perf_counter(), 0
        for collected in range(tokens):
            while launched < min(tokens, collected + engine.lookahead + 1):
                launched += 1
                engine.launch(1, length + launched, kind)
            engine.collect()
            started, ended = ended, time.perf_counter()
            step_s.append(ended - started)
        engine.clear_row(0)
        return step_s

    def _fill(self, depth: int) -> None:
        if self._filled < depth:
            self._compute(self._filled, depth)

    def _compute(self, start: int, end: int) -> Tensor:
        prefill, logits_1V = self._engine.begin_prefill(0, self._prompt[:end], reused=start), None
        while logits_1V is None:
            logits_1V = self._engine.prefill_step(prefill)
        self._filled = end  # the last chunk's padding has overwritten what stood behind
        return logits_1V
