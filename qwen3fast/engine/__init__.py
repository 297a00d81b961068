"""How a step runs.

Read dynamic_sizes.py, compile.py, parts.py, prefill.py, state.py, decode.py, decode_layers.py, cuda_graph.py,
in_flight.py, rows.py, engine.py and distributed.py, in this order; threads.py, staging.py and
last_token.py stand alone.
"""

from qwen3fast.engine.distributed import lead_or_follow
from qwen3fast.engine.engine import Engine
from qwen3fast.engine.state import RowSampling, StepKind

__all__ = ["Engine", "RowSampling", "StepKind", "lead_or_follow"]
