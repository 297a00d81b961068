"""Scheduling of requests onto the slots of the KV cache.

Read prompt.py, request.py, prefix_cache.py, first_token.py, scheduler.py, worker.py, admission.py, uncached.py,
reply.py, handle.py, dispatch.py and builder.py, in this order.
"""

from qwen3fast.scheduling.admission import Admission, QueueFullError
from qwen3fast.scheduling.dispatch import Dispatcher
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler
from qwen3fast.scheduling.uncached import run_uncached
from qwen3fast.scheduling.worker import ClosedError, EngineWorker

__all__ = [
    "Admission",
    "ClosedError",
    "Dispatcher",
    "EngineWorker",
    "QueueFullError",
    "Request",
    "Scheduler",
    "run_uncached",
]
