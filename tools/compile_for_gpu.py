"""Compile decode steps and prompt chunks for NVIDIA GPUs on a machine that has none; see compile_for_gpu/main.py.

python -m venv ~/gpu-env
~/gpu-env/bin/pip install torch==2.11.0 numpy safetensors tokenizers huggingface_hub matplotlib jinja2
PYTHONPATH=. ~/gpu-env/bin/python tools/compile_for_gpu.py --output bench_results/gpu-compile.json
"""

import os

if __name__ == "__main__":  # read when Inductor is imported
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # other processes would look for a GPU
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

from compile_for_gpu.main import main  # the package beside this file

if __name__ == "__main__":
    raise SystemExit(main())
