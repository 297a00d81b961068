"""The simulated GPU (tools/simulated_gpu.py): right programs are right on it, and wrong ones go wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HAS_CUDA_13 = (torch.version.cuda or "").startswith("13.") and shutil.which("g++") is not None

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not HAS_CUDA_13, reason="PyTorch is not built for CUDA 13, or there is no g++"),
]


def run(program, *arguments, **variables):
    """Run a program, or what the arguments name, on the simulated GPU; return its output."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/simulated_gpu.py"), *(arguments or ("-c", program))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_operations_and_graphs_compute_what_the_cpu_does():
    assert "equal" in run("""
import torch
x, w = torch.randn(4, 5), torch.randn(5, 3)
def f(x, w):
    y = torch.softmax(x @ w, -1)
    return y[:, 1:].cumsum(0).T.contiguous(), torch.where(y > 0.3, y, 0).sum()
a, b = x.cuda(), w.cuda()
torch.testing.assert_close([r.cpu() for r in f(a, b)], list(f(x, w)))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    results = f(a, b)
a.copy_(2 * x)
graph.replay()
torch.testing.assert_close([r.cpu() for r in results], list(f(2 * x, w)))
print("equal")
""")


def test_compiled_functions_compute_what_the_cpu_does():
    assert "equal" in run("""
import torch
def f(x, w):
    y = x @ w
    return torch.nn.functional.silu(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
x, w = torch.randn(3, 64), torch.randn(64, 128)
torch.testing.assert_close(torch.compile(f)(x.cuda(), w.cuda()).cpu(), f(x, w), atol=0.01, rtol=0.01)
print("equal")
""")


@pytest.mark.parametrize("waits", [True, False])
def test_a_result_that_is_not_waited_for_is_not_there(waits):
    """On a GPU it would be there now and then."""
    printed = run(f"""
import torch
x, y = torch.ones(3, device="cuda"), torch.zeros(3).pin_memory()
y.copy_(x, non_blocking=True)
if {waits}:
    torch.cuda.synchronize()
print(y.tolist())
""")
    assert printed == str([float(waits)] * 3)


@pytest.mark.parametrize("waits", [True, False])
def test_pinned_memory_is_read_when_the_copy_runs(waits):
    printed = run(f"""
import torch
x, y = torch.ones(3).pin_memory(), torch.zeros(3, device="cuda")
y.copy_(x, non_blocking=True)
if {waits}:
    torch.cuda.synchronize()
x.fill_(5)
print(y.tolist())
""")
    assert printed == str([1.0 if waits else 5.0] * 3)


@pytest.mark.parametrize("waits", [True, False])
def test_streams_order_nothing_among_each_other(waits):
    printed = run(f"""
import torch
x, side = torch.zeros(3, device="cuda"), torch.cuda.Stream()
torch.cuda.synchronize()
x.add_(1)
with torch.cuda.stream(side):
    if {waits}:
        side.wait_stream(torch.cuda.default_stream())
    y = x.to("cpu")
print(y.tolist())
""")
    assert printed == str([float(waits)] * 3)


@pytest.mark.parametrize("waits", [True, False])
def test_a_capture_ends_when_all_its_streams_have_joined(waits):
    """One by way of another, whose last operation the capture waits for or not."""
    printed = run(f"""
import torch
x, graph, one, two = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
torch.cuda.synchronize()
try:
    with torch.cuda.graph(graph):
        one.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(one):
            x.add_(1)
        two.wait_stream(one)
        with torch.cuda.stream(two):
            x.mul_(3)
            event = two.record_event()
            x.add_(1)
        event = two.record_event() if {waits} else event
        torch.cuda.current_stream().wait_event(event)
    graph.replay()
    print(x.tolist())
except RuntimeError as err:
    print(str(err).splitlines()[0])
""")
    assert printed == ("[7.0, 7.0, 7.0]" if waits else "CUDA error: capturing stream has unjoined work")


def test_an_event_of_a_capture_is_no_event_outside():
    printed = run("""
import torch
x, graph, event = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Event()
torch.cuda.synchronize()
with torch.cuda.graph(graph):
    x.add_(1)
    event.record()
try:
    torch.cuda.current_stream().wait_event(event)
except RuntimeError as err:
    print(str(err).splitlines()[0])
graph.replay()
print(x.tolist())
""")
    assert printed.startswith("CUDA error: operation not permitted on an event") and printed.endswith("[2.0, 2.0, 2.0]")


def test_a_failed_kernel_is_an_error_of_the_next_call_that_waits():
    printed = run("""
import torch
x = torch.ones(3, device="cuda")
x[torch.tensor([7], device="cuda")]
try:
    torch.cuda.synchronize()
except RuntimeError as err:
    print(str(err).splitlines()[0])
print(x.tolist())
""")
    assert printed.splitlines() == ["CUDA error: a kernel of the simulated GPU failed", "[1.0, 1.0, 1.0]"]


def test_what_waits_and_what_does_not():
    printed = run("""
import torch
x, y, rows = torch.ones(3, device="cuda"), torch.zeros(3).pin_memory(), torch.tensor([1]).cuda()
is_on = torch.zeros(3, dtype=torch.bool, device="cuda")
y.copy_(x, non_blocking=True)
torch.zeros(3).to("cuda", non_blocking=True)  # of memory that is not pinned
is_on.index_put_((rows,), torch.ones(1, dtype=torch.bool, device="cuda"))
print(y.tolist())
x.index_put_((is_on,), torch.full((1,), 5.0, device="cuda")).add_(1)
print(y.tolist(), x.tolist())
""")
    assert printed.splitlines() == ["[0.0, 0.0, 0.0]", "[1.0, 1.0, 1.0] [2.0, 6.0, 2.0]"]


JOIN_DEFAULT = "torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())"


@pytest.mark.parametrize("call", ["x.sum().item()", "torch.cuda.synchronize()", "x[x > 0]", JOIN_DEFAULT])
def test_a_capture_forbids_waiting(call):
    printed = run(f"""
import torch
x = torch.ones(3, device="cuda")
x.add_(1)
torch.cuda.synchronize()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        {call}
except RuntimeError as err:
    print(str(err).splitlines()[0])
print(x.sum().item())
""")
    assert printed.startswith("CUDA error: operation") and printed.endswith("6.0")


def test_memory_ends_and_is_no_number_before_it_is_written():
    printed = run(
        """
import torch
print(torch.empty(3, device="cuda").tolist())
try:
    torch.empty(2**25, device="cuda")
except torch.OutOfMemoryError:
    print("out of memory")
""",
        SIMULATED_GPU_BYTES=str(2**26),
    )
    assert printed.splitlines() == ["[nan, nan, nan]", "out of memory"]


def test_the_second_of_two_devices():
    printed = run(
        """
import torch
x, y, z = torch.ones(3, device="cuda"), torch.full((3,), 5.0, device="cuda:1"), torch.zeros(3).pin_memory()
print(x.add_(1).to("cuda:1").cumsum(0).tolist())
z.copy_(y, non_blocking=True)
del y
torch.cuda.empty_cache()  # which frees the memory of all devices, after their work
torch.cuda.synchronize("cuda:1")
print(z.tolist())
""",
        SIMULATED_GPUS="2",
    )
    assert printed.splitlines() == ["[2.0, 4.0, 6.0]", "[5.0, 5.0, 5.0]"]


@pytest.mark.parametrize("waits", [True, False])
def test_an_engine_that_reads_tokens_without_waiting_is_wrong(waits):
    assert run(
        f"""
import copy
from unittest.mock import Mock, patch
from conftest import randomized, small_config
from qwen3fast import Generator, SamplingParams
from qwen3fast.engine.in_flight import TokenRing

def generate(model, compile):
    with Generator(model, compile=compile, max_seq_len=64) as generator:
        return generator.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)).token_ids

model = randomized(small_config(head_dim=32, hidden_size=64), seed=3)
on_gpu, expected = copy.deepcopy(model).to("cuda"), generate(model, False)
make = TokenRing.__init__
without_events = lambda *args, **given: make(*args, **given | {{"make_event": Mock}})
with patch.object(TokenRing, "__init__", make if {waits} else without_events):
    print(generate(on_gpu, True) == expected)
""",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    ) == str(waits)


def test_tiny_answers_on_it():
    """Compiled steps in CUDA graphs, whose kernels' PTX is run."""
    options = ("--model", "tiny", "--device", "cuda", "--temperature", "0", "--max-tokens", "4")
    arguments = ("-m", "qwen3fast", "generate", "What is 17 + 25?", *options)
    assert run(None, *arguments, SIMULATED_GPU_MAJOR="8") == "42"
