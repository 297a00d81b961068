"""Helpers for tests of Triton kernels; kernel_device.py chooses the device."""

import pytest
import torch
from cuda_static.program_order import watch_programs
from kernel_device import DEVICE

pytest.importorskip("triton", reason="the triton package is not installed")

# The largest difference from the reference, as a share of the reference's largest number. In bfloat16 the interpreter's
# matrix products are wrong, so only a GPU is tested in it.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if DEVICE == "cuda" else {})


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
