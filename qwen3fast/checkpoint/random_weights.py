"""Random weights in the exact shape of a Qwen3: its speed does not depend on their values."""

from __future__ import annotations

import torch

from qwen3fast.checkpoint.assign import OnAssigned, assign
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Split

STANDARD_DEVIATION = 0.02
# Attention sharper than with 1: replies then vary from token to token, and comparing tokens means something.
QK_NORM_WEIGHT = 1.5
POOL_SIZE = 2**24 + 43  # odd: rows of a matrix start at different places of the pool


def parse_random(source: str) -> tuple[ModelConfig, int]:
    """Return the config and the seed of "random:NAME" or "random:NAME:SEED".

    Raises: ValueError for an unknown name, or a seed that is not an integer.
    """
    name, _, seed = source.removeprefix("random:").partition(":")
    if seed and not seed.isdecimal():
        raise ValueError(f"{source!r}: the seed must be a whole number, as in 'random:0.6b:7'")
    return ModelConfig.named(name), int(seed or 0)


def random_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    on_assigned: OnAssigned | None = None,
    split: Split | None = None,
) -> Qwen3:
    """Return a Qwen3 with normal weights of standard deviation 0.02 (norm weights are 1, of QK-norm 1.5; biases 0).

    Values are read cyclically from a pool of 16.8 million normal numbers, each tensor from its own start: drawing every
    weight would take several times longer and measure the same.
    on_assigned: called after each parameter. split: keep this shard of each tensor.
    """
    rng = torch.Generator().manual_seed(seed)
    pool = (torch.randn(POOL_SIZE, generator=rng, device="cpu") * STANDARD_DEVIATION).to(device, dtype)
    whole = build_on_meta(config)
    model = whole if split is None else split.build_on_meta()
    for name, parameter in list(whole.named_parameters()):
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() >= 2:
            _fill_cyclically(tensor.view(-1), pool, int(torch.randint(POOL_SIZE, (), generator=rng, device="cpu")))
        else:
            is_qk_norm = name.endswith(("q_norm.weight", "k_norm.weight"))
            tensor.fill_(0.0 if name.endswith("bias") else QK_NORM_WEIGHT if is_qk_norm else 1.0)
        if split is not None:
            tensor = split.take(name, tensor).clone()  # not a view: the rest is to be freed
        assign(model, name, tensor, on_assigned)
    model.tie_weights()
    return model


def _fill_cyclically(target: torch.Tensor, pool: torch.Tensor, start: int) -> None:
    done = 0
    while done < target.numel():
        take = min(target.numel() - done, POOL_SIZE - start)
        target[done : done + take] = pool[start : start + take]
        done, start = done + take, 0
