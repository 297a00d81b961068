"""Embedder: texts become vectors whose dot product says how near they are in meaning (Qwen3-Embedding).

The vector of a text is the model's last state at an end-of-text token appended to it.
Source: the model cards of Qwen3-Embedding-0.6B, 4B and 8B; Qwen3 Embedding report, arXiv:2506.05176, section 2.

N texts   E dimensions of a vector
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3fast.engine.last_token import check_texts, checked_max_length, last_states, load_model_and_tokenizer, token_id
from qwen3fast.engine.threads import use_threads
from qwen3fast.model import Qwen3
from qwen3fast.text.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"


class Embedder:
    """Texts to vectors with a Qwen3-Embedding model, or any other dense Qwen3 with its tokenizer.

    Attributes:
        model: the Qwen3 module; an untied output projection is left out. config: its ModelConfig. tokenizer.
        max_length: tokens of one text, the end-of-text token included; longer texts are cut at their end.
    """

    def __init__(self, model: Qwen3, tokenizer: Tokenizer, *, max_length: int | None = None) -> None:
        """Wrap a loaded model; see `from_pretrained` for max_length.

        Raises: ValueError for a max_length the model cannot have, or a tokenizer without an end-of-text token.
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
    ) -> Embedder:
        """Load a model and its tokenizer, such as "Qwen/Qwen3-Embedding-0.6B".

        source, device, dtype, quantization, revision, check_weights: as in `load_model`. max_length: 8192 unless the
        model has fewer positions.
        Raises: FileNotFoundError or ValueError, saying what was wrong and what to do.
        """
        use_threads()
        parts = load_model_and_tokenizer(source, device, dtype, quantization, revision, False, check_weights)
        return cls(*parts, max_length=max_length)

    def encode(
        self,
        texts: str | list[str],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        batch_size: int = 8,
        normalize: bool = True,
        progress: bool = False,
    ) -> Tensor:
        """A vector for each text, (N, E) float32, in the order of the texts; one text gives (1, E).

        instruction: what the texts are asked for, in a sentence; for queries only, documents have none. dimensions:
        keep the first so many (the published models were trained for 32 and more). normalize: scale each vector, what
        is left of it, to length 1. batch_size: texts computed at once; vectors do not depend on it (but for rounding).
        Raises: ValueError for texts that are not strings, or numbers out of range.
        """
        texts = [texts] if isinstance(texts, str) else texts
        check_texts(texts, "texts")
        dimensions = self.config.hidden_size if dimensions is None else dimensions
        if not 1 <= dimensions <= self.config.hidden_size:
            raise ValueError(f"dimensions must be from 1 to {self.config.hidden_size}, got {dimensions}")
        rows = [self._token_ids(text if instruction is None else with_instruction(instruction, text)) for text in texts]
        vectors_NE = last_states(self.model, rows, batch_size, progress)[:, :dimensions]
        return F.normalize(vectors_NE, dim=-1) if normalize else vectors_NE.contiguous()

    def _token_ids(self, text: str) -> list[int]:
        return [*self.tokenizer.encode(text)[: self.max_length - 1], self._end_id]


def with_instruction(instruction: str, query: str) -> str:
    """A query as Qwen3-Embedding was trained to read it."""
    return f"Instruct: {instruction}\nQuery:{query}"
