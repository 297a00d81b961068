"""tools/compile_for_gpu.py as far as it goes with a PyTorch without CUDA: our Triton kernels as machine code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

import compile_for_gpu

from qwen3fast.bench.record import Record

SOURCE = """
def call(args):
    buf0 = empty_strided_cuda((1, 4), (4, 1), torch.float32)
    triton_poi_add_0.run(arg0, buf0, 4, stream=stream0)
    buf1 = empty_strided_cuda((1, 4), (4, 1), torch.float32)
    extern_kernels.mm(buf0, arg1, out=buf1)
    extern_kernels.mm(buf1, arg1, out=buf0)
    triton_poi_add_0.run(arg1, buf0, 4, stream=stream0)
"""


# In a process of its own: in this one, Triton's kernels are Python functions.
COMPILE = """
import json, compile_for_gpu
kernels = {}
for name, gpu in compile_for_gpu.GPUS.items():
    with compile_for_gpu.pretended(gpu):
        kernels[name] = compile_for_gpu.compile_own_kernels(gpu)
print(json.dumps(kernels))
"""


def test_our_kernels_compile_and_fit_into_shared_memory():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(compile_for_gpu.__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert set(kernels) == {"sm_80", "sm_90"}
    for name, own in kernels.items():
        assert len({kernel["name"] for kernel in own}) == len(own) == 15
        most = compile_for_gpu.GPUS[name].shared_bytes
        assert all(kernel["cubin_bytes"] > 1000 and kernel["shared_bytes"] <= most for kernel in own)


def test_launches_and_calls_are_counted():
    kernel = SimpleNamespace(metadata=SimpleNamespace(shared=64), asm={"cubin": b"x" * 9})
    tuner = SimpleNamespace(compile_results=[SimpleNamespace(kernel=kernel)], inductor_meta={"kernel_name": "add"})
    part = compile_for_gpu.describe(SOURCE, [tuner])
    assert (part.launches, part.calls, part.buffers) == (2, {"extern_kernels.mm": 2}, 2)
    assert part.kernels == [{"name": "add", "shared_bytes": 64, "cubin_bytes": 9}]


def test_a_step_is_a_case_and_its_kernels_are_held_against_the_gpu():
    most = compile_for_gpu.GPUS["sm_90"].shared_bytes
    kernels = [{"name": "small", "shared_bytes": size, "cubin_bytes": 9} for size in (8, 4)]
    part = {"launches": 2, "calls": {"extern_kernels.mm": 1}, "buffers": 1, "kernels": kernels, "runs": 3}
    step = {"model": "0.6b", "weights": "bf16", "attention": "sdpa", "batch_size": 1, "context": 64}
    step |= {"triton_launches": 6, "library_calls": {"extern_kernels.mm": 3}, "eager_calls": {"aten::copy_": 4}}
    run = {"utc": "2026-01-02T03:04:05Z", "command": "x", "git_commit": None, "git_dirty": None}
    record = Record("compiled", run, {}, {"name": "x"}, notes={"steps": {}, "own_kernels": []})
    compile_for_gpu.add_step(record, "sm_90", step | {"parts": {"run_block": part}})
    record = Record.from_dict(record.to_dict())
    found = {name: estimate.median for name, estimate in record.cases[0].metrics.items()}
    assert found == {"triton_kernels": 6, "library_calls": 3, "eager_calls": 4, "shared_bytes": 8}
    noted = record.notes["steps"][record.cases[0].name]["parts"]["run_block"]
    assert noted == part | {"kernels": {"small": 8}}
    assert compile_for_gpu.too_large(record) == set()
    noted["kernels"]["large"] = most + 1
    record.notes["own_kernels"].append({"gpu": "sm_80", "name": "own", "shared_bytes": most, "cubin_bytes": 9})
    assert compile_for_gpu.too_large(record) == {"large", "own"}


def test_a_pytorch_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compile_for_gpu.py"])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(SystemExit, match="was built without CUDA"):
        compile_for_gpu.main()
