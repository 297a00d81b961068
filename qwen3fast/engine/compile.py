"""Compilation of the parts of a step: what is compiled, when, how often, and what happens without a C++ compiler.

The unit is one transformer block: compiled once, it serves all layers, because weights are inputs of the compiled code.
Operations are recorded by `make_fx` and compiled by Inductor, the two lower halves of `torch.compile`. Its upper half,
Dynamo, reads Python bytecode to find out what may change from call to call; here that is known. Leaving it out saves
seconds at the start and, at each call, the search for the right compiled form.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwen3fast.engine.record import Recording, record
from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import operations

logger = logging.getLogger(__name__)

# For each tensor argument: the dimensions whose size varies at run time, each with the size to compile with. Equal
# sizes mean the same number.
Dynamic = Sequence[dict[int, int]]
Function = Callable[..., Tensor]
CompileMode = bool | Literal["auto"]

# "auto" leaves the processor to the first token, and short runs, alone for so long.
AUTO_DELAY_S = 1.0
# What takes longer than this has found no compiled code of earlier processes: a C++ compiler is at work.
LONG_WORK_S = 2.0


class StepCompiler:
    """Compiles functions with Inductor and counts what it did.

    mode "auto" compiles in a thread of its own, which builds the C++ operations with its first work. Until a part is
    ready it runs as it is, with the operations once they are built, and if the compiled form turns out slower, it goes
    on so. (`decode_layers` is not tried: it serves once the operations are built.) On CUDA devices "auto" is True:
    graphs can only be captured from compiled parts.

    Attributes:
        enabled: False if compilation was not asked for or cannot work here; parts then run as they are.
        compilations: graphs compiled so far through this object.
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
        self._at_work_since_s = float("inf")  # the thread; "inf" while it has nothing to do
        self._threads = torch.get_num_threads()

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

    def _compile_at_work(self, *arguments: Any) -> CompiledFunction:
        self._at_work_since_s = time.perf_counter()
        try:
            return self.compile(*arguments)
        finally:
            self._at_work_since_s = float("inf")

    def submit(self, *arguments: Any) -> Future[CompiledFunction]:
        """`compile` in the thread of "auto"."""
        assert self.thread is not None, "there is a thread in mode 'auto' only"
        return self.thread.submit(self._compile_at_work, *arguments)

    def part(self, function: Function, dynamic: Dynamic = ()) -> Part:
        """The part of a step that a function of a module and of tensors computes."""
        return Part(function, self, dynamic)

    @torch.no_grad()
    def compile(
        self, function: Function, module: nn.Module | None, tensors: Sequence[Tensor | None], dynamic: Dynamic
    ) -> CompiledFunction:
        """Compile `function(module, *tensors)`, which gives one tensor.

        Raises: whatever recording or Inductor raises; nothing is kept then.
        """
        started = time.perf_counter()
        from torch._inductor import standalone_compile  # slow to import

        recording = record(function, module, tensors, dynamic)
        options: dict[str, Any] = {
            "triton.cudagraphs": False,  # captured by us as a whole step, not by Inductor part by part
            "size_asserts": False,  # sizes are what compiled code is chosen by
            "alignment_asserts": False,
        }
        if cpu.is_loaded():  # built for this very processor, so Inductor need not try what the compiler can do
            options["cpp.vec_isa_ok"] = True
        code = standalone_compile(recording.graph, [*recording.inputs], options={"config_patches": options})
        self.compilations += 1
        self.seconds += time.perf_counter() - started
        return CompiledFunction(code, recording)

    def end_auto(self) -> None:
        """From now on, what is not compiled yet is compiled when it is needed."""
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


class CompiledFunction:
    """Compiled code, called like the function it came from."""

    def __init__(self, code: Callable[..., Sequence[Tensor]], recording: Recording) -> None:
        self._code, self._recording = code, recording
        self._tensors = recording.tensors
        self._weights: dict[nn.Module | None, list[Tensor]] = {}
        self.serves = recording.serves

    def __call__(self, module: nn.Module | None, *tensors: Tensor | None) -> Tensor:
        """The function's result."""
        weights = self._weights.get(module)
        if weights is None:
            every = [] if module is None else list(module.parameters())
            weights = self._weights[module] = [every[i] for i in self._recording.weights]
        return self._code(*weights, *[tensors[i] for i in self._tensors])[0]


class Part:
    """A function of a module and of tensors, compiled once for each combination of (static) shapes that it meets.

    Modules whose parameters have the same names and shapes must be built alike, as they share a compiled form; they may
    hold different weights, which must stay where they are.
    A call may be repeated without effect: in "auto" mode, all forms are tried on the first call that could use each.
    """

    def __init__(self, function: Function, compiler: StepCompiler, dynamic: Dynamic) -> None:
        self.function, self.compiler, self.dynamic = function, compiler, dynamic
        self._kinds: dict[nn.Module | None, int] = {}  # a number for all modules that are built alike
        self._parameters: dict[tuple[Any, ...], int] = {}  # the same number by names and shapes
        self._forms: dict[tuple[Any, ...], Function] = {}  # by static shapes
        self._choices: dict[tuple[Any, ...], Function] = {}  # by all shapes
        self._jobs: dict[tuple[Any, ...], Future[CompiledFunction]] = {}

    def __call__(self, module: nn.Module | None, *tensors: Tensor | None) -> Tensor:
        """The function's result. Each argument must be a tensor in all calls, or None in all calls."""
        return self.choose(module, *tensors)(module, *tensors)

    def choose(self, module: nn.Module | None, *tensors: Tensor | None) -> Function:
        """What to call for tensors of these shapes: looked up once, it may run any number of modules."""
        if not self.compiler.enabled:
            return self.function
        kind = self.kind(module)
        shapes = (kind, *(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors))
        choice = self._choices.get(shapes)
        if choice is not None:
            return choice
        dynamic = [*self.dynamic, *({} for _ in tensors[len(self.dynamic) :])]
        pairs = [(t, dims) for t, dims in zip(tensors, dynamic, strict=True) if t is not None]
        fixed = ((t.dtype, *(None if i in dims else n for i, n in enumerate(t.shape))) for t, dims in pairs)
        static = (kind, *fixed)
        sizes = {size: t.shape[i] for t, dims in pairs for i, size in dims.items()}
        form = self._form(static, module, tensors, dynamic, sizes)
        if form is None:
            return self._uncompiled()[0]  # this time
        if isinstance(form, CompiledFunction) and not form.serves(sizes):
            # What was assumed of sizes in general does not hold for these: they get code of their own.
            form = self._form(shapes, module, tensors, [{} for _ in tensors], {})
            if form is None:
                return self._uncompiled()[0]
        self._choices[shapes] = form
        return form

    def kind(self, module: nn.Module | None) -> int:
        """A number that all modules have in common which share compiled forms."""
        kind = self._kinds.get(module)
        if kind is None:
            named = [] if module is None else module.named_parameters()
            parameters = tuple((name, p.shape, p.dtype) for name, p in named)
            kind = self._kinds[module] = self._parameters.setdefault(parameters, len(self._parameters))
        return kind

    def _form(
        self,
        key: tuple[Any, ...],
        module: nn.Module | None,
        tensors: Sequence[Tensor | None],
        dynamic: Dynamic,
        sizes: dict[int, int],
    ) -> Function | None:
        """The form for these shapes, compiled if there is none yet; None while a thread is compiling it."""
        if key not in self._forms:
            arguments = (self.function, module, tensors, dynamic)
            if self.compiler.thread is None:
                self._forms[key] = self.compiler.compile(*arguments)
            elif time.perf_counter() < self.compiler.auto_from_s:
                pass
            elif key not in self._jobs:
                self._jobs[key] = self.compiler.submit(*arguments)
            elif self._jobs[key].done():
                self._forms[key] = self._faster(self._jobs.pop(key), module, tensors, sizes)
        return self._forms.get(key)

    def _uncompiled(self) -> list[Function]:
        """The function with C++ operations, where there are any, and as it is."""
        return [self._with_operations, self.function] if cpu.is_loaded() else [self.function]

    def _with_operations(self, *arguments: Any) -> Tensor:
        with operations():
            return self.function(*arguments)

    def _faster(
        self,
        job: Future[CompiledFunction],
        module: nn.Module | None,
        tensors: Sequence[Tensor | None],
        sizes: dict[int, int],
    ) -> Function:
        """The compiled form, or the function as it is if compiling failed or did not pay."""
        error = job.exception()
        if error is not None:
            warnings.warn(f"{self.function} could not be compiled and runs as it is, slower: {error}", stacklevel=2)
            return self._uncompiled()[0]
        compiled = job.result()
        if not compiled.serves(sizes):  # it must not be run on these tensors, so it cannot be tried
            return compiled
        forms: list[Function] = [compiled, *self._uncompiled()]
        best = [float("inf")] * len(forms)
        for _ in range(4):  # alternating; what is slow once only does not count
            for i, form in enumerate(forms):
                started = time.perf_counter()
                form(module, *tensors)
                best[i] = min(best[i], time.perf_counter() - started)
        logger.info("%s: compiled and uncompiled took %s ms", self.function, [round(s * 1e3, 3) for s in best])
        return forms[best.index(min(best))]


def _has_cpp_compiler() -> bool:
    """Whether Inductor's CPU backend can build; warns once if not."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++", "cl"]
    if any(candidate and shutil.which(candidate) for candidate in candidates):
        return True
    warnings.warn(
        "no C++ compiler found, so steps run uncompiled, several times slower. Install one (Debian, Ubuntu: "
        "apt-get install g++; macOS: xcode-select --install) or set CXX; compile=False silences this.",
        stacklevel=2,
    )
    return False
