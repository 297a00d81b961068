"""Compilation of the parts of a step by `torch.compile`: what is compiled, when, how often, and what happens without a
C++ compiler.

The unit is one transformer block: compiled once, it serves all layers, because the parameters of a module are inputs of
the compiled code. Each combination of static shapes is compiled by itself, into a form of its own; sizes that vary at
run time are marked as dynamic, with the range in which they lie, and `torch.compile` refuses to assume more of them.

Private parts of PyTorch used here: `torch._dynamo.mark_dynamic`, which its documentation of dynamic shapes names, and
which has no other name.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FunctionType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import operations

logger = logging.getLogger(__name__)

Function = Callable[..., Tensor]
CompileMode = bool | Literal["auto"]

# "auto" leaves the processor to the first token, and short runs, alone for so long.
AUTO_DELAY_S = 1.0
# What takes longer than this has found no compiled code of earlier processes: a C++ compiler is at work.
LONG_WORK_S = 2.0

# Read when a step is compiled for a CUDA device; switches for measuring what each is worth.
# coordinate_descent_tuning: products of one row become fused reductions. triton.enable_pdl: a kernel is launched while
# the one before it still runs (programmatic dependent launch, compute capability 9.0 and newer).
CUDA_OPTIONS: dict[str, bool] = {"coordinate_descent_tuning": True, "triton.enable_pdl": True}


class Dynamic(NamedTuple):
    """A size that varies at run time, from least to most.

    example: the size to compile with. Sizes that may differ in a call need different examples, because
    `torch.compile` takes equal ones for the same size.
    """

    example: int
    least: int = 2
    most: int = 2**31 - 1

    def holds(self, size: int) -> bool:
        """Return whether a size lies in the range."""
        return self.least <= size <= self.most


# For each tensor argument: its dynamic dimensions.
DynamicSizes = Sequence[dict[int, Dynamic]]


class StepCompiler:
    """Compiles parts of steps and counts what it did.

    mode "auto" compiles in a thread of its own, which builds the C++ operations with its first work and imports what
    `torch.compile` needs. Until a form is ready, the part runs uncompiled, with the operations once they are built; if
    the compiled form turns out slower, it goes on so. On CUDA devices "auto" is True: graphs are captured from compiled
    parts.

    Attributes:
        enabled: False if compilation was not asked for or cannot work here; parts then run uncompiled.
        compilations: forms compiled so far through this object.
        seconds: time spent compiling them.
    """

    def __init__(self, mode: CompileMode, device: torch.device) -> None:
        """Raises: ValueError for another mode than True, False and "auto"."""
        if mode not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {mode!r}")
        self.enabled = bool(mode) and (device.type != "cpu" or _has_cpp_compiler())
        self.thread: ThreadPoolExecutor | None = None
        self.auto_from_s = time.perf_counter() + AUTO_DELAY_S
        if self.enabled and mode == "auto" and device.type == "cpu":
            self.thread = ThreadPoolExecutor(1, "qwen3fast-compile", initializer=self._load_operations)
        elif self.enabled and device.type == "cpu":
            cpu.load()
        self.compilations = 0
        self.seconds = 0.0
        self._is_cuda = device.type == "cuda"
        self._at_work_since_s = float("inf")  # the thread; "inf" while it has nothing to do
        self._threads = torch.get_num_threads()

    def prepare(self, work: Callable[[], None]) -> None:
        """Run work before anything is compiled: now, or in the thread of "auto", after its operations are built."""
        if self.thread is not None:
            self.thread.submit(work)
        else:
            work()

    def share_processor(self) -> None:
        """Leave one core to the thread of "auto" while it works long; to be called before each step.

        On as many threads as cores, each of a step's many short products would wait until the compiler lets go of one.
        """
        if self.thread is not None:
            is_long = time.perf_counter() - self._at_work_since_s > LONG_WORK_S
            threads = max(1, self._threads - 1) if is_long else self._threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def _load_operations(self) -> None:
        self._at_work_since_s = time.perf_counter()
        try:
            cpu.load(jobs=max(1, self._threads - 1))
        finally:
            self._at_work_since_s = float("inf")

    def _compile_at_work(self, *arguments: Any) -> Function:
        self._at_work_since_s = time.perf_counter()
        try:
            return self.compile(*arguments)
        finally:
            self._at_work_since_s = float("inf")

    def submit(self, *arguments: Any) -> Future[Function]:
        """Run `compile` in the thread of "auto"."""
        assert self.thread is not None, "there is a thread in mode 'auto' only"
        return self.thread.submit(self._compile_at_work, *arguments)

    def part(self, function: Function, dynamic: DynamicSizes = ()) -> StepPart:
        """Return the part of a step that a function of a module and of tensors computes."""
        return StepPart(function, self, dynamic)

    @torch.no_grad()
    def compile(
        self, function: Function, module: nn.Module | None, tensors: Sequence[Tensor | None], dynamic: DynamicSizes
    ) -> Function:
        """Compile `function(module, *tensors)`, which gives one tensor, for tensors like these and the module's like.

        It is compiled by running it once on zeros: what it writes into its arguments goes nowhere.
        Raises: whatever `torch.compile` raises; nothing is kept then.
        """
        started = time.perf_counter()
        compiled = torch.compile(_own_code(function), fullgraph=True, dynamic=False, options=self._options())
        compiled(module, *[_example(tensor, sizes) for tensor, sizes in zip(tensors, dynamic, strict=True)])
        self.compilations += 1
        self.seconds += time.perf_counter() - started
        return cast(Function, compiled)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "triton.cudagraphs": False,  # a whole step is captured by engine/cuda_graph.py, not part by part
            "size_asserts": False,  # sizes are what forms are chosen by
            "alignment_asserts": False,
            "guard_filter_fn": _keep_guards,
        }
        if self._is_cuda:
            known = torch._inductor.list_options()  # named by torch.compile's documentation
            options |= {name: value for name, value in CUDA_OPTIONS.items() if name in known}
        elif cpu.is_loaded():  # built for this very processor, so Inductor need not try what the compiler can do
            options["cpp.vec_isa_ok"] = True
        return options

    def end_auto(self) -> None:
        """From now on, compile what is needed when it is needed."""
        if self.thread is not None:
            self.close(wait=True)
            cpu.load()  # the thread does so with its first work, which it may not have had

    def close(self, wait: bool = False) -> None:
        """End the thread of "auto". wait: for it."""
        if self.thread is not None:
            self.thread.shutdown(wait=wait, cancel_futures=True)
            self.thread = None
            if torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)


class StepPart:
    """A function of a module and of tensors, compiled once for each combination of static shapes that it meets.

    Modules whose parameters have the same names and shapes must be built alike, as they share a compiled form; they may
    hold different weights.
    A call may be repeated without effect: in "auto" mode, all forms are tried on the first call that could use each.
    """

    def __init__(self, function: Function, compiler: StepCompiler, dynamic: DynamicSizes) -> None:
        self.function, self.compiler, self.dynamic = function, compiler, dynamic
        self._kinds: dict[nn.Module | None, int] = {}  # a number for all modules that are built alike
        self._parameters: dict[tuple[Any, ...], int] = {}  # the same number by names and shapes
        self._forms: dict[tuple[Any, ...], Function] = {}  # by static shapes
        self._choices: dict[tuple[Any, ...], Function] = {}  # by all shapes
        self._jobs: dict[tuple[Any, ...], Future[Function]] = {}

    def __call__(self, module: nn.Module | None, *tensors: Tensor | None) -> Tensor:
        """Return the function's result. Each argument must be a tensor in all calls, or None in all calls."""
        return self.choose(module, *tensors)(module, *tensors)

    def choose(self, module: nn.Module | None, *tensors: Tensor | None) -> Function:
        """Return what to call for tensors of these shapes: looked up once, it may run any number of modules."""
        if not self.compiler.enabled:
            return self.function
        kind = self.kind(module)
        shapes = (kind, *(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors))
        choice = self._choices.get(shapes)
        if choice is None:
            dynamic = [*self.dynamic, *({} for _ in tensors[len(self.dynamic) :])]
            if not all(size.holds(t.shape[i]) for t, sizes in _pairs(tensors, dynamic) for i, size in sizes.items()):
                dynamic = [{} for _ in tensors]  # outside of the range: a form for these sizes alone
            key = (kind, *map(_static_shape, tensors, dynamic))
            form = self._form(key, module, tensors, dynamic)
            if form is None:
                return self._uncompiled()[0]  # this time
            choice = self._choices[shapes] = form
        return choice

    def kind(self, module: nn.Module | None) -> int:
        """Return a number that all modules have in common which share compiled forms."""
        kind = self._kinds.get(module)
        if kind is None:
            named = [] if module is None else module.named_parameters()
            parameters = tuple((name, p.shape, p.dtype) for name, p in named)
            kind = self._kinds[module] = self._parameters.setdefault(parameters, len(self._parameters))
        return kind

    def _form(
        self, key: tuple[Any, ...], module: nn.Module | None, tensors: Sequence[Tensor | None], dynamic: DynamicSizes
    ) -> Function | None:
        """Return the form for these shapes, compiled if there is none yet; None while a thread is compiling it."""
        if key not in self._forms:
            arguments = (self.function, module, tensors, dynamic)
            if self.compiler.thread is None:
                self._forms[key] = self.compiler.compile(*arguments)
            elif time.perf_counter() < self.compiler.auto_from_s:
                pass
            elif key not in self._jobs:
                self._jobs[key] = self.compiler.submit(*arguments)
            elif self._jobs[key].done():
                self._forms[key] = self._faster(self._jobs.pop(key), module, tensors)
        return self._forms.get(key)

    def _uncompiled(self) -> list[Function]:
        """Return the function with C++ operations, where there are any, and without."""
        return [self._with_operations, self.function] if cpu.is_loaded() else [self.function]

    def _with_operations(self, *arguments: Any) -> Tensor:
        with operations():
            return self.function(*arguments)

    def _faster(self, job: Future[Function], module: nn.Module | None, tensors: Sequence[Tensor | None]) -> Function:
        """Return the compiled form, or an uncompiled one if compiling failed or did not pay."""
        error = job.exception()
        if error is not None:
            warnings.warn(f"{self.function} could not be compiled and runs uncompiled, slower: {error}", stacklevel=2)
            return self._uncompiled()[0]
        forms: list[Function] = [job.result(), *self._uncompiled()]
        best = [float("inf")] * len(forms)
        for _ in range(4):  # alternating; what is slow once only does not count
            for i, form in enumerate(forms):
                started = time.perf_counter()
                form(module, *tensors)
                best[i] = min(best[i], time.perf_counter() - started)
        logger.info("%s: compiled and uncompiled took %s ms", self.function, [round(s * 1e3, 3) for s in best])
        return forms[best.index(min(best))]


def _own_code(function: Function) -> Function:
    """Return the same function with a code object of its own: `torch.compile` keeps, and limits, forms by code."""

    def part_of_step(module: nn.Module | None, *tensors: Tensor | None) -> Tensor:
        return function(module, *tensors)

    code = part_of_step.__code__.replace(co_name=getattr(function, "__name__", "part_of_step"))
    return FunctionType(code, part_of_step.__globals__, code.co_name, None, part_of_step.__closure__)


def _keep_guards(guards: Sequence[Any]) -> list[bool]:
    """Return which guards compiled code keeps: all but the one of PyTorch's global state.

    That state holds the number of CPU threads, which "auto" and applications change, and which no form depends on.
    Gradients, which it holds too, are off wherever a part runs.
    """
    return [guard.guard_type != "GLOBAL_STATE" for guard in guards]


def _example(tensor: Tensor | None, sizes: dict[int, Dynamic]) -> Tensor | None:
    """Return zeros like a tensor, of the example sizes in its dynamic dimensions, which are marked."""
    if tensor is None:
        return None
    shape = [sizes[i].example if i in sizes else n for i, n in enumerate(tensor.shape)]
    if sizes:
        example = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    else:
        example = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).zero_()
    for i, size in sizes.items():
        torch._dynamo.mark_dynamic(example, i, min=size.least, max=size.most)
    return example


def _pairs(tensors: Sequence[Tensor | None], dynamic: DynamicSizes) -> list[tuple[Tensor, dict[int, Dynamic]]]:
    return [(tensor, sizes) for tensor, sizes in zip(tensors, dynamic, strict=True) if tensor is not None]


def _static_shape(tensor: Tensor | None, sizes: dict[int, Dynamic]) -> tuple[Any, ...] | None:
    """Return what a form depends on: dtype, sizes that are not dynamic, and strides unless memory is in order."""
    if tensor is None:
        return None
    shape = tuple(None if i in sizes else n for i, n in enumerate(tensor.shape))
    return (tensor.dtype, shape, None if tensor.is_contiguous() else tensor.stride())


def _has_cpp_compiler() -> bool:
    """Return whether Inductor's CPU backend can build; warn once if not."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if any(candidate and shutil.which(candidate) for candidate in candidates):
        return True
    warnings.warn(
        "no C++ compiler found, so steps run uncompiled, several times slower. Install one (Debian, Ubuntu: "
        "apt-get install g++; macOS: xcode-select --install) or set CXX; compile=False silences this.",
        stacklevel=2,
    )
    return False
