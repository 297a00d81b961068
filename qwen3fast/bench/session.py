"""A suite's run: models, engines and probes that its cases share, and the record that it fills."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Group, Harness, Measurement, Task
from qwen3fast.bench.measure import Workbench, is_cached, is_compiled, make_prompts, with_graphs
from qwen3fast.bench.options import Options, label_of, split_format
from qwen3fast.bench.probes import BandwidthProbe, GemmProbe, PeakMemory
from qwen3fast.bench.progress import in_words
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.text import visible
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.engine.threads import use_threads
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.quantization.layers import fit_scales

CHECK_LENGTH, CHECK_TOKENS, CHECK_TOKENS_UNCACHED = 40, 12, 4  # without a cache each token takes a forward pass
# For the guess of how long a run takes: shares of the machine's rates that PyTorch reaches, and the time of a step's
# launches where it is not compiled. The harness corrects the estimate by measured times.
GEMM_SHARE, BANDWIDTH_SHARE, EAGER_STEP_S = 0.5, 0.6, 0.03
PREPARE_S, COMPILE_S = 2.0, 15.0
# The order of modes under a time limit: the first two, with and without the cache, are always measured.
MEASURING_SHARE = 0.4  # of a time limit, kept free of compilation if the measurements need it
MAIN_MODES, MIN_MODES = ("cached-graphs", "uncached-eager", "cached-compiled", "uncached-compiled", "cached-eager"), 2


class Preparation(NamedTuple):
    """A mode to compile and check at a batch size. format: as labels name it."""

    bench: Workbench
    mode: str
    format: str
    batch_size: int = 1

    @property
    def expected_s(self) -> float:
        """The expected seconds."""
        return PREPARE_S + (COMPILE_S if is_compiled(self.mode) else 0.0)


class Session:
    """Loads models when they are first asked for, and makes tasks of them. Drop workbenches to close their engines."""

    def __init__(self, suite: str, options: Options) -> None:
        self._started = time.perf_counter()
        self.options = options
        if options.limit_s is not None:
            self.tell(f"suite {suite}: at most {in_words(options.limit_s + 25)}; --full takes longer and measures more")
        use_threads(options.threads)
        self._models: dict[str | None, Qwen3] = {}
        model = self.model(None)
        self.device, self.config = model.model.norm.weight.device, model.config
        self.dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
        self.record = Record(suite, describe_run(), describe_environment(self.device), self._describe_model())
        self._bandwidth, self._gemm = BandwidthProbe(self.device), GemmProbe(self.device)
        self._memory = PeakMemory(self.device)
        self._speed = self._probe()
        self.harness = Harness(self.record, [self._probe], is_shown=options.is_shown)

    def fit_contexts(self) -> None:
        """Leave out contexts that are too long for the model."""
        o = self.options
        room = self.config.longest_context - max(o.new_tokens, CHECK_TOKENS) - 80
        self.options = replace(o, contexts=tuple(n for n in o.contexts if n <= room) or o.contexts[:1])

    def model(self, quantization: str | None) -> Qwen3:
        """Return the model with weights in a format; each is loaded once."""
        if quantization not in self._models:
            o = self.options
            self.tell(f"loading {o.model}" + (f" in {quantization}" if quantization else ""))
            model = load_model(o.model, o.device, o.dtype, quantization=quantization, calibrate=False)
            fit_scales(model)  # as engines do: the bytes that a step reads are counted
            self._models[quantization] = model
        return self._models[quantization]

    def workbench(
        self, format: str, modes: tuple[str, ...], contexts: tuple[int, ...], max_batch_size: int, steps: int
    ) -> Workbench:
        """Build engines for contexts up to the longest, with room for `steps` more tokens and for the check.

        Raises: ValueError if that exceeds the model's positions.
        """
        longest = max(*contexts, CHECK_LENGTH) + max(steps, CHECK_TOKENS) + 1
        if longest > self.config.longest_context:
            raise ValueError(
                f"context {max(contexts)} + {steps} new tokens exceeds this model's {self.config.longest_context} "
                "positions; choose smaller --contexts"
            )
        quantization, kv_cache_dtype = split_format(format)
        return Workbench(self.model(quantization), modes, longest, max_batch_size, kv_cache_dtype)

    def label(self, format: str) -> str:
        """Return the format's name in tables."""
        return label_of(format, self.dtype)

    def compare_formats(self, mode: str, shapes: Sequence[tuple[int, int]], **labels: Label) -> None:
        """Measure a mode at each (context, batch size) of `shapes`; the formats take turns."""
        o, mode = self.options, with_graphs(mode, self.device)
        benches = {f: self.workbench(f, (mode,), o.contexts, max(o.batch_sizes), o.new_tokens) for f in o.formats}
        groups = []
        for context, size in shapes:
            tasks = [self.task(b, mode, f, context, size, o.new_tokens, **labels) for f, b in benches.items()]
            groups.append(Group(f"{context:,} tokens, batch {size}", tasks))
        sizes = dict.fromkeys(size for _, size in shapes)
        self.execute([Preparation(bench, mode, f, size) for f, bench in benches.items() for size in sizes], groups)

    def execute(self, preparations: Sequence[Preparation], groups: Sequence[Group]) -> None:
        """Announce the expected time; compile and check all modes; measure the groups, cheapest first.

        With a time limit, modes and groups that do not fit are left out, and the record notes which.
        """
        o, harness = self.options, self.harness
        prepare_s = sum(item.expected_s for item in preparations)
        work_s = prepare_s + sum(g.first_s + (o.repetitions - 1) * g.round_s for g in groups)
        self.tell(f"{sum(len(g.tasks) for g in groups)} cases, {o.repetitions} rounds, {self._duration(work_s)}")
        harness.progress.expect(work_s)
        if o.limit_s is None:
            self._prepare_all(preparations)
            harness.run(groups, o.repetitions)
            return
        end = harness.progress.end = self._started + o.limit_s
        reserve = min(sum(group.first_s for group in groups), MEASURING_SHARE * o.limit_s)
        modes = self._prepare_all(sorted(preparations, key=lambda item: MAIN_MODES.index(item.mode)), end - reserve)
        skipped = [item.mode for item in preparations if item.mode not in modes]
        groups = [Group(g.description, [t for t in g.tasks if t.case.labels["mode"] in modes]) for g in groups]
        left = harness.run_until(groups, o.repetitions, end)
        if left_out := [*dict.fromkeys(skipped), *(group.description for group in left)]:
            self.record.notes["left_out"] = left_out
            self.tell(f"no time for {'; '.join(left_out)}. --full measures everything")

    def _prepare_all(self, preparations: Sequence[Preparation], end: float = float("inf")) -> set[str]:
        """Prepare modes, two at least, and others that fit before `end`. Returns: the prepared ones."""
        modes, took = set[str](), dict[bool, float]()
        for number, item in enumerate(preparations, 1):
            started = time.perf_counter()
            expected = took.get(is_compiled(item.mode), item.expected_s)
            if len(modes) >= MIN_MODES and started + expected > end:
                break
            self.harness.progress.show(f"compiling and checking {item.mode} ({number} of {len(preparations)})")
            self.prepare(*item)
            self.harness.progress.done += item.expected_s
            modes.add(item.mode)
            took[is_compiled(item.mode)] = time.perf_counter() - started
        return modes

    def prepare(self, bench: Workbench, mode: str, format: str, batch_size: int = 1) -> None:
        """Compile what a mode needs at this batch size, and compare its tokens with the reference.

        On CUDA, later chunks of long prompts have forms of their own: the longest prompt is computed as well.
        The record gets both; `Record.passed` is False if a token is wrong.
        """
        name = f"{mode}, {self.label(format)}, batch {batch_size}"
        prompts = make_prompts(self.config.vocab_size, CHECK_LENGTH, batch_size, seed=1)
        started = time.perf_counter()
        bench.run(mode, prompts, 2)
        if is_compiled(mode):
            if self.device.type == "cuda":
                longest = min(max(self.options.contexts), bench.max_seq_len - 2)
                bench.run(mode, make_prompts(self.config.vocab_size, longest, 1), 2)
            self.record.notes.setdefault("compile_s", {})[name] = time.perf_counter() - started
        tokens = CHECK_TOKENS if is_cached(mode) else CHECK_TOKENS_UNCACHED
        check = bench.check(bench.run(mode, prompts, tokens), prompts)
        self.record.checks[name] = asdict(check) | {"passed": check.passed}

    def case(
        self, bench: Workbench, mode: str, format: str, context: int, batch_size: int, steps: int, **labels: Label
    ) -> Case:
        """Return the case of `steps` decode steps after `batch_size` prompts of `context` tokens."""
        shape: dict[str, Label] = {"mode": mode, "format": self.label(format)}
        shape |= {"context": context, "batch_size": batch_size} | labels
        bytes_per_step = float(bench.model.num_bytes(per_token=True))
        facts = {"prefill_flop": batch_size * forward_flop(self.config, context), "steps": float(max(1, steps))}
        if is_cached(mode):
            bytes_per_step += self.config.kv_bytes_per_token(bench.cache_dtype) * (context + steps / 2) * batch_size
        else:
            facts["flop_per_step"] = batch_size * forward_flop(self.config, context)
        return Case(shape, facts | {"bytes_per_step": bytes_per_step, "weight_bytes": float(bench.model.num_bytes())})

    def task(
        self, bench: Workbench, mode: str, format: str, context: int, batch_size: int, steps: int, **labels: Label
    ) -> Task:
        """Return a task: prefill of `batch_size` prompts of `context` tokens, then `steps` decode steps.

        Without a cache, steps may be 0: the first token is then the step, since each of them computes everything.
        """
        prompts = make_prompts(self.config.vocab_size, context, batch_size)

        def run() -> Measurement:
            self._memory.reset()
            sample = bench.run(mode, prompts, steps + 1)
            step_s = sample.step_s if steps else [sample.ttft_s]
            return {"ttft_s": sample.ttft_s, "step_s": step_s, "peak_memory_bytes": self._memory.peak_bytes()}

        case = self.case(bench, mode, format, context, batch_size, steps, **labels)
        return Task(case, run, expected_s=self.expected_s(mode, case.facts, steps))

    def tell(self, text: str) -> None:
        """Print a line on standard error, unless the run is quiet."""
        if self.options.is_shown:
            print(visible(text), file=sys.stderr, flush=True)

    def expected_s(self, mode: str, facts: dict[str, float], steps: int) -> float:
        """Return a guess of how long a prefill (fact prefill_flop) and so many steps (bytes_per_step) take."""
        bandwidth: float = BANDWIDTH_SHARE * self._speed["bandwidth_gb_s"] * 1e9
        step_s = max(facts["bytes_per_step"] / bandwidth, facts.get("flop_per_step", 0.0) / self._flop_s)
        step_s += 0.0 if is_compiled(mode) else EAGER_STEP_S
        return facts["prefill_flop"] / self._flop_s + facts["weight_bytes"] / bandwidth + steps * step_s

    @property
    def _flop_s(self) -> float:
        return GEMM_SHARE * float(self._speed["gemm_flop_s"])

    def _duration(self, seconds: float) -> str:
        limit = self.options.limit_s
        if limit is None:
            return f"about {in_words(seconds)}"
        fits = "" if seconds <= limit else "; cases beyond that are left out"
        return f"about {in_words(min(seconds, limit))}{fits}"

    def _probe(self) -> Measurement:
        return {"bandwidth_gb_s": self._bandwidth.measure(), "gemm_flop_s": self._gemm.measure(1)}

    def _describe_model(self) -> dict[str, Any]:
        return {
            "name": self.options.model,
            "dtype": self.dtype,
            "parameters": self.config.num_parameters,
            "weight_bytes": self.model(None).num_bytes(),
            "config": CheckpointConfig(self.config).to_dict() | {"dtype": str(self.config.dtype)},
        }


def forward_flop(config: ModelConfig, tokens: int) -> float:
    """Return the floating point operations of a forward pass over a prompt.

    Two per weight and token, causal attention (half of all pairs), and the output projection of the last token only.
    """
    output = config.vocab_size * config.hidden_size
    linear = 2 * (config.decode_parameters - output) * tokens + 2 * output
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2
    return float(linear + attention)
