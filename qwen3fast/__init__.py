"""qwen3fast: Qwen3 in readable PyTorch, made fast.

>>> from qwen3fast import Generator, SamplingParams
>>> with Generator.from_pretrained("tiny") as generator:
...     print(generator.chat([{"role": "user", "content": "What is 17 + 25?"}], enable_thinking=False).text)
42
"""

from qwen3fast._version import __version__
from qwen3fast.chat_session import ChatSession
from qwen3fast.checkpoint import load_model
from qwen3fast.embedder import Embedder
from qwen3fast.generator import Generator
from qwen3fast.model.config import ModelConfig
from qwen3fast.reranker import Reranker
from qwen3fast.results import GenerationResult, GeneratorStats, RequestMetrics, StreamChunk, TokenLogprobs
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling import QueueFullError
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.text.tool_calls import ToolCall

__all__ = [
    "ChatSession",
    "Embedder",
    "GenerationResult",
    "Generator",
    "GeneratorStats",
    "ModelConfig",
    "QueueFullError",
    "RequestHandle",
    "RequestMetrics",
    "Reranker",
    "SamplingParams",
    "StreamChunk",
    "TokenLogprobs",
    "ToolCall",
    "__version__",
    "load_model",
]
