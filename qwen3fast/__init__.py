"""qwen3fast: Qwen3 in readable PyTorch, made fast.

>>> from qwen3fast import Generator, SamplingParams
>>> with Generator.from_pretrained("tiny") as generator:
...     print(generator.chat([{"role": "user", "content": "What is 17 + 25?"}], enable_thinking=False).text)
42
"""

from importlib import import_module

from qwen3fast._version import __version__

# Public names and their modules, which are imported when a name is first used: importing PyTorch takes seconds, and
# the command line answers Ctrl-C meanwhile. Type checkers read __init__.pyi.
_MODULES = {
    "ChatSession": "chat_session",
    "Classifier": "classifier",
    "ContextLengthError": "scheduling.prompt",
    "ContinuationScore": "results",
    "Embedder": "embedder",
    "GenerationResult": "results",
    "Generator": "generator",
    "GeneratorOptions": "options",
    "GeneratorStats": "results",
    "ModelConfig": "model.config",
    "QueueFullError": "scheduling.admission",
    "RequestHandle": "scheduling.handle",
    "RequestMetrics": "results",
    "Reranker": "reranker",
    "SamplingParams": "sampling_params",
    "StreamChunk": "results",
    "TokenLogprobs": "results",
    "ToolCall": "text.tool_calls",
    "load_model": "loading",
    "read_config": "checkpoint.metadata",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the names that `dir` shows, those not yet imported included."""
    return sorted({*globals(), *__all__})
