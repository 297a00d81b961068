"""How a step runs. Read dynamic_sizes.py, compile.py, parts.py, prefill.py, decode.py, decode_layers.py, cuda_graph.py,
token_ring.py, engine.py and distributed.py in this order; threads.py, staging.py and last_token.py stand alone."""

from qwen3fast.engine.decode import StepKind
from qwen3fast.engine.distributed import lead_or_follow
from qwen3fast.engine.engine import Engine

__all__ = ["Engine", "StepKind", "lead_or_follow"]
