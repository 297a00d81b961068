"""Tables and pictures of the benchmarks outside of the package, and the README's, on records made up here."""

import json

import batching_picture
import operators_picture
import pytest
import tables
import targets
import update_readme
from peers import picture

from qwen3fast.bench.record import Case, Record, write_json

ENVIRONMENT = {"device": "cpu", "cpu": "a CPU", "cpu_count": 2, "threads": 2, "platform": "x", "python": "3"}
ENVIRONMENT |= {"torch": "2", "qwen3fast": "1"}
RUN = {"utc": "2026-01-02T03:04:05Z", "command": "x", "git_commit": None, "git_dirty": None}


def record(suite, cases, **more):
    return Record(suite, RUN, ENVIRONMENT, {"name": "random:0.6b"}, cases, **more)


def peers_record():
    def case(engine, format, what, context, step_s, ttft_s):
        samples = {"ttft_s": [ttft_s, ttft_s]} | ({"step_s": [[step_s], [step_s]]} if step_s else {})
        labels = {"engine": engine, "format": format, "context": context, "what": what, "batch_size": 1}
        return Case(labels, {}, samples)

    return record(
        "peers",
        [
            case("qwen3fast", "bf16", "decode", 32, 0.025, 0.1),
            case("other bf16", "bf16", "decode", 32, 0.05, 0.1),
            case("qwen3fast", "bf16", "decode", 1000, 0.04, 2.0),
            case("qwen3fast", "bf16", "prefill", 512, None, 2.0),
            case("other bf16", "bf16", "prefill", 512, None, 1.0),
            case("qwen3fast", "int4", "decode", 32, 0.01, 0.1),
        ],
    )


def batching_record():
    def offline(engine, format, size, seconds):
        labels = {"what": "offline", "engine": engine, "format": format, "batch_size": size}
        return Case(labels, {"tokens": 100.0, "requests": 5.0}, {"seconds": [seconds]})

    def online(size, load):
        labels = {"what": "online", "engine": "qwen3fast", "format": "bf16", "batch_size": size, "load": load}
        facts = {"tokens": 30.0, "requests": 3.0, "offered_requests_s": 1.5}
        return Case(labels, facts, {"ttfts_s": [[0.3, 0.1, 0.2]], "itl_s": [[0.01, 0.02, 0.04]], "seconds": [3.0]})

    cases = [offline("qwen3fast", "bf16", 1, 5.0), offline("qwen3fast", "bf16", 4, 2.0)]
    cases += [offline("transformers, static", "bf16", 4, 4.0)]
    return record("batching", cases + [online(size, load) for size in (1, 4) for load in (0.3, 0.9)])


def operators_record():
    def case(operator, *ms, phase="decode"):
        labels = {"phase": phase, "format": "bf16", "context": 32, "operator": operator}
        return Case(labels, {}, {"operator_ms": list(ms)})

    decode = [case("whole", 5.0, 7.0, 6.0), case("other", 5.0), case("sampler", 1.0)]
    return record("operators", [*decode, case("whole", 9.0, phase="prefill")])


def quantization_record():
    def case(what, layer=None, **samples):
        labels = {"format": "int4", "what": what} | ({"layer": layer} if layer else {})
        facts = {"weight_bytes": 2.5e6} if what == "model" else {}
        return Case(labels, facts, {name: [value] for name, value in samples.items()})

    layers = [case("layer", f"l{i}", weight_error=0.1 * i, output_error=0.01 * i) for i in (1, 2, 3)]
    return record("quantization-tiny", [*layers, case("model", perplexity=1.5), case("copying", accuracy=0.75)])


def moe_record():
    def case(model, *step_s):
        labels = {"model": model, "format": "int4", "num_experts": 32, "context": 32, "batch_size": 1}
        facts = {"parameters": 5e8, "read_parameters": 1.5e8, "bytes_per_step": 7e7}
        return Case(labels, facts, {"step_s": [[s] for s in step_s]})

    # One round is slow: a ratio of medians would mix it with the others.
    rounds = (
        case("experts", 0.02, 0.1, 0.03),
        case("dense_active", 0.01, 0.05, 0.015),
        case("dense_all", 0.04, 0.2, 0.06),
    )
    return record("moe", list(rounds))


def test_a_mixture_stands_between_two_dense_models():
    row = ["int4, 32", "500 million", "150 million", "30", "15", "60", "2.00x", "2.00x"]
    assert tables.moe_rows(moe_record())[1:] == [row]


def test_peers_are_a_row_each_with_how_many_times_as_fast_we_are():
    assert tables.peers_rows(peers_record(), ratios=True) == [
        ["format", "engine", "decode at 32", "decode at 1,000", "prefill of 512"],
        ["bf16", "qwen3fast", "40.0 (1.00x)", "25.0 (1.00x)", "256.0 (1.00x)"],
        ["bf16", "other bf16", "20.0 (2.00x)", "", "512.0 (0.50x)"],
        ["int4", "qwen3fast", "100.0 (1.00x)", "", ""],
    ]
    assert tables.peers_rows(peers_record())[2] == ["bf16", "other bf16", "20.0", "", "512.0"]


def test_batching_has_throughput_by_batch_size_and_latency_by_batch_size_and_load():
    assert tables.offline_rows(batching_record()) == [
        ["tokens/s", "batch 1", "batch 4"],
        ["qwen3fast, bf16", "20", "50"],
        ["transformers, static, bf16", "", "25"],
    ]
    rows = tables.online_rows(batching_record())
    assert [row[:3] for row in rows[1:]] == [["bf16", size, load] for size in "14" for load in ("30%", "90%")]
    assert rows[1][3:] == ["1.50", "10", "200 ms, 300 ms", "20, 40"]


def test_operators_are_columns():
    assert tables.operators_rows(operators_record()) == [
        ["", "whole", "sampler", "other"],
        ["decode 32, bf16", "6.00", "1.00", "5.00"],
        ["prefill 32, bf16", "9.00", "", ""],
    ]


def test_picture_of_operators_puts_them_side_by_side():
    step, prompt = operators_picture.draw(operators_record()).axes
    widths = [bar.get_width() for bar in step.patches]
    assert widths == [1.0, 5.0] and [bar.get_x() for bar in step.patches] == [0.0, 1.0]
    assert [text.get_text().strip() for text in step.texts] == ["6"]
    assert [bar.get_width() for bar in prompt.patches] == [0.0, 0.0]  # nothing of it but the whole was recorded


def test_quantization_shows_the_middle_and_the_worst_layer():
    assert tables.quantization_rows(quantization_record())[1:] == [
        ["int4", "2.50", "20.00%", "2.00%", "3.00%", "1.5000", "75.0%"]
    ]


@pytest.mark.parametrize(
    ("draw", "make", "panels"), [(picture.draw, peers_record, 3), (batching_picture.draw, batching_record, 3)]
)
def test_pictures_have_their_panels(draw, make, panels, tmp_path):
    figure = draw(make())
    assert len(figure.axes) == panels
    figure.savefig(tmp_path / "picture.png")


def test_a_picture_of_latency_has_two_lines_for_each_batch_size():
    _, ttft, between = batching_picture.draw(batching_record()).axes
    names = [f"batch {size}, {quantile}" for size in (1, 4) for quantile in ("p50", "p99")]
    for axes, p50, p99 in ((ttft, 200, 300), (between, 20, 40)):
        assert [line.get_label() for line in axes.lines] == names
        assert [list(line.get_ydata()) for line in axes.lines[:2]] == [pytest.approx([p, p]) for p in (p50, p99)]


def cache_record():
    def case(mode, step_s):
        labels = {"context": 32, "batch_size": 1, "mode": mode, "format": "bf16"}
        return Case(labels, {}, {"ttft_s": [0.5], "step_s": [[step_s]]})

    return record("cache", [case("uncached-eager", 0.1), case("cached-compiled", 0.025)])


def rounding_record():
    def speed(format, context, step_s):
        labels = {"mode": "cached-compiled", "format": format, "context": context, "batch_size": 1, "what": "speed"}
        return Case(labels, {}, {"step_s": [[step_s]]})

    def error(format, value, size):
        facts = {"weight_bytes": size}
        samples = {"logit_error": [value], "same_token": [1 - value]}
        return Case({"format": format, "what": "error"}, facts, samples)

    speeds = [speed(f, n, s) for f, s in (("bf16", 0.05), ("int4", 0.01)) for n in (32, 1024)]
    return record("quantization", [error("bf16", 0.0, 2e9), error("int4", 0.1, 5e8), *speeds])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (cache_record, "| 32 | 10 | 40 | 4.0x | 500 ms |  |"),
        (rounding_record, "| int4 | 0.50 | 100 | 100 | 10.00% | 90.0% |"),
        (peers_record, "| bf16 | other bf16 | 20.0 |  | 512.0 |"),
        (batching_record, "| bf16 | 4 | 90% | 1.50 | 10 | 200 ms, 300 ms | 20, 40 |"),
        (operators_record, "| decode 32, bf16 | 6.00 | 1.00 | 5.00 |"),
        (quantization_record, "| int4 | 2.50 | 20.00% | 2.00% | 3.00% | 1.5000 | 75.0% |"),
    ],
)
def test_the_readme_gets_the_table_of_each_record_and_where_it_was_measured(make, line, tmp_path):
    write_json(make().to_dict(), tmp_path / "r.json")
    text = "Before.\n<!-- table: r.json -->\nold\n<!-- end -->\nAfter."
    new = update_readme.update(text, tmp_path)
    assert line in new.splitlines() and "old" not in new
    assert new.startswith("Before.\n<!-- table: r.json -->\n| ") and new.endswith("\n<!-- end -->\nAfter.")
    assert "\n\na CPU, 2 threads; torch 2; qwen3fast 1, 2026-01-02.\n" in new
    assert update_readme.update(new, tmp_path) == new


def test_the_cache_table_tells_where_the_first_token_comes_later_with_the_cache():
    slow = cache_record()
    assert "FAULT" not in update_readme.cache_table(slow)
    slow.cases[1].samples["ttft_s"] = [0.8]
    assert update_readme.cache_table(slow).endswith(
        "|\n\nFAULT at 32 tokens (bf16, batch 1): the first token takes 800 ms with the cache, 500 ms without."
    )


def test_the_version_of_transformers_and_noise_are_said(tmp_path):
    noisy = peers_record()
    noisy.environment = noisy.environment | {"transformers": "5"}
    noisy.noise = ["something"]
    write_json(noisy.to_dict(), tmp_path / "r.json")
    assert update_readme.render(tmp_path / "r.json").endswith("; noisy run, see the record; transformers 5.")


ZEN_5, ZEN_4, _ = targets.PROCESSORS


def peers_case(engine, shape, tok_s):
    """Return a case with these tokens/s, one per round."""
    format, what, context = shape
    labels = {"engine": engine, "format": format, "context": context, "what": what, "batch_size": 1}
    decode = {"ttft_s": [0.1] * len(tok_s), "step_s": [[1 / v] for v in tok_s]}
    return Case(labels, {}, {"ttft_s": [context / v for v in tok_s]} if what == "prefill" else decode)


def write_peers(folder, name, cpu, speeds, utc="2026-01-02T03:04:05Z", model="random:0.6b", **environment):
    """Write a record of speeds: shape -> engine -> tokens/s of each round."""
    cases = [peers_case(engine, shape, v) for shape, engines in speeds.items() for engine, v in engines.items()]
    found = Record("peers", RUN | {"utc": utc}, ENVIRONMENT | {"cpu": cpu} | environment, {"name": model}, cases)
    write_json(found.to_dict(), folder / f"peers-{name}.json")


DECODE, PREFILL = ("int4", "decode", 1000), ("bf16", "prefill", 512)
FIELD = {
    # The machine was slow in the second round; "b" was the fastest of the others in the third only.
    DECODE: {"qwen3fast": [30, 15, 28], "a int4": [20, 10, 10], "b int4": [5, 5, 14], "qwen3fast int8 cache": [99] * 3},
    PREFILL: {"qwen3fast": [90, 91, 92], "openvino-genai bf16": [100, 101, 102], "a bf16": [10, 10, 10]},
}


def test_a_ratio_is_to_the_best_other_engine_of_the_same_round(tmp_path):
    write_peers(tmp_path, "x", ZEN_5, FIELD)
    [(name, [found])] = targets.load_all(tmp_path).items()
    side = targets.beside(found, DECODE)
    assert (name, side.own, side.best, side.engine) == ("Zen 5", 28, 10, "a int4")
    assert side.ratios == pytest.approx([1.5, 1.5, 2.0]) and side.verdict == 1
    assert targets.beside(found, PREFILL).verdict == -1
    assert targets.beside(found, PREFILL, "a").ratios == pytest.approx([9.0, 9.1, 9.2])
    assert targets.beside(found, PREFILL, "b") is None and targets.beside(found, ("bf16", "decode", 32)) is None


def test_engines_without_some_of_our_rounds_are_left_out(tmp_path):
    speeds = {DECODE: {"qwen3fast": [30, 15, 28], "a": [20, 10, 10], "b": [99, 99], "none": []}}
    write_peers(tmp_path, "x", ZEN_5, speeds | {PREFILL: {"qwen3fast": [], "a": [10]}})
    [[found]] = targets.load_all(tmp_path).values()
    side = targets.beside(found, DECODE)
    assert (side.best, side.engine, len(side.ratios)) == (10, "a", 3) and targets.beside(found, PREFILL) is None
    write_peers(tmp_path, "x", ZEN_5, {DECODE: {"qwen3fast": [30], "a": [20]}})
    [cell] = target_cells(tmp_path).values()
    assert cell == "1.50, one round: met"


def test_the_front_page_has_processors_side_by_side_and_counts_wins_and_losses_of_all_lengths(tmp_path):
    write_peers(tmp_path, "x", ZEN_5, FIELD)
    level = {("bf16", "decode", 32): {"qwen3fast": [10, 12, 11], "a": [11, 11, 11]}}
    unshown = {("int8", "prefill", 4000): {"qwen3fast": [8, 8, 8], "a": [9, 9, 9]}}
    write_peers(tmp_path, "y", ZEN_4, level)
    write_peers(tmp_path, "z", ZEN_4, unshown)
    write_peers(tmp_path, "pinned", ZEN_4, FIELD, cpu_level="avx2")
    lines = update_readme.sides_table(tmp_path).splitlines()
    ours = "{0}: qwen3fast | best of the others | ratio"
    assert lines[0] == f"| tokens/s | {ours.format('Zen 5')} | {ours.format('Zen 4')} |" and len(lines) == 2 + 9 + 3
    assert lines[2] == r"| bf16, decode at 32 | not run |  |  | 11.0 | 11.0 a | 1.00 \[0.91, 1.09\] |"
    assert lines[4] == (
        r"| bf16, prefill of 512 | 91.0 | **101.0** openvino-genai | 0.90 \[0.90, 0.90\] slower | not run |  |  |"
    )
    assert lines[9] == r"| int4, decode at 1,000 | **28.0** | 10.0 a | 1.50 \[1.50, 2.00\] | not run |  |  |"
    assert lines[-2] == (
        "qwen3fast is the fastest of these engines on these CPUs in 1 of 4 cases, slower in 2 (bf16, prefill of 512, "
        "Zen 5; int8, prefill of 4,000, Zen 4), undecided (the interval includes 1) in 1 (bf16, decode at 32, Zen 4)."
    )
    assert lines[-1].startswith(f"Zen 5: {ZEN_5}, 2 threads; ") and f". Zen 4: {ZEN_4}, 2 threads; " in lines[-1]


def target_cells(folder):
    """Return (target, processor) -> cell, without those not run."""
    head, *rows = targets.target_rows(targets.load_all(folder))
    cells = {(row[0], name): cell for row in rows for name, cell in zip(head[2:], row[2:], strict=True)}
    return {place: cell for place, cell in cells.items() if cell != "not run"}


def test_targets_say_where_they_were_met_and_by_how_much_they_were_missed(tmp_path):
    write_peers(tmp_path, "x", ZEN_5, FIELD)
    slower = {DECODE: {"qwen3fast": [27, 30, 29], "a": [20, 20, 20]}}
    write_peers(tmp_path, "y", ZEN_4, slower, cpu_level="avx2")
    of_4b = {("int4", "decode", 32): {"qwen3fast": [23, 23.5, 24], "a": [20, 20, 20]}}
    write_peers(tmp_path, "z", "another CPU", of_4b, model="random:4b")
    decode, prefill = ("int4, decode at 1,000, over the best other engine", "bf16, prefill of 512, over openvino-genai")
    assert target_cells(tmp_path) == {
        (decode, "Zen 5"): "1.50 [1.50, 2.00], least 1.50: in each round",
        (decode, "Zen 4 as AVX2"): "1.45 [1.35, 1.50], least 1.35: in the median",
        (prefill, "Zen 5"): "0.90 [0.90, 0.90], least 0.90: **missed by 9.9%**",
        (f"4B's {decode.replace('1,000', '32')}", "another CPU"): "1.18 [1.15, 1.20], least 1.15: in each round",
    }
    assert "| **" not in update_readme.targets_table(tmp_path) and ": **missed" in update_readme.targets_table(tmp_path)


def test_a_newer_record_takes_the_place_of_an_older_one_where_it_has_the_length(tmp_path):
    write_peers(tmp_path, "old", ZEN_5, FIELD)
    new = {DECODE: {"qwen3fast": [40] * 3, "a": [10] * 3}}
    write_peers(tmp_path, "new", ZEN_5, new, utc="2026-02-02T03:04:05Z")
    write_peers(tmp_path, "one-thread", ZEN_5, FIELD, utc="2026-03-02T03:04:05Z", threads=1)
    [shapes] = map(targets.all_beside, targets.load_all(tmp_path).values())
    assert {shape: found.own for shape, found in shapes.items()} == {DECODE: 40, PREFILL: 91}


def test_shares_and_rows_count_where_memory_was_in_the_same_state(tmp_path):
    def write(suite, cases, **more):
        found = Record(suite, RUN, ENVIRONMENT | {"cpu": ZEN_5}, {"name": "random:0.6b"}, cases, **more)
        write_json(found.to_dict(), tmp_path / f"{suite}-x.json")

    def share(context, shares, reads):
        steps = [[1 / (share * read)] for share, read in zip(shares, reads, strict=True)]
        labels = {"format": "int4", "context": context, "batch_size": 1}
        return Case(labels, {"bytes_per_step": 1e9}, {"step_s": steps, "bandwidth_gb_s": reads})

    def batch(size, step_s, gb_s):
        samples = {"step_s": [[step_s]] * 2, "bandwidth_gb_s": [gb_s] * 2}
        return Case({"format": "int4", "batch_size": size}, {}, samples)

    shares = [share(32, [1.0], [40.0]), share(1024, [1.0, 0.7, 0.8], [40.0, 80.0, 75.0])]
    write("roofline", shares, conditions={"bandwidth_gb_s": [40.0, 80.0]})
    write("batch", [batch(8, 0.01, 40.0), batch(16, 0.016, 41.0), batch(32, 0.02, 80.0)])
    assert target_cells(tmp_path) == {
        (f"int4, decode {what}", "Zen 5"): cell
        for what, cell in {
            "at 32, share of fast memory": "not shown: no round with fast memory",
            "at 1,024, share of fast memory": "75% [70%, 80%], least 70%: in the median",
            "of 16 rows, tokens/s over 8 rows'": "1.25 [1.25, 1.25]: in the median",
            "of 32 rows, tokens/s over 8 rows'": "not shown: memory at 80 GB/s beside 32 rows, 40 beside 8",
        }.items()
    }


def test_a_word_after_the_file_asks_for_another_table(tmp_path):
    write_json(rounding_record().to_dict(), tmp_path / "r.json")
    new = update_readme.update("<!-- table: r.json speed -->\n<!-- end -->", tmp_path)
    assert new.startswith("<!-- table: r.json speed -->\n| format | GB of weights |")
    assert "| int4 | 0.50 | 100 | 100 |" in new.splitlines()
    for folder, kind in (("<!-- table: . -->", ""), ("<!-- table: . best -->", "best")):
        with pytest.raises(ValueError, match=f"no table '{kind}' of a folder of records; known: targets, sides"):
            update_readme.update(f"{folder}\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match="no table 'best' of suite 'quantization'; known: quantization speed, quality"):
        update_readme.render(tmp_path / "r.json", "best")


def test_readme_tables_refuse_unknown_suites_and_older_records(tmp_path):
    path = tmp_path / "r.json"
    write_json(record("unheard", []).to_dict(), path)
    with pytest.raises(ValueError, match=r"no table for suite 'unheard'; known: .*cache.*peers.*roofline"):
        update_readme.render(path)
    path.write_text(json.dumps({"suite": "peers", "schema_version": 1}))
    with pytest.raises(ValueError, match=r"r\.json: expected schema_version 2, got 1"):
        update_readme.render(path)


def test_every_suite_of_the_package_has_a_readme_table_of_its_own_names():
    known = {**update_readme.PIVOTS, **update_readme.COLUMNS}
    assert update_readme.SUITES.keys() <= known.keys()
    for name, suite in update_readme.SUITES.items():
        if name in update_readme.COLUMNS:
            columns = update_readme.COLUMNS[name]
            assert set(columns.labels) <= set(suite.columns.labels)
            assert set(columns.metrics) <= set(suite.columns.metrics)


def test_quality_table_with_bits_per_weight():
    sample = {"perplexity": [12.0], "kl_divergence": [0.25], "kl_p99": [1.5], "same_token": [0.75]}
    ran = Case({"format": "int4", "context": 512}, {"weight_bytes": 50.0, "positions": 9.0}, sample)
    alone = Case({"format": "Q4_0", "what": "weights alone", "context": 512}, {"bits_per_weight": 4.56}, sample)
    lines = update_readme.record_table(
        Record("quality", RUN, ENVIRONMENT, {"name": "english", "parameters": 100}, [ran, alone]), "bits"
    ).splitlines()
    assert lines[0] == "| format | bits per weight | perplexity | KL divergence | KL p99 | same most likely token |"
    assert lines[2:] == [
        "| int4 | 4.00 | 12.0000 | 0.25 | 1.5 | 75.0% |",
        "| Q4_0 | 4.56 | 12.0000 | 0.25 | 1.5 | 75.0% |",
    ]
