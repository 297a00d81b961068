"""The suite `quality`, with AWQ's scaling, our calibrated int4 and llama.cpp's formats beside the package's own.

    python tools/quality_peers.py --model ~/english/model --text ~/english/held_out.txt \\
        --calibrate ~/english/train.txt --ggml libggml-base.so --output benchmarks/results/quality-english.json

First the suite runs: formats as the package's kernels compute them, activations in 8 bits included. In the cases after
these, weights are quantized, dequantized and put into a float32 model, and only their error is measured, each by its
software's own quantizer: "int8 weights" and others as the package quantizes without calibration, then AWQ's scaling,
then `qwen3fast quantize` with a text ("calibrated"), the default of `from_pretrained` ("on own text"), and llama.cpp's
formats. Without --ggml and llama-cpp-python the latter are Q8_0 and Q4_0 pure, which the package gguf can write.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from ggml_quants import Ggml, find_library
from quality_formats import Formats

from qwen3fast.bench.environment import describe_run
from qwen3fast.bench.harness import interruptible
from qwen3fast.bench.main import finish
from qwen3fast.bench.options import add_options
from qwen3fast.bench.record import Case
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites import quality
from qwen3fast.bench.suites.quantization import logits_through_cache
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.cli.quantize import calibration_windows

ALONE = "weights alone"
PROGRAM = "python tools/quality_peers.py"


def add_formats(session: Session, formats: Formats, ids: list[int]) -> None:
    """Add a case per format and context to the session's record."""
    o, progress = session.options, session.harness.progress
    for name, bits, model in formats:
        for context in o.contexts:
            found = quality.Totals()
            for window in quality.windows(ids, context, o.repetitions):
                progress.show(f"{context:,} tokens: {name}")
                token_T = torch.tensor(window)
                exact_TV = logits_through_cache(formats.exact, token_T, "auto")[:-1]
                found.add(logits_through_cache(model, token_T, "auto")[:-1], exact_TV, token_T[1:])
            facts = {"bits_per_weight": round(bits, 2), "positions": float(len(found.kl))}
            case = Case({"format": name, "what": ALONE, "context": context}, facts)
            case.add(found.sample())
            session.record.cases.append(case)
    progress.close()


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a table by columns, which take a line of the record each; texts are joined."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: ", ".join(values) if isinstance(values[0], str) else values for name, values in columns.items()}


def main() -> int:
    """Measure and write the record and its picture. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="text, not the one of --text")
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of that text [%(default)s]")
    parser.add_argument("--ggml", type=Path, default=find_library(), help="libggml-base.so [of llama-cpp-python]")
    args = parser.parse_args()
    source = resolve_source(args.model)
    windows = calibration_windows(source, args.calibrate, args.calibration_tokens)
    session = Session("quality", quality.SUITE.options(args))
    session.record.run = describe_run(PROGRAM)
    with interruptible(session.record):
        quality.run(session)
        add_formats(session, Formats(args.model, windows, Ggml(args.ggml)), quality.token_ids(session))
    session.record.notes["calibration"] = {"name": args.calibrate.name, "tokens": windows.numel()}
    if (source / "training.json").is_file():  # of tools/train_english.py: sources, seed and curve
        training = json.loads((source / "training.json").read_text(encoding="utf-8"))
        columns = {name: _columns(training.pop(name)) for name in ("sources", "curve")}
        session.record.notes["training"] = training | columns
    session.record.model["name"] = source.parent.name if source.name == "model" else source.name
    session.harness.finish()
    return finish(session.record, quality.SUITE, (args.output, args.output.with_suffix(".png")), args.json)


if __name__ == "__main__":
    raise SystemExit(main())
