"""The report: records as one HTML page with its own style and script, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qwen3fast.bench.record import Record
from qwen3fast.bench.report import words
from qwen3fast.bench.report.section import make_section
from qwen3fast.bench.table import Cell

FOLDER = Path(__file__).parent
FIGURE_HEADER = (
    *(Cell(text) for text in ("case", "metric")),
    *(Cell(text, is_number=True) for text in ("median", "95% interval", "10th percentile", "90th percentile", "runs")),
)


def render(records: Sequence[Record], title: str = "qwen3fast benchmarks") -> str:
    """Return one HTML page; the same records give the same page."""
    names = _names(records)
    sections = [make_section(record, name) for record, name in zip(records, names, strict=True)]
    environments = {words.environment_sentence(record) for record in records}
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        title=title,
        sections=sections,
        environment=environments.pop() if len(environments) == 1 else "",
        figure_header=FIGURE_HEADER,
        words=words,
        # Not from records; the text of records inside an SVG was escaped when it was written.
        style=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        markup=Markup,
        script_hash=f"sha256-{digest}",
    )


def _names(records: Sequence[Record]) -> list[str]:
    """Return names for anchors and downloads: suite and model, numbered if they repeat."""
    names: list[str] = []
    for record in records:
        model = str(record.model.get("name", "")).rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^a-z0-9]+", "-", f"{record.suite}-{model}".lower()).strip("-") or "record"
        count = 1
        while (numbered := name if count == 1 else f"{name}-{count}") in names:
            count += 1
        names.append(numbered)
    return names
