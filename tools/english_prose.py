"""From documents with markup to paragraphs of English prose.

Each form's function returns candidates; `is_prose` keeps those that read as English sentences. Code, tables, headings,
menus, lists of words and other languages are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser

MIN_CHARACTERS = 80
DICTIONARY_PARAGRAPHS = 40  # a document of a dictionary
MIN_PLAIN_SHARE = 0.96  # of letters, spaces and the marks of prose among a paragraph's characters
MIN_COMMON_SHARE = 0.22  # of the words below among a paragraph's words; English prose has 0.3 to 0.5
COMMON = frozenset(
    "the of and to in a is that for it as be with on this by are not or you which at from have an if was can will has "
    "but all they he his their its we when use used your there may one i so any must do what who no more these".split()
)
NOT_PLAIN = re.compile(r"[^A-Za-z ,.;:!?'\"()-]")
PLAIN_MARKS = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
SKIPPED = {"pre", "script", "style", "table", "nav", "head", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "footer", "form"}
VOID = {"br", "img", "hr", "input", "meta", "link", "wbr", "col", "area"}
BLOCKS = {"p", "li", "dd", "div", "blockquote", "section", "ul", "ol", "dl", "body", "td", "article"}
POD_CODE = re.compile(r"[A-Z]<(?:[^<>|]*\|)?([^<>]*)>")


class _Paragraphs(HTMLParser):
    """The text of block elements, outside of elements that hold no prose."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._pieces: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self._skipping += 1
        if tag in BLOCKS or tag in SKIPPED:
            self._end_paragraph()
        elif tag == "br":
            self._pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED and self._skipping:
            self._skipping -= 1
        if tag in BLOCKS or tag in SKIPPED:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._pieces.append(data)

    def _end_paragraph(self) -> None:
        self.found.append("".join(self._pieces))
        self._pieces = []


def html(text: str) -> list[str]:
    """Return the paragraphs of an HTML page."""
    parser = _Paragraphs()
    parser.feed(text)
    parser.close()
    return parser.found


def plain(text: str) -> list[str]:
    """Return the paragraphs of plain text, between blank lines or fortune's % lines."""
    return re.split(r"\n\s*\n|\n%\n", text)


def dictionary(text: str) -> list[str]:
    """Return the definitions and quotations of a dictd dictionary, without numbers, sources and marks of links."""
    text = re.sub(r"^[A-Z][A-Za-z -]* \\.*?\n(?= )", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[[^\[\]]{0,40}\]|[{}]|^ *\d+\. ", "", text, flags=re.MULTILINE)
    return [re.sub(r"\s--[A-Z][\w .()']{0,40}$", "", paragraph.strip()) for paragraph in plain(text)]


def pod(text: str) -> list[str]:
    """Return the paragraphs of Perl's documentation that are neither commands nor code."""
    paragraphs = [p for p in plain(text) if not p.startswith(("=", " ", "\t"))]
    for _ in range(3):  # nested codes, from the inside
        paragraphs = [POD_CODE.sub(r"\1", p) for p in paragraphs]
    return paragraphs


def sword(text: str) -> list[str]:
    """Return the verses of a book of the Bible, six at a time, without OSIS markup and notes."""
    text = re.sub(r"<note.*?</note>|<title.*?</title>", "", text, flags=re.DOTALL)
    verses = [" ".join(re.sub(r"<[^>]*>", "", v).split()) for v in re.split(r"[\r\n]+", text)]
    verses = [v for v in verses if v]
    return [" ".join(verses[i : i + 6]) for i in range(0, len(verses), 6)]


FORMS: dict[str, Callable[[str], list[str]]] = {
    "html": html, "plain": plain, "dictionary": dictionary, "pod": pod, "sword": sword
}  # fmt: skip


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph reads as English sentences: its length, its end, its characters and its words."""
    if len(paragraph) < MIN_CHARACTERS or not re.search(r"[.!?][\"')]?$", paragraph):
        return False
    if len(NOT_PLAIN.findall(paragraph)) > (1 - MIN_PLAIN_SHARE) * len(paragraph):
        return False
    words = re.findall(r"[a-z']+", paragraph.lower())
    return sum(word in COMMON for word in words) >= MIN_COMMON_SHARE * max(1, len(words))


def prose(documents: Iterable[tuple[str, str]], form: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Yield the names and cleaned texts of documents; paragraphs that were `seen` in any document are dropped."""
    for name, text in documents:
        kept = []
        for candidate in FORMS[form](text):
            paragraph = " ".join(candidate.translate(PLAIN_MARKS).replace("\u00b6", "").split())
            key = hash(re.sub(r"[^a-z]", "", paragraph.lower()))
            if is_prose(paragraph) and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if form != "dictionary":
            yield from [(name, "\n\n".join(kept))] if kept else []
            continue
        for begin in range(0, len(kept), DICTIONARY_PARAGRAPHS):
            yield f"{name}#{begin}", "\n\n".join(kept[begin : begin + DICTIONARY_PARAGRAPHS])
