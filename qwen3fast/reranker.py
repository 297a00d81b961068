"""Reranker: the probability that a document answers a query (Qwen3-Reranker).

The model reads query and document together and is asked for "yes" or "no"; the score is the probability of "yes",
relative to "no", as the next token. Nothing is generated: only these two rows of the output projection are computed.
Source: the model cards of Qwen3-Reranker-0.6B, 4B and 8B; Qwen3 Embedding report, arXiv:2506.05176, section 2.

N documents   E hidden_size   L labels: "no" and "yes", or a score head's
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3fast.checkpoint.score_head import ScoreHead, find_score_head
from qwen3fast.checks import checked_text
from qwen3fast.engine.last_token import checked_texts, token_id
from qwen3fast.engine.threads import on_live_threads
from qwen3fast.model import Qwen3
from qwen3fast.quantization.layers import QuantizedLinear
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text_model import TextModel

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # empty reasoning: the answer comes at once


class Reranker(TextModel):
    """A Qwen3-Reranker model, or any other dense Qwen3 with a tokenizer, that scores documents against a query.

    A model converted to Qwen3ForSequenceClassification reads the same prompt; its score head takes the place of "yes"
    and "no": the score is the sigmoid of a single label's, or the probability of the second of two.

    Attributes:
        model: the Qwen3 module. config: its ModelConfig. tokenizer: the checkpoint's.
        max_length: tokens of query and document together, with the template; documents that are too long are cut.
    """

    def __init__(
        self, model: Qwen3, tokenizer: Tokenizer, *, max_length: int | None = None, score_head: ScoreHead | None = None
    ) -> None:
        """Wrap a loaded model; see `from_pretrained` for max_length.

        Raises: ValueError for a max_length beyond the model's, a tokenizer without the tokens "yes" and "no" where
        there is no score head, or a head of more than two labels.
        """
        super().__init__(model, tokenizer, max_length)
        self._prefix, self._suffix = tokenizer.encode(PREFIX), tokenizer.encode(SUFFIX)
        if score_head is None:
            no_yes = [token_id(tokenizer, "no"), token_id(tokenizer, "yes")]
            self._rows_LE = on_live_threads(_output_rows, model, no_yes)
        elif len(score_head.labels) <= 2:
            self._rows_LE = score_head.weight_LE.to(model.model.norm.weight.device)
        else:
            raise ValueError(f"the score head has {len(score_head.labels)} labels; a Reranker takes one or two")

    @classmethod
    def _read_own(cls, folder: Path, check_weights: bool) -> dict[str, Any]:
        return {"score_head": find_score_head(folder, check_weights)}

    def score(
        self,
        query: str,
        documents: Iterable[str],
        *,
        instruction: str | None = None,
        batch_size: int = 8,
        progress: bool = False,
    ) -> list[float]:
        """Return the probability, from 0 to 1, that each document answers the query, in the documents' order.

        Args:
            query: the search query.
            documents: an iterable of strings. A document that is too long for max_length is cut at its end; query and
                instruction are never cut.
            instruction: the criterion, in one sentence; by default that the document answers a web search.
            batch_size: documents computed together; scores do not depend on it (except by rounding).
            progress: show a bar.

        Raises: ValueError for anything but strings that UTF-8 can encode, for numbers out of range, or for a query that
        leaves no room for a document.
        """
        query, documents = checked_text("query", query), checked_texts(documents, "documents")
        instruction = INSTRUCTION if instruction is None else checked_text("instruction", instruction)
        head = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>:"
        rows = [self._token_ids(head, document) for document in documents]
        return on_live_threads(self._score, rows, batch_size, progress)

    def _score(self, rows: list[list[int]], batch_size: int, progress: bool) -> list[float]:
        states_NE = self._reader.last_states(rows, batch_size, progress)
        logits_NL = states_NE @ self._rows_LE.T
        is_single = len(self._rows_LE) == 1
        scores_N = torch.sigmoid(logits_NL[:, 0]) if is_single else torch.softmax(logits_NL, dim=-1)[:, 1]
        return scores_N.tolist()

    def _token_ids(self, head: str, document: str) -> list[int]:
        """Return the ids of a prompt; prefix and suffix are encoded separately, as published."""
        room = self.max_length - len(self._prefix) - len(self._suffix)
        body = self.tokenizer.encode(f"{head} {document}", room + 1)
        if len(body) > room and (needed := len(self.tokenizer.encode(head, room))) >= room:
            raise ValueError(
                f"query and instruction take {needed} tokens or more and the rest of the prompt "
                f"{self.max_length - room}, which leaves no room for a document within max_length {self.max_length}; "
                "shorten them or raise it"
            )
        return [*self._prefix, *body[:room], *self._suffix]


@torch.no_grad()
def _output_rows(model: Qwen3, ids: list[int]) -> Tensor:
    """Return rows of the output projection, (len(ids), E) float32, dequantized if need be."""
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has the id {max(ids)}, but the model's vocab_size is {model.config.vocab_size}; "
            "they are not of the same checkpoint"
        )
    id_R = torch.tensor(ids, device=model.model.norm.weight.device)
    head = model.lm_head
    return head.rows(id_R) if isinstance(head, QuantizedLinear) else head.weight[id_R].float()
