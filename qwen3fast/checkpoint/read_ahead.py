"""Read weights ahead: a thread brings the files into memory while compilers are imported and compile."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np

MADV_POPULATE_READ = 22  # of Linux; Python has no name for it yet


def read_ahead(files: list[Path]) -> None:
    """Start a thread that reads files in order, on Linux.

    Without it, mapped pages are read when each is first touched, in small pieces. Files that would fill more than half
    of the memory are left alone: their pages would evict each other.
    """
    if sys.platform != "linux":
        return
    if sum(file.stat().st_size for file in files) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
        threading.Thread(target=populate, args=(files,), name="qwen3fast-read-ahead", daemon=True).start()


def populate(files: list[Path]) -> None:
    """Have the system read all pages of each file, in one call per file that does not hold Python's lock.

    POSIX_FADV_WILLNEED would read no more than the device's readahead per call, and a loop over it would wait for the
    lock each time.
    """
    with suppress(OSError, ValueError, AttributeError):  # only advice: systems before Linux 5.14 refuse it
        madvise = ctypes.CDLL(None).madvise
        for file in files:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                pages = np.frombuffer(mapped, np.uint8)
                madvise(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.size), MADV_POPULATE_READ)
                del pages
