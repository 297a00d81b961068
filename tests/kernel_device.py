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


def patch_once_per_launch():
    """Replace Triton's language by the interpreter's once per launch and module, not at every call of a function.

    Functions that kernels call replaced all of it again.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched_modules = set()

    def patched(fn):
        module = id(fn.__globals__)
        if module not in patched_modules:
            patched_modules.add(module)
            return patch(fn)
        return None

    def launched(executor, *arguments, **options):
        patched_modules.clear()  # the end of a launch restores the language
        return launch(executor, *arguments, **options)

    interpreter._patch_lang = patched
    interpreter.GridExecutor.__call__ = launched


def leave_out_unused_checks():
    """Leave out the interpreter's checks for overflow, whose results it tells nobody.

    As on a GPU, only launches with debug=True would.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if not interpreter.interpreter_builder.options.debug:
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        serve_new_numpy()
        patch_once_per_launch()
        leave_out_unused_checks()
