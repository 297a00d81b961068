"""tools/compile_for_gpu/emulator: single instructions, and the faults that it must not let pass."""

import numpy as np
import pytest
import torch
from cuda_static import kernel_checks  # noqa: F401  which skips without Triton

from compile_for_gpu.emulator.device import run_grid  # isort: skip  needs Triton
from compile_for_gpu.emulator.memory import GlobalMemory  # isort: skip
from compile_for_gpu.emulator.numbers import decode, encode  # isort: skip
from compile_for_gpu.emulator.program import EmulatorError  # isort: skip

THREADS = 64
KERNEL = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.reqntid 64
{
    .reg .b32 %r<9>;
    .loc 1 2 3 // of the source
$L__func_begin0:
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    cvt.u64.u32 %rd3, %r2;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    ld.global.b32 { %r3 }, [ %rd4 + 0 ];
BODY
    st.global.b32 [ %rd5 + 0 ], { %r4 };
    ret;
}
"""


def run(body, x=None):
    """The numbers that 64 threads store from %r4, each having loaded one of x into %r3."""
    memory = GlobalMemory()
    x = np.arange(THREADS, dtype=np.uint32) if x is None else x
    result = memory.reserve(4 * THREADS)
    run_grid(KERNEL.replace("BODY", body), (1, 1, 1), 1024, memory, [memory.place(x, is_constant=True), result])
    return memory.read(result, 4 * THREADS).view(np.uint32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mad.lo.s32 %r4, %r3, -3, 7;", lambda i: 7 - 3 * i),
        ("mul.hi.s32 %r4, %r3, -1;", lambda i: -1 if i else 0),
        ("shr.u32 %r4, %r3, 40;", lambda i: 0),
        ("div.u32 %r4, %r3, 7;", lambda i: i // 7),
        ("sub.s32 %r5, %r3, 40;\ndiv.s32 %r4, %r5, 7;", lambda i: int((i - 40) / 7)),
        ("sub.s32 %r5, %r3, 40;\nrem.s32 %r4, %r5, 7;", lambda i: (i - 40) - 7 * int((i - 40) / 7)),
        ("cvt.rn.f32.u32 %r5, %r3;\ncvt.sat.f32.f32 %r6, %r5;\ncvt.rzi.s32.f32 %r4, %r6;", lambda i: min(i, 1)),
        ("mov.b32 %r5, 0f3F800000;\nmov.b32 %r6, 0fB3000000;\nfma.rm.f32 %r4, %r5, %r5, %r6;", lambda i: 0x3F7FFFFF),
        ("bfe.s32 %r4, %r3, 1, 3;", lambda i: (i >> 1 & 7) - 8 * (i >> 3 & 1)),
        ("prmt.b32 %r4, %r3, 0x80, 0x1C00U;", lambda i: i | i << 8 | 0xFF0000),
        ("lop3.b32 %r4, %r3, 12, 10, 0xEA;", lambda i: (i & 12) | 10),
        ("shfl.sync.bfly.b32 %r4, %r3, 5, 31, -1;", lambda i: i ^ 5),
        ("shfl.sync.up.b32 %r4, %r3, 2, 0, -1;", lambda i: i - 2 if i % 32 >= 2 else i),
        ("redux.sync.add.s32 %r4, %r3, -1;", lambda i: 16 * 31 + 32 * 32 * (i // 32)),
        ("{\n.reg .b32 a;\nadd.s32 a, %r3, 1;\n}\n{\n.reg .b32 a;\nmov.b32 a, %r3;\nmov.b32 %r4, a;\n}", lambda i: i),
        ("cvt.rn.f32.u32 %r5, %r3;\ncvt.rzi.s32.f32 %r4, %r5;", lambda i: i),
        ("setp.lt.s32 %p1, %r3, 40;\nselp.b32 %r5, 1, %r8, %p1;\nselp.b32 %r4, %r5, 2, %p1;", lambda i: 1 + (i >= 40)),
        ("mov.b32 { %rs1, %rs2 }, %r3;\nmov.b32 %r4, { %rs2, %rs1 };", lambda i: i << 16),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_instructions_compute(body, expected):
    assert run(body).view(np.int32).tolist() == [expected(i) for i in range(THREADS)]


def test_threads_go_different_ways_and_meet_again():
    body = """
    mov.b32 %r4, 5;
    setp.lt.s32 %p1, %r3, 40;
    @%p1 bra $L__BB0_2;
    add.s32 %r4, %r4, %r3;
$L__BB0_2:
    add.s32 %r4, %r4, 1;"""
    assert run(body).tolist() == [6 if i < 40 else 6 + i for i in range(THREADS)]


def test_blocks_have_memory_and_ways_of_their_own():
    """The second of three blocks ends early; the others meet at barriers of their own."""
    body = """
    mov.u32 %r8, %ctaid.x;
    mul.lo.s32 %r7, %r8, 256;
    cvt.u64.u32 %rd6, %r7;
    add.s64 %rd5, %rd5, %rd6;
    mov.b32 %r4, 7;
    setp.eq.s32 %p1, %r8, 1;
    @%p1 bra $L__BB0_2;
    add.s32 %r5, %r3, %r8;
    mov.b32 %r6, global_smem;
    add.s32 %r6, %r6, %r2;
    st.shared.b32 [ %r6 + 0 ], %r5;
    bar.sync 0;
    xor.b32 %r6, %r6, 128;
    ld.shared.b32 %r4, [%r6];
$L__BB0_2:"""
    memory = GlobalMemory()
    x, result = memory.place(np.arange(THREADS, dtype=np.uint32), is_constant=True), memory.reserve(12 * THREADS)
    run_grid(KERNEL.replace("BODY", body), (3, 1, 1), 256, memory, [x, result])
    first, second, third = memory.read(result, 12 * THREADS).view(np.uint32).reshape(3, THREADS).tolist()
    other = [i ^ 32 for i in range(THREADS)]
    assert (first, second, third) == (other, [7] * THREADS, [i + 2 for i in other])


SHARED = "mov.b32 %r5, global_smem;\nadd.s32 %r6, %r5, %r2;\nst.shared.b32 [ %r6 + 0 ], %r3;\nxor.b32 %r7, %r6, 128;\n"


def test_copies_without_a_group_arrive_when_all_are_waited_for():
    copy = "cp.async.ca.shared.global [%r6+0], [%rd1+0], 0x4;\ncp.async.wait_all;\n"
    assert run(f"{SHARED}{copy}ld.shared.b32 %r4, [%r6];").tolist() == [0] * THREADS


def test_other_warps_writes_are_there_after_a_barrier():
    assert run(f"{SHARED}bar.sync 0;\nld.shared.b32 %r4, [%r7];").tolist() == [i ^ 32 for i in range(THREADS)]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("frob.b32 %r4, %r3;", "unknown instruction, at: frob"),
        ("add.sat.s32 %r4, %r3, 1;", "unknown instruction, at: add.sat"),
        ("cvt.sat.s8.s32 %r4, %r3;", "unknown instruction, at: cvt.sat"),
        ("mov.b64 %rd6, 0;\nfma.rm.f64 %rd6, %rd6, %rd6, %rd6;", "unknown instruction, at: fma.rm"),
        ("add.s32 %r4, %r8, 1;", "%r4 depends on a register that nothing wrote"),
        ("setp.lt.s32 %p1, %r8, 1;\n@%p1 bra $L__BB0_2;\n$L__BB0_2:", "%p1 depends on a register that nothing wrote"),
        ("setp.lt.s32 %p1, %r3, 40;\n@%p1 mov.b32 %r4, 1;", "%r4 depends on a register that nothing wrote"),
        ("ld.global.b32 %r4, [ %rd4 + 4 ];", "outside of the buffers"),
        ("ld.global.b32 %r4, [ %rd4 + -4 ];", "outside of the buffers"),
        ("ld.global.b32 %r4, [ %rd4 + 1 ];", "not aligned"),
        ("ld.global.b32 %r4, [ %rd5 + 0 ];", "read of memory that nothing wrote"),
        ("st.global.b32 [ %rd4 + 0 ], %r3;", "write to a constant"),
        ("st.global.b32 [ %rd5 + 4 ], %r3;", "outside of the buffers"),
        ("mov.b32 %r5, global_smem;\nld.shared.b32 %r4, [%r5];", "shared memory that nothing wrote"),
        ("mov.b32 %r5, global_smem;\nst.shared.b32 [%r5+1024], %r3;", "outside of the buffers"),
        (f"{SHARED}ld.shared.b32 %r4, [%r7];", "that another warp writes, without a barrier"),
        (f"{SHARED}ld.shared.b32 %r4, [%r6];\nst.shared.b32 [%r7], %r3;", "that another warp reads, without"),
        (f"{SHARED}st.shared.b32 [%r7], %r3;", "write to shared memory that another warp writes"),
        (f"{SHARED}cp.async.ca.shared.global [%r6+0], [%rd4+0], 0x4;\nld.shared.b32 %r4, [%r6];", "on its way"),
        ("setp.lt.s32 %p1, %r3, 40;\n@%p1 shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;", "not all threads"),
        ("setp.lt.s32 %p1, %r3, 40;\n@%p1 bra $L__BB0_2;\nbar.sync 0;\n$L__BB0_2:\nmov.b32 %r4, 1;", "not all threads"),
        ("cp.async.ca.shared.global [%r2+0], [%rd4+0], 0x4;\nld.shared.b32 %r4, [%r2];", "that nothing wrote"),
        ("st.global.b32 [ %rd5 + 0 ], %r3;\ngriddepcontrol.wait;", "before waiting for the previous kernel"),
    ],
    ids=lambda text: text.partition("\n")[0],
)
def test_faults_are_errors(body, error):
    with pytest.raises(EmulatorError, match=error):
        run(body)


def test_numbers_are_those_of_pytorch():
    rng = np.random.default_rng(0)
    bits = rng.integers(2**32, size=4096, dtype=np.uint64)
    bits[:8] = [0, 1, 0x7F7F8000, 0x3F808000, 0x3F818000, 0x80000001, 0x7F7FFFFF, 0xFF800000]
    single = decode(bits, "f32")
    tensor = torch.from_numpy(single.copy())
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        with np.errstate(all="ignore"):
            ours, theirs = decode(encode(single, kind), kind), tensor.to(dtype).double().numpy()
        np.testing.assert_array_equal(ours, theirs)
    byte = np.arange(256, dtype=np.uint64)
    np.testing.assert_array_equal(
        decode(byte, "e4m3"), torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    )


def test_sums_in_bfloat16_are_rounded_once():
    """1 + 2^-8 + 2^-40 is just above the middle of two numbers; rounded to float32 first, it would be the middle."""
    assert decode(encode(np.array([1 + 2**-8 + 2**-40]), "bf16"), "bf16") == 1 + 2**-7
