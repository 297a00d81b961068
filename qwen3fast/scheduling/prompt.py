"""From what an application passes as a prompt to token ids that fit the context, or a clear refusal."""

from __future__ import annotations

from typing import Any, Literal

from qwen3fast.text.tokenizer import Tokenizer

Prompt = str | list[int]
Overflow = Literal["error", "cut"]


def prompt_to_ids(prompt: Any, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Token ids of a text or of a list that holds ids already.

    Raises: ValueError for anything else, an empty prompt, an id outside the vocabulary, or text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("random weights have no tokenizer; pass the prompt as a list of token ids")
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in prompt):
        ids = list(prompt)
    else:
        raise ValueError(f"a prompt must be a string or a list of token ids, got {_describe(prompt)}")
    if not ids:
        raise ValueError("the prompt is empty; it needs at least one token")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"token id {outside[0]} is outside the vocabulary (0 to {vocab_size - 1})")
    return ids


def fit_context(
    ids: list[int], max_tokens: int | None, max_seq_len: int, on_overflow: Overflow
) -> tuple[list[int], int]:
    """Prompt and number of new tokens that fit `max_seq_len` together; max_tokens None takes all the room there is.

    on_overflow "cut" shortens the reply first, then drops the oldest tokens of the prompt.
    Raises: ValueError with the arithmetic if "error" was chosen and they do not fit, or if nothing can fit.
    """
    if on_overflow not in ("error", "cut"):
        raise ValueError(f"on_overflow must be 'error' or 'cut', got {on_overflow!r}")
    room = max_seq_len - len(ids)
    if on_overflow == "error" and (max_tokens or 1) > room:
        wanted = len(ids) + (max_tokens or 1)
        raise ValueError(
            f"prompt ({len(ids)} tokens) + max_tokens ({max_tokens or 1}) = {wanted} exceeds max_seq_len "
            f"{max_seq_len}; shorten one, pass on_overflow='cut', or build Generator(max_seq_len={wanted})"
        )
    if room < 1:
        ids = ids[-max(1, max_seq_len - (max_tokens or 1)) :]
        room = max_seq_len - len(ids)
    if room < 1:
        raise ValueError(f"max_seq_len {max_seq_len} leaves no room for a reply")
    return ids, min(max_tokens or room, room)


def _describe(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"a list holding {next((type(x).__name__ for x in value if not isinstance(x, int)), 'bool')}"
    return type(value).__name__
