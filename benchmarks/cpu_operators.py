"""Time of a decode step and of a prefill on a CPU by operator, for each weight format.

    python benchmarks/cpu_operators.py --output benchmarks/results/operators-0.6b.json

A decode step's operators are differences: of the blocks at two positions, and of the whole step in C++ and its blocks.
A prefill's run one at a time for all blocks. The whole is timed beside them; formats take turns. "Other" is the whole
minus its operators, per round: for decode Python and copying the token to the host, for prefill norms, rotation,
activation functions, writing to the cache.
Writes JSON and a picture, and prints a table of medians in milliseconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from operators_picture import draw
from tables import operators_rows

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import Workbench, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.plot import save
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text
from qwen3fast.engine import Engine, StepKind
from qwen3fast.engine.prefill import prefill_chunk
from qwen3fast.model.linears import linears

FORMATS = ("bf16", "int8", "int4")
MODE = "cached-compiled"


class Stopwatch:
    """A clock of laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.perf_counter()
        self._last, seconds = now, now - self._last
        return seconds


def time_decode(engine: Engine, context: int) -> dict[str, float]:
    """Return the seconds of a decode step over `context` positions, and of its operators.

    Attention is the time of the blocks minus their time over one position. The operators around the blocks: the time of
    the whole step in C++ minus the blocks'.
    """
    layers, state, tables = engine.parts.decode_layers, engine.state, (engine.cos_SD, engine.sin_SD)
    assert layers is not None and layers.runs_steps and layers.serves(1), "the C++ operations are not there"
    engine.set_row(0, context - 1)
    first_11, last_11 = torch.zeros(1, 1, dtype=torch.int64), state.position_R[:1, None].clone()
    x_11E = engine.model.embed(state.input_R[:1, None])
    watch = Stopwatch()
    layers(x_11E, *tables, last_11)
    blocks = watch.lap()
    layers.choose(state, 1, *tables, is_greedy=True)
    step = watch.lap()
    engine.set_row(0, context - 1)
    watch.lap()
    engine.decode(1, context, StepKind())
    whole = watch.lap()
    layers(x_11E, *tables, first_11)
    blocks_alone = watch.lap()
    return {
        "blocks without attention": blocks_alone,
        "attention": blocks - blocks_alone,
        "embedding, output projection, choice": step - blocks,
        "whole": whole,
    }


def time_prefill(engine: Engine, tokens: int) -> dict[str, float]:
    """Return the seconds of a chunk of a prompt, and of its operators, each run by itself for all blocks."""
    model, cache, config = engine.model, engine.cache, engine.model.config
    token_1T, position_1T = torch.tensor(make_prompts(config.vocab_size, tokens, 1)), torch.arange(tokens)[None]
    q_1THD = torch.randn(1, tokens, config.num_attention_heads, config.head_dim).to(cache.layers()[0].k_RKSD.dtype)
    wide, inner = torch.randn(1, tokens, config.num_attention_heads * config.head_dim).to(q_1THD.dtype), None
    row_1 = torch.tensor([0])
    watch = Stopwatch()
    x_1TE = model.embed(token_1T)
    embedding = watch.lap()
    for block in model.model.layers:
        attention, feed_forward = block.self_attn, block.mlp
        linears(x_1TE, attention.q_proj, attention.k_proj, attention.v_proj)
        linears(wide, attention.o_proj)
        inner = linears(x_1TE, feed_forward.gate_proj, feed_forward.up_proj)[0]
        linears(inner, feed_forward.down_proj)
    products = watch.lap()
    for layer in cache.layers():
        torch.ops.qwen3fast.prefill_attention(q_1THD, layer.k_RKSD, layer.v_RKSD, position_1T, row_1)
    attention_s = watch.lap()
    prefill_chunk(engine.forward_args(), row_1, token_1T, 0, lasts=[tokens - 1])
    whole = watch.lap()
    return {"embedding": embedding, "linear layers": products, "attention": attention_s, "whole": whole}


def with_other(seconds: dict[str, float]) -> dict[str, float]:
    """Return the milliseconds of the whole, of its operators, and of the rest."""
    ms = {name: s * 1e3 for name, s in seconds.items()}
    whole = ms.pop("whole")
    return {"whole": whole, **ms, "other": whole - sum(ms.values())}


def make_task(record: Record, labels: dict[str, str | int], time_once: Callable[[], dict[str, float]]) -> Task:
    """Return a task that times a step or a prefill; each operator is a case, made here in a warm-up round."""
    cases = {name: Case({**labels, "operator": name}) for name in with_other(time_once())}
    record.cases += cases.values()

    def run() -> Measurement:
        ms = with_other(time_once())
        for name, case in cases.items():
            if name != "whole":
                case.add({"operator_ms": ms[name]})
        return {"operator_ms": ms["whole"]}

    return Task(cases["whole"], run, warms_up=False)


def make_tasks(
    record: Record, engines: dict[str, Engine], contexts: Sequence[int], prompts: Sequence[int]
) -> list[Task]:
    """Return a task per shape and format; formats take turns at each shape."""
    timers = [("decode", n, time_decode) for n in contexts] + [("prefill", n, time_prefill) for n in prompts]
    tasks = []
    for phase, length, timer in timers:
        for name, engine in engines.items():
            labels: dict[str, str | int] = {"phase": phase, "format": name, "context": length}
            tasks.append(make_task(record, labels, lambda e=engine, n=length, t=timer: t(e, n)))
    return tasks


def measure(args: argparse.Namespace) -> Record:
    """Measure all formats in turns. Returns: the record."""
    cpu = torch.device("cpu")
    run = describe_run("python benchmarks/cpu_operators.py")
    record = Record("operators", run, describe_environment(cpu), {"name": args.model})
    probe = BandwidthProbe(cpu)
    harness = Harness(record, [lambda: {"bandwidth_gb_s": probe.measure(1)}])
    engines = {}
    with interruptible(record):
        for name in FORMATS:
            model = load_model(
                args.model, "cpu", quantization=None if name == "bf16" else name, progress=True, calibrate=False
            )
            bench = Workbench(model, (MODE,), max(*args.contexts, *args.prompts) + 1, 1)
            engines[name] = bench.engine(MODE)
            engines[name].warmup()
            bench.run(MODE, make_prompts(model.config.vocab_size, max(args.contexts), 1), 1)  # fills the cache
        harness.measure(make_tasks(record, engines, args.contexts, args.prompts), args.rounds)
    harness.finish()
    return record


@torch.no_grad()
def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--contexts", type=counts, default="32,1024,4000", help="of decode steps [%(default)s]")
    parser.add_argument("--prompts", type=counts, default="32,512", help="prefill lengths: chunk sizes [%(default)s]")
    parser.add_argument("--rounds", type=int, default=15, help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/operators.json"), help="[%(default)s]")
    args = parser.parse_args()
    record = measure(args)
    write_json(record.to_dict(), args.output)
    print(as_text(operators_rows(record), left=1))
    print("\n".join(f"noise: {reason}" for reason in record.noise))
    if any(case.samples for case in record.cases):
        save(draw(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output}")
    return 130 if record.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
