"""A suite's run: models, engines and probes that its cases share, and the record that it fills."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Sample, Task
from qwen3fast.bench.measure import Workbench, is_cached, is_compiled, make_prompts
from qwen3fast.bench.options import Options, label_of, split_format
from qwen3fast.bench.probes import BandwidthProbe, EnergyMeter, GemmProbe, PeakMemory
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.checkpoint import CheckpointConfig, load_model
from qwen3fast.engine.threads import use_threads
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig

CHECK_LENGTH, CHECK_TOKENS = 40, 12


class Session:
    """Loads models as they are asked for, and makes tasks of them. Close engines by dropping the workbenches."""

    def __init__(self, suite: str, options: Options) -> None:
        self.options = options
        use_threads(options.threads)
        self._models: dict[str | None, Qwen3] = {}
        model = self.model(None)
        self.device, self.config = model.model.norm.weight.device, model.config
        self.dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
        self.record = Record(suite, describe_run(), describe_environment(self.device), self._describe_model())
        self._bandwidth, self._memory, self._energy = (
            BandwidthProbe(self.device), PeakMemory(self.device), EnergyMeter()
        )  # fmt: skip
        self.harness = Harness(self.record, [self._probe], is_shown=options.is_shown)

    @cached_property
    def _gemm(self) -> GemmProbe:
        return GemmProbe(self.device)

    def fit_contexts(self) -> None:
        """Leave out the contexts that are too long for the model."""
        o = self.options
        room = self.config.longest_context - max(o.new_tokens, CHECK_TOKENS) - 80
        self.options = replace(o, contexts=tuple(n for n in o.contexts if n <= room) or o.contexts[:1])

    def model(self, quantization: str | None) -> Qwen3:
        """The model with weights in a format, loaded once."""
        if quantization not in self._models:
            o = self.options
            if o.is_shown:
                print(f"loading {o.model} ({quantization or 'as it is'}) ...", file=sys.stderr)
            self._models[quantization] = load_model(o.model, o.device, o.dtype, quantization=quantization)
        return self._models[quantization]

    def workbench(
        self, format: str, modes: tuple[str, ...], contexts: tuple[int, ...], max_batch_size: int, steps: int
    ) -> Workbench:
        """Engines for contexts up to the longest, with room for `steps` more and for the check.

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
        """The format's name in tables."""
        return label_of(format, self.dtype)

    def prepare(self, bench: Workbench, mode: str, format: str, batch_size: int = 1) -> None:
        """Compile what a mode needs at this batch size, and hold its tokens against the reference: before any timing.

        What both say goes into the record; `Record.passed` is False if a token is wrong.
        """
        name = f"{mode}, {self.label(format)}, batch {batch_size}"
        prompts = make_prompts(self.config.vocab_size, CHECK_LENGTH, batch_size, seed=1)
        started = time.perf_counter()
        bench.run(mode, prompts, 2)
        if is_compiled(mode):
            self.record.notes.setdefault("compile_s", {})[name] = time.perf_counter() - started
        check = bench.check(bench.run(mode, prompts, CHECK_TOKENS), prompts)
        self.record.checks[name] = asdict(check) | {"passed": check.passed}

    def task(
        self, bench: Workbench, mode: str, format: str, context: int, batch_size: int, steps: int, **labels: Label
    ) -> Task:
        """Prefill of `batch_size` prompts of `context` tokens, and `steps` steps of decoding.

        Without a cache, steps may be 0: the first token is then the step, since each of them computes everything.
        """
        prompts = make_prompts(self.config.vocab_size, context, batch_size)
        shape: dict[str, Label] = {"mode": mode, "format": self.label(format)}
        shape |= {"context": context, "batch_size": batch_size} | labels
        bytes_per_step = float(bench.model.num_bytes(per_token=True))
        facts = {"prefill_flop": batch_size * forward_flop(self.config, context), "steps": float(max(1, steps))}
        if is_cached(mode):
            bytes_per_step += self.config.kv_bytes_per_token(bench.cache_dtype) * (context + steps / 2) * batch_size
        else:
            facts["flop_per_step"] = batch_size * forward_flop(self.config, context)
        facts |= {"bytes_per_step": bytes_per_step, "weight_bytes": float(bench.model.num_bytes())}

        def run() -> Sample:
            self._memory.reset()
            self._energy.start()
            sample = bench.run(mode, prompts, steps + 1)
            joules, peak = self._energy.joules(), self._memory.peak_bytes()
            step_s = sample.step_s if steps else [sample.ttft_s]
            return {"ttft_s": sample.ttft_s, "step_s": step_s, "peak_memory_bytes": peak, "energy_j": joules}

        return Task(Case(shape, facts), run)

    def _probe(self) -> Sample:
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
    """Floating point operations of a forward pass over a prompt: two for each weight and token, causal attention (half
    of all pairs), and the output projection for the last token only."""
    output = config.vocab_size * config.hidden_size
    linear = 2 * (config.decode_parameters - output) * tokens + 2 * output
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens**2
    return float(linear + attention)
