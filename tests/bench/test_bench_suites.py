"""Every suite on the tiny model, as small as can be: a valid record, a picture, a table, sentences."""

import json
import os
import sys
import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from bench_fakes import FakeClock, make_case, make_record, quick_probes  # noqa: F401  a fixture

from qwen3fast import load_model
from qwen3fast.bench import measure, session
from qwen3fast.bench.__main__ import build_parser, main
from qwen3fast.bench.deep_cache import DeepCache
from qwen3fast.bench.generic import panels_of
from qwen3fast.bench.measure import MODES
from qwen3fast.bench.record import Record, load_record
from qwen3fast.bench.suites import (
    SUITES,
    batch,
    cache,
    context,
    forms,
    llama_bench,
    quantization,
    roofline,
    serve,
    startup,
)
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import tiles

pytestmark = pytest.mark.usefixtures("quick_probes")
SMALL = ["--model", "tiny", "--repetitions", "2", "--threads", "1"]


@pytest.fixture
def eager(monkeypatch):
    """Suites that measure compiled steps measure eager ones, which take no time to compile."""
    for module in (roofline, batch, context, quantization, llama_bench):
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


def options_of(suite, *arguments):
    return SUITES[suite].options(build_parser().parse_args(["--suite", suite, *arguments]))


def test_defaults_of_the_cache_suite_have_a_time_limit_and_full_has_none():
    short, full, quick = (options_of("cache", *extent) for extent in ([], ["--full"], ["--quick"]))
    assert short.limit_s is not None and short.limit_s <= 160 and full.limit_s is None and quick.limit_s is None
    assert set(short.contexts) < set(full.contexts) and len(quick.contexts) < len(short.contexts)
    assert options_of("cache", "--contexts", "9000").limit_s is None  # what is asked for is measured
    assert options_of("cache", "--threads", "1").limit_s == short.limit_s


def test_defaults_on_cuda_have_every_mode_and_longer_prompts(monkeypatch):
    on_cpu = options_of("cache")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_cuda = options_of("cache")
    assert on_cuda.device == "cuda" and on_cuda.limit_s == on_cpu.limit_s
    assert on_cuda.modes == MODES and set(on_cuda.modes) - set(on_cpu.modes) == {"cached-graphs"}
    assert max(on_cuda.contexts) > max(on_cpu.contexts)


def test_cuda_graphs_are_refused_on_a_cpu(capsys):
    assert main(["--model", "tiny", "--device", "cpu", "--modes", "cached-graphs", "--contexts", "16"]) == 2
    assert "CUDA graphs need a CUDA device, this is cpu; choose other --modes" in capsys.readouterr().err


def test_every_mode_of_a_gpu_is_measured_with_its_graphs_switched(monkeypatch):
    """On the CPU: graphs are an object that the engine of the other modes must not have."""
    graphs = object()
    model = load_model("tiny", "cpu")
    monkeypatch.setattr(measure, "Engine", lambda *_, **__: SimpleNamespace(graphs=graphs, captured=graphs))
    bench = measure.Workbench(model, MODES, 64, 1)
    for of in ("graphs", "captured"):  # of steps, and of chunks of prompts
        assert {mode: getattr(bench.engine(mode), of) is graphs for mode in MODES} == {
            mode: mode == "cached-graphs" for mode in MODES
        }
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert measure.with_graphs("cached-compiled", cuda) == "cached-graphs"
    assert measure.with_graphs("cached-compiled", cpu) == "cached-compiled"
    assert measure.with_graphs("cached-eager", cuda) == "cached-eager"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_compiled_or_captured_inside_a_sample_on_cuda(device, monkeypatch):
    """Prompts of several chunks run another form than short ones, first of all before the measurement."""
    runs, groups = [], []
    measuring = session.Session("cache", options_of("cache", "--model", "tiny", "--device", "cpu", "--quick"))
    measuring.device = torch.device(device)
    measuring.options = replace(measuring.options, modes=MODES, contexts=(32, 2048, 600))
    check = measure.TokenCheck(1, 1, 0.0, 0.0)
    bench = SimpleNamespace(
        model=measuring.model(None), cache_dtype=torch.float32, max_seq_len=2000, check=lambda *_: check,
        run=lambda mode, prompts, new_tokens: runs.append((mode, [len(prompt) for prompt in prompts])),
    )  # fmt: skip
    monkeypatch.setattr(session.Session, "workbench", lambda *_: bench)
    monkeypatch.setattr(session.Session, "execute", lambda self, preparations, made: groups.extend(made))
    cache.run(measuring)
    long = {task.case.labels["mode"]: task.warms_up for task in groups[1].tasks}
    assert long == {mode: device == "cuda" and measure.is_compiled(mode) for mode in MODES}
    for mode in MODES:
        runs.clear()
        measuring.prepare(bench, mode, "bf16", 2)
        is_longer = device == "cuda" and measure.is_compiled(mode)
        assert [run for run in runs if run != (mode, [40, 40])] == [(mode, [1998])] * is_longer


def test_default_run_says_how_long_it_takes_and_leaves_out_what_does_not_fit(tmp_path, capsys, monkeypatch):
    suite = replace(SUITES["cache"], limit_s=0.0, defaults=SUITES["cache"].defaults | {"modes": ("cached-eager",)})
    monkeypatch.setitem(SUITES, "cache", suite)
    assert main(["--model", "tiny", "--threads", "1", "--output", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    begin, *_ = err.splitlines()
    assert begin == "suite cache: at most 25 s; --full takes longer and measures more"
    assert "\n5 cases, 3 rounds, about" in err
    assert "no time for 128 tokens; 512 tokens; 1,024 tokens; 2,048 tokens. --full measures everything" in err
    [record] = map(load_record, tmp_path.glob("*.json"))
    assert labels_of(record, "context") == [(32,)]
    assert record.notes["left_out"] == ["128 tokens", "512 tokens", "1,024 tokens", "2,048 tokens"]


@pytest.mark.parametrize(
    ("prepare_s", "left_out"), [(30.0, []), (40.0, ["cached-eager"]), (60.0, ["uncached-compiled", "cached-eager"])]
)
def test_a_machine_that_compiles_too_slowly_leaves_modes_out(tmp_path, monkeypatch, prepare_s, left_out):
    waited, prepare, perf_counter = FakeClock(), session.Session.prepare, time.perf_counter

    def prepare_slowly(self, *arguments):
        waited.wait(prepare_s)
        prepare(self, *arguments)

    monkeypatch.setattr(session.Session, "prepare", prepare_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + waited.now)
    modes = ("uncached-eager", "uncached-compiled", "cached-eager", "cached-compiled")
    monkeypatch.setattr(measure, "is_compiled", lambda mode: False)  # takes no time to compile
    defaults = SUITES["cache"].defaults | {"modes": modes, "contexts": (16,), "new_tokens": 4}
    monkeypatch.setitem(SUITES, "cache", replace(SUITES["cache"], defaults=defaults))
    assert main(["--model", "tiny", "--threads", "1", "--output", str(tmp_path)]) == 0
    [record] = map(load_record, tmp_path.glob("*.json"))
    assert record.notes.get("left_out", []) == left_out
    assert {mode for (mode,) in labels_of(record, "mode")} == set(modes) - set(left_out)


def cache_record(cached, uncached, context=512):
    """First tokens of both ways, in seconds."""
    record = make_record()
    for mode, seconds in (("cached-compiled", cached), ("cached-eager", [9.0] * 3), ("uncached-compiled", uncached)):
        case = make_case([10.0] * len(seconds), mode=mode, context=context)
        case.samples["ttft_s"] = seconds
        record.cases.append(case)
    return record


@pytest.mark.parametrize(
    ("cached", "uncached", "is_fault"),
    [
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], True),
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], False),
        ([1.02, 1.03, 1.04], [1.0, 1.01, 1.02], False),  # noise
        ([1.0, 1.4, 9.0], [1.1, 1.2, 1.3], False),  # not for sure
        ([1.2], [1.0], True),
        ([1.04], [1.0], False),
    ],
)
def test_a_first_token_that_comes_later_with_the_cache_is_a_fault(cached, uncached, is_fault):
    found = cache.faults(cache_record(cached, uncached))
    assert len(found) == is_fault
    if is_fault:
        assert found[0].startswith("FAULT at 512 tokens (bf16, batch 1): the first token takes ")
        assert found[0] in cache.summary(cache_record(cached, uncached))


def test_faults_of_other_lengths_are_not_compared():
    record = cache_record([2.0] * 3, [1.0] * 3)
    record.cases[-1].labels["context"] = 1024
    assert cache.faults(record) == []


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
    plain, quantized = record.cases[:2]
    assert quantized.facts["bytes_per_step"] < 0.7 * plain.facts["bytes_per_step"]
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


def test_suite_llama_bench(tmp_path, capsys, eager, monkeypatch):
    monkeypatch.setattr(llama_bench, "PROMPT", 8)
    monkeypatch.setitem(
        SUITES,
        "llama-bench",
        replace(SUITES["llama-bench"], defaults={**llama_bench.SUITE.defaults, "contexts": (0, 20)}),
    )
    record = run_suite("llama-bench", ["--formats", "plain,int4"], tmp_path, capsys)
    assert labels_of(record, "depth", "format", "test") == list(product((0, 20), ("bf16", "int4"), ("pp8", "tg3")))
    header, divider, *rows = llama_bench.markdown(record)
    assert header == "| model | size | params | backend | threads | test | t/s |" and set(divider) <= set("|:- ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][:6] == ["tiny bf16", "4.95 MiB", "2.60 M", "CPU", "1", "pp8"]
    assert [row[5] for row in cells[::2]] == ["pp8", "pp8", "pp8 @ d20", "pp8 @ d20"]
    [panel] = panels_of(record)  # of its picture
    assert panel.axis == "depth" and {panel.series_of(case) for case in panel.cases} == {
        f"{format}, {test}" for format in ("bf16", "int4") for test in ("pp8", "tg3")
    }
    assert cells[2][0] == "tiny int4" and float(cells[2][1].removesuffix(" MiB")) < 3
    for row, case in zip(cells, record.cases, strict=True):
        first, second = (case.facts["tokens"] / s for s in case.samples["seconds"])
        assert row[6] == f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}"


def test_a_deep_cache_holds_its_prompt_whatever_was_tested_before():
    bench = measure.Workbench(load_model("tiny", "cpu"), ("cached-eager",), 80, 1)
    deep = DeepCache(bench, "cached-eager", 1024, 64)
    engine, prompt = bench.engine("cached-eager"), deep._prompt
    for test, depth in (
        ("decode", 0),
        ("prefill", 20),
        ("decode", 20),
        ("prefill", 0),
        ("decode", 20),
        ("prefill", 40),
    ):
        seconds = getattr(deep, f"{test}_s")(depth, 8)
        assert min(seconds) > 0 and len(seconds) == 8 if test == "decode" else seconds > 0
    logits_1V = deep._compute(40, 41).clone()
    torch.testing.assert_close(engine.prefill_whole(0, prompt[:41]), logits_1V, atol=0.3, rtol=0)


def test_suite_ablation(tmp_path, capsys):
    options = ["--contexts", "16", "--formats", "plain", "--modes", "uncached-eager,cached-eager"]
    record = run_suite("ablation", options, tmp_path, capsys)
    assert labels_of(record, "stage") == [("no cache, eager",), ("+ static KV cache",)]


@pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
@pytest.mark.parametrize("has_tiles", [False, True])
def test_suite_forms(has_tiles, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiles, "are_announced", lambda: has_tiles)
    monkeypatch.setattr(forms, "mean_seconds", lambda call: (call(), 1.0)[-1])  # each form runs once
    options = ["--contexts", "64", "--formats", "plain,int4", "--batch-sizes", "2", "--dtype", "bfloat16"]
    record = run_suite("forms", options, tmp_path, capsys)
    found = {(c.labels["computation"], c.labels["form"]) for c in record.cases}
    by_tiles = ("prefill attention", "linear bfloat16", "linear int4", "decode") if has_tiles else ()
    in_int8 = {("linear int4", "int8 tiles")} if has_tiles else set()
    assert found == in_int8 | {(computation, "tiles") for computation in by_tiles} | {
        ("prefill attention", "C++"), ("prefill attention", "SDPA"),
        ("linear bfloat16", "C++"), ("linear bfloat16", "F.linear"),
        ("linear int4", "C++"), ("linear int4", "dequantized"),
        ("decode", "C++"), ("decode", "block by block"),
    }  # fmt: skip
    assert len({tuple(case.labels.values()) for case in record.cases}) == len(record.cases)
    assert forms.summary(record) == ["On this machine no other form is faster than the C++."]
    for case in record.cases:
        if case.labels["form"] == "SDPA":
            case.samples["seconds"] = [0.5] * 2
    sentences = forms.summary(record)
    assert len(sentences) == sum(case.labels["form"] == "SDPA" for case in record.cases)
    assert all(" SDPA is 2.00 times as fast as the C++." in sentence for sentence in sentences)


def test_suite_forms_needs_a_model_in_bfloat16(capsys):
    assert main(["--suite", "forms", *SMALL, "--dtype", "float32"]) == 2
    assert "the suite forms needs a CPU, a model in bfloat16 and the C++ operations" in capsys.readouterr().err


def test_suite_forms_takes_the_mean_over_enough_calls():
    clock = FakeClock()
    assert forms.mean_seconds(lambda: clock.wait(0.02), lambda: clock.now) == pytest.approx(0.02)
    assert clock.now == pytest.approx(0.02 * 4)  # the first call does not count
    assert forms.mean_seconds(lambda: clock.wait(9.0), lambda: clock.now) == pytest.approx(9.0)


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
    record = run_suite("startup", ["--formats", "plain-kv8"], tmp_path, capsys)
    assert labels_of(record, "caches", "compile") == [
        (kind, mode) for kind in ("warm", "cold") for mode in ("never", "auto", "always")
    ]
    warm_auto = record.cases[1].metrics
    found = {name: warm_auto[name].median for name in startup.PHASES}
    assert found == pytest.approx({"import_s": 1.0, "load_s": 2.0, "first_token_s": 3.0, "full_speed_s": 3.5})
    assert record.cases[3].metrics["first_token_s"].median == 20.0


def test_suite_serve(tmp_path, capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(serve, "COMPILE", False)
    monkeypatch.setattr(serve, "PAIRS", 1)
    record = run_suite("serve", ["--contexts", "8", "--formats", "plain", "--batch-sizes", "1,3"], tmp_path, capsys)
    pairs = [(what, n) for n in serve.PAIRED_CLIENTS for what in (serve.ENGINE, serve.HTTP)]
    assert labels_of(record, "what", "clients") == [*pairs, (serve.LOAD, 1), (serve.LOAD, 3)]
    assert [c.metrics["http_over_engine"].n for c in record.cases if c.labels["what"] == serve.HTTP] == [2, 2]
    for case in record.cases:
        assert len(case.samples["ttfts_s"][0]) == case.facts["requests"]
        if case.labels["what"] == serve.LOAD:
            assert case.metrics["goodput"].median <= case.metrics["requests_s"].median


def test_suite_serve_interrupted_compares_the_pairs_that_it_has(tmp_path, capsys, monkeypatch):
    pytest.importorskip("uvicorn")
    calls, run_http = [], serve.run_http

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return run_http(*arguments)

    monkeypatch.setattr(serve, "COMPILE", False)
    monkeypatch.setattr(serve, "run_http", interrupted)
    options = ["--suite", "serve", *SMALL, "--formats", "plain", "--contexts", "8", "--new-tokens", "3"]
    assert main([*options, "--output", str(tmp_path)]) == 130
    [record] = map(load_record, tmp_path.glob("*.json"))
    [http] = [c for c in record.cases if c.labels["what"] == serve.HTTP]
    assert record.interrupted and http.metrics["http_over_engine"].n == len(http.samples["tpot_s"]) >= 1


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_what_was_measured_is_written_whatever_ends_the_run(tmp_path, capsys, monkeypatch, error):
    """Ctrl-C may come again, while the record is derived, or after its file was renamed."""

    def run(session):
        session.record.cases.append(make_case([1.0]))
        raise error

    def again(function):
        def wrapper(*arguments):
            result = function(*arguments)
            if len(interrupted) < 2 and function not in interrupted and isinstance(error, KeyboardInterrupt):
                interrupted.append(function)
                raise KeyboardInterrupt
            return result

        return wrapper

    interrupted: list = []
    monkeypatch.setitem(SUITES, "cache", replace(SUITES["cache"], run=run))
    monkeypatch.setattr(Record, "to_dict", again(Record.to_dict))
    monkeypatch.setattr("os.replace", again(os.replace))
    command = [*SMALL, "--output", str(tmp_path)]
    if isinstance(error, KeyboardInterrupt):
        assert main(command) == 130 and len(interrupted) == 2
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            main(command)
    [record] = map(load_record, tmp_path.glob("*.json"))
    assert record.interrupted and len(record.cases) == 1 and not [*tmp_path.glob("*.tmp")]
    assert "keeping the measurements so far" in capsys.readouterr().err


def test_ctrl_c_after_the_record_was_saved_does_not_deny_it(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def run(session):
        session.record.cases.append(make_case([1.0]))

    monkeypatch.setitem(SUITES, "cache", replace(SUITES["cache"], run=run))
    monkeypatch.setattr("qwen3fast.bench.main.as_text", interrupted)
    assert main([*SMALL, "--output", str(tmp_path)]) == 130
    assert [*map(load_record, tmp_path.glob("*.json"))] and capsys.readouterr().err.endswith("\ninterrupted\n")


def test_json_is_all_that_it_prints_and_valid(tmp_path, capsys, monkeypatch):
    def run(session):
        session.record.cases.append(make_case([1.0]))
        session.record.notes["share"] = float("nan")  # JSON has no such number

    monkeypatch.setitem(SUITES, "cache", replace(SUITES["cache"], run=run))
    assert main([*SMALL, "--json", "--output", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    [file] = tmp_path.glob("*.json")
    assert printed == json.loads(file.read_text()) and printed["notes"]["share"] is None


def test_suite_serve_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwen3fast.server.app", None)
    monkeypatch.setattr(serve, "COMPILE", False)
    assert main(["--suite", "serve", *SMALL, "--formats", "plain"]) != 0
    assert "pip install 'qwen3fast[server]'" in capsys.readouterr().err


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
