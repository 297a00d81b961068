"""One run of a case (mode, length, batch size): the time of each token, and a check of the tokens.

Modes: with the KV cache, or computing the whole sequence for each token; eager, compiled, or compiled and replayed as
CUDA graphs, which only the cached decode step has: a graph is captured for one shape, and a sequence without a cache
has another shape at each token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from qwen3fast.bench.probes import synchronize
from qwen3fast.engine import Engine, StepKind
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache, parse_cache_dtype
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.uncached import UncachedRun

MODES = ("uncached-eager", "uncached-compiled", "cached-eager", "cached-compiled", "cached-graphs")

GRAPHS = "-graphs"  # ends the name of a mode that replays CUDA graphs

# Largest gap between the best logit and the chosen one, as a share of the largest logit, by dtype: kernels sum in
# different orders. bfloat16 keeps 8 bits (2^-8 = 0.4%) and errors of 28 layers add up.
TIE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
# In bfloat16, operations on quantized weights quantize activations to int8, and caches in int8 keys and values, which
# the reference does not. The worst gaps by batch size are in benchmarks/results/batch-0.6b.json: they grow with the
# number of tokens.
QUANTIZED_TOLERANCE = 0.05


@dataclass
class Sample:
    """One repetition: seconds to the first token of all batch rows, seconds of each later step, ids of each row."""

    ttft_s: float
    step_s: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class TokenCheck:
    """Tokens of a mode against the reference logits for the same sequence.

    exact: tokens that are the argmax. worst_gap: largest distance below it, as a share of the largest logit.
    """

    tokens: int
    exact: int
    worst_gap: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if each token is the argmax, up to the dtype's rounding."""
        return self.worst_gap <= self.tolerance


class Workbench:
    """The model with an eager and, if a mode needs it, a compiled engine on the same weights.

    Raises: ValueError for CUDA graphs on another device.
    """

    def __init__(
        self, model: Qwen3, modes: tuple[str, ...], max_seq_len: int, max_batch_size: int, kv_cache_dtype: str = "auto"
    ) -> None:
        self.model, self.max_seq_len = model, max_seq_len
        weight = model.model.norm.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache_dtype = parse_cache_dtype(kv_cache_dtype, self.dtype)
        self._engines: dict[bool, Engine] = {}
        for compiled in sorted({is_compiled(mode) for mode in modes}):
            cache = StaticKVCache(model.config, max_batch_size, max_seq_len, self.cache_dtype, self.device)
            self._engines[compiled] = Engine(model, cache, self.device, compiled, cuda_graphs=compiled)
        own = self._engines.get(True)
        self._graphs = (own.graphs, own.captured) if own is not None else (None, None)
        if self._graphs[0] is None and any(mode.endswith(GRAPHS) for mode in modes):
            raise ValueError(f"CUDA graphs need a CUDA device, this is {self.device}; choose other --modes")

    def engine(self, mode: str) -> Engine:
        """Return the engine that runs a mode; the modes with and without CUDA graphs share the compiled one."""
        engine = self._engines[is_compiled(mode)]
        engine.graphs, engine.captured = self._graphs if mode.endswith(GRAPHS) else (None, None)
        return engine

    def run(self, mode: str, prompts: list[list[int]], new_tokens: int) -> Sample:
        """Generate `new_tokens` greedily for each prompt and time every token."""
        return (run_cached if is_cached(mode) else run_uncached_timed)(self.engine(mode), prompts, new_tokens)

    def check(self, sample: Sample, prompts: list[list[int]]) -> TokenCheck:
        """Return `check_tokens` of a sample."""
        return check_tokens(self.model, prompts, sample.token_ids, self.cache_dtype)


@torch.no_grad()
def check_tokens(
    model: Qwen3, prompts: list[list[int]], token_ids: list[list[int]], cache_dtype: torch.dtype | None = None
) -> TokenCheck:
    """Compare chosen tokens with the plain model's logits on the same sequences (eager, no cache).

    cache_dtype: of the keys and values that the tokens were computed with; None for the model's.
    """
    weight = model.model.norm.weight
    tokens = exact = 0
    worst = 0.0
    for prompt, ids in zip(prompts, token_ids, strict=True):
        sequence = torch.tensor([prompt + ids[:-1]], device=weight.device)
        logits_NV = model.logits(model.hidden(sequence)[:, len(prompt) - 1 :])[0].float()
        best_N = logits_NV.amax(dim=-1)
        chosen_N = logits_NV.gather(1, torch.tensor(ids, device=weight.device)[:, None])[:, 0]
        tokens += len(ids)
        exact += int((chosen_N == best_N).sum())
        worst = max(worst, float(((best_N - chosen_N) / logits_NV.abs().amax(dim=-1)).max()))
    layers = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    is_quantized = cache_dtype == torch.int8 or any(not layer.format.is_lossless for layer in layers)
    if is_quantized and weight.dtype == torch.bfloat16:
        return TokenCheck(tokens, exact, worst, QUANTIZED_TOLERANCE)
    return TokenCheck(tokens, exact, worst, TIE_TOLERANCE[weight.dtype])


def is_cached(mode: str) -> bool:
    """Return True if a mode uses the KV cache."""
    return mode.startswith("cached")


def is_compiled(mode: str) -> bool:
    """Return True if a mode runs compiled code."""
    return not mode.endswith("eager")


def with_graphs(mode: str, device: torch.device) -> str:
    """Return the mode, with CUDA graphs where a compiled, cached mode can have them."""
    return mode.removesuffix("-compiled") + GRAPHS if mode == "cached-compiled" and device.type == "cuda" else mode


def make_prompts(vocab_size: int, length: int, batch_size: int, seed: int = 0) -> list[list[int]]:
    """Return random prompts; the same arguments give the same ids."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, length), generator=rng).tolist()


def run_cached(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Sample:
    """Generate `new_tokens` greedily for each prompt and time every token: all prompts, then all batch rows together.

    No scheduler takes part: it would run steps of some rows between the prompts of others.
    """
    rows, longest = range(len(prompts)), max(map(len, prompts))
    synchronize(engine.device)
    started = time.perf_counter()
    token_ids = []
    for row, prompt in zip(rows, prompts, strict=True):
        logits_1V = engine.prefill_whole(row, prompt)
        engine.set_row(row, len(prompt))
        token_ids.append(engine.sample_first(row, logits_1V, StepKind()).tokens)
    times = [time.perf_counter()]
    launched = 1
    while len(times) < new_tokens:
        while launched < min(new_tokens, len(times) + engine.lookahead + 1):
            engine.launch(len(prompts), longest + launched, StepKind())
            launched += 1
        for ids, token in zip(token_ids, engine.collect().tokens, strict=False):
            ids.append(token)
        times.append(time.perf_counter())
    for row in rows:
        engine.clear_row(row)
    return _sample(started, times, token_ids)


def run_uncached(engine: Engine, request: Request) -> None:
    """Run a request to completion without a cache."""
    run = UncachedRun(engine, request)
    while request.finish_reason is None:
        run.step()


def run_uncached_timed(engine: Engine, prompts: list[list[int]], new_tokens: int) -> Sample:
    """Do the same without a cache, prompt by prompt: a step takes the sum of all rows' times."""
    times: list[list[float]] = [[] for _ in prompts]
    started = time.perf_counter()
    requests = []
    for prompt, row_times in zip(prompts, times, strict=True):
        row_started = time.perf_counter()
        requests.append(_timed_request(prompt, new_tokens, row_times))
        run_uncached(engine, requests[-1])
        row_times[:] = [at - row_started for at in row_times]
    ids = [request.output_ids for request in requests]
    return _sample(started, [started + sum(step) for step in zip(*times, strict=True)], ids)


def _timed_request(prompt: list[int], new_tokens: int, times: list[float]) -> Request:
    """Return a greedy request that never stops early and appends the time of each token to `times`."""

    def on_token(token: int) -> bool:
        times.append(time.perf_counter())
        return False

    return Request(prompt, max_tokens=new_tokens, on_token=on_token)


def _sample(started: float, token_times: list[float], token_ids: list[list[int]]) -> Sample:
    steps = [later - earlier for earlier, later in pairwise(token_times)]
    return Sample(token_times[0] - started, steps, token_ids)
