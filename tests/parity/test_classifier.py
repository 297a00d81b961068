"""Classifier and Reranker with a score head against transformers' Qwen3ForSequenceClassification."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_near
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from qwen3fast import Classifier, Reranker
from qwen3fast.checkpoint.score_head import ScoreHead
from qwen3fast.reranker import INSTRUCTION, PREFIX, SUFFIX
from qwen3fast.text.tokenizer import Tokenizer

SIZES = {"vocab_size": 1026, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
TEXTS = ["A cat sat on a mat.", "x", "What is 3 + 4? It is 7, as everybody knows."]


def save(folder, tokenizer: Tokenizer, **config) -> Qwen3ForSequenceClassification:
    """Write a small random classifier with its tokenizer. Returns it."""
    torch.manual_seed(0)
    pad = tokenizer.base.token_to_id("<|endoftext|>")
    model = Qwen3ForSequenceClassification(Qwen3Config(**SIZES, pad_token_id=pad, **config)).eval()
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.base.save(str(folder / "tokenizer.json"))
    return model


def their_logits(model, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Return what transformers makes of texts in one batch, padded on the right."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.base, pad_token="<|endoftext|>")
    with torch.no_grad():
        return model(**theirs(texts, return_tensors="pt", padding=True, return_token_type_ids=False)).logits


@pytest.mark.parametrize("num_labels", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_probabilities_equal_those_of_transformers(tmp_path, tokenizer, num_labels, tied):
    theirs = save(tmp_path, tokenizer, num_labels=num_labels, tie_word_embeddings=tied)
    classifier = Classifier.from_pretrained(tmp_path, device="cpu", dtype="float32")
    expected = their_logits(theirs, tokenizer, TEXTS)
    assert_near(classifier.logits(TEXTS), expected)
    assert_near(classifier.logits(TEXTS, batch_size=1), expected)
    assert_near(classifier.logits(TEXTS[0]), expected[:1])
    probabilities = torch.sigmoid(expected) if num_labels == 1 else torch.softmax(expected, dim=-1)
    assert_near(classifier.probabilities(TEXTS), probabilities)
    assert classifier.labels == tuple(f"LABEL_{i}" for i in range(num_labels))
    assert classifier.logits([]).shape == (0, num_labels)


def test_labels_and_problem_type_are_read(tmp_path, tokenizer):
    names = {0: "joy", 1: "anger", 2: "fear"}
    problem = "multi_label_classification"
    theirs = save(tmp_path, tokenizer, id2label=names, label2id={v: k for k, v in names.items()}, problem_type=problem)
    classifier = Classifier.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert classifier.labels == ("joy", "anger", "fear")
    assert_near(classifier.probabilities(TEXTS), torch.sigmoid(their_logits(theirs, tokenizer, TEXTS)))


def test_special_tokens_that_the_tokenizer_adds_are_read(tmp_path, tokenizer_folder):
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    end = ("<|im_end|>", tokenizer.base.token_to_id("<|im_end|>"))
    tokenizer.base.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[end])
    theirs = save(tmp_path, tokenizer, num_labels=2)
    classifier = Classifier.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert_near(classifier.logits(TEXTS), their_logits(theirs, tokenizer, TEXTS))


@pytest.mark.parametrize("num_labels", [1, 2])
def test_reranker_with_a_score_head_reads_the_published_prompt(tmp_path, tokenizer, num_labels):
    theirs = save(tmp_path, tokenizer, num_labels=num_labels)  # its tokenizer has no tokens "yes" and "no"
    reranker = Reranker.from_pretrained(tmp_path, device="cpu", dtype="float32")
    scores = reranker.score("Where?", TEXTS)
    prompts = [f"{PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: Where?\n<Document>: {text}{SUFFIX}" for text in TEXTS]
    logits = torch.cat([their_logits(theirs, tokenizer, [prompt]) for prompt in prompts])
    expected = torch.sigmoid(logits[:, 0]) if num_labels == 1 else torch.softmax(logits, dim=-1)[:, 1]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)


def test_reranker_refuses_a_head_of_three_labels(tmp_path, tokenizer):
    save(tmp_path, tokenizer, num_labels=3)
    with pytest.raises(ValueError, match="the score head has 3 labels; a Reranker takes one or two"):
        Reranker.from_pretrained(tmp_path, device="cpu")


def test_classifier_refuses_what_it_cannot_score(tmp_path, tokenizer):
    save(tmp_path, tokenizer, num_labels=2)
    classifier = Classifier.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"texts\[1\] has no tokens"):
        classifier.logits(["a", ""])
    with pytest.raises(ValueError, match="tiny has no score head; a Classifier needs a Qwen3For"):
        Classifier.from_pretrained("tiny")


def test_classifier_cuts_long_texts_at_their_end(tmp_path, tokenizer):
    theirs = save(tmp_path, tokenizer, num_labels=2)
    classifier = Classifier.from_pretrained(tmp_path, device="cpu", dtype="float32", max_length=3)
    ids = torch.tensor([tokenizer.encode(TEXTS[0])[:3]])
    with torch.no_grad():
        assert_near(classifier.logits(TEXTS[0]), theirs(ids).logits)
    assert isinstance(Classifier(classifier.model, tokenizer, ScoreHead(torch.ones(1, 32), ("a",), False)), Classifier)


def test_quantized_classifier_is_near(tmp_path, tokenizer):
    save(tmp_path, tokenizer, num_labels=2)
    plain = Classifier.from_pretrained(tmp_path, device="cpu", dtype="float32").logits(TEXTS)
    small = Classifier.from_pretrained(tmp_path, device="cpu", dtype="float32", quantization="int8").logits(TEXTS)
    assert (plain - small).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("kind", [Classifier, Reranker])
def test_check_weights_looks_at_the_score_head(tmp_path, tokenizer, kind):
    model = save(tmp_path, tokenizer, num_labels=2)
    kind.from_pretrained(tmp_path, device="cpu", check_weights=True)
    model.score.weight.data[1, 3] = torch.nan
    model.save_pretrained(tmp_path)
    kind.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"score head in .* not finite in float32:\n  score.weight: 1 NaN and 0 inf"):
        kind.from_pretrained(tmp_path, device="cpu", check_weights=True)


@pytest.mark.parametrize("shape", [(2, 31), (64,), None])
def test_a_head_that_does_not_fit_is_refused(tmp_path, tokenizer, shape):
    model = save(tmp_path, tokenizer, num_labels=2)
    tensors = {name: t for name, t in model.state_dict().items() if name != "score.weight"}
    if shape is not None:
        tensors["score.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"score\.weight"):
        Classifier.from_pretrained(tmp_path, device="cpu")
