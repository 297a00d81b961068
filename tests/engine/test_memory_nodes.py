"""Weights and caches over memory nodes: which nodes are used, what Linux is asked, and that refusals cost nothing.

Linux takes its calls on a machine with one node as well: node 0 twice stands for two nodes.
"""

import ctypes
import platform
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from qwen3fast import Generator
from qwen3fast.engine import memory_nodes
from qwen3fast.engine.memory_nodes import MAX_NODES, MPOL_INTERLEAVE, MPOL_PREFERRED, NUMBERS, interleave, usable_nodes
from qwen3fast.kernels.cpu.huge_pages import HUGE_PAGE, whole_pages

MAPPINGS = Path("/proc/self/numa_maps")
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
FIRST_NODE = (1).to_bytes(MAX_NODES // 8, "little")


@pytest.fixture
def two_nodes(monkeypatch):
    """Node 0, twice."""
    if sys.platform != "linux" or platform.machine() not in NUMBERS or memory_nodes._policy() != (0, 0):
        pytest.skip("the system does not tell of policies of memory, or one has been chosen")
    if not MAPPINGS.exists():
        pytest.skip("the system does not tell where memory lies")
    monkeypatch.setattr(memory_nodes, "usable_nodes", lambda: [0, 0])


def filled():
    """A tensor, and the huge pages in it."""
    tensor = torch.arange(HUGE_PAGE)
    return tensor, whole_pages([(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)])[0]


def policy_at(address):
    for line in MAPPINGS.read_text("ascii", "replace").splitlines():
        start, policy = line.split()[:2]
        if int(start, 16) <= address:
            found = policy
    return found


@pytest.mark.parametrize(
    ("cpus", "allowed", "expected"),
    [
        ({0, 1, 2, 3}, 0b10001, [0, 4]),
        ({0, 1}, 0b10001, [0]),
        ({0, 1, 2, 3}, 0b10000, [4]),
        ({0, 1, 2, 3}, None, [0, 4]),
    ],
    ids=["all", "bound to CPUs of one", "one is closed", "not told"],
)
def test_nodes_are_those_of_usable_cpus_and_open_memory(tmp_path, monkeypatch, cpus, allowed, expected):
    for cpu in range(4):
        (tmp_path / f"devices/system/cpu/cpu{cpu}/node{cpu // 2 * 4}").mkdir(parents=True)
    monkeypatch.setattr(memory_nodes, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(memory_nodes, "_policy", lambda flags: (-1, 0) if allowed is None else (flags - 4, allowed))
    assert usable_nodes(tmp_path) == expected


def test_memory_is_interleaved_with_the_same_contents(two_nodes):
    tensor, (begin, end) = filled()
    before, address = tensor.clone(), tensor.data_ptr()
    assert interleave([tensor]) == end - begin >= 6 * HUGE_PAGE
    assert policy_at(begin) == policy_at(end - 1) == "interleave:0"
    assert tensor.data_ptr() == address and torch.equal(tensor, before)


def test_each_huge_page_moves_to_the_next_node(two_nodes, monkeypatch):
    calls = []
    monkeypatch.setattr(memory_nodes, "usable_nodes", lambda: [1, 3])
    monkeypatch.setattr(memory_nodes, "_bind", lambda *arguments: calls.append(arguments) or True)
    tensor, (begin, end) = filled()
    interleave([tensor, torch.ones(3), torch.empty(HUGE_PAGE, device="meta")])
    pages = [page for page, policy, *_ in calls if policy == MPOL_PREFERRED]
    assert pages == list(range(begin, end, HUGE_PAGE))
    moves = [nodes for _, policy, nodes, *_ in calls if policy == MPOL_PREFERRED]
    assert moves[:4] in ([[1], [3]] * 2, [[3], [1]] * 2)
    assert calls[1::2] == [(page, MPOL_INTERLEAVE, [1, 3]) for page in pages]


def test_one_node_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory_nodes, "usable_nodes", lambda: [1])
    monkeypatch.setattr(memory_nodes, "_bind", None)  # calling it would fail
    assert interleave([filled()[0]]) == 0


def test_a_chosen_policy_is_left_alone(two_nodes):
    spread = []

    def run():  # a policy is one of a thread
        number, policy, size = (
            ctypes.c_long(x) for x in (SET_MEMPOLICY[platform.machine()], MPOL_INTERLEAVE, MAX_NODES)
        )
        assert ctypes.CDLL(None).syscall(number, policy, FIRST_NODE, size) == 0
        spread.append(interleave([tensor]))

    tensor, _ = filled()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert spread == [0]
    assert interleave([tensor]) > 0


@pytest.mark.parametrize("refused", NUMBERS.get(platform.machine(), ()))
def test_refusals_are_survived(two_nodes, monkeypatch, caplog, refused):
    class System:
        def __init__(self, *arguments, libc=ctypes.CDLL, **keywords):
            self.libc = libc(*arguments, **keywords)

        def syscall(self, number, *arguments):
            if number.value != refused:
                return self.libc.syscall(number, *arguments)
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(memory_nodes.ctypes, "CDLL", System)
    caplog.set_level("INFO")
    assert interleave([filled()[0]]) == 0
    assert re.search(r"not spread over nodes \[0, 0\]: Operation not permitted", caplog.text)


def test_spreading_ends_when_it_is_not_wanted_any_more(two_nodes):
    answers = iter([True, True, False])
    assert interleave([filled()[0]], lambda: next(answers)) == 2 * HUGE_PAGE


def test_switch_leaves_memory_alone(two_nodes, monkeypatch):
    monkeypatch.setenv(memory_nodes.VARIABLE, "0")
    assert interleave([filled()[0]]) == 0
    monkeypatch.setenv(memory_nodes.VARIABLE, "no")
    # At once, not in the thread that moves memory.
    with pytest.raises(ValueError, match="QWEN3FAST_INTERLEAVE must be '1' or '0', or unset, got 'no'"):
        Generator.from_pretrained("tiny", dtype="bfloat16", compile=True)


def test_warmup_interleaves_weights_and_cache(two_nodes):
    options = {"max_seq_len": 4096, "max_batch_size": 4}
    with Generator.from_pretrained("tiny", device="cpu", compile=False, **options) as generator:
        generator.warmup()
        cache = next(iter(generator.debug.engine.cache.tensors())).untyped_storage()
        pages = whole_pages([(cache.data_ptr(), cache.data_ptr() + cache.nbytes())])
        assert pages and policy_at(pages[0][0]) == "interleave:0"
