"""Tokenizers of GGUF files: equal to the tokenizer.json that they were made of, and to transformers' Qwen2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from gguf_files import write_gguf
from gguf_metadata import add_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from qwen3fast import load_model
from qwen3fast.checkpoint.gguf.config import config_of
from qwen3fast.checkpoint.gguf.header import read_header
from qwen3fast.checkpoint.gguf.tokenizer import tokenizer_of
from qwen3fast.checkpoint.metadata import read_tokenizer
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in F32."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, load_model("tiny", "cpu", "float32"), tokenizer_folder=TINY_FOLDER)
    return file


SPECIAL_TEXTS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "[PAD1023]"]
PIECES = ["It's", "WE'LL", "don't", "(hello", " world", "  \n\n", "\r\n", "\t", "1234", "17 + 25?", "e\u0301", "\ufb01"]
texts = st.lists(st.text(max_size=12) | st.sampled_from(PIECES + SPECIAL_TEXTS), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tiny_tokenizers(tiny_file) -> tuple[Tokenizer, Tokenizer]:
    """From the GGUF file, and the original."""
    return read_tokenizer(tiny_file), Tokenizer.from_folder(TINY_FOLDER)


@settings(max_examples=60)
@given(text=texts)
def test_tokenizer_gives_the_ids_and_texts_of_the_original(tiny_tokenizers, text):
    ours, original = tiny_tokenizers
    ids = original.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == original.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)


def test_tokenizer_has_the_tokens_of_the_original(tiny_tokenizers):
    ours, original = tiny_tokenizers
    assert ours.vocab_size == original.vocab_size == 1024
    assert ours.special_tokens == original.special_tokens
    for i in range(1030):
        assert ours.token_bytes(i) == original.token_bytes(i) and ours.is_special(i) == original.is_special(i)


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_chat_template_is_that_of_the_original(tiny_tokenizers, enable_thinking):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    for some in (None, tools):
        ours, original = (
            tokenizer.apply_chat_template(QUESTION, some, enable_thinking=enable_thinking, tokenize=True)
            for tokenizer in tiny_tokenizers
        )
        assert ours == original


@pytest.fixture(scope="module")
def qwen_tokenizers(tmp_path_factory) -> tuple[Tokenizer, Qwen2Tokenizer]:
    """Qwen2's pattern and normalizer with the tiny vocabulary: ours from a GGUF file, and transformers'."""
    file = tmp_path_factory.mktemp("qwen2") / "tokenizer.gguf"
    writer = gguf.GGUFWriter(file, "qwen3")
    add_tokenizer(writer, TINY_FOLDER, 1100, "qwen2")  # longer than there are tokens, as published models are
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    stored = json.loads((TINY_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    reference = Qwen2Tokenizer(stored["model"]["vocab"], [tuple(pair) for pair in stored["model"]["merges"]])
    for added in stored["added_tokens"]:
        token = AddedToken(added["content"], normalized=False, special=added["special"])
        reference.add_tokens([token], special_tokens=added["special"])
    return read_tokenizer(file), reference


@settings(max_examples=60)
@given(text=texts)
def test_qwen2_is_the_pattern_of_transformers(qwen_tokenizers, text):
    ours, reference = qwen_tokenizers
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False)


def test_padding_tokens_are_no_text(qwen_tokenizers):
    ours, _ = qwen_tokenizers
    assert ours.vocab_size == 1024 and ours.token_bytes(1050) == b""
    assert ours.decode(ours.encode("[PAD1050]")) == "[PAD1050]"


@pytest.mark.parametrize("adds", [True, False])
def test_a_bos_token_is_known_to_templates_that_use_it_and_added_where_the_file_says_so(tiny_file, adds):
    """As in models distilled from DeepSeek-R1; other Qwen3 files name a bos_token that nothing uses."""
    header, bos = read_header(tiny_file), 5
    assert "bos_token" not in tokenizer_of(header).special_tokens
    more = {"add_bos_token": adds, "bos_token_id": bos, "pre": "deepseek-r1-qwen"}
    metadata = {**header.metadata, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}
    metadata["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer = tokenizer_of(replace(header, metadata=metadata))
    ids = tokenizer.encode("It's 17.")
    assert tokenizer.encode_prompt("It's 17.") == [bos] * adds + ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "It's 17."}], tokenize=True)[1:] == ids
    assert tokenizer.special_tokens["bos_token"] == tokenizer.base.id_to_token(bos)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "llama", "tokenizer.ggml.model 'llama' is not supported; only 'gpt2'"),
        (
            "pre",
            "llama-bpe",
            "'llama-bpe' is not supported; supported: qwen2, deepseek-r1-qwen, qwen3fast-tiny",
        ),
        ("pre", None, "tokenizer.ggml.pre None is not supported"),
        ("add_bos_token", True, "tokenizer.ggml.bos_token_id None names no token, but it is used"),
        ("token_type", [1, 1], "token_type must give the type of each of 1024 tokens"),
        ("tokens", None, "tokenizer.ggml.tokens is missing, or holds no strings"),
        ("merges", ["a nonsense"], "its tokenizer cannot be built: .*out of vocabulary"),
        ("merges", [3], "tokenizer.ggml.merges is missing, or holds no strings"),
    ],
)
def test_tokenizers_that_are_not_supported_are_refused(tiny_file, key, value, message):
    header = read_header(tiny_file)
    metadata = {**header.metadata, f"tokenizer.ggml.{key}": value}
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ValueError, match=message):
        tokenizer_of(replace(header, metadata=metadata))


def test_tokens_must_be_distinct_and_have_rows(tiny_file):
    header = read_header(tiny_file)
    tokens = ["same", "same", *header.metadata["tokenizer.ggml.tokens"][2:]]
    with pytest.raises(ValueError, match=r"some token of tokenizer.ggml.tokens appears twice"):
        tokenizer_of(replace(header, metadata=header.metadata | {"tokenizer.ggml.tokens": tokens}))
    more = {"tokenizer.ggml.tokens": [*tokens, "x"], "tokenizer.ggml.token_type": [1] * 1025}
    with pytest.raises(ValueError, match=r"there are 1025 tokens, but token_embd.weight has 1024 rows"):
        tokenizer_of(replace(header, metadata=header.metadata | more))
    with pytest.raises(ValueError, match=r"there are 1024 tokens, but ids that end a reply are \[5000\]"):
        config_of(replace(header, metadata=header.metadata | {"tokenizer.ggml.eos_token_id": 5000}))
