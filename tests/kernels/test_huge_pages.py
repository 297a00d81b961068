"""Weights and caches in huge pages: contents, addresses, and which pages are asked for."""

import re
import sys
from pathlib import Path

import pytest
import torch

from qwen3fast.kernels.cpu import huge_pages
from qwen3fast.kernels.cpu.huge_pages import HUGE_PAGE, use_huge_pages, whole_pages

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")


@pytest.mark.parametrize(
    ("allocations", "pages"),
    [
        ([(0.5, 1.5)], []),
        ([(0.25, 1), (1, 3.5)], [(1, 3)]),
        ([(1.5, 2), (1, 1.499)], [(1, 2)]),
        ([(0, 0.5), (0.51, 1)], []),
        ([(0, 1), (2, 3), (2, 3)], [(0, 1), (2, 3)]),
        ([(0, 4), (1, 2), (4, 5)], [(0, 5)]),
    ],
    ids=["between two pages", "side by side", "small gap", "large gap", "twice", "one inside another"],
)
def test_pages_are_whole_and_span_neighbors(allocations, pages):
    found = whole_pages((int(begin * HUGE_PAGE), int(end * HUGE_PAGE)) for begin, end in allocations)
    assert found == [(begin * HUGE_PAGE, end * HUGE_PAGE) for begin, end in pages]


def test_tensors_on_other_devices_are_left_alone():
    assert use_huge_pages([torch.empty(8 * HUGE_PAGE, device="meta")]) == 0


@linux_only
def test_contents_and_addresses_stay():
    tensors = [torch.arange(HUGE_PAGE), torch.ones(3)]
    before, addresses = [x.clone() for x in tensors], [x.data_ptr() for x in tensors]
    use_huge_pages(tensors)
    assert [x.data_ptr() for x in tensors] == addresses
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


@linux_only
def test_result_tells_what_the_system_did():
    tensor = torch.ones(8 * HUGE_PAGE, dtype=torch.uint8)
    moved = use_huge_pages([tensor])
    in_huge_pages = re.search(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    assert moved % HUGE_PAGE == 0
    assert moved <= int(in_huge_pages[1]) * 1024


@linux_only
def test_switch_leaves_memory_alone(monkeypatch):
    monkeypatch.setenv(huge_pages.VARIABLE, "0")
    assert use_huge_pages([torch.ones(8 * HUGE_PAGE, dtype=torch.uint8)]) == 0
    monkeypatch.setenv(huge_pages.VARIABLE, "off")
    with pytest.raises(ValueError, match="QWEN3FAST_HUGE_PAGES must be '1' or '0', or unset, got 'off'"):
        use_huge_pages([])


@linux_only
def test_whole_pages_inside_the_tensor_are_asked_for_and_counted(monkeypatch):
    """With a system that moves all pages except the last one it is asked for."""
    calls = []

    class System:
        def __init__(self, name):
            pass

        def madvise(self, address, size, advice):
            calls.append((address.value, size.value, advice))
            return -1 if len(calls) == 4 else 0

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", System)
    first, second = (torch.zeros(4 * HUGE_PAGE, dtype=torch.uint8) for _ in range(2))
    monkeypatch.setattr(huge_pages, "MAX_GAP", -1)  # the tensors may lie side by side
    moved = use_huge_pages([first, second])
    assert [advice for *_, advice in calls] == [huge_pages.MADV_HUGEPAGE, huge_pages.MADV_COLLAPSE] * 2
    for (begin, size, _), tensor in zip(calls[::2], sorted((first, second), key=torch.Tensor.data_ptr), strict=True):
        assert begin % HUGE_PAGE == size % HUGE_PAGE == 0 and size >= 3 * HUGE_PAGE
        assert tensor.data_ptr() <= begin and begin + size <= tensor.data_ptr() + tensor.nbytes
    assert moved == calls[1][1]
