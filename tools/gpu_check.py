"""Test and measure on a machine with a GPU, part by part; see gpu_check/__init__.py for what each part does.

PYTHONPATH=. python tools/gpu_check.py --part tests --output gpu_check
PYTHONPATH=. python tools/gpu_check.py --part decode --output gpu_check
PYTHONPATH=. python tools/gpu_check.py --merge --output gpu_check        # gpu_check/gpu.json and gpu.png
PYTHONPATH=. python tools/gpu_check.py --part decode --device cpu        # a dry run with a tiny model
"""

from gpu_check.main import main  # the package beside this file

if __name__ == "__main__":
    raise SystemExit(main())
