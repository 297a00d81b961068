"""One CPU thread per pytest-xdist worker: workers of several threads each would wait for one another's.

Must be imported before PyTorch, which reads the variables then. Tests that need more threads set them themselves.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in the worker itself, not in processes of its own
