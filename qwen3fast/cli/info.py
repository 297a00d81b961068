"""`qwen3fast info`: sizes and memory of a model, and the fastest forms for it here.

Weights are not read, and not downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from qwen3fast.calibrated import CalibratedLoader, is_to_be_calibrated
from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.checkpoint.empty import empty_model
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.checkpoint.metadata import read_checkpoint_config, read_config
from qwen3fast.checkpoint.outline import find_outline
from qwen3fast.checkpoint.score_head import ScoreHead, find_score_head
from qwen3fast.cli.arguments import add_source_arguments
from qwen3fast.engine.threads import use_threads
from qwen3fast.kernels import forms, forms_file
from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.quantization.calibrate import CALIBRATED
from qwen3fast.quantization.convert import formats_of, plain_modules, quantize_model
from qwen3fast.quantization.formats import ALL_FORMATS
from qwen3fast.text.plain_data import replace_surrogates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_source_arguments(parser)
    parser.add_argument("--quantization", choices=list(ALL_FORMATS), help="show the model quantized to this format")
    parser.add_argument("--device", default="auto", help="whose calibrated copy to look for [%(default)s]")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns: the exit status."""
    device = choose_device(args.device)
    if args.model.startswith("random:"):
        _show(args, device, None)
        return 0
    with find_outline(args.model, args.revision) as (source, is_outline):
        _show(args, device, source, is_outline)
    return 0


def _show(args: argparse.Namespace, device: torch.device, source: Path | None, is_outline: bool = False) -> None:
    """Print the table. source: None for random weights. is_outline: of a model that is not downloaded."""
    stored = None
    if source is None:
        model = build_on_meta(read_config(args.model))
    else:
        stored, model = read_checkpoint_config(source), empty_model(source, args.quantization)
    is_quantized_here = args.quantization is not None and not formats_of(model)
    if is_quantized_here:
        quantize_model(model, args.quantization, model.config.dtype)
    has_weights = source is not None and any(source.glob("*.safetensors"))
    head = find_score_head(source) if source is not None and has_weights else None
    lines = _describe(model, model.config, head)
    if is_quantized_here and args.quantization in CALIBRATED:
        lines["calibration"] = _calibration(source, args.quantization, device, is_outline)
    if stored is not None and stored.calibration_tokens:
        lines["calibration"] = f"on {stored.calibration_tokens:,} tokens"
    if stored is not None and stored.prequantized is not None:
        lines["stored in"] = stored.prequantized.describe()
    print(replace_surrogates(args.model) + (" (not downloaded)" if is_outline else ""))
    for name, value in lines.items():
        print(f"  {name:27} {value}")
    for line in _forms(model.config):
        print(line)


def _calibration(source: Path | None, quantization: str, device: torch.device, is_outline: bool) -> str:
    """Return whether loads to a device are calibrated by default, and where the result is kept."""
    if source is None or not is_to_be_calibrated(None, source, quantization, device):
        return "none by default"
    if is_outline:
        return f"for {device.type}, by the first load"
    try:
        kept = CalibratedLoader(source, Loader(device, quantization=quantization)).place()
    except RuntimeError as err:
        return f"none: {err}"
    how = "kept in" if kept.exists() else "by the first load, which keeps it in"
    return f"for {device.type}, {how} {kept.folder}"


def _forms(config: ModelConfig) -> list[str]:
    """Return the forms chosen on this machine for models of these sizes, in any format; see kernels/forms.py."""
    use_threads()  # times are of a number of threads
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}"
    products = {f"{n} x {config.hidden_size}" for n in (config.intermediate_size, config.moe_intermediate_size)}
    found = {
        f"{what}, {sizes}": choice
        for (what, sizes), choice in forms_file.all_kept().items()
        if heads in sizes or (what.startswith(("linear", "experts")) and products & set(sizes.split(", ")))
    }
    if forms.is_pinned():
        return [f"forms on this machine: the first of each, as {forms.VARIABLE} says"]
    if not found:
        return ["forms on this machine: not measured yet for these sizes; Generator.warmup() measures them"]
    title = f"forms on this machine, as measured with {torch.get_num_threads()} threads (kept in {forms_file.path()}):"
    return [title, *(f"  {name}: {choice.name} ({choice.times})" for name, choice in sorted(found.items()))]


def _describe(model: Qwen3, config: ModelConfig, head: ScoreHead | None) -> dict[str, str]:
    """Return the lines of the table, by name."""
    of_head = 0 if head is None else head.weight_LE.numel()
    kv_bytes = config.kv_bytes_per_token(config.dtype)
    missing = 0 if model.lm_head is not None else config.vocab_size * config.hidden_size
    projection = " (embedding tied)" if config.tie_word_embeddings else " (no output projection)" if missing else ""
    lines = {
        "parameters": f"{config.num_parameters - missing + of_head:,}",
        "weights": f"{model.num_bytes() + 4 * of_head:,} bytes in {_formats(model)}",
        "read per decoded token": f"{model.num_bytes(per_token=True) / 1e9:.3f} GB of weights",
        "KV cache": f"{kv_bytes / 1024:g} KiB per token; {kv_bytes * 4096 / 1e9:.3f} GB for 4,096",
        "layers": f"{config.num_hidden_layers}",
        "hidden / intermediate size": f"{config.hidden_size} / {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}{projection}",
        "longest context": f"{config.longest_context:,}",
        "RoPE theta": f"{config.rope_theta:g}" + (f", YaRN factor {config.yarn.factor:g}" if config.yarn else ""),
    }
    if head is not None:
        lines["score head"] = f"{len(head.labels)} labels, float32"
    if config.num_experts:
        lines["parameters"] += f", {config.decode_parameters - missing:,} of them active per token"
        lines["experts"] = (
            f"{config.num_experts}, {config.num_experts_per_tok} per token, of {config.moe_intermediate_size}"
        )
    return lines


def _formats(model: Qwen3) -> str:
    """Return the names of the formats and dtypes that the linear layers and the embedding are stored in."""
    plain = {str(model.get_submodule(name).weight.dtype).removeprefix("torch.") for name in plain_modules(model)}
    return ", ".join([*formats_of(model), *sorted(plain)])
