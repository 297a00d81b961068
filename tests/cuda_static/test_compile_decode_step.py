"""The kernels of the fused decode step as machine code: registers, shared memory, and what they do before they wait."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from cuda_static import kernel_checks  # noqa: F401  which skips without Triton

from compile_for_gpu import slots  # isort: skip  needs Triton
from compile_for_gpu.cases import FORMATS, KernelCase, compile_cases  # isort: skip
from compile_for_gpu.slots import budget  # isort: skip

from qwen3fast.kernels.cuda.decode_step import linear

pytestmark = pytest.mark.triton

# Compute capability 8.9 stands for 8.6 and 12.0, which have as much.
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_SPILLED_BYTES = 48  # per thread, in loops that run for microseconds; for 8.9: Triton 3.6 40, 3.8 48, 3.9 none

# Bits per weight, scales included; and the share of an H200's issue slots that one and eight rows take at most. What
# is left is for stalls. (uint4 with eight rows is bound by them.)
BITS = {"bf16": 16, "int8": 8, "fp8": 8, "fp8-block": 8, "int4": 4.5, "uint4": 4.625}
MAX_SHARE = {"bf16": (0.2, 0.2), "int8": (0.6, 0.6), "fp8": (0.6, 0.6), "fp8-block": (0.6, 0.6)}
MAX_SHARE |= {"int4": (0.75, 1.0), "uint4": (1.0, 1.4)}

# In a process of its own: in this one, Triton's kernels are Python functions.
COMPILE = """
import json, sys
from triton.backends.compiler import GPUTarget
from compile_for_gpu.binaries import resources
from compile_for_gpu.cases import compile_cases, float32_cases, own_cases
from compile_for_gpu.slots import slots_per_weight
found = {}
chosen = [
    (capability, case)
    for capability, names in json.loads(sys.argv[1])
    for case in [
        *compile_cases(divmod(capability, 10)),
        *(float32_cases((8, 9)) if capability == 89 else own_cases() if capability == 80 else []),
    ]
    if any(case.name.startswith(name) for name in names)
]
for capability, case in chosen:
    kernel = case.compile(GPUTarget("cuda", capability, 32))
    cubin = kernel.asm["cubin"]
    found[f"{capability}: {case.name}"] = [
        *resources(cubin).values(), kernel.metadata.shared, kernel.asm["ptx"], slots_per_weight(case, cubin)
    ]
print(json.dumps(found))
"""


CHOSEN = [
    (80, ["qkv, 0.6b, bf16, 1", "attention, 0.6b, int8"]),
    (90, [f"{part}, 0.6b, {kind}, 1" for part in ("qkv", "vocabulary") for kind in ("bf16", "int8", "int4", "uint4")]),
    (80, ["search, pass 9", "draw"]),
    (
        89,
        [
            "chunk attention, 8b, bf16",
            "chunk attention, 8b, fp32",
            "attention, 8b, fp32 cache, 33",
            "attend_split",
            "packed_matvec, int4",
            *(f"gate_up, 8b, {kind}, 8 rows, float32" for kind in ("bf16", "int8", "int4")),
            "vocabulary, 8b, bf16, 8 rows, float32",
        ],
    ),
    (90, ["largest", "best", "search, pass 1", "draw", "chunk attention, 8b"]),
    (
        90,
        [
            *(f"gate_up, 8b, {kind}, {rows}" for kind in BITS for rows in (1, 8)),
            "down, 8b, bf16, 8",
            "embed, 0.6b",
            "attention, 0.6b, bf16",
            "combine, 8b",
            "choose",
        ],
    ),
    (100, ["qkv, 0.6b, bf16, 1", "attention, 0.6b, bf16"]),
    (80, ["qkv, 0.6b, fp8-block, 1", "packed_matvec, fp8-block", "packed_experts, fp8-block"]),
    (90, ["vocabulary, 0.6b, fp8-block, 1", "down, 8b, fp8-block, 8"]),
    (100, ["gate_up, 8b, fp8-block, 8", "embed, 0.6b, fp8-block"]),
]


@pytest.fixture(scope="module")
def kernels():
    """Registers, spilled bytes, shared memory, PTX and slots per weight of some kernels, by "capability: name"."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, json.dumps(CHOSEN)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(any(n.startswith(f"{capability}: {start}") for n in found) for capability, s in CHOSEN for start in s)
    return found


def test_kernels_fit_into_registers_and_shared_memory(kernels):
    for name, (registers, stack, shared, *_) in kernels.items():
        assert registers <= 255 and stack <= MAX_SPILLED_BYTES, name
        assert shared <= SHARED_BYTES[int(name.split(":")[0])], name


def test_kernels_touch_nothing_before_the_previous_kernel_has_ended(kernels):
    for name, (*_, ptx, _) in kernels.items():
        if name.startswith("8") or "chunk" in name:
            assert "griddepcontrol" not in ptx, name
            continue
        assert ptx.count("griddepcontrol.wait") == 1, name
        before, after = ptx.split("griddepcontrol.wait")
        assert "griddepcontrol.launch_dependents" in before, name
        assert not any(write in before for write in ("st.global", "atom.global", "red.global")), name
        assert "ld.global" in after and "st.global" in after, name
        sources = loaded_parameters(before)
        if any(part in name for part in ("qkv", "gate_up", "vocabulary")):
            assert sources == {"1", "2"}, name  # norm and w: weights are on their way while it waits
        elif "output" in name or "down" in name:
            assert sources == {"2"}, name
        else:
            assert sources == set(), name


def test_programs_prefetch_no_more_of_packed_weights_than_caches_hold(kernels):
    size = re.compile(r"cp\.async\.bulk\.prefetch\.L2\.global \[%\w+\], (%\w+);")
    found = {name: size.findall(ptx) for name, (*_, ptx, _) in kernels.items()}
    assert len(found["90: gate_up, 8b, int8, 8 rows"]) == 4 and not found["90: gate_up, 8b, bf16, 8 rows"]
    for name, registers in found.items():
        for register in registers:
            [number] = re.findall(rf"mov\.b32 \s*{register}, (\d+);", kernels[name][3])
            blocks = len(registers) // (2 if "gate_up" in name else 1)
            assert int(number) * blocks <= linear.PREFETCHED.value and int(number) % 16 == 0


@pytest.mark.parametrize("format", BITS)
def test_products_take_few_instructions_beside_reading_the_weight(format, kernels):
    for rows, limit in zip((1, 8), MAX_SHARE[format], strict=True):
        slots_per_weight = kernels[f"90: gate_up, 8b, {format}, {rows} rows"][4]
        assert 0.5 < slots_per_weight < limit * budget(BITS[format]), rows


def test_slots_are_counted_in_loops_and_shuffles_are_slow(monkeypatch):
    """Two tiles of 32 x 128 weights of two matrices; the second in the loop, whose products are unrolled by two."""
    product = "HMMA.16816.F32.BF16 R0"  # 16 x 16 weights, for each of 4 warps
    lines = [*[product] * 8, ".L_x_1:", *[product] * 16, "SHFL.BFLY PT, R1", "FADD R2, R1"]
    lines += ["@P0 BRA `(.L_x_1)", "NOP", "EXIT"]
    text = "\n".join(line if line.startswith(".L") else f"/*0010*/ {line} ;" for line in lines)
    monkeypatch.setattr(slots.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text))
    constants = {"BN": 32, "BK": 128, "K": 256, "ROWS": 8, "KIND": 0, "USE": linear.GATE}
    counted = slots.slots_per_weight(KernelCase("x", linear.linear_kernel, {"x": "*bf16"}, constants), b"")
    assert counted == (8 + 0.5 * (16 + 4 + 1 + 1) + 1) * 128 / (2 * 32 * 256)
    assert slots.slots_per_weight(KernelCase("x", None, {}, {}), b"") is None


def test_the_samplers_do_not_add_up_in_memory(kernels):
    """Many tokens share a digit: programs that added to one address would wait for each other."""
    samplers = {name: ptx for name, (*_, ptx, _) in kernels.items() if "search" in name or "draw" in name}
    assert len(samplers) > 3
    assert not any(re.search(r"\b(atom|red)\.", ptx) for ptx in samplers.values())


def loaded_parameters(ptx):
    """Numbers of the kernel's parameters that addresses of global loads come from."""
    sources, loaded = {}, set()
    for line in ptx.splitlines():
        operands = re.findall(r"%[a-z]+\d+", line)
        if parameter := re.search(r"ld\.param\S*\s+(%\w+), \[\w+_param_(\d+)\]", line):
            sources[parameter[1]] = {parameter[2]}
        elif "ld.global" in line:
            [address] = re.findall(r"\[ ?(%\w+)", line)
            loaded |= sources.get(address, set())
        elif operands and "prefetch" not in line:
            inherited = set().union(*(sources.get(register, set()) for register in operands[1:]))
            sources[operands[0]] = inherited
    return loaded


def test_loads_are_traced_to_parameters():
    ptx = """
    ld.param.b64 \t%rd1, [kernel_param_0];
    ld.param.b64 \t%rd2, [kernel_param_3];
    mad.wide.s32 \t%rd4, %r1, 2, %rd2;
    @%p1 ld.global.b32 { %r7 }, [ %rd4 + 0 ];
    """
    assert loaded_parameters(ptx) == {"3"}
    assert loaded_parameters(ptx.replace("[ %rd4", "[ %rd1")) == {"0"}


def test_every_step_of_every_format_is_a_case():
    for capability, is_dependent in (((8, 0), False), ((9, 0), True)):
        cases = compile_cases(capability)
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        for part in ("qkv", "output", "gate_up", "down", "vocabulary", "vocabulary and logits"):
            assert {f"{part}, {s}, {f}, {r} rows" for s in ("0.6b", "8b") for f in FORMATS for r in (1, 8)} <= set(
                names
            )
        assert all(case.constants.get("ROWS", 2) >= 2 for case in cases)  # see `columns_of`
        cases = [case for case in cases if not case.name.startswith("chunk")]  # of prompts
        assert all(case.constants["DEPENDENT"] == is_dependent for case in cases)
        assert all(case.options.get("launch_pdl", False) == is_dependent for case in cases)
