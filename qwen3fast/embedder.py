"""Embedder: vectors of texts, whose dot products measure similarity of meaning (Qwen3-Embedding).

The vector of a text is the model's last hidden state at an end-of-text token appended to the text. In folders of
sentence-transformers, their files define the pooling, and the tokenizer defines the tokens that end a text.
Source: the model cards of Qwen3-Embedding-0.6B, 4B and 8B; Qwen3 Embedding report, arXiv:2506.05176, section 2.

N texts   E dimensions per vector
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qwen3fast.checkpoint.sentence_transformers import SentenceSettings, find_sentence_settings
from qwen3fast.checks import checked_flag, checked_integer, checked_text
from qwen3fast.engine.last_token import TextFrame, checked_texts, token_id
from qwen3fast.engine.threads import on_live_threads
from qwen3fast.model import Qwen3
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text_model import TextModel

END_OF_TEXT = "<|endoftext|>"


class Embedder(TextModel):
    """A Qwen3-Embedding model, or any other dense Qwen3 with a tokenizer, that computes vectors of texts.

    Attributes:
        model: the Qwen3 module, without an untied output projection. config: its ModelConfig.
        tokenizer: the checkpoint's.
        max_length: tokens per text, the end-of-text token included; longer texts are cut at their end.
        settings: what the folder of sentence-transformers says; None for other checkpoints.
    """

    def __init__(
        self,
        model: Qwen3,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        settings: SentenceSettings | None = None,
    ) -> None:
        """Wrap a loaded model; see `from_pretrained` for max_length.

        Raises: ValueError for a max_length beyond the model's, or, without settings, a tokenizer without an end-of-text
        token.
        """
        if max_length is None and settings is not None and settings.max_length is not None:
            max_length = min(settings.max_length, model.config.max_position_embeddings)
        super().__init__(model, tokenizer, max_length)
        self.settings = settings
        self._settings = settings or SentenceSettings()
        self._frame = TextFrame(tokenizer, token_id(tokenizer, END_OF_TEXT) if settings is None else None)

    @classmethod
    def _read_own(cls, folder: Path, check_weights: bool) -> dict[str, Any]:
        return {"settings": find_sentence_settings(folder)}

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        instruction: str | None = None,
        dimensions: int | None = None,
        batch_size: int = 8,
        normalize: bool | None = None,
        progress: bool = False,
        prompt_name: str | None = None,
    ) -> Tensor:
        """Return one vector per text, (N, E) float32, in the order of the texts; (1, E) for a single string.

        Args:
            texts: a string, or an iterable of strings.
            instruction: the task in one sentence, for queries; documents have none.
            dimensions: cut vectors to this many dimensions (Qwen3-Embedding was trained for 32 and more).
            batch_size: texts computed together; vectors do not depend on it (except by rounding).
            normalize: scale each vector, after cutting it, to length 1. None follows the files of
                sentence-transformers, and scales where there are none.
            progress: show a bar.
            prompt_name: put the prompt of this name before each text. Prompts are defined in the checkpoint's
                config_sentence_transformers.json, whose default_prompt_name is used where neither this nor an
                instruction is given.

        Raises: ValueError for anything but strings that UTF-8 can encode, for numbers out of range, and for a prompt
        that the checkpoint does not have.
        """
        texts = checked_texts([texts] if isinstance(texts, str) else texts, "texts")
        rows = self.token_ids(texts, instruction=instruction, prompt_name=prompt_name)
        return self.encode_ids(rows, dimensions, batch_size=batch_size, normalize=normalize, progress=progress)

    def token_ids(
        self,
        texts: list[str] | list[list[int]],
        *,
        instruction: str | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
    ) -> list[list[int]]:
        """Return the token ids that `encode` computes the vector of each text from.

        texts: or their own ids, without instruction or prompt; only special tokens that they lack are added.
        max_length: of the ids; None is the Embedder's.
        Raises: ValueError as `encode`.
        """
        prompt, most = self._prompt(prompt_name, instruction), max_length or self.max_length
        if instruction is not None:
            prompt = with_instruction(checked_text("instruction", instruction), "")
        given = [prompt + text if isinstance(text, str) else text for text in texts]
        return [self._frame.token_ids(text, most, f"texts[{i}]") for i, text in enumerate(given)]

    def encode_ids(
        self,
        rows: list[list[int]],
        dimensions: int | None = None,
        *,
        batch_size: int = 8,
        normalize: bool | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Return one vector for each row of `token_ids`; other arguments and errors as in `encode`."""
        normalize = self._settings.normalize if normalize is None else checked_flag("normalize", normalize)
        size = self.config.hidden_size
        dimensions = size if dimensions is None else checked_integer("dimensions", dimensions, 1, size)

        def compute() -> Tensor:
            is_mean = self._settings.pooling == "mean"
            vectors_NE = self._reader.last_states(rows, batch_size, progress, is_mean=is_mean)[:, :dimensions]
            return F.normalize(vectors_NE, dim=-1) if normalize else vectors_NE.contiguous()

        return on_live_threads(compute)

    def _prompt(self, name: str | None, instruction: str | None) -> str:
        """Return the text to put before each text; empty with an instruction, which has a form of its own."""
        settings = self._settings
        if name is not None and instruction is not None:
            raise ValueError("pass prompt_name or instruction, not both")
        if name is None:
            name = settings.default_prompt if instruction is None else None
        if name is not None and name not in settings.prompts:
            raise ValueError(f"this checkpoint has no prompt {name!r:.200}; it has {sorted(settings.prompts)}")
        return "" if name is None else settings.prompts[name]


def with_instruction(instruction: str, query: str) -> str:
    """Return a query in the form that Qwen3-Embedding was trained on."""
    return f"Instruct: {instruction}\nQuery:{query}"
