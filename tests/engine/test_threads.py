"""Counting cores, and PyTorch's number of threads."""

import pytest
import torch

from qwen3fast import Generator
from qwen3fast.engine import threads
from qwen3fast.engine.threads import num_cores, use_threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Eight hardware threads on four cores: CPU n and n + 4 are one core."""
    for cpu in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(8)))
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    return tmp_path


@pytest.fixture(autouse=True)
def restore_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_hardware_threads_of_one_core_count_once(machine):
    assert num_cores(machine) == 4


def test_affinity_counts(machine, monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: {0, 4, 5})
    assert num_cores(machine) == 2


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("?", 4)]
)
def test_container_limit_counts(machine, limit, cores):
    (machine / "fs/cgroup/cpu.max").write_text(limit + "\n")
    assert num_cores(machine) == cores


def test_hidden_topology_counts_every_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: {0, 1, 2})
    assert num_cores(tmp_path) == 3


def test_default_leaves_pytorch_with_one_thread_a_core(monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(6)))
    monkeypatch.setattr(threads, "num_cores", lambda: 3)
    torch.set_num_threads(6)  # PyTorch's own choice
    use_threads()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("chosen", [1, 5])
def test_default_respects_a_choice(monkeypatch, chosen):
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(6)))
    monkeypatch.setattr(threads, "num_cores", lambda: 3)
    torch.set_num_threads(chosen)
    use_threads()
    assert torch.get_num_threads() == chosen
    torch.set_num_threads(6)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    use_threads()
    assert torch.get_num_threads() == 6


def test_generator_takes_threads():
    with Generator.from_pretrained("tiny", compile=False, max_seq_len=128, threads=1):
        assert torch.get_num_threads() == 1
    before = torch.get_num_threads()
    for bad in (0, -1, 10**6, 2**70, "2", 1.0, True, [1], float("nan")):
        with pytest.raises(ValueError, match="threads must be an integer from 1 to"):
            Generator.from_pretrained("tiny", threads=bad)
    assert torch.get_num_threads() == before
