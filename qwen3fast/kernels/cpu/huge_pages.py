"""Weights and caches in huge pages: a step reads all of them, and each small page costs a look-up of its address."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterable

from torch import Tensor

from qwen3fast.checks import checked_variable

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_HUGE_PAGES"
HUGE_PAGE = 2**21  # bytes, on x86-64 and on ARM with pages of 4 KiB
MAX_GAP = 2**13  # between two allocations that lie side by side: the allocator's header, and the end of a page
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of Linux; the latter since 6.1


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Have the system move the memory of tensors into huge pages (2 MiB), where it can; contents and addresses stay.

    Nothing happens on systems other than Linux, where the system refuses, and with QWEN3FAST_HUGE_PAGES=0. Other
    threads may read and write the tensors meanwhile.
    Returns: the number of bytes that lie in huge pages now.
    Raises: ValueError as `checked_variable`.
    """
    if checked_variable(VARIABLE) == "0" or sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    storages = (x.untyped_storage() for x in tensors if x.device.type == "cpu")
    moved = 0
    for begin, end in whole_pages((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        address, size = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
        madvise(address, size, MADV_HUGEPAGE)
        if madvise(address, size, MADV_COLLAPSE) == 0:
            moved += end - begin
    logger.info("%.2f GB in huge pages", moved / 1e9)
    return moved


def whole_pages(allocations: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the huge pages that allocations fill, as ranges of addresses; one may hold several allocations.

    allocations: the addresses of the first byte and of the one after the last.
    """
    spans: list[tuple[int, int]] = []
    for begin, end in sorted(set(allocations)):
        if spans and begin - spans[-1][1] <= MAX_GAP:
            begin, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((begin, end))
    pages = ((-(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE) for begin, end in spans)
    return [(begin, end) for begin, end in pages if begin < end]
