"""LoRA adapters in PEFT's layout: merged into a model's weights while loading, or read to be applied at run time.

Read config.py (adapter_config.json), patterns.py (regular expressions in it), files.py, match.py (tensors to modules),
then merge.py or unmerged.py.
"""
