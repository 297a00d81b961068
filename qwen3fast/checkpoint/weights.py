"""Safetensors files -> the parameters of a model built on `meta`.

Files are memory-mapped. On the CPU, in the dtype of the file, parameters *are* the mapped pages: loading copies
nothing. Otherwise one tensor at a time is converted or moved, so the peak is one model plus one tensor. Experts that
are tensors of their own are copied into stacks. Of a model over several processes, each reads its part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import nn

from qwen3fast.checkpoint.experts import ExpertStacks
from qwen3fast.config import read_json
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.parallel import Split
from qwen3fast.quantization.linear import PARAMETER_NAMES

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def load_weights(
    model: Qwen3,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
    split: Split | None = None,
) -> None:
    """Fill `model` (on meta) from the safetensors of `folder`. split: of which part of the weights it is a model.

    Module and tensor names are the same, but that checkpoints of Qwen3Model (such as Qwen3-Embedding) leave "model."
    out, and that some hold each expert's tensors apart (see experts.py).

    Raises: FileNotFoundError for a missing file; ValueError naming tensors and files for missing, unexpected or
    misshaped tensors and for damaged files. On an error the model must be discarded.
    """
    expected = _shapes(model)
    stacks = ExpertStacks(expected, device, dtype)
    whole = expected if split is None else _shapes(build_on_meta(split.config))
    shapes = whole | {name: piece.shape for name, piece in ExpertStacks(whole, device, dtype).pieces.items()}
    files = _tensors_by_file(folder)
    problems: list[str] = []
    loaded: set[str] = set()
    bar = tqdm(total=len(expected), desc="loading weights", unit="tensor", disable=not progress)
    for file, names in files.items():
        with open_tensors(file) as tensors:
            available = tensors.keys()
            for name in names if names is not None else available:
                if name == "lm_head.weight" and name not in expected:
                    continue  # tied: some files repeat the embedding under this name
                if name.startswith("lm_head.") and model.lm_head is None:
                    continue  # not wanted
                place = f"model.{name}" if f"model.{name}" in shapes else name
                if name not in available:
                    problems.append(f"{name}: the index names {file.name}, which does not hold it")
                elif place not in shapes:
                    problems.append(f"{name} in {file.name}: unexpected, this Qwen3 has no such tensor")
                elif (shape := tuple(tensors.get_slice(name).get_shape())) != shapes[place]:
                    problems.append(f"{name} in {file.name}: shape {shape}, expected {shapes[place]}")
                elif place in loaded:
                    problems.append(f"{name} in {file.name}: {place} was there already")
                elif place in stacks.pieces:
                    if (stacked := stacks.put(place, _read(tensors, name, split))) is not None:
                        assign(model, *stacked)
                        loaded.add(stacked[0])
                        bar.update()
                else:
                    tensor = _read(tensors, name, split)
                    tensor = tensor.to(device) if name.endswith(PARAMETER_NAMES) else tensor.to(device, dtype)
                    assign(model, place, tensor)
                    loaded.add(place)
                    bar.update()
    bar.close()
    reported = {problem.split(":")[0].split(" in ")[0] for problem in problems}
    unfinished = stacks.unfinished()
    missing = [name for name in expected if name not in loaded and name not in unfinished]
    missing += [name for names in unfinished.values() for name in names]
    missing = [name for name in missing if not {name, name.removeprefix("model.")} & reported]
    problems += [f"{name}: missing, expected shape {shapes[name]}" for name in missing]
    refuse(problems, f"the weights in {folder} do not fit its config.json")
    model.tie_weights()


def _shapes(model: Qwen3) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _read(tensors: Any, name: str, split: Split | None) -> torch.Tensor:
    """A tensor of an open file, or this process's part of it."""
    return tensors.get_tensor(name) if split is None else split.take(name, tensors.get_slice(name))


def _tensors_by_file(folder: Path) -> dict[Path, list[str] | None]:
    """Which tensors to read from which file; None reads all of a single file."""
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_FILE} has no 'weight_map'")
        by_file: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{folder / INDEX_FILE}: {file!r} must be a file name without folders")
            names = by_file.setdefault(folder / file, [])
            assert names is not None, "an index lists names for every file"
            names.append(name)
        absent = [file.name for file in by_file if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {INDEX_FILE}; download it again")
        return by_file
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    raise FileNotFoundError(f"{folder} holds no weights; expected {SINGLE_FILE} or {INDEX_FILE}")


def refuse(problems: list[str], summary: str) -> None:
    """Raises: ValueError with the summary and the first problems, if there are any."""
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{summary}:\n  " + "\n  ".join(problems[:8]) + more)


def open_tensors(file: Path):
    """A safetensors file, memory-mapped.

    Raises: ValueError if it is damaged.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as err:
        raise ValueError(f"{file} is damaged or truncated ({err}); download it again") from err


def assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter, on meta or not."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    module.register_parameter(parameter_name, nn.Parameter(tensor, requires_grad=False))
