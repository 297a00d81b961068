"""Save a quantized model as a folder that loads like any other checkpoint, without quantizing again."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.metadata import write_tokenizer_files
from qwen3fast.checkpoint.safetensors import SINGLE_FILE
from qwen3fast.checkpoint.stored_formats import main_format
from qwen3fast.model import Qwen3
from qwen3fast.quantization import plain_experts, plain_modules

# Files of a checkpoint besides weights and config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def save_model(model: Qwen3, folder: Path, companions_from: Path | None = None, calibration_tokens: int = 0) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`.

    companions_from: the folder or GGUF file that the tokenizer is copied from.
    calibration_tokens: of the text that the weights were calibrated on, for config.json; 0 for none.
    Everything is written beside the folder first and then moved in, config.json last: a failure (such as a full disk)
    leaves the old files.
    Of layers in several formats, config.json names one; the tensors tell each layer's.
    Raises: OSError if it cannot be written; ValueError as `main_format`.
    """
    format = main_format(model)
    kept = (*plain_modules(model), *plain_experts(model)) if format is not None else ()
    stored = CheckpointConfig(model.config, format, kept, calibration_tokens=calibration_tokens)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary)
        try:
            save_file(tensors, new / SINGLE_FILE, metadata={"format": "pt"})
        except SafetensorError as err:  # of a full disk, for example
            raise OSError(f"{new / SINGLE_FILE} cannot be written: {err}") from err
        if companions_from is not None and companions_from.is_file():
            write_tokenizer_files(companions_from, new)
        for name in COMPANIONS:
            if companions_from is not None and (companions_from / name).is_file():
                shutil.copyfile(companions_from / name, new / name)
        config = json.dumps(stored.to_dict(), indent=2) + "\n"
        (new / "config.json").write_text(config, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
            file.chmod(0o644)
            file.replace(folder / file.name)
