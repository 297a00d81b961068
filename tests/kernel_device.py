"""Where Triton kernels are tested: on a GPU if there is one, otherwise in Triton's interpreter.

To be imported before Triton is, which reads the variable then (PyTorch's optimizers import it as well).
"""

import importlib.util
import inspect
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

    Functions that kernels call replaced all of it again. What there is to be replaced is looked for only once.
    """
    from triton.language import core
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched_modules, builtins = set(), {}

    def patched_builtin(package, builder, *scope):
        if package not in builtins:  # the first time, none of them has been replaced
            members = inspect.getmembers(package)
            builtins[package] = [(name, member) for name, member in members if core.is_builtin(member)]
        for name, member in builtins[package]:
            interpreter._patch_attr(package, name, member, builder, *scope)

    def patched(fn):
        module = id(fn.__globals__)
        if module not in patched_modules:
            patched_modules.add(module)
            return patch(fn)
        return None

    def launched(executor, *arguments, **options):
        patched_modules.clear()  # the end of a launch restores the language
        return launch(executor, *arguments, **options)

    interpreter._patch_builtin, interpreter._patch_lang = patched_builtin, patched
    interpreter.GridExecutor.__call__ = launched


def leave_out_unused_checks():
    """Leave out the interpreter's checks for overflow, whose results it tells nobody.

    As on a GPU, only launches with debug=True would.
    """
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    if not interpreter.interpreter_builder.options.debug:
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


def make_types_once():
    """Compute what a type and the tensors of a type consist of once: most of the interpreter's time goes into it."""
    from triton.language import core
    from triton.runtime import interpreter

    make_type, make_tensor, get_np_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
    types, shapes, np_dtypes, are_equal = {}, {}, {}, core.tuple.__eq__

    def made_type(self, element_ty, shape):
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        key = element_ty.name, getattr(element_ty, "address_space", None), sizes
        if key not in types:
            make_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            types[key] = vars(self)
        else:
            vars(self).update(types[key])

    def made_tensor(self, handle, type):
        parts = vars(type).get("parts_of_tensors")
        if parts is None:
            make_tensor(self, handle, type)
            type.parts_of_tensors = {name: part for name, part in vars(self).items() if part is not handle}
        else:
            vars(self).update(parts, handle=handle)

    def known_np_dtype(type):
        if type.name not in np_dtypes:
            np_dtypes[type.name] = get_np_dtype(type)
        return np_dtypes[type.name]

    def are_one_or_equal(self, other):
        return core.constexpr(True) if self is other else are_equal(self, other)

    core.tuple.__eq__ = are_one_or_equal
    core.block_type.__init__, core.tensor.__init__ = made_type, made_tensor
    interpreter._get_np_dtype = known_np_dtype


if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        serve_new_numpy()
        patch_once_per_launch()
        leave_out_unused_checks()
        make_types_once()
