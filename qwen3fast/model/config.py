"""ModelConfig: the numbers that define a Qwen3, under Hugging Face's names.

checkpoint/hf_config.py reads them from a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qwen3fast.model.yarn import Yarn


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a Qwen3, dense or (num_experts > 0) with a mixture of experts.

    Attributes:
        head_dim: a field of its own: in Qwen3-0.6B it is 128, although hidden_size / num_attention_heads is 64.
        tie_word_embeddings: the output projection shares the embedding's matrix.
        dtype: of the weights, as the checkpoint stores them.
        eos_token_ids: end a reply; the Generator adds the ids in generation_config.json and in the tokenizer.
        yarn: the scaling of RoPE; None for none.
        num_experts, num_experts_per_tok: routed experts per layer, and active ones per token.
        norm_topk_prob: the weights of a token's active experts sum to 1.
        decoder_sparse_step, mlp_only_layers: every decoder_sparse_step-th layer that is not in mlp_only_layers has
            experts (`is_sparse`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 40_960
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    eos_token_ids: tuple[int, ...] = ()
    yarn: Yarn | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check all fields.

        Raises: ValueError naming the field, its value and what was expected.
        """
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim max_position_embeddings"
        )
        if self.num_experts != 0:
            sizes += " num_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step"
        for name in sizes.split():
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r:.100}")
            largest_size = _MAX_SIZES.get(name, 10**9)
            if value > largest_size:
                raise ValueError(f"{name} must be at most {largest_size:,}, far beyond any Qwen3, got {value!r:.100}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts ({self.num_experts})"
            )
        for name in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r:.100}")
        for name, largest in (("rms_norm_eps", 1.0), ("rope_theta", 1e15)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= largest:
                raise ValueError(f"{name} must be a positive number up to {largest:g}, got {value!r:.100}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if self.yarn is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 with YaRN, got {self.rope_theta!r}")

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """Return the config of a Qwen3 by its size.

        name: "0.6b", "1.7b", "4b", "8b", "14b", "32b", or with a mixture of experts "30b-a3b" or "235b-a22b"; upper or
        lower case.
        Raises: ValueError for any other name.
        """
        shape = _NAMED_SHAPES.get(name.lower())
        if shape is None:
            raise ValueError(f"unknown Qwen3 shape {name!r}; known shapes: {', '.join(_NAMED_SHAPES)}")
        layers, heads, kv_heads, hidden, intermediate, tied, *experts = shape
        num_experts, per_token, moe_intermediate = experts or (0, 0, 0)
        return cls(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=128,
            tie_word_embeddings=tied,
            eos_token_ids=(151_645,),
            num_experts=num_experts,
            num_experts_per_tok=per_token,
            moe_intermediate_size=moe_intermediate,
            norm_topk_prob=num_experts > 0,
        )

    def is_sparse(self, layer: int) -> bool:
        """Return whether the feed-forward part of a layer, counted from 0, is a mixture of experts."""
        is_chosen = layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        return self.num_experts > 0 and is_chosen

    @property
    def longest_context(self) -> int:
        """Return the number of positions that the model supports: max_position_embeddings, or more with YaRN."""
        return max(self.max_position_embeddings, self.yarn.longest_context if self.yarn is not None else 0)

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters; a tied output projection counts once."""
        outer = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return outer + sum(self._layer_size(layer, self.num_experts) for layer in range(self.num_hidden_layers))

    @property
    def decode_parameters(self) -> int:
        """Return the number of parameters that a decode step at batch size 1 reads.

        These are all except an untied embedding, of which it reads a single row, and experts that are not active.
        """
        outer = self.vocab_size * self.hidden_size + self.hidden_size
        return outer + sum(self._layer_size(layer, self.num_experts_per_tok) for layer in range(self.num_hidden_layers))

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Return the bytes of one position in a KV cache of `dtype`: keys and values of all layers.

        int8 vectors have a scale of 4 bytes each.
        """
        bytes_per_vector = self.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * self.num_hidden_layers * self.num_key_value_heads * bytes_per_vector

    def _layer_size(self, layer: int, experts: int) -> int:
        """Return the number of parameters of a layer; `experts` of its experts are counted, if it has any."""
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = (q_size + 2 * kv_size + self.hidden_size) if self.attention_bias else 0
        attention = self.hidden_size * (2 * q_size + 2 * kv_size) + 2 * self.head_dim + bias
        width, router = self.intermediate_size, 0
        if self.is_sparse(layer):
            width, router = experts * self.moe_intermediate_size, self.num_experts * self.hidden_size
        return attention + router + 3 * self.hidden_size * width + 2 * self.hidden_size


# A module is made for each of these, before any weight is read.
_MAX_SIZES = {"num_hidden_layers": 10_000, "num_experts": 100_000}

# layers, heads, kv heads, hidden_size, intermediate_size, tied; num_experts, num_experts_per_tok,
# moe_intermediate_size. Source: the published config.json files.
_NAMED_SHAPES: dict[str, tuple[Any, ...]] = {
    "0.6b": (28, 16, 8, 1024, 3072, True),
    "1.7b": (28, 16, 8, 2048, 6144, True),
    "4b": (36, 32, 8, 2560, 9728, True),
    "8b": (36, 32, 8, 4096, 12288, False),
    "14b": (40, 40, 8, 5120, 17408, False),
    "32b": (64, 64, 8, 5120, 25600, False),
    "30b-a3b": (48, 32, 4, 2048, 6144, False, 128, 8, 768),
    "235b-a22b": (94, 64, 4, 4096, 12288, False, 128, 8, 1536),
}
