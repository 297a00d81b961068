"""How steps run: compile.py, parts.py, prefill.py, decode.py, cuda_graph.py, token_ring.py, engine.py,
scheduler.py, uncached.py, in this order."""

from qwen3fast.engine.engine import Engine
from qwen3fast.engine.scheduler import Request, Scheduler
from qwen3fast.engine.uncached import run_uncached

__all__ = ["Engine", "Request", "Scheduler", "run_uncached"]
