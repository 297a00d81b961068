"""The process of one variant: `python -m gpu_check.child VARIANT.json RESULTS.json DEVICE END`.

END is when it should be done, in seconds since 1970: what time does not suffice for is left out, the profile first.
Whatever goes wrong ends up in the results; only a crash of the process itself does not.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from gpu_check.budget import Clock
from gpu_check.cached import measure_cached
from gpu_check.peers import measure_transformers
from gpu_check.results import Results
from gpu_check.settings import UnavailableError, apply_options, apply_switches
from gpu_check.uncached import measure_uncached
from gpu_check.variants import Variant
from qwen3fast.bench.environment import describe_environment

MEASURES = {"cached": measure_cached, "uncached": measure_uncached, "transformers": measure_transformers}


def run_variant(variant: Variant, device: torch.device, results: Results, clock: Clock) -> None:
    """Measure a variant; note in `results` why it could not be, if so."""
    try:
        results.environment |= describe_environment(device)
        apply_switches(variant.switches)
        apply_options(variant.options)
        MEASURES[variant.kind](variant, device, results, clock)
    except UnavailableError as err:
        results.left_out.append(str(err))
    except (MemoryError, torch.OutOfMemoryError) as err:
        results.left_out.append(f"no memory: {str(err).splitlines()[0]}")
    except Exception as err:  # one variant that breaks must not cost what it has measured
        traceback.print_exc()
        results.errors.append(f"{type(err).__name__}: {str(err)[:500]}")
    results.notes["seconds"] = clock.spent()
    results.save()


def main(arguments: list[str]) -> None:
    """Run the variant that the command line names. If it crashes or is ended, its log says where it was."""
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    variant_file, results_file, device, end = arguments
    clock = Clock(float(end) - time.time())
    variant = Variant.from_json(json.loads(Path(variant_file).read_text(encoding="utf-8")))
    run_variant(variant, torch.device(device), Results(Path(results_file)), clock)


if __name__ == "__main__":
    main(sys.argv[1:])
