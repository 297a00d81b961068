"""Compilation of the parts of a step by `torch.compile`.

The unit is one transformer block: compiled once, it serves all layers, because the parameters of a module are inputs of
the compiled code. Each combination of static shapes is compiled into a form of its own. Sizes that vary at run time are
marked as dynamic, with their range, and `torch.compile` raises an error if it would specialize on them.

Private parts of PyTorch are used only here, except for two operators in kernels/ (attention.py, grouped.py):
- `torch._dynamo.mark_dynamic`, the documented function for dynamic shapes, which has no public name.
- `torch._dynamo.config.error_on_nested_fx_trace`: while one thread compiles, PyTorch before 2.14 takes calls of
  compiled code in other threads for calls inside a trace and refuses them. Without the error, they run uncompiled for
  that moment.
- `torch._C._ensureCUDADeviceGuardSet`: with a CUDA build of torch 2.11 and no GPU, the first thread that traces owns an
  object that all others use, and takes it along when it ends: then tracing and backward passes crash. So it is called
  before an engine's own thread traces.
- `torch._C._cuda_endAllocateToPool` and `_cuda_releasePool`: if the end of a capture fails, the allocator continues as
  during a capture, which no public function can end.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qwen3fast.engine.dynamic_sizes import Dynamic, Ranges, Sizes, find_ranges, static_shape
from qwen3fast.engine.threads import set_own_threads
from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import operations

logger = logging.getLogger(__name__)

# Held by the thread that compiles or captures a CUDA graph, one per process at a time. PyTorch's allocator supports a
# single capture, and code that runs while another thread compiles is uncompiled, which must not be captured.
exclusive = threading.RLock()
_thread = threading.local()
# In earlier versions, torch.compile compiles again for another number of threads, which no option prevents.
FORMS_KEEP_THREADS = torch.__version__ < "2.10"  # TorchVersion compares by number

Function = Callable[..., Any]
CompileMode = bool | Literal["auto"]

# "auto" starts to compile after this time: the first token, and short runs, do not share the processor.
AUTO_DELAY_S = 1.0
# Compiling that takes longer did not hit Inductor's cache on disk: a C++ compiler is running.
LONG_WORK_S = 2.0

# Read when a step is compiled for a CUDA device; switches to measure the worth of each.
# coordinate_descent_tuning: products of one row become fused reductions. It tries dozens of variants of each kernel, so
# only parts that ask for it have it, and only with one row. triton.enable_pdl: a kernel is launched while the previous
# one still runs (programmatic dependent launch, compute capability 9.0 and newer).
CUDA_OPTIONS: dict[str, bool] = {"coordinate_descent_tuning": True, "triton.enable_pdl": True}


class StepCompiler:
    """A compiler of parts of steps, which counts compilations.

    The mode "auto" compiles in a thread of its own, which first builds the C++ operations, unless they are there: most
    models need no more.
    Until a form is ready, the part runs uncompiled, with C++ operations once they are built. It stays uncompiled if the
    compiled form is slower. On CUDA devices "auto" means True: graphs are captured from compiled parts.

    Attributes:
        enabled: False if compilation is switched off or cannot work here; parts then run uncompiled.
        uses_operations: False if compilation is switched off, or neither a compiler nor C++ operations are available.
        compilations: number of forms compiled so far.
        seconds: time spent compiling them.
        waiting: number of forms that the thread of "auto" has still to compile; building the operations counts as one.
        quiet: held by each step, and by the thread of "auto" while it measures.
        when_loaded: what the thread of "auto" does behind building the C++ operations; None for nothing.
    """

    def __init__(self, mode: CompileMode, device: torch.device) -> None:
        """Raises: ValueError for a mode other than True, False and "auto"."""
        if mode not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {mode!r}")
        self.mode = mode
        if mode and device.type == "cpu" and torch.version.cuda and "2.10" <= torch.__version__ < "2.13":
            torch._C._ensureCUDADeviceGuardSet()
        can_compile = device.type != "cpu" or _has_cpp_compiler()
        self.enabled, self.lacks_compiler = bool(mode) and can_compile, bool(mode) and not can_compile
        self.thread: ThreadPoolExecutor | None = None
        self.auto_from_s = time.perf_counter() + AUTO_DELAY_S
        if self.enabled and mode == "auto" and device.type == "cpu":
            cpu.load(may_build=False)  # a wheel's, or one that was built before: full speed from the first token on
            self.thread = ThreadPoolExecutor(1, "qwen3fast-compile")
        elif mode and device.type == "cpu":
            cpu.load()
        self.quiet = threading.RLock()
        self.when_loaded: Callable[[], None] | None = None
        self._has_begun = False  # the thread
        self._loading: Future[Any] | None = None
        self.uses_operations = self.enabled or (bool(mode) and cpu.is_loaded())
        self.compilations = 0
        self.seconds = 0.0
        self._is_cuda = device.type == "cuda"
        self.waiting = 0
        self._at_work_since_s = float("inf")  # the thread; "inf" while it has nothing to do
        self._threads, self._spared = torch.get_num_threads(), 0

    def share_processor(self, spared: int = 0) -> None:
        """Leave one core to the thread of "auto" while it works for long. Call this before each step.

        With one thread per core, each of a step's many short products would wait for the compiler to yield a core.
        spared: threads to leave out at least, for other programs.
        """
        if FORMS_KEEP_THREADS:
            return
        if self.thread is not None and time.perf_counter() - self._at_work_since_s > LONG_WORK_S:
            spared = max(spared, 1)
        if spared != self._spared:
            if not self._spared:
                self._threads = torch.get_num_threads()
            self._spared = spared
            set_own_threads(max(1, self._threads - spared), others=self._threads)

    def is_ready(self) -> bool:
        """Return whether the thread of "auto" may compile: from auto_from_s on, after building the C++ operations.

        With these, many parts need not be compiled. The first call at or after auto_from_s begins to build.
        """
        if self.thread is None or time.perf_counter() < self.auto_from_s:
            return False
        if not self._has_begun:
            self._has_begun = True
            if not cpu.is_loaded():
                self._loading = self._submit(cpu.load, max(1, self._threads - 1))
            if self.when_loaded is not None:
                self.thread.submit(self.when_loaded)
        return self._loading is None or self._loading.done()

    def submit(self, *arguments: Any) -> Future[Function]:
        """Run `compile` in the thread of "auto"."""
        return self._submit(self.compile, *arguments)

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        assert self.thread is not None, "there is a thread in mode 'auto' only"
        self.waiting += 1

        def run() -> Any:
            self._at_work_since_s = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                self._at_work_since_s = float("inf")
                self.waiting -= 1

        return self.thread.submit(run)

    def part(
        self, function: Function, dynamic: Sequence[Sizes] = (), is_compiled: bool = True, tunes_one_row: bool = False
    ) -> StepPart:
        """Return a part of a step, given as a function of a module and tensors.

        is_compiled: False for a part that runs uncompiled in every mode. tunes_one_row: whether its form of one row is
        worth the time of coordinate_descent_tuning on CUDA.
        """
        return StepPart(function, self, dynamic, is_compiled, tunes_one_row)

    @torch.no_grad()
    def compile(
        self,
        function: Function,
        module: nn.Module | None,
        tensors: Sequence[Tensor | None],
        ranges: Ranges,
        is_tuned: bool = False,
    ) -> Function:
        """Compile `function(module, *tensors)` for tensors like these, and for modules built like this one.

        It is compiled by running it once on zeros, which discards its writes to arguments.
        is_tuned: with coordinate_descent_tuning, on CUDA.
        Raises: exceptions of `torch.compile`; nothing is kept then.
        """
        started = time.perf_counter()
        options = self._options(is_tuned)
        compiled = torch.compile(_own_code(function), fullgraph=True, dynamic=False, options=options)
        # Inductor's cache ignores ranges: it would return code with a guard of another range, which torch.compile then
        # refuses (ConstraintViolationError).
        settings: Any = torch.compiler.config
        with exclusive, settings.patch(cache_key_tag=f"{settings.cache_key_tag} qwen3fast {ranges}"):
            compiled(module, *[_example(tensor, sizes) for tensor, sizes in zip(tensors, ranges, strict=True)])
            if self._is_cuda:  # one of the examples is as large as a layer's cache; graphs have memory of their own
                torch.cuda.empty_cache()
        self.compilations += 1
        self.seconds += time.perf_counter() - started
        return compiled

    def _options(self, is_tuned: bool) -> dict[str, Any]:
        options: dict[str, Any] = {
            "triton.cudagraphs": False,  # a whole step is captured by engine/cuda_graph.py, not part by part
            "size_asserts": False,  # forms are chosen by sizes
            "alignment_asserts": False,
            "guard_filter_fn": _keep_guards,
        }
        if self._is_cuda:
            known = torch._inductor.list_options()  # named by torch.compile's documentation
            options |= {name: value for name, value in CUDA_OPTIONS.items() if name in known}
            if not is_tuned:
                options.pop("coordinate_descent_tuning", None)
        elif cpu.is_loaded():  # built for this processor: Inductor need not try what the compiler can do
            options["cpp.vec_isa_ok"] = True
        return options

    def end_auto(self) -> None:
        """End the mode "auto": from now on, compile parts at their first call."""
        if self.thread is not None:
            self.close(wait=True)
            cpu.load()  # as the thread does with its first work, if it had any

    def close(self, wait: bool = False) -> None:
        """End the thread of "auto". wait: for its current work."""
        if self.thread is not None:
            self.thread.shutdown(wait=wait, cancel_futures=True)
            self.thread, self.waiting = None, 0
        self.share_processor()


class StepPart:
    """A function of a module and tensors, compiled once per combination of static shapes.

    Modules whose parameters have the same names and shapes share a compiled form: they may differ only in their
    weights.
    On CPUs, repeating a call must have no effect: the mode "auto" tries a new form on the first call that could use it.
    """

    def __init__(
        self,
        function: Function,
        compiler: StepCompiler,
        dynamic: Sequence[Sizes] = (),
        is_compiled: bool = True,
        tunes_one_row: bool = False,
    ) -> None:
        self.function, self.compiler, self.dynamic = function, compiler, dynamic
        self._tunes_one_row = tunes_one_row
        self._is_compiled = is_compiled and compiler.enabled
        self._lacks_compiler = is_compiled and compiler.lacks_compiler
        self._kinds: dict[nn.Module | None, int] = {}  # a number per kind of module
        self._parameters: dict[tuple[Any, ...], int] = {}  # the same number by names and shapes
        self._forms: dict[tuple[Any, ...], Function] = {}  # by static shapes
        self._choices: dict[tuple[Any, ...], Function] = {}  # by all shapes
        self._jobs: dict[tuple[Any, ...], Future[Function]] = {}

    def __call__(self, module: nn.Module | None, *tensors: Tensor | None) -> Any:
        """Return the function's result. Each argument must be a tensor in all calls, or None in all calls."""
        return self.choose(module, *tensors)(module, *tensors)

    def choose(self, module: nn.Module | None, *tensors: Tensor | None) -> Function:
        """Return the form for tensors of these shapes: looked up once, it can run any number of modules."""
        if not self._is_compiled:
            if self._lacks_compiler:
                _warn_of_missing_compiler()
            self.compiler.is_ready()
            return self._uncompiled()[0] if self.compiler.uses_operations else self.function
        kind = self.kind(module)
        shapes = (kind, *(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors))
        choice = self._choices.get(shapes)
        if choice is None:
            ranges = find_ranges(tensors, [*self.dynamic, *({} for _ in tensors[len(self.dynamic) :])])
            key = (kind, *map(static_shape, tensors, ranges))
            form = self._form(key, module, tensors, ranges)
            if form is None:
                return self._uncompiled()[0]  # this time
            choice = self._choices[shapes] = form
        _allow_tracing_elsewhere()
        return choice

    def forget(self) -> None:
        """Compile all forms again at their next call: something that is constant in compiled code has changed."""
        for forms in (self._forms, self._choices, self._jobs):
            forms.clear()

    def kind(self, module: nn.Module | None) -> int:
        """Return a number that is equal for modules that share compiled forms."""
        kind = self._kinds.get(module)
        if kind is None:
            named = [] if module is None else module.named_parameters()
            parameters = tuple((name, p.shape, p.dtype) for name, p in named)
            kind = self._kinds[module] = self._parameters.setdefault(parameters, len(self._parameters))
        return kind

    def _form(
        self, key: tuple[Any, ...], module: nn.Module | None, tensors: Sequence[Tensor | None], ranges: Ranges
    ) -> Function | None:
        """Return the form for these shapes, compiled if it is new; None while a thread compiles it.

        Running out of the device's memory costs this form, which then runs uncompiled.
        """
        if key not in self._forms:
            is_tuned = self._tunes_one_row and tensors[0] is not None and len(tensors[0]) == 1
            arguments = (self.function, module, tensors, ranges, is_tuned)
            if self.compiler.thread is None:
                try:
                    self._forms[key] = self.compiler.compile(*arguments)
                except Exception as err:
                    if not isinstance(getattr(err, "inner_exception", err), torch.OutOfMemoryError):
                        raise  # PyTorch's own error has the one that it is about inside
                    self._forms[key] = self._remain_uncompiled(err)
            elif not self.compiler.is_ready():
                pass
            elif key not in self._jobs:
                self._jobs[key] = self.compiler.submit(*arguments)
            elif self._jobs[key].done():
                self._forms[key] = self._faster(self._jobs.pop(key), module, tensors)
        return self._forms.get(key)

    def _uncompiled(self) -> list[Function]:
        """Return the function with C++ operations, where available, and without."""
        return [self._with_operations, self.function] if cpu.is_loaded() else [self.function]

    def _remain_uncompiled(self, error: BaseException) -> Function:
        warnings.warn(f"{self.function} could not be compiled and runs uncompiled, slower: {error}", stacklevel=2)
        return self._uncompiled()[0]

    def _with_operations(self, *arguments: Any) -> Any:
        with operations():
            return self.function(*arguments)

    def _faster(self, job: Future[Function], module: nn.Module | None, tensors: Sequence[Tensor | None]) -> Function:
        """Return the compiled form, or an uncompiled one if compiling failed or the compiled form is slower."""
        error = job.exception()
        if error is not None:
            return self._remain_uncompiled(error)
        forms: list[Function] = [job.result(), *self._uncompiled()]
        best = [float("inf")] * len(forms)
        for _ in range(4):  # alternating; the best time of each counts
            for i, form in enumerate(forms):
                started = time.perf_counter()
                form(module, *tensors)
                best[i] = min(best[i], time.perf_counter() - started)
        logger.info("%s: compiled and uncompiled took %s ms", self.function, [round(s * 1e3, 3) for s in best])
        return forms[best.index(min(best))]


def _allow_tracing_elsewhere() -> None:
    """Let this thread call compiled code while another thread compiles."""
    if not getattr(_thread, "may_call", False):
        _thread.may_call = True
        torch._dynamo.config.error_on_nested_fx_trace = False  # of this thread, in newer versions of PyTorch


@contextlib.contextmanager
def only_compiled() -> Iterator[None]:
    """Make compiled code in the block raise an error instead of running uncompiled, which must not be captured.

    Raises: RuntimeError from such a call, in this thread.
    """
    before = torch._dynamo.config.error_on_nested_fx_trace
    torch._dynamo.config.error_on_nested_fx_trace = True
    try:
        yield
    finally:
        torch._dynamo.config.error_on_nested_fx_trace = before


def _own_code(function: Function) -> Function:
    """Return the same function with a code object of its own: `torch.compile` limits the number of forms per code."""

    def part_of_step(module: nn.Module | None, *tensors: Tensor | None) -> Any:
        return function(module, *tensors)

    code = part_of_step.__code__.replace(co_name=getattr(function, "__name__", "part_of_step"))
    return FunctionType(code, part_of_step.__globals__, code.co_name, None, part_of_step.__closure__)


def _keep_guards(guards: Sequence[Any]) -> list[bool]:
    """Return the guards that compiled code keeps: all except the guard of PyTorch's global state.

    That state includes the number of CPU threads, which "auto" and applications change and no form depends on. It also
    includes gradient mode, which is off wherever a part runs.
    """
    return [guard.guard_type != "GLOBAL_STATE" for guard in guards]


def _example(tensor: Tensor | None, sizes: dict[int, Dynamic]) -> Tensor | None:
    """Return zeros like a tensor, with example sizes in its dynamic dimensions, which are marked."""
    if tensor is None:
        return None
    shape = [sizes[i].example if i in sizes else n for i, n in enumerate(tensor.shape)]
    if sizes:
        example = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    else:
        example = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).zero_()
    for i, size in sizes.items():
        torch._dynamo.mark_dynamic(example, i, min=size.min, max=size.max)
    return example


def end_broken_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """End a failed CUDA graph capture in PyTorch's allocator. pool: of the graph.

    Otherwise, memory that several streams use would never be freed.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it has ended: the capture failed in another way
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
        logger.debug("ended the allocator's part of a broken capture on %s", device)


def _has_cpp_compiler() -> bool:
    """Return whether Inductor's CPU backend has a C++ compiler: it tries this one alone."""
    path = shutil.which(_cpp_compiler())
    return path is not None and (sys.platform == "win32" or _tells_its_version(path))


def _cpp_compiler() -> str:
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


@functools.cache
def _tells_its_version(path: str) -> bool:
    """Return whether a compiler passes Inductor's test."""
    try:
        return subprocess.run([path, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def _warn_of_missing_compiler() -> None:
    warnings.warn(
        f"no C++ compiler found that works (tried {_cpp_compiler()}), so steps run uncompiled, slower, several times "
        "so without the C++ operations that wheels of qwen3fast bring. Install one (Debian, Ubuntu: apt-get install "
        "g++; macOS: xcode-select --install) or set CXX to the path of one; compile=False (generate and chat: "
        "--compile never; serve and batch: --no-compile) silences this.",
        stacklevel=2,
    )
