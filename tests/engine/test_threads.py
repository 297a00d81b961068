"""Counting cores, and PyTorch's number of threads."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from qwen3fast import Generator
from qwen3fast.engine import threads
from qwen3fast.engine.compile import FORMS_KEEP_THREADS
from qwen3fast.engine.threads import SparedThreads, num_cores, use_threads
from qwen3fast.kernels.cpu import load
from qwen3fast.model import memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Eight hardware threads on four cores: CPU n and n + 4 are one core."""
    for cpu in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(8)))
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(memory, "GROUP", tmp_path / "cgroup")
    return tmp_path


@pytest.fixture(autouse=True)
def restore_threads(monkeypatch):
    for variable in threads.CHOICES:
        monkeypatch.delenv(variable, raising=False)
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


@pytest.mark.parametrize(
    ("named", "files", "cores"),
    [
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("3:cpuset:/a", {"cpuset/a/cpu.cfs_quota_us": "100000", "cpuset/a/cpu.cfs_period_us": "100000"}, 4),
    ],
    ids=["a group above", "version 1", "version 1, without a limit", "another controller"],
)
def test_limits_of_the_process_s_own_control_groups_count(machine, named, files, cores):
    (machine / "cgroup").write_text(named)
    for name, text in files.items():
        (machine / "fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / "fs/cgroup" / name).write_text(text + "\n")
    assert num_cores(machine) == cores


def test_hidden_topology_counts_every_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: {0, 1, 2})
    assert num_cores(tmp_path) == 3


@pytest.fixture
def four_cores(monkeypatch):
    """Eight hardware threads on four cores, of which a quota allows two."""
    monkeypatch.setattr(threads, "usable_cpus", lambda: set(range(8)))
    monkeypatch.setattr(threads, "usable_cores", lambda: [frozenset({n, n + 4}) for n in range(4)])
    monkeypatch.setattr(threads, "num_cores", lambda: 2)


@pytest.mark.parametrize("number", [4, 8])
def test_the_number_that_pytorch_begins_with_is_limited_to_the_cores(number, four_cores):
    torch.set_num_threads(number)  # as PyTorch with MKL, and without
    use_threads()
    assert torch.get_num_threads() == 2


def test_the_default_is_not_raised(monkeypatch, four_cores):
    monkeypatch.setattr(threads, "num_cores", lambda: 6)
    torch.set_num_threads(4)
    use_threads()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("chosen", [1, 3, 5])
def test_default_respects_a_choice(chosen, four_cores):
    torch.set_num_threads(chosen)
    use_threads()
    assert torch.get_num_threads() == chosen


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_default_respects_a_variable(variable, monkeypatch, four_cores):
    torch.set_num_threads(8)
    monkeypatch.setenv(variable, "8")
    use_threads()
    assert torch.get_num_threads() == 8


def test_generator_takes_threads():
    with Generator.from_pretrained("tiny", compile=False, max_seq_len=128, threads=1):
        assert torch.get_num_threads() == 1
    before = torch.get_num_threads()
    for bad in (0, -1, 10**6, 2**70, "2", 1.0, True, [1], float("nan")):
        with pytest.raises(ValueError, match="threads must be an integer from 1 to"):
            Generator.from_pretrained("tiny", threads=bad)
    assert torch.get_num_threads() == before


def run_steps(spared, most, is_shared, steps):
    """The threads of each of some steps, of which those with more than `most` - 1 lose time if a core is shared."""
    used = []
    for _ in range(steps):
        used.append(max(1, most - spared.number))
        spared.note(0.7 if is_shared and used[-1] == most else 0.0, used[-1])
    return used


def test_a_thread_is_spared_while_a_core_is_shared():
    spared = SparedThreads()
    first, most = SparedThreads.STEPS
    used = run_steps(spared, 4, True, 20 * most)
    tried = [i for i, threads in enumerate(used) if threads == 4]
    assert used[:3] == [4, 4, 3] and set(used) == {3, 4}
    waits = [after - before - 1 for before, after in pairwise(tried) if after > before + 1]
    assert waits[:3] == [first, 2 * first, 4 * first] and max(waits) == waits[-1] == most
    assert run_steps(spared, 4, False, 3 * most)[-most:] == [4] * most
    assert run_steps(spared, 4, True, first + 3) == [4, 4, *[3] * first, 4]  # it is quick again


def test_one_slow_step_or_one_thread_spares_none():
    spared = SparedThreads()
    for lost in (0.9, 0.1) * 50:
        spared.note(lost, 2)
    assert spared.number == 0
    for _ in range(50):
        spared.note(0.9, 1)
    assert spared.number == 0


def test_more_threads_are_spared_one_by_one():
    spared = SparedThreads()
    for _ in range(4):
        spared.note(0.9, 4 - spared.number)
    assert spared.number == 2


# On one CPU, each of two threads is off it while the other computes. That it sleeps for a part of this does not count.
ON_ONE_CPU = """
import os, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from qwen3fast import Generator, SamplingParams
generator = Generator.from_pretrained("tiny", dtype="bfloat16", device="cpu", compile="auto", threads=2)
generator.debug.engine.compiler.end_auto()
spared = generator.debug.engine.parts.decode_layers.spared
used, note = [], spared.note
spared.note = lambda lost, threads: (used.append((threads, spared.LOST < lost <= 1)), note(lost, threads))
for _ in range(2):
    result = generator.generate("Once", SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    print([threads for threads, _ in used], all(is_slow for threads, is_slow in used if threads == 2))
    print(result.token_ids)
    used.clear()
"""


@pytest.mark.skipif(
    FORMS_KEEP_THREADS or not hasattr(threads.os, "sched_setaffinity") or not load(), reason="nothing to share"
)
def test_steps_on_a_shared_core_go_on_with_one_thread():
    run = subprocess.run([sys.executable, "-c", ON_ONE_CPU], capture_output=True, text=True, check=False, timeout=200)
    lines = run.stdout.splitlines()
    assert len(lines) == 4, run.stderr
    assert lines[0] == f"{[2, 2, *[1] * 6]} True" and lines[2] == f"{[1] * 8} True"
    assert lines[1] == lines[3]
