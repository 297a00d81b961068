"""Every suite on the tiny model, as small as can be: a valid record, a picture, a table, sentences."""

import pytest

from qwen3fast.bench import probes
from qwen3fast.bench.__main__ import main
from qwen3fast.bench.record import load_record
from qwen3fast.bench.suites import SUITES, batch, context, quantization, roofline, startup

SMALL = ["--model", "tiny", "--repetitions", "2"]


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    """Probes that tell a speed without taking the time to measure it well."""
    monkeypatch.setitem(probes.PROBE_BYTES, "cpu", 2**20)
    monkeypatch.setattr(probes.GemmProbe, "measure", lambda self, repetitions=3: 1e11)


@pytest.fixture
def eager(monkeypatch):
    """Suites that measure compiled steps measure eager ones, which take no time to compile."""
    for module in (roofline, batch, context, quantization):
        monkeypatch.setattr(module, "MODE", "cached-eager")


def run_suite(name, options, folder, capsys):
    """Its record, read back, after what every suite owes was looked at."""
    steps = ["--new-tokens", "3"] if "new_tokens" in SUITES[name].defaults else []
    assert main(["--suite", name, *SMALL, *steps, *options, "--output", str(folder)]) == 0
    [json_file], [png_file] = folder.glob("*.json"), folder.glob("*.png")
    record = load_record(json_file)
    assert png_file.read_bytes().startswith(b"\x89PNG")
    assert record.suite == name and record.passed and not record.interrupted and record.cases
    out, err = capsys.readouterr()
    assert SUITES[name].summary(record) and all(sentence in out for sentence in SUITES[name].summary(record))
    assert len(out.splitlines()) > len(record.cases) and f"wrote {json_file} and {png_file}" in err
    assert main(["compare", str(json_file), str(json_file)]) in (0, 2)  # 2: nothing could be judged, or an error
    assert "error" not in capsys.readouterr().err
    return record


def labels_of(record, *names):
    return [tuple(case.labels.get(name) for name in names) for case in record.cases]


def test_suite_cache(tmp_path, capsys):
    options = ["--contexts", "16,40", "--modes", "uncached-eager,cached-eager", "--batch-sizes", "1,2"]
    record = run_suite("cache", options, tmp_path, capsys)
    assert labels_of(record, "batch_size", "context", "mode") == [
        (batch_size, length, mode)
        for batch_size in (1, 2)
        for length in (16, 40)
        for mode in ("uncached-eager", "cached-eager")
    ]
    assert all(len(case.samples["step_s"]) == 2 for case in record.cases)
    assert all("flop_per_step" in c.facts for c in record.cases if c.labels["mode"] == "uncached-eager")
    assert record.conditions["gemm_flop_s"] == [1e11] * 2 * 2 * len(record.cases)


def test_suite_roofline(tmp_path, capsys, eager):
    record = run_suite("roofline", ["--contexts", "16,40", "--formats", "plain,int8-kv8"], tmp_path, capsys)
    formats = ("bf16", "int8-kv8")
    assert labels_of(record, "context", "format") == [(n, f) for n in (16, 40) for f in formats]
    plain, rounded = record.cases[:2]
    assert rounded.facts["bytes_per_step"] < 0.7 * plain.facts["bytes_per_step"]
    assert {"limit_tok_s", "share_of_bandwidth", "prefill_share_of_gemm"} <= plain.metrics.keys()


def test_suite_batch_compiled(tmp_path, capsys):
    options = ["--contexts", "16", "--formats", "plain", "--batch-sizes", "1,2"]
    record = run_suite("batch", options, tmp_path, capsys)
    assert labels_of(record, "mode", "batch_size") == [("cached-compiled", 1), ("cached-compiled", 2)]
    assert record.notes["compile_s"].keys() == record.checks.keys()


def test_suite_context(tmp_path, capsys, eager, monkeypatch):
    monkeypatch.setattr(context, "ALLOCATED", (128, 256))
    record = run_suite("context", ["--contexts", "16,40", "--formats", "plain"], tmp_path, capsys)
    assert labels_of(record, "varies", "context", "allocated") == [
        ("used", 16, 40 + 3 + context.ROOM),
        ("used", 40, 40 + 3 + context.ROOM),
        ("allocated", 40, 128),
        ("allocated", 40, 256),
    ]


def test_suite_quantization(tmp_path, capsys, eager):
    record = run_suite("quantization", ["--contexts", "16", "--formats", "plain,int4"], tmp_path, capsys)
    errors = {c.labels["format"]: c.metrics["logit_error"].median for c in record.cases if c.labels["what"] == "error"}
    assert errors["bf16"] == 0 < errors["int4"] < 1


def test_suite_ablation(tmp_path, capsys):
    options = ["--contexts", "16", "--formats", "plain", "--modes", "uncached-eager,cached-eager"]
    record = run_suite("ablation", options, tmp_path, capsys)
    assert labels_of(record, "stage") == [("no cache, eager",), ("+ static KV cache",)]


def test_suite_startup(tmp_path, capsys, monkeypatch):
    def run_once(folder, device, compile, seconds, caches=None, **options):
        assert (folder / "config.json").is_file()
        assert options == {"kv_cache_dtype": "int8", "threads": 1}
        first = 3.0 if caches is None else 20.0
        # Slow at first, unless all was compiled before.
        slow = 0 if compile == "always" else 5
        steps = [0.1] * slow + [0.01] * 20
        return [1.0, 2.0, *(first + sum(steps[:i]) for i in range(len(steps)))]

    monkeypatch.setattr(startup, "run_once", run_once)
    record = run_suite("startup", ["--formats", "plain-kv8", "--threads", "1"], tmp_path, capsys)
    assert labels_of(record, "caches", "compile") == [
        (kind, mode) for kind in ("warm", "cold") for mode in ("never", "auto", "always")
    ]
    warm_auto = record.cases[1].metrics
    found = {name: warm_auto[name].median for name in startup.PHASES}
    assert found == pytest.approx({"import_s": 1.0, "load_s": 2.0, "first_token_s": 3.0, "full_speed_s": 3.5})
    assert record.cases[3].metrics["first_token_s"].median == 20.0


def test_options_that_a_suite_does_not_read_are_refused(capsys):
    assert main(["--suite", "startup", "--model", "tiny", "--new-tokens", "3", "--modes", "cached-eager"]) == 2
    message = "this suite does not read --modes, --new-tokens; it reads --formats, --repetitions"
    assert message in capsys.readouterr().err


def test_startup_passes_options_on_to_the_process(tmp_path, monkeypatch):
    program = "import json, sys; print([len(sys.argv), json.loads(sys.argv[3])['threads']])  # {seconds}"
    monkeypatch.setattr(startup, "PROGRAM", program)
    monkeypatch.setattr(startup.time, "time", lambda: 1.0)
    assert startup.run_once(tmp_path, "cpu", "auto", 1.0, threads=7) == [3.0, 6.0]


def test_startup_full_speed_is_reached_by_ten_tokens_in_a_row():
    slow, fast = [float(i) for i in range(5)], [5 + 0.1 * i for i in range(11)]
    assert startup.full_speed_s(slow + fast, 0.1) == 5.0
    assert startup.full_speed_s(slow + fast[:10], 0.1) is None


def test_startup_tells_why_a_run_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "PROGRAM", "import sys; sys.exit('no such folder: ' + sys.argv[1])")
    with pytest.raises(RuntimeError, match=r"a run with compile=False failed:\nno such folder: .*none"):
        startup.run_once(tmp_path / "none", "cpu", "never", 1.0)


def test_startup_gives_seconds_since_the_process_began(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "PROGRAM", "import time; print('noise'); print([time.time() + {seconds}])")
    [seconds] = startup.run_once(tmp_path, "cpu", "auto", 100.0, tmp_path)
    assert 100 < seconds < 200
