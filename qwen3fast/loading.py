"""Loading for users: a bare model, or all that `Generator.from_pretrained` needs, whose small files come first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen3fast.calibrated import CalibratedLoader, is_to_be_calibrated
from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.checkpoint.hf_config import as_id_tuple
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.checkpoint.metadata import find_tokenizer, read_config, read_generation_config
from qwen3fast.checkpoint.rope_config import with_rope_scaling
from qwen3fast.checkpoint.source import resolve_adapter, resolve_source
from qwen3fast.checks import checked_flag, checked_source
from qwen3fast.engine.own_cores import keep_to_own_cores
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Ranks
from qwen3fast.quantization.convert import DEQUANTIZE, prepare_quantization
from qwen3fast.sampling_params import SamplingParams, takes_params
from qwen3fast.text.chat_template import read_template
from qwen3fast.text.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A loaded checkpoint: arguments of `Generator`, by name."""

    model: Qwen3
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any] | None
    source_folder: Path | None
    ranks: Ranks | None
    check_weights: bool


@takes_params
@torch.inference_mode(False)  # see `Generator._make_engine`
def load_model(
    source: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    progress: bool = False,
    quantization: str | None = None,
    output_projection: bool = True,
    adapter: str | Path | None = None,
    check_weights: bool = False,
    ranks: Ranks | None = None,
    calibrate: bool | None = None,
    rope_scaling: dict[str, Any] | None = None,
) -> Qwen3:
    """Load the bare model: a hub id, a local folder or .gguf file, "tiny", or "random:0.6b".

    "random:0.6b" is a named shape with random weights; "random:0.6b:7" has seed 7.

    Args:
        source: see above.
        device: "auto" takes CUDA where there is one.
        dtype: of weights and activations: "auto" (the checkpoint's), "bfloat16", "float16", "float32", or a dtype.
        revision: a branch, tag or commit on the hub. Local checkpoints have none: there it is ignored, with a warning.
        progress: show a bar while weights load.
        quantization: "int8", "int4", "uint4" or "fp8", and on CPUs "int6", "uint5" or "nl4", quantizes the weights
            while loading; "lossless" packs bfloat16 weights in 12 bits each, exactly, for CPUs. None keeps the format
            of checkpoints that `save_quantized` wrote. Of checkpoints that other software quantized (fp8, AWQ, GPTQ,
            compressed-tensors), None loads floats in fp8 (the same numbers and scales), symmetric 4-bit levels in int4
            (the same levels, scales rounded to bfloat16), the ones with zero points in uint4, and other levels in int8,
            embedding and output projection as they are. Of GGUF files, None keeps Q4_0 in int4, Q4_1 and Q4_K in uint4,
            on CPUs Q5_0, Q5_1 and Q5_K in uint5, Q6_K in int6, IQ4_NL and IQ4_XS in nl4, and loads other quantized
            types in int8. For both, "dequantize" loads plain weights throughout, and the name of a format takes over
            numbers and levels that it can hold, and otherwise quantizes the dequantized weights.
        output_projection: False leaves out an untied one, which embeddings do not need (it may lack weights).
        adapter: a LoRA adapter in PEFT's layout, a folder or a hub id, merged before weights are quantized.
        check_weights: refuse NaN and infinity, which reads all weights once (mapped ones are otherwise read when first
            used).
        ranks: the processes to split the model over; each reads, quantizes and keeps its shard.
        calibrate: for "int4" and "uint4", correct quantization errors on a text that the model writes (GPTQ). The first
            load of a checkpoint calibrates, with progress bars, and keeps the result in the cache folder; later loads
            read it, which is faster than quantizing. None does so for unquantized checkpoints of models without
            experts in one process, on CPUs up to 2 billion parameters, unless QWEN3FAST_CALIBRATE=0 is set; True
            always, and raises ValueError where that is impossible; False never.
        rope_scaling: the scaling of RoPE in place of the checkpoint's, as `rope_scaling` in config.json: YaRN, for
            contexts longer than the model was trained on. None keeps the checkpoint's.

    Raises: FileNotFoundError if source or adapter does not exist; ValueError for unsupported options, and for
    unsupported or damaged checkpoints.
    """
    if calibrate is not None:
        calibrate = checked_flag("calibrate", calibrate, also="None")
    chosen_device, folder = choose_device(device), None
    if quantization not in (None, DEQUANTIZE):
        prepare_quantization(quantization, chosen_device)  # before anything is downloaded
    adapter = None if adapter is None else resolve_adapter(adapter)
    if not str(source).startswith("random:"):
        source = folder = resolve_source(source, revision)
    if rope_scaling is not None:
        with_rope_scaling(read_config(source), rope_scaling)  # refused before weights are read
    loader = Loader(chosen_device, dtype, quantization, output_projection, adapter, check_weights, ranks, progress)
    if not is_to_be_calibrated(calibrate, folder, quantization, chosen_device, is_split=ranks is not None):
        model = loader.load(source)
    else:
        assert folder is not None, "no others are calibrated"
        model = CalibratedLoader(folder, loader, calibrate).load()
        if not (output_projection or model.config.tie_word_embeddings):
            model.register_module("lm_head", None)
    model.config = with_rope_scaling(model.config, rope_scaling)
    return model


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
    rope_scaling: dict[str, Any] | None,
    chat_template: str | Path | None,
    own_preset: dict[str, Any] | None,
    check: Callable[[ModelConfig], None],
) -> Loaded:
    """Load a checkpoint for a Generator; see `Generator.from_pretrained` for arguments and errors.

    own_preset: `generation_config` of it. check: called with the model's sizes before any weights are read.
    """
    checked_source(source, quantization, revision, adapter, check_weights)
    checked_flag("progress", progress)
    ranks, kind = None, choose_device(device).type
    if checked_flag("tensor_parallel", tensor_parallel):
        ranks = Ranks.start(kind)
        if kind == "cpu":
            keep_to_own_cores(ranks)
    own_preset = checked_own_preset(own_preset)
    tokenizer, generation_config, folder = None, own_preset, None
    if not str(source).startswith("random:"):
        folder = resolve_source(source, revision)
        tokenizer = find_tokenizer(folder)
        generation_config = checked_preset(read_generation_config(folder), folder)
        if own_preset is not None:
            generation_config = {**(generation_config or {}), **own_preset}
    if chat_template is not None:
        if tokenizer is None:
            raise ValueError(f"chat_template needs a tokenizer, which {source} does not have")
        tokenizer.chat_template = read_template(chat_template)
    check(with_rope_scaling(read_config(source if folder is None else folder), rope_scaling))
    model = load_model(
        source if folder is None else folder, device, dtype, None, progress, quantization,
        adapter=adapter, check_weights=check_weights, ranks=ranks, calibrate=calibrate,
        rope_scaling=rope_scaling,
    )  # fmt: skip
    return Loaded(model, tokenizer, generation_config, folder, ranks, check_weights)


def checked_own_preset(preset: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return fields of generation_config.json that a user has set; a temperature above 0 implies do_sample.

    Raises: ValueError for values that no request may have; TypeError for no dict.
    """
    if preset is None:
        return None
    if not isinstance(preset, dict):
        raise TypeError(f"generation_config must be a dict of fields of generation_config.json, got {preset!r:.200}")
    if "temperature" in preset and "do_sample" not in preset:
        preset = {**preset, "do_sample": preset["temperature"] != 0}
    try:
        SamplingParams.from_generation_config({"do_sample": True, **preset})
        as_id_tuple(preset.get("eos_token_id"))
    except ValueError as err:
        raise ValueError(f"generation_config: {err}") from err
    return preset


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
