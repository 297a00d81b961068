"""Engines in several processes: rank 0's engine broadcasts its calls, and the other ranks repeat them.

Scheduling, text and constraints stay on rank 0; the other ranks do not know requests. All engines must run the same
calls in the same order, as steps wait for each other's tensors.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from qwen3fast.engine.decode import Hook
from qwen3fast.engine.engine import Engine
from qwen3fast.engine.in_flight import StepResult
from qwen3fast.engine.state import StepKind
from qwen3fast.parallel import Ranks

logger = logging.getLogger(__name__)

# Methods that only rank 0 runs. All other methods are broadcast.
NOT_BROADCAST = {"batch_bucket", "batch_buckets", "max_prompts", "num_warmup_parts", "collect", "forget"}
CLOSE = "close"


def lead_or_follow(engine: Engine, ranks: Ranks) -> Engine:
    """Return an engine that broadcasts its calls, on rank 0; on the other ranks, repeat them until it is closed.

    Raises: on the other ranks, SystemExit at the end, as the program runs on rank 0, and RuntimeError if rank 0 has
    ended.
    """
    if ranks.is_leader:
        return cast(Engine, LeadingEngine(engine, ranks))
    follow(engine, ranks)
    raise SystemExit(0)


class LeadingEngine:
    """Rank 0's engine: the attributes and methods of `Engine`; calls are broadcast to the other ranks first.

    An error in a method leaves the ranks out of step, possibly in the middle of a sum: later calls are refused.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine, self._ranks = engine, ranks
        self._error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        """Return the engine's attribute of this name; a method is broadcast when it is called."""
        attribute = getattr(self._engine, name)
        if name in NOT_BROADCAST or not inspect.ismethod(attribute):
            return attribute
        return lambda *arguments: self._lead(attribute, name, arguments)

    def sample_first(
        self, row: int | list[int], logits_BV: Tensor, kind: StepKind, hook: Hook | None = None
    ) -> StepResult:
        """Call `Engine.sample_first` on all ranks. The others get the logits, which may be of an earlier request."""
        message = (row, logits_BV.cpu(), kind, hook is not None)
        arguments = (row, logits_BV, kind, self._shared(hook))
        result: StepResult = self._lead(self._engine.sample_first, "sample_first", arguments, message)
        return result

    def launch(self, num_rows: int, used_length: int, kind: StepKind, hook: Hook | None = None) -> None:
        """Call `Engine.launch` on all ranks."""
        message = (num_rows, used_length, kind, hook is not None)
        self._lead(self._engine.launch, "launch", (num_rows, used_length, kind, self._shared(hook)), message)

    def warmup(self, report: Callable[[str], None] = lambda part: None) -> None:
        """Call `Engine.warmup` on all ranks."""
        self._lead(self._engine.warmup, "warmup", (report,), ())

    def close(self) -> None:
        """Call `Engine.close` on all ranks, except ranks that have ended or wait in a failed step."""
        try:
            self._ranks.broadcast((CLOSE, ()))
        except RuntimeError as err:
            logger.warning("could not end the other ranks: %s", err)
        self._engine.close()

    def _shared(self, hook: Hook | None) -> Hook | None:
        """Return a hook that broadcasts its result: the other ranks do not have the function."""
        return None if hook is None else lambda logits_BV: self._ranks.share(hook(logits_BV))

    def _lead(
        self, method: Callable[..., Any], name: str, arguments: tuple[Any, ...], message: tuple[Any, ...] | None = None
    ) -> Any:
        if self._error is not None:
            raise RuntimeError("the ranks are out of step since an earlier error; restart them") from self._error
        try:
            self._ranks.broadcast((name, arguments if message is None else message))
            return method(*arguments)
        except BaseException as err:
            self._error = err
            raise


def follow(engine: Engine, ranks: Ranks) -> None:
    """Repeat the calls of rank 0's engine until it is closed.

    Raises: RuntimeError if rank 0 has ended; exceptions of a step.
    """
    while True:
        name, arguments = ranks.receive()
        if name == "launch" and len(engine.in_flight) > engine.lookahead:
            engine.collect()  # the tokens are not needed here, but their place in the ring is
        if name in ("launch", "sample_first"):
            *arguments, has_hook = arguments
            arguments.append(ranks.share if has_hook else None)
        getattr(engine, name)(*(a.to(engine.device) if isinstance(a, Tensor) else a for a in arguments))
        if name == CLOSE:
            return
