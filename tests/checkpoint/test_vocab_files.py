"""Folders without tokenizer.json: vocab.json and merges.txt give the tokenizer, or the model takes token ids alone."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest

from qwen3fast import Generator, SamplingParams
from qwen3fast.checkpoint.metadata import read_tokenizer
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.text.tokenizer import Tokenizer

TEXTS = [
    "What is 17 + 25?",
    "  It's   fine,\n\nisn't IT?\r\n",
    "naïve café e\u0301 日本語 🎉 1234",
    "<|im_start|>user\nhello<|im_end|>\n<think>\nhm</think>",
]
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def split_tokenizer(folder: Path, added: str = "config") -> Path:
    """Write tiny's tokenizer as vocab.json and merges.txt; added: where the added tokens stand."""
    shutil.copytree(TINY_FOLDER, folder, dirs_exist_ok=True)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").unlink()
    tokens = {token.pop("id"): token for token in whole["added_tokens"]}
    vocab = {text: i for text, i in whole["model"]["vocab"].items() if i not in tokens}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "Qwen2Tokenizer"}
    settings.pop("added_tokens_decoder", None)
    if added == "config":
        settings["added_tokens_decoder"] = {
            str(i): {k: v for k, v in t.items() if k != "id"} for i, t in tokens.items()
        }
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_the_two_files_give_the_tokenizer_of_tokenizer_json(tmp_path):
    ours, whole = read_tokenizer(split_tokenizer(tmp_path)), Tokenizer.from_folder(TINY_FOLDER)
    for text in (unicodedata.normalize("NFC", text) for text in TEXTS):  # which tiny's own tokenizer leaves out
        ids = whole.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == whole.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == whole.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == whole.vocab_size and ours.chat_template == whole.chat_template


@pytest.mark.parametrize("added", ["config", "none"])
def test_the_two_files_give_the_tokenizer_of_transformers(tmp_path, added):
    transformers = pytest.importorskip("transformers")
    split_tokenizer(tmp_path, added)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids


def test_a_model_with_the_two_files_generates_text(tmp_path):
    with Generator.from_pretrained(split_tokenizer(tmp_path), device="cpu", compile=False, max_seq_len=64) as generator:
        result = generator.chat([{"role": "user", "content": "What is 17 + 25?"}], GREEDY, enable_thinking=False)
    assert result.text == "42"


def test_a_folder_without_a_tokenizer_takes_token_ids_with_one_warning(tmp_path):
    shutil.copytree(TINY_FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="holds no tokenizer") as warned:
        generator = Generator.from_pretrained(tmp_path, device="cpu", compile=False, max_seq_len=64)
    with generator:
        assert len([w for w in warned if "tokenizer" in str(w.message)]) == 1
        assert generator.tokenizer is None and len(generator.generate([5, 6, 7], GREEDY).token_ids) <= 4
        with pytest.raises(ValueError, match="tokenizer"):
            generator.generate("text", GREEDY)


def test_added_tokens_of_old_folders_are_not_left_out_silently(tmp_path):
    split_tokenizer(tmp_path, "none")
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 7}', encoding="utf-8")
    with pytest.raises(ValueError, match="has no added_tokens_decoder; save the tokenizer with"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", "vocab.json and merges.txt are not a tokenizer"),
        ("vocab.json", "{", "vocab.json and merges.txt are not a tokenizer"),
        ("vocab.json", '{"a": 0}', "do not fit each other"),
        ("merges.txt", "a b c d\n", "vocab.json and merges.txt"),
        ("tokenizer_config.json", '{"tokenizer_class": "GPT2Tokenizer"}', "tokenizer_class='GPT2Tokenizer' needs a"),
        ("tokenizer_config.json", '{"tokenizer_class": []}', r"tokenizer_class=\[\] needs a tokenizer.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "added tokens are damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added tokens are damaged"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"content": 5}}}', "added tokens are damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    split_tokenizer(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)
