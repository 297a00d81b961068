"""Greedy tokens against the plain model in float32: wrong tokens, not differences of rounding.

B batch rows   T tokens   E hidden_size   N checked tokens   V vocabulary
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from qwen3fast.bench.measure import TokenCheck, check_tokens
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.quantization.layers import QuantizedLinear


def check_against_float32(model: Qwen3, prompts: list[list[int]], token_ids: list[list[int]]) -> dict[str, Any]:
    """Check greedy tokens against float32 logits of the same weights on the same sequences.

    Returns: the fields of `TokenCheck` (gaps as a share of the largest logit), whether it `passed`, and
    `worst_gap_own_dtype`, the gap below the plain model in its own dtype, for comparison. The tolerance is the dtype's.
    """
    own = check_tokens(model, prompts, token_ids)
    tokens = exact = 0
    worst = 0.0
    for prompt, ids in zip(prompts, token_ids, strict=True):
        logits_NV = float32_logits(model, prompt + ids[:-1], len(ids))
        best_N = logits_NV.amax(dim=-1)
        chosen_N = logits_NV.gather(1, torch.tensor(ids, device=logits_NV.device)[:, None])[:, 0]
        tokens += len(ids)
        exact += int((chosen_N == best_N).sum())
        worst = max(worst, float(((best_N - chosen_N) / logits_NV.abs().amax(dim=-1)).max()))
    check = TokenCheck(tokens, exact, worst, own.tolerance)
    return asdict(check) | {"passed": check.passed, "reference": "float32", "worst_gap_own_dtype": own.worst_gap}


@torch.no_grad()
def float32_logits(model: Qwen3, token_ids: list[int], last: int) -> Tensor:
    """Return the plain model's logits at the last positions, (last, V), computed in float32.

    Weights are converted layer by layer, so a model needs no second copy of all of them. last: how many positions.
    """
    config, device = model.config, model.model.norm.weight.device
    token_1T = torch.tensor([token_ids], device=device)
    cos_TD, sin_TD = rope_tables(config.head_dim, config.rope_theta, len(token_ids), device, config.yarn)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        x_1TE = model.embed(token_1T).float()
        for block in model.model.layers:
            x_1TE = in_float32(block)(x_1TE, cos_TD[None], sin_TD[None])
        head = in_float32(nn.Sequential(model.model.norm, model.lm_head))
        return head(x_1TE[:, -last:])[0]
    finally:
        torch.set_float32_matmul_precision(precision)


def in_float32(module: nn.Module) -> nn.Module:
    """Return a copy in float32, quantized layers replaced by plain ones of the weights that their bits stand for."""
    copied = copy.deepcopy(module).float()
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.dequantize().float(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = layer.bias
            copied.set_submodule(name, plain)
    return copied
