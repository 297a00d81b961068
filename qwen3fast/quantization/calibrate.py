"""Quantize a model to 4 bits with calibration text: the inputs that its layers see there decide about corrections.

Blocks are quantized one after another. Their inputs come from the unquantized model, which runs each block once.
Experts, and layers whose shape cannot be packed, are treated as `quantize_model` does.

B windows   T tokens of a window   K in_features   E hidden_size
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from qwen3fast.kernels.cpu.levels import processor_features
from qwen3fast.model import MoE, Qwen3, rope_tables
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS, Format, fits
from qwen3fast.quantization.gptq import feedback, quantize_with
from qwen3fast.quantization.layers import QuantizedLinear

CALIBRATED = ("int4", "uint4")
DAMPING = 0.01
TIED_DAMPING = 0.3  # the rows of a tied output projection are embeddings, too: their own error counts for more
TOKENS_AT_ONCE = 2048
SIDE = 512  # of the blocks in which products of inputs are computed
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's
Function = Callable[[Tensor], Any]


@torch.no_grad()
def quantize_calibrated(model: Qwen3, token_BT: Tensor, name: str = "int4", progress: bool = False) -> None:
    """Quantize a model's linear layers and embedding to 4 bits, in place, with errors corrected on calibration text.

    token_BT: int64 ids of B windows of text. name: a format in CALIBRATED. progress: show a bar.
    The result has the layers of `quantize_model(model, name, ...)`, with other numbers in them.
    Raises: ValueError for another format.
    """
    if name not in CALIBRATED:
        raise ValueError(f"only {' and '.join(CALIBRATED)} are calibrated, not {name}")
    format = FORMATS[name]
    config, norm = model.config, model.model.norm
    T, device = token_BT.shape[1], norm.weight.device
    dtype = fast_dtype(norm.weight.dtype, device)
    cos_TD, sin_TD = rope_tables(config.head_dim, config.rope_theta, T, device, config.yarn)
    inputs = [model.embed(some_BT).to(dtype) for some_BT in token_BT.split(max(1, TOKENS_AT_ONCE // T))]
    for block in tqdm(model.model.layers, desc=f"quantizing to {name}", unit="block", disable=not progress):
        exact = block if dtype == norm.weight.dtype else copy.deepcopy(block).to(dtype)
        run = partial(exact, cos_BTD=cos_TD[None], sin_BTD=sin_TD[None])
        inputs = _correct_block(block, exact, run, inputs, format)
    lm_head = model.lm_head
    if isinstance(lm_head, nn.Linear) and fits(*lm_head.weight.shape):
        moment = SecondMoment()
        for x_BTE in inputs:
            moment.add(norm(x_BTE.to(norm.weight.dtype)))
        factor = feedback(moment.upper(), TIED_DAMPING if config.tie_word_embeddings else DAMPING)
        model.set_submodule("lm_head", QuantizedLinear(quantize_with(lm_head.weight, format, factor, dtype), format))
    quantize_model(model, name, norm.weight.dtype)


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute a model's blocks in: its own, except on CPUs without instructions for it, float32."""
    is_fast = device.type != "cpu" or (
        dtype == torch.bfloat16 and not BF16_FEATURES.isdisjoint(processor_features().split())
    )
    return dtype if is_fast else torch.float32


def _correct_block(
    block: nn.Module, exact: nn.Module, run: Function, inputs: list[Tensor], format: Format
) -> list[Tensor]:
    """Quantize the linear layers of a block, except routers. Returns: the outputs of the unquantized block.

    exact: the block, or a copy of it in another dtype. run: calls it on some windows' input.
    """
    routers = {module.gate for module in block.modules() if isinstance(module, MoE)}
    layers: dict[str, nn.Linear] = {
        name: layer
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear) and layer not in routers and fits(*layer.weight.shape)
    }
    outputs: list[Tensor] = []
    moments = second_moments({n: exact.get_submodule(n) for n in layers}, lambda x: outputs.append(run(x)), inputs)
    factors: dict[SecondMoment, Tensor] = {}
    for name, layer in layers.items():
        moment = moments[name]
        if moment not in factors:
            factors = {moment: feedback(moment.upper(), DAMPING)}  # layers with the same input follow each other
        packed = quantize_with(layer.weight, format, factors[moment], outputs[0].dtype)
        block.set_submodule(name, QuantizedLinear(packed, format, layer.bias))
    return outputs


class SecondMoment:
    """The mean over tokens of the products of each two channels of an input."""

    def __init__(self) -> None:
        self._sum_KK, self._tokens = torch.empty(0), 0

    def add(self, x: Tensor) -> None:
        """Count the tokens of an input, (..., K)."""
        x_MK = x.reshape(-1, x.shape[-1]).float()
        M, K = x_MK.shape
        if not self._tokens:
            self._sum_KK = torch.zeros(K, K, dtype=torch.float32, device=x.device)
        self._tokens += M
        for begin in range(0, K, SIDE):  # above the diagonal: the other half mirrors it
            rows = slice(begin, begin + SIDE)
            self._sum_KK[rows, begin:].addmm_(x_MK[:, rows].T, x_MK[:, begin:])

    def upper(self) -> Tensor:
        """Return the mean, (K, K) float32; below the diagonal, the numbers are arbitrary."""
        return self._sum_KK / max(self._tokens, 1)


def second_moments(layers: dict[str, nn.Module], run: Function, inputs: list[Tensor]) -> dict[str, SecondMoment]:
    """Return each layer's moment of its input. Layers that are called in a row with one tensor share theirs."""
    moments: dict[str, SecondMoment] = {}
    last: tuple[Tensor, SecondMoment] | None = None

    def add(name: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and last[0] is x:
            moments[name] = last[1]
            return
        last = x, moments.setdefault(name, SecondMoment())
        last[1].add(x)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name, layer in layers.items()
    ]
    try:
        for x_BTE in inputs:
            run(x_BTE)
    finally:
        for hook in hooks:
            hook.remove()
    return moments
