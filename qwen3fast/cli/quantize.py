"""`qwen3fast quantize`: write a quantized checkpoint; to 4 bits with errors corrected on a text, by default its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.checkpoint.metadata import find_tokenizer, read_checkpoint_config, read_tokenizer
from qwen3fast.checkpoint.safetensors import has_output_projection
from qwen3fast.checkpoint.save import check_holds_no_original, check_is_other, companions_of, save_model
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.cli.arguments import add_source_arguments
from qwen3fast.engine.own_text import OWN_WINDOW, own_text
from qwen3fast.engine.threads import use_threads
from qwen3fast.files import folder_to_write, read_text
from qwen3fast.kernels import cpu
from qwen3fast.quantization.calibrate import CALIBRATED, quantize_calibrated
from qwen3fast.quantization.convert import DEQUANTIZE, formats_of, quantize_model
from qwen3fast.quantization.formats import SAVED_FORMATS
from qwen3fast.text.plain_data import replace_surrogates

WINDOW = 512  # tokens of a calibration text at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_source_arguments(parser)
    parser.add_argument("--output", type=_output, required=True, help="folder to write; from_pretrained loads it")
    parser.add_argument("--quantization", choices=list(SAVED_FORMATS), default="int4", help="[%(default)s]")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--calibrate", type=Path, metavar="FILE", help="text in UTF-8, similar to the model's "
                      "input, on which 4 bits correct their errors (GPTQ) [text that the model writes]")  # fmt: skip
    text.add_argument("--no-calibrate", action="store_true", help="correct none: faster, as quantizing while loading")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of the text, at most [%(default)s]")
    parser.add_argument("--force", action="store_true", help="overwrite weights in --output, whatever they are")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [one per core]")


def _output(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a folder, got an empty one")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Quantize and save. Returns: the exit status."""
    is_calibrated = args.quantization in CALIBRATED and not args.no_calibrate
    if args.calibrate is not None and not is_calibrated:
        raise ValueError(f"--calibrate is for {' and '.join(CALIBRATED)}, not for {args.quantization}")
    if args.calibration_tokens < OWN_WINDOW:
        raise ValueError(f"--calibration-tokens must be at least {OWN_WINDOW}, got {args.calibration_tokens}")
    if args.model.startswith("random:"):
        raise ValueError(f"{args.model} has random weights, which are quantized while loading; name a checkpoint")
    source = resolve_source(args.model, args.revision)
    check_is_other(args.output, source)
    if not args.force:
        check_holds_no_original(args.output)
    folder_to_write(args.output)  # bad folders and damaged files are refused before the work
    companions_of(source)
    use_threads(args.threads)
    token_BT = None
    if args.calibrate is not None:
        token_BT = calibration_windows(source, args.calibrate, args.calibration_tokens)
    stored = None if source.is_file() else read_checkpoint_config(source)
    has_output = stored is None or has_output_projection(stored.model, source)
    theirs = stored.prequantized if stored is not None else None
    # fp8 is precise enough to be quantized to another format.
    is_fp8 = theirs is not None and theirs.is_float and not theirs.keeps_numbers(args.quantization)
    dequantize = DEQUANTIZE if is_fp8 else None
    device = choose_device(args.device)
    loader = Loader(device, quantization=dequantize, output_projection=has_output, progress=True)
    model = loader.load(source)
    if formats := formats_of(model):
        raise ValueError(f"{args.model} is quantized already ({', '.join(formats)})")
    weight = model.model.norm.weight
    if weight.device.type == "cpu":
        cpu.load()
    if is_calibrated and token_BT is None and not has_output:
        is_calibrated = False
        print(f"{replace_surrogates(args.model)} has no output projection, so it writes no text to correct errors on; "
              "--calibrate FILE gives it one", file=sys.stderr)  # fmt: skip
    if is_calibrated:
        if token_BT is None:
            token_BT = own_text(model, find_tokenizer(source), args.calibration_tokens, progress=True)
        quantize_calibrated(model, token_BT.to(weight.device), args.quantization, progress=True)
    else:
        quantize_model(model, args.quantization, weight.dtype, progress=True)
    if not formats_of(model):
        raise ValueError(f"no layer of {args.model} can be quantized to {args.quantization}: their sizes do not fit it")
    save_model(model, args.output, source, calibration_tokens=0 if token_BT is None else token_BT.numel())
    print(f"wrote {args.output}: {args.quantization}, {model.num_bytes():,} bytes of weights")
    return 0


def calibration_windows(source: Path, file: Path, max_tokens: int) -> Tensor:
    """Return the tokens of a text in windows, (B, T) int64, by the tokenizer of a checkpoint.

    Raises: OSError or ValueError for a file that cannot be read or is shorter than one window.
    """
    text = read_text(file, "a text file for --calibrate")
    ids = read_tokenizer(source).encode(text)[: max(max_tokens, WINDOW)]
    count = len(ids) // WINDOW
    if count == 0:
        raise ValueError(f"{file} has {len(ids)} tokens; calibration needs at least {WINDOW}, better 16,000")
    return torch.tensor(ids[: count * WINDOW], device="cpu").view(count, WINDOW)
