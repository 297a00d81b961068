"""Read a LoRA adapter without merging it: the two thin matrices of each module, to be applied while the model runs.

N out_features   K in_features   R rank
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen3fast.checkpoint.checks import refuse
from qwen3fast.checkpoint.lora.config import LoraConfig
from qwen3fast.checkpoint.lora.files import find_adapter, refuse_numbers
from qwen3fast.checkpoint.lora.match import SAVED_NAME, TENSOR_NAME, match_tensors
from qwen3fast.checkpoint.safetensors import open_tensors
from qwen3fast.model import Qwen3
from qwen3fast.quantization.layers import QuantizedLinear

MERGE = "merge this adapter instead: from_pretrained(..., adapter=...), or its folder as --model of serve"


def read_lora(
    source: str | Path, model: Qwen3, adaptable: Collection[str], max_rank: int, check_weights: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (R, K), and scale * B (N, R), float32 on the CPU, by the name of each adapted module.

    The model, which does not change, may be quantized.

    source: a folder in PEFT's layout, or a hub id. adaptable: the modules that may have an adapter at run time.
    max_rank: the largest rank that there is room for. check_weights: refuse NaN and infinity.
    Raises: FileNotFoundError for missing files; ValueError for unsupported features, for other modules than the
    adaptable ones, for a rank above max_rank, and for tensors that are missing, unexpected, misshaped or of a wrong
    dtype, all named in one message.
    """
    config, file = find_adapter(source)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)}
    layers = {name: linear[name] for name in adaptable}
    with open_tensors(file) as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        refuse(_only_merged(config, model, adaptable, shapes), f"the adapter changes more than linear layers; {MERGE}")
        adapters = match_tensors(config, layers, shapes)
        too_large = [f"{a.module}: rank {shapes[a.a][0]}" for a in adapters if shapes[a.a][0] > max_rank]
        refuse(too_large, f"the adapter's rank exceeds max_adapter_rank {max_rank}, which the Generator was built with")
        refuse_numbers(tensors, list(shapes), file, check_weights)
        return {
            adapter.module: (
                tensors.get_tensor(adapter.a).to(torch.float32),
                tensors.get_tensor(adapter.b).to(torch.float32) * adapter.scale,
            )
            for adapter in adapters
        }


def largest_rank(source: str | Path) -> int:
    """Return the largest rank that an adapter's config names. Raises: as `read_lora`, for the config."""
    config, _ = find_adapter(source)
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r


def _only_merged(config: LoraConfig, model: Qwen3, adaptable: Collection[str], names: Collection[str]) -> list[str]:
    """Return the parts of an adapter that only a merged one can have, each with its problem."""
    modules = {name for name, _ in model.named_modules()}
    problems = [f"{module}: in modules_to_save" for module in sorted(modules) if config.saves(module)]
    for name in names:
        match = TENSOR_NAME.fullmatch(name) or SAVED_NAME.fullmatch(name)
        own = match[1] if match is not None else ""
        full = own if own in modules else f"model.{own}"
        if full in modules and full not in adaptable:
            problems.append(f"{name}: {full} is not a linear layer of a block's attention or feed-forward part")
    return problems
