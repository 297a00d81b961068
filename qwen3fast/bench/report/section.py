"""A record as a section of the report: its tables as cells, its picture, its sentences."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.record import Case, Record, json_text
from qwen3fast.bench.report.drawing import Drawing, draw_for_page
from qwen3fast.bench.table import Cell, Columns, as_csv, interval, table_cells
from qwen3fast.bench.view import picture, sentences, view_of


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
    header, *rows = table_cells(record, columns)
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


def all_figures(record: Record) -> list[list[Cell]]:
    """Return a row per metric of each case: case, metric, median, 95% interval, p10, p90, repetitions."""
    rows = []
    for case in record.cases:
        for name, e in case.metrics.items():
            metric = METRICS[name]
            low = "" if e.low is None else e.low
            rows.append([
                Cell(case.name, order=case.name),
                Cell(metric.title, order=metric.title),
                Cell(metric.text(e.median), "", e.median, is_number=True),
                Cell(interval(name, e), "", low, is_number=True),
                *(Cell(metric.text(v), "", v, is_number=True) for v in (e.p10, e.p90)),
                Cell(str(e.n), "", e.n, is_number=True),
            ])  # fmt: skip
    return rows


def _data_url(kind: str, text: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"
