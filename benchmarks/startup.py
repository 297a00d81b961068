"""Time from the start of a process to its first token, and to full speed, for each way of compiling.

    python benchmarks/startup.py --model random:0.6b --output benchmarks/results/cpu-startup.json

The model is written to a folder first. Then each run is a process of its own that loads the folder and streams a reply
for `--seconds`; runs take turns (A B C A B C ...). Warm runs find compiled code of earlier runs; cold runs get empty
caches, so they build the C++ operations as well. Writes every token's time to JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from huggingface_hub.utils import tqdm

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import write_json
from qwen3fast.checkpoint.save import save_model

MODES = {"never": "False", "auto": "'auto'", "always": "True"}
WINDOW = 10  # tokens in a row that must come at full speed
PROGRAM = """
import json, sys, time
from qwen3fast import Generator, SamplingParams, load_model
model = load_model(sys.argv[1])
loaded = time.time()
with Generator(model, max_seq_len=4096, compile={compile}) as generator:
    times = []
    for chunk in generator.stream(list(range(1, 33)), SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)):
        times.append(time.time())
        if times[-1] - times[0] > {seconds}:
            break
print(json.dumps([loaded, *times]))
"""


def run(folder: Path, mode: str, seconds: float, caches: Path | None = None) -> dict[str, float | list[float]]:
    """One process. Returns seconds since its start: until weights were loaded, and until each token."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if caches is not None:
        environment |= {"XDG_CACHE_HOME": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    program = PROGRAM.format(compile=MODES[mode], seconds=seconds)
    started = time.time()
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"a run with compile={MODES[mode]} failed:\n{done.stderr[-3000:]}")
    loaded, *times = (t - started for t in json.loads(done.stdout.splitlines()[-1]))
    return {"loaded_s": loaded, "token_s": times}


def full_speed_s(times: list[float], step_s: float) -> float | None:
    """When the first of WINDOW tokens came that took a fifth longer than step_s each, at most; None if none did.

    step_s: a step of the runs that compiled first, seconds.
    """
    for first, last in zip(times, times[WINDOW:], strict=False):
        if last - first <= 1.2 * WINDOW * step_s:
            return first
    return None


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b")
    parser.add_argument("--formats", default="bfloat16,int4", help="comma-separated [%(default)s]")
    parser.add_argument("--seconds", type=float, default=8, help="of a warm run; cold ones get 20 more [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="warm runs of each mode; cold runs are done once")
    parser.add_argument("--output", type=Path, default=Path("bench_results/startup.json"))
    args = parser.parse_args()

    device, results = torch.device("cpu"), []
    probe = BandwidthProbe(device)
    formats = args.formats.split(",")
    bar = tqdm(total=len(formats) * len(MODES) * (args.rounds + 1), desc="startup", unit="run")
    with tempfile.TemporaryDirectory() as temporary:
        for name in formats:
            folder = Path(temporary) / name
            save_model(load_model(args.model, quantization=None if name == "bfloat16" else name), folder)
            samples: dict[tuple[str, str], list[dict]] = {}
            for round_ in range(-1, args.rounds):
                for mode in MODES:
                    probe.measure(1)
                    bar.set_postfix_str(f"{name}, compile {mode}, {'cold' if round_ < 0 else 'warm'}")
                    if round_ < 0:
                        with tempfile.TemporaryDirectory() as caches:
                            sample = run(folder, mode, args.seconds + 20, Path(caches))
                    else:
                        if round_ == 0:
                            run(folder, mode, args.seconds)  # fills the caches
                        sample = run(folder, mode, args.seconds)
                    samples.setdefault(("cold" if round_ < 0 else "warm", mode), []).append(sample)
                    bar.update()
            step_s = median(b - a for sample in samples["warm", "always"] for a, b in pairwise(sample["token_s"]))
            for (caches_were, mode), runs in samples.items():
                firsts = [sample["token_s"][0] for sample in runs]
                fulls = [full for sample in runs if (full := full_speed_s(sample["token_s"], step_s)) is not None]
                result = {"format": name, "compile": mode, "caches": caches_were, "first_token_s": median(firsts)}
                reached = median(fulls) if len(fulls) == len(runs) else None
                results.append(result | {"full_speed_s": reached, "runs": runs})
    bar.close()
    for r in results:
        full = "not reached" if r["full_speed_s"] is None else f"{r['full_speed_s']:.2f} s"
        start = f"{r['format']:>9} compile {r['compile']:>6} {r['caches']}"
        print(f"{start}: first token {r['first_token_s']:.2f} s, full speed {full}")
    record = {"suite": "startup", "run": describe_run("benchmarks/startup.py"), "model": args.model}
    record |= {"environment": describe_environment(device), "bandwidth_gb_s": probe.gb_s, "results": results}
    write_json(record, args.output)


if __name__ == "__main__":
    main()
