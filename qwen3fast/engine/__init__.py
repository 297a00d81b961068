"""How a step runs: threads.py, record.py, compile.py, parts.py, prefill.py, decode.py, decode_layers.py, cuda_graph.py,
token_ring.py, engine.py, distributed.py and last_token.py, in this order."""

from qwen3fast.engine.decode import StepKind
from qwen3fast.engine.distributed import lead_or_follow
from qwen3fast.engine.engine import Engine

__all__ = ["Engine", "StepKind", "lead_or_follow"]
