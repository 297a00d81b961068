"""Weights and caches in huge pages: contents, addresses, and which pages are asked for."""

import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwen3fast import Generator, load_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.kernels.cpu import huge_pages
from qwen3fast.kernels.cpu.huge_pages import HUGE_PAGE, use_huge_pages, whole_pages

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
copies_files = pytest.mark.skipif(not huge_pages.is_enabled(), reason="the system gives no huge pages")
SMALL = 4096  # bytes: pages of this size stand for huge ones where models are small


@pytest.fixture
def mapped(tmp_path):
    """Tensors that are mapped from a file, of numbers 0, 1, 2, ..., and the file."""
    numbers = torch.arange(6 * HUGE_PAGE // 8)
    save_file({"first": numbers, "second": numbers[:7] + 1}, file := tmp_path / "numbers.safetensors")
    with safe_open(file, "pt") as tensors:
        yield [tensors.get_tensor("first"), tensors.get_tensor("second")], file


def mapped_from_files(tensors):
    """The bytes of tensors that lie in pages of files."""
    files = list(huge_pages.private_files())
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
    return sum(max(0, min(e, end) - max(b, begin)) for b, e in spans for begin, end in files)


def refusing(name, libc=huge_pages.ctypes.CDLL):
    """C's library whose function `name` always fails."""

    class System:
        def __init__(self, library):
            self.libc = libc(library)

        def __getattr__(self, asked):
            if asked == name:
                return lambda *arguments: huge_pages.ctypes.c_void_p(-1).value if "map" in name else -1
            return getattr(self.libc, asked)

    return System


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


@copies_files
def test_mapped_files_become_memory_of_the_process(mapped):
    tensors, file = mapped
    stored, addresses = file.read_bytes(), [x.data_ptr() for x in tensors]
    tensors[0][-1] = -5  # written to the process's own page, not to the file
    before = [x.clone() for x in tensors]
    if mapped_from_files(tensors) < tensors[0].nbytes:
        pytest.skip("this version of safetensors copies")
    moved = use_huge_pages(tensors, lambda: 100 * HUGE_PAGE)
    assert moved >= 5 * HUGE_PAGE and moved % HUGE_PAGE == 0
    assert [x.data_ptr() for x in tensors] == addresses
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert mapped_from_files(tensors) <= 2 * HUGE_PAGE  # where no whole page fits
    assert file.read_bytes() == stored
    file.write_bytes(b"0" * len(stored))
    inner = slice(2 * HUGE_PAGE // 8, 4 * HUGE_PAGE // 8)
    assert torch.equal(tensors[0][inner], before[0][inner])
    assert use_huge_pages(tensors) == moved  # nothing is left to copy


@copies_files
def test_other_threads_read_the_same_numbers_while_files_are_copied(mapped, monkeypatch):
    tensors, _ = mapped
    monkeypatch.setattr(huge_pages, "PIECE", HUGE_PAGE)
    expected, stop, wrong = tensors[0].clone(), threading.Event(), []

    def read():
        while not stop.is_set():
            wrong.append(not torch.equal(tensors[0], expected))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while len(wrong) < 2:
            pass
        assert use_huge_pages(tensors) > 0
        seen = len(wrong)
        while len(wrong) < seen + 2:
            pass
    finally:
        stop.set()
        reader.join()
    assert not any(wrong)


@copies_files
@pytest.mark.parametrize("free", [6 * HUGE_PAGE, 0])
def test_files_stay_where_memory_is_short(mapped, free):
    tensors, _ = mapped
    before = mapped_from_files(tensors)
    use_huge_pages(tensors, lambda: free)
    assert mapped_from_files(tensors) == before


@copies_files
def test_copying_ends_when_another_process_takes_the_memory(mapped, monkeypatch):
    tensors, _ = mapped
    before, expected, asked = mapped_from_files(tensors), tensors[0].clone(), []
    monkeypatch.setattr(huge_pages, "PIECE", HUGE_PAGE)

    def free_bytes():
        asked.append(None)
        return (12 if len(asked) < 4 else 3) * HUGE_PAGE  # first for all, then for the next piece

    assert use_huge_pages(tensors, free_bytes) == 2 * HUGE_PAGE
    assert mapped_from_files(tensors) == before - 2 * HUGE_PAGE
    assert torch.equal(tensors[0], expected)


@copies_files
@pytest.mark.parametrize("function", ["mmap", "mremap"])
def test_files_stay_where_the_system_refuses_memory(mapped, monkeypatch, function):
    tensors, _ = mapped
    before, expected = mapped_from_files(tensors), tensors[0].clone()
    used = len(huge_pages.MAPPINGS.read_text().splitlines())
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", refusing(function))
    assert use_huge_pages(tensors) == 0
    assert mapped_from_files(tensors) == before and torch.equal(tensors[0], expected)
    assert len(huge_pages.MAPPINGS.read_text().splitlines()) <= used + 2  # no memory is left behind


@linux_only
@pytest.mark.parametrize(
    ("text", "expected"),
    [("[always] madvise never", True), ("always [madvise] never", True), ("always [never]", False)],
)
def test_files_are_copied_only_where_the_system_gives_huge_pages(mapped, monkeypatch, tmp_path, text, expected):
    tensors, _ = mapped
    before = mapped_from_files(tensors)
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", refusing("madvise"))
    assert (use_huge_pages(tensors) > 0) == expected
    assert (mapped_from_files(tensors) < before) == expected


def test_a_system_without_the_setting_gives_no_huge_pages(monkeypatch, tmp_path):
    monkeypatch.setattr(huge_pages, "ENABLED", tmp_path / "enabled")
    assert not huge_pages.is_enabled()


def test_mappings_of_files_that_the_process_may_write_are_found(monkeypatch, tmp_path):
    text = """\
1000-2000 rw-p 00000000 fe:00 77                   /a file with spaces.safetensors
2000-3000 r--s 00000000 fe:00 77                   /shared
3000-4000 rw-s 00000000 fe:00 77                   /written by others
4000-5000 rw-p 00000000 00:00 0
5000-6000 r-xp 00000000 fe:00 78                   /program
6000-7000 rw-p 00001000 fe:00 79                   /deleted (deleted)
"""
    (tmp_path / "maps").write_text(text)
    monkeypatch.setattr(huge_pages, "MAPPINGS", tmp_path / "maps")
    assert list(huge_pages.private_files()) == [(0x1000, 0x2000), (0x6000, 0x7000)]


@copies_files
@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_saved_model_leaves_its_file_before_full_speed(monkeypatch, tmp_path, compile):
    monkeypatch.setattr(huge_pages, "HUGE_PAGE", SMALL)
    model = load_model("tiny", "cpu", dtype="bfloat16")
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", "cpu")
    weights = list(loaded.parameters())
    expected = [x.clone() for x in weights]
    before = mapped_from_files(weights)
    with Generator(loaded, max_seq_len=32, compile=compile) as generator:
        if compile == "auto":
            generator.warmup()
        assert mapped_from_files(weights) < before / 2
        assert all(torch.equal(x, y) for x, y in zip(weights, expected, strict=True))
