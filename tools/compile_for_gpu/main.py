"""The command line of tools/compile_for_gpu.py, and its record."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from compile_for_gpu.binaries import is_unsafe
from compile_for_gpu.cases import own_cases
from compile_for_gpu.devices import GPUS, pretended
from compile_for_gpu.kernels import compile_own_kernels, fused_cases
from compile_for_gpu.steps import inspect
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import Case, Record, load_record, write_json
from qwen3fast.bench.table import Columns, as_text, table_rows

DESCRIPTION = """Compile decode steps and prompt chunks for NVIDIA GPUs on a machine that has none.

Needs a PyTorch from 2.11 that was built for CUDA, and the Triton that comes with it: an environment of several GB,
but no GPU and no driver. Parts are compiled by torch.compile, as the engine does it and with the sizes that it lets
vary, on tensors without memory; every Triton kernel, Inductor's and ours, becomes machine code by the assembler in
Triton's package. What the kernels compute, and how fast, is not checked here. A case of the record is a step: how many
Triton kernels, products and attentions of libraries, and eager operations it launches, the most shared memory,
registers and spilled bytes of its kernels. Exit status 1 if a part does not compile, or a kernel needs more shared
memory than the GPU has, or may start early and does not wait for what it reads.
"""
COLUMNS = Columns(
    ("gpu", "step", "model", "weights", "batch_size"),
    ("triton_kernels", "library_calls", "eager_calls", "shared_bytes"),
)

NOTED = ("own_launches", "library_calls", "eager_calls", "parts")  # of a step


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "sizes; after a slash, how many layers [%(default)s]"
    parser.add_argument("--models", default="0.6b,8b,30b-a3b/4", help=sizes)
    parser.add_argument("--weights", default="bf16,int8,int4,fp8,fp8-block", help="bf16 or a format [%(default)s]")
    parser.add_argument("--batch-sizes", default="1,16", help="[%(default)s]")
    parser.add_argument("--context", type=int, default=1024, help="positions of the KV cache [%(default)s]")
    parser.add_argument("--gpus", default=",".join(GPUS), help="[%(default)s]")
    parser.add_argument("--add", action="store_true", help="keep the cases that OUTPUT has")
    parser.add_argument("--output", type=Path, default=Path("bench_results/gpu-compile.json"), help="[%(default)s]")
    return parser


def add_step(record: Record, gpu_name: str, step: dict[str, Any]) -> None:
    """Make a case of what `inspect` found, and note its parts under the case's name; or note its error."""
    labels = {"gpu": gpu_name, **{name: step[name] for name in ("step", "model", "weights", "batch_size")}}
    case = Case(labels, {"context": float(step["context"])})
    if "error" in step:
        record.notes["errors"][case.name] = step["error"]
        return
    kernels = [*step["own_kernels"], *(kernel for part in step["parts"].values() for kernel in part["kernels"])]
    case.facts["most_registers"] = float(max((kernel["registers"] for kernel in kernels), default=0))
    case.facts["spill_bytes"] = float(sum(kernel["spill_bytes"] for kernel in kernels))
    counts = {"triton_kernels": step["triton_launches"], "library_calls": sum(step["library_calls"].values())}
    counts |= {"eager_calls": sum(step["eager_calls"].values())}
    case.add(counts | {"shared_bytes": max((kernel["shared_bytes"] for kernel in kernels), default=0)})
    record.cases.append(case)
    parts = {
        name: part | {"kernels": [_number_of(record, {"gpu": gpu_name, **kernel}) for kernel in part["kernels"]]}
        for name, part in step["parts"].items()
    }
    own = [_number_of(record, {"gpu": gpu_name, **kernel}) for kernel in step["own_kernels"]]
    record.notes["steps"][case.name] = {name: step[name] for name in NOTED} | {"own_kernels": own, "parts": parts}


def _number_of(record: Record, kernel: dict[str, Any]) -> int:
    """Return a kernel's place in the record's list of kernels, which holds each one once; append it if it is new."""
    known = record.notes["kernels"]
    if kernel not in known:
        known.append(kernel)
    return int(known.index(kernel))


def keep_cases(record: Record, earlier: Record) -> None:
    """Put what an earlier record found before the cases of a new one.

    Raises: ValueError if its commit or its versions differ.
    """
    for name in ("git_commit", "torch", "triton"):
        new, old = ((r.run | r.environment).get(name) for r in (record, earlier))
        if new != old:
            raise ValueError(f"the record to add to was made with {name} {old}, but this is {new}; make it again")
    record.cases += earlier.cases
    record.run["command"] = f"{earlier.run['command']}; {record.run['command']}"
    for name in ("steps", "kernels", "own_kernels", "errors"):
        record.notes[name] = earlier.notes[name]


def kernels_of(record: Record) -> list[dict[str, Any]]:
    """Return all kernels of a record, ours and Inductor's, each with its GPU's name."""
    return [*record.notes["own_kernels"], *record.notes["kernels"]]


def faults_of(record: Record) -> list[str]:
    """Return the parts that did not compile and the faults of the record's kernels, in words; empty if all can run."""
    large = {k["name"] for k in kernels_of(record) if k["shared_bytes"] > GPUS[k["gpu"]].shared_bytes}
    unsafe = {k["name"] for k in kernels_of(record) if is_unsafe(k)}
    faults = [f"more shared memory than there is: {', '.join(sorted(large))}"] if large else []
    faults += [f"{name}: {error}" for name, error in record.notes["errors"].items()]
    return faults + ([f"do not wait for what they depend on: {', '.join(sorted(unsafe))}"] if unsafe else [])


def main(arguments: list[str] | None = None) -> int:
    """Compile, print and write. Returns the exit status."""
    args = build_parser().parse_args(arguments)
    if not torch.backends.cuda.is_built():
        print(f"this PyTorch, {torch.__version__}, was built without CUDA; see the program's text for an environment")
        return 1
    environment = describe_environment(torch.device("cpu"))
    environment |= {"cuda": torch.version.cuda, "triton": triton.__version__}
    notes: dict[str, Any] = {"gpus": {name: asdict(gpu) for name, gpu in GPUS.items()}, "steps": {}}
    notes |= {"kernels": [], "own_kernels": [], "errors": {}}
    model = {"name": f"a greedy and a sampled decode step and a chunk of a prompt over {args.context:,} positions"}
    record = Record("compiled", describe_run("python tools/compile_for_gpu.py"), environment, model, notes=notes)
    if args.add:
        keep_cases(record, load_record(args.output))
    for gpu_name in args.gpus.split(","):
        with pretended(GPUS[gpu_name]):
            fused = fused_cases(GPUS[gpu_name], args.models.split(","), args.weights.split(","))
            cases = [*own_cases(), *fused]
            own = compile_own_kernels(GPUS[gpu_name], cases)
            named = {(kernel["gpu"], kernel["name"]): kernel for kernel in notes["own_kernels"]}
            named |= {(gpu_name, kernel["name"]): {"gpu": gpu_name, **kernel} for kernel in own}
            notes["own_kernels"] = list(named.values())
            for size in args.models.split(","):
                for weights in args.weights.split(","):
                    for batch_size in map(int, args.batch_sizes.split(",")):
                        print(f"{gpu_name}: {size}, {weights}, batch {batch_size}", file=sys.stderr, flush=True)
                        quantization = None if weights == "bf16" else weights
                        for step in inspect(size, batch_size, args.context, quantization):
                            add_step(record, gpu_name, step)
                        write_json(record.to_dict(), args.output)
    print(as_text(table_rows(record, COLUMNS), left=len(COLUMNS.labels)))
    for kernel in notes["own_kernels"]:
        sizes = f"{kernel['shared_bytes']:9,} bytes shared {kernel['registers']:4} registers"
        sizes += f" {kernel['spill_bytes']:5} bytes spilled {kernel.get('slots_per_weight', '')}"
        print(f"{kernel['gpu']:7}{kernel['name']:38}{sizes}")
    print(f"wrote {args.output}")
    faults = faults_of(record)
    print("\n".join(faults), file=sys.stderr)
    return int(bool(faults))
