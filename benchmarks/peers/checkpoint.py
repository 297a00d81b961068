"""The weights of all engines: random, in Qwen3-0.6B's shape, in bfloat16 and in qwen3fast's own formats."""

from __future__ import annotations

from pathlib import Path

from qwen3fast import load_model
from qwen3fast.checkpoint.save import save_model

SOURCE = "random:0.6b"


def write_checkpoint(folder: Path, formats: tuple[str, ...]) -> None:
    """Write `folder`/bf16, a checkpoint for transformers (without the tied output projection), and int8, int4 as
    qwen3fast saves them. Existing folders are kept."""
    for name in dict.fromkeys(("bf16", *formats)):
        # config.json is written last: with it, a folder is complete.
        if not (folder / name / "config.json").is_file():
            quantization = None if name == "bf16" else name
            save_model(load_model(SOURCE, "cpu", quantization=quantization), folder / name)
