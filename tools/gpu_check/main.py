"""The command line of tools/gpu_check.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from gpu_check.budget import Clock
from gpu_check.merge import merge
from gpu_check.parts import PARTS, variants_of
from gpu_check.processes import StoppedError, raise_on_sigterm
from gpu_check.pytest_part import run_tests
from gpu_check.report import as_report, draw
from gpu_check.runner import PartRun
from qwen3fast.bench.record import Record, write_json

DESCRIPTION = """Test and measure on a machine with a GPU, part by part.

Each part ends within --minutes by itself, whatever hangs, and leaves its record as OUTPUT/PART.json, which is written
whenever something new is known; logs are in OUTPUT/PART. `--merge` joins the records of all parts. Needs no network:
weights are random. Exit status 1 if a test fails, something breaks or tokens are wrong.
"""
STOPPED = 143  # exit status after SIGTERM


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", type=_parts, help=f"comma-separated, in turn: {', '.join(PARTS)}")
    what.add_argument("--merge", action="store_true", help="join the parts in OUTPUT into one record and picture")
    parser.add_argument("--device", default="cuda", help="cpu: a dry run with a tiny model [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/gpu_check"), help="folder [%(default)s]")
    parser.add_argument("--into", type=Path, default=None, help="file of --merge [OUTPUT/gpu.json]")
    parser.add_argument("--minutes", type=float, default=8.5, help="for each part [%(default)s]")
    parser.add_argument("--only", default="", help="of a part, only variants whose name contains this")
    parser.add_argument(
        "--caches",
        type=Path,
        default=Path("build/gpu_check_caches"),
        help="compiled code for later parts [%(default)s]",
    )
    return parser


def _parts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {name!r}; there are {', '.join(PARTS)}")
    return names


def run_part(part: str, args: argparse.Namespace) -> Record:
    """Run one part and print what it found."""
    run = PartRun(part, args.output.resolve(), args.device, Clock(60 * args.minutes), args.caches.resolve())
    if part == "tests":
        try:
            run_tests(run, args.only)
        except (KeyboardInterrupt, StoppedError):
            run.interrupted = True
        record = run.save()
    else:
        record = run.run(variants_of(part, args.device, args.only))
    print(as_report(record))
    print(f"wrote {run.folder / part}.json after {run.clock.spent():.0f} s", flush=True)
    return record


def run_merge(args: argparse.Namespace) -> Record:
    """Join the parts and draw the picture."""
    record = merge(args.output)
    path = args.into or args.output / "gpu.json"
    write_json(record.to_dict(), path)
    reason = draw(record, path.with_suffix(".png"))
    print(as_report(record))
    print(reason or f"wrote {path.with_suffix('.png')}")
    print(f"wrote {path}")
    return record


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that the command line names. Returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.merge:
        try:
            return status_of([run_merge(args)])
        except (FileNotFoundError, ValueError) as err:
            parser.error(str(err))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; --device cpu shows that the program works")
    raise_on_sigterm()
    records: list[Record] = []
    for part in args.part:
        records.append(run_part(part, args))
        if records[-1].interrupted:
            return STOPPED
    return status_of(records)


def status_of(records: list[Record]) -> int:
    """Return 0 if everything passed."""
    return int(any(not record.passed or record.notes["errors"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
