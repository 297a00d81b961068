"""Helpers that tests share: tolerances, small configs, models with random weights, a small tokenizer."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cpu_threads  # noqa: F401  before anything that imports PyTorch
import kernel_device  # before anything that imports Triton
import pytest
import torch
import train_tiny
from cuda_static.program_order import watch_memory
from safetensors.torch import save_file
from torch import Tensor

from qwen3fast import Generator
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.save import save_model
from qwen3fast.engine import Engine
from qwen3fast.engine.compile import CompileMode
from qwen3fast.kernels import cpu
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.text.tokenizer import Tokenizer

os.environ.setdefault("QWEN3FAST_FORMS", "first")  # what a test runs must not depend on what is fast on a machine
os.environ["QWEN3FAST_CALIBRATE"] = "0"  # tests keep nothing in the user's cache folder, except tests of that
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each program that tests start would compile the package again

# The largest difference allowed, as a share of the largest absolute value of the reference.
TOLERANCES = {
    torch.float32: 1e-4,
    # Measured over 40 shapes and seeds of two-layer models in bfloat16: logits differ by up to 0.0095 from those of
    # transformers (which rotates in bfloat16), and by up to 0.012 from the same weights in float32.
    torch.bfloat16: 2e-2,
}

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU may lack it: tests/gpu does without
    pass
else:  # the same examples in every run, however slow the machine: a test fails only when the code has changed
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50, database=None)
    settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run in two workers unless `-n` says otherwise; tests on a GPU, or without pytest-xdist, in one process."""
    is_worker, has_xdist = hasattr(config, "workerinput"), config.pluginmanager.hasplugin("xdist")
    is_on_gpu = bool(config.args) and all("gpu" in Path(arg.partition("::")[0]).parts for arg in config.args)
    if has_xdist and not is_worker and not is_on_gpu and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Build the C++ operations once, before pytest-xdist starts workers that would all build them.

    Ctrl-C interrupts also in a shell's background job, as its tests expect of the programs that they start.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        cpu.load()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Collect no garbage among the tests and modules that live until the end, and later less often than by default."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000)  # which takes less time
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse ids that differ from process to process: pytest-xdist's workers must collect the same tests."""
    unstable = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]{6,}", item.nodeid)]
    if unstable:
        raise pytest.UsageError("ids of tests contain addresses; pass ids=...: " + ", ".join(unstable[:3]))


@pytest.fixture(autouse=True)
def watched_memory(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Accesses of Triton's kernels outside of their arguments, in its interpreter; any at the end fail the test."""
    if kernel_device.DEVICE != "cpu" or request.node.get_closest_marker("triton") is None:
        yield []
        return
    with pytest.MonkeyPatch.context() as patch:
        outside = watch_memory(patch)
        yield outside
    assert outside == []


@pytest.fixture(scope="module")
def one_thread():
    """For models as small as a test's, more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Graphs(list):
    """Traced by `torch.compile`."""

    tuned = 0  # compilations with coordinate_descent_tuning


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that `torch.compile` makes, one for each form unless a form is compiled again; PyTorch runs them."""
    compile, graphs = torch.compile, Graphs()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def traced(function, fullgraph, dynamic, options):
        kept = {"guard_filter_fn": options["guard_filter_fn"]}
        graphs.tuned += bool(options.get("coordinate_descent_tuning"))
        return compile(function, fullgraph=fullgraph, dynamic=dynamic, backend=backend, options=kept)

    monkeypatch.setattr(torch, "compile", traced)
    return graphs


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Every element within the tolerance of `dtype`, relative to the largest element of `expected`."""
    scale = expected.double().abs().max().item()
    atol = TOLERANCES[dtype] * scale
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Every bit the same."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def small_config(**changes) -> ModelConfig:
    """Two layers, two query heads a key/value head, and a head_dim that is not hidden_size / heads."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=10_000.0,
        max_position_embeddings=256,
        dtype=torch.float32,
        eos_token_ids=(3,),
    )
    return replace(config, **changes)


def fill_randomly(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill all parameters with random numbers, also norm weights (around 1) and biases: no order is neutral."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.dim() >= 2:
                parameter.copy_(noise if "embed" in name else noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise)
    module.eval().requires_grad_(False)


def randomized(config: ModelConfig, seed: int = 0) -> Qwen3:
    """A Qwen3 on the CPU in float32, every parameter random."""
    model = Qwen3(config)
    fill_randomly(model, seed)
    return model


def engine_of(
    model: Qwen3,
    rows: int = 3,
    positions: int = 256,
    cache_dtype: torch.dtype | None = None,
    compile: CompileMode = False,
    **options,
) -> Engine:
    """An engine with a cache of this size, of the model's dtype unless told otherwise. options: of Engine."""
    weight = model.model.norm.weight
    cache = StaticKVCache(model.config, rows, positions, cache_dtype or weight.dtype, weight.device)
    return Engine(model, cache, weight.device, compile, **options)


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what comes at once on a machine that nobody else uses."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def slowly(logits_V: Tensor, output_T: Tensor) -> Tensor:
    """A logits processor that changes only the time a token takes: its reply still runs when it is looked at.

    Sleeps grow: 1,500 tokens take a minute, and a test ends before its reply even on a busy machine.
    """
    time.sleep(0.002 * 1.003 ** len(output_T))
    return logits_V


class Gate:
    """A logits processor that lets some tokens pass and holds the next one, and its reply, until it is opened."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.is_open = tokens, threading.Event()

    def __call__(self, logits_V: Tensor, output_T: Tensor) -> Tensor:
        assert len(output_T) < self.tokens or self.is_open.wait(60), "nobody opened the gate"
        return logits_V


@contextmanager
def slow_steps(generator: Generator) -> Iterator[list[Any]]:
    """Make each decode step take 20 ms longer while the block runs: replies still run when they are looked at.

    Yields: a list that gets an entry per step.
    """
    engine, steps = generator.debug.engine, []

    def launch_late(*arguments: Any, launch: Callable[..., Any] = engine.launch) -> Any:
        steps.append(arguments)
        time.sleep(0.02)
        return launch(*arguments)

    with mock.patch.object(engine, "launch", launch_late):
        yield steps


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_ids(*shape: int, vocab_size: int = 97, seed: int = 0) -> Tensor:
    """Token ids."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE tokenizer with Qwen3's control tokens and a chat template, as a checkpoint stores it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    base = train_tiny.train_tokenizer(random.Random(0))
    base.save(str(folder / "tokenizer.json"))
    settings_json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": (Path(train_tiny.__file__).parent / "tiny_chat_template.jinja").read_text(encoding="utf-8"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_json), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer_folder`."""
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture(scope="session")
def yes_no_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with the tokens "yes" and "no", as Qwen3's has them; ids 1024 and 1025."""
    folder = tmp_path_factory.mktemp("yes-no")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    base = Tokenizer.from_folder(folder).base
    base.add_tokens(["yes", "no"])
    base.save(str(folder / "tokenizer.json"))
    return folder


def write_text_checkpoint(folder: Path, model: Qwen3, tokenizer_folder: Path) -> Path:
    """A checkpoint with a tokenizer, as published: a tied output projection is left out."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CheckpointConfig(model.config).to_dict()), encoding="utf-8")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model without a tokenizer: random weights in bfloat16, for programs that measure; smaller than tiny."""
    config = small_config(vocab_size=96, hidden_size=64, intermediate_size=96, dtype=torch.bfloat16, eos_token_ids=())
    save_model(randomized(config, seed=3).bfloat16(), folder := tmp_path_factory.mktemp("models") / "small")
    return folder


@pytest.fixture
def yes_no_checkpoint(tmp_path: Path, yes_no_folder: Path) -> Path:
    """A checkpoint of random weights that a Reranker takes: its tokenizer has the tokens "yes" and "no"."""
    config = small_config(vocab_size=1026, max_position_embeddings=1024)
    return write_text_checkpoint(tmp_path / "yes-no-checkpoint", randomized(config), yes_no_folder)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Generator]:
    """Return the Generators that `Generator.from_pretrained` makes in the test."""
    generators, real = [], Generator.from_pretrained

    def from_pretrained(*arguments, **options):
        generators.append(real(*arguments, **options))
        return generators[-1]

    monkeypatch.setattr(Generator, "from_pretrained", from_pretrained)
    return generators
