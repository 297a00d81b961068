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
