"""One CPU thread per pytest-xdist worker: workers of several threads each would wait for one another's.

Must be imported before PyTorch, which reads the variable then. Tests that need more threads set them themselves.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
