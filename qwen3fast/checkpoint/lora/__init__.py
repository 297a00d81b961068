"""LoRA adapters in PEFT's layout, merged into a model's weights while loading: running costs nothing more.

Read config.py (adapter_config.json), patterns.py (regular expressions in it), match.py (tensors to modules), merge.py.
"""

from qwen3fast.checkpoint.lora.config import LoraConfig
from qwen3fast.checkpoint.lora.merge import merge_lora

__all__ = ["LoraConfig", "merge_lora"]
