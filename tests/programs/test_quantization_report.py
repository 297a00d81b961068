"""tools/quantization_report.py on a small model: what becomes a case of the record."""

from pathlib import Path

import quantization_errors
import tables
import torch
from conftest import randomized, small_config

from qwen3fast.bench.record import Record, load_record
from qwen3fast.bench.suites.quantization import logits_through_cache
from qwen3fast.quantization.convert import quantize_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024}


def test_errors_of_layers_cache_and_model_are_cases_that_a_record_keeps():
    exact, rounded = (randomized(small_config(**SIZES, eos_token_ids=()), seed=3) for _ in range(2))
    quantize_model(rounded, "int8", torch.float32)
    tokens = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(0))
    logits = logits_through_cache(exact, tokens[0], "auto")
    layers = quantization_errors.layer_errors(exact, rounded, tokens)
    blocks = quantization_errors.cache_errors(exact, tokens)
    cases = quantization_errors.error_cases("int8", "layer", layers)
    cases += quantization_errors.error_cases("bf16-kv8", "cache", blocks)
    cases += [
        quantization_errors.model_case("bf16", exact, tokens, "auto", logits),
        quantization_errors.model_case("int8", rounded, tokens, "auto", logits),
        quantization_errors.model_case("bf16-kv8", exact, tokens, "int8", logits),
    ]
    run = {"utc": "2026-01-02T03:04:05Z", "command": "x", "git_commit": None, "git_dirty": None}
    record = Record.from_dict(Record("quantization-tiny", run, {}, {"name": "x"}, cases).to_dict())
    assert len(layers) == 7 * exact.config.num_hidden_layers + 1 and len(blocks) == exact.config.num_hidden_layers
    found = [case.metrics for case in record.cases]
    assert all(0 < m["weight_error"].median < 0.02 for m in found if "weight_error" in m)
    assert all(0 < m[name].median < 0.02 for m in found if "key_error" in m for name in ("key_error", "value_error"))
    exactly, int8, kv8 = (m for m in found if "logit_error" in m)
    assert exactly["logit_error"].median == 0 and exactly["same_token"].median == 1
    assert all(0 < m["logit_error"].median < 0.2 for m in (int8, kv8))
    rows = tables.quantization_rows(record)
    assert [row[0] for row in rows[1:]] == ["int8", "bf16-kv8", "bf16"] and all(row[1] for row in rows[1:])


def test_the_cache_does_not_change_the_bytes_of_weights():
    record = load_record(RESULTS / "quantization-tiny.json")
    sizes = {case.labels["format"]: case.facts["weight_bytes"] for case in record.cases if "weight_bytes" in case.facts}
    assert len(sizes) > 8
    assert all(sizes[name] == sizes[name.removesuffix("-kv8")] for name in sizes)
