"""The weights of all engines: random, in Qwen3-0.6B's shape, in bfloat16; other formats are made of them."""

from __future__ import annotations

from pathlib import Path

from qwen3fast import load_model
from qwen3fast.checkpoint.save import save_model

SOURCE = "random:0.6b"


def write_checkpoint(folder: Path) -> None:
    """Write `folder`/bf16, a checkpoint for transformers (without the tied output projection), if it is missing."""
    # config.json is written last: with it, a folder is complete.
    if not (folder / "bf16" / "config.json").is_file():
        save_model(load_model(SOURCE, "cpu"), folder / "bf16")
