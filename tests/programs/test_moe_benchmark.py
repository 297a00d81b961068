"""benchmarks/moe.py compares what it says it does, and its table is made from its record."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3fast.bench.record import load_record
from qwen3fast.model.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
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


def test_every_model_is_checked_and_timed_in_turns(monkeypatch, tmp_path, one_thread):
    output = tmp_path / "moe.json"
    options = ["--formats", "bf16", "--experts", "8", "--layers", "1", "--rounds", "2", "--new-tokens", "2"]
    small = replace(ModelConfig.named("30b-a3b"), hidden_size=64, moe_intermediate_size=32, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=32)  # fmt: skip
    monkeypatch.setattr(ModelConfig, "named", staticmethod(lambda name: small))
    monkeypatch.setattr(benchmark, "MODE", "cached-eager")
    monkeypatch.setattr(sys, "argv", ["moe.py", *options, "--output", str(output)])
    benchmark.main()
    record = load_record(output)
    assert output.with_suffix(".png").is_file()
    assert [case.labels["model"] for case in record.cases] == list(benchmark.MODELS)
    assert len(record.checks) == 3 and record.passed
    assert all([len(steps) for steps in case.samples["step_s"]] == [2, 2] for case in record.cases)
