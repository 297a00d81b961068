"""Targets for the speed, and the records' figures on each kind of processor.

A ratio is taken within a round, in which all engines got the same prompt: our speed over the fastest other engine's, in
whichever setting was the fastest of that round. Intervals are the median's, see `qwen3fast.bench.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tables import OURS, Rows, find, unique

from qwen3fast.bench.metrics import per_repetition
from qwen3fast.bench.record import Case, Record, load_record
from qwen3fast.bench.statistics import Estimate, estimate, ratio

MODEL = "random:0.6b"
PROCESSORS = {  # in the tables' order
    "AMD EPYC, family 26 model 2": "Zen 5",
    "AMD EPYC, family 25 model 17": "Zen 4",
    "Intel(R) Xeon(R) Processor, family 6 model 207": "Xeon with AMX",
}
ALIKE = 0.9  # of the faster of two reads: the memory was in the same state
NOT_RUN = "not run"
Shape = tuple[str, str, int]  # format, "decode" or "prefill", context
Figure = tuple[Estimate, float | None]  # and the least round, if the compared cases share rounds
FORMATS = ("bf16", "int8", "int4")
FRONT = [(f, what, n) for f in FORMATS for what, n in (("decode", 32), ("decode", 1000), ("prefill", 512))]


def load_all(folder: Path) -> dict[str, list[Record]]:
    """Return the records that tables of this file read, by the name of the processor, the newest first.

    Records of fewer threads than the machine has processors are left out.
    """
    files = [file for suite in ("peers", "roofline", "batch") for file in folder.glob(f"{suite}-*.json")]
    records = [load_record(file) for file in sorted(files)]
    records = [r for r in records if r.environment["threads"] == r.environment["cpu_count"]]
    records.sort(key=lambda record: record.run["utc"], reverse=True)
    known = list(PROCESSORS.values())
    names = sorted({processor(record) for record in records}, key=lambda name: ([*known, name].index(name), name))
    return {name: [record for record in records if processor(record) == name] for name in names}


def processor(record: Record) -> str:
    """Return the name of the processor, with the level that was pinned, if one was."""
    cpu, level = str(record.environment["cpu"]), record.environment.get("cpu_level")
    return PROCESSORS.get(cpu, cpu) + (f" as {level.upper()}" if level else "")


@dataclass(frozen=True)
class Beside:
    """Medians of tokens/s, ours and the best other engine's, and our ratio to the best of each round."""

    own: float
    best: float
    engine: str
    ratios: list[float]

    @property
    def verdict(self) -> int:
        """1 if the interval of the ratio is above 1, -1 if it is below, else 0."""
        value = estimate(self.ratios)
        return 0 if value.low is None or value.high is None else (value.low > 1) - (value.high < 1)


def beside(record: Record, shape: Shape, peer: str = "") -> Beside | None:
    """Return our speed beside the other engines whose names begin with `peer`; None if the record lacks either."""
    format, what, context = shape
    speeds = {}
    for case in record.cases if record.suite == "peers" else []:
        if {"format": format, "what": what, "context": context}.items() <= case.labels.items():
            speeds[str(case.labels["engine"])] = _values(case, f"{what}_tok_s")
    own = speeds.get(OURS)
    if not own:
        return None
    # Variants of ours, such as "qwen3fast int8 cache", are neither.
    names = [e for e in speeds if e.split(" ")[0] != OURS and e.startswith(peer)]
    others = {e: speeds[e][: len(own)] for e in names if len(speeds[e]) >= len(own)}  # others lack some of our rounds
    if not others:
        return None
    best, engine = max((median(values), engine) for engine, values in others.items())
    ratios = [mine / max(theirs) for mine, *theirs in zip(own, *others.values(), strict=True)]
    return Beside(median(own), best, engine, ratios)


def _values(case: Case | None, metric: str) -> list[float]:
    return per_repetition(case.labels, case.facts, case.samples).get(metric, []) if case else []


def shape_name(shape: Shape) -> str:
    """Return a shape in words."""
    format, what, context = shape
    return f"{format}, {what} {'at' if what == 'decode' else 'of'} {context:,}"


def all_beside(records: Sequence[Record]) -> dict[Shape, Beside]:
    """Return all shapes of `MODEL`, each from the newest record that has it."""
    shapes: dict[Shape, Beside] = {}
    for record in (r for r in records if (r.suite, r.model_name) == ("peers", MODEL)):
        for shape in unique(record, "format", "what", "context"):
            if shape not in shapes and (found := beside(record, shape)) is not None:
                shapes[shape] = found
    return shapes


@dataclass(frozen=True)
class Target:
    """A figure, and the least that was asked of it.

    figure: returns None where a record lacks it, or the reason why it shows nothing.
    """

    title: str
    asked: float
    figure: Callable[[Record], Figure | str | None]
    model: str = MODEL
    form: str = ".2f"

    def cell(self, records: Sequence[Record]) -> str:
        """Return the figure of the newest record that has it, with a verdict."""
        figures = (self.figure(record) for record in records if record.model_name == self.model)
        found = next((figure for figure in figures if figure is not None), NOT_RUN)
        if isinstance(found, str):
            return found
        value, least = found
        verdict = f"**missed by {1 - value.median / self.asked:.1%}**"
        if value.median >= self.asked:
            verdict = "in the median" if least is None or least < self.asked else "in each round"
            verdict = "met" if value.n == 1 else verdict
        lowest = "" if least is None else f", least {least:{self.form}}" if value.n > 1 else ", one round"
        return f"{with_interval(value, self.form)}{lowest}: {verdict}"


def with_interval(value: Estimate, form: str) -> str:
    """Return a median and its interval, if it has one."""
    interval = "" if value.low is None or value.high is None else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.median:{form}}{interval}"


def _of_rounds(values: Sequence[float]) -> Figure | None:
    return (estimate(values), min(values)) if values else None


def _ratio(shape: Shape, asked: float, peer: str = "", name: str = "", model: str = MODEL) -> Target:
    def figure(record: Record) -> Figure | None:
        found = beside(record, shape, peer)
        return _of_rounds(found.ratios) if found else None

    title = shape_name((name or shape[0], *shape[1:]))
    return Target(f"{title}, over {peer or 'the best other engine'}", asked, figure, model)


def _share(format: str, context: int, asked: float) -> Target:
    def figure(record: Record) -> Figure | str | None:
        case = find(record, format=format, context=context) if record.suite == "roofline" else None
        if case is None:
            return None
        least = ALIKE * max(record.conditions["bandwidth_gb_s"])
        shares = zip(_values(case, "share_of_bandwidth"), case.samples["bandwidth_gb_s"], strict=False)
        fast = _of_rounds([share for share, read in shares if read >= least])
        return fast or "not shown: no round with fast memory"

    return Target(f"{shape_name((format, 'decode', context))}, share of fast memory", asked, figure, form=".0%")


def _rows(count: int) -> Target:
    def figure(record: Record) -> Figure | str | None:
        cases = [find(record, format="int4", batch_size=n) if record.suite == "batch" else None for n in (count, 8)]
        many, eight = (_values(case, "decode_tok_s") for case in cases)
        if not many or not eight:
            return None
        reads = [median(case.samples["bandwidth_gb_s"]) for case in cases if case]
        if min(reads) < ALIKE * max(reads):
            return f"not shown: memory at {reads[0]:.0f} GB/s beside {count} rows, {reads[1]:.0f} beside 8"
        return ratio(many, eight), None

    return Target(f"int4, decode of {count} rows, tokens/s over 8 rows'", 1.0, figure)


DECODE = {"bf16": (1.05, 1.2), "int8": (1.2, 1.3), "int4": (1.15, 1.4)}  # asked at 32 and at 1,000
SHARES = {"bf16": 0.85, "int8": 0.80, "int4": 0.75}
OF_4B = ("4B's int4", "random:4b")
OF_EXPERTS = ("30B-A3B's Q4_K_M", "qwen3-coder-30b-a3b-12-layers.gguf")
TARGETS = [
    *(_ratio((f, "decode", n), DECODE[f][i]) for f in FORMATS for i, n in enumerate((32, 1000))),
    *(
        _ratio((f, "decode", n), DECODE["int4"][i], "", *of)
        for f, of in (("int4", OF_4B), ("gguf", OF_EXPERTS))
        for i, n in enumerate((32, 1000))
    ),
    *(_ratio((f, "prefill", n), 1.0, "openvino-genai") for f in FORMATS for n in (512, 1000, 4000)),
    _ratio(("int4", "prefill", 512), 1.0, "openvino-genai", *OF_4B),
    *(_share(f, n, SHARES[f]) for f in FORMATS for n in (32, 1024)),
    *(_rows(n) for n in (16, 32)),
]


def target_rows(records: dict[str, list[Record]]) -> Rows:
    """Return a row per target and a column per processor."""
    return [
        ["target", "asked", *records],
        *([t.title, f"{t.asked:{t.form}}", *map(t.cell, records.values())] for t in TARGETS),
    ]


def side_rows(sides: dict[str, dict[Shape, Beside]]) -> Rows:
    """Return a row per shape of the front page; for each processor: ours, the best other engine's, the ratio.

    The faster speed is bold; neither is where the ratio's interval includes 1.
    """
    rows = [["tokens/s", *(title for name in sides for title in (f"{name}: {OURS}", "best of the others", "ratio"))]]
    for shape in FRONT:
        row = [shape_name(shape)]
        for found in (side.get(shape) for side in sides.values()):
            if found is None:
                row += [NOT_RUN, "", ""]
                continue
            own, best = (
                f"**{speed:.1f}**" if found.verdict == faster else f"{speed:.1f}"
                for speed, faster in ((found.own, 1), (found.best, -1))
            )
            ratios = with_interval(estimate(found.ratios), ".2f") + (" slower" if found.verdict < 0 else "")
            row += [own, f"{best} {found.engine.removesuffix(f' {shape[0]}')}", ratios]
        rows.append(row)
    return rows
