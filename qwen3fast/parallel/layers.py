"""Three wrappers that make a rank's smaller layers return the results of the whole layers.

B batch   T tokens   E hidden_size   V vocabulary   P part of the vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3fast.model import MoE, Qwen3
from qwen3fast.parallel.process_group import Ranks
from qwen3fast.parallel.shard import Split


class SumOverRanks(nn.Module):
    """A layer that has some of its inputs, or of its experts' neurons: the outputs of all ranks are added."""

    def __init__(self, layer: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.layer, self.ranks = layer, ranks

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Return the whole layer's output, on every rank."""
        return self.ranks.sum(self.layer(x_BTE))


class EmbeddingOverRanks(nn.Module):
    """A token embedding: the rank that holds a token's row contributes it, the others contribute zeros."""

    def __init__(self, embedding: nn.Module, vocabulary: slice, ranks: Ranks) -> None:
        super().__init__()
        self.embedding, self.vocabulary, self.ranks = embedding, vocabulary, ranks

    def forward(self, token_BT: Tensor) -> Tensor:
        """Return the embeddings of token_BT, int64 ids of the whole vocabulary: (B, T, E)."""
        first, end = self.vocabulary.start, self.vocabulary.stop
        is_own_BT = (token_BT >= first) & (token_BT < end)
        x_BTE = self.embedding(torch.where(is_own_BT, token_BT - first, 0))
        return self.ranks.sum(torch.where(is_own_BT[..., None], x_BTE, 0))


class LogitsOverRanks(nn.Module):
    """An output projection: each rank computes the logits of its tokens, and receives the others.

    All ranks get the same bits, and their samplers choose the same tokens.
    """

    def __init__(self, projection: nn.Module, vocab_size: int, ranks: Ranks) -> None:
        super().__init__()
        self.projection, self.vocab_size, self.ranks = projection, vocab_size, ranks

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, (B, T, V)."""
        logits_BTP = self.projection(x_BTE)
        logits_NV = self.ranks.gather(logits_BTP.flatten(0, 1), self.vocab_size)
        return logits_NV.view(*x_BTE.shape[:2], self.vocab_size)


def connect(model: Qwen3, split: Split, ranks: Ranks) -> None:
    """Put the wrappers into this rank's shard of a model, after its weights are loaded (and quantized)."""
    for name, module in list(model.named_modules()):
        if ranks.rank > 0 and name.endswith("o_proj") and module.bias is not None:
            module.bias.zero_()  # only one rank adds it
        if name.endswith((".self_attn.o_proj", ".mlp.down_proj")) or isinstance(module, MoE):
            model.set_submodule(name, SumOverRanks(module, ranks))
    model.set_submodule("model.embed_tokens", EmbeddingOverRanks(model.model.embed_tokens, split.vocabulary, ranks))
    model.set_submodule("lm_head", LogitsOverRanks(model.lm_head, split.config.vocab_size, ranks))
