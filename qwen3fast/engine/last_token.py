"""The part that Embedder, Reranker and Classifier share: the state of each text's last token, computed in batches.

B batch rows   T tokens of the longest row   E hidden_size   N texts
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from qwen3fast.checks import checked_flag, checked_integer, checked_text
from qwen3fast.engine.whole_texts import WholeTexts
from qwen3fast.model import Qwen3
from qwen3fast.text.tokenizer import Tokenizer

MAX_BATCH_SIZE = 4096
MAX_TOKENS = 4096  # of a forward pass over several texts


def checked_texts(texts: Any, name: str) -> list[str]:
    """Return the strings of an iterable, read once.

    Raises: ValueError for other types, and for lone surrogates, naming the text and the character.
    """
    if isinstance(texts, str | bytes | Mapping | Set) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} must be a list of strings, got {type(texts).__name__}")
    return [checked_text(f"{name}[{i}]", text) for i, text in enumerate(texts)]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token. Raises: ValueError if the tokenizer does not have it."""
    found = tokenizer.base.token_to_id(token)
    if found is None:
        raise ValueError(f"this checkpoint's tokenizer has no token {token!r}; is it a Qwen3's?")
    return found


class TextFrame:
    """The special tokens that a tokenizer adds around a text, as transformers' tokenizers do; or only end_id behind it.

    Source: the post-processor in tokenizer.json.
    Raises: ValueError for a tokenizer that does more than add tokens.
    """

    def __init__(self, tokenizer: Tokenizer, end_id: int | None = None) -> None:
        self._tokenizer, self._before = tokenizer, list[int]()
        if end_id is not None:
            self._after = [end_id]
            return
        plain, framed = tokenizer.encode("a"), tokenizer.base.encode("a").ids
        at = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), None)
        if at is None:
            raise ValueError("this tokenizer's post-processor changes a text, rather than add tokens around it")
        self._before, self._after = framed[:at], framed[at + len(plain) :]

    def token_ids(self, text: str | list[int], max_length: int, name: str) -> list[int]:
        """Return the ids of a text, cut at its end where it is too long, with the special tokens around it.

        text: or its ids, with or without these tokens. name: of the text, for errors.
        Raises: ValueError for a text without any tokens.
        """
        before, after = self._before, self._after
        room = max(0, max_length - len(before) - len(after))
        inner = self._tokenizer.encode(text, room) if isinstance(text, str) else text
        end = len(inner) - len(after)
        if inner is text and inner[: len(before)] == before and inner[end:] == after:
            inner = inner[len(before) : end]
        ids = [*before, *inner[:room], *after]
        if not ids:
            raise ValueError(f"{name} has no tokens, and this tokenizer adds none")
        return ids


class TextReader:
    """The states of texts' last tokens, computed by one model. Thread-safe."""

    def __init__(self, model: Qwen3) -> None:
        self._model = model
        self._whole: WholeTexts | None = None
        self._lock = threading.Lock()

    @torch.no_grad()
    def last_states(
        self, rows: list[list[int]], batch_size: int, progress: bool = False, *, is_mean: bool = False
    ) -> Tensor:
        """Return the final norm's output at the last token of each row of ids, (N, E) float32, in the rows' order.

        is_mean: return the mean over the row's tokens instead.
        Rows of similar length share a batch, the longest first, of batch_size rows and MAX_TOKENS tokens at most. They
        are padded on the right: attention is causal, and no token sees the padding after it.
        Raises: ValueError for a batch_size out of range, or an id outside the model's vocabulary.
        """
        model = self._model
        batch_size = checked_integer("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        checked_flag("progress", progress)
        largest = max((max(row) for row in rows), default=0)
        if largest >= model.config.vocab_size:
            raise ValueError(
                f"the tokenizer gave the id {largest}, but the model's vocab_size is {model.config.vocab_size}; "
                "they are not of the same checkpoint"
            )
        device = model.model.norm.weight.device
        states_NE = torch.empty(len(rows), model.config.hidden_size, dtype=torch.float32, device=device)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        longest = len(rows[order[0]]) if rows else 0
        with self._lock, tqdm(total=len(rows), desc="reading", unit="text", disable=not progress) as bar:
            whole, start = self._whole_texts(min(batch_size, len(rows)), longest), 0
            while start < len(rows):
                width = len(rows[order[start]])
                chosen = order[start : start + max(1, min(batch_size, MAX_TOKENS // width))]
                start += len(chosen)
                last_B = torch.tensor([len(rows[i]) - 1 for i in chosen], device=device)
                token_BT = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen], device=device)
                x_BTE = whole.hidden(token_BT, None if is_mean else last_B) if whole is not None else None
                if x_BTE is None:
                    x_BTE = model.hidden(token_BT)
                if is_mean:
                    is_token_BT = torch.arange(x_BTE.shape[1], device=device) <= last_B[:, None]
                    sum_BE = (model.model.norm(x_BTE).float() * is_token_BT[..., None]).sum(dim=1)
                    states_NE[chosen] = sum_BE / (last_B[:, None] + 1)
                else:
                    x_BE = x_BTE[torch.arange(len(chosen), device=device), last_B]
                    states_NE[chosen] = model.model.norm(x_BE).float()
                bar.update(len(chosen))
        return states_NE

    def _whole_texts(self, num_rows: int, num_positions: int) -> WholeTexts | None:
        """Return the fast form with memory for so many rows and tokens of each; None if there is none."""
        if not num_rows or not WholeTexts.may_serve(self._model):
            return None
        if self._whole is None or not self._whole.fits(self._model, num_rows, num_positions):
            self._whole = None  # its memory first
            self._whole = WholeTexts(self._model, num_rows, num_positions)
        return self._whole
