"""Where Triton kernels are tested: on a GPU if there is one, otherwise in Triton's interpreter.

To be imported before Triton is, which reads the variable then (PyTorch's optimizers import it as well).
"""

import importlib.util
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def serve_new_numpy():
    """Let numbers of kernels end loops: interpreters up to Triton 3.6 hand arrays of one element to int().

    NumPy takes them no more.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patched


if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        serve_new_numpy()
