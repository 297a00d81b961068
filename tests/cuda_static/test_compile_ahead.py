"""Kernels that are compiled in several processes, before anything launches them."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import engine_of, randomized, small_config
from cuda_static import kernel_checks  # noqa: F401  which skips without Triton
from kernel_device import DEVICE

from qwen3fast.engine.fused_sampler import FusedSampler
from qwen3fast.engine.fused_step import FusedDecodeStep
from qwen3fast.kernels.cuda.decode_step import attention, compile_ahead, linear, sample, tail
from qwen3fast.kernels.cuda.decode_step.weights import Weight

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread")]

# In a process of its own: in this one, Triton's kernels are Python functions.
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from qwen3fast.kernels.cuda.decode_step import compile_ahead, launch, linear, tail
from qwen3fast.kernels.cuda.decode_step.weights import Weight

class Driver(compile_ahead._NoDriver):
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
launch.uses_dependent_launch = lambda device: True
compile_ahead.MIN_KERNELS = compile_ahead.MIN_PROCESSES = 2
x, y, weight = torch.zeros(2, 64), torch.ones(2, 48), Weight.of(torch.ones(48, 64), None, False)
best, state = tail.Best.allocate(1, 100, torch.device("cpu")), [torch.ones(1, dtype=torch.int64)] * 5

def steps():
    for _ in range(3):  # as in several layers
        for rows in (1, 2):
            linear.linear_add(x[:rows], weight, y[:rows])
    tail.choose(best, *state)

compiled_here, found = [], []
triton.knobs.compilation.listener = lambda cache_hit, **_: cache_hit or compiled_here.append(1)
for _ in range(2):
    compile_ahead.compile_ahead(steps)
    compile_ahead._compile_in_processes = None  # not to be called again
    found.append(sum(len(jit.device_caches.pop(0)[0]) for jit in (linear.linear_kernel, tail.choose_kernel)))
assert (found, compiled_here) == ([3, 3], [])
triton.knobs.cache.dir += "-other"
launch.only_compile(steps)
assert len(compiled_here) == 3
assert triton.knobs.runtime.jit_cache_hook is None and y.min() == 1
"""


def test_this_process_finds_what_others_have_compiled(tmp_path):
    """Nothing is left to compile; nor is anything compiled when a later process asks for the same."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "ahead:" not in done.stderr, done.stderr


def test_processes_import_from_where_this_one_does(monkeypatch):
    """And from the working folder only where this process does."""
    found = []

    def popen(command, env, **options):
        found.append(env)
        raise OSError("no more processes")

    monkeypatch.setattr(compile_ahead.triton.runtime, "driver", SimpleNamespace(active=MagicMock()))
    monkeypatch.setattr(compile_ahead.subprocess, "Popen", popen)
    monkeypatch.setattr(sys, "path", ["/some/place", "", "/other"])
    with pytest.raises(OSError, match="no more processes"):
        compile_ahead._compile_in_processes([], 1)
    assert found[0]["PYTHONPATH"].split(os.pathsep) == ["/some/place", os.getcwd(), "/other"]
    assert found[0]["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("is_broken", [False, True])
def test_nothing_is_launched_and_errors_are_left_to_the_launch(is_broken, caplog):
    x, y = torch.ones(1, 32, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
    weight = Weight.of(torch.ones(16, 32, device=DEVICE), None, False)

    def steps():
        linear.linear_add(x, weight, y)
        if is_broken:
            raise RuntimeError("PTXAS error")

    compile_ahead.compile_ahead(steps)
    assert not y.any() and ("PTXAS error" in caplog.text) == is_broken
    linear.linear_add(x, weight, y)
    assert y.unique().tolist() == [32]


def test_a_warm_up_compiles_every_kernel_of_its_steps_ahead(monkeypatch):
    """Of all numbers of rows and samplers."""
    model = randomized(small_config(num_hidden_layers=1)).to(DEVICE)
    engine = engine_of(model, 4, 128)
    fused, sampler = FusedDecodeStep(model, engine.cache), FusedSampler(4, 97, engine.device)
    engine.parts = replace(engine.parts, fused_step=fused, fused_sampler=sampler)
    launched, is_ahead = {True: set(), False: set()}, [False]

    def note(kernel, grid, *arguments, device, **constants):
        launched[is_ahead[0]].add((kernel.__name__, *sorted(constants.items())))

    def ahead(steps):
        is_ahead[0] = True
        steps()
        is_ahead[0] = False

    for module in (attention, linear, sample, tail):
        monkeypatch.setattr(module, "launch", note)
    monkeypatch.setattr(fused, "compile_ahead", ahead)
    engine.graphs = engine.captured = None
    engine.warmup()
    assert launched[True] == launched[False] and len(launched[True]) > 30
