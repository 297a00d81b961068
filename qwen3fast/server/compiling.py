"""Compilation while the server answers already: short requests of its own make each Generator compile what it needs.

They run like any other request, in free slots; requests of clients wait for one step at most.
"""

from __future__ import annotations

import logging
import random
import threading
import time

from qwen3fast.generator import Generator
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling.admission import QueueFullError
from qwen3fast.server.state import ServerState

logger = logging.getLogger("qwen3fast.server")
POLL_S = 0.5
PROMPT_TOKENS, NEW_TOKENS = 16, 6
# One of each sampler, and of the processors of logits.
SAMPLINGS = (
    SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True),
    SamplingParams(temperature=1, top_k=20, max_tokens=NEW_TOKENS, ignore_eos=True),
    SamplingParams(temperature=1, top_k=0, top_p=0.9, min_p=0.1, max_tokens=NEW_TOKENS, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=NEW_TOKENS, ignore_eos=True),
)


def compile_meanwhile(state: ServerState) -> threading.Thread:
    """Start a thread that makes the Generators compile, and keeps the number of remaining forms in `state.compiling`.

    It logs when a Generator is done, and ends early when one is closed. It leaves out Generators on GPUs, where
    compile="auto" means True.
    """
    served = [(m.name, m.model) for m in state.models.served]
    generators = {name: m for name, m in served if isinstance(m, Generator) and m.device.type == "cpu"}
    state.compiling = dict.fromkeys(generators, 1)  # until the first look

    def run() -> None:
        for name, generator in generators.items():
            started = time.perf_counter()
            try:
                forms = _compile(generator, state.compiling, name)
            except RuntimeError:  # closed
                return
            finally:
                state.compiling.pop(name, None)
            logger.info("%s: ready after %.0f s, %d compiled forms", name, time.perf_counter() - started, forms)

    thread = threading.Thread(target=run, name="compile-meanwhile", daemon=True)
    thread.start()
    return thread


def _compile(generator: Generator, waiting: dict[str, int], name: str) -> int:
    """Send requests of each kind until they need nothing new. Returns the number of compiled forms."""
    rng = random.Random(0)
    compiled = [-2, -1]  # after each turn: two at least, since the first may only have loaded the C++ operations
    while compiled[-1] > compiled[-2]:
        for count in generator.debug.engine.batch_buckets():
            for params in SAMPLINGS:
                _run(generator, count, params, rng)
        while compiling := generator.stats.compiling:
            waiting[name] = compiling
            time.sleep(POLL_S)
        compiled.append(generator.stats.compilations)
    return compiled[-1]


def _run(generator: Generator, count: int, params: SamplingParams, rng: random.Random) -> None:
    """Run requests for random tokens together; fewer if the queue is full."""
    handles = []
    for _ in range(count):
        prompt = [rng.randrange(generator.config.vocab_size) for _ in range(PROMPT_TOKENS)]
        try:
            handles.append(generator.submit(prompt, params, timeout=0))
        except QueueFullError:
            time.sleep(POLL_S)
            break
    for handle in handles:
        handle.result()
