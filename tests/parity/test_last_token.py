"""Embedder and Reranker against transformers, on checkpoints that transformers itself wrote."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import fill_randomly, small_config
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from qwen3fast import Embedder, Reranker
from qwen3fast.checkpoint.hf_config import CheckpointConfig

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
    model = Qwen3Model(Qwen3Config(**{**CheckpointConfig(config).to_dict(), "architectures": None}))
    fill_randomly(model)
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("batch_size", "changes"),
    [(1, {}), (3, {"tie_word_embeddings": False}), (7, {"attention_bias": True}), (8, {})],
    ids=str,
)
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


def published_scores(folder, query, documents, dtype) -> list[float]:
    """The model cards' way: prompt in three parts, padded on the left, softmax of the last logits of "no" and "yes"."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    task = "Given a web search query, retrieve relevant passages that answer the query"
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    pairs = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}" for document in documents]
    ids = [[i for part in (prefix, pair, suffix) for i in tokenizer(part).input_ids] for pair in pairs]
    longest = max(map(len, ids))
    token_BT = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    with torch.no_grad():
        logits_BV = model(input_ids=token_BT, attention_mask=mask_BT).logits[:, -1]
    no_yes_B2 = logits_BV[:, [tokenizer.convert_tokens_to_ids("no"), tokenizer.convert_tokens_to_ids("yes")]]
    return no_yes_B2.float().log_softmax(dim=1)[:, 1].exp().tolist()


@pytest.mark.parametrize(
    ("batch_size", "dtype", "changes"),
    [
        (1, torch.float32, {}),
        (3, torch.float32, {"tie_word_embeddings": False}),
        (8, torch.bfloat16, {}),
        (3, torch.bfloat16, {"tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_scores_equal_transformers(tmp_path, yes_no_folder, changes, dtype, batch_size):
    config = small_config(vocab_size=1026, max_position_embeddings=512, **changes)
    model = Qwen3ForCausalLM(Qwen3Config(**CheckpointConfig(config).to_dict()))
    fill_randomly(model)
    model.save_pretrained(tmp_path)
    shutil.copytree(yes_no_folder, tmp_path, dirs_exist_ok=True)
    ours = Reranker.from_pretrained(tmp_path, device="cpu", dtype=dtype).score("Why?", TEXTS, batch_size=batch_size)
    theirs = published_scores(tmp_path, "Why?", TEXTS, dtype)
    assert ours == pytest.approx(theirs, abs=1e-5 if dtype == torch.float32 else 0.05)
