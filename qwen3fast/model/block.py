"""One transformer block: attention, then feed-forward; each reads a normalized copy of x and adds its output to x."""

from __future__ import annotations

from torch import Tensor, nn

from qwen3fast.model.attention import Attention
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.feed_forward import FeedForward
from qwen3fast.model.kv_cache import CacheLayer
from qwen3fast.model.moe import MoE
from qwen3fast.model.norm import RMSNorm


class Block(nn.Module):
    """A pre-norm residual block. layer: its index in the model, from 0; it decides between experts and a dense layer.

    Source: Xiong et al., arXiv:2002.04745 (pre-norm); Qwen3 report, arXiv:2505.09388.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_sparse(layer) else FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BTE: Tensor,
        cos_BTD: Tensor,
        sin_BTD: Tensor,
        position_BT: Tensor | None = None,
        mask_BTL: Tensor | None = None,
        cache: CacheLayer | None = None,
    ) -> Tensor:
        """Return the block's output, (B, T, E). x_BTE: the same shape; other arguments: as in `Attention.forward`."""
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), cos_BTD, sin_BTD, position_BT, mask_BTL, cache)
        x_BTE = x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
        return x_BTE
