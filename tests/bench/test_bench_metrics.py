"""Every derived figure against one computed by hand, and the laws they follow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.bench.metrics import METRICS, derive, per_repetition, percentile
from qwen3fast.bench.statistics import estimate

STEPS = st.lists(st.lists(st.floats(1e-4, 10), min_size=1, max_size=5), min_size=1, max_size=4)


def values(samples, labels=None, facts=None):
    return per_repetition(labels or {}, facts or {}, samples)


def test_steps_give_speed_by_the_median_of_each_repetition():
    found = values({"step_s": [[0.1, 0.2, 0.9], [0.4]]}, {"batch_size": 4})
    assert found["step_ms"] == [200.0, 400.0]
    assert found["decode_tok_s"] == [20.0, 10.0]
    assert found["step_p99_ms"] == [900.0]


def test_steps_without_a_batch_size_are_of_one_row():
    assert values({"step_s": [[0.5]]})["decode_tok_s"] == [2.0]


def test_steps_of_an_empty_repetition_are_left_out():
    assert values({"step_s": [[], [0.5]]})["decode_tok_s"] == [2.0]
    assert values({"step_s": [[]]}) == {}


def test_bytes_give_the_rate_and_its_share_of_the_bandwidth_beside_it():
    samples = {"step_s": [[0.1], [0.2]], "bandwidth_gb_s": [20.0, 40.0]}
    found = values(samples, facts={"bytes_per_step": 1e9})
    assert found["effective_gb_s"] == [10.0, 5.0]
    assert found["share_of_bandwidth"] == [0.5, 0.125]
    assert found["limit_tok_s"] == [20.0, 40.0]


def test_bytes_without_a_bandwidth_for_each_repetition_give_no_share():
    samples = {"step_s": [[0.1], [0.2]], "bandwidth_gb_s": [20.0]}
    assert values(samples, facts={"bytes_per_step": 1e9}).keys() >= {"effective_gb_s"}
    assert not values(samples, facts={"bytes_per_step": 1e9}).keys() & {"share_of_bandwidth", "limit_tok_s"}


def test_limit_is_the_slower_of_reading_and_computing():
    facts = {"bytes_per_step": 1e9, "flop_per_step": 1e9}
    samples = {"step_s": [[1.0], [1.0]], "bandwidth_gb_s": [10.0, 10.0], "gemm_flop_s": [1e12, 1e9]}
    # Reading takes 0.1 s in both; computing 1 ms, then 1 s. Three rows share a step.
    assert values(samples, {"batch_size": 3}, facts)["limit_tok_s"] == pytest.approx([30.0, 3.0])


def test_limit_needs_no_rate_where_only_bytes_are_known():
    samples = {"step_s": [[1.0]], "bandwidth_gb_s": [10.0], "gemm_flop_s": [1.0]}
    assert values(samples, facts={"bytes_per_step": 1e9})["limit_tok_s"] == [10.0]


def test_first_token_gives_the_rate_of_the_prompt():
    samples = {"ttft_s": [0.5, 2.0], "gemm_flop_s": [8e9, 8e9]}
    found = values(samples, {"context": 100, "batch_size": 2}, {"prefill_flop": 4e9})
    assert found["ttft_s"] == [0.5, 2.0]
    assert found["prefill_tok_s"] == [400.0, 100.0]
    assert found["prefill_flop_s"] == [8e9, 2e9]
    assert found["prefill_share_of_gemm"] == [1.0, 0.25]


def test_first_token_without_a_context_or_rate_says_less():
    assert values({"ttft_s": [0.5]}).keys() == {"ttft_s"}
    assert "prefill_share_of_gemm" not in values({"ttft_s": [0.5]}, facts={"prefill_flop": 1.0})


def test_clients_give_latencies_of_each_repetition():
    samples = {"ttfts_s": [[0.3, 0.1, 0.2], [0.4]], "itl_s": [[0.01, 0.03, 0.02], [0.05, 0.05]]}
    found = values(samples)
    assert (found["ttft_s"], found["ttft_p99_s"]) == ([0.2, 0.4], [0.3, 0.4])
    assert (found["itl_ms"], found["itl_p99_ms"]) == (pytest.approx([20.0, 50.0]), pytest.approx([30.0, 50.0]))


def test_seconds_give_rates_of_tokens_requests_and_bytes():
    found = values({"seconds": [2.0, 4.0]}, facts={"tokens": 100, "requests": 8, "file_bytes": 8e9})
    assert (found["seconds"], found["tok_s"], found["requests_s"]) == ([2.0, 4.0], [50.0, 25.0], [4.0, 2.0])
    assert found["file_gb_s"] == [4.0, 2.0]


def test_samples_named_as_a_metric_are_taken_as_they_are():
    found = values({"peak_memory_bytes": [5, 6], "logit_error": [0.1], "token_s": [[1.0, 2.0]]})
    assert found == {"peak_memory_bytes": [5, 6], "logit_error": [0.1]}


def test_derive_estimates_each_of_the_values():
    samples, labels, facts = {"step_s": [[0.1], [0.2], [0.4]], "ttft_s": [1.0, 2.0, 3.0]}, {"context": 6}, {"steps": 1}
    found = derive(labels, facts, samples)
    assert found == {name: estimate(v) for name, v in per_repetition(labels, facts, samples).items()}
    assert found["decode_tok_s"].median == 5.0 and found["prefill_tok_s"].median == 3.0


def test_derive_knows_a_title_for_all_it_gives():
    samples = {"step_s": [[0.1]], "ttft_s": [1.0], "bandwidth_gb_s": [9.0], "gemm_flop_s": [9.0], "seconds": [1.0]}
    samples |= {"itl_s": [[0.1]], "ttfts_s": [[0.1]]}
    facts = dict.fromkeys(
        ("bytes_per_step", "flop_per_step", "prefill_flop", "tokens", "requests", "file_bytes", "steps"), 1.0
    )
    assert derive({"context": 1}, facts, samples).keys() <= METRICS.keys()


@given(STEPS, st.floats(0.25, 4))
def test_decode_speed_falls_as_steps_grow(steps, factor):
    before = values({"step_s": steps})["decode_tok_s"]
    after = values({"step_s": [[s * factor for s in each] for each in steps]})["decode_tok_s"]
    assert after == pytest.approx([v / factor for v in before])


@given(STEPS, st.integers(1, 64))
def test_decode_speed_grows_with_the_rows_and_a_step_does_not(steps, rows):
    one, many = values({"step_s": steps}), values({"step_s": steps}, {"batch_size": rows})
    assert many["decode_tok_s"] == pytest.approx([rows * v for v in one["decode_tok_s"]])
    assert many["step_ms"] == one["step_ms"]


@given(STEPS, st.floats(1e6, 1e10), st.floats(1, 1000))
def test_share_of_bandwidth_is_speed_over_limit(steps, num_bytes, gb_s):
    samples = {"step_s": steps, "bandwidth_gb_s": [gb_s] * len(steps)}
    found = values(samples, {"batch_size": 2}, {"bytes_per_step": num_bytes})
    shares = [a / b for a, b in zip(found["decode_tok_s"], found["limit_tok_s"], strict=True)]
    assert found["share_of_bandwidth"] == pytest.approx(shares)


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 1))
def test_percentile_is_one_of_the_values_and_not_exceeded_by_its_share(entries, share):
    ordered = sorted(entries)
    value = percentile(ordered, share)
    assert value in entries
    assert sum(v <= value for v in ordered) >= share * len(ordered) - 1e-9


def test_metric_text_scales_to_its_unit():
    assert METRICS["peak_memory_bytes"].text(2.5e9) == "2.50 GB"
    assert METRICS["share_of_bandwidth"].text(0.756) == "76%"
