"""Linear layers that other software quantized (fp8, AWQ, GPTQ, compressed-tensors) -> plain weights, or our formats.

format.py and compressed_config.py read `quantization_config`; fp8.py, awq.py, gptq.py and compressed_tensors.py read
the tensors of one layer, layer.py converts it, and collect.py gathers the tensors of each layer.
"""
