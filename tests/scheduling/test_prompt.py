"""Prompts: every accepted form, everything else refused by name, and what is cut where a prompt does not fit."""

from __future__ import annotations

from collections import UserDict, deque

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast.scheduling.prompt import fit_context, fitting_text, min_reply, prompt_to_ids, read_prompts
from qwen3fast.text.tokenizer import Tokenizer

IDS = [3, 1, 2]
FORMS = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(3, 0, -1),
    "generator": lambda: (i for i in IDS),
    "iterator": lambda: iter(IDS),
    "map": lambda: map(int, "312"),
    "deque": lambda: deque(IDS),
    "array": lambda: np.array(IDS),
    "array of uint8": lambda: np.array(IDS, dtype=np.uint8),
    "array of objects": lambda: np.array(IDS, dtype=object),
    "tensor": lambda: torch.tensor(IDS),
    "tensor of int32": lambda: torch.tensor(IDS, dtype=torch.int32),
    "list of NumPy integers": lambda: list(np.array(IDS)),
    "list of tensors": lambda: list(torch.tensor(IDS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_prompt_of_ids_may_have_any_form(form):
    expected = list(range(3, 0, -1)) if form == "range" else IDS
    assert prompt_to_ids(FORMS[form](), None, 97) == expected
    [prompt], is_single = read_prompts(FORMS[form]())
    assert is_single and prompt_to_ids(prompt, None, 97) == expected
    assert all(type(i) is int for i in prompt_to_ids(prompt, None, 97))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outer", [list, tuple, iter, lambda prompts: (p for p in prompts), deque])
def test_many_prompts_may_have_any_form(form, outer):
    prompts, is_single = read_prompts(outer([FORMS[form](), "text", FORMS[form]()]))
    assert not is_single and len(prompts) == 3 and prompts[1] == "text"
    assert prompt_to_ids(prompts[0], None, 97) == prompt_to_ids(prompts[2], None, 97)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_two_dimensions_are_many_prompts(make):
    assert read_prompts(make([[1, 2], [3, 4]])) == ([[1, 2], [3, 4]], False)
    assert read_prompts(make([[1, 2]])) == ([[1, 2]], False)


def test_prompts_of_one_token_stay_apart():
    for prompts in ([[1], [2]], [torch.tensor([1]), torch.tensor([2])], [np.array([1]), np.array([2])]):
        assert read_prompts(prompts) == ([[1], [2]], False)


def test_an_array_of_texts_is_many_prompts():
    assert read_prompts(np.array(["a", "bc"])) == (["a", "bc"], False)


@pytest.mark.parametrize(
    "nothing", [[], (), iter(()), np.zeros(0, dtype=np.int64), torch.zeros(0, 5, dtype=torch.int64)]
)
def test_nothing_is_no_prompts(nothing):
    assert read_prompts(nothing) == ([], False)


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (None, "NoneType"),
        (5, "int"),
        (1.5, "float"),
        (True, "bool"),
        (b"abc", "bytes; decode it first"),
        (bytearray(b"abc"), "bytearray; decode it first"),
        (memoryview(b"abc"), "memoryview; decode it first"),
        ({"input_ids": [1]}, "dict; pass its 'input_ids'"),
        (UserDict(input_ids=[1]), "UserDict; pass its 'input_ids'"),
        ({1, 2}, "set"),
        (frozenset([1]), "frozenset"),
        (object(), "object"),
        (np.array([1.0]), "dtype float64"),
        (torch.tensor([1.0]), "dtype torch.float32"),
        (torch.tensor([True]), "dtype torch.bool"),
        (np.array(3.0), "without a dimension"),
        (torch.tensor(3), "without a dimension"),
    ],
)
def test_everything_else_is_refused_with_what_is_accepted(bad, got):
    for call in (lambda: read_prompts(bad), lambda: prompt_to_ids(bad, None, 97), lambda: read_prompts(["ok", bad])):
        with pytest.raises(ValueError, match="a prompt must be a string or token ids") as error:
            call()
        assert got in str(error.value)


@pytest.mark.parametrize("bad", [[1, "a"], [1, None], [1, 2.0], [1, True], [[1]], [1, np.float32(2)], ["a"]])
def test_what_is_no_id_is_refused_by_its_type(bad):
    with pytest.raises(ValueError, match=f"got {type(bad[-1]).__name__} among its token ids"):
        prompt_to_ids(bad, None, 97)


def test_a_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"prompt holds the lone surrogate '\\ud83d' at character 3"):
        prompt_to_ids("hi \ud83d", tokenizer, tokenizer.vocab_size)
    assert prompt_to_ids("hi \U0001f600", tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize("text", ["a" * 10**6, "What is 17 + 25? " * 10**5, "e\u0301" * 10**6])
def test_a_text_that_cannot_fit_is_refused_or_cut_before_it_is_encoded(tokenizer, text):
    with pytest.raises(ValueError, match=r"prompt \([\d,]+ characters, .* exceeds max_seq_len 64; shorten"):
        prompt_to_ids(text, tokenizer, tokenizer.vocab_size, 64)
    cut = fitting_text(text, tokenizer, 64, "cut")
    assert len(cut) < 20_000 and tokenizer.encode(cut)[-64:] == tokenizer.encode(text[-50_000:])[-64:]
    assert tokenizer.encode(text, 64) == tokenizer.encode(text[:50_000])[:64]


@pytest.mark.parametrize("text", ["", "a", " " * 16, "e\u0301" * 8, "1\U0001f600", "<|im_start|>"])
def test_no_text_that_fits_is_refused(tokenizer, text):
    for repeats in (1, 7, 30):
        num_tokens = len(tokenizer.encode(text * repeats))
        assert fitting_text(text * repeats, tokenizer, num_tokens) == text * repeats


@pytest.mark.parametrize(
    ("normalizer", "added", "text"),
    [
        (normalizers.NFC(), AddedToken("\u1f82" * 40, normalized=True), "\u03b1\u0313\u0300\u0345" * 40),
        (normalizers.Sequence([]), AddedToken("<x>", lstrip=True), " " * 500 + "<x>"),
        (None, AddedToken("<x>", rstrip=True), "<x>" + " " * 500),
        (normalizers.Strip(), AddedToken("<x>"), "a" + " " * 500),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "")]), AddedToken("<x>"), "a" * 500 + "b"),
    ],
)
def test_no_text_that_fits_is_refused_whatever_the_tokenizer_does(tokenizer, normalizer, added, text):
    base = BaseTokenizer.from_str(tokenizer.base.to_str())
    base.normalizer = normalizer
    base.add_tokens([added])
    own = Tokenizer(base)
    ids = own.encode(text)
    assert len(ids) <= 2 and fitting_text(text, own, len(ids)) == text
    assert own.encode(fitting_text(text, own, len(ids), "cut")) == ids == own.encode(text, len(ids))


def test_texts_with_the_same_end_are_cut_alike(tokenizer):
    for end in ("a" * 30_000, "b" * 90_000, "\u00e9" * 90_000):
        cut, longer = (fitting_text(text, tokenizer, 64, "cut") for text in (end, f"caf\u00e9{end}"))
        assert longer == cut and len(cut) < len(end)


# Cutting


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "expected"),
    [
        (156, 100, (156, 100)),
        (157, 100, (157, 99)),
        (192, 100, (192, 64)),
        (193, 100, (192, 64)),
        (255, 100, (192, 64)),
        (256, 100, (192, 64)),
        (257, 100, (192, 64)),
        (1000, 100, (192, 64)),
        (255, 64, (192, 64)),
        (193, 63, (193, 63)),
        (194, 63, (193, 63)),
        (255, 1, (255, 1)),
        (256, 1, (255, 1)),
        (255, 256, (192, 64)),
        (257, 256, (192, 64)),
        (257, 10**9, (192, 64)),
        (1, 10**9, (1, 255)),
        (256, None, (192, 64)),
        (10, None, (10, 246)),
    ],
)
def test_cut_shortens_the_reply_to_its_share_and_then_the_prompt(prompt, max_tokens, expected):
    ids, new_tokens = fit_context(list(range(prompt)), max_tokens, 256, "cut")
    assert (len(ids), new_tokens) == expected
    assert ids == list(range(prompt))[-len(ids) :]


@pytest.mark.parametrize("max_seq_len", [2, 3, 4, 5, 7, 8, 9, 64, 256])
def test_cut_is_continuous_and_wastes_nothing(max_seq_len):
    """Source of the expected values: the definition in the docstring of fit_context, walked token by token."""
    for max_tokens in [*range(1, max_seq_len + 3), 10 * max_seq_len, None]:
        before = None
        for prompt in range(1, 2 * max_seq_len + 3):
            ids, new_tokens = fit_context([0] * prompt, max_tokens, max_seq_len, "cut")
            wanted = max_tokens or max_seq_len
            assert 1 <= new_tokens <= wanted and 1 <= len(ids) <= prompt
            assert len(ids) + new_tokens <= max_seq_len
            assert len(ids) == prompt or new_tokens == min_reply(wanted, max_seq_len)  # the reply is cut first
            assert new_tokens >= min_reply(wanted, max_seq_len)
            if len(ids) < prompt or new_tokens < wanted:
                assert len(ids) + new_tokens == max_seq_len
            if before is not None:
                assert 0 <= len(ids) - before[0] <= 1 and 0 <= before[1] - new_tokens <= 1
            before = len(ids), new_tokens


@pytest.mark.parametrize("on_overflow", ["error", "cut"])
def test_what_fits_is_never_changed(on_overflow):
    for prompt in range(1, 16):
        for max_tokens in range(1, 17 - prompt):
            assert fit_context([0] * prompt, max_tokens, 16, on_overflow) == ([0] * prompt, max_tokens)


def test_error_refuses_one_token_too_many():
    assert fit_context([0] * 15, 1, 16, "error")[1] == 1
    assert fit_context([0] * 15, None, 16, "error")[1] == 1
    for prompt, max_tokens in ((15, 2), (16, 1), (16, None), (17, None)):
        with pytest.raises(ValueError, match=f"= {prompt + (max_tokens or 1)} exceeds max_seq_len 16"):
            fit_context([0] * prompt, max_tokens, 16, "error")


@pytest.mark.parametrize(("prompt", "expected"), [(3, 5), (11, 5), (12, 4), (15, 1)])
def test_a_default_of_max_tokens_takes_the_room_there_is(prompt, expected):
    assert fit_context([0] * prompt, None, 16, "error", default_max_tokens=5)[1] == expected


def test_a_default_of_max_tokens_yields_to_the_requests_own():
    assert fit_context([0] * 3, 9, 16, "error", default_max_tokens=5)[1] == 9
    assert fit_context([0] * 20, None, 16, "cut", default_max_tokens=2) == ([0] * 14, 2)


@pytest.mark.parametrize("bad", ["drop", None, 5, ["cut"], True])
def test_unknown_overflow_is_refused(bad):
    with pytest.raises(ValueError, match="on_overflow must be 'error' or 'cut', got"):
        fit_context([1], 1, 8, bad)
