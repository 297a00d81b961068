"""Embedder: what it reads of a text, how vectors are cut and scaled, the same vector in any batch, its errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_same, randomized, small_config, write_text_checkpoint
from safetensors.torch import load_file, save_file

from qwen3fast import Embedder, load_model
from qwen3fast.embedder import with_instruction
from qwen3fast.quantization.convert import formats_of
from qwen3fast.text.tokenizer import Tokenizer

TEXTS = [
    "A cat sat.",
    "",
    "What is 17 + 25?",
    "Some longer text about nothing at all, " * 3,
    "x",
    "Copy: abc",
    "é",
    "no",
]


@pytest.fixture(scope="module")
def embedder(tokenizer) -> Embedder:
    """A small random model behind an Embedder."""
    return Embedder(randomized(small_config(vocab_size=1024)), tokenizer)


def reference(embedder: Embedder, text: str) -> torch.Tensor:
    """The definition: the normed last state of the text and the end-of-text token."""
    ids = [*embedder.tokenizer.encode(text), embedder.tokenizer.base.token_to_id("<|endoftext|>")]
    x_BTE = embedder.model.model.norm(embedder.model.hidden(torch.tensor([ids])))
    return x_BTE[0, -1]


def test_encode_gives_the_last_state_of_each_text_in_order(embedder):
    expected = torch.stack([reference(embedder, text) for text in TEXTS])
    with torch.device("meta"):  # an application's default device
        vectors = embedder.encode(TEXTS, normalize=False)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 8, 100])
def test_encode_gives_a_text_the_same_vector_in_any_batch(embedder, batch_size):
    alone = torch.cat([embedder.encode(text) for text in TEXTS])
    torch.testing.assert_close(embedder.encode(TEXTS, batch_size=batch_size), alone, rtol=0, atol=1e-5)


def test_encode_gives_vectors_of_length_one_in_float32(embedder):
    vectors = embedder.encode(TEXTS)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(TEXTS), 48)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))


@pytest.mark.parametrize("dimensions", [1, 32, 48])
def test_encode_scales_what_is_left_of_a_cut_vector(embedder, dimensions):
    cut = embedder.encode(TEXTS, dimensions=dimensions)
    whole = embedder.encode(TEXTS, normalize=False)[:, :dimensions]
    torch.testing.assert_close(cut, whole / whole.norm(dim=-1, keepdim=True))
    assert_same(embedder.encode(TEXTS, dimensions=dimensions, normalize=False), whole)


def test_encode_writes_the_instruction_before_each_query(embedder):
    text = "Instruct: Find it\nQuery:where?"
    assert with_instruction("Find it", "where?") == text
    assert_same(embedder.encode(["where?"], instruction="Find it"), embedder.encode([text]))


def test_encode_of_nothing_is_empty(embedder):
    assert embedder.encode([]).shape == (0, 48)
    assert embedder.encode([], dimensions=7).shape == (0, 7)


def test_encode_cuts_long_texts_and_keeps_the_end_token(tokenizer):
    embedder = Embedder(randomized(small_config(vocab_size=1024)), tokenizer, max_length=6)
    ids = embedder.token_ids(["a b c d e f g h i j"])[0]
    assert ids == [*tokenizer.encode("a b c d e f g h i j")[:5], tokenizer.base.token_to_id("<|endoftext|>")]


def test_encode_gives_vectors_that_autograd_can_use(embedder):
    weight = torch.ones(48, requires_grad=True)
    (embedder.encode(TEXTS) @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("tied", [True, False])
def test_from_pretrained_gives_the_same_vectors(tmp_path, tokenizer, tokenizer_folder, tied):
    model = randomized(small_config(vocab_size=1024, tie_word_embeddings=tied))
    loaded = Embedder.from_pretrained(write_text_checkpoint(tmp_path, model, tokenizer_folder), device="cpu")
    assert_same(loaded.encode(TEXTS), Embedder(model, tokenizer).encode(TEXTS))
    assert loaded.max_length == 256
    assert (loaded.model.lm_head is None) is not tied


@pytest.mark.parametrize("tied", [True, False])
def test_from_pretrained_reads_names_without_model_and_no_output_projection(tmp_path, tokenizer_folder, tied):
    model = randomized(small_config(vocab_size=1024, tie_word_embeddings=tied))
    folder = write_text_checkpoint(tmp_path, model, tokenizer_folder)
    expected = Embedder.from_pretrained(folder, device="cpu").encode(TEXTS)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / "model.safetensors")
    assert_same(Embedder.from_pretrained(folder, device="cpu").encode(TEXTS), expected)
    if not tied:
        with pytest.raises(ValueError, match=r"lm_head\.weight: missing"):
            load_model(folder, device="cpu")


def test_from_pretrained_names_a_misshaped_tensor_once(tmp_path, tokenizer_folder):
    folder = write_text_checkpoint(tmp_path, randomized(small_config(vocab_size=1024)), tokenizer_folder)
    tensors = {n.removeprefix("model."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "norm.weight": torch.ones(5)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight in .*: shape \(5,\), expected \(48,\)") as error:
        Embedder.from_pretrained(folder, device="cpu")
    assert "missing" not in str(error.value)


def test_from_pretrained_refuses_a_tensor_under_both_names(tmp_path, tokenizer_folder):
    folder = write_text_checkpoint(tmp_path, randomized(small_config(vocab_size=1024)), tokenizer_folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "norm.weight": torch.ones(48)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight in model\.safetensors: .*was loaded already"):
        Embedder.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_from_pretrained_quantizes(tmp_path, tokenizer_folder, quantization, tied):
    config = small_config(vocab_size=1024, hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    folder = write_text_checkpoint(tmp_path, randomized(config), tokenizer_folder)
    exact = Embedder.from_pretrained(folder, device="cpu").encode(TEXTS)
    loaded = Embedder.from_pretrained(folder, device="cpu", quantization=quantization)
    assert formats_of(loaded.model) == ([quantization] if quantization else [])
    quantized = loaded.encode(TEXTS)
    assert (exact * quantized).sum(-1).min() > (0.99 if quantization == "int8" else 0.8)


def test_embedder_errors(embedder, tokenizer, tmp_path, tokenizer_folder):
    model = embedder.model
    for texts in (None, 5, {"a": 1}, {"a"}, b"a"):
        with pytest.raises(ValueError, match="texts must be a list of strings"):
            embedder.encode(texts)
    for texts, got in ((["a", 3], "int"), ([None, "a"], "NoneType"), (["a", b"b"], "bytes; decode it first")):
        with pytest.raises(ValueError, match=rf"texts\[.\] must be a string, got {got}"):
            embedder.encode(texts)
    for dimensions in (0, 49, 1.5, "3", True):
        with pytest.raises(ValueError, match="dimensions must be an integer from 1 to 48"):
            embedder.encode("a", dimensions=dimensions)
    for batch_size in (0, 10**9, 1.5, "8", None):
        with pytest.raises(ValueError, match="batch_size must be an integer from 1 to 4096"):
            embedder.encode("a", batch_size=batch_size)
    for max_length in (0, 257, 2**70, 1.5, "9"):
        with pytest.raises(ValueError, match=r"max_length must be an integer from 1 to 256 .the model's"):
            Embedder(model, tokenizer, max_length=max_length)
    for flag in ("normalize", "progress"):
        with pytest.raises(ValueError, match=f"{flag} must be True or False, got 'no'"):
            embedder.encode("a", **{flag: "no"})
    with pytest.raises(ValueError, match=r"gave the id .*vocab_size is 97; they are not of the same checkpoint"):
        Embedder(randomized(small_config()), tokenizer).encode("a")
    with pytest.raises(ValueError, match=r"'random:0\.6b' has random weights and no tokenizer"):
        Embedder.from_pretrained("random:0.6b")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json not found"):
        folder = write_text_checkpoint(tmp_path / "a", model, tokenizer_folder)
        (folder / "tokenizer.json").unlink()
        Embedder.from_pretrained(folder)


def test_embedder_refuses_lone_surrogates_by_place(embedder):
    for texts, place in (
        ("ab\udc80", r"texts\[0\] .* at character 2"),
        (["a", "\ud83d"], r"texts\[1\] .* character 0"),
    ):
        with pytest.raises(ValueError, match=place):
            embedder.encode(texts)
    with pytest.raises(ValueError, match="instruction holds the lone surrogate"):
        embedder.encode("a", instruction="\ud83d")


def test_embedder_reads_any_iterable_once(embedder):
    expected = embedder.encode(["a", "b c"])
    for texts in (("a", "b c"), iter(["a", "b c"]), np.array(["a", "b c"])):
        assert torch.equal(embedder.encode(texts, batch_size=np.int64(8)), expected)


def test_embedder_takes_threads(tmp_path, embedder, tokenizer_folder):
    folder = write_text_checkpoint(tmp_path, embedder.model, tokenizer_folder)
    for threads in (0, 10**6, "2", 1.0):
        with pytest.raises(ValueError, match="threads must be an integer from 1 to"):
            Embedder.from_pretrained(folder, threads=threads)


def test_embedder_refuses_a_tokenizer_without_the_end_token(embedder, tmp_path, tokenizer_folder):
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|endoftext|>"]
    raw["model"]["vocab"].pop("<|endoftext|>", None)
    file.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>'"):
        Embedder(embedder.model, Tokenizer.from_folder(tmp_path / "other"))
