"""The Qwen3 architecture, one part per file: norm, rope, attention, feed_forward, moe, block, qwen3 (in this order).

Beside them: the numbers that define a model (config, yarn), the KV cache (kv_cache), and two helpers for layers that
read the same input (linears, stacking).
"""

from qwen3fast.model.attention import Attention
from qwen3fast.model.block import Block
from qwen3fast.model.feed_forward import FeedForward
from qwen3fast.model.moe import MoE
from qwen3fast.model.norm import RMSNorm
from qwen3fast.model.qwen3 import Qwen3, build_on_meta
from qwen3fast.model.rope import apply_rope, rope_tables

__all__ = [
    "Attention",
    "Block",
    "FeedForward",
    "MoE",
    "Qwen3",
    "RMSNorm",
    "apply_rope",
    "build_on_meta",
    "rope_tables",
]
