"""The whole model: token embedding, blocks, final norm, output projection.

B batch rows   T tokens   E hidden_size   D head_dim   V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qwen3fast.model.block import Block
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.moe import MoE
from qwen3fast.model.norm import RMSNorm
from qwen3fast.model.rope import rope_tables


class Qwen3Body(nn.Module):
    """The layers below the output projection, under the names that checkpoints use (`model.*`).

    It has no forward: `Qwen3.hidden`, and the engine with its cache, run the layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(nn.Module):
    """A Qwen3 language model. `forward` is the reference: no cache, no compilation, every token computed.

    The engine runs the same parts (`embed`, `model.layers`, `logits`) with a KV cache.
    Source: Qwen3 technical report, arXiv:2505.09388.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding's matrix with the output projection where the config says so (0.6B, 1.7B and 4B)."""
        if self.config.tie_word_embeddings:
            for name, parameter in self.model.embed_tokens.named_parameters():
                setattr(self.lm_head, name, parameter)

    def embed(self, token_BT: Tensor) -> Tensor:
        """Return the embeddings of token_BT, int64 ids: (B, T, E)."""
        x_BTE: Tensor = self.model.embed_tokens(token_BT)
        return x_BTE

    def logits(self, x_BTE: Tensor) -> Tensor:
        """Apply final norm and output projection: a score per token of the vocabulary, (B, T, V)."""
        logits_BTV: Tensor = self.lm_head(self.model.norm(x_BTE))
        return logits_BTV

    def hidden(self, token_BT: Tensor) -> Tensor:
        """Return the last block's output, before the final norm, (B, T, E), computed without a cache.

        token_BT: int64 ids, from position 0 on.
        """
        _, T = token_BT.shape
        cos_TD, sin_TD = rope_tables(self.config.head_dim, self.config.rope_theta, T, token_BT.device, self.config.yarn)
        x_BTE = self.embed(token_BT)
        for block in self.model.layers:
            x_BTE = block(x_BTE, cos_TD[None], sin_TD[None])
        return x_BTE

    def forward(self, token_BT: Tensor) -> Tensor:
        """Return the logits of the next token at each position, (B, T, V). token_BT: int64 ids."""
        return self.logits(self.hidden(token_BT))

    def num_bytes(self, per_token: bool = False) -> int:
        """Return the bytes of all weights.

        per_token: count only the weights that a decode step at batch size 1 reads, without an untied embedding (one
        row of it is read) and without inactive experts.
        """
        total = sum(p.numel() * p.element_size() for p in self.parameters())
        if per_token and not self.config.tie_word_embeddings:
            total -= sum(p.numel() * p.element_size() for p in self.model.embed_tokens.parameters())
        if per_token:
            experts = [p for m in self.modules() if isinstance(m, MoE) for p in m.experts.parameters()]
            idle = self.config.num_experts - self.config.num_experts_per_tok
            total -= sum(p.numel() // self.config.num_experts * p.element_size() * idle for p in experts)
        return total


def build_on_meta(config: ModelConfig) -> Qwen3:
    """Return a model without memory: its parameters are on the `meta` device until tensors are assigned."""
    with torch.device("meta"), _SkipInit():
        return Qwen3(config).to(config.dtype).eval().requires_grad_(False)


class _SkipInit(TorchFunctionMode):
    """A mode that skips `torch.nn.init`: on meta tensors it has no effect, but imports slow modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))
