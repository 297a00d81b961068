"""Quantize a model to int4 with calibration text: the inputs that its layers see there decide how errors are corrected.

Blocks are quantized one after another, each with the inputs that the quantized blocks before it give. Experts, and
layers whose shape cannot be packed, are treated as `quantize_model` does.

B windows   T tokens of a window   K in_features   E hidden_size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from qwen3fast.model import MoE, Qwen3, rope_tables
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS, fits
from qwen3fast.quantization.gptq import quantize_int4_with
from qwen3fast.quantization.layers import QuantizedLinear

DAMPING = 0.01
TIED_DAMPING = 0.3  # the rows of a tied output projection are embeddings, too: their own error counts for more
Function = Callable[[Tensor], Tensor]


@torch.no_grad()
def quantize_calibrated(model: Qwen3, token_BT: Tensor, progress: bool = False) -> None:
    """Quantize a model's linear layers and embedding to int4, in place, with errors corrected on calibration text.

    token_BT: int64 ids of B windows of text. progress: show a bar.
    The result has the layers of `quantize_model(model, "int4", ...)`, with other numbers in them.
    """
    config, norm = model.config, model.model.norm.weight
    cos_TD, sin_TD = rope_tables(config.head_dim, config.rope_theta, token_BT.shape[1], norm.device, config.yarn)
    inputs = [model.embed(window[None]) for window in token_BT]
    for block in tqdm(model.model.layers, desc="quantizing to int4", unit="block", disable=not progress):
        inputs = _correct_block(block, inputs, cos_TD[None], sin_TD[None])
    head = nn.ModuleDict({"lm_head": model.lm_head})
    damping = TIED_DAMPING if config.tie_word_embeddings else DAMPING
    _correct_layers(head, lambda x_1TE: head["lm_head"](model.model.norm(x_1TE)), inputs, damping)
    model.set_submodule("lm_head", head["lm_head"])
    quantize_model(model, "int4", norm.dtype)


def _correct_block(block: nn.Module, inputs: list[Tensor], cos_1TD: Tensor, sin_1TD: Tensor) -> list[Tensor]:
    """Quantize a block's layers. inputs: (1, T, E) per window. Returns: the quantized block's outputs."""

    def run(x_1TE: Tensor) -> Tensor:
        y_1TE: Tensor = block(x_1TE, cos_1TD, sin_1TD)
        return y_1TE

    _correct_layers(block, run, inputs, DAMPING)
    return [run(x_1TE) for x_1TE in inputs]


def _correct_layers(parent: nn.Module, run: Function, inputs: list[Tensor], damping: float) -> None:
    """Quantize the linear layers inside a module, except routers. run: calls the module, on one window's input."""
    routers = {module.gate for module in parent.modules() if isinstance(module, MoE)}
    layers: dict[str, nn.Linear] = {
        name: layer
        for name, layer in parent.named_modules()
        if isinstance(layer, nn.Linear) and layer not in routers and fits(*layer.weight.shape)
    }
    moments = second_moments(layers, run, inputs)
    for name, layer in layers.items():
        packed = quantize_int4_with(layer.weight, moments[name], damping)
        parent.set_submodule(name, QuantizedLinear(packed, FORMATS["int4"], layer.bias))


def second_moments(layers: dict[str, nn.Linear], run: Function, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Return, for each layer, the mean over all tokens of the products of its input channels, (K, K) float32."""
    sums: dict[str, Tensor] = {}
    tokens = sum(x_1TE.shape[1] for x_1TE in inputs)
    last: tuple[Tensor, Tensor] | None = None  # an input and its product: layers that share an input run in a row

    def add(name: str, x: Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not x:
            x_MK = x.reshape(-1, x.shape[-1]).float()
            last = x, x_MK.T @ x_MK
        sums[name] = sums[name] + last[1] if name in sums else last[1]

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name, layer in layers.items()
    ]
    try:
        for x_1TE in inputs:
            run(x_1TE)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / tokens for name, total in sums.items()}
