"""Prompts, as applications pass them: checked, tokenized and fitted to the context length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal, TypeVar

from qwen3fast.checks import as_integer, checked_option, checked_text
from qwen3fast.text.tokenizer import Tokenizer

Built = TypeVar("Built")
Prompt = str | Iterable[int]
Overflow = Literal["error", "cut"]
ACCEPTED = "a prompt must be a string or token ids (a list, another iterable, or an array or tensor of one dimension)"
# on_overflow="cut" shortens a reply to this share of max_seq_len, no further, before it cuts the prompt.
REPLY_SHARE = 1 / 4


class ContextLengthError(ValueError):
    """A prompt that does not fit `max_seq_len`, alone or together with the reply that was asked for."""


def read_prompts(prompts: Any, name: str = "prompts") -> tuple[list[str | list[Any]], bool]:
    """Read the prompts of `generate`: one prompt, or any iterable of prompts. Iterables are read once.

    name: of the argument, for messages.
    Returns: the prompts, each a string or an unchecked list of token ids, and True if it was one prompt. An empty
    iterable has no prompts.
    Raises: ValueError naming the accepted types.
    """
    if isinstance(prompts, str):
        return [prompts], True
    items = _items(prompts, name)
    if items and all(as_integer(item) is not None for item in items):
        return [items], True
    return [_read_prompt(item, f"{name}[{i}]") for i, item in enumerate(items)], False


def read_pairs(prompts: Any, continuations: Any) -> tuple[list[tuple[Any, Any]], bool]:
    """Read what `score` takes: a prompt and a continuation, one prompt and several continuations, or as many of each.

    Returns: the pairs, each of strings or lists of what should be token ids, and whether it was one pair.
    Raises: ValueError naming the accepted types.
    """
    (before, is_one_prompt), (after, is_one) = read_prompts(prompts), read_prompts(continuations, "continuations")
    if is_one_prompt:
        before *= len(after)
    elif is_one or len(before) != len(after):
        what = "one continuation" if is_one else f"{len(after)} continuations"
        raise ValueError(f"got {len(before)} prompts and {what}; pass one prompt for all, or one for each")
    return list(zip(before, after, strict=True)), is_one


def build_each(build: Callable[..., Built], prompts: Iterable[tuple[Any, ...]], is_single: bool) -> list[Built]:
    """Build requests from the arguments of each. Raises: ValueError of one of several prompts, with its index."""
    built = []
    for i, arguments in enumerate(prompts):
        try:
            built.append(build(*arguments))
        except ValueError as err:
            if is_single:
                raise
            raise of_kind(err)(f"prompts[{i}]: {err}") from err
    return built


def of_kind(error: ValueError) -> type[ValueError]:
    """Return the public class of an error, for one that says more."""
    return ContextLengthError if isinstance(error, ContextLengthError) else ValueError


def fitting_text(
    text: str, tokenizer: Tokenizer, max_seq_len: int, on_overflow: Overflow | None = "error", name: str = "prompt"
) -> str:
    """Return a text that is not surely too long to fit: encoding a long one takes memory and holds up all threads.

    on_overflow: "cut" leaves an end that is surely longer than what fits; None is "error" where "cut" is no choice.
    Raises: ContextLengthError for "error" and None.
    """
    if on_overflow == "cut":
        return tokenizer.long_end(text, max_seq_len)
    if len(text) <= tokenizer.max_chars(text, max_seq_len):
        return text
    if on_overflow is None:
        raise ContextLengthError(f"{name} ({len(text):,} characters) has more than {max_seq_len} tokens; shorten it")
    raise ContextLengthError(
        f"{name} ({len(text):,} characters, so more than {max_seq_len} tokens) exceeds max_seq_len {max_seq_len}; "
        "shorten it, or pass on_overflow='cut' (--on-overflow cut)"
    )


def prompt_to_ids(
    prompt: Any,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_seq_len: int | None = None,
    on_overflow: Overflow | None = "error",
    name: str = "prompt",
) -> list[int]:
    """Return the token ids of one prompt: a text, or an iterable of ids, read once.

    max_seq_len, on_overflow: as in `fitting_text`. name: in messages, what it is.
    Raises: ValueError for anything else, an empty prompt, an id outside the vocabulary, a text with a lone surrogate,
    a text that is surely too long, or a text without a tokenizer.
    """
    prompt = _read_prompt(prompt, name)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"this model has no tokenizer; pass the {name} as a list of token ids")
        text = checked_text(name, prompt)
        text = text if max_seq_len is None else fitting_text(text, tokenizer, max_seq_len, on_overflow, name)
        ids = tokenizer.encode(text) if name == "continuation" else tokenizer.encode_prompt(text)
    else:
        ids = [_token_id(item) for item in prompt]
    if not ids:
        raise ValueError(f"the {name} is empty; it needs at least one token")
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"token id {outside} is outside the vocabulary (0 to {vocab_size - 1})")
    return ids


def fit_context(
    ids: list[int],
    max_tokens: int | None,
    max_seq_len: int,
    on_overflow: Overflow,
    default_max_tokens: int | None = None,
    longest_context: int | None = None,
) -> tuple[list[int], int]:
    """Return the prompt and the number of new tokens that fit `max_seq_len` together.

    max_tokens: None takes `default_max_tokens` (the checkpoint's), limited to the room after the prompt; if both are
    None, all of this room.
    longest_context: the largest max_seq_len that the model can have, for the message; None if it is not known.
    on_overflow: "cut" first shortens the reply, down to `min_reply`, then removes the prompt's oldest tokens. One more
    token of prompt changes either by at most one.
    Raises: ContextLengthError with the arithmetic, for "error", if they do not fit; ValueError if max_seq_len is 1.
    """
    checked_option("on_overflow", on_overflow, ("error", "cut"))
    room = max_seq_len - len(ids)
    if on_overflow == "error" and (max_tokens or 1) > room:
        wanted = len(ids) + (max_tokens or 1)
        can_grow = longest_context is None or wanted <= longest_context
        advice = f"set max_seq_len (--max-seq-len) to {wanted}, " if can_grow else ""
        most = "" if can_grow else f" (of at most {longest_context} for this model)"
        raise ContextLengthError(
            f"prompt ({len(ids)} tokens) + max_tokens ({max_tokens or 1}) = {wanted} exceeds max_seq_len "
            f"{max_seq_len}{most}; shorten one, {advice}or pass on_overflow='cut' (--on-overflow cut)"
        )
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len {max_seq_len} leaves no room for a reply")
    wanted = max_tokens or default_max_tokens or max_seq_len
    new_tokens = min(wanted, max(room, min_reply(wanted, max_seq_len) if on_overflow == "cut" else 1))
    return ids[-(max_seq_len - new_tokens) :], new_tokens


def min_reply(max_tokens: int, max_seq_len: int) -> int:
    """Return the length that on_overflow="cut" leaves a reply before it cuts the prompt.

    It is max_tokens, or a quarter of max_seq_len (REPLY_SHARE) if this is less.
    """
    return min(max_tokens, max(1, int(max_seq_len * REPLY_SHARE)))


def _read_prompt(prompt: Any, name: str) -> str | list[Any]:
    return prompt if isinstance(prompt, str) else _items(prompt, name)


def _items(values: Any, name: str) -> list[Any]:
    """Return the items of an iterable, read once. Raises: ValueError for types with other elements or without order."""
    dtype = getattr(values, "dtype", None)
    if isinstance(values, Mapping) or hasattr(values, "input_ids"):
        raise ValueError(f"{ACCEPTED}, got {name} of type {type(values).__name__}; pass its 'input_ids'")
    if isinstance(values, bytes | bytearray | memoryview):
        raise ValueError(f"{ACCEPTED}, got {name} of type {type(values).__name__}; decode it first")
    if isinstance(values, Set) or not isinstance(values, Iterable):
        raise ValueError(f"{ACCEPTED}, got {name} of type {type(values).__name__}")
    if dtype is not None and hasattr(values, "tolist"):
        if getattr(values, "ndim", 1) == 0:
            raise ValueError(f"{ACCEPTED}, got {name} without a dimension ({values!r:.80})")
        if any(kind in str(dtype) for kind in ("float", "bool", "complex")):
            raise ValueError(f"{ACCEPTED}, got {name} of dtype {dtype}; token ids are integers")
        return list(values.tolist())
    return list(values)


def _token_id(item: Any) -> int:
    number = as_integer(item)
    if number is None:
        raise ValueError(f"{ACCEPTED}, got {type(item).__name__} among its token ids ({item!r:.80})")
    return number
