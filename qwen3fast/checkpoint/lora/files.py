"""The two files of an adapter: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3fast.checkpoint.checks import dtype_problem, non_finite, refuse
from qwen3fast.checkpoint.lora.config import LoraConfig
from qwen3fast.checkpoint.source import resolve_adapter

WEIGHTS_FILE = "adapter_model.safetensors"


def find_adapter(source: str | Path) -> tuple[LoraConfig, Path]:
    """Return an adapter's config and the file of its tensors.

    source: a folder in PEFT's layout, or a hub id.
    Raises: FileNotFoundError for missing files; ValueError as `LoraConfig.from_folder`.
    """
    folder = resolve_adapter(source)
    config, file = LoraConfig.from_folder(folder), folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; save the adapter with safe_serialization=True")
    return config, file


def refuse_numbers(tensors: Any, names: list[str], file: Path, check_weights: bool) -> None:
    """Check the dtypes of an adapter's tensors. check_weights: also refuse NaN and infinity.

    Raises: ValueError naming the tensors.
    """
    problems = [
        f"{name}: {problem}"
        for name in names
        if (problem := dtype_problem(tensors.get_slice(name).get_dtype(), None)) is not None
        or (check_weights and (problem := non_finite(tensors.get_tensor(name))) is not None)
    ]
    refuse(problems, f"the numbers in {file} cannot be used")
