"""Text from records, checkpoints and other programs, escaped for terminals, Markdown and spreadsheets."""

from __future__ import annotations

import re

# C0 and C1 controls, line and paragraph separators, marks that reverse the direction of text, lone surrogates.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
MARKDOWN = re.compile(r"[\\`*\[\]|]")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
FORMULA = re.compile(r"\s*(?:[=@]|[+-].*[(|!])")


def visible(text: object, keep: str = "") -> str:
    r"""Return text with control characters written out, such as "\x1b", except those in `keep`.

    Escape sequences can rewrite a terminal's lines, and line breaks can add rows to a table.
    """
    return UNSAFE.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


def markdown(text: object) -> str:
    """Return text as one line of Markdown that shows it literally: no HTML, links, emphasis or new cells."""
    escaped = MARKDOWN.sub(lambda m: "\\" + m[0], visible(text))
    return "".join(ENTITIES.get(c, c) for c in escaped)


def csv_cell(value: object) -> object:
    """Return a cell's value; text that a spreadsheet would run as a formula gets an apostrophe before it."""
    if isinstance(value, str):
        return f"'{visible(value)}" if FORMULA.match(value) else visible(value)
    return value
