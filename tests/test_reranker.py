"""Reranker: the prompt it reads, the probability it gives, the same in any batch, what is cut, its errors."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import randomized, small_config, write_text_checkpoint

from qwen3fast import Reranker
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import Qwen3
from qwen3fast.quantization.convert import formats_of
from qwen3fast.reranker import INSTRUCTION, PREFIX, SUFFIX
from qwen3fast.text.tokenizer import Tokenizer

QUERY = "What is the capital of France?"
DOCUMENTS = ["Paris.", "", "A cat sat on a mat, and a dog sat beside it. " * 2, "x", "yes no", "é"]
CONFIG = small_config(vocab_size=1026, max_position_embeddings=512)


@pytest.fixture(scope="module")
def reranker(yes_no_folder) -> Reranker:
    """A small random model behind a Reranker."""
    return Reranker(randomized(CONFIG), Tokenizer.from_folder(yes_no_folder))


def probability(model: Qwen3, tokenizer: Tokenizer, prompt: str) -> float:
    """The definition: softmax over the logits of "no" and "yes" at the prompt's end."""
    logits_V = model(torch.tensor([tokenizer.encode(prompt)]))[0, -1]
    no_yes = logits_V[[tokenizer.base.token_to_id("no"), tokenizer.base.token_to_id("yes")]]
    return torch.softmax(no_yes.double(), dim=0)[1].item()


def prompt_of(query: str, document: str, instruction: str = INSTRUCTION) -> str:
    """The published prompt."""
    return f"{PREFIX}<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}{SUFFIX}"


@pytest.mark.parametrize("instruction", [None, "Is it short?"])
def test_score_is_the_probability_of_yes_after_the_published_prompt(reranker, instruction):
    scores = reranker.score(QUERY, DOCUMENTS, instruction=instruction)
    prompts = [prompt_of(QUERY, document, instruction or INSTRUCTION) for document in DOCUMENTS]
    expected = [probability(reranker.model, reranker.tokenizer, prompt) for prompt in prompts]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) == len(DOCUMENTS)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6, 100])
def test_score_does_not_depend_on_the_batch(reranker, batch_size):
    alone = [reranker.score(QUERY, [document])[0] for document in DOCUMENTS]
    assert reranker.score(QUERY, DOCUMENTS, batch_size=batch_size) == pytest.approx(alone, abs=1e-5)


def test_score_of_no_documents_is_empty(reranker):
    assert reranker.score(QUERY, []) == []


def test_score_cuts_a_long_document_and_nothing_else(reranker):
    tokenizer, document = reranker.tokenizer, "a long text without an end " * 50
    around = len(tokenizer.encode(prompt_of(QUERY, "")))
    short = Reranker(reranker.model, tokenizer, max_length=around + 9)
    body = tokenizer.encode(f"<Instruct>: {INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {document}")
    kept = around + 9 - len(tokenizer.encode(PREFIX)) - len(tokenizer.encode(SUFFIX))
    text = PREFIX + tokenizer.decode(body[:kept]) + SUFFIX
    assert re.search(r"<Document>: a lo", text)
    assert short.score(QUERY, [document]) == pytest.approx([probability(reranker.model, tokenizer, text)], abs=1e-5)


def test_score_refuses_a_query_that_leaves_no_room(reranker):
    with pytest.raises(ValueError, match=r"query and instruction take \d+ tokens .* max_length 512; shorten them"):
        reranker.score("What? " * 200, ["Paris."])


def test_score_of_a_document_that_fits_just(reranker):
    around = len(reranker.tokenizer.encode(prompt_of(QUERY, "Paris.")))
    just = Reranker(reranker.model, reranker.tokenizer, max_length=around)
    assert just.score(QUERY, ["Paris."]) == pytest.approx(reranker.score(QUERY, ["Paris."]), abs=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_from_pretrained_scores_alike_in_every_format(tmp_path, yes_no_folder, tied, quantization):
    # 1,040 rows can be packed: the output projection is quantized as well.
    config = replace(CONFIG, vocab_size=1040, hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    folder = write_text_checkpoint(tmp_path, randomized(config), yes_no_folder)
    loaded = Reranker.from_pretrained(folder, device="cpu", quantization=quantization)
    assert formats_of(loaded.model) == ([quantization] if quantization else [])
    expected = [probability(loaded.model, loaded.tokenizer, prompt_of(QUERY, document)) for document in DOCUMENTS]
    # The full projection also quantizes its input; the two rows do not.
    scores = loaded.score(QUERY, DOCUMENTS)
    assert scores == pytest.approx(expected, abs=1e-5 if quantization is None else 0.05)


def test_reranker_errors(reranker, tokenizer, yes_no_folder, tmp_path):
    for documents in ("one text", None, {"a": 1}):
        with pytest.raises(ValueError, match="documents must be a list of strings"):
            reranker.score(QUERY, documents)
    with pytest.raises(ValueError, match=r"documents\[1\] must be a string, got NoneType"):
        reranker.score(QUERY, ["a", None])
    with pytest.raises(ValueError, match="query must be a string, got int"):
        reranker.score(5, DOCUMENTS)
    for batch_size in (0, 10**9, 1.5, "8"):
        with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 4096"):
            reranker.score(QUERY, DOCUMENTS, batch_size=batch_size)
    for max_length in (0, 513, 1.5, "9"):
        with pytest.raises(ValueError, match="max_length must be an integer from 1 to 512"):
            Reranker(reranker.model, reranker.tokenizer, max_length=max_length)
    with pytest.raises(ValueError, match="tokenizer has no token 'no'"):
        Reranker(reranker.model, tokenizer)
    with pytest.raises(ValueError, match=r"has the id 1025, but the model's vocab_size is 97"):
        Reranker(randomized(small_config()), reranker.tokenizer)
    with pytest.raises(ValueError, match="has random weights and no tokenizer"):
        Reranker.from_pretrained("random:0.6b")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json not found"):
        (tmp_path / "config.json").write_text(json.dumps(CheckpointConfig(CONFIG).to_dict()), encoding="utf-8")
        Reranker.from_pretrained(tmp_path)


def test_reranker_refuses_lone_surrogates_by_place(reranker):
    for query, documents, options, place in (
        ("a\udc80", ["b"], {}, "query .* at character 1"),
        ("a", ["b", "cd\ud83d"], {}, r"documents\[1\] .* at character 2"),
        ("a", ["b"], {"instruction": "\ud83d"}, "instruction .* at character 0"),
    ):
        with pytest.raises(ValueError, match=place):
            reranker.score(query, documents, **options)


def test_reranker_reads_any_iterable_once(reranker):
    expected = reranker.score(QUERY, DOCUMENTS)
    assert reranker.score(QUERY, iter(DOCUMENTS)) == expected == reranker.score(QUERY, tuple(DOCUMENTS))
