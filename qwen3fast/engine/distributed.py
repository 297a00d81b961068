"""One engine in each of several processes: rank 0's is called, and whatever it is asked for, the others' do as well.

Scheduling, text and constraints stay on rank 0; the other ranks know of no requests. Every rank's engine must make the
same calls in the same order, since steps wait for each other's tensors.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from qwen3fast.engine.decode import Hook, StepKind
from qwen3fast.engine.engine import Engine, StepResult
from qwen3fast.parallel import Ranks

logger = logging.getLogger(__name__)

# Methods that concern rank 0's host alone. All others are told.
NOT_TOLD = {"batch_bucket", "batch_buckets", "num_warmup_parts", "collect", "forget"}
CLOSE = "close"


def lead_or_follow(engine: Engine, ranks: Ranks) -> Engine:
    """On rank 0: an engine that tells the others what it does. On the others this follows until rank 0 closes its own.

    Raises: SystemExit on the others then: the program is rank 0's to run. RuntimeError there if rank 0 is gone.
    """
    if ranks.is_leader:
        return cast(Engine, LeadingEngine(engine, ranks))
    follow(engine, ranks)
    raise SystemExit(0)


class LeadingEngine:
    """Rank 0's engine: the attributes of `Engine`, and its methods, which are told to the other ranks first.

    An error in a method leaves the ranks out of step, possibly in the middle of a sum, so all later calls are refused.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine, self._ranks = engine, ranks
        self._error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        """What `Engine` has under this name."""
        attribute = getattr(self._engine, name)
        if name in NOT_TOLD or not inspect.ismethod(attribute):
            return attribute
        return lambda *arguments: self._lead(attribute, name, arguments)

    def sample_first(self, row: int, logits_1V: Tensor, kind: StepKind, hook: Hook | None = None) -> StepResult:
        """See `Engine.sample_first`. The others get the logits: they may be those of an earlier request."""
        told = (row, logits_1V.cpu(), kind, hook is not None)
        return self._lead(self._engine.sample_first, "sample_first", (row, logits_1V, kind, self._shared(hook)), told)

    def launch(self, num_rows: int, used_length: int, kind: StepKind, hook: Hook | None = None) -> None:
        """See `Engine.launch`."""
        told = (num_rows, used_length, kind, hook is not None)
        self._lead(self._engine.launch, "launch", (num_rows, used_length, kind, self._shared(hook)), told)

    def warmup(self, report: Callable[[str], None] = lambda part: None) -> None:
        """See `Engine.warmup`."""
        self._lead(self._engine.warmup, "warmup", (report,), ())

    def close(self) -> None:
        """See `Engine.close`. The others stop to follow, unless they are gone, or wait in a step that has failed."""
        try:
            self._ranks.tell((CLOSE, ()))
        except RuntimeError as err:
            logger.warning("the other ranks could not be told to end: %s", err)
        self._engine.close()

    def _shared(self, hook: Hook | None) -> Hook | None:
        """Only rank 0 knows the function; the others get what it has made of the logits."""
        return None if hook is None else lambda logits_BV: self._ranks.share(hook(logits_BV))

    def _lead(self, method: Callable[..., Any], name: str, arguments: tuple, told: tuple | None = None) -> Any:
        if self._error is not None:
            raise RuntimeError("the ranks are out of step since an earlier error; start them anew") from self._error
        try:
            self._ranks.tell((name, arguments if told is None else told))
            return method(*arguments)
        except BaseException as err:
            self._error = err
            raise


def follow(engine: Engine, ranks: Ranks) -> None:
    """Do what rank 0's engine does, until it is closed.

    Raises: RuntimeError if rank 0 is gone; whatever a step raises.
    """
    while True:
        name, arguments = ranks.hear()
        if name == "launch" and len(engine.ring) > engine.lookahead:
            engine.collect()  # nobody here waits for tokens, but a slot is needed
        if name in ("launch", "sample_first"):
            *arguments, has_hook = arguments
            arguments.append(ranks.share if has_hook else None)
        getattr(engine, name)(*(a.to(engine.device) if isinstance(a, Tensor) else a for a in arguments))
        if name == CLOSE:
            return
