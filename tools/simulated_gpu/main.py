"""Run a Python program on a simulated GPU, where there is none.

    python tools/simulated_gpu.py -m pytest tests/gpu
    python tools/simulated_gpu.py -m qwen3fast generate "What is 17 + 25?" --model tiny --device cuda

PyTorch must be built for CUDA 13 (2.11 to 2.15 are). What runs is the program, PyTorch's host code for CUDA
(caching allocators, streams, events, graphs), `torch.compile`, Inductor and Triton, up to the launches of kernels.

- Single operations of PyTorch, products and attention of libraries included, are computed by the CPU's operations.
- Triton's kernels, Inductor's and ours, are compiled for the GPU; their PTX runs in the emulator of `compile_for_gpu`,
  which does not know all instructions (wgmma is missing: SIMULATED_GPU_MAJOR=8 compiles without it).
- Work runs as late as CUDA allows, new memory is NaN (blocks that PyTorch reuses are not), and calls that a capture
  forbids fail. Graphs run in the order of their capture.

It says whether results are right, not how long a GPU takes: a step of a small model takes about a second.

Environment variables: SIMULATED_GPUS, the number of devices [1]; SIMULATED_GPU_BYTES, their memory [8 GiB];
SIMULATED_GPU_MAJOR, their compute capability [9]; SIMULATED_GPU_KERNELS=0 lets Triton's kernels and products do
nothing, to run large models for what the host does: results are meaningless then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from simulated_gpu.runtime import build

SETTINGS = {
    "SIMULATED_GPU": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # other processes would have a GPU of their own
    "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",  # it calls the driver itself
    "TORCHINDUCTOR_USE_STATIC_TRITON_LAUNCHER": "0",
    "GPU_TESTS_SLOWER": "50",
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qwen3fast/simulated-gpu"


def main(argv: list[str]) -> int:
    """Run the program that the arguments name, as `python` would; its child processes have a simulated GPU as well."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    library, here = build(CACHE), Path(__file__).parent
    environment = {**SETTINGS, **os.environ, "LD_PRELOAD": str(library)}
    for variable, folders in (("LD_LIBRARY_PATH", [library.parent]), ("PYTHONPATH", [here / "startup", here.parent])):
        before = os.environ.get(variable)
        environment[variable] = os.pathsep.join([*map(str, folders), *([before] if before else [])])
    os.execve(sys.executable, [sys.executable, *argv], environment)
