"""A record as a section of the report: its tables as cells, its picture, its sentences."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Record, json_text
from qwen3fast.bench.report.drawing import Drawing, draw_for_page
from qwen3fast.bench.statistics import Estimate
from qwen3fast.bench.table import SPEEDUP, TITLES, Columns, as_csv, speedup
from qwen3fast.bench.view import picture, sentences, view_of


@dataclass(frozen=True)
class Cell:
    """A table cell. secondary: smaller text below. order: the key by which the column is sorted."""

    text: str
    secondary: str = ""
    order: float | str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Section:
    """A section. name: of its anchor and downloads. no_drawing: the reason if there is no picture."""

    name: str
    title: str
    record: Record
    sentences: list[str]
    drawing: Drawing | None
    no_drawing: str
    caption: str
    header: list[Cell]
    rows: list[list[Cell]]
    figures: list[list[Cell]]
    json_url: str
    csv_url: str

    @property
    def model(self) -> str:
        """The model's name."""
        return self.record.model_name


def make_section(record: Record, name: str) -> Section:
    """Return a record's section. name: unique on the page, of letters, digits and "-"."""
    view = view_of(record)
    drawing, no_drawing = None, ""
    try:
        drawing = draw_for_page(picture(record), record, name)
    except ValueError as err:
        no_drawing = str(err)
    columns, shared = split_shared(record, view.columns)
    header, rows = main_table(record, columns)
    caption = f"{view.title}: medians and 95% intervals" + (f"; all cases: {shared}" if shared else "")
    return Section(
        name, view.title, record, sentences(record), drawing, no_drawing, caption, header, rows, all_figures(record),
        _data_url("application/json", json_text(record.to_dict())), _data_url("text/csv", as_csv([record])),
    )  # fmt: skip


def split_shared(record: Record, columns: Columns) -> tuple[Columns, str]:
    """Return the columns without labels that all cases share, and those labels as text. The first label stays."""
    cases = [case for case in record.cases if case.samples]
    shared = {}
    for name in columns.labels[1:]:
        values = {str(case.labels.get(name)) for case in cases}
        if len(cases) > 1 and len(values) == 1 and name in cases[0].labels and name not in columns.baseline:
            shared[name] = cases[0].labels[name]
    kept = tuple(name for name in columns.labels if name not in shared)
    return replace(columns, labels=kept), Case(shared).name.replace("_", " ")


def main_table(record: Record, columns: Columns) -> tuple[list[Cell], list[list[Cell]]]:
    """Return the suite's table: a header, and a row per case with medians and intervals."""
    metrics = [name for name in columns.metrics if any(name in case.metrics for case in record.cases)]
    header = [Cell(TITLES.get(name, name.replace("_", " "))) for name in columns.labels]
    header += [Cell(METRICS[name].title, is_number=True) for name in metrics]
    header += [Cell(SPEEDUP, is_number=True)] if columns.baseline else []
    rows = []
    for case in record.cases:
        derived = case.metrics
        if not derived.keys() & set(metrics):
            continue
        row = [_label_cell(case.labels.get(name)) for name in columns.labels]
        for name in metrics:
            found = derived.get(name)
            between = interval(name, found) if found else ""
            row.append(_number(METRICS[name].text(found.median), found.median, between) if found else Cell(""))
        if columns.baseline:
            gain = speedup(record, case, columns)
            row.append(_number(f"{gain:.1f}x", gain) if gain is not None else Cell(""))
        rows.append(row)
    return header, rows


def all_figures(record: Record) -> list[list[Cell]]:
    """Return a row per metric of each case: case, metric, median, 95% interval, p10, p90, repetitions."""
    rows = []
    for case in record.cases:
        for name, e in case.metrics.items():
            metric = METRICS[name]
            row = [Cell(case.name, order=case.name), Cell(metric.title, order=metric.title)]
            row += [_number(metric.text(e.median), e.median), _interval_cell(name, e)]
            row += [_number(metric.text(v), v) for v in (e.p10, e.p90)]
            rows.append([*row, _number(str(e.n), e.n)])
    return rows


def _number(text: str, value: float, secondary: str = "") -> Cell:
    return Cell(text, secondary, value, is_number=True)


def _interval_cell(name: str, estimate: Estimate) -> Cell:
    return Cell(interval(name, estimate), order="" if estimate.low is None else estimate.low, is_number=True)


def _label_cell(value: object) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(f"{value:,}", value)
    text = "" if value is None else str(value)
    return Cell(text, order=text)


def _data_url(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


def interval(name: str, estimate: Estimate) -> str:
    """Return the median's 95% interval, "4.1 to 4.3"; empty for a single value."""
    if estimate.low is None or estimate.high is None:
        return ""
    low, high = (METRICS[name].text(value) for value in (estimate.low, estimate.high))
    unit = high[high.find(" ") :] if " " in high else ""
    return f"{low.removesuffix(unit)} to {high}" if unit else f"{low} to {high}"
