"""The kernels as operations `torch.ops.qwen3fast.step_*`, which compilers do not trace. Results go to arguments.

Weights come as the parameters of `Linear` (weight, no scale) or `QuantizedLinear` (packed weight and scale).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step import attention, linear, sample, tail
from qwen3fast.kernels.cuda.decode_step.weights import Weight


def step_norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, scale: Tensor | None, is_fp8: bool, y: Tensor
) -> None:
    """Run `linear.norm_linear`."""
    linear.norm_linear(x, norm, eps, Weight.of(weight, scale, is_fp8), y)


def step_norm_gated_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, scale: Tensor | None, is_fp8: bool, y: Tensor
) -> None:
    """Run `linear.norm_gated_linear`."""
    linear.norm_gated_linear(x, norm, eps, Weight.of(weight, scale, is_fp8), y)


def step_linear_add(x: Tensor, weight: Tensor, scale: Tensor | None, is_fp8: bool, y: Tensor) -> None:
    """Run `linear.linear_add`."""
    linear.linear_add(x, Weight.of(weight, scale, is_fp8), y)


def step_attend(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    values: Tensor,
    maximum: Tensor,
    total: Tensor,
    y: Tensor,
) -> None:
    """Run `attention.attend`."""
    splits = attention.Splits(values, maximum, total)
    attention.attend(qkv, q_norm, k_norm, eps, cos, sin, position, k, v, k_scale, v_scale, splits, y)


def step_embed(token: Tensor, weight: Tensor, scale: Tensor | None, is_fp8: bool, x: Tensor) -> None:
    """Run `tail.embed`."""
    tail.embed(token, Weight.of(weight, scale, is_fp8), x)


def step_vocabulary(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    is_fp8: bool,
    best_logit: Tensor,
    best_token: Tensor,
    logits: Tensor | None,
) -> None:
    """Run `tail.vocabulary`."""
    tail.vocabulary(x, norm, eps, Weight.of(weight, scale, is_fp8), tail.Best(best_logit, best_token), logits)


def step_choose(
    best_logit: Tensor,
    best_token: Tensor,
    advance: Tensor,
    input: Tensor,
    output: Tensor,
    position: Tensor,
    step: Tensor,
) -> None:
    """Run `tail.choose`."""
    tail.choose(tail.Best(best_logit, best_token), advance, input, output, position, step)


def step_best(
    logits: Tensor, largest: Tensor, state: Tensor, sums: Tensor, best_logit: Tensor, best_token: Tensor
) -> None:
    """Run `sample.best_of`."""
    sample.best_of(logits, sample.Draw(largest, state, sums, best_logit, best_token))


def step_draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
    largest: Tensor,
    state: Tensor,
    sums: Tensor,
    best_logit: Tensor,
    best_token: Tensor,
) -> None:
    """Run `sample.draw`."""
    work = sample.Draw(largest, state, sums, best_logit, best_token)
    sample.draw(logits, temperature, top_k, top_p, min_p, seed, step, work)


CHANGED: dict[Callable[..., None], tuple[str, ...]] = {  # what each operation writes
    step_norm_linear: ("y",),
    step_norm_gated_linear: ("y",),
    step_linear_add: ("y",),
    step_attend: ("k", "v", "k_scale", "v_scale", "values", "maximum", "total", "y"),
    step_embed: ("x",),
    step_vocabulary: ("best_logit", "best_token", "logits"),
    step_best: ("best_logit", "best_token"),
    step_draw: ("largest", "state", "sums", "best_logit", "best_token"),
    step_choose: ("input", "output", "position", "step"),
}


def register() -> None:
    """Make the operations known to PyTorch; to be called once in a process."""
    for function, changed in CHANGED.items():
        operation = torch.library.custom_op(f"qwen3fast::{function.__name__}", function, mutates_args=changed)
        operation.register_fake(_give_nothing)


def _give_nothing(*_: Any) -> None:
    return None
