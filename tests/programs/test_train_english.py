"""The tool that trains a model on English: its cleaning keeps prose, its split is by document, its runs continue."""

import json
import math
import struct
import zlib
from argparse import Namespace
from dataclasses import replace

import english_corpus
import english_prose
import english_training
import numpy as np
import pytest
import torch
import train_english
from english_sources import SOURCES, Source, documents
from safetensors import safe_open

from qwen3fast import load_model

SENTENCE = "It was the best of times, and it was the worst of times, as the author of this book has said to all of us."


def cleaned(text, form):
    return [paragraph for _, t in english_prose.prose([("name", text)], form, set()) for paragraph in t.split("\n\n")]


def test_html_keeps_paragraphs_alone():
    page = f"""<html><head><title>{SENTENCE}</title></head><body><h1>{SENTENCE[:-1]} 1.</h1>
    <p>{SENTENCE.replace("book", "<b>book</b>")}</p><pre>{SENTENCE} code</pre><ul><li>short</li></ul>
    <table><tr><td>{SENTENCE} in a table.</td></tr></table></body></html>"""
    assert cleaned(page, "html") == [SENTENCE]


def test_pod_keeps_text_without_codes():
    text = f"=head1 NAME\n\n    code is indented\n\n{SENTENCE.replace('book', 'L<the C<book>|perlbook>')}\n"
    assert cleaned(text.replace("L<the C<book>|perlbook>", "B<C<book>>"), "pod") == [SENTENCE]


def test_dictionaries_keep_definitions():
    text = f"Word \\Word\\, n. [F.]\n   1. {SENTENCE}\n      --Dickens.\n      [1913 Webster]\n"
    assert cleaned(text, "dictionary") == [SENTENCE]


def test_dictionaries_become_documents_of_some_paragraphs():
    words = [f"{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(50)]
    text = "\n\n".join(SENTENCE.replace("best", word) for word in words)
    documents = list(english_prose.prose([("name", text)], "dictionary", set()))
    assert [name for name, _ in documents] == ["name#0", "name#40"]
    assert sum(len(t.split("\n\n")) for _, t in documents) == 50


def test_books_of_sword_modules_are_read(tmp_path):
    folder = tmp_path / "usr" / "share" / "texts"
    folder.mkdir(parents=True)
    verse = f'<w lemma="x">{SENTENCE}</w><note>left out</note>\r\n'.encode()
    blocks = [zlib.compress(verse), zlib.compress(verse.replace(b"best", b"last"))]
    (folder / "ot.bzz").write_bytes(b"".join(blocks))
    entries = [(0, len(blocks[0]), len(verse)), (len(blocks[0]), len(blocks[1]), len(verse))]
    (folder / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *entry) for entry in entries))
    source = Source("package", "texts/*.bzz", "sword")
    found = list(english_prose.prose(documents(source, tmp_path), "sword", set()))
    assert [text for _, text in found] == [SENTENCE, SENTENCE.replace("best", "last")]


@pytest.mark.parametrize(
    "paragraph",
    [
        "Too short to be kept.",
        SENTENCE.removesuffix("."),
        "x = {a: 1}; y = [2, 3]; " + SENTENCE[:60] + " <<>> {}{} [[]] == != 0x3f.",
        "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar Papa.",
        "Es war die beste Zeit und es war die schlimmste Zeit, wie der Dichter dieses Buches uns allen gesagt hat.",
    ],
)
def test_what_is_no_english_prose_is_dropped(paragraph):
    assert english_prose.is_prose(SENTENCE) and not english_prose.is_prose(paragraph)


def test_repeated_paragraphs_are_kept_once_over_all_documents():
    other = SENTENCE.replace("best", "last")
    documents = [("a", f"{SENTENCE}\n\n{other}"), ("b", SENTENCE), ("c", f"{other.upper().capitalize()}")]
    assert list(english_prose.prose(documents, "plain", set())) == [("a", f"{SENTENCE}\n\n{other}")]


def test_few_documents_are_held_out_always_the_same():
    names = [f"package/{number}.html" for number in range(2000)]
    held_out = [name for name in names if english_corpus.is_held_out(name)]
    assert 10 < len(held_out) < 100 and held_out == [name for name in names if english_corpus.is_held_out(name)]


def test_sources_are_distinct_and_of_known_forms():
    assert len({(s.package, s.pattern) for s in SOURCES}) == len(SOURCES)
    assert {s.form for s in SOURCES} <= set(english_prose.FORMS)


def test_learning_rate_warms_up_and_ends_at_zero():
    assert english_training.scale_at(0, 0.0) == pytest.approx(1 / english_training.WARMUP_STEPS)
    assert english_training.scale_at(1000, 0.5) == 1.0
    assert english_training.scale_at(1000, 1.0) == english_training.scale_at(1000, 1.01) == 0.0
    assert 0 < english_training.scale_at(1000, 0.99) < 0.1


def test_a_step_draws_the_same_places_again():
    ids = np.arange(5000, dtype=np.uint16)
    first, again, next_step = (english_training.batch_at(ids, step, 3, seed=0) for step in (4, 4, 5))
    assert first.shape == (3, english_training.LENGTH + 1) and torch.equal(first, again)
    assert not torch.equal(first, next_step) and (first.diff() == 1).all()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A corpus of numbers that follow each other, and sizes that train in no time."""
    config = replace(english_training.CONFIG, vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config = replace(config, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    for module in (english_training, train_english):
        monkeypatch.setattr(module, "CONFIG", config)
    monkeypatch.setattr(english_training, "LENGTH", 16)
    ids = (np.arange(2000) % 90).astype(np.uint16)
    for name in ("train", "held_out"):
        ids.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "tokenizer.json").write_text("{}")
    args = Namespace(hours=0.5 / 3600, batch_tokens=64, save_minutes=0.1 / 60, eval_tokens=64)
    return tmp_path, ids, args


def test_a_run_saves_continues_and_exports(small):
    folder, ids, args = small
    run = english_training.Run(folder / "checkpoint.pt", 3e-3, 0, resume=False)
    exports = []
    run.train(ids, ids, args, exports.append)
    assert exports and run.state.step > 0 and run.state.tokens == 64 * run.state.step
    assert run.state.curve[-1]["held_out_loss"] < run.state.curve[0]["train_loss"] <= math.log(96) + 0.2
    again = english_training.Run(folder / "checkpoint.pt", 3e-3, 1, resume=True)
    assert again.state == run.state
    for ours, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    args.hours *= 2
    again.train(ids, ids, args, lambda run: None)
    assert again.state.step > run.state.step and again.state.cpu_seconds > run.state.cpu_seconds > 0
    assert again.state.seconds >= args.hours * 3600

    train_english.export(again, folder, [{"package": "p", "version": "1", "bytes": 1, "prose_characters": 1}], "c", 64)
    facts = json.loads((folder / "model" / "training.json").read_text())
    assert facts["steps"] == again.state.step and facts["curve"] == again.state.curve
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  no iterator
    model = load_model(str(folder / "model"), "cpu")
    loss = english_training.held_out_loss(model.float(), ids, 64)
    assert facts["held_out_perplexity"] == pytest.approx(math.exp(loss), rel=1e-2)
    assert f"| {again.state.step:,} |" in (folder / "model" / "README.md").read_text()
