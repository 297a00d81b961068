"""Pages, tables and pictures from records made here: no measurement, no browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qwen3fast.bench.__main__ import main
from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Record, load_record, write_json
from qwen3fast.bench.report.page import render
from qwen3fast.bench.report.section import make_section
from qwen3fast.bench.table import as_csv, interval
from qwen3fast.bench.view import picture

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(1)</script> & $x$ \"quoted\" 'too'"


def new_record(suite: str, **changes) -> Record:
    environment = {
        "device": "cpu", "cpu": "Some CPU", "cpu_count": 4, "threads": 2, "memory_bytes": 16_000_000_000,
        "platform": "Linux", "python": "3.12.0", "torch": "2.12.0", "qwen3fast": "0.1.0",
    }  # fmt: skip
    run = {
        "utc": "2026-01-02T03:04:05Z", "command": "python -m qwen3fast.bench", "git_commit": "abc123",
        "git_dirty": False,
    }  # fmt: skip
    conditions = {"bandwidth_gb_s": [30.0, 31.0, 32.0], "gemm_flop_s": [7e11, 8e11]}
    values = {"run": run, "environment": environment, "model": {"name": "some-model"}, "conditions": conditions}
    return Record(suite, **(values | changes))


def cache_record(repetitions: int = 3, **changes) -> Record:
    """Two modes at three lengths, each with its own speed."""
    record = new_record("cache", **changes)
    for i, context in enumerate((32, 256, 1024)):
        for j, mode in enumerate(("cached-compiled", "uncached-eager")):
            steps = [[0.0123 * (1 + i + 5 * j + 0.01 * r)] * 4 for r in range(repetitions)]
            facts = {"bytes_per_step": 2e8 + context}
            samples = {
                "step_s": steps,
                "ttft_s": [0.1 * context + 0.01 * r for r in range(repetitions)],
                "bandwidth_gb_s": [30.0 + r for r in range(repetitions)],
            }
            labels = {"mode": mode, "format": "bf16", "context": context, "batch_size": 1}
            record.cases.append(Case(labels, facts, samples))
    record.checks = {"cached-compiled": {"passed": True, "exact": 12, "tokens": 12, "worst_gap": 0.0}}
    return record


def other_record(**changes) -> Record:
    """Of a program whose suite is not known, with two kinds of cases."""
    record = new_record("elsewhere", **changes)
    for engine in ("one", "another"):
        for rows in (1, 4, 16):
            samples = {"seconds": [3.1 / rows, 3.2 / rows, 3.4 / rows]}
            record.cases.append(Case({"engine": engine, "rows": rows}, {"tokens": 77.0}, samples))
    record.cases.append(Case({"engine": "one", "what": "latency"}, {}, {"ttfts_s": [[0.1, 0.2], [0.3, 0.4]]}))
    return record


class Checker(HTMLParser):
    """Collects tags that are not closed in order, ids, and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._keep(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._keep(tag, attrs)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"{tag} at {self.getpos()}")

    def _keep(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src"):
                self.links.append(value)
            elif value and value.startswith("url("):
                self.links.append(value[4:-1])


@pytest.fixture(scope="module")
def page() -> str:
    return render([cache_record(), other_record()])


def svg_of(record: Record) -> str:
    drawing = make_section(record, "x").drawing
    assert drawing is not None
    return drawing.svg


def write(folder: Path, record: Record, name: str = "record.json") -> str:
    write_json(record.to_dict(), folder / name)
    return str(folder / name)


def test_report_has_every_figure_of_every_case_with_its_interval(page):
    for record in (cache_record(), other_record()):
        for case in record.cases:
            for name, estimate in case.metrics.items():
                for value in (estimate.median, estimate.p10, estimate.p90):
                    assert METRICS[name].text(value).partition(" ")[0] in page, (case.name, name)
                between = interval(name, estimate)
                assert bool(between) == (estimate.n > 1), (case.name, name)
                assert f">{between}<" in page, (case.name, name)


def test_report_is_valid_html_and_all_its_links_lead_somewhere(page):
    found = Checker(page)
    assert (found.wrong, found.open) == ([], [])
    assert len(set(found.ids)) == len(found.ids)
    inside = {link[1:] for link in found.links if link.startswith("#")}
    assert inside and inside <= set(found.ids)
    assert found.tags.count("svg") == 2


def test_report_loads_nothing(page):
    assert not re.search(r"https?://|//cdn|@import|<link|<img|<iframe", page)
    assert all(link.startswith(("#", "data:")) for link in Checker(page).links)


def test_report_allows_its_own_script_only(page):
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1]


def test_report_escapes_what_a_record_says():
    record = cache_record(noise=[EVIL], model={"name": EVIL}, notes={EVIL: EVIL})
    record.environment["cpu"] = record.run["command"] = EVIL
    record.checks = {EVIL: {"passed": False, "why": EVIL}}
    for case in record.cases:
        case.labels["format"] = EVIL
    elsewhere = other_record(model={"name": EVIL})
    elsewhere.suite = EVIL
    for case in elsewhere.cases:
        case.labels[EVIL] = EVIL
    page = render([record, elsewhere], EVIL)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    found = Checker(page)
    assert (found.tags.count("script"), found.tags.count("svg"), found.wrong) == (1, 2, [])


def test_report_of_the_same_records_is_the_same(page):
    assert render([cache_record(), other_record()]) == page


def test_report_holds_the_records_for_download(page, tmp_path):
    urls = [link for link in Checker(page).links if link.startswith("data:application/json;base64,")]
    for url, record in zip(urls, (cache_record(), other_record()), strict=True):
        value = json.loads(base64.b64decode(url.partition(",")[2]))
        assert value == json.loads(json.dumps(record.to_dict()))
        write_json(value, tmp_path / "again.json")
        assert load_record(tmp_path / "again.json") == record
    tables = [link for link in Checker(page).links if link.startswith("data:text/csv;base64,")]
    assert base64.b64decode(tables[0].partition(",")[2]).decode() == as_csv([cache_record()])


def test_report_shows_unknown_suites_with_all_labels_and_a_picture(page):
    assert 'id="elsewhere-some-model"' in page
    section = make_section(other_record(), "x")
    assert [cell.text for cell in section.header] == [
        "engine", "rows", "what", "tok/s", "first token", "first token p99", "seconds"
    ]  # fmt: skip
    assert len(section.rows) == 7
    assert section.drawing is not None and [s.name for s in section.drawing.series] == ["one", "another"]
    assert [s.partition(":")[0] for s in section.sentences] == ["tok/s", "first token", "first token p99"]
    assert "best" in section.sentences[0] and "rows 16), worst" in section.sentences[0]


def test_report_points_tell_their_values():
    record = cache_record()
    words = re.findall(r'class="point" role="img" aria-label="([^"]*)"', svg_of(record))
    values = [
        f"{str(c.labels['mode']).replace('-', ', ')}: {c.metrics['decode_tok_s'].median:.4g} tokens per second; "
        f"prompt length (tokens): {c.labels['context']:,}"
        for c in record.cases
    ]
    assert sorted(words) == sorted(values)


def test_report_bars_tell_their_values():
    record = new_record("ablation")
    for stage, step_s in (("no cache, eager", 0.5), ("+ static KV cache", 0.2), ("+ compiled", 0.25)):
        record.cases.append(Case({"stage": stage, "context": 32, "batch_size": 1}, {}, {"step_s": [[step_s]]}))
    words = re.findall(r'aria-label="([^"]*: [\d.]+ after 32 tokens)"', svg_of(record))
    assert words == ["no cache, eager: 2 after 32 tokens", "+ static KV cache: 5 after 32 tokens",
                     "+ compiled: 4 after 32 tokens"]  # fmt: skip


def test_report_series_can_be_told_apart():
    svg = svg_of(cache_record())
    # Each has its line and the name at its end; the two limits are series of their own.
    counts = [len(re.findall(f'data-series="{i}"', svg)) for i in range(5)]
    assert counts == [2, 2, 2, 2, 0]


def test_report_says_trouble_loudly():
    record = cache_record(repetitions=1, noise=["the wind blew"], interrupted=True)
    record.checks["cached-compiled"]["passed"] = False
    page = render([record])
    assert page.count("WRONG TOKENS in 1 of 1 checks, so speeds mean nothing: cached-compiled.") == 3
    assert page.count("The run was interrupted: cases are missing.") == 3
    assert page.count("Noisy: the wind blew.") == 2
    assert "Each figure is of a single run" in page
    calm = render([cache_record()])
    assert not re.search("WRONG TOKENS|interrupted|Noisy|of a single run", calm.partition("<script>")[0])


def test_report_marks_a_cache_that_is_slower_than_none():
    record = cache_record()
    record.cases[0].samples["ttft_s"] = [9.0, 9.1, 9.2]
    [words] = re.findall(r'<li class="trouble">(FAULT [^<]*)</li>', render([record]))
    assert words.startswith("FAULT at 32 tokens (bf16, batch 1): the first token takes 9.1 s with the cache")


def test_report_says_what_the_machine_could_do(page):
    assert "31 GB/s (measured 3 times, between 30 and 32)" in page
    assert "Measured on Some CPU with 2 threads and 16 GB of memory; torch 2.12.0, qwen3fast 0.1.0." in page


def test_report_of_a_record_without_a_picture_says_so():
    record = cache_record()
    record.cases = [Case({"what": "nothing known"}, {}, {"seconds": [1.5, 1.75]})]
    page = render([record])
    assert "no picture: this cache record lacks data for it" in page and "1.62 s" in page
    assert render([new_record("cache"), new_record("elsewhere")]).count("no picture") == 2
    with_control = other_record()
    with_control.cases[0].labels["engine"] = "\x00"
    assert "no picture: the record&#39;s text is not fit for XML" in render([with_control])


def test_report_names_sections_of_the_same_suite_apart():
    assert {"cache-some-model", "cache-some-model-2"} <= set(Checker(render([cache_record()] * 2)).ids)


def test_report_command_writes_a_page(tmp_path, capsys):
    target = tmp_path / "new" / "page.html"
    assert main(["report", write(tmp_path, cache_record()), "-o", str(target), "--title", "All of it"]) == 0
    assert "<title>All of it</title>" in target.read_text(encoding="utf-8")
    assert str(target) in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "table", "plot"])
def test_commands_refuse_what_is_no_record(command, tmp_path, capsys):
    good, bad = write(tmp_path, cache_record()), tmp_path / "bad.json"
    output = ["-o", str(tmp_path / "out")]
    for text, message in (
        ("{", "is not valid JSON"),
        ('{"schema_version": 1}', "expected schema_version 2, got 1"),
        ('{"schema_version": 2, "suite": 3}', "suite must be of type str"),
    ):
        bad.write_text(text)
        assert main([command, good, str(bad), *output]) == 2
        assert "bad.json" in (error := capsys.readouterr().err) and message in error
    assert main([command, str(tmp_path / "none.json"), *output]) == 2
    assert "none.json not found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_report_what_cannot_be_written(tmp_path, capsys):
    assert main(["report", write(tmp_path, cache_record()), "-o", str(tmp_path)]) == 2
    assert "error" in capsys.readouterr().err


def test_commands_leave_the_measurement_as_it_was(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--suite", "nonsense"])
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err


def test_table_command_writes_markdown_csv_and_text(tmp_path, capsys):
    record = cache_record()
    record.cases[0].labels["format"] = "a|b"
    path = write(tmp_path, record)
    assert main(["table", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| context | batch | mode | format | decode tok/s |")
    assert lines[2].startswith(r"| 32 | 1 | cached-compiled | a\|b | 80.5 |")
    assert lines[-1].startswith("Some CPU, 2 threads; memory reads at 31 GB/s")
    assert main(["table", path, "--format", "csv", "-o", str(tmp_path / "t.csv")]) == 0
    assert (tmp_path / "t.csv").read_text() == as_csv([record])
    assert main(["table", path, write(tmp_path, other_record(), "o.json"), "--format", "text"]) == 0
    text = capsys.readouterr().out
    assert "With and without a KV cache: some-model" in text and "elsewhere: some-model" in text


def test_plot_command_draws_png_and_svg(tmp_path, capsys):
    paths = [write(tmp_path, cache_record(), "a.json"), write(tmp_path, other_record(), "b.json")]
    assert main(["plot", *paths, "-o", str(tmp_path / "pictures")]) == 0
    assert all((tmp_path / "pictures" / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in "ab")
    for folder in ("one", "two"):
        assert main(["plot", *paths, "-o", str(tmp_path / folder), "--format", "svg"]) == 0
    for name in ("a.svg", "b.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert main(["plot", paths[0], paths[0]]) == 2
    assert "same file name" in capsys.readouterr().err


def test_plot_command_names_the_record_that_cannot_be_drawn(tmp_path, capsys):
    assert main(["plot", write(tmp_path, new_record("elsewhere")), "-o", str(tmp_path / "x")]) == 2
    assert "record.json: no picture: this elsewhere record has no case" in capsys.readouterr().err


def test_generic_picture_draws_bars_where_lines_would_be_too_many():
    record = new_record("elsewhere")
    for engine in range(12):
        record.cases += [Case({"engine": f"e{engine}", "rows": n}, {}, {"seconds": [1.0 + engine + n]}) for n in (1, 2)]
    [axes] = picture(record).axes
    assert (len(axes.lines), len(axes.patches)) == (0, 24)
    assert axes.get_title(loc="left") == "seconds"
