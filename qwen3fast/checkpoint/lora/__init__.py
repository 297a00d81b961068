"""LoRA adapters in PEFT's layout: merged into a model's weights while loading, or read to be applied at run time.

Read config.py (adapter_config.json), patterns.py (regular expressions in it), files.py, match.py (tensors to modules),
then merge.py or unmerged.py.
"""

from qwen3fast.checkpoint.lora.config import LoraConfig
from qwen3fast.checkpoint.lora.merge import merge_lora
from qwen3fast.checkpoint.lora.unmerged import largest_rank, read_lora

__all__ = ["LoraConfig", "largest_rank", "merge_lora", "read_lora"]
