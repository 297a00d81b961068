"""Classifier: the labels of texts, by a Qwen3 with a score head (Qwen3ForSequenceClassification).

The head reads the model's last hidden state at the text's last token.
Source: transformers' Qwen3ForSequenceClassification.

N texts   L labels
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3fast.checkpoint.score_head import ARCHITECTURE, ScoreHead, find_score_head
from qwen3fast.engine.last_token import TextFrame, checked_texts
from qwen3fast.engine.threads import on_live_threads
from qwen3fast.model import Qwen3
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text_model import TextModel


class Classifier(TextModel):
    """A fine-tuned Qwen3 with a score head, which labels texts.

    Attributes:
        model: the Qwen3 module; an untied output projection is left out. config: its ModelConfig.
        tokenizer: the checkpoint's.
        labels: the name of each score. is_multi_label: a text may have several of them, or none.
        max_length: tokens per text; longer texts are cut at their end.
    """

    def __init__(self, model: Qwen3, tokenizer: Tokenizer, head: ScoreHead, *, max_length: int | None = None) -> None:
        """Wrap a loaded model; see `from_pretrained` for max_length.

        Raises: ValueError for a max_length the model cannot have.
        """
        super().__init__(model, tokenizer, max_length)
        self.labels, self.is_multi_label = head.labels, head.is_multi_label
        self._frame = TextFrame(tokenizer)
        self._head_LE = head.weight_LE.to(model.model.norm.weight.device)

    @classmethod
    def _read_own(cls, folder: Path, check_weights: bool) -> dict[str, Any]:
        head = find_score_head(folder, check_weights)
        if head is None:
            raise ValueError(f"{folder} has no score head; a Classifier needs a {ARCHITECTURE}")
        return {"head": head}

    def logits(self, texts: str | Iterable[str], *, batch_size: int = 8, progress: bool = False) -> Tensor:
        """Return the scores of each text, (N, L) float32, in the order of the texts.

        Args:
            texts: a string, or an iterable of strings.
            batch_size: texts computed at once; scores do not depend on it (except by rounding).
            progress: show a bar.

        Raises: ValueError for anything but strings that UTF-8 can encode, an empty text, and numbers out of range.
        """
        texts = checked_texts([texts] if isinstance(texts, str) else texts, "texts")
        rows = [self._frame.token_ids(text, self.max_length, f"texts[{i}]") for i, text in enumerate(texts)]
        return on_live_threads(lambda: self._reader.last_states(rows, batch_size, progress) @ self._head_LE.T)

    def probabilities(self, texts: str | Iterable[str], *, batch_size: int = 8, progress: bool = False) -> Tensor:
        """Return the probability of each label for each text, (N, L) float32.

        They are softmax over the labels; for a single label, and for a model of several labels per text
        (`is_multi_label`), the sigmoid of each score. Arguments and errors: as `logits`.
        """
        logits_NL = self.logits(texts, batch_size=batch_size, progress=progress)
        is_independent = self.is_multi_label or len(self.labels) == 1
        return torch.sigmoid(logits_NL) if is_independent else torch.softmax(logits_NL, dim=-1)
