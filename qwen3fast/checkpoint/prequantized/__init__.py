"""Linear layers as others publish them quantised: fp8.py, awq.py and gptq.py say how the tensors of one layer are read,
layer.py what becomes of them, collect.py finds those of a layer together."""

from qwen3fast.checkpoint.prequantized.collect import PrequantizedLayers
from qwen3fast.checkpoint.prequantized.layer import PrequantizedLayer
from qwen3fast.checkpoint.prequantized.part import FLOATS

__all__ = ["FLOATS", "PrequantizedLayer", "PrequantizedLayers"]
