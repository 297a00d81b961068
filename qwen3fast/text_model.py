"""TextModel: the common part of Embedder, Reranker and Classifier, which read texts and generate nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwen3fast.checkpoint.metadata import read_tokenizer
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.checks import checked_integer, checked_source
from qwen3fast.engine.last_token import TextReader
from qwen3fast.engine.threads import on_live_threads, use_threads
from qwen3fast.loading import load_model
from qwen3fast.model import Qwen3
from qwen3fast.sampling_params import takes_params
from qwen3fast.text.tokenizer import Tokenizer

Own = TypeVar("Own", bound="TextModel")
MAX_LENGTH = 8192  # tokens per text, as in both model cards


class TextModel:
    """A model and its tokenizer.

    Attributes:
        model: the Qwen3 module. config: its ModelConfig. tokenizer: the checkpoint's.
        max_length: the maximum number of tokens that the model reads at once.
    """

    def __init__(self, model: Qwen3, tokenizer: Tokenizer, max_length: int | None) -> None:
        """Wrap a loaded model. Raises: ValueError for a max_length beyond the model's."""
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        most = model.config.longest_context
        given = min(MAX_LENGTH, most) if max_length is None else max_length
        self._reader = TextReader(model)
        self.max_length = checked_integer("max_length", given, 1, most, " (the model's max_position_embeddings)")

    @classmethod
    @takes_params
    def from_pretrained(
        cls: type[Own],
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        check_weights: bool = False,
        threads: int | None = None,
        calibrate: bool | None = None,
    ) -> Own:
        """Load a model and its tokenizer, such as "Qwen/Qwen3-Embedding-0.6B" or "Qwen/Qwen3-Reranker-0.6B".

        source, device, dtype, quantization, revision, check_weights, calibrate: as in `load_model`; a score head stays
        in float32.
        max_length: None takes the value of sentence-transformers' files, which an Embedder reads, otherwise 8192, or
        as many tokens as the model has positions. threads: CPU threads, for the whole process; None takes one per core.
        Raises: FileNotFoundError for a missing checkpoint; ValueError for unsupported options, a damaged checkpoint, or
        one without what the class needs: a tokenizer, and for a Classifier a score head.
        """
        checked_source(source, quantization, revision, check_weights=check_weights)
        use_threads(threads)  # before loading, which quantizes
        if str(source).startswith("random:"):
            raise ValueError(f"{source!r} has random weights and no tokenizer; name a checkpoint that has one")
        folder = resolve_source(source, revision)
        own, tokenizer = cls._read_own(folder, check_weights), read_tokenizer(folder)
        load = partial(
            load_model,
            quantization=quantization,
            output_projection="score_head" in own and own["score_head"] is None,  # a Reranker reads rows of it then
            check_weights=check_weights,
            calibrate=calibrate,
        )
        return cls(on_live_threads(load, folder, device, dtype), tokenizer, max_length=max_length, **own)

    @classmethod
    def _read_own(cls, folder: Path, check_weights: bool) -> dict[str, Any]:
        """Return the arguments that only this class has, from the checkpoint's small files (or a GGUF file)."""
        raise NotImplementedError
