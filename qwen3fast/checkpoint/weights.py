"""Safetensors files -> the parameters of a model built on `meta`.

Files are memory-mapped. On the CPU, in the dtype of the file, parameters *are* the mapped pages: loading copies
nothing. Otherwise one tensor at a time is converted or moved, so the peak is one model plus one tensor. Experts that
are tensors of their own are copied into stacks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import nn

from qwen3fast.checkpoint.checks import dtype_problem, no_weights, non_finite
from qwen3fast.checkpoint.experts import ExpertStacks
from qwen3fast.config import ModelConfig, read_json
from qwen3fast.model import Qwen3
from qwen3fast.quantization.linear import PARAMETER_NAMES

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def load_weights(
    model: Qwen3,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
    check_weights: bool = False,
) -> None:
    """Fill `model` (on meta) from the safetensors of `folder`. check_weights: look for NaN and infinity, in `dtype`.

    Module and tensor names are the same, but that checkpoints of Qwen3Model (such as Qwen3-Embedding) leave "model."
    out, and that some hold each expert's tensors apart (see experts.py).

    Raises: FileNotFoundError for a missing file; ValueError naming tensors and files for missing, unexpected or
    misshaped tensors, those of a wrong dtype, and for damaged files. On an error the model must be discarded.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    packed = {name: p.dtype for name, p in model.named_parameters() if name.endswith(PARAMETER_NAMES)}
    stacks = ExpertStacks(expected, device, dtype)
    shapes = expected | {name: piece.shape for name, piece in stacks.pieces.items()}
    files = tensors_by_file(folder)
    _read_ahead(list(files))
    problems: list[str] = []
    bad_numbers: list[str] = []
    loaded: set[str] = set()
    bar = tqdm(total=len(expected), desc="loading weights", unit="tensor", disable=not progress)
    for file, names in files.items():
        with open_tensors(file) as tensors:
            available = tensors.keys()
            for name in available if names is None else dict.fromkeys([*names, *available]):
                if name == "lm_head.weight" and name not in expected:
                    continue  # tied: some files repeat the embedding under this name
                if name.startswith("lm_head.") and model.lm_head is None:
                    continue  # not wanted
                place = f"model.{name}" if f"model.{name}" in shapes else name
                if name not in available:
                    problems.append(f"{name}: the index names {file.name}, which does not hold it")
                elif names is not None and name not in names:
                    problems.append(f"{name} in {file.name}: the index does not name it")
                elif place not in shapes:
                    problems.append(f"{name} in {file.name}: unexpected, this Qwen3 has no such tensor")
                elif (shape := tuple(tensors.get_slice(name).get_shape())) != shapes[place]:
                    problems.append(f"{name} in {file.name}: shape {shape}, expected {shapes[place]}")
                elif (wrong := dtype_problem(tensors.get_slice(name).get_dtype(), packed.get(place))) is not None:
                    problems.append(f"{name} in {file.name}: {wrong}")
                elif place in loaded or (place in stacks.pieces and stacks.pieces[place].target in loaded):
                    problems.append(f"{name} in {file.name}: {place} was there already")
                else:
                    tensor = _aligned(tensors.get_tensor(name))
                    tensor = tensor.to(device) if place in packed else tensor.to(device, dtype)
                    if check_weights and (counts := non_finite(tensor)) is not None:
                        bad_numbers.append(f"{name} in {file.name}: {counts}")
                    loaded.add(place)
                    whole = stacks.put(place, tensor) if place in stacks.pieces else (place, tensor)
                    if whole is not None:
                        assign(model, *whole)
                        loaded.add(whole[0])
                        bar.update()
    bar.close()
    reported = {problem.split(":")[0].split(" in ")[0] for problem in problems}
    unfinished = stacks.unfinished()
    missing = [name for name in expected if name not in loaded and name not in unfinished]
    missing += [name for names in unfinished.values() for name in names]
    missing = [name for name in missing if not {name, name.removeprefix("model.")} & reported]
    problems += [f"{name}: missing, expected shape {shapes[name]}" for name in missing]
    refuse(problems, f"the weights in {folder} do not fit its config.json")
    refuse(bad_numbers, f"the weights in {folder} are not all finite in {str(dtype).removeprefix('torch.')}")
    model.tie_weights()


def tensors_by_file(folder: Path) -> dict[Path, list[str] | None]:
    """Which tensors to read from which file; None reads all of a single file.

    Raises: FileNotFoundError for missing files; ValueError for an index that is damaged or leaves the folder.
    """
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_FILE} has no 'weight_map'")
        by_file: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or len(file) > 200:
                raise ValueError(f"{folder / INDEX_FILE}: {file!r:.300} must be a file name without folders")
            if not file.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX_FILE}: {file!r} is not a safetensors file; no others are read")
            names = by_file.setdefault(folder / file, [])
            assert names is not None, "an index lists names for every file"
            names.append(name)
        absent = [file.name for file in by_file if not file.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}, named in {INDEX_FILE}; download it again")
        return by_file
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: None}
    raise no_weights(folder, f"{SINGLE_FILE} or {INDEX_FILE}")


def refuse_size(config: ModelConfig, folder: Path) -> None:
    """Refuse a config.json of a model far larger than its files: the modules alone could fill the memory.

    Raises: ValueError if there is less than a bit for each parameter, or a file is damaged.
    """
    files = tensors_by_file(folder)
    num_bytes = sum(file.stat().st_size for file in files)
    if config.num_parameters > 8 * num_bytes:
        for file in files:
            with open_tensors(file):
                pass  # not truncated, or that is what is said
        raise ValueError(
            f"{folder}: config.json describes {config.num_parameters:,} parameters, but the weights are {num_bytes:,} "
            "bytes; one of them is damaged or of another model: download both again"
        )


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


def _read_ahead(files: list[Path]) -> None:
    """Ask the system to begin reading files, in order, and return at once: it reads while compilers are imported.

    Mapped pages are else read when each is first touched: of a disk that others used, too, 1.2 GB then took 3 to 6 s,
    and 1 to 1.4 s so. What would fill most of the memory is left alone, as its pages would push each other out.
    """
    with suppress(OSError, ValueError, AttributeError):  # it is only advice, and not every system takes it
        if sum(file.stat().st_size for file in files) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
            for file in files:
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its bytes do not begin at a multiple of its elements' size (some writers do so)."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter, on meta or not."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    module.register_parameter(parameter_name, nn.Parameter(tensor, requires_grad=False))
