"""`qwen3fast quantize`: write a quantized checkpoint, with errors corrected on calibration text if one is given."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from qwen3fast.checkpoint import load_model, read_tokenizer, resolve_source
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli.arguments import add_source_arguments
from qwen3fast.engine.threads import use_threads
from qwen3fast.quantization import formats_of, quantize_model
from qwen3fast.quantization.calibrate import quantize_calibrated
from qwen3fast.quantization.formats import FORMATS

HELP = "write a quantized checkpoint; --calibrate makes int4 more accurate"
WINDOW = 512  # tokens of calibration text at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_source_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; from_pretrained loads it")
    parser.add_argument("--quantization", choices=list(FORMATS), default="int4", help="[%(default)s]")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="text in UTF-8, of the kind that the model will "
                        "meet: int4 then corrects each layer's rounding errors on it (GPTQ)")  # fmt: skip
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="of the text, at most [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [one per core]")


def run(args: argparse.Namespace) -> int:
    """Quantize and save. Returns: the exit status."""
    if args.calibrate is not None and args.quantization != "int4":
        raise ValueError(f"--calibrate is for int4, not for {args.quantization}")
    use_threads(args.threads)
    source = resolve_source(args.model, args.revision)
    token_BT = None
    if args.calibrate is not None:
        token_BT = calibration_windows(source, args.calibrate, args.calibration_tokens)
    model = load_model(source, args.device, progress=True)
    if formats := formats_of(model):
        raise ValueError(f"{args.model} is quantized already ({', '.join(formats)})")
    if token_BT is None:
        quantize_model(model, args.quantization, model.model.norm.weight.dtype, progress=True)
    else:
        quantize_calibrated(model, token_BT.to(model.model.norm.weight.device), progress=True)
    save_model(model, args.output, source)
    print(f"wrote {args.output}: {args.quantization}, {model.num_bytes():,} bytes of weights")
    return 0


def calibration_windows(source: Path, file: Path, max_tokens: int) -> Tensor:
    """Return the tokens of a text in windows, (B, T) int64, by the tokenizer of a checkpoint.

    Raises: OSError or ValueError for a file that cannot be read or is shorter than one window.
    """
    ids = read_tokenizer(source).encode(file.read_text(encoding="utf-8"))[: max(max_tokens, WINDOW)]
    count = len(ids) // WINDOW
    if count == 0:
        raise ValueError(f"{file} has {len(ids)} tokens; calibration needs at least {WINDOW}, better 16,000")
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
