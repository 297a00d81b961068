"""Measure the types of weights that others publish: how they are loaded, with what error, in how many bits, how fast.

    python tools/prequantized_report.py --output benchmarks/results/prequantized.json

For each type of GGUF and each layout of FP8, AWQ and GPTQ, a matrix of random numbers is loaded as a layer of a
checkpoint is. The error is against the numbers that the type's definition gives. Speeds are of the product of one row
with the matrix, several copies of it in turn (more than caches hold), each followed by products with int4 and int8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from quantization_errors import relative_error
from tqdm import tqdm

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import interruptible
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.checkpoint.gguf.layout import own_format
from qwen3fast.checkpoint.gguf.tensors import StoredTensor
from qwen3fast.checkpoint.prequantized.format import PrequantizedFormat
from qwen3fast.checkpoint.prequantized.layer import PrequantizedLayer, expected_tensors
from qwen3fast.kernels import cpu
from qwen3fast.quantization.convert import get_format
from qwen3fast.quantization.formats import FORMATS, Format, Packed, quantize

CPU = torch.device("cpu")
# The places of float16 scales in a block of each type of GGUF.
GGUF_TYPES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"}
LAYOUTS = {
    "AWQ, groups of 128": {
        "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    },
    "AWQ, groups of 32": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "GPTQ, 4 bits, symmetric": {**GPTQ, "sym": True},
    "GPTQ, 4 bits, zero points": {**GPTQ, "sym": False},
    "GPTQ, 4 bits, desc_act": {**GPTQ, "sym": False, "desc_act": True},
    "GPTQ, 8 bits": {**GPTQ, "bits": 8, "sym": True},
}  # fmt: skip
COMPRESSED_FP8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
FLOATS = {"type": "float", "num_bits": 8}
FP8_LAYOUTS = {
    "FP8, blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "FP8, rows": {**COMPRESSED_FP8, "config_groups": {"all": {"weights": {**FLOATS, "strategy": "channel"}}}},
    "FP8, one scale": {**COMPRESSED_FP8, "config_groups": {"all": {"weights": {**FLOATS, "strategy": "tensor"}}}},
}


class Loaded(NamedTuple):
    """A weight of a type: our format, the packed weight, the numbers of its definition (float32), and its bytes."""

    format: Format
    packed: Packed
    exact: torch.Tensor
    file_bytes: int


def load_gguf(kind: str, N: int, K: int) -> Loaded:
    """Return a matrix of random levels in a type of GGUF, loaded as a file's tensor is."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (N, K // block, size), dtype=np.uint8)
    for place in GGUF_TYPES[kind]:
        scale = rng.uniform(1e-4, 4e-4, (N, K // block, 1)).astype("<f2")
        data[..., place : place + 2] = scale.view(np.uint8)
    data = data.reshape(-1)
    tensor = StoredTensor.of_file("", kind, (N, K), int(number), data, 0)
    format = own_format(tensor, None)
    assert format is not None, "these types are quantized"
    return Loaded(format, tensor.packed(format, CPU), tensor.plain(CPU, torch.float32), data.nbytes)


def load_layout(config: dict[str, object], N: int, K: int) -> Loaded:
    """Return a matrix of random levels in a layout, loaded as a checkpoint's layer is."""
    stored, rng = PrequantizedFormat.from_dict(config, ""), np.random.default_rng(0)
    in_word, G = 32 // stored.bits, K // stored.group_size
    is_awq = stored.method == "awq"

    def words(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32))

    middle = 0x77777777 if stored.bits == 4 else 0x7F7F7F7F  # less one
    tensors = {
        "qweight": words(K, N // in_word) if is_awq else words(K // in_word, N),
        "qzeros": words(G, N // in_word),
        "scales": torch.from_numpy(rng.uniform(1e-3, 4e-3, (G, N)).astype(np.float16)),
    }
    if stored.is_symmetric:
        tensors["qzeros"].fill_(middle)
    if stored.has_act_order:
        tensors["g_idx"] = torch.from_numpy(rng.permutation(np.arange(K) // stored.group_size).astype(np.int32))
    file_bytes = sum(t.nbytes for t in tensors.values())
    layer = PrequantizedLayer(stored, (N, K), tensors)
    format = stored.as_format(get_format(stored.loaded_as))
    order_K, exact = layer.input_order(format), layer.plain(torch.float32)
    return Loaded(format, layer.packed(format, order_K), exact if order_K is None else exact[:, order_K], file_bytes)


def load_fp8(config: dict[str, object], N: int, K: int) -> Loaded:
    """Return a matrix of random float8 numbers, loaded as a checkpoint's layer is."""
    stored, rng = PrequantizedFormat.from_dict(config, ""), np.random.default_rng(0)
    number_NK = rng.integers(0, 256, (N, K), dtype=np.uint8)
    number_NK[number_NK & 127 == 127] = 0  # NaN
    tensors = {"weight": torch.from_numpy(number_NK).view(torch.float8_e4m3fn)}
    scales = {n: t for n, t in expected_tensors(stored, N, K).items() if n not in tensors and not t.is_optional}
    tensors |= {name: torch.from_numpy(rng.uniform(1e-5, 4e-5, t.shape)).bfloat16() for name, t in scales.items()}
    layer, format = PrequantizedLayer(stored, (N, K), tensors), stored.as_format(get_format(stored.loaded_as))
    file_bytes = sum(t.nbytes for t in tensors.values())
    return Loaded(format, layer.packed(format), layer.plain(torch.float32), file_bytes)


def product_times(
    weights: dict[str, Packed], repetitions: int, copies: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the ms of a product of one row with each weight, one product of each in turn, on copies in turn.

    weights: as the C++ operations take them.
    """
    all_copies = {
        name: [Packed(*(t.clone() for t in packed)) for _ in range(copies)] for name, packed in weights.items()
    }
    int4 = all_copies["int4"][0]
    x = torch.full((1, int4.weight.shape[1] * 8), 0.1, dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in weights}
    for i in range(-copies, repetitions):  # the first ones warm up
        for name, packed in all_copies.items():
            one = packed[i % copies]
            started = clock()
            torch.ops.qwen3fast.quantized_linear(x, [one.weight], [one.scale])
            if i >= 0:
                times[name].append((clock() - started) * 1e3)
    return times


def measure(args: argparse.Namespace, record: Record) -> None:
    """Add a case per type."""
    N = K = args.size
    plain = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    references = {name: quantize(plain, FORMATS[name]) for name in ("int4", "int8")}
    loaders: dict[str, Callable[[], Loaded]] = {
        f"GGUF, {kind}": lambda kind=kind: load_gguf(kind, N, K)
        for kind in GGUF_TYPES  # type: ignore[misc]
    }
    loaders |= {name: lambda config=config: load_layout(config, N, K) for name, config in LAYOUTS.items()}  # type: ignore[misc]
    loaders |= {name: lambda config=config: load_fp8(config, N, K) for name, config in FP8_LAYOUTS.items()}  # type: ignore[misc]
    for name, load in tqdm(loaders.items(), desc="types"):
        loaded = load()
        error = relative_error(loaded.format.dequantize(loaded.packed), loaded.exact)
        memory = sum(t.nbytes for t in loaded.packed)
        facts = {"bits_in_file": loaded.file_bytes * 8 / (N * K), "bits_in_memory": memory * 8 / (N * K)}
        case = Case({"type": name, "loaded_as": loaded.format.name}, facts, {"weight_error": [error]})
        times = product_times(
            {"own": loaded.format.operands(loaded.packed), **references}, args.repetitions, args.copies
        )
        case.samples["operator_ms"] = times["own"]
        for reference in references:
            pairs = zip(times["own"], times[reference], strict=True)
            case.samples[f"over_{reference}"] = [own / other for own, other in pairs]
        record.cases.append(case)


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and channels, a multiple of 256 [%(default)s]")
    parser.add_argument("--repetitions", type=int, default=60, help="products that are timed [%(default)s]")
    parser.add_argument("--copies", type=int, default=6, help="of each matrix, read in turn [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of the products [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/prequantized.json"), help="[%(default)s]")
    args = parser.parse_args()
    if args.size < 256 or args.size % 256:
        parser.error("--size must be a multiple of 256")
    if not cpu.load():
        parser.error("the C++ operations are needed")
    torch.set_num_threads(args.threads)
    run = describe_run("python tools/prequantized_report.py")
    record = Record("prequantized", run, describe_environment(CPU), {"name": f"{args.size} x {args.size}"})
    with interruptible(record):
        measure(args, record)
    write_json(record.to_dict(), args.output)
    for case in record.cases:
        figures = {name: round(estimate.median, 6) for name, estimate in case.metrics.items()}
        print(case.name, {k: round(v, 2) for k, v in case.facts.items()}, figures)
    print(f"wrote {args.output}")
    return 130 if record.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
