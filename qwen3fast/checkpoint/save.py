"""Save a quantized model as a folder that loads like any other checkpoint, without quantizing again."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwen3fast.checkpoint.hf_config import OWN_QUANTIZATION, CheckpointConfig
from qwen3fast.checkpoint.metadata import write_tokenizer_files
from qwen3fast.checkpoint.safetensors import SINGLE_FILE
from qwen3fast.checkpoint.score_head import WEIGHT, ScoreHead, find_score_head
from qwen3fast.checkpoint.sentence_transformers import sentence_files
from qwen3fast.checkpoint.source import SMALL_FILES
from qwen3fast.checkpoint.stored_formats import main_format
from qwen3fast.checkpoint.vocab_files import VOCAB_FILES
from qwen3fast.files import read_optional_json
from qwen3fast.kernels.cpu.structures import bfloat16_scales
from qwen3fast.model import Qwen3
from qwen3fast.quantization.convert import plain_experts, plain_modules

COMPANIONS = (*SMALL_FILES, *VOCAB_FILES)  # of a checkpoint, besides weights and config.json
BODY = {"architectures": ["Qwen3Model"]}  # without an output projection
CACHE_LINE = 64  # bytes
NAMES = {  # in headers of safetensors, in the order of tensors
    torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def save_model(model: Qwen3, folder: Path, companions_from: Path | None = None, calibration_tokens: int = 0) -> None:
    """Write config.json, model.safetensors, the tokenizer's and sentence-transformers' files into `folder`.

    companions_from: the folder or GGUF file that these files are copied from, and a score head, in float32.
    calibration_tokens: of the text that the weights were calibrated on, for config.json; 0 for none.
    Everything is written next to the folder first and then moved into it, config.json last: a failure (such as a full
    disk) leaves the old files.
    Of layers in several formats, config.json names one; the tensors show each layer's.
    Raises: OSError if it cannot be written; ValueError as `main_format`, for `companions_from` as the folder, or for a
    damaged score head or modules.json in it.
    """
    check_is_other(folder, companions_from)
    head, companions = companions_of(companions_from)
    fields = _config(model, head, calibration_tokens)
    tensors = {name: stored(name, parameter.detach()) for name, parameter in model.named_parameters()}
    if head is not None:
        tensors[WEIGHT] = head.weight_LE.contiguous()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary)
        try:
            save_file(tensors, new / SINGLE_FILE, metadata=aligning_metadata(tensors))
        except SafetensorError as err:  # of a full disk, for example
            raise OSError(f"{new / SINGLE_FILE} cannot be written: {err}") from err
        if companions_from is not None and companions_from.is_file():
            write_tokenizer_files(companions_from, new)
        for name, file in companions.items():
            (new / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, new / name)
        (new / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        files = [file.relative_to(new) for file in new.rglob("*") if file.is_file()]
        for path in sorted(files, key=lambda path: path == Path("config.json")):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).chmod(0o644)
            (new / path).replace(folder / path)


def stored(name: str, tensor: Tensor) -> Tensor:
    """Return a parameter as files hold it: scales of int4 in bfloat16."""
    is_scale = name.endswith(".weight_scale") and tensor.dtype == torch.int8
    return (bfloat16_scales(tensor) if is_scale else tensor).contiguous()


def aligning_metadata(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return metadata that lets the tensors of a safetensors file begin at a cache line, on disk and when it is mapped.

    Vectors that begin elsewhere lie in two lines, and reading them takes two reads. A file holds the length of its
    header in 8 bytes, the header in JSON, and the tensors without gaps, by dtype and name: the first one begins at a
    line, and so do those behind tensors of whole lines. A file with another dtype, or in another order, is as right,
    but may not be aligned.
    """
    header: dict[str, Any] = {"__metadata__": (metadata := {"format": "pt", "spaces": ""})}
    end, order = 0, list(NAMES)
    known = [(order.index(x.dtype) if x.dtype in order else len(order), name) for name, x in tensors.items()]
    for _, name in sorted(known):
        begin, end = end, end + tensors[name].nbytes
        dtype = NAMES.get(tensors[name].dtype, "")
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return metadata | {"spaces": " " * (-(8 + length) % CACHE_LINE)}


def check_is_other(folder: Path, source: Path | None) -> None:
    """Check that a folder to write is not the one that a model comes from. Raises: ValueError if it is."""
    if source is not None and folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is the folder of the model, whose weights would be overwritten")


def check_holds_no_original(folder: Path) -> None:
    """Check that a folder to write holds no weights, except those that this package quantized.

    Raises: FileExistsError if it does; ValueError for a damaged config.json.
    """
    found = next((file for kind in ("safetensors", "gguf", "bin") for file in folder.glob(f"*.{kind}")), None)
    stored = read_optional_json(folder / "config.json").get("quantization_config") if found is not None else None
    is_ours = isinstance(stored, dict) and stored.get("quant_method") == OWN_QUANTIZATION["quant_method"]
    if found is not None and not is_ours:
        raise FileExistsError(f"{found} holds weights of another model; choose another folder, or pass --force")


def companions_of(source: Path | None) -> tuple[ScoreHead | None, dict[str, Path]]:
    """Return a folder's score head, and the files to copy, by name; None and none for a GGUF file.

    Raises: ValueError for a damaged score head or modules.json.
    """
    if source is None or not source.is_dir():
        return None, {}
    head = find_score_head(source) if (source / "config.json").is_file() else None
    names = [name for name in COMPANIONS if (source / name).is_file()]
    return head, {name: source / name for name in [*names, *sentence_files(source)]}


def _config(model: Qwen3, head: ScoreHead | None, calibration_tokens: int) -> dict[str, Any]:
    """Return config.json."""
    format = main_format(model)
    kept = (*plain_modules(model), *plain_experts(model)) if format is not None else ()
    fields = CheckpointConfig(model.config, format, kept, calibration_tokens=calibration_tokens).to_dict()
    if head is not None:
        return fields | head.config_fields()
    return fields | BODY if model.lm_head is None and not model.config.num_experts else fields
