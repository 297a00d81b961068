"""One model over several processes (tensor parallelism): shard.py, process_group.py, layers.py, in this order.

The model files do not know about it: each rank builds a smaller Qwen3, with some of the heads, some neurons of the
feed-forward layers and some of the vocabulary, and three wrappers exchange the results.
Source: Megatron-LM, arXiv:1909.08053, section 3.
"""

from qwen3fast.parallel.layers import connect
from qwen3fast.parallel.process_group import Ranks
from qwen3fast.parallel.shard import Split

__all__ = ["Ranks", "Split", "connect"]
