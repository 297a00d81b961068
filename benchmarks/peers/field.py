"""The running engines of one weight format."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from peers import ours
from peers.registry import selected, tell
from peers.worker import Worker, WorkerError
from qwen3fast.bench.measure import make_prompts
from qwen3fast.bench.record import Record

IDLE_S = 1.0  # for which waiting workers are watched
CHECK_PROMPT, CHECK_STEPS = 40, 11  # tokens of the prompts before the rounds
Result = TypeVar("Result")


class Field:
    """The running engines of one format, loaded in random order.

    An engine that fails is removed, and the record notes why.
    """

    def __init__(self, args: argparse.Namespace, format: str, record: Record, stack: ExitStack) -> None:
        self.format, self.workers = format, dict[str, Worker]()
        self._record = record
        engines = list(selected(args.peers, format))
        names = [name for name, *_ in engines]
        # No engine is always the first, which may get other pages of memory than the last.
        random.Random(format).shuffle(engines)
        record.notes.setdefault("loaded_in_order", {})[format] = [name for name, *_ in engines]
        max_seq_len = max(*args.contexts, *args.prefill, CHECK_PROMPT) + max(args.new_tokens, CHECK_STEPS) + 1
        prompt = make_prompts(args.vocab_size, CHECK_PROMPT, 1, seed=2)[0]
        for number, (name, peer, variant) in enumerate(engines, 1):
            tell(f"{format}: loading {name} ({number} of {len(engines)})")
            python, module = (peer.python, peer.module) if peer else (Path(sys.executable), "ours")
            model = peer.model_path(variant, args.weights) if peer else ours.model_path(variant, args.weights)
            full = f"{name} {format}"

            def start() -> Worker:
                return Worker(full, python, module, variant.name, model, args.threads, max_seq_len, args.device)  # noqa: B023

            if (worker := self.attempt(name, start)) is not None:
                stack.callback(worker.close)
                self.workers[name] = worker
                self.attempt(name, lambda: worker.generate(prompt, 2))
        self.workers = {name: self.workers[name] for name in names if name in self.workers}

    def attempt(self, name: str, call: Callable[[], Result]) -> Result | None:
        """Return the call's result; None, and the engine is out, if it fails."""
        try:
            return call()
        except (WorkerError, AssertionError, OSError) as err:
            self.workers.pop(name, None)
            self._record.notes.setdefault("left_out", {})[f"{name}, {self.format}"] = str(err)
            tell(f"LEFT OUT: {name}, {self.format}: {err}", sys.stderr)
            return None

    def idle_shares(self) -> dict[str, float]:
        """Return how many processors each waiting worker keeps busy: about 0 if its threads sleep."""
        time.sleep(0.5)
        before = {name: worker.cpu_s() for name, worker in self.workers.items()}
        time.sleep(IDLE_S)
        return {name: (self.workers[name].cpu_s() - cpu_s) / IDLE_S for name, cpu_s in before.items()}
