"""Where Triton kernels are tested: on a GPU if there is one, otherwise in Triton's interpreter.

To be imported before Triton is, which reads the variable then (PyTorch's optimizers import it as well).
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
