"""Run a Python program on a simulated GPU, where there is none; see simulated_gpu/main.py.

python -m venv ~/gpu-env
~/gpu-env/bin/pip install torch==2.11.0 -e '.[test]'
~/gpu-env/bin/python tools/simulated_gpu.py -m pytest tests/gpu
"""

import sys

from simulated_gpu.main import main  # the package beside this file

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
