"""Pictures of records. This package loads matplotlib: import it only to draw (see `view.picture`)."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib
from matplotlib.figure import Figure

from qwen3fast.bench.pictures import bars, cache, generic, lines
from qwen3fast.bench.record import Record

PICTURES: dict[str, Callable[[Record], Figure]] = {
    "cache": cache.draw,
    "roofline": lines.draw_roofline,
    "batch": lines.draw_batch,
    "context": lines.draw_context,
    "startup": bars.draw_startup,
    "quantization": bars.draw_quantization,
    "quality": bars.draw_quality,
    "ablation": bars.draw_ablation,
    "serve": lines.draw_serve,
}


def draw(record: Record) -> Figure:
    """Draw the picture of a record's suite, or a generic one for another program's."""
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a record's text is not a formula
        return PICTURES.get(record.suite, generic.draw_panels)(record)
