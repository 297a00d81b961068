"""Probes of the machine and its description."""

import pytest
import torch

from qwen3fast.bench import environment, probes
from qwen3fast.bench.probes import BandwidthProbe, GemmProbe, PeakMemory

CPU = torch.device("cpu")


def test_peak_memory_grows_with_what_is_held():
    memory = PeakMemory(CPU)
    memory.reset()
    before = memory.peak_bytes()
    if before is None:
        pytest.skip("this system does not tell the peak memory of a process")
    held = torch.ones(2**24, dtype=torch.float32)  # 64 MiB
    assert memory.peak_bytes() - before >= 0.9 * held.nbytes


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    def unknown(self, *_):
        raise OSError

    monkeypatch.setattr(probes.Path, "write_text", unknown)
    monkeypatch.setattr(probes.Path, "read_text", unknown)
    memory = PeakMemory(CPU)
    memory.reset()
    assert memory.peak_bytes() is None


def test_bandwidth_is_bytes_over_time(monkeypatch):
    monkeypatch.setitem(probes.PROBE_BYTES, "cpu", 4 * 10**6)
    times = iter([0.0, 0.001, 1.0, 1.004])
    monkeypatch.setattr(probes.time, "perf_counter", lambda: next(times))
    assert BandwidthProbe(CPU).measure(2) == pytest.approx(2.5)


def test_gemm_rate_is_two_for_each_weight_and_row(monkeypatch):
    times = iter([0.0, 1.0])
    probe = GemmProbe(CPU)
    monkeypatch.setattr(probes.F, "linear", lambda x, weight: None)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: next(times))
    assert probe.measure(1) == 8 * 2 * 512 * 1024 * 3072


def test_caches_are_those_of_the_first_processor(tmp_path):
    for i, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (3, "Unified", "36864K")]):
        folder = tmp_path / "cache" / f"index{i}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    (tmp_path / "cache" / "index9").mkdir()  # one that tells nothing
    assert environment._cpu_caches(tmp_path) == {"L1d": "48K", "L1i": "32K", "L3": "36864K"}
    assert environment._cpu_caches(tmp_path / "none") == {}


def test_environment_names_the_processor_and_the_versions():
    found = environment.describe_environment(CPU)
    assert found["device"] == "cpu" and found["threads"] == torch.get_num_threads()
    assert set("cpu cpu_count platform python torch qwen3fast cpu_caches".split()) <= found.keys()


def test_run_outside_of_git_has_no_commit(monkeypatch):
    monkeypatch.setattr(environment, "git", lambda *arguments: None)
    run = environment.describe_run("program")
    assert run["git_commit"] is None and run["git_dirty"] is None and run["command"].startswith("program")


def test_run_of_a_changed_tree_is_dirty(monkeypatch):
    answers = {"rev-parse": "abc", "status": " M file"}
    monkeypatch.setattr(environment, "git", lambda *arguments: answers[arguments[0]])
    assert (environment.describe_run()["git_commit"], environment.describe_run()["git_dirty"]) == ("abc", True)


def test_git_outside_of_a_repository_says_nothing(tmp_path):
    assert environment.git("rev-parse", "HEAD", folder=tmp_path) is None
