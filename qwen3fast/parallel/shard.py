"""Split: the shard of each weight that a rank holds. Only arithmetic; nothing here communicates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig

# The dimension that a layer's weight (out, in) is split along. Split by outputs ("column-wise"), each rank computes
# some outputs from all inputs: whole heads, or whole neurons. The next layer, split by inputs ("row-wise"), reads these
# without communication; its outputs must be summed over all ranks.
SPLIT_DIM = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "embed_tokens": 0,
    "lm_head": 0,
}
STACKED_SPLIT_DIM = {"gate_up_proj": 1, "down_proj": 2}  # of `Experts`, which come first


def split_dim(name: str) -> int | None:
    """Return the dimension that a tensor is split along; None if each rank holds it whole.

    name: of a parameter or of a checkpoint's tensor. The result means DTensor's Shard(dim), or Replicate() for None.
    """
    *_, module, parameter = name.split(".")
    if module == "experts":
        return STACKED_SPLIT_DIM[parameter]
    dim = SPLIT_DIM.get(module)
    return None if dim == 1 and parameter == "bias" else dim


@dataclass(frozen=True)
class Split:
    """The shard of rank `rank` of `size` of a model with this config.

    Raises: ValueError, when built, if the model cannot be split into so many shards.
    """

    config: ModelConfig
    rank: int
    size: int

    def __post_init__(self) -> None:
        c = self.config
        names = ["num_key_value_heads", "intermediate_size", *(["moe_intermediate_size"] if c.num_experts else [])]
        sizes = {name: getattr(c, name) for name in names}  # query heads are a multiple of key/value heads
        for name, value in sizes.items():
            if value % self.size:
                possible = [n for n in range(1, c.num_key_value_heads + 1) if all(v % n == 0 for v in sizes.values())]
                raise ValueError(
                    f"{name} ({value}) cannot be split over {self.size} processes; this model can be split over "
                    f"{', '.join(map(str, possible))}"
                )
        if self.vocabulary.start >= c.vocab_size:
            raise ValueError(f"vocab_size {c.vocab_size} is too small to be split over {self.size} processes")

    @property
    def vocabulary(self) -> slice:
        """The range of tokens whose rows of embedding and output projection this rank holds."""
        return self._own(self.config.vocab_size)

    @property
    def local_config(self) -> ModelConfig:
        """The config of this rank's shard. Its vocab_size is the whole one, as each rank gets all logits."""
        c = self.config
        return replace(
            c,
            num_attention_heads=c.num_attention_heads // self.size,
            num_key_value_heads=c.num_key_value_heads // self.size,
            intermediate_size=c.intermediate_size // self.size,
            moe_intermediate_size=c.moe_intermediate_size // self.size,
        )

    def build_on_meta(self) -> Qwen3:
        """Return this rank's shard on the `meta` device: an ordinary Qwen3 with smaller layers."""
        rows = self.vocabulary.stop - self.vocabulary.start
        model = build_on_meta(replace(self.local_config, vocab_size=rows))
        model.config = self.local_config
        return model

    def take(self, name: str, whole: Any) -> Tensor:
        """Return this rank's shard of a tensor, contiguous.

        whole: a Tensor, or a tensor in a file (safetensors' slice). Only the shard is copied; a contiguous shard is
        not copied but mapped.
        """
        dim = split_dim(name)
        if dim is None:
            every_element: Tensor = whole[:]
            return every_element
        shape = whole.shape if isinstance(whole, Tensor) else whole.get_shape()
        rows = [self._own(shape[dim])]
        if name.endswith("experts.gate_up_proj"):  # gate's, then up's
            half = shape[dim] // 2
            own = self._own(half)
            rows = [own, slice(own.start + half, own.stop + half)]
        every = (slice(None),) * dim
        parts = [whole[every + (r,)] for r in rows]  # noqa: RUF005  the other way needs Python 3.11
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=dim)

    def _own(self, size: int) -> slice:
        """Return the range of this rank, as in `torch.chunk` and DTensor's Shard: the last ranges may be smaller."""
        part = -(-size // self.size)
        return slice(min(self.rank * part, size), min((self.rank + 1) * part, size))
