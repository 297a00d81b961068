"""tools/prequantized_report.py on a small matrix: what is exact, what is not, and what becomes of it in a table."""

import sys

import prequantized_report
import pytest
import tables

from qwen3fast.bench.record import load_record
from qwen3fast.kernels import cpu

EXACT = {
    "GGUF, Q4_1", "GGUF, Q4_K", "GGUF, Q5_0", "GGUF, Q5_1", "GGUF, Q5_K", "GGUF, Q6_K", "GGUF, IQ4_NL",
    "GGUF, IQ4_XS", "AWQ, groups of 128", "AWQ, groups of 32", "GPTQ, 4 bits, zero points", "GPTQ, 4 bits, desc_act",
    "FP8, blocks", "FP8, rows", "FP8, one scale",
}  # fmt: skip


@pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
def test_every_type_has_an_error_a_size_and_a_speed(tmp_path, monkeypatch, capsys):
    output = tmp_path / "record.json"
    options = ["--size", "256", "--repetitions", "3", "--copies", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["prequantized_report.py", *options])
    assert prequantized_report.main() == 0 and f"wrote {output}" in capsys.readouterr().out
    record = load_record(output)
    errors = {case.labels["type"]: case.metrics["weight_error"].median for case in record.cases}
    assert {name for name, error in errors.items() if error == 0} == EXACT
    assert 0 < errors["GGUF, Q4_0"] < 2**-8 and 0 < errors["GPTQ, 4 bits, symmetric"] < 2**-8
    assert max(errors.values()) < 0.02
    assert all(len(case.samples["over_int4"]) == 3 for case in record.cases)
    rows = {row[0]: row[1:] for row in tables.prequantized_rows(record)}
    assert rows["GGUF, Q4_K"][:4] == ["uint4", "0", "4.50", "4.50"]
    assert rows["AWQ, groups of 128"][:4] == ["uint4", "0", "4.16", "4.19"]
    assert rows["FP8, blocks"][:4] == ["fp8", "0", "8.00", "8.02"]
    assert rows["FP8, rows"][:4] == ["fp8", "0", "8.06", "8.12"] and rows["FP8, one scale"][:3] == ["fp8", "0", "8.00"]
    assert rows["GGUF, Q6_K"][:4] == ["int6", "0", "6.56", "6.56"]
    assert rows["GGUF, Q5_K"][:4] == ["uint5", "0", "5.50", "5.50"]
    assert rows["GGUF, IQ4_NL"][:4] == ["nl4", "0", "4.50", "4.50"]
    assert rows["GGUF, IQ4_XS"][:4] == ["nl4", "0", "4.25", "4.31"]
