"""Quantized weights and caches: speed, memory, and the error of the logits.

Errors are |quantized - exact| / |exact| over all logits of a prompt's positions, and the share of positions whose most
likely token stays the same. With random weights, where no token is much more likely than others, that is a worst case.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from qwen3fast.bench.measure import make_prompts
from qwen3fast.bench.metrics import short
from qwen3fast.bench.options import split_format
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, line_of
from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import operations
from qwen3fast.kernels.linear import Linear
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache, parse_cache_dtype

ERROR_TOKENS = 128


@torch.no_grad()
def logits_through_cache(model: Qwen3, token_T: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """Return the logits of all positions, (T, V) float32, with keys and values read from a cache; uncompiled.

    On CPUs bfloat16 weights have the C++ operations that quantized ones have: sums in another order are no errors.
    """
    length, device = len(token_T), token_T.device
    dtype = parse_cache_dtype(kv_cache_dtype, model.model.norm.weight.dtype)
    if device.type == "cpu":
        cpu.load()  # plain models do not load the operations by themselves
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear  # as engines do
    cache = StaticKVCache(model.config, 1, length, dtype, device)
    cos_TD, sin_TD = rope_tables(model.config.head_dim, model.config.rope_theta, length, device, model.config.yarn)
    position_1T = torch.arange(length, device=device)[None]
    mask_1TL = torch.arange(length, device=device) <= position_1T[..., None]
    x_1TE = model.embed(token_T[None])
    with operations():
        for block, layer in zip(model.model.layers, cache.layers(), strict=True):
            x_1TE = block(x_1TE, cos_TD[None], sin_TD[None], position_1T, mask_1TL, layer)
        return model.logits(x_1TE)[0].float()


def run(session: Session) -> None:
    """Compute the errors, then measure speed at each context; the formats take turns."""
    o = session.options
    [prompt] = make_prompts(session.config.vocab_size, ERROR_TOKENS, 1, seed=2)
    token_T = torch.tensor(prompt, device=session.device)
    exact_TV = logits_through_cache(session.model(None), token_T, "auto")
    for format in o.formats:
        quantization, kv_cache_dtype = split_format(format)
        model = session.model(quantization)
        logits_TV = logits_through_cache(model, token_T, kv_cache_dtype)
        error = float((logits_TV - exact_TV).norm() / exact_TV.norm())
        same = float((logits_TV.argmax(-1) == exact_TV.argmax(-1)).float().mean())
        facts = {"weight_bytes": float(model.num_bytes())}
        case = Case({"format": session.label(format), "what": "error"}, facts)
        case.add({"logit_error": error, "same_token": same})
        session.record.cases.append(case)
    session.compare_formats(MODE, [(context, 1) for context in o.contexts], what="speed")


def formats(record: Record) -> Iterator[tuple[str, float, float, float]]:
    """Yield (format, tokens/s at the shortest context, GB of weights, error of the logits)."""
    for case in record.cases:
        if "logit_error" not in case.metrics:
            continue
        name = str(case.labels["format"])
        if speeds := line_of(record, "decode_tok_s", "context", format=name):
            error = case.metrics["logit_error"].median
            yield name, speeds[min(speeds)], case.facts["weight_bytes"] / 1e9, error


def summary(record: Record) -> list[str]:
    """Return a sentence per format: its speed and memory beside the first format's."""
    rows = list(formats(record))
    return [
        f"{name}: {speed / rows[0][1]:.1f} times the tokens/s of {rows[0][0]} with {short(size)} GB of weights instead "
        f"of {short(rows[0][2])}; logits differ by {error:.1%}."
        for name, speed, size, error in rows[1:]
    ]


SUITE = Suite(
    name="quantization",
    title="Quantized weights and caches",
    run=run,
    columns=Columns(
        ("format", "context"),
        ("decode_tok_s", "prefill_tok_s", "peak_memory_bytes", "logit_error", "same_token"),
    ),
    defaults={
        "formats": ("plain", "plain-kv8", "int8", "int8-kv8", "int4", "int4-kv8"),
        "contexts": (32, 1024), "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain", "int4"), "contexts": (32,), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
