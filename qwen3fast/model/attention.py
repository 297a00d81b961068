"""Grouped-query attention with QK-norm, over the tokens of a call or over a KV cache.

B batch rows   T tokens in this call   L cache positions read
H query heads   K key/value heads   G = H/K query heads per group   D head_dim   E hidden_size
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qwen3fast.kernels.attention import cached_attention
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import CacheLayer
from qwen3fast.model.linears import linears
from qwen3fast.model.norm import RMSNorm
from qwen3fast.model.rope import apply_rope


class Attention(nn.Module):
    """Causal self-attention in which G query heads share one key/value head.

    Queries and keys are RMS-normalized per head (QK-norm) *before* RoPE. After RoPE, the norm's weight, one number per
    channel, would distort the rotated pairs: a mistake that changes logits so little that only tight tests find it.
    Source: grouped queries arXiv:2305.13245; QK-norm and shapes: Qwen3 technical report, arXiv:2505.09388, section 2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BTE: Tensor,
        cos_BTD: Tensor,
        sin_BTD: Tensor,
        position_BT: Tensor | None = None,
        mask_BTL: Tensor | None = None,
        cache: CacheLayer | None = None,
    ) -> Tensor:
        """Return the attention's output, (B, T, E), in which each token sees the tokens up to itself.

        Without a cache, it is causal attention over the T tokens of the call. With a cache, keys and values are first
        written at position_BT (int64), and `cached_attention` then reads the cache.

        x_BTE: normalized input. cos_BTD, sin_BTD: float32, rows of `rope_tables` at the tokens' positions.
        mask_BTL: bool, True where token t may see position l of the cache; None where attention on this device finds
        that out from position_BT.
        """
        B, T, _ = x_BTE.shape
        q, k, v = linears(x_BTE, self.q_proj, self.k_proj, self.v_proj)
        q_BTHD = self.q_norm(q.view(B, T, self.num_heads, self.head_dim))
        k_BTKD = self.k_norm(k.view(B, T, self.num_kv_heads, self.head_dim))
        v_BTKD = v.view(B, T, self.num_kv_heads, self.head_dim)
        q_BTHD, k_BTKD = apply_rope(q_BTHD, cos_BTD, sin_BTD), apply_rope(k_BTKD, cos_BTD, sin_BTD)
        if cache is None:
            y_BHTD = self.causal(*(x.transpose(1, 2) for x in (q_BTHD, k_BTKD, v_BTKD)))
        else:
            assert position_BT is not None, "a cache needs positions"
            cache.write(k_BTKD, v_BTKD, position_BT)
            y_BHTD = cached_attention(q_BTHD, cache, position_BT, mask_BTL)
        y_BTE: Tensor = self.o_proj(y_BHTD.transpose(1, 2).reshape(B, T, self.num_heads * self.head_dim))
        return y_BTE

    def causal(self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        """Return attention in which each token sees the tokens up to itself, (B, H, T, D)."""
        return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)
