"""Compiled parts: their results, their recompilation, and the mode "auto"."""

import contextlib
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_same, random_tensor, randomized, small_config, wait_until
from torch import nn

from qwen3fast import Generator, SamplingParams
from qwen3fast.engine.compile import FORMS_KEEP_THREADS, StepCompiler, only_compiled
from qwen3fast.engine.dynamic_sizes import Dynamic
from qwen3fast.kernels import cpu
from qwen3fast.kernels.compiling import is_compiling
from qwen3fast.kernels.linear import Linear

CPU = torch.device("cpu")
ROWS = {0: (Dynamic(11),)}


def scaled(module, x, y):
    return module(x) * y + 1


def scaled_without_call(module, x, y):
    """Return the same without a call of the module: a trace in any thread would record that."""
    return F.linear(x, module.weight, module.bias) * y + 1


def layers(seed=0):
    torch.manual_seed(seed)
    return [nn.Linear(6, 6).requires_grad_(False) for _ in range(3)]


def test_one_compilation_serves_modules_with_other_weights():
    compiler = StepCompiler(True, CPU)
    part = compiler.part(scaled)
    x, y = random_tensor(4, 6), random_tensor(4, 6, seed=1)
    for module in layers():
        assert_near(part(module, x, y), scaled(module, x, y))
    assert compiler.compilations == 1 and compiler.seconds > 0


def test_weights_changed_in_place_are_used():
    part = StepCompiler(True, CPU).part(scaled)
    module, x, y = layers()[0], random_tensor(4, 6), random_tensor(4, 6, seed=1)
    before = part(module, x, y)
    module.weight += 1
    assert not torch.equal(part(module, x, y), before)
    assert_near(part(module, x, y), scaled(module, x, y))


def test_static_shapes_compile_again_and_dynamic_ones_do_not():
    compiler = StepCompiler(True, CPU)
    static, dynamic = compiler.part(scaled), compiler.part(scaled, dynamic=(ROWS, ROWS))
    [module, *_] = layers()
    for rows in (2, 3, 11, 40):
        x, y = random_tensor(rows, 6), random_tensor(rows, 6, seed=1)
        assert_near(static(module, x, y), scaled(module, x, y))
        assert_near(dynamic(module, x, y), scaled(module, x, y))
    assert compiler.compilations == 4 + 1


def test_other_strides_and_a_size_of_one_give_the_right_result():
    part = StepCompiler(True, CPU).part(scaled, dynamic=(ROWS, ROWS))
    [module, *_] = layers()
    for x in (random_tensor(8, 6), random_tensor(6, 8).T, random_tensor(1, 6)):
        y = random_tensor(*x.shape, seed=1)
        assert_near(part(module, x, y), scaled(module, x, y))


def test_sizes_outside_of_the_range_get_forms_of_their_own():
    compiler = StepCompiler(True, CPU)
    part = compiler.part(scaled, dynamic=({0: (Dynamic(11, 5, 30),)},) * 2)
    [module, *_] = layers()
    for rows in (5, 30, 31, 4, 1, 12):
        x, y = random_tensor(rows, 6), random_tensor(rows, 6, seed=1)
        assert_near(part(module, x, y), scaled(module, x, y))
    assert compiler.compilations == 1 + 3  # 5 to 30; 31; 4; 1


def test_each_range_has_one_form():
    compiler, ranges = StepCompiler(True, CPU), (Dynamic(3, 2, 9), Dynamic(11, 10, 40))
    part, [module, *_] = compiler.part(scaled, dynamic=({0: ranges},) * 2), layers()
    for rows in (2, 9, 10, 40, 5):
        x, y = random_tensor(rows, 6), random_tensor(rows, 6, seed=1)
        assert_near(part(module, x, y), scaled(module, x, y))
    assert compiler.compilations == 2


def test_a_part_that_is_not_to_be_compiled_runs_uncompiled():
    compiler, [module, *_], x = StepCompiler(True, CPU), layers(), random_tensor(4, 6)
    part = compiler.part(scaled, is_compiled=False)
    assert part.choose(module, x, x) in (scaled, part._with_operations) and compiler.compilations == 0
    assert_same(part(module, x, x), scaled(module, x, x))


def test_code_that_does_not_serve_the_whole_range_is_refused():
    def folded(_, x):
        return x.sum(0) if x.shape[0] < 20 else x.amax(0)

    part = StepCompiler(True, CPU).part(folded, dynamic=({0: (Dynamic(11, 5, 30),)},))
    with pytest.raises(Exception, match="Constraints violated"):
        part(None, random_tensor(7, 6))


@pytest.mark.skipif(FORMS_KEEP_THREADS, reason="this torch.compile compiles again for other numbers of threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_form_depends_on_the_number_of_threads(threads):
    part, [module, *_] = StepCompiler(True, CPU).part(scaled), layers()
    x, before = random_tensor(4, 6), torch.get_num_threads()
    part(module, x, x)
    try:
        torch.set_num_threads(threads)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_near(part(module, x, x), scaled(module, x, x))
    finally:
        torch.set_num_threads(before)


def test_compiling_writes_nothing_into_the_arguments():
    def store(_, buffer, value):
        buffer += value
        return value * 2

    part, buffer, value = StepCompiler(True, CPU).part(store), torch.zeros(3), torch.ones(3)
    assert part(None, buffer, value).tolist() == [2, 2, 2]
    assert buffer.tolist() == [1, 1, 1]


def test_dimensions_with_equal_sizes_in_one_call_are_not_taken_for_one():
    def outer(_, x, y):
        return x[:, None] * y[None]

    part = StepCompiler(True, CPU).part(outer, dynamic=({0: (Dynamic(11),)}, {0: (Dynamic(13),)}))
    for rows, columns in ((7, 7), (7, 9), (9, 7)):
        x, y = random_tensor(rows), random_tensor(columns, seed=1)
        assert_near(part(None, x, y), outer(None, x, y))


def test_absent_tensors_and_writing_into_arguments():
    def store(_, buffer, nothing, value):
        assert nothing is None
        buffer[1:3] = value
        return value * 2

    part = StepCompiler(True, CPU).part(store)
    buffer, value = torch.zeros(4), torch.tensor([1.0, 2.0])
    assert part(None, buffer, None, value).tolist() == [2, 4]
    assert buffer.tolist() == [0, 1, 2, 0]


def auto_compiler():
    compiler = StepCompiler("auto", CPU)
    compiler.auto_from_s = 0
    return compiler


def test_auto_runs_uncompiled_until_the_compiled_form_is_there():
    compiler = auto_compiler()
    go = threading.Event()
    compiler.thread.submit(go.wait)
    calls = []

    def slow_unless_compiled(module, x):
        if not is_compiling():
            calls.append(x)
            time.sleep(0.02)
        return module(x)

    part, [module, *_], x = compiler.part(slow_unless_compiled), layers(), random_tensor(4, 6)
    assert_same(part(module, x), module(x))
    assert_same(part(module, x), module(x))
    assert len(calls) == 2 and (compiler.compilations, compiler.waiting) == (0, 1)
    go.set()
    wait_until(lambda: compiler.compilations == 1 and compiler.waiting == 0)
    wait_until(lambda: part.choose(module, x) not in part._uncompiled())
    num_calls = len(calls)
    assert_near(part(module, x), module(x))
    assert len(calls) == num_calls


@pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
def test_auto_uses_operations_before_anything_is_compiled(monkeypatch):
    compiler = auto_compiler()
    monkeypatch.setattr(compiler, "auto_from_s", float("inf"))
    seen = []

    def product(module, x):
        seen.append(cpu.can_linear(x, module.weight))
        return module(x)

    linear, x = Linear(32, 48, bias=False).bfloat16(), random_tensor(1, 32).bfloat16()
    assert_same(compiler.part(product)(linear, x), torch.ops.qwen3fast.linear(x, linear.weight))
    with monkeypatch.context() as without:
        without.setattr(cpu, "_is_ready", False)  # not built yet
        assert_same(compiler.part(product)(linear, x), F.linear(x, linear.weight))
    assert_near(StepCompiler(False, CPU).part(product)(linear, x), F.linear(x, linear.weight), torch.bfloat16)
    assert seen == [True, False, False]


def test_auto_keeps_what_is_faster():
    compiler = auto_compiler()

    def slow_if_compiled(_, x):
        if is_compiling():
            for _ in range(60):
                x = (x @ x).sin()
        return x.view_as(x)

    part, x = compiler.part(slow_if_compiled), random_tensor(300, 300)
    part(None, x)
    wait_until(lambda: compiler.compilations == 1)
    wait_until(lambda: part(None, x) is not None and part._choices)
    assert part.choose(None, x) in part._uncompiled()


def test_auto_goes_on_where_compiling_fails():
    compiler = auto_compiler()

    def never_compiles(_, x):
        return x + 1 if x.sum() < 5 else x  # asks for data

    part = compiler.part(never_compiles)
    part(None, torch.zeros(2))
    with pytest.warns(UserWarning, match="never_compiles.* could not be compiled and runs uncompiled, slower: "):
        wait_until(lambda: part(None, torch.zeros(2)).tolist() != [1, 1] or part._choices)
    assert part(None, torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.filterwarnings("error:.*could not be compiled")  # says why
def test_auto_gives_the_tokens_of_the_other_modes():
    model = randomized(small_config(num_hidden_layers=1, eos_token_ids=()), seed=4)
    params = SamplingParams(temperature=0, max_tokens=100)
    with Generator(model, max_seq_len=128, compile=False) as generator:
        expected = generator.generate([1, 2, 3], params).token_ids
    # Without reuse: a prompt that is there already would not be computed, nor its code compiled.
    with Generator(model, max_seq_len=128, compile="auto", prefix_reuse=False) as generator:
        generator.debug.engine.compiler.auto_from_s = 0
        for _ in range(1000):  # changes over while it runs
            assert generator.generate([1, 2, 3], params).token_ids == expected
            if generator.stats.compilations >= 3:
                break
            time.sleep(0.05)
        assert generator.generate([1, 2, 3], params).token_ids == expected
        # Blocks of a prompt and of a step, logits; and the sampler if a step came before the one in C++ was loaded.
        assert generator.stats.compilations in (3, 4)


def test_warmup_ends_auto():
    model = randomized(small_config(), seed=4)
    with Generator(model, max_seq_len=128, compile="auto") as generator:
        generator.warmup()
        compilations = generator.stats.compilations
        assert compilations >= 3
        generator.generate([1, 2, 3], SamplingParams(max_tokens=9))
        assert generator.stats.compilations == compilations


def test_auto_leaves_short_runs_alone():
    compiler = StepCompiler("auto", CPU)
    part = compiler.part(scaled)
    part(layers()[0], random_tensor(4, 6), random_tensor(4, 6))
    assert not part._jobs and compiler.compilations == 0


@contextlib.contextmanager
def tracing_in_another_thread():
    """Trace a function in another thread until the block ends, as torch.compile does while it compiles."""
    has_begun, may_end = threading.Event(), threading.Event()

    def traced(x):
        has_begun.set()
        assert may_end.wait(60)
        return x

    with ThreadPoolExecutor(1) as pool:
        trace = pool.submit(torch.fx.symbolic_trace, traced)
        assert has_begun.wait(60)
        try:
            yield
        finally:
            may_end.set()
        trace.result()


@pytest.mark.parametrize("mode", [True, "auto"])
def test_compiled_code_runs_while_another_thread_compiles(mode):
    """Before PyTorch 2.14, torch.compile takes the call for one inside of that trace, and refuses it by default."""
    compiler = StepCompiler(mode, CPU)
    compiler.auto_from_s = 0
    part, [module, *_], x = compiler.part(scaled_without_call), layers(), random_tensor(4, 6)
    part(module, x, x)
    wait_until(lambda: compiler.compilations == 1)
    results = [part(module, x, x)]
    with tracing_in_another_thread():
        caller = threading.Thread(target=lambda: results.append(part(module, x, x)))  # has called nothing compiled yet
        caller.start()
        caller.join(60)
        results.append(part(module, x, x))
    compiler.close()
    assert len(results) == 3
    for result in results:
        assert_near(result, scaled(module, x, x))


def test_only_compiled_refuses_what_a_trace_would_leave_uncompiled():
    part, [module, *_], x = StepCompiler(True, CPU).part(scaled_without_call), layers(), random_tensor(4, 6)
    results = [part(module, x, x)]

    def traced(y):
        results.append(part(module, x, x))  # uncompiled
        with only_compiled(), pytest.raises(RuntimeError, match="symbolically trace"):
            part(module, x, x)  # its kernels may not be captured
        results.append(part(module, x, x))
        return y

    torch.fx.symbolic_trace(traced)
    assert len(results) == 3
    for result in results:
        assert_near(result, scaled(module, x, x))


@pytest.mark.skipif(FORMS_KEEP_THREADS, reason="this torch.compile compiles again for other numbers of threads")
def test_auto_leaves_a_core_to_long_work():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    compiler = StepCompiler("auto", CPU)
    try:
        for since_s, expected in ((float("-inf"), 2), (float("inf"), 3), (float("-inf"), 2)):
            compiler._at_work_since_s = since_s
            compiler.share_processor()
            assert torch.get_num_threads() == expected
        compiler.close()
        assert torch.get_num_threads() == 3
        compiler.share_processor()  # nothing is at work any more
        assert torch.get_num_threads() == 3
    finally:
        compiler.close()
        torch.set_num_threads(threads)


@pytest.mark.skipif(FORMS_KEEP_THREADS, reason="this torch.compile compiles again for other numbers of threads")
def test_threads_that_an_engine_leaves_out_are_not_missed_by_others():
    """Another engine may begin meanwhile, in a thread that gets the number which any thread has set last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    compiler = StepCompiler(True, CPU)

    def left_out() -> int:
        compiler.share_processor(2)
        return torch.get_num_threads()

    try:
        for function, expected in ((left_out, 1), (torch.get_num_threads, 3)):
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(function).result() == expected
        assert torch.get_num_threads() == 3
    finally:
        compiler.close()
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("rows", "tunes_one_row", "is_tuned"), [(1, True, True), (2, True, False), (11, True, False), (1, False, False)]
)
def test_kernels_are_tuned_for_one_row_of_a_part_that_asks_for_it(rows, tunes_one_row, is_tuned, monkeypatch):
    """On CUDA: dozens of variants of each kernel take long to compile, and make only one-row products faster."""
    given = {}

    def compile_nothing(function, **keywords):
        given.update(keywords["options"])
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    compiler = StepCompiler(True, CPU)
    compiler._is_cuda = True
    part = compiler.part(lambda module, x: x + 1, dynamic=({0: (Dynamic(11, 3),)},), tunes_one_row=tunes_one_row)
    part(None, torch.zeros(rows, 1, 6))
    assert given.get("coordinate_descent_tuning", False) == is_tuned
    assert ("triton.enable_pdl" in given) == ("triton.enable_pdl" in torch._inductor.list_options())  # not in 2.9


def test_without_memory_to_compile_a_form_it_alone_runs_uncompiled(monkeypatch):
    """Examples of a layer's cache may not fit beside the cache."""
    compile, failing = StepCompiler.compile, [torch.OutOfMemoryError("in code"), InductorError()]

    def compile_or_fail(self, *arguments):
        if failing:
            raise failing.pop(0)
        return compile(self, *arguments)

    monkeypatch.setattr(StepCompiler, "compile", compile_or_fail)
    compiler, [module, *_] = StepCompiler(True, CPU), layers()
    part = compiler.part(scaled)
    for rows in (2, 3, 4):
        x = random_tensor(rows, 6)
        with pytest.warns(UserWarning, match="uncompiled, slower: in") if rows < 4 else contextlib.nullcontext():
            assert_near(part(module, x, x), scaled(module, x, x))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_near(part(module, x, x), scaled(module, x, x))
    assert compiler.compilations == 1
    failing.append(ValueError("another"))
    with pytest.raises(ValueError, match="another"):
        part(module, random_tensor(5, 6), random_tensor(5, 6))


class InductorError(Exception):
    """An error as of Inductor's, around its cause."""

    def __init__(self):
        super().__init__("in the compiler")
        self.inner_exception = torch.OutOfMemoryError("in the compiler")


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', got 'fast'"):
        StepCompiler("fast", CPU)


TRACED_BY_A_THREAD = """
import threading, torch
from qwen3fast.engine.compile import StepCompiler
StepCompiler(True, torch.device("cpu"))
thread = threading.Thread(target=lambda: torch.compile(torch.sin, backend="eager")(torch.ones(2)))
thread.start()
thread.join()
others = [bytearray(8 * n) for n in range(1000)]
torch.ones(2, requires_grad=True).sum().backward()
torch.compile(torch.cos, backend="eager")(torch.ones(2))
"""


def test_the_thread_that_compiles_may_end():
    done = subprocess.run([sys.executable, "-c", TRACED_BY_A_THREAD], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
