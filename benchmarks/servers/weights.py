"""The weights of all servers: a folder for transformers and qwen3fast, and GGUF files made of it.

Random weights have no tokenizer, and a server needs one: every token is a word of a space and four letters (see
`qwen3fast.bench.serving`), so that clients can count tokens and prompts are the same as text and as token ids.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import tokenizers
from peers.llama_cpp import write_gguf

from qwen3fast import load_model
from qwen3fast.bench.serving import word
from qwen3fast.checkpoint.save import save_model

UNFINISHED = ".unfinished"


def words_of(vocab_size: int) -> dict[str, int]:
    """Return the vocabulary: the word of each token, in the byte-level alphabet, and its id."""
    return {word(i): i for i in range(vocab_size)}


def write_folder(source: str, folder: Path) -> None:
    """Write a model in bfloat16 with the tokenizer of words, and without end-of-sequence tokens. Kept if it exists."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + UNFINISHED)
    model = load_model(source, "cpu", dtype="bfloat16")
    save_model(model, unfinished)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words_of(model.config.vocab_size), [], ignore_merges=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(unfinished / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (unfinished / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((unfinished / "config.json").read_text()) | {"eos_token_id": None, "bos_token_id": None}
    (unfinished / "config.json").write_text(json.dumps(config))
    (unfinished / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    unfinished.rename(folder)


def write_gguf_files(folder: Path, quantizer: Path, formats: tuple[str, ...]) -> None:
    """Write `folder`/../bf16.gguf, and for int8 and int4 the files that llama.cpp's quantizer makes of it."""
    plain = gguf_path(folder, "bf16")
    if not plain.is_file():
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        write_gguf(folder, plain.with_suffix(UNFINISHED), list(words_of(vocab_size)))
        plain.with_suffix(UNFINISHED).rename(plain)
    for format, name in (("int8", "Q8_0"), ("int4", "Q4_0")):
        if format in formats and not (target := gguf_path(folder, format)).is_file():
            # Otherwise the embedding, which is also the output projection, is kept in 6 bits.
            subprocess.run([quantizer, "--pure", plain, target.with_suffix(UNFINISHED), name], check=True)
            target.with_suffix(UNFINISHED).rename(target)


def gguf_path(folder: Path, format: str) -> Path:
    """Return the GGUF file of a format."""
    return folder.parent / f"{folder.name}-{format}.gguf"
