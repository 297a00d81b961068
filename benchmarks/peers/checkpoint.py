"""The weights of all engines: random, in the shape of a published Qwen3, in bfloat16; others are made of them."""

from __future__ import annotations

from pathlib import Path

from qwen3fast import load_model
from qwen3fast.checkpoint.save import save_model


def write_checkpoint(model: str, folder: Path) -> None:
    """Write a model to `folder`/bf16, for transformers (without a tied output projection), if it is missing."""
    # config.json is written last: with it, a folder is complete.
    if not (folder / "bf16" / "config.json").is_file():
        save_model(load_model(model, "cpu"), folder / "bf16")
