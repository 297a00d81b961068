"""AdapterMethods: the methods of a Generator that load and unload LoRA adapters over its model."""

from __future__ import annotations

from pathlib import Path

from qwen3fast.checkpoint.lora.unmerged import largest_rank
from qwen3fast.options import GeneratorOptions
from qwen3fast.scheduling.adapter_registry import AdapterRegistry

DEFAULT_RANK = 16  # of the slots, where no adapter gives one


class AdapterMethods:
    """Adapters by name: `SamplingParams(adapter=name)` chooses one for a request."""

    _adapters: AdapterRegistry  # set by the Generator

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters, in the order of loading."""
        return self._adapters.names

    def load_adapter(self, name: str, source: str | Path, *, check_weights: bool = False) -> None:
        """Load a LoRA adapter for `SamplingParams(adapter=name)`; other requests go on meanwhile.

        The adapter stays apart from the model's weights, which may be quantized.

        Args:
            name: a name that is not in use.
            source: the adapter's folder in PEFT's layout, or a hub id.
            check_weights: refuse NaN and infinity in the adapter, as a Generator with check_weights always does.

        Raises: FileNotFoundError for missing files; ValueError for a name in use, without a free slot (max_adapters),
        for a rank above max_adapter_rank, and for an adapter that does not fit the model or has features that are not
        supported, each named; RuntimeError after `close`, and as `generate`.
        """
        self._adapters.load(name, source, check_weights)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, and free its slot for another one.

        New requests with it are refused at once. Requests that wait or run already finish first: the call returns
        after the last of them. A `stream` that was not begun before the call ends with a RuntimeError.
        Raises: ValueError for a name that is not loaded; RuntimeError after `close`, and as `generate`.
        """
        self._adapters.unload(name)


def adapter_room(options: GeneratorOptions) -> tuple[int, int]:
    """Return the number of adapter slots and their rank.

    Raises: FileNotFoundError or ValueError for an adapter of the options without a config that can be read.
    """
    sources = options.adapters or {}
    slots = len(sources) if options.max_adapters is None else options.max_adapters
    ranks = [largest_rank(source) for source in sources.values()]
    return slots, options.max_adapter_rank or max(ranks, default=DEFAULT_RANK)
