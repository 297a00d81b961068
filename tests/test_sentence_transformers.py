"""Embedder on folders of sentence-transformers: pooling, normalizing, prompts and lengths are read, not assumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_near, randomized, small_config, write_text_checkpoint
from tokenizers.processors import TemplateProcessing

from qwen3fast import Embedder
from qwen3fast.text.tokenizer import Tokenizer

TEXTS = ["A cat sat.", "x", "What is 17 + 25? Nobody knows it, though many ask."]
PROMPTS = {"query": "Find what answers it\nQuery:", "document": ""}
LAST, MEAN = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, {"pooling_mode_mean_tokens": True}


def write(
    folder: Path,
    tokenizer_folder: Path,
    pooling: dict,
    kinds: tuple[str, ...] = ("Pooling", "Normalize"),
    end: str = "<|endoftext|>",
    sizes: dict[str, int] | None = None,
    **prompts,
) -> Path:
    """Write a small random model as sentence-transformers does."""
    write_text_checkpoint(folder, randomized(small_config(vocab_size=1024, **(sizes or {}))), tokenizer_folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for i, kind in enumerate(kinds, 1):
        path = f"{i}_{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **pooling}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS, **prompts}))
    base = Tokenizer.from_folder(folder).base
    if end:
        base.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, base.token_to_id(end))])
    base.save(str(folder / "tokenizer.json"))
    return folder


def states(embedder: Embedder, text: str, end: str = "<|endoftext|>") -> torch.Tensor:
    """Return the normed states (T, E) of a text's tokens."""
    ids = [*embedder.tokenizer.encode(text), *([embedder.tokenizer.base.token_to_id(end)] if end else [])]
    return embedder.model.model.norm(embedder.model.hidden(torch.tensor([ids])))[0]


def load(folder: Path) -> Embedder:
    return Embedder.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("pooling", [LAST, {"pooling_mode": "lasttoken"}])
@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>", ""])
def test_last_token_is_the_one_that_the_tokenizer_ends_with(tmp_path, tokenizer_folder, pooling, end):
    embedder = load(write(tmp_path, tokenizer_folder, pooling, end=end))
    expected = torch.stack([states(embedder, text, end)[-1] for text in TEXTS])
    assert_near(embedder.encode(TEXTS), torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_mean_is_over_the_tokens_of_each_text(tmp_path, tokenizer_folder, batch_size):
    embedder = load(write(tmp_path, tokenizer_folder, MEAN))
    expected = torch.stack([states(embedder, text).mean(dim=0) for text in TEXTS])
    assert_near(embedder.encode(TEXTS, normalize=False, batch_size=batch_size), expected)


def test_vectors_keep_their_length_without_a_normalizing_module(tmp_path, tokenizer_folder):
    embedder = load(write(tmp_path, tokenizer_folder, LAST, kinds=("Pooling",)))
    expected = torch.stack([states(embedder, text)[-1] for text in TEXTS])
    assert_near(embedder.encode(TEXTS), expected)
    assert_near(embedder.encode(TEXTS, normalize=True), torch.nn.functional.normalize(expected, dim=-1))


def test_prompts_are_put_before_texts_by_their_names(tmp_path, tokenizer_folder):
    embedder = load(write(tmp_path, tokenizer_folder, LAST))
    whole = [PROMPTS["query"] + text for text in TEXTS]
    assert_near(embedder.encode(TEXTS, prompt_name="query"), embedder.encode(whole))
    assert_near(embedder.encode(TEXTS, prompt_name="document"), embedder.encode(TEXTS))
    with pytest.raises(ValueError, match=r"no prompt 'other'; it has \['document', 'query'\]"):
        embedder.encode(TEXTS, prompt_name="other")
    with pytest.raises(ValueError, match="prompt_name or instruction, not both"):
        embedder.encode(TEXTS, prompt_name="query", instruction="Find it")


def test_default_prompt_is_used_where_nothing_else_is_given(tmp_path, tokenizer_folder):
    embedder = load(write(tmp_path, tokenizer_folder, LAST, default_prompt_name="query"))
    assert_near(embedder.encode("x"), embedder.encode("x", prompt_name="query"))
    plain = embedder.encode(PROMPTS["query"] + "x", prompt_name="document")
    assert_near(embedder.encode("x"), plain)
    instructed = embedder.encode("Instruct: Find it\nQuery:x", prompt_name="document")
    assert_near(embedder.encode("x", instruction="Find it"), instructed)


def test_other_checkpoints_have_no_prompts():
    with pytest.raises(ValueError, match=r"no prompt 'query'; it has \[\]"):
        Embedder.from_pretrained("tiny", device="cpu").encode("x", prompt_name="query")


def test_length_is_read_and_the_end_survives_the_cut(tmp_path, tokenizer_folder):
    folder = write(tmp_path, tokenizer_folder, LAST)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    embedder = load(folder)
    assert embedder.max_length == 5
    cut = embedder.tokenizer.decode(embedder.tokenizer.encode(TEXTS[2])[:4])
    assert_near(embedder.encode(TEXTS[2]), embedder.encode(cut))
    assert Embedder.from_pretrained(folder, device="cpu", max_length=7).max_length == 7


def test_a_text_without_tokens_is_refused(tmp_path, tokenizer_folder):
    embedder = load(write(tmp_path, tokenizer_folder, LAST, end=""))
    with pytest.raises(ValueError, match=r"texts\[1\] has no tokens"):
        embedder.encode(["x", ""])


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"pooling_mode_cls_token": True}, "pooling .*'cls'.* is not supported; supported: one of lasttoken, mean"),
        ({"pooling_mode": "max"}, "pooling .*'max'.* is not supported"),
        ({**MEAN, "pooling_mode_lasttoken": True}, "is not supported"),
        ({}, r"pooling \[\] is not supported"),
        ({**MEAN, "include_prompt": False}, "include_prompt=false is not supported"),
    ],
)
def test_other_poolings_are_refused_by_name(tmp_path, tokenizer_folder, pooling, message):
    with pytest.raises(ValueError, match=rf"1_Pooling.*{message}"):
        load(write(tmp_path, tokenizer_folder, pooling))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"path": "", "type": "a.Transformer"}, {"path": "2_Dense", "type": "a.Dense"}]', "Dense is not supported"),
        ('[{"path": "0", "type": "a.Transformer"}]', "must lie in the folder itself"),
        ('[{"path": "", "type": "a.Transformer"}, {"path": "../x", "type": "a.Pooling"}]', "folders inside"),
        ("{}5", "is not a list of modules"),
        ("[1]", "is not a list of modules"),
        ("[{}]", "is not a list of modules"),
    ],
)
def test_other_modules_are_refused_by_name(tmp_path, tokenizer_folder, text, message):
    folder = write(tmp_path, tokenizer_folder, LAST)
    (folder / "modules.json").write_text(text)
    with pytest.raises(ValueError, match=rf"modules\.json.*{message}"):
        load(folder)


@pytest.mark.parametrize("given", [{"prompts": 5}, {"prompts": {"a": 5}}, {"default_prompt_name": "b"}])
def test_damaged_prompts_are_refused(tmp_path, tokenizer_folder, given):
    with pytest.raises(ValueError, match="config_sentence_transformers"):
        load(write(tmp_path, tokenizer_folder, LAST, **given))
