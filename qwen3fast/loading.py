"""Loading for `Generator.from_pretrained`: small files, which may be damaged, come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen3fast.calibrated import CalibratedLoader, is_to_be_calibrated
from qwen3fast.checkpoint import (
    as_id_tuple,
    choose_device,
    find_tokenizer,
    load_model,
    read_generation_config,
    resolve_source,
)
from qwen3fast.checks import checked_flag, checked_source
from qwen3fast.model import Qwen3
from qwen3fast.parallel import Ranks
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.text.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A loaded checkpoint: arguments of `Generator`, by name."""

    model: Qwen3
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any] | None
    source_folder: Path | None
    ranks: Ranks | None


def load(
    source: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantization: str | None,
    revision: str | None,
    progress: bool,
    adapter: str | Path | None,
    calibrate: bool | None,
    check_weights: bool,
    tensor_parallel: bool,
) -> Loaded:
    """Load a checkpoint for a Generator; see `Generator.from_pretrained` for arguments and errors."""
    checked_source(source, quantization, revision, adapter, check_weights)
    checked_flag("progress", progress)
    if calibrate is not None:
        calibrate = checked_flag("calibrate", calibrate, also="None")
    chosen_device = choose_device(device)
    ranks = Ranks.start(chosen_device.type) if checked_flag("tensor_parallel", tensor_parallel) else None
    tokenizer, generation_config, folder = None, None, None
    if not str(source).startswith("random:"):
        folder = resolve_source(source, revision)
        tokenizer = find_tokenizer(folder)
        generation_config = checked_preset(read_generation_config(folder), folder)
    has_adapter, is_split = adapter is not None, ranks is not None
    if is_to_be_calibrated(calibrate, folder, quantization, chosen_device, has_adapter, is_split):
        assert folder is not None and quantization is not None, "no others are calibrated"
        model = CalibratedLoader(
            folder, tokenizer, chosen_device, dtype, quantization, calibrate, progress, check_weights
        ).load()
    else:
        model = load_model(
            source, device, dtype, revision, progress, quantization,
            adapter=adapter, check_weights=check_weights, ranks=ranks,
        )  # fmt: skip
    return Loaded(model, tokenizer, generation_config, folder, ranks)


def checked_preset(preset: dict[str, Any] | None, source: Path) -> dict[str, Any] | None:
    """Return a checkpoint's sampling preset, if it has one.

    Raises: ValueError naming the file, for values that no request may have.
    """
    if preset is None:
        return None
    try:
        SamplingParams.from_generation_config(preset)
        as_id_tuple(preset.get("eos_token_id"))
    except ValueError as err:
        if source.is_file():
            raise ValueError(f"{source}: its sampling settings are damaged: {err}") from err
        raise ValueError(f"{source / 'generation_config.json'}: {err}; correct it, or delete the file") from err
    return preset
