"""The corpus of tools/train_english.py: English prose of Debian packages, split by document, and its tokenizer.

Writes into a folder: train.txt and held_out.txt (documents between <|endoftext|> lines), sources.json, tokenizer.json,
and the token ids as train.bin and held_out.bin (uint16). Existing files are kept.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
from english_prose import prose
from english_sources import SOURCES, documents, fetch
from huggingface_hub.utils import tqdm
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 8192
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEPARATOR = "\n<|endoftext|>\n"
HELD_OUT_PERCENT = 2
# Qwen's pattern: words with their leading space, single digits, punctuation, white space.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(folder: Path, seed: int) -> None:
    """Fetch, clean and split the text, train the tokenizer, and encode: each step unless its files are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "sources.json").exists():
        _write_texts(folder, seed)
    if not (folder / "tokenizer.json").exists():
        _train_tokenizer(folder).save(str(folder / "tokenizer.json"))
    for name in ("train", "held_out"):
        if not (folder / f"{name}.bin").exists():
            _encode(folder, name)


def is_held_out(name: str) -> bool:
    """Return whether a document, by its name, is kept from training."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_ids(folder: Path, name: str) -> np.ndarray:
    """Return the token ids of "train" or "held_out", uint16."""
    return np.fromfile(folder / f"{name}.bin", dtype=np.uint16)


def _write_texts(folder: Path, seed: int) -> None:
    train, held_out, sources, seen = [], [], [], set()
    for source in (bar := tqdm(SOURCES, desc="text", unit="package")):
        bar.set_postfix(package=source.package)
        unpacked, facts = fetch(source, folder)
        characters = 0
        for name, text in prose(documents(source, unpacked), source.form, seen):
            (held_out if is_held_out(name) else train).append(text)
            characters += len(text)
        sources.append({**facts, "prose_characters": characters})
    for texts, name in ((train, "train"), (held_out, "held_out")):
        random.Random(seed).shuffle(texts)
        (folder / f"{name}.txt").write_text(SEPARATOR.join(texts) + "\n", encoding="utf-8")
    (folder / "sources.json").write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")


def _train_tokenizer(folder: Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the training text; every byte is in the vocabulary, so any text encodes."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    text = (folder / "train.txt").read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text.split(SEPARATOR), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _encode(folder: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = (folder / f"{name}.txt").read_text(encoding="utf-8").split(SEPARATOR)
    ids: list[np.ndarray] = []
    for begin in tqdm(range(0, len(texts), 64), desc=f"tokens of {name}", unit="batch"):
        for encoding in tokenizer.encode_batch(texts[begin : begin + 64], add_special_tokens=False):
            ids.append(np.array([*encoding.ids, end], dtype=np.uint16))
    np.concatenate(ids).tofile(folder / f"{name}.bin")
