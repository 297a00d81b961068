"""Gives each Python process a simulated GPU; see simulated_gpu/main.py, which puts this folder on PYTHONPATH."""

import os

if os.environ.get("SIMULATED_GPU"):
    from simulated_gpu.install import install

    install()
