"""Weights and caches in huge pages: a step reads all of them, and each small page costs a look-up of its address."""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from qwen3fast.checks import checked_variable

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_HUGE_PAGES"
HUGE_PAGE = 2**21  # bytes, on x86-64 and on ARM with pages of 4 KiB
MAX_GAP = 2**13  # between two allocations that lie side by side: the allocator's header, and the end of a page
PIECE = 64 * HUGE_PAGE  # bytes of a file that are copied at once: so many more are in use meanwhile
MAX_SHARE = 0.75  # of the free memory that copies of files may take
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPPINGS = Path("/proc/self/maps")
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of Linux; the latter since 6.1
MREMAP_MAYMOVE, MREMAP_FIXED, MAP_FIXED_NOREPLACE = 1, 2, 0x100000
FAILED = ctypes.c_void_p(-1).value  # an address
_one_at_a_time = threading.Lock()  # engines may share weights

Range = tuple[int, int]  # addresses of the first byte and of the one after the last


def use_huge_pages(tensors: Iterable[Tensor], free_bytes: Callable[[], int | None] = lambda: None) -> int:
    """Have the system move the memory of tensors into huge pages (2 MiB), where it can; contents and addresses stay.

    Pages of files, which few systems can move, are copied into new memory at the same addresses, if enough is free:
    afterwards they are the process's own, no longer shared with other processes that map the file.
    Nothing happens on systems other than Linux, where the system refuses, and with QWEN3FAST_HUGE_PAGES=0. Other
    threads may read the tensors meanwhile, and write those that are not mapped from a file.
    free_bytes: returns the bytes of memory that can be allocated now; None for an unknown number.
    Returns: the number of bytes that were moved or copied.
    Raises: ValueError as `checked_variable`.
    """
    if checked_variable(VARIABLE) == "0" or sys.platform != "linux":
        return 0
    storages = [x.untyped_storage() for x in tensors if x.device.type == "cpu"]  # in use until the end
    with _one_at_a_time:
        moved = _move(whole_pages((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages), free_bytes)
    logger.info("%.2f GB moved to huge pages", moved / 1e9)
    return moved


def _move(pages: list[Range], free_bytes: Callable[[], int | None]) -> int:
    libc = ctypes.CDLL(None)
    moved, refused = 0, list[Range]()
    for begin, end in pages:
        address, size = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
        libc.madvise(address, size, MADV_HUGEPAGE)
        if libc.madvise(address, size, MADV_COLLAPSE) == 0:
            moved += end - begin
        else:
            refused.append((begin, end))
    if refused and is_enabled():
        files = list(private_files())
        moved += copy_files([common for one in refused for common in shared(one, files)], free_bytes)
    return moved


def whole_pages(allocations: Iterable[Range]) -> list[Range]:
    """Return the huge pages that allocations fill, as ranges of addresses; one may hold several allocations."""
    spans: list[Range] = []
    for begin, end in sorted(set(allocations)):
        if spans and begin - spans[-1][1] <= MAX_GAP:
            begin, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((begin, end))
    pages = ((-(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE) for begin, end in spans)
    return [(begin, end) for begin, end in pages if begin < end]


def is_enabled() -> bool:
    """Return whether the system gives huge pages, of the size that is assumed here, to memory that asks for them."""
    try:
        if int(_setting("hpage_pmd_size")) != HUGE_PAGE:
            return False
        own = f"hugepages-{HUGE_PAGE // 1024}kB/enabled"  # of this size; newer systems have a setting for each
        setting = _setting(own) if (SETTINGS / own).is_file() else "[inherit]"
        return "[never]" not in (_setting("enabled") if "[inherit]" in setting else setting)
    except (OSError, ValueError):
        return False


def _setting(name: str) -> str:
    return (SETTINGS / name).read_text(encoding="ascii")


def private_files() -> Iterator[Range]:
    """Yield the memory that is mapped from files, for this process alone to write."""
    try:
        lines = MAPPINGS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a sandbox without /proc
        return
    for line in lines:
        addresses, access, _, _, inode = line.split()[:5]
        if access == "rw-p" and inode != "0":
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)


def shared(pages: Range, others: Iterable[Range]) -> list[Range]:
    """Return the huge pages of a range that lie in one of the others."""
    common = [(max(pages[0], begin), min(pages[1], end)) for begin, end in others]
    return [pages for begin, end in common if begin < end for pages in whole_pages([(begin, end)])]


def copy_files(files: list[Range], free_bytes: Callable[[], int | None]) -> int:
    """Copy huge pages of mapped files into new memory, as long as a quarter of the free memory stays free.

    Nothing is copied if all of it would take more at first. free_bytes: is asked again before each piece, since other
    processes, such as further ranks, may copy theirs meanwhile.
    Returns: the number of bytes that were copied.
    """
    needed, free = sum(end - begin for begin, end in files), free_bytes()
    if free is not None and needed > MAX_SHARE * free:
        logger.info("%.2f GB of files stay in small pages: %.2f GB are free", needed / 1e9, free / 1e9)
        return 0
    copied = 0
    for begin, end in files:
        for start in range(begin, end, PIECE):
            size, left = min(PIECE, end - start), free_bytes()
            is_short = free is not None and left is not None and left - size < (1 - MAX_SHARE) * free
            if is_short or not copy(start, size):
                return copied
            copied += size
    return copied


def copy(start: int, size: int) -> bool:
    """Copy whole huge pages into new memory, which takes their place. Returns whether the system allowed it.

    start: the first address. size: in bytes.
    The system exchanges them at once: other threads read the same bytes before, after and meanwhile.
    """
    libc = ctypes.CDLL(None)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    nowhere = (-1, ctypes.c_size_t(0))  # no file, and no place in it
    room = libc.mmap(None, ctypes.c_size_t(size + HUGE_PAGE), protection, flags, *nowhere)
    if room == FAILED:
        return False
    end, new = room + size + HUGE_PAGE, -(-room // HUGE_PAGE) * HUGE_PAGE
    length, source, target = ctypes.c_size_t(size), ctypes.c_void_p(new), ctypes.c_void_p(start)
    unused = [(room, end)]
    try:
        libc.madvise(source, length, MADV_HUGEPAGE)
        libc.memmove(source, target, length)
        libc.madvise(source, length, MADV_COLLAPSE)  # where memory was in too small pieces at first
        is_moved = bool(libc.mremap(source, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, target) != FAILED)
        if is_moved:
            unused = [(room, new), (new + size, end)]
        elif (again := libc.mmap(target, length, protection, flags | MAP_FIXED_NOREPLACE, *nowhere)) == start:
            # The system had removed the file's pages before it ran out of memory. Otherwise they are still there.
            libc.memmove(target, source, length)
        elif again != FAILED:  # before Linux 4.17, at another address
            unused.append((again, again + size))
    finally:
        for first, last in unused:
            if first < last:
                libc.munmap(ctypes.c_void_p(first), ctypes.c_size_t(last - first))
    return is_moved
