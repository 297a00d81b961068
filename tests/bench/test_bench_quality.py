"""The suite `quality` on tiny: what it reports is what the formulas give."""

import pytest
import torch
from bench_fakes import quick_probes  # noqa: F401  a fixture
from test_bench_suites import labels_of, run_suite

from qwen3fast import load_model
from qwen3fast.bench import session
from qwen3fast.bench.__main__ import main
from qwen3fast.bench.suites import quality, quantization
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_probes")


def test_suite_quality(tmp_path, capsys):
    options = ["--contexts", "64,128", "--formats", "plain,int8,int4,int4-kv8,fp8"]
    record = run_suite("quality", options, tmp_path, capsys)
    assert labels_of(record, "context", "format") == [
        (n, f) for n in (64, 128) for f in ("bf16", "int8", "int4", "int4-kv8", "fp8")
    ]
    assert record.notes["text"]["name"] == "built in"
    plain, int8, int4, _, fp8 = ({n: e.median for n, e in case.metrics.items()} for case in record.cases[5:])
    assert (plain["kl_divergence"], plain["same_token"]) == (0, 1)
    assert 0 < int8["kl_divergence"] < int4["kl_divergence"] and 0 < fp8["kl_divergence"] < int4["kl_divergence"]
    assert {case.facts["positions"] for case in record.cases} == {2 * 63, 2 * 127}


def test_quality_is_that_of_the_formulas(tmp_path, capsys):
    """On a text of the user's, against PyTorch's own functions over the whole distribution, in float64."""
    text = tmp_path / "text.txt"
    text.write_text("What is 17 + 25? The capital of France is Paris. " * 4, encoding="utf-8")
    options = ["--contexts", "40", "--formats", "plain,int4", "--text", str(text), "--dtype", "float32"]
    record = run_suite("quality", options, tmp_path / "records", capsys)
    ids = Tokenizer.from_folder(TINY_FOLDER).encode(text.read_text())
    exact, quantized = (load_model("tiny", "cpu", "float32", quantization=name) for name in (None, "int4"))
    p, q, targets = [], [], []
    for begin in (0, 40):  # --repetitions 2
        window = torch.tensor(ids[begin : begin + 40])
        for found, model in ((p, exact), (q, quantized)):
            found.append(quantization.logits_through_cache(model, window, "auto")[:-1].double().log_softmax(-1))
        targets.append(window[1:])
    p_TV, q_TV, target_T = torch.cat(p), torch.cat(q), torch.cat(targets)
    values = {name: estimate.median for name, estimate in record.cases[1].metrics.items()}
    nll = torch.nn.functional.nll_loss(q_TV, target_T)
    assert values["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)
    kl_T = torch.nn.functional.kl_div(q_TV, p_TV, log_target=True, reduction="none").sum(-1)
    assert values["kl_divergence"] == pytest.approx(float(kl_T.mean()), rel=1e-3)
    assert values["kl_p99"] == pytest.approx(float(kl_T.sort().values[-1]), rel=1e-3)
    assert values["same_token"] == pytest.approx(float((p_TV.argmax(-1) == q_TV.argmax(-1)).double().mean()))
    assert record.notes["text"]["tokens"] == len(ids)


@pytest.mark.parametrize(
    ("length", "most", "expected"), [(4, 9, [4, 4, 2]), (4, 2, [4, 4]), (9, 9, [9]), (20, 1, [10])]
)
def test_windows_of_a_text(length, most, expected):
    assert [len(window) for window in quality.windows(list(range(10)), length, most)] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "random:0.6b"], "needs trained weights and a tokenizer"),
        (["--model", "tiny", "--text", "no/such.txt"], "no/such.txt not found; expected a text for --text"),
    ],
)
def test_quality_refuses_what_it_cannot_read(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(session.Session, "model", lambda self, quantization: load_model("tiny", "cpu"))
    assert main(["--suite", "quality", *options, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
