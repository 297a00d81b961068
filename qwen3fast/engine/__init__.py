"""How steps run: record.py, compile.py, parts.py, prefill.py, decode.py, decode_layers.py, cuda_graph.py,
token_ring.py, engine.py, leading.py, request.py, kept_rows.py, scheduler.py, runner.py, admission.py, uncached.py, in
this order."""

from qwen3fast.engine.admission import Admission, QueueFullError
from qwen3fast.engine.decode import StepKind
from qwen3fast.engine.engine import Engine
from qwen3fast.engine.leading import lead_or_follow
from qwen3fast.engine.request import Request
from qwen3fast.engine.runner import ClosedError, Runner
from qwen3fast.engine.scheduler import Scheduler
from qwen3fast.engine.uncached import UncachedRun, run_uncached

__all__ = [
    "Admission",
    "ClosedError",
    "Engine",
    "QueueFullError",
    "Request",
    "Runner",
    "Scheduler",
    "StepKind",
    "UncachedRun",
    "lead_or_follow",
    "run_uncached",
]
