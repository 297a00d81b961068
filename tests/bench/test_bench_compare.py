"""Comparing two records: what counts as a change, what the machine did, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
from bench_fakes import ENVIRONMENT, MODEL, make_case, make_record
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.bench.__main__ import main
from qwen3fast.bench.compare import compare_records
from qwen3fast.bench.record import Case, write_json
from qwen3fast.bench.statistics import ratio
from qwen3fast.bench.verdict import BETTER, MACHINE, MASKED, SAME, UNCLEAR, UNJUDGED, WORSE, judge, judge_zero

STEADY = [100.0, 101.0, 99.0, 100.5, 99.5]
FAST_MEMORY, SLOW_MEMORY = [20.0, 20.2, 19.8, 20.1, 19.9], [15.6, 15.7, 15.5, 15.65, 15.55]


def scaled(factor, values=STEADY):
    return [factor * v for v in values]


def verdict(old, new, metric="decode_tok_s", threshold=0.03):
    [change] = compare_records(make_record(old), make_record(new), (metric,), threshold).changes
    return change.verdict


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (STEADY, SAME),
        (scaled(1.2), BETTER),
        (scaled(0.8), WORSE),
        (scaled(1.03), UNCLEAR),
        (scaled(1.01), SAME),
        ([60.0, 140.0, 100.0, 80.0, 120.0], UNCLEAR),
    ],
)
def test_compare_judges_by_the_whole_interval(new, expected):
    assert verdict(make_case(STEADY), make_case(new)) == expected


def test_compare_knows_that_less_time_is_better():
    assert verdict(make_case(STEADY), make_case(scaled(1.2)), "step_ms") == BETTER
    assert verdict(make_case(STEADY), make_case(scaled(0.8)), "step_ms") == WORSE


def test_compare_takes_one_slow_repetition_of_many_for_noise():
    assert verdict(make_case(STEADY + STEADY), make_case([*STEADY, *STEADY[:-1], 20.0])) == SAME


def test_compare_does_not_count_what_the_memory_did_as_well():
    # Decoding is a fifth slower, but memory is 22% slower.
    assert verdict(make_case(STEADY, FAST_MEMORY), make_case(scaled(0.8), SLOW_MEMORY)) == MACHINE
    assert verdict(make_case(scaled(0.8), SLOW_MEMORY), make_case(STEADY, FAST_MEMORY)) == MACHINE


def test_compare_counts_what_goes_beyond_what_the_memory_did():
    assert verdict(make_case(STEADY, FAST_MEMORY), make_case(scaled(0.5), SLOW_MEMORY)) == WORSE


def test_compare_marks_a_loss_that_faster_memory_hides():
    assert verdict(make_case(STEADY, SLOW_MEMORY), make_case(STEADY, FAST_MEMORY)) == MASKED


def test_compare_counts_a_step_that_reads_less_as_faster():
    # By NEW's own bytes its share of the bandwidth falls; what counts is that the machine is as fast as before.
    new = make_case(scaled(1.5))
    new.facts["bytes_per_step"] /= 2
    assert verdict(make_case(STEADY), new) == BETTER


def test_compare_judges_work_without_a_cache_by_the_rate_of_arithmetic():
    old, new = make_case(STEADY), make_case(scaled(0.5))
    for case in (old, new):
        case.facts["flop_per_step"] = 1e12
    new.samples["gemm_flop_s"] = [0.5e11] * 5
    assert verdict(old, new) == MACHINE


def test_compare_judges_prefill_by_the_matrix_product_and_not_by_memory():
    old, new = make_case(STEADY, FAST_MEMORY), make_case(STEADY, SLOW_MEMORY)
    new.samples["ttft_s"] = [0.7] * 5
    assert verdict(old, new, "prefill_tok_s") == WORSE
    new.samples["gemm_flop_s"] = [0.7e11] * 5
    assert verdict(old, new, "prefill_tok_s") == MACHINE


def test_compare_holds_other_figures_against_memory_and_arithmetic():
    def served(seconds, gb_s, flop_s):
        samples = {"seconds": [seconds] * 5, "bandwidth_gb_s": [gb_s] * 5, "gemm_flop_s": [flop_s] * 5}
        return Case({"rows": 4}, {"tokens": 100.0}, samples)

    assert verdict(served(1.0, 20.0, 1e11), served(2.0, 20.0, 1e11), "tok_s") == WORSE
    assert verdict(served(1.0, 20.0, 1e11), served(2.0, 10.0, 1e11), "tok_s") == MACHINE
    assert verdict(served(1.0, 20.0, 1e11), served(2.0, 20.0, 5e10), "seconds") == MACHINE


def test_compare_judges_as_measured_where_the_machine_is_unknown():
    old, new = make_case(STEADY), make_case(scaled(0.8))
    for case in (old, new):
        del case.samples["bandwidth_gb_s"], case.samples["gemm_flop_s"]
    assert verdict(old, new) == WORSE


@pytest.mark.parametrize("n", [1, 2])
def test_compare_says_nothing_of_fewer_than_three_repetitions(n):
    old, new = make_record(make_case([100.0] * n)), make_record(make_case([10.0] * n))
    comparison = compare_records(old, new)
    assert {change.verdict for change in comparison.changes} == {UNJUDGED}
    assert comparison.status == 2


@pytest.mark.parametrize(
    ("metric", "old", "new", "expected"),
    [
        ("logit_error", 0.02, 0.03, WORSE),
        ("logit_error", 0.02, 0.0201, SAME),
        ("logit_error", 0.0, 0.0, SAME),
        ("logit_error", 0.0, 0.01, WORSE),
        ("same_token", 0.9, 0.99, BETTER),
        ("same_token", 0.9, 0.0, WORSE),
        ("seconds", 0.0, 1.0, UNCLEAR),
    ],
)
def test_compare_judges_computed_figures_by_a_single_value(metric, old, new, expected):
    before, after = (Case({"what": "error"}, {}, {metric: [value]}) for value in (old, new))
    assert verdict(before, after, metric) == expected


def test_compare_judges_what_matters_once():
    record = make_record(make_case(STEADY))
    assert [c.metric for c in compare_records(record, record).changes] == ["decode_tok_s", "prefill_tok_s"]


def test_compare_asks_for_more_where_a_record_is_noisy():
    old, new = make_record(make_case(STEADY)), make_record(make_case(scaled(0.8)), noise=["loud"])
    comparison = compare_records(old, new, ("decode_tok_s",), 0.03)
    assert comparison.timed_threshold == pytest.approx(0.09) and comparison.of(WORSE)
    new.conditions["bandwidth_gb_s"] = [20.0, 30.0] * 5  # half as fast again at times
    comparison = compare_records(old, new, ("decode_tok_s",), 0.03)
    assert comparison.timed_threshold == pytest.approx(0.5) and not comparison.of(WORSE)


def test_compare_asks_no_more_of_what_is_not_timed_where_a_record_is_noisy():
    def record(num_bytes, noise):
        case = make_case(STEADY)
        case.samples["peak_memory_bytes"] = [num_bytes] * 5
        return make_record(case, noise=noise)

    assert compare_records(record(100, []), record(105, ["loud"]), ("peak_memory_bytes",)).of(WORSE)


def test_compare_matches_cases_by_labels_in_any_order():
    old, new = make_case(STEADY), make_case(STEADY)
    new.labels = dict(reversed(new.labels.items()))
    assert compare_records(make_record(old), make_record(new)).only_in_new == []


def test_compare_lists_cases_that_only_one_has():
    shared = make_case(STEADY)
    old, new = make_record(shared, make_case(STEADY, context=64)), make_record(make_case(STEADY, context=8), shared)
    comparison = compare_records(old, new)
    assert [name.split(", ")[2] for name in comparison.only_in_old + comparison.only_in_new] == [
        "context 64",
        "context 8",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "roofline"}, "suite 'cache' and 'roofline'"),
        ({"environment": ENVIRONMENT | {"cpu": "Other"}}, "cpu 'Test CPU' and 'Other'"),
        ({"environment": ENVIRONMENT | {"threads": 1}}, "threads 2 and 1"),
        ({"environment": ENVIRONMENT | {"gpu": "H100"}}, "gpu None and 'H100'"),
        ({"model": MODEL | {"name": "tiny"}}, "model name 'random:test' and 'tiny'"),
        ({"model": MODEL | {"dtype": "float32"}}, "model dtype 'bfloat16' and 'float32'"),
    ],
)
def test_compare_refuses_other_suites_machines_and_models(changes, message):
    old, new = make_record(make_case(STEADY)), make_record(make_case(STEADY), **changes)
    with pytest.raises(ValueError, match=f"these records cannot be compared: {message}; --force compares them anyway"):
        compare_records(old, new)
    assert f"different {message}" in compare_records(old, new, force=True).notes


def test_compare_refuses_records_with_nothing_in_common():
    with pytest.raises(ValueError, match="nothing to compare: of 0 cases in common"):
        compare_records(make_record(make_case(STEADY)), make_record(make_case(STEADY, context=64)))
    record = make_record(make_case(STEADY))
    with pytest.raises(ValueError, match="of 1 cases in common, none has perplexity in both records"):
        compare_records(record, record, ("perplexity",))


def test_compare_refuses_cases_with_the_same_labels():
    with pytest.raises(ValueError, match="NEW has two cases with the same labels: cached-eager, bf16"):
        compare_records(make_record(make_case(STEADY)), make_record(make_case(STEADY), make_case(STEADY)))


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_compare_refuses_a_bad_threshold(threshold):
    record = make_record(make_case(STEADY))
    with pytest.raises(ValueError, match="the threshold must be at least 0 and less than 1"):
        compare_records(record, record, threshold=threshold)


def test_compare_notes_what_else_a_reader_should_know():
    old = make_record(make_case(STEADY), environment=ENVIRONMENT | {"torch": "2.8.0"}, noise=["loud"])
    other = make_case(STEADY)
    other.facts["steps"] = 8.0
    new = make_record(other, interrupted=True)
    new.run["git_dirty"] = True
    assert compare_records(old, new).notes == [
        "torch was 2.8.0, is 2.9.0",
        "OLD is noisy: loud",
        "NEW was interrupted",
        "NEW was measured with uncommitted changes",
        "cached-eager, bf16, context 32, batch_size 1: 3 steps before, 8 now",
    ]


def samples(low, high):
    return st.lists(st.floats(low, high), min_size=3, max_size=6)


def judge_both_ways(a, b):
    return [judge("decode_tok_s", ratio(new, old), (), 0.03) for new, old in ((a, b), (b, a))]


@given(samples(1, 100), samples(1.04, 3))
def test_judge_sees_the_opposite_when_old_and_new_change_places(slow, factors):
    fast = [max(slow) * factor for factor in factors]
    assert judge_both_ways(fast, slow) == [BETTER, WORSE]


@given(samples(100, 102.9), samples(100, 102.9))
def test_judge_calls_what_lies_within_the_threshold_the_same_both_ways(a, b):
    assert judge_both_ways(a, b) == [SAME, SAME]


def test_judge_zero_of_equal_values_is_the_same():
    assert judge_zero("decode_tok_s", 0.0, 0.0) == SAME


@pytest.fixture
def files(tmp_path):
    """Writes records to files and gives their names."""

    def write(*records):
        paths = [tmp_path / f"{i}.json" for i in range(len(records))]
        for record, path in zip(records, paths, strict=True):
            write_json(record.to_dict(), path)
        return [str(path) for path in paths]

    return write


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.5, 0), (0.5, 1)])
def test_compare_command_gives_a_status_for_scripts(files, capsys, factor, status):
    names = files(make_record(make_case(STEADY)), make_record(make_case(scaled(factor))))
    assert main(["compare", *names]) == status
    out = capsys.readouterr().out
    assert ("WORSE: 1 changes" in out) == (status == 1)
    assert ("x0.500" in out) == (status == 1) and "memory reads: 20 GB/s before, 20 now (x1.00)" in out


def test_compare_command_fails_for_wrong_tokens(files, capsys):
    wrong = make_record(make_case(STEADY), checks={"cached-eager": {"passed": False}})
    assert main(["compare", *files(make_record(make_case(STEADY)), wrong)]) == 1
    assert "WRONG TOKENS in NEW: cached-eager" in capsys.readouterr().out


def test_compare_command_says_that_one_repetition_is_too_few(files, capsys):
    assert main(["compare", *files(*[make_record(make_case([10.0]))] * 2)]) == 2
    assert "nothing could be judged: measure both with --repetitions 3 or more" in capsys.readouterr().out


def test_compare_command_prints_everything_as_json(files, capsys):
    names = files(make_record(make_case(STEADY)), make_record(make_case(scaled(0.5)), make_case(STEADY, context=8)))
    assert main(["compare", *names, "--json", "--metric", "decode_tok_s", "--threshold", "0.1"]) == 1
    value = json.loads(capsys.readouterr().out)
    [change] = value["changes"]
    assert (change["verdict"], change["ratio"]["median"], change["labels"]["context"]) == (WORSE, 0.5, 32)
    assert change["relative"]["limit_tok_s"]["median"] == pytest.approx(0.5)
    assert (value["status"], value["threshold"], len(value["only_in_new"])) == (1, 0.1, 1)


def test_compare_command_shows_what_is_the_same_if_asked(files, capsys):
    names = files(*[make_record(make_case(STEADY))] * 2)
    assert main(["compare", *names]) == 0
    assert "new/old" not in capsys.readouterr().out
    assert main(["compare", *names, "--all"]) == 0
    assert "new/old" in capsys.readouterr().out


def test_compare_command_shows_what_moved_though_it_is_unclear(files, capsys):
    names = files(make_record(make_case(STEADY)), make_record(make_case([60.0, 120.0, 100.0, 80.0, 85.0])))
    assert main(["compare", *names]) == 0
    assert "x0.850" in capsys.readouterr().out


def test_compare_command_refuses_with_status_2(files, tmp_path, capsys):
    [name] = files(make_record(make_case(STEADY)))
    assert main(["compare", name, str(tmp_path / "none.json")]) == 2
    assert "none.json not found" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["compare", name, name, "--metric", "beauty"])


def test_compare_command_keeps_its_status_when_the_reader_leaves(files):
    names = files(make_record(make_case(STEADY)), make_record(make_case(scaled(0.5))))
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from qwen3fast.bench.__main__ import main; sys.exit(main(['compare', *sys.argv[1:]]))"
    done = subprocess.run([sys.executable, "-c", code, *names], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
