"""Embedder: vectors of texts, whose dot products measure similarity of meaning (Qwen3-Embedding).

The vector of a text is the model's last hidden state at an end-of-text token appended to the text.
Source: the model cards of Qwen3-Embedding-0.6B, 4B and 8B; Qwen3 Embedding report, arXiv:2506.05176, section 2.

N texts   E dimensions per vector
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.checks import checked_flag, checked_integer, checked_text
from qwen3fast.engine.last_token import checked_max_length, checked_texts, last_states, token_id
from qwen3fast.engine.threads import on_live_threads
from qwen3fast.loading import load_model_and_tokenizer
from qwen3fast.model import Qwen3
from qwen3fast.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"


class Embedder:
    """A Qwen3-Embedding model, or any other dense Qwen3 with a tokenizer, that computes vectors of texts.

    Attributes:
        model: the Qwen3 module, without an untied output projection. config: its ModelConfig.
        tokenizer: the checkpoint's.
        max_length: tokens per text, the end-of-text token included; longer texts are cut at their end.
    """

    def __init__(self, model: Qwen3, tokenizer: Tokenizer, *, max_length: int | None = None) -> None:
        """Wrap a loaded model; see `from_pretrained` for max_length.

        Raises: ValueError for a max_length beyond the model's, or a tokenizer without an end-of-text token.
        """
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.max_length = checked_max_length(max_length, model.config)
        self._end_id = token_id(tokenizer, END_OF_TEXT)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        check_weights: bool = False,
        threads: int | None = None,
    ) -> Embedder:
        """Load a model and its tokenizer, such as "Qwen/Qwen3-Embedding-0.6B".

        source, device, dtype, quantization, revision, check_weights: as in `load_model`. max_length: None takes 8192,
        or as many tokens as the model has positions. threads: CPU threads, for the whole process; None takes one per
        core.
        Raises: FileNotFoundError for a missing checkpoint; ValueError for unsupported options or a damaged checkpoint.
        """
        parts = load_model_and_tokenizer(source, device, dtype, quantization, revision, False, check_weights, threads)
        return cls(*parts, max_length=max_length)

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        batch_size: int = 8,
        normalize: bool = True,
        progress: bool = False,
    ) -> Tensor:
        """Return one vector per text, (N, E) float32, in the order of the texts; (1, E) for a single string.

        Args:
            texts: a string, or an iterable of strings.
            instruction: the task in one sentence, for queries; documents have none.
            dimensions: cut vectors to this many dimensions (Qwen3-Embedding was trained for 32 and more).
            batch_size: texts computed together; vectors do not depend on it (except by rounding).
            normalize: scale each vector, after cutting it, to length 1.
            progress: show a bar.

        Raises: ValueError for anything but strings that UTF-8 can encode, and for numbers out of range.
        """
        texts = checked_texts([texts] if isinstance(texts, str) else texts, "texts")
        checked_flag("normalize", normalize)
        size = self.config.hidden_size
        dimensions = size if dimensions is None else checked_integer("dimensions", dimensions, 1, size)
        if instruction is not None:
            texts = [with_instruction(checked_text("instruction", instruction), text) for text in texts]
        rows = [self._token_ids(text) for text in texts]
        return on_live_threads(self._encode, rows, batch_size, progress, dimensions, normalize)

    def _encode(
        self, rows: list[list[int]], batch_size: int, progress: bool, dimensions: int, normalize: bool
    ) -> Tensor:
        vectors_NE = last_states(self.model, rows, batch_size, progress)[:, :dimensions]
        return F.normalize(vectors_NE, dim=-1) if normalize else vectors_NE.contiguous()

    def _token_ids(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text)[: self.max_length - 1], self._end_id]


def with_instruction(instruction: str, query: str) -> str:
    """Return a query in the form that Qwen3-Embedding was trained on."""
    return f"Instruct: {instruction}\nQuery:{query}"
