"""tools/gpu_check.py on the CPU: every part with a tiny model; processes that crash or hang."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_near, random_ids, randomized, small_config
from gpu_check import child, main, parts, probes, pytest_part, replay, report, runner, settings, targets, tokens
from gpu_check.budget import Clock
from gpu_check.merge import merge
from gpu_check.processes import last_line
from gpu_check.results import Results
from gpu_check.runner import PartRun, make_record
from gpu_check.variants import Variant

from qwen3fast.bench.record import Case, Record, load_record, write_json
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS

pytest_plugins = ["pytester"]
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def tiny(**fields):
    """A variant that takes a fraction of a second."""
    return replace(Variant("decode", "tiny", "tiny").dry(), **{"mode": "eager", "contexts": (8,), **fields})


def eager_variants():
    """Return the variants of a dry run of all parts, run eagerly; test_bench_measure.py has the compiled modes."""
    every = [variant for part in parts.MEASURED for variant in parts.variants_of(part, "cpu")]
    eager = [replace(v, mode="static" if v.mode == "static" else "eager", label="default") for v in every]
    return {(variant.name, variant.profiled): variant for variant in eager}.values()  # parts have some in common


@pytest.mark.parametrize("variant", eager_variants(), ids=lambda variant: f"{variant.part}-{variant.name}")
def test_a_dry_run_of_every_part_measures_every_variant(variant, small_folder, monkeypatch, one_thread):
    monkeypatch.setattr(child, "apply_options", lambda options: None)  # of the compiler, for the whole process
    monkeypatch.setattr(child, "apply_switches", lambda switches: None)
    monkeypatch.setitem(probes.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(replay, "SHORT", 2)  # every operation of a run is an event of the profiler
    monkeypatch.setattr(replay, "LONG", 3)
    results = Results()
    child.run_variant(replace(variant, source=str(small_folder)), CPU, results, Clock(100))
    assert results.errors == []
    if variant.weights != "bf16" and "cpu" not in FORMATS[variant.weights.removesuffix("-block")].devices:
        assert results.left_out == [f"{variant.weights} weights do not run on cpu"]
        return
    assert results.left_out == []
    mode = variant.labels["mode"]
    assert [c.labels["context"] for c in results.cases if c.labels["mode"] == mode] == list(variant.contexts)
    assert all(case.metrics["ttft_s"].median > 0 for case in results.cases)
    assert results.checks and all(check["passed"] for check in results.checks.values())
    assert results.notes["seconds"] > 0


def test_a_dry_run_has_each_variant_of_a_part_once():
    for part in parts.MEASURED:
        variants = parts.variants_of(part, "cpu")
        assert len({variant.name for variant in variants}) == len(variants) > 1
        assert {variant.source for variant in variants} == {"tiny"}


def test_variants_of_a_gpu_have_names_and_labels_of_their_own():
    every = [variant for part in parts.MEASURED for variant in parts.variants_of(part, "cuda")]
    assert len({(variant.part, variant.name) for variant in every}) == len(every)
    labels = [json.dumps(v.labels | {"context": n}, sort_keys=True) for v in every for n in v.contexts]
    # A part may measure short and long batches of one model apart, never one shape twice.
    assert [label for label, count in Counter(labels).items() if count > 1] == []
    assert all(Variant.from_json(json.loads(json.dumps(variant.to_json()))) == variant for variant in every)
    modes = {(variant.mode, variant.kind) for variant in every}
    assert {("graphs", "cached"), ("compiled", "cached"), ("eager", "cached"), ("static", "transformers")} <= modes
    assert {("eager", "uncached"), ("compiled", "uncached"), ("eager", "transformers")} <= modes


def test_a_part_runs_its_variants_as_programs_and_its_record_is_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "raise_on_sigterm", lambda: None)  # for the whole process
    arguments = ["--part", "uncached", "--only", "uncached-eager", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--caches", str(tmp_path / "caches")])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "tools" / "gpu_check.py"), run_name="__main__")
    assert "uncached-eager" in capsys.readouterr().out
    record = load_record(tmp_path / "uncached.json")
    assert [case.labels["context"] for case in record.cases] == [8, 24]
    assert record.suite == "gpu" and not record.interrupted and record.passed
    assert record.notes["seconds"] > 0
    assert main.main(["--merge", "--output", str(tmp_path)]) == 0
    merged = load_record(tmp_path / "gpu.json")
    assert [case.name for case in merged.cases] == [case.name for case in record.cases]
    assert "part tests was not run" in merged.notes["left_out"]


# Stands in for child.py: does what the variant's label says, after it has saved a case.
CHILD = """
import json, os, sys, time
variant, found, device, end = sys.argv[1:]
label = json.load(open(variant))["label"]
case = {"labels": {"label": label}, "facts": {}, "samples": {"ttft_s": [1.0]}}
names = ("checks", "conditions", "environment", "notes")
json.dump({name: {} for name in names} | {"left_out": [], "errors": [], "cases": [case]}, open(found, "w"))
print("about to", label, flush=True)
if label == "abort":
    os.abort()
if label == "hang":
    time.sleep(100)
sys.exit(3 if label == "fail" else 0)
"""


@pytest.fixture
def part_run(tmp_path, monkeypatch):
    """Makes a part whose variants do what their labels say."""
    monkeypatch.setattr(runner, "MIN_S", 0.1)
    monkeypatch.setattr(runner, "SPARE_S", 0.2)
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def make(seconds=100.0):
        return PartRun("decode", tmp_path, "cpu", Clock(seconds), tmp_path / "caches", (sys.executable, str(script)))

    return make


def test_a_variant_that_crashes_is_a_reason_and_the_rest_is_measured(part_run, tmp_path):
    run = part_run()
    run.run([tiny(label=label) for label in ("abort", "fail", "work")])
    record = load_record(tmp_path / "decode.json")
    assert [case.labels["label"] for case in record.cases] == ["abort", "fail", "work"]
    assert [error.partition("batch1: ")[2] for error in record.notes["errors"]] == [
        "ended by SIGABRT; last output: about to abort",
        "exit status 3; last output: about to fail",
    ]
    assert not record.interrupted


def test_a_variant_that_hangs_is_ended_and_the_part_ends_in_time(part_run, tmp_path):
    run = part_run(seconds=4.0)
    run.run([tiny(label=label) for label in ("hang", "work")])
    record = load_record(tmp_path / "decode.json")
    assert [case.labels["label"] for case in record.cases] == ["hang", "work"]
    [error] = record.notes["errors"]
    assert "not done after 2 s; last output: about to hang" in error
    assert run.clock.left() > 0


def test_variants_that_time_does_not_suffice_for_are_named(part_run, tmp_path):
    part_run(seconds=0.0).run([tiny(label="work")])
    record = load_record(tmp_path / "decode.json")
    assert record.cases == []
    assert record.notes["left_out"] == ["decode: tiny-bf16-cached-eager-work-batch1: no time left"]


STOPPED = """
import sys
from pathlib import Path
from gpu_check.budget import Clock
from gpu_check.processes import raise_on_sigterm
from gpu_check.runner import PartRun
from gpu_check.variants import Variant
folder = Path(sys.argv[1])
raise_on_sigterm()
run = PartRun("decode", folder, "cpu", Clock(100), folder, (sys.executable, str(folder / "child.py")))
run.run([Variant("decode", "tiny", "tiny", label=label) for label in ("hang", "work")])
"""


def test_sigterm_ends_the_child_and_keeps_what_it_has_found(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], env=environment)
    try:
        while not (tmp_path / "decode.json").is_file():  # written once the child has found something
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    record = load_record(tmp_path / "decode.json")
    assert record.interrupted
    assert [case.labels["label"] for case in record.cases] == ["hang"]
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "child.py") not in processes


def test_no_time_no_memory_and_faults_are_told_apart():
    results = Results()
    child.run_variant(tiny(contexts=(8, 16)), CPU, results, Clock(0))
    assert results.left_out == ["context 8: no time left", "context 16: no time left"]
    for error, left_out, errors in (
        (MemoryError("no room\nat all"), ["no memory: no room"], []),
        (settings.UnavailableError("no such option"), ["no such option"], []),
        (RuntimeError("a kernel does not compile"), [], ["RuntimeError: a kernel does not compile"]),
    ):

        def fail(*arguments, error=error):
            raise error

        results = Results()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(child.MEASURES, "cached", fail)
            child.run_variant(tiny(), CPU, results, Clock(10))
        assert (results.left_out, results.errors) == (left_out, errors)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    results = Results()
    child.run_variant(tiny(kind="transformers"), CPU, results, Clock(10))
    assert results.errors == results.cases == []
    [left_out] = results.left_out
    assert left_out.startswith("transformers: ")


def test_results_survive_their_file(tmp_path):
    results = Results(tmp_path / "found.json", [Case({"a": 1}, {"b": 2.0}, {"ttft_s": [3.0]})], left_out=["x"])
    results.notes["step"] = {"kernels": 3}
    results.save()
    assert replace(Results.load(tmp_path / "found.json"), path=results.path) == results
    assert Results.load(tmp_path / "none.json") == Results()


def test_options_are_set_over_those_of_the_caller(monkeypatch):
    from torch._inductor import config

    calls = []
    before = config.coordinate_descent_tuning
    monkeypatch.setattr(torch, "compile", lambda function, **keywords: calls.append(keywords))
    try:
        settings.apply_options({"coordinate_descent_tuning": not before})
        assert config.coordinate_descent_tuning is not before
    finally:
        config.coordinate_descent_tuning = before
    torch.compile(print, fullgraph=True, options={"coordinate_descent_tuning": before, "epilogue_fusion": True})
    torch.compile(print, mode="max-autotune-no-cudagraphs")
    assert calls[0] == {
        "fullgraph": True, "options": {"coordinate_descent_tuning": not before, "epilogue_fusion": True}
    }  # fmt: skip
    assert "mode" not in calls[1]
    assert calls[1]["options"] == {"max_autotune": True, "coordinate_descent_tuning": not before}
    with pytest.raises(settings.UnavailableError, match="has no Inductor option no_such_option"):
        settings.apply_options({"no_such_option": True})


def test_every_switch_of_the_variants_is_set(monkeypatch):
    from qwen3fast.kernels import cuda

    monkeypatch.setattr(cuda, "decode_attention", "split")
    monkeypatch.delenv("QWEN3FAST_FUSED_STEP", raising=False)
    wanted = [variant.switches for part in parts.MEASURED for variant in parts.variants_of(part, "cuda")]
    assert {name for switches in wanted for name in switches} == {"attention", "fused", "pdl"}
    settings.apply_switches({})
    assert cuda.decode_attention == "split" and cuda.use_fused_step()
    for is_fused in (False, True):
        monkeypatch.setenv("QWEN3FAST_FUSED_STEP", "1")  # which is restored after the test
        settings.apply_switches({"attention": "sdpa", "fused": is_fused})
        assert cuda.decode_attention == "sdpa" and cuda.use_fused_step() == is_fused


@pytest.mark.parametrize("has_pdl", [False, True])
def test_kernels_of_the_package_overlap_unless_a_variant_switches_it_off(has_pdl, monkeypatch):
    launch = pytest.importorskip("qwen3fast.kernels.cuda.decode_step.launch", exc_type=ImportError)
    monkeypatch.setenv("QWEN3FAST_PDL", "1")  # which is restored after the test
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    settings.apply_switches({} if has_pdl else {"pdl": False})
    assert launch.uses_dependent_launch.__wrapped__(torch.device("cuda", 0)) == has_pdl


def test_no_variant_sets_what_its_steps_do_not_use():
    """A fused step, of few rows, knows neither options of Inductor nor other attentions."""
    every = [variant for part in parts.MEASURED for variant in parts.variants_of(part, "cuda")]
    changed = [v for v in every if v.kind == "cached" and (v.options or "attention" in v.switches)]
    assert len(changed) >= 6
    assert [v.name for v in changed if v.batch_size <= 8 and v.switches.get("fused", True)] == []


def test_float32_logits_are_those_of_the_model_in_float32():
    model = randomized(small_config(head_dim=32), seed=3)
    ids = random_ids(1, 20)
    expected = model(ids)[0, -5:]
    assert_near(tokens.float32_logits(model, ids[0].tolist(), 5), expected)
    half = randomized(small_config(head_dim=32, dtype=torch.bfloat16), seed=3).bfloat16()
    twin = randomized(small_config(head_dim=32), seed=3)
    twin.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    assert_near(tokens.float32_logits(half, ids[0].tolist(), 5), twin(ids)[0, -5:])
    assert half.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_are_checked_against_what_their_bits_stand_for(name):
    config = small_config(vocab_size=96, hidden_size=64, intermediate_size=96, head_dim=32)
    model = randomized(config, seed=3)
    quantize_model(model, name, torch.float32)
    plain = randomized(config, seed=3)
    for name, layer in model.named_modules():
        if hasattr(layer, "dequantize"):
            plain.get_submodule(name).weight.data.copy_(layer.dequantize())
    plain.model.embed_tokens.weight.data.copy_(plain.lm_head.weight)
    ids = random_ids(1, 20, vocab_size=96)
    assert_near(tokens.float32_logits(model, ids[0].tolist(), 20), plain(ids)[0])


def test_wrong_tokens_are_found_and_give_exit_status_1():
    model = randomized(small_config(eos_token_ids=()), seed=3)
    prompt, ids = [1, 2, 3], []
    for _ in range(5):
        ids.append(int(model(torch.tensor([prompt + ids]))[0, -1].argmax()))
    good = tokens.check_against_float32(model, [prompt], [ids])
    assert good["passed"] and (good["tokens"], good["exact"]) == (5, 5)
    bad = tokens.check_against_float32(model, [prompt], [[*ids[:-1], ids[-1] ^ 1]])
    assert not bad["passed"] and (bad["tokens"], bad["exact"]) == (5, 4)
    record = make_record("decode", "cpu", {"x": Results(checks={"a": good, "b": bad})})
    assert main.status_of([record]) == 1
    assert "WRONG TOKENS: b: " in report.as_report(record)
    assert main.status_of([make_record("decode", "cpu", {"x": Results(checks={"a": good})})]) == 0
    assert main.status_of([make_record("decode", "cpu", {"x": Results(errors=["broken"])})]) == 1


def test_a_step_is_the_difference_of_two_runs(monkeypatch):
    steps = replay.LONG - replay.SHORT
    eager = "void at::native::vectorized_elementwise_kernel<4>"

    def profiled(run, device):
        tokens = run()
        kernels = Counter({"prefill": 28, "triton_fused": 5 * tokens, "Memcpy DtoH": tokens, eager: tokens})
        micros = Counter({"prefill": 99, "triton_fused": 10 * tokens, "Memcpy DtoH": 7 * tokens, eager: tokens})
        return replay.Profile(kernels, micros, Counter({"cudaGraphLaunch": tokens, "cudaMemcpyAsync": tokens}))

    monkeypatch.setattr(replay, "profile_run", profiled)
    asked = []
    step = replay.step_profile(lambda tokens: asked.append(tokens) or tokens, CPU)
    assert asked == [replay.LONG, replay.SHORT, replay.LONG] and steps > 0
    assert step == {
        "kernels": 6, "kernel_us": 11, "graph_launches": 1, "launches": 2, "eager_kernels": [eager],
        "by_name": {"triton_fused": [5, 10], eager: [1, 1]},
    }  # fmt: skip
    assert replay.eager_kernels(Counter({"pytorch_flash::flash_fwd_kernel": 1, "nvjet_tst_64x8": 1})) == []


def test_a_profile_counts_kernels_and_launches_and_no_annotations(monkeypatch):
    class Profiler:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def key_averages(self):
            cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
            rows = [("triton_", cuda, 3), ("## Call ##", cuda, 2), ("cudaGraphLaunch", cpu, 1), ("aten::mm", cpu, 9)]
            return [SimpleNamespace(key=k, device_type=d, count=n, self_device_time_total=n) for k, d, n in rows]

    monkeypatch.setattr(replay, "profile", Profiler)
    found = replay.profile_run(lambda: None, CPU)
    assert found == replay.Profile(Counter(triton_=3), Counter(triton_=3), Counter(cudaGraphLaunch=1))


def test_the_output_of_tests_is_read_whole_or_cut_off(tmp_path):
    log = tmp_path / "gpu.log"
    whole = "tests/gpu/a.py::one PASSED [ 50%]\ntests/gpu/a.py::two[x y] FAILED [100%]\n"
    log.write_text(whole + "===== 1 failed, 1 passed in 3.21s =====\n")
    assert pytest_part.read_log(log) == {
        "passed": 1, "failed": 1, "skipped": 0, "failures": ["tests/gpu/a.py::two[x y]"],
        "causes": {}, "summary": "1 failed, 1 passed in 3.21s", "not_collected": {}, "last": "tests/gpu/a.py::two[x",
    }  # fmt: skip
    log.write_text("[gw0] [ 50%] PASSED tests/a.py::one \n[gw1] [100%] FAILED tests/a.py::two[x y] \n")
    parallel = pytest_part.read_log(log)
    assert (parallel["passed"], parallel["failures"]) == (1, ["tests/a.py::two[x y]"])
    missing = "____ ERROR collecting tests/gpu/b.py ____\ntests/b.py:3: in <module>\nE   ModuleNotFoundError: No module"
    log.write_text(f"{missing}\n_____ ERROR collecting tests/c.py _____\nE   SyntaxError: invalid syntax\n{whole}")
    assert pytest_part.read_log(log)["not_collected"] == {"tests/gpu/b.py": "ModuleNotFoundError: No module"}
    log.write_text(whole + "tests/gpu/a.py::three ")
    cut = pytest_part.read_log(log)
    assert (cut["passed"], cut["failed"], cut["summary"], cut["last"]) == (1, 1, "", "tests/gpu/a.py::three")


def test_tests_that_hang_are_ended_and_those_before_them_are_counted(tmp_path, monkeypatch):
    file = tmp_path / "test_it.py"
    file.write_text("import time\ndef test_one(): pass\ndef test_two(): assert 0\ndef test_three(): time.sleep(100)\n")
    monkeypatch.setattr(pytest_part, "SPARE_S", 0.5)
    monkeypatch.setattr(pytest_part, "RUNS", {"gpu": ([str(file)], 1.0)})
    run = PartRun("tests", tmp_path, "cpu", Clock(5), tmp_path / "caches")
    pytest_part.run_tests(run, arguments=("--rootdir", str(tmp_path), "-c", os.devnull))
    record = load_record(tmp_path / "tests.json")
    notes = record.notes["variants"]["gpu"]
    assert (notes["passed"], notes["failed"], notes["exit_status"]) == (1, 1, None)
    assert [name.rpartition("::")[2] for name in notes["failures"]] == ["test_two"]
    assert list(notes["causes"].values()) == ["assert 0"]
    [error] = record.notes["errors"]
    assert "test_it.py::test_three" in error and "not done after" in error
    assert "1 passed, 1 failed" in report.as_report(record)
    log = (tmp_path / "tests" / "gpu.log").read_text()
    assert "test_one PASSED" in log and "def test_two(): assert 0" in log
    assert 'test_it.py", line 4 in test_three' in log  # where it was when it was ended


def test_tests_end_once_the_device_keeps_an_error(tmp_path, monkeypatch):
    """Those after it would fail with the same error; the failure itself is kept with its cause."""
    (tmp_path / "lost.py").write_text("from gpu_check import at_once\nat_once.lasting_error = lambda: 'an error'\n")
    (tmp_path / "test_it.py").write_text("import lost\ndef test_one(): raise ValueError('why')\ndef test_two(): pass\n")
    monkeypatch.setattr(pytest_part, "RUNS", {"gpu": ([str(tmp_path)], 1.0)})
    run = PartRun("tests", tmp_path, "cpu", Clock(60), tmp_path / "caches")
    pytest_part.run_tests(run, arguments=("--rootdir", str(tmp_path), "-c", os.devnull))
    record = load_record(tmp_path / "tests.json")
    notes = record.notes["variants"]["gpu"]
    assert (notes["passed"], notes["failed"]) == (0, 1)
    assert list(notes["causes"].values()) == ["ValueError: why"]
    assert "ValueError: why" in report.as_report(record) and record.notes["errors"]
    assert "reports an error to every call: an error" in (tmp_path / "tests" / "gpu.log").read_text()


def test_the_most_telling_tests_of_a_gpu_come_first_and_none_is_left_out():
    files = [arg for selection, _ in pytest_part.RUNS.values() for arg in selection if arg.endswith(".py")]
    assert files[0] == "tests/gpu/test_steps.py"
    on_gpu = {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    static = (ROOT / "tests" / "cuda_static").glob("test_*.py")
    kernels = {str(path.relative_to(ROOT)) for path in static if "import TOLERANCES" in path.read_text("utf-8")}
    assert on_gpu | kernels <= set(files)


@pytest.mark.parametrize(
    ("only", "shares"), [("", {"steps": 0.5, "kernels": 0.5, "others": 1}), ("kern", {"kernels": 1})]
)
def test_the_last_tests_get_all_the_time_that_is_left(tmp_path, monkeypatch, only, shares):
    given = {}
    monkeypatch.setattr(
        pytest_part, "_run", lambda run, name, selection, share: given.update({name: share}) or Results()
    )
    pytest_part.run_tests(PartRun("tests", tmp_path, "cpu", Clock(60), tmp_path), only)
    assert given == shares


def test_tests_that_lack_a_package_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_other.py").write_text("import no_such_package\ndef test_two(): pass\n")
    monkeypatch.setattr(pytest_part, "RUNS", {"gpu": ([str(tmp_path)], 1.0)})
    run = PartRun("tests", tmp_path, "cpu", Clock(60), tmp_path / "caches")
    pytest_part.run_tests(run, arguments=("--rootdir", str(tmp_path), "-c", os.devnull))
    notes = load_record(tmp_path / "tests.json").notes
    assert notes["variants"]["gpu"]["passed"] == 1 and notes["errors"] == []
    [left_out] = notes["left_out"]
    assert "test_other.py: ModuleNotFoundError: No module named 'no_such_package'" in left_out


def test_tests_on_a_gpu_are_skipped_once_their_time_is_spent(pytester, monkeypatch):
    folder = pytester.mkpydir("late")  # not "gpu": that package may be imported
    (folder / "test_steps.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    text = (ROOT / "tests" / "gpu" / "conftest.py").read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(re.sub("^FOLDER_S = .*$", "FOLDER_S = -1", text, flags=re.MULTILINE))
    monkeypatch.setenv("GPU_TESTS_ON", "cpu")
    pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider").assert_outcomes(skipped=2)


def record_of(part, gpu="NVIDIA H200", **more):
    """A part's record with one case of a few fixed speeds."""
    labels = {"part": part, "size": "0.6b", "weights": "bf16", "mode": "graphs", "options": "default"}
    case = Case(labels | {"batch_size": 1, "context": 32} | more, {"bytes_per_step": 2e9})
    case.samples = {"ttft_s": [0.02], "step_s": [[0.001] * 3], "bandwidth_gb_s": [4000.0]}
    results = Results(
        None, [case], environment={"device": "cuda", "gpu": gpu, "torch": "2.11.0", "qwen3fast": "1", "threads": 2}
    )
    results.notes["step"] = {"kernels": 170, "kernel_us": 9, "launches": 2, "graph_launches": 1, "eager_kernels": []}
    return make_record(part, "cuda", {"0.6b-bf16-cached-graphs-default-batch1": results})


def test_parts_are_merged_and_held_against_the_targets(tmp_path):
    write_json(record_of("decode").to_dict(), tmp_path / "decode.json")
    write_json(record_of("peers", mode="transformers-static").to_dict(), tmp_path / "peers.json")
    merged = merge(tmp_path)
    assert Record.from_dict(merged.to_dict()).suite == "gpu"
    assert [case.labels["part"] for case in merged.cases] == ["decode", "peers"]
    found = {row["what"]: row for row in merged.notes["targets"]}
    speed = found["0.6B, one row, context 32"]
    assert (speed["wanted"], speed["measured"], speed["reached"]) == (1700, pytest.approx(1000), False)
    assert found["0.6B, over transformers, compiled"]["measured"] == pytest.approx(1)
    assert found["0.6B, kernels per token"]["reached"] is True
    assert "0.6B, one row, context 4,096" not in found
    text = report.as_report(merged)
    assert "1,700 wanted    1,000 measured tokens/s not reached" in text
    assert "170 kernels per step" in text
    assert report.draw(merged, tmp_path / "gpu.png") == "" and (tmp_path / "gpu.png").stat().st_size > 10_000
    write_json(record_of("large", gpu="NVIDIA H100").to_dict(), tmp_path / "large.json")
    with pytest.raises(ValueError, match="part large ran with gpu 'NVIDIA H100', others with 'NVIDIA H200'"):
        merge(tmp_path)


def test_a_target_of_less_is_reached_by_less():
    few = targets.Target("x", "", {"": 175}, lambda record: 100.0, is_higher_better=False)
    many = replace(few, find=lambda record: 200.0)
    same = replace(few, find=lambda record: 175.0)
    record = record_of("decode")
    assert [t.line(record)["reached"] for t in (few, many, same)] == [True, False, True]


def test_what_cannot_run_is_said_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (
        (["--part", "decode"], "sees no CUDA device; --device cpu shows"),
        (["--part", "decode,none"], "unknown part 'none'; there are tests, decode"),
        (["--merge", "--output", str(tmp_path)], "has no part's record"),
    ):
        with pytest.raises(SystemExit):
            main.main(arguments)
        assert message in capsys.readouterr().err


def test_the_last_line_of_a_log_is_the_last_that_says_something(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("first\nlast \n\n  \n")
    assert last_line(log) == "last"
    log.write_text("")
    assert last_line(log) == ""
