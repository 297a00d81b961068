"""tools/compile_for_gpu.py: our kernels as machine code; whole steps where PyTorch was built with CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

from compile_for_gpu import binaries, inspector, main
from compile_for_gpu.devices import GPUS
from compile_for_gpu.kernels import fused_cases

from qwen3fast.bench.record import Record, load_record

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-compile.json"
MAX_LAUNCHES = 175  # per token of 0.6B in bfloat16; in the first run on a GPU there were 336
KINDS = ("triton_kernels", "library_calls", "eager_calls")

SOURCE = """
def call(args):
    buf0 = empty_strided_cuda((1, 4), (4, 1), torch.float32)
    triton_poi_add_0.run(arg0, buf0, 4, stream=stream0)
    buf1 = empty_strided_cuda((1, 4), (4, 1), torch.float32)
    extern_kernels.mm(buf0, arg1, out=buf1)
    extern_kernels.mm(buf1, arg1, out=buf0)
    buf2 = torch.ops.qwen3fast.split_attention.default(buf1)
    triton_poi_add_0.run(arg1, buf0, 4, stream=stream0)
"""

# In a process of its own: in this one, Triton's kernels are Python functions. Besides our kernels, one that may start
# before those it depends on have ended: it waits before its loads and stores, or does not.
COMPILE = """
import json, triton, triton.language as tl
from compile_for_gpu.binaries import is_unsafe
from compile_for_gpu.devices import GPUS, pretended
from compile_for_gpu.cases import KernelCase, own_cases
from compile_for_gpu.kernels import compile_own_kernels

@triton.jit
def copy(x_ptr, y_ptr, WAITS: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    tl.store(y_ptr + index, tl.load(x_ptr + index))
    tl.extra.cuda.gdc_launch_dependents()

kernels, cases = {}, own_cases()
for (name, gpu), chosen in zip(GPUS.items(), (cases[::5], cases, cases[2::5])):  # all of them for one
    with pretended(gpu):
        kernels[name] = compile_own_kernels(gpu, chosen)
waits = [KernelCase.in_order("copy", copy, ["*fp32", "*fp32"], [wait, 128]) for wait in (True, False)]
cases = [case._replace(options={"launch_pdl": True, "num_warps": 4}) for case in waits]
with pretended(GPUS["sm_90"]):
    copies = compile_own_kernels(GPUS["sm_90"], cases)
print(json.dumps([kernels, [[kernel, is_unsafe(kernel)] for kernel in copies]]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Our kernels by GPU, and the two forms of `copy`, each with the verdict on it."""
    file = tmp_path_factory.mktemp("compiled") / "kernels.py"  # Triton reads a kernel's text
    file.write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(main.__file__).parents[1]), *sys.path])
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_our_kernels_compile_and_fit_into_shared_memory(compiled):
    kernels, _ = compiled
    assert list(kernels) == ["sm_80", "sm_90", "sm_100"]
    for name, own in kernels.items():
        assert len({kernel["name"] for kernel in own}) == len(own) >= (15 if name == "sm_90" else 3)
        assert all(kernel["cubin_bytes"] > 1000 and 16 <= kernel["registers"] <= 255 for kernel in own)
        assert all(kernel["shared_bytes"] <= GPUS[name].shared_bytes for kernel in own)
        assert not any(binaries.is_unsafe(kernel) for kernel in own)


def test_a_kernel_that_does_not_wait_for_the_one_before_it_is_found(compiled):
    _, [[waits, is_waiting_unsafe], [starts, is_starting_unsafe]] = compiled
    assert waits["waits"] and waits["launches_dependents"] and not is_waiting_unsafe
    assert (waits["loads_before_wait"], waits["stores_before_wait"]) == (0, 0)
    assert not starts["waits"] and is_starting_unsafe
    assert starts["loads_before_wait"] > 0 and starts["stores_before_wait"] > 0


def test_the_fused_kernels_are_those_of_the_sizes_and_formats_asked_for():
    names = [case.name for case in fused_cases(GPUS["sm_90"], ["0.6b/2", "30b-a3b"], ["bf16"])]
    assert "qkv, 0.6b, bf16, 1 rows" in names and "choose" in names and "embed, 0.6b, bf16" in names
    assert not any(", int8, " in name or "8b" in name or name.endswith(("int4", "fp8")) for name in names)
    assert fused_cases(GPUS["sm_90"], ["30b-a3b"], ["bf16"]) == []


@pytest.mark.parametrize(("name", "is_fault"), [("triton_red_fused_mm_1", True), ("qkv, 0.6b", False)])
def test_inductors_kernels_must_not_start_the_next_before_their_own_wait(name, is_fault):
    """The next one may load, before it waits, what the kernels before this one have written; ours never does."""
    lines = ["ld.global.b32 a", "griddepcontrol.launch_dependents", "griddepcontrol.wait", "st.global.b32 b"]
    facts = kernel(name, **binaries.waits_of("\n".join(lines)))
    assert (facts["loads_before_wait"], facts["launches_before_wait"]) == (1, True)
    assert binaries.is_unsafe(facts) == is_fault
    in_order = [lines[0], lines[2], lines[1], lines[3]]
    facts = kernel(name, **binaries.waits_of("\n".join(in_order)))
    assert not binaries.is_unsafe(facts)
    assert binaries.is_unsafe(facts | {"is_first": True})  # of a part: it may read what the part before has written


def test_registers_and_spills_are_read(monkeypatch):
    printed = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function f:\n  REG:40 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:560\n"
    )
    monkeypatch.setattr(binaries.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=printed))
    assert binaries.resources(b"cubin") == {"registers": 40, "spill_bytes": 24}


def test_launches_and_calls_are_counted(monkeypatch):
    monkeypatch.setattr(
        inspector, "describe_kernel", lambda name, kernel: {"name": name, "size": kernel.metadata.shared}
    )
    forms = [SimpleNamespace(kernel=SimpleNamespace(metadata=SimpleNamespace(shared=size))) for size in (64, 128, 32)]
    tuner = SimpleNamespace(compile_results=forms, inductor_meta={"kernel_name": "add"})
    part = inspector.describe(SOURCE, [tuner])
    assert (part.launches, part.calls, part.buffers) == (4, {"extern_kernels.mm": 2}, 2)
    assert part.kernels == [{"name": "add", "size": 128, "is_first": False}]
    tuner.inductor_meta["kernel_name"] = "triton_poi_add_0"
    assert inspector.describe(SOURCE, [tuner]).kernels[0]["is_first"]


def kernel(name, **changes):
    """Facts of a kernel that is as it should be."""
    facts = {"name": name, "shared_bytes": 8, "cubin_bytes": 9, "registers": 32, "spill_bytes": 0, "launch_pdl": True}
    waits = {"waits": True, "launches_dependents": True, "loads_before_wait": 0, "stores_before_wait": 0}
    return facts | waits | changes


def record_of(**step):
    """A record with one step."""
    run = {"utc": "2026-01-02T03:04:05Z", "command": "x", "git_commit": None, "git_dirty": None}
    notes = {"steps": {}, "kernels": [], "own_kernels": [], "errors": {}}
    record = Record("compiled", run, {}, {"name": "x"}, notes=notes)
    labels = {"step": "decode", "model": "0.6b", "weights": "bf16", "batch_size": 1, "context": 64}
    main.add_step(record, "sm_90", labels | step)
    return record


def test_a_step_is_a_case_and_its_kernels_are_held_against_the_gpu():
    part = {"launches": 2, "calls": {"extern_kernels.mm": 1}, "buffers": 1, "runs": 3}
    small, other = kernel("small", spill_bytes=4), kernel("other", shared_bytes=4, registers=40)
    part["kernels"] = [small, other, small]
    counts = {"triton_launches": 6, "library_calls": {"extern_kernels.mm": 3}, "eager_calls": {"aten::copy_": 4}}
    own = kernel("attention_kernel", shared_bytes=12, registers=50)
    counts |= {"own_launches": {"qwen3fast::step_draw": 2}, "own_kernels": [own]}
    record = record_of(**counts, parts={"run_block": part})
    record = Record.from_dict(record.to_dict())
    [case] = record.cases
    found = {name: estimate.median for name, estimate in case.metrics.items()}
    assert found == {"triton_kernels": 6, "library_calls": 3, "eager_calls": 4, "shared_bytes": 12}
    assert (case.facts["most_registers"], case.facts["spill_bytes"]) == (50, 8)  # a kernel counts wherever it is listed
    noted = record.notes["steps"][case.name]
    assert noted["parts"]["run_block"] == part | {"kernels": [0, 1, 0]} and noted["own_kernels"] == [2]
    assert record.notes["kernels"] == [{"gpu": "sm_90", **found} for found in (small, other, own)]
    assert main.faults_of(record) == []
    most = GPUS["sm_90"].shared_bytes
    record.notes["kernels"] += [{"gpu": "sm_90", **kernel("large", shared_bytes=most + 1)}]
    record.notes["own_kernels"] += [{"gpu": "sm_90", **kernel("own", shared_bytes=most)}]
    record.notes["own_kernels"] += [{"gpu": "sm_90", **kernel("early", waits=False)}]
    assert main.faults_of(record) == [
        "more shared memory than there is: large", "do not wait for what they depend on: early"
    ]  # fmt: skip


def test_cases_of_an_earlier_run_are_kept_if_it_had_the_same_code():
    facts = {
        "triton_launches": 1,
        "library_calls": {},
        "eager_calls": {},
        "own_launches": {},
        "own_kernels": [],
        "parts": {},
    }
    earlier, record = record_of(**facts), record_of(**facts)
    record.cases = []
    main.keep_cases(record, earlier)
    assert record.cases == earlier.cases and list(record.notes["steps"]) == [record.cases[0].name]
    assert record.run["command"] == "x; x"
    earlier.environment["triton"] = "3.6.0"
    with pytest.raises(ValueError, match=r"made with triton 3\.6\.0"):
        main.keep_cases(record, earlier)


def test_the_recorded_step_launches_few_kernels():
    record = load_record(RECORD)
    cases = {
        (c.labels["step"], c.labels["model"], c.labels["weights"], c.labels["batch_size"]): c for c in record.cases
    }
    case = cases["decode", "0.6b", "bf16", 1]
    launches = sum(case.metrics[name].median for name in KINDS)
    assert 28 < launches <= MAX_LAUNCHES
    own = [kernel for kernel in record.notes["own_kernels"] if kernel["name"].endswith(", 0.6b, bf16, 1 rows")]
    assert len(own) >= 6 * len({kernel["gpu"] for kernel in own}) > 0
    assert case.facts["spill_bytes"] == 0 and all(kernel["spill_bytes"] == 0 for kernel in own)
    assert not any(binaries.is_unsafe(kernel) for kernel in main.kernels_of(record))


def test_a_step_that_does_not_compile_is_a_fault_and_no_case():
    record = record_of(error="ConstraintViolationError: 65 <= size")
    assert record.cases == []
    [fault] = main.faults_of(record)
    assert "decode, 0.6b, bf16" in fault and "65 <= size" in fault


def test_a_pytorch_without_cuda_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert main.main([]) == 1
    assert "was built without CUDA" in capsys.readouterr().out


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu counts the kernels of a real step")
@pytest.mark.skipif(torch.__version__ < "2.11", reason="fake CUDA tensors of PyTorch 2.9 need a driver to be sliced")
def test_a_step_launches_few_kernels_all_of_which_wait(tmp_path):
    file = tmp_path / "record.json"
    command = [str(Path(main.__file__).parents[1] / "compile_for_gpu.py"), "--gpus", "sm_90", "--models", "0.6b/2"]
    command += ["--weights", "bf16", "--batch-sizes", "1", "--output", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    record = Record.from_dict(json.loads(file.read_text()))
    steps = {case.labels["step"]: case for case in record.cases}
    assert list(steps) == ["decode", "sampled", "processed", "prefill", "uncached"]
    counts = {name: sum(case.metrics[kind].median for kind in KINDS) for name, case in steps.items()}
    assert counts["decode"] <= 2 * 6 + 3 and counts["sampled"] <= 2 * 6 + 2 + 19
    notes = record.notes["steps"]
    assert all(notes[steps[name].name]["parts"] == {} for name in ("decode", "sampled"))  # none by Inductor
    processed = notes[steps["processed"].name]
    assert processed["eager_calls"] == {}
    assert set(processed["parts"]) == {"run_processors", "run_count", "run_logprobs"}
    assert processed["library_calls"] == {"torch.ops.aten.topk.default": 1}
    assert processed["parts"]["run_count"]["launches"] <= 2  # without copies of all counts
    assert notes[steps["prefill"].name]["parts"]["run_prefill_block"]["runs"] == 2
    kernels = main.kernels_of(record)
    assert len(kernels) > 30 and not any(binaries.is_unsafe(kernel) for kernel in kernels)
    assert any(kernel["launch_pdl"] for kernel in kernels)
    own = [record.notes["kernels"][number] for number in notes[steps["decode"].name]["own_kernels"]]
    assert {"linear_kernel", "attention_kernel", "vocabulary_kernel"} < {kernel["name"] for kernel in own}
    facts = steps["decode"].facts
    assert facts["most_registers"] == max(kernel["registers"] for kernel in own) and facts["spill_bytes"] == 0
    assert steps["decode"].metrics["shared_bytes"].median == max(kernel["shared_bytes"] for kernel in own) > 0
