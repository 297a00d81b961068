"""Quality of quantized weights and caches on a text: perplexity, divergence from the unquantized model, agreement.

The text's tokens are split into windows of --contexts tokens, each computed alone, with keys and values read from a
cache, through the operations that a prompt runs through. Every token but a window's first is predicted.
perplexity: exp of the mean negative log-likelihood of the text's tokens. kl_divergence: the mean over positions of the
Kullback-Leibler divergence of the format's distribution of the next token from the unquantized model's, in nats;
kl_p99: its 99th percentile. same_token: share of positions with the same most likely token as the unquantized model.
A format without kernels for the device runs in its plain form, which gives the same numbers, slowly.
Source of the comparison: llama.cpp, tools/perplexity (--kl-divergence).

T tokens of a window   V vocabulary   M positions at a time
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qwen3fast import load_model
from qwen3fast.bench.metrics import METRICS, percentile
from qwen3fast.bench.options import split_format
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.quality_text import TEXT
from qwen3fast.bench.suites.quantization import logits_through_cache
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns
from qwen3fast.checkpoint.metadata import read_tokenizer
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.files import read_text
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import parse_cache_dtype
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.formats import ALL_FORMATS

MAX_LOGITS = 2**23  # compared at a time


@dataclass
class Totals:
    """Sums over the positions so far. nll: negative log-likelihoods of the text's tokens, summed, in nats."""

    nll: float = 0.0
    same: int = 0
    kl: list[float] = field(default_factory=list)

    def add(self, logits_TV: Tensor, exact_TV: Tensor, target_T: Tensor) -> None:
        """Compare the logits of a window's positions, float32, with the unquantized model's."""
        rows = max(1, MAX_LOGITS // logits_TV.shape[1])
        for ours_MV, exact_MV, target_M in zip(
            logits_TV.split(rows), exact_TV.split(rows), target_T.split(rows), strict=True
        ):
            q_MV, p_MV = ours_MV.log_softmax(-1), exact_MV.log_softmax(-1)
            self.nll -= float(q_MV.gather(1, target_M[:, None]).double().sum())
            self.same += int((ours_MV.argmax(-1) == exact_MV.argmax(-1)).sum())
            self.kl += (p_MV.exp() * (p_MV - q_MV)).sum(-1).clamp(min=0).tolist()  # rounding goes below 0

    def sample(self) -> dict[str, float]:
        """Return the metrics."""
        tokens = len(self.kl)
        return {
            "perplexity": math.exp(min(self.nll / tokens, 50.0)),
            "kl_divergence": math.fsum(self.kl) / tokens,
            "kl_p99": percentile(sorted(self.kl), 0.99),
            "same_token": self.same / tokens,
        }


def run(session: Session) -> None:
    """Compare all formats on each window in turn."""
    o = session.options
    exact = session.model(None)
    if formats := formats_of(exact):
        raise ValueError(
            f"{o.model} is quantized ({', '.join(formats)}): formats are compared with unquantized weights"
        )
    ids = token_ids(session)
    models = {format: _model(session, split_format(format)[0]) for format in o.formats}
    work = [(n, window) for n in o.contexts for window in windows(ids, n, o.repetitions)]
    session.harness.progress.expect(float(len(work) * len(models)))
    totals = {(n, format): Totals() for n in o.contexts for format in o.formats}
    for n, window in work:
        token_T = torch.tensor(window, device=session.device)
        exact_TV = logits_through_cache(exact, token_T, "auto")[:-1]
        for format, model in models.items():
            session.harness.progress.show(f"{n:,} tokens: {session.label(format)}", 1.0)
            quantization, cache_dtype = split_format(format)
            is_exact = quantization is None and cache_dtype == "auto"
            logits_TV = exact_TV if is_exact else logits_through_cache(model, token_T, cache_dtype)[:-1]
            totals[n, format].add(logits_TV, exact_TV, token_T[1:])
    session.harness.progress.close()
    for (n, format), found in totals.items():
        session.record.cases.append(_case(session, models[format], format, n, found))


def windows(ids: list[int], length: int, most: int) -> Iterator[list[int]]:
    """Yield the text's tokens, `length` at a time, `most` times at most; the last one may be shorter, down to 2."""
    for begin in range(0, min(len(ids) - 1, most * length), length):
        yield ids[begin : begin + length]


def token_ids(session: Session) -> list[int]:
    """Return the text's tokens, and note in the record which text it is."""
    o = session.options
    if o.model.startswith("random:"):
        raise ValueError(
            f"--suite quality needs trained weights and a tokenizer, which {o.model} lacks; name a --model"
        )
    text = read_text(Path(o.text), "a text for --text") if o.text else TEXT
    ids = read_tokenizer(resolve_source(o.model)).encode(text)
    if len(ids) < 2:
        raise ValueError(f"{o.text} has {len(ids)} tokens; at least 2 are needed")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    session.record.notes["text"] = {
        "name": Path(o.text).name if o.text else "built in", "sha256": sha256, "tokens": len(ids)
    }  # fmt: skip
    return ids


def _model(session: Session, quantization: str | None) -> Qwen3:
    if quantization is None or session.device.type in ALL_FORMATS[quantization].devices:
        return session.model(quantization)
    o = session.options
    model = load_model(o.model, o.device, o.dtype, calibrate=False)
    quantize_model(model, quantization, model.model.norm.weight.dtype)
    return model


def _case(session: Session, model: Qwen3, format: str, context: int, found: Totals) -> Case:
    cache_dtype = parse_cache_dtype(split_format(format)[1], model.model.norm.weight.dtype)
    facts = {
        "weight_bytes": float(model.num_bytes()),
        "kv_bytes_per_token": float(session.config.kv_bytes_per_token(cache_dtype)),
        "positions": float(len(found.kl)),
    }
    case = Case({"format": session.label(format), "context": context}, facts)
    case.add(found.sample())
    return case


def summary(record: Record) -> list[str]:
    """Return a sentence per format, at the longest context: its perplexity beside the first format's, and more."""
    longest = max(int(case.labels["context"]) for case in record.cases)
    cases = [case for case in record.cases if case.labels["context"] == longest]
    first = cases[0].metrics["perplexity"].median
    sentences = []
    for case in cases[1:]:
        values = {name: estimate.median for name, estimate in case.metrics.items()}
        kl = METRICS["kl_divergence"].text(values["kl_divergence"])
        sentences.append(
            f"{case.labels['format']}: perplexity {values['perplexity'] / first - 1:+.2%} against "
            f"{cases[0].labels['format']}, KL divergence {kl} nats, the same most likely token at "
            f"{values['same_token']:.1%} of {case.facts['positions']:,.0f} positions."
        )
    return sentences or [f"{cases[0].labels['format']}: perplexity {first:.4f}."]


SUITE = Suite(
    name="quality",
    title="Quality of quantized weights and caches on a text",
    run=run,
    columns=Columns(("format", "context"), ("perplexity", "kl_divergence", "kl_p99", "same_token")),
    defaults={
        "formats": ("plain", "plain-kv8", "int8", "int8-kv8", "int4", "int4-kv8", "uint4", "fp8"),
        "contexts": (512,), "text": "", "repetitions": 8,
    },
    quick={"formats": ("plain", "int8", "int4"), "repetitions": 2},
    full={"repetitions": 10**6},
    summary=summary,
)  # fmt: skip
