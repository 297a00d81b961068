"""Every kernel, graph and event is of the model's device: Triton and PyTorch take the current one."""

import ast
from contextlib import contextmanager, nullcontext
from inspect import isfunction
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

from qwen3fast.engine import Engine, cuda_graph
from qwen3fast.engine.rows import Rows
from qwen3fast.kernels import cuda

FILES = sorted(Path(cuda.__file__).parent.rglob("*.py"))


def launches(source):
    """Return the line of each `kernel[grid](...)`, and whether it is in a block `with current(...)`."""
    tree, guarded = ast.parse(source), set()
    for block in ast.walk(tree):
        names = [ast.unparse(item.context_expr) for item in getattr(block, "items", [])]
        if isinstance(block, ast.With) and any(name.startswith("current(") for name in names):
            guarded |= {id(node) for node in ast.walk(block)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    return [(node.lineno, id(node) in guarded) for node in calls if not ast.unparse(node).startswith("dict[")]


def test_a_launch_outside_of_the_block_is_found():
    assert launches("kernel[grid](x)\nwith current(x.device):\n    kernel[grid](x)") == [(1, False), (3, True)]


def test_every_kernel_is_launched_on_the_device_of_its_tensors():
    found = {file.name: launches(file.read_text(encoding="utf-8")) for file in FILES}
    assert sum(map(len, found.values())) >= 6
    assert [(name, line) for name, lines in found.items() for line, is_guarded in lines if not is_guarded] == []


def test_an_engine_launches_with_its_device_as_the_current_one():
    """Methods without the decorator launch nothing by themselves."""
    methods = {name: method for owner in (Rows, Engine) for name, method in vars(owner).items() if isfunction(method)}
    unguarded = {name for name, method in methods.items() if name[0] != "_" and not hasattr(method, "__wrapped__")}
    calls_others = {"prefill_whole", "decode", "clear_all"}
    on_host = {"max_prompts", "forward_args", "read_length", "forget", "batch_bucket", "batch_buckets", "close"}
    assert unguarded == calls_others | on_host | {"num_warmup_parts"}


@pytest.mark.parametrize("fails", [False, True])
def test_graphs_streams_and_pools_are_of_the_models_device(fails, monkeypatch):
    current, used = [0], []

    @contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    def noting(name, value):
        return lambda *_, **__: used.append((name, current[-1])) or value

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})()
    generator = type("Generator", (), {"clone_state": lambda self: None, "graphsafe_set_state": lambda self, _: None})()
    graph = type("Graph", (), {"replay": None})()
    fakes = {"Stream": stream, "CUDAGraph": graph, "current_stream": stream, "graph_pool_handle": (0, 1)}
    fakes |= {"stream": nullcontext(), "graph": nullcontext(), "set_stream": None}
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "default_generators", {1: generator})  # of this device, and of no other
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, noting(name, value))
    ended = []
    monkeypatch.setattr(cuda_graph, "end_broken_capture", lambda device, pool: ended.append(device.index))

    def step():
        used.append(("step", current[-1]))
        if fails and ("CUDAGraph", 1) in used:
            raise RuntimeError("broken")

    recorder = cuda_graph.CudaRecorder(torch.device("cuda", 1))
    recorder.warm_up(step)
    with pytest.raises(RuntimeError, match="broken") if fails else nullcontext():
        recorder.record(step)
    assert {name for name, _ in used} >= fakes.keys() - {"set_stream"} | {"step"}
    assert {index for _, index in used} == {1} and ended == [1] * fails
