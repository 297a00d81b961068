"""Fixtures of tests on a GPU: few engines, made once; a limit of time for each test, and one for the folder.

Everything compares with the CPU reference in float32 on models of two layers. Tokens of different devices are held
against the reference's logits, since sums round differently: a token is right if it is the argmax up to rounding.

`GPU_TESTS_ON=cpu` runs the tests' own code on a CPU, where there are no graphs and no kernels to count.
`GPU_TESTS_SLOWER` multiplies the limits: a simulated GPU (tools/simulated_gpu.py) takes longer.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import randomized, small_config

from qwen3fast import Generator
from qwen3fast.bench.measure import check_tokens
from qwen3fast.model import Qwen3

DEVICE = torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))
MAX_SEQ_LEN, SLOTS = 600, 4
MODES = {"eager": (False, False), "compiled": (True, False), "graphs": (True, True)}
# The longest that one test may take, and its fixtures. With nothing compiled before, a one-row block of steps (without
# the fused step) takes most of it: about ten kernels, dozens of variants of each (coordinate_descent_tuning).
_SLOWER = float(os.environ.get("GPU_TESTS_SLOWER", "1"))
TEST_S = 180 * _SLOWER
FOLDER_S = 330 * _SLOWER  # after which the tests that are left are skipped
# Most important first.
ORDER = ("test_steps", "test_tokens", "test_prefill", "test_quantized", "test_adapters_on_gpu", "test_nccl")
FOLDER = Path(__file__).parent
STARTED = pytest.StashKey[float]()  # when the folder's first test began


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and order the tests of this folder; skip them without a GPU."""
    missing = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
    for item in items:
        if item.path.parent == FOLDER:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(missing)
    places = [i for i, item in enumerate(items) if item.path.parent == FOLDER]
    ordered = sorted((items[i] for i in places), key=lambda item: ORDER.index(item.path.stem))
    for i, item in zip(places, ordered, strict=True):
        items[i] = item


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let what takes longer fail."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True, trylast=True)  # pytest's own hooks undo after each test what they did before it
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Make the test's fixtures within the limit; skip it once the folder's time is spent."""
    if time.monotonic() - item.session.stash.setdefault(STARTED, time.monotonic()) > FOLDER_S:
        pytest.skip(f"the tests of this folder have taken {FOLDER_S} s already")
    with time_limit(TEST_S):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run the test within the limit."""
    with time_limit(TEST_S):
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products in float32, not in TensorFloat-32: tokens are compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session")
def model() -> Qwen3:
    """The reference, on the CPU in float32."""
    return randomized(small_config(head_dim=32, hidden_size=64, max_position_embeddings=1024, eos_token_ids=()), seed=3)


@pytest.fixture(scope="session")
def twin(model: Qwen3) -> Qwen3:
    """The same model on the GPU."""
    return copy.deepcopy(model).to(DEVICE)


@pytest.fixture(scope="session")
def cpu_generator(model: Qwen3) -> Iterator[Generator]:
    """The reference's Generator, eager on the CPU."""
    with Generator(model, max_seq_len=MAX_SEQ_LEN, max_batch_size=SLOTS, compile=False) as generator:
        yield generator


@pytest.fixture(scope="session")
def generators(twin: Qwen3) -> Iterator[dict[str, Generator]]:
    """A Generator of each mode on the same weights: made once, compiled when it is first used."""
    sizes = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": SLOTS}
    made = {
        mode: Generator(twin, compile=compile, cuda_graphs=graphs, **sizes) for mode, (compile, graphs) in MODES.items()
    }
    yield made
    for generator in made.values():
        generator.close()


def assert_greedy(model: Qwen3, prompts: list[list[int]], replies: list[list[int]]) -> None:
    """Check that each token is the reference's argmax, or ties with it up to rounding."""
    check = check_tokens(model, prompts, replies)
    assert check.passed, check
    assert check.exact >= 0.97 * check.tokens, check


def prompts() -> list[list[int]]:
    """Return prompts of lengths on both sides of the chunks' and buckets' borders."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=rng).tolist() for n in (1, 31, 33, 127, 130, 255, 300, 520)]


@contextmanager
def nothing_compiles() -> Iterator[None]:
    """Let the block fail if `torch.compile` compiles in any thread, or Triton does (3.6 and newer tell)."""
    compiled: list[str] = []
    knobs: object = None
    if importlib.util.find_spec("triton") is not None:
        import triton

        knobs = getattr(getattr(triton, "knobs", None), "runtime", None)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.MonkeyPatch.context() as patches:
        if hasattr(knobs, "jit_cache_hook"):
            patches.setattr(knobs, "jit_cache_hook", lambda *, repr, **_: compiled.append(repr))  # None: it goes on
        yield
    assert compiled == []


def assert_captured(generator: Generator) -> None:
    """Check that steps were captured as graphs, none of them in vain."""
    if DEVICE.type == "cuda":
        assert not generator.debug.engine.graphs.failures
        assert generator.stats.cuda_graphs > 0
