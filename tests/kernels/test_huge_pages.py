"""Weights and caches in huge pages: contents, addresses, and which pages are asked for."""

import ctypes
import mmap
import re
import sys
import threading
import time
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
SMALL = mmap.PAGESIZE  # pages of this size stand for huge ones where models are small
WAIT_S = 60


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Tensors that are mapped from a file, of numbers 0, 1, 2, ..., and the file. The system itself moves no page."""
    numbers = torch.arange(6 * HUGE_PAGE // 8)
    save_file({"first": numbers, "second": numbers[:7] + 1}, file := tmp_path / "numbers.safetensors")
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", refusing("madvise"))
    with safe_open(file, "pt") as tensors:
        found = [tensors.get_tensor("first"), tensors.get_tensor("second")]
    if mapped_from_files(found) < found[0].nbytes:
        pytest.skip("this version of safetensors copies")
    return found, file


def mapped_from_files(tensors):
    """The bytes of tensors that lie in pages of files."""
    files = list(huge_pages.private_files())
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
    return sum(max(0, min(e, end) - max(b, begin)) for b, e in spans for begin, end in files)


def refusing(*names, calls=(), libc=huge_pages.ctypes.CDLL):
    """C's library whose functions `names` always fail; `calls` gets the others' names and arguments."""

    class System:
        def __init__(self, library, **options):
            self.libc = libc(library, **options)

        def __getattr__(self, asked):
            if asked in names:
                return lambda *arguments: huge_pages.FAILED if "map" in asked else -1
            function = getattr(self.libc, asked)
            return Recorded(function, asked, calls) if isinstance(calls, list) else function

    return System


class Recorded:
    """A function of C whose calls are kept."""

    def __init__(self, function, name, calls):
        object.__setattr__(self, "_all", (function, name, calls))

    def __setattr__(self, name, value):
        setattr(self._all[0], name, value)

    def __call__(self, *arguments):
        function, name, calls = self._all
        result = function(*arguments)
        calls.append((name, [getattr(x, "value", x) for x in arguments], result))
        return result


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
    message = "QWEN3FAST_HUGE_PAGES must be '1' or '0', or unset, got 'off'"
    with pytest.raises(ValueError, match=message):
        use_huge_pages([])
    with pytest.raises(ValueError, match=message):  # at once, not in the thread that moves memory
        Generator.from_pretrained("tiny", dtype="bfloat16", compile=True)


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
    moved = use_huge_pages(tensors, lambda: 100 * HUGE_PAGE)
    assert moved in (4 * HUGE_PAGE, 5 * HUGE_PAGE)  # whole pages, wherever the file begins
    assert mapped_from_files(tensors) == sum(x.nbytes for x in tensors) - moved
    assert [x.data_ptr() for x in tensors] == addresses
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert file.read_bytes() == stored
    file.write_bytes(b"0" * len(stored))
    inner = slice(2 * HUGE_PAGE // 8, 4 * HUGE_PAGE // 8)
    assert torch.equal(tensors[0][inner], before[0][inner])
    assert use_huge_pages(tensors) == 0  # nothing is left to copy


@copies_files
def test_other_threads_read_the_same_numbers_while_files_are_copied(mapped, monkeypatch):
    tensors, _ = mapped
    monkeypatch.setattr(huge_pages, "PIECE", HUGE_PAGE)
    expected, before, stop, wrong = tensors[0].clone(), mapped_from_files(tensors), threading.Event(), []

    def read():
        while not stop.is_set():
            wrong.append(not torch.equal(tensors[0], expected))

    def wait_for_two_reads():
        seen, deadline = len(wrong), time.monotonic() + WAIT_S
        while len(wrong) < seen + 2:
            assert reader.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for_two_reads()
        use_huge_pages(tensors)
        wait_for_two_reads()
    finally:
        stop.set()
        reader.join()
    assert not any(wrong)
    assert mapped_from_files(tensors) <= before - 4 * HUGE_PAGE


@copies_files
@pytest.mark.parametrize("free", [5 * HUGE_PAGE, 0])
def test_files_stay_where_memory_is_short(mapped, free):
    tensors, _ = mapped
    before = mapped_from_files(tensors)
    assert use_huge_pages(tensors, lambda: free) == 0
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
    before, expected, calls = mapped_from_files(tensors), tensors[0].clone(), []
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", refusing("madvise", function, calls=calls))
    assert use_huge_pages(tensors) == 0
    assert mapped_from_files(tensors) == before and torch.equal(tensors[0], expected)
    taken = [
        (result, arguments[1]) for name, arguments, result in calls if name == "mmap" and result != huge_pages.FAILED
    ]
    assert [tuple(arguments) for name, arguments, _ in calls if name == "munmap"] == taken
    assert len(taken) == (function == "mremap")


@copies_files
def test_pages_that_the_system_removes_before_it_fails_are_written_again(mapped, monkeypatch):
    tensors, _ = mapped
    expected, libc = tensors[0].clone(), ctypes.CDLL(None)

    def remove(source, length, _, flags, target):
        assert libc.munmap(target, length) == 0
        return huge_pages.FAILED

    class System(refusing("madvise")):
        def __getattr__(self, asked):
            return remove if asked == "mremap" else super().__getattr__(asked)

    monkeypatch.setattr(huge_pages.ctypes, "CDLL", System)
    assert use_huge_pages(tensors) == 0
    assert torch.equal(tensors[0], expected)


@linux_only
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"enabled": "[always] madvise never"}, True),
        ({"enabled": "always [madvise] never"}, True),
        ({"enabled": "always madvise [never]"}, False),
        ({"enabled": "always [madvise] never", "own": "always inherit madvise [never]"}, False),
        ({"enabled": "always [madvise] never", "own": "always [inherit] madvise never"}, True),
        ({"enabled": "always madvise [never]", "own": "always [inherit] madvise never"}, False),
        ({"enabled": "always madvise [never]", "own": "[always] inherit madvise never"}, True),
        ({"enabled": "[always] madvise never", "hpage_pmd_size": 2**29}, False),
        ({}, False),
    ],
)
def test_files_are_copied_only_where_the_system_gives_huge_pages(mapped, monkeypatch, tmp_path, settings, expected):
    tensors, _ = mapped
    before = mapped_from_files(tensors)
    files = {"hpage_pmd_size": HUGE_PAGE} | settings
    files["hugepages-2048kB/enabled"] = files.pop("own", None)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if text is not None:
            (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    assert huge_pages.is_enabled() == expected
    assert (use_huge_pages(tensors) > 0) == expected
    assert (mapped_from_files(tensors) < before) == expected


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
    monkeypatch.setattr(huge_pages, "MAPPINGS", tmp_path / "missing")
    assert list(huge_pages.private_files()) == []


@copies_files
@pytest.mark.parametrize("compile", [True, "auto"])
def test_a_saved_model_leaves_its_file_before_full_speed(monkeypatch, tmp_path, compile):
    monkeypatch.setattr(huge_pages, "HUGE_PAGE", SMALL)
    monkeypatch.setattr(huge_pages, "is_enabled", lambda: True)
    model = load_model("tiny", "cpu", dtype="bfloat16")
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", "cpu")
    weights = list(loaded.parameters())
    expected = [x.clone() for x in weights]
    before = mapped_from_files(weights)
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", refusing("madvise"))
    with Generator(loaded, max_seq_len=32, compile=compile) as generator:
        if compile == "auto":
            generator.warmup()
        deadline = time.monotonic() + WAIT_S
        while mapped_from_files(weights) >= before / 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert all(torch.equal(x, y) for x, y in zip(weights, expected, strict=True))
