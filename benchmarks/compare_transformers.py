"""Decode speed of qwen3fast beside transformers on the same weights, in one process, taking turns.

    python benchmarks/compare_transformers.py --model random:0.6b --lengths 32,512

Each round times transformers' eager decode with its default DynamicCache, then qwen3fast eager, then qwen3fast
compiled, for a few tokens each, and the rounds repeat (A B C A B C ...), so that a noisy machine treats all alike.
Before anything is timed, the greedy tokens of all three are held against the logits of the plain model. Writes JSON.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from huggingface_hub.utils import tqdm

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.measure import Sample, Workbench, make_prompts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import write_json
from qwen3fast.model import Qwen3

OURS = ("cached-eager", "cached-compiled")


def share_weights(model: Qwen3) -> transformers.Qwen3ForCausalLM:
    """transformers' model on the very tensors of ours: no second copy, no difference in values."""
    config = transformers.Qwen3Config(**model.config.to_dict())
    with torch.device("meta"):
        reference = transformers.Qwen3ForCausalLM(config)
    reference.load_state_dict(model.state_dict(), strict=False, assign=True)
    reference.tie_weights()
    # The rotary frequencies are a buffer that no checkpoint holds: build that module anew, off meta.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config).to(model.lm_head.weight.device)
    return reference.eval()


@torch.no_grad()
def run_transformers(reference: transformers.Qwen3ForCausalLM, prompt: list[int], new_tokens: int) -> Sample:
    """Greedy decode with `DynamicCache`, token by token through the model itself (no overhead of `generate`)."""
    cache = transformers.DynamicCache(config=reference.config)
    ids, times, output = torch.tensor([prompt], device=reference.device), [], []
    for _ in range(new_tokens):
        started = time.perf_counter()
        logits = reference(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        output.append(int(ids))
        times.append(time.perf_counter() - started)
    return Sample(times[0], times[1:], [output])


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b")
    parser.add_argument("--lengths", default="32,512", help="prompt lengths, comma-separated [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens a turn [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each [%(default)s]")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("bench_results/compare_transformers.json"))
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    model = load_model(args.model, "cpu", args.dtype)
    reference = share_weights(model)
    bench = Workbench(model, OURS, max(lengths) + args.new_tokens + 1, 1)
    probe = BandwidthProbe(bench.device)
    runs = {
        "transformers-eager": lambda prompt, n: run_transformers(reference, prompt, n),
        **{mode: lambda prompt, n, mode=mode: bench.run(mode, [prompt], n) for mode in OURS},
    }
    [prompt] = make_prompts(model.config.vocab_size, 40, 1, seed=1)
    checks = {}
    for name, run in runs.items():
        run(prompt, 3)  # compiles
        checks[name] = bench.check(run(prompt, 12), [prompt])
        assert checks[name].passed, f"{name} gives wrong tokens: {checks[name]}"
    results = []
    bar = tqdm(total=len(lengths) * args.rounds * len(runs), desc="measuring", unit="turn")
    for length in lengths:
        [prompt] = make_prompts(model.config.vocab_size, length, 1)
        steps: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            probe.measure(2)
            for name, run in runs.items():
                steps[name] += run(prompt, args.new_tokens + 1).step_s
                bar.update()
        speeds = {name: 1 / median(seconds) for name, seconds in steps.items()}
        ratio = speeds["cached-compiled"] / speeds["transformers-eager"]
        results.append({"length": length, "decode_tok_s": speeds, "compiled_over_transformers": ratio, "step_s": steps})
        bar.write(
            f"context {length}: " + ", ".join(f"{n} {v:.1f} tok/s" for n, v in speeds.items()) + f"; {ratio:.2f}x"
        )
    bar.close()
    record = {
        "run": describe_run("python benchmarks/compare_transformers.py"),
        "environment": describe_environment(bench.device) | {"transformers": transformers.__version__},
        "model": args.model,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "read_bandwidth_gb_s": probe.gb_s,
        "checks": {
            name: {"tokens": c.tokens, "exact": c.exact, "worst_gap": c.worst_gap} for name, c in checks.items()
        },
        "results": results,
    }
    write_json(record, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
