"""A figure as SVG inside a page: points and bars with their values, series by name.

tags.py gives ids to lines and bars, by which this module finds them in the SVG.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from matplotlib.figure import Figure

from qwen3fast.bench.plot import svg_text
from qwen3fast.bench.record import Record
from qwen3fast.bench.report.tags import Series, is_bar, series_in, tag

REFERENCE = re.compile(r"#([\w.-]+)")
HIT_RADIUS = "9"


@dataclass(frozen=True)
class Drawing:
    """An SVG for a page. texts: title, subtitle and place of the measurement, which are no longer in it."""

    svg: str
    texts: list[str]
    series: list[Series]


def draw_for_page(figure: Figure, record: Record, prefix: str) -> Drawing:
    """Draw a figure as SVG, which consumes it. prefix: of the ids, which must differ within a page.

    Raises: ValueError for text that XML does not allow, such as control characters.
    """
    texts = [text.get_text() for text in figure.texts]
    for text in list(figure.texts):
        text.remove()
    series, tips = tag(figure)
    try:
        root = ET.fromstring(svg_text(figure, facecolor="none", is_trimmed=True))
    except ET.ParseError as err:
        raise ValueError(f"no picture: the record's text is not fit for XML ({err})") from err
    _drop_namespaces(root)
    names = {s.name: str(i) for i, s in enumerate(series)}
    for group in list(root.iter("g")):
        name = series_in(group.get("id", ""))
        if name in names:
            group.set("data-series", names[name])
        _add_tips(group, tips.get(group.get("id", ""), []))
    _rename(root, prefix)
    width = root.get("viewBox", "0 0 0 0").split()[2]
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "group", "style": f"--natural: {float(width):.0f}px"}
    root.set("aria-label", texts[0] if texts else record.suite)
    return Drawing(ET.tostring(root, encoding="unicode"), texts, series)


def _drop_namespaces(root: ET.Element) -> None:
    """Remove namespaces, which HTML does not need, and Matplotlib's metadata and page style."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            if name.startswith("{"):
                element.set(name.rpartition("}")[2], element.attrib.pop(name))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)


def _add_tips(group: ET.Element, words: list[str]) -> None:
    """Make each marker (or the one bar) of a group a point with a title.

    Points outside of the axes are not drawn. It is then unknown which are missing, and none gets a title.
    """
    if len(words) == 1 and is_bar(group.get("id", "")):
        _make_point(group, words[0])
        return
    markers = [(parent, use) for parent in group.iter("g") for use in parent.findall("use")]
    if len(markers) != len(words):
        return
    for (parent, use), text in zip(markers, words, strict=True):
        point = ET.Element("g")
        parent[list(parent).index(use)] = point
        point.append(use)
        circle = {"class": "hit", "cx": use.get("x", ""), "cy": use.get("y", ""), "r": HIT_RADIUS}
        ET.SubElement(point, "circle", circle)
        _make_point(point, text)


def _make_point(group: ET.Element, text: str) -> None:
    group.set("class", "point")
    group.set("role", "img")
    group.set("aria-label", text)
    title = ET.Element("title")
    title.text = text
    group.insert(0, title)


def _rename(root: ET.Element, prefix: str) -> None:
    """Number the ids that are referred to; remove the others."""
    targets: dict[str, str] = {}
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "href" or value.startswith("url(#"):
                target = REFERENCE.findall(value)[0]
                new = targets.setdefault(target, f"{prefix}-{len(targets)}")
                element.set(name, value.replace(f"#{target}", f"#{new}"))
    for element in root.iter():
        if (old := element.attrib.pop("id", None)) in targets:
            element.set("id", targets[old])
