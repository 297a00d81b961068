"""Embedder against transformers, on checkpoints that transformers itself wrote."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import fill_randomly, small_config
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

from qwen3fast import Embedder

TEXTS = [
    "A cat sat.",
    "What is 17 + 25?",
    "x",
    "Some longer text about nothing at all, " * 4,
    "Copy: abc",
    "",
    "yes no",
]


def published_embeddings(folder, texts, dtype) -> torch.Tensor:
    """The model cards' way: end-of-text appended, padded on the left, last state, scaled to length 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    assert type(model) is Qwen3Model
    ids = [[*tokenizer(text).input_ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")] for text in texts]
    longest = max(map(len, ids))
    token_BT = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        states = model(input_ids=token_BT, attention_mask=mask_BT).last_hidden_state[:, -1].float()
    return torch.nn.functional.normalize(states, dim=-1)


def save_embedding_checkpoint(folder, tokenizer_folder, **changes):
    """A Qwen3Model as transformers saves it: names without "model.", no output projection."""
    config = small_config(vocab_size=1024, **changes)
    model = Qwen3Model(Qwen3Config(**{**config.to_dict(), "architectures": None}))
    fill_randomly(model)
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8])
def test_embeddings_equal_transformers(tmp_path, tokenizer_folder, changes, batch_size):
    folder = save_embedding_checkpoint(tmp_path, tokenizer_folder, **changes)
    ours = Embedder.from_pretrained(folder, device="cpu").encode(TEXTS, batch_size=batch_size)
    torch.testing.assert_close(ours, published_embeddings(folder, TEXTS, torch.float32), rtol=0, atol=1e-5)


def test_embeddings_equal_transformers_in_bfloat16(tmp_path, tokenizer_folder):
    folder = save_embedding_checkpoint(tmp_path, tokenizer_folder)
    ours = Embedder.from_pretrained(folder, device="cpu", dtype="bfloat16").encode(TEXTS)
    torch.testing.assert_close(ours, published_embeddings(folder, TEXTS, torch.bfloat16), rtol=0, atol=2e-2)


def test_embeddings_of_queries_equal_transformers(tmp_path, tokenizer_folder):
    folder = save_embedding_checkpoint(tmp_path, tokenizer_folder)
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    ours = Embedder.from_pretrained(folder, device="cpu").encode(TEXTS, instruction=instruction)
    texts = [f"Instruct: {instruction}\nQuery:{text}" for text in TEXTS]
    torch.testing.assert_close(ours, published_embeddings(folder, texts, torch.float32), rtol=0, atol=1e-5)
