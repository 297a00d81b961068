"""The kernels as operations `torch.ops.qwen3fast.step_*`, which compilers do not trace. Results go to arguments.

Weights come as the parameters of `Linear` (weight, no scale) or `QuantizedLinear` (packed weight and scale).
"""

from __future__ import annotations

from collections.abc import Callable

from qwen3fast.kernels.cuda.decode_step import attention, linear, sample, tail
from qwen3fast.kernels.cuda.decode_step.weights import Weight
from qwen3fast.kernels.define import define

FUNCTIONS: dict[str, Callable[..., None]] = {}  # by the operations' names


def _define(arguments: str, function: Callable[..., None]) -> None:
    FUNCTIONS[arguments.partition("(")[0]] = function
    define(f"{arguments} -> ()", function, lambda *_: None, "CompositeExplicitAutograd")


_NORM = "Tensor x, Tensor norm, float eps"
_WEIGHT = "Tensor weight, Tensor? scale, bool is_fp8"
_BEST = "Tensor(a!) best_logit, Tensor(b!) best_token"

_define(
    f"step_norm_linear({_NORM}, {_WEIGHT}, Tensor(a!) y)",
    lambda x, norm, eps, w, scale, is_fp8, y: linear.norm_linear(x, norm, eps, Weight.of(w, scale, is_fp8), y),
)
_define(
    f"step_norm_gated_linear({_NORM}, {_WEIGHT}, Tensor(a!) y)",
    lambda x, norm, eps, w, scale, is_fp8, y: linear.norm_gated_linear(x, norm, eps, Weight.of(w, scale, is_fp8), y),
)
_define(
    f"step_linear_add(Tensor x, {_WEIGHT}, Tensor(a!) y)",
    lambda x, w, scale, is_fp8, y: linear.linear_add(x, Weight.of(w, scale, is_fp8), y),
)
_define(
    "step_attend(Tensor qkv, Tensor q_norm, Tensor k_norm, float eps, Tensor cos, Tensor sin, Tensor position, "
    "Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "Tensor(e!) values, Tensor(f!) maximum, Tensor(g!) total, Tensor(h!) y)",
    lambda *args: attention.attend(*(*args[:11], attention.Splits(*args[11:14]), args[14])),
)
_define(
    f"step_embed(Tensor token, {_WEIGHT}, Tensor(a!) x)",
    lambda token, w, scale, is_fp8, x: tail.embed(token, Weight.of(w, scale, is_fp8), x),
)
_define(
    f"step_vocabulary({_NORM}, {_WEIGHT}, {_BEST}, Tensor(c!)? logits)",
    lambda x, norm, eps, w, scale, is_fp8, logit, token, logits: tail.vocabulary(
        x, norm, eps, Weight.of(w, scale, is_fp8), tail.Best(logit, token), logits
    ),
)
_define(
    "step_choose(Tensor best_logit, Tensor best_token, Tensor advance, Tensor(a!) input, Tensor(b!) output, "
    "Tensor(c!) position, Tensor(d!) step)",
    lambda logit, token, *state: tail.choose(tail.Best(logit, token), *state),
)
_define(
    f"step_best(Tensor logits, Tensor largest, Tensor state, Tensor sums, {_BEST})",
    lambda logits, *work: sample.best_of(logits, sample.Draw(*work)),
)
_define(
    "step_draw(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor step, "
    "Tensor(c!) largest, Tensor(d!) state, Tensor(e!) sums, " + _BEST + ")",
    lambda *args: sample.draw(*(*args[:7], sample.Draw(*args[7:]))),
)
