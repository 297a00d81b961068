"""Helpers for tests of Triton kernels; kernel_device.py chooses the device."""

import pytest
import torch
from conftest import random_tensor
from cuda_static.program_order import watch_programs
from kernel_device import DEVICE

pytest.importorskip("triton", reason="the triton package is not installed")

from qwen3fast.kernels.cuda.decode_step.weights import Weight
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.uint4 import Layout

EPS = 1e-6
LAYOUTS = {
    "uint4 with zero points": FORMATS["uint4"].with_layout(lambda _: Layout(32, has_zero=True)),
    "uint4 of Q4_K": FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True)),
    "fp8-block": FORMATS["fp8"].with_blocks(),
}

# The largest difference from the reference, as a share of the reference's largest number. In bfloat16 the interpreter's
# matrix products are wrong, so only a GPU is tested in it.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {})


def make_weight(kind, N, K, dtype, seed=1):
    """Return a weight for the kernels on the device, and what it stands for."""
    weight = random_tensor(N, K, seed=seed) * K**-0.5
    if kind == "plain":
        return Weight.of(weight.to(DEVICE, dtype), None, False), weight.to(dtype)
    format = LAYOUTS[kind] if kind in LAYOUTS else FORMATS[kind]
    packed = quantize(weight, format)
    return Weight.of(*(t.to(DEVICE) for t in packed), kind == "fp8"), format.dequantize(packed)


def norm_weight(size, dtype, seed=2):
    """Return the weight of a norm."""
    return (1 + 0.3 * random_tensor(size, seed=seed)).to(dtype)


def attention_case(dtype, heads, kv_heads, head_dim, positions, allocated, is_quantized):
    """Return the arguments of `attend` up to the cache; what is not in use is NaN, or has a scale of NaN (int8)."""
    B, shape = len(positions), (len(positions), kv_heads, allocated, head_dim)
    qkv = random_tensor(B, (heads + 2 * kv_heads) * head_dim).to(dtype)
    norms = [norm_weight(head_dim, dtype, seed) for seed in (1, 2)]
    angle = random_tensor(allocated, head_dim // 2, seed=3).repeat(1, 2)
    cache = [random_tensor(*shape, seed=seed) for seed in (4, 5)]
    scales = [None, None]
    if is_quantized:
        cache = [(30 * t).clamp(-127, 127).to(torch.int8) for t in cache]
        scales = [random_tensor(*shape[:3], seed=seed).abs() / 30 for seed in (6, 7)]
    else:
        cache = [t.to(dtype) for t in cache]
    for b, place in enumerate(positions):
        for t in scales if is_quantized else cache:
            t[b, :, max(place, 0) :] = torch.nan
    return [qkv, *norms, EPS, angle.cos(), angle.sin(), torch.tensor(positions), *cache, *scales]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within the tolerance of `dtype`; both in any dtype."""
    expected = expected.float().cpu()
    atol = TOLERANCES[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=0, atol=atol)


@pytest.fixture
def any_order(monkeypatch):
    """Programs run in a random order, and none may write where another does. (A GPU has an order of its own.)"""
    conflicts = watch_programs(monkeypatch) if DEVICE == "cpu" else []
    yield
    assert conflicts == []


@pytest.fixture
def empty_is_nan(monkeypatch):
    """Make new memory NaN: numbers that kernels do not write show."""
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)
