"""benchmarks/moe.py compares what it says it does, and its table is made from its record."""

import sys
from pathlib import Path

import pytest
import torch
from update_readme import render

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import moe as benchmark


@pytest.mark.parametrize("num_experts", [8, 32, 128])
def test_dense_models_are_as_large_as_what_they_stand_for(num_experts):
    mixture, active, whole = (benchmark.config_of(name, num_experts, 3) for name in benchmark.MODELS)
    routers = 3 * mixture.hidden_size * num_experts
    assert active.num_parameters - whole.num_parameters == mixture.decode_parameters - (
        mixture.num_parameters - mixture.vocab_size * mixture.hidden_size
    )
    assert active.decode_parameters == mixture.decode_parameters - routers
    assert whole.num_parameters == mixture.num_parameters - routers


def test_a_record_becomes_a_table():
    steps = {"experts": [0.002, 0.004], "dense_active": [0.002, 0.002], "dense_all": [0.02, 0.06]}
    sizes = {"parameters": 2_000_000_000, "read_parameters": 300_000_000, "read_bytes": 10}
    models = {name: {**sizes, "step_s": step_s} for name, step_s in steps.items()}
    case = benchmark.with_ratios({"format": "int4", "num_experts": 64, "models": models})
    environment = {"cpu": "a processor", "threads": 2, "torch": torch.__version__}
    record = {"suite": "moe", "cases": [case], "environment": environment, "bandwidth_gb_s": 40}
    table = render(record | {"run": {"utc": "2026-01-01T00:00:00Z"}})
    assert "| int4, 64 |" in table.replace("  ", "") and "2,000 million" in table
    assert "3.00 ms" in table and "1.50x" in table and "12.50x" in table
    assert "memory reads at 40 GB/s" in table
