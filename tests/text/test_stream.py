"""TextStream: what may be shown, and when, whatever the borders between tokens; the reasoning apart from the answer."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.text.reasoning import ReasoningFormat, ReasoningTracker
from qwen3fast.text.stream import TextPiece, TextStream

letters = st.text("ab", max_size=4)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)

THINK, END_THINK, CALL = "<think>", "</think>", "<tool_call>"
REPLY = [THINK, "\n", "so", "\n", END_THINK, "\n\n", "42"]

# Tags as tokens, tags spelled out, line breaks at all ends, whole characters and halves of some.
characters = ["字", "字".encode()[:1], "字".encode()[1:], "🙂".encode()[:2], "🙂".encode()[2:]]
spelled_out = ["<thi", "nk>", "</"]
line_breaks = ["\n", "\n\n", " ", "a\n", "\nb"]
any_pieces = st.sampled_from([THINK, END_THINK, CALL, *spelled_out, *line_breaks, *characters, "a", "b", None])
# Every other reply begins with a reasoning.
reply_pieces = st.builds(
    lambda beginning, rest: [*beginning, *rest],
    st.sampled_from([[], [THINK], ["\n", THINK], [THINK, "a\n", END_THINK]]),
    st.lists(any_pieces, max_size=10),
)
stop_strings = st.sampled_from(["a", "\n\n", "b\n", "nk>", "</", "a</think>b", "\n字", "🙂"])
reply_stops = st.lists(stop_strings, max_size=2).map(tuple)


class Pieces:
    """A tokenizer with a token for each of the given pieces, and for the tags; None is a control token."""

    def __init__(self, pieces, has_tags=True):
        tags = [THINK, END_THINK, CALL] if has_tags else []
        self._pieces = [*tags, *pieces]
        self.base = SimpleNamespace(token_to_id=lambda token: tags.index(token) if token in tags else None)
        self.chat_template = None

    def encode(self, text: str) -> list[int]:
        return []

    def id_of(self, piece) -> int:
        return self._pieces.index(piece)

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        return b"<|control|>" if piece is None else piece.encode() if isinstance(piece, str) else piece

    def is_special(self, token_id: int) -> bool:
        return self._pieces[token_id] is None


def stream_of(tokenizer, stop=(), is_open=False) -> TextStream:
    """A stream of a reply that is inside reasoning from the start, or may begin with it."""
    return TextStream(tokenizer, tuple(stop), ReasoningTracker(ReasoningFormat(tokenizer), is_open, not is_open))


def run_parts(pieces, stop=(), is_open=False, has_tags=True) -> tuple[list[TextPiece], TextStream, bool]:
    """Push the pieces until a stop string is complete. Returns what was shown after each, the stream, and whether."""
    tokenizer = Pieces(pieces, has_tags)
    stream, shown = stream_of(tokenizer, stop, is_open), []
    for piece in pieces:
        stopped = stream.push(tokenizer.id_of(piece))
        shown.append(stream.take())
        if stopped:
            return shown, stream, True
    stream.finish()
    return [*shown, stream.take()], stream, False


def run(pieces, stop=()) -> tuple[list[str], TextStream, bool]:
    """As run_parts, of all text only."""
    shown, stream, stopped = run_parts(pieces, stop)
    return [piece.text for piece in shown], stream, stopped


def split(pieces, **options) -> tuple[str, str]:
    """Reasoning and answer."""
    _, stream, _ = run_parts(pieces, **options)
    return stream.reasoning, stream.answer


def labelled(pieces, is_open) -> list[tuple[str, str]]:
    """Each character of the whole reply with its part: reasoning, answer, or neither. Written another way than ours."""
    pieces = [p.encode() if isinstance(p, str) else p for p in pieces if p is not None]
    begin, end = THINK.encode(), END_THINK.encode()
    rest, parts = pieces, []
    if begin in pieces and not is_open:
        at = pieces.index(begin)
        if not decoded(pieces[:at]).strip():
            parts += [(pieces[: at + 1], "neither")]
            rest, is_open = pieces[at + 1 :], True
    if is_open:
        ends = [n for n, piece in enumerate(rest) if piece in (end, CALL.encode())]
        at = ends[0] if ends else len(rest)
        is_tag = rest[at : at + 1] == [end]  # a call belongs to the answer
        parts += [(rest[:at], "reasoning"), (rest[at : at + is_tag], "neither")]
        rest = rest[at + is_tag :]
    parts.append((rest, "answer"))
    return [(character, label) for part, label in parts for character in decoded(part)]


def decoded(pieces) -> str:
    return b"".join(pieces).decode("utf-8", "replace")


def test_text_stream_without_stop_strings_shows_every_piece_at_once():
    assert run(["Hello", ", ", "world"])[0] == ["Hello", ", ", "world", ""]


def test_text_stream_cuts_a_stop_string_and_all_after_it():
    _, stream, stopped = run(["one END two"], ["END"])
    assert (stream.text, stopped) == ("one ", True)


def test_text_stream_finds_a_stop_string_across_token_borders():
    _, stream, stopped = run(["one E", "N", "D two"], ["END"])
    assert (stream.text, stopped) == ("one ", True)


def test_text_stream_never_shows_the_beginning_of_a_stop_string():
    assert "".join(run(["one E", "N", "D two"], ["END"])[0]) == "one "


def test_text_stream_holds_back_what_may_become_a_stop_string():
    tokenizer = Pieces(["abcEN"])
    stream = TextStream(tokenizer, ("END",))
    stream.push(tokenizer.id_of("abcEN"))
    assert stream.take().text == "abc"


def test_text_stream_shows_what_was_held_back_when_it_ends():
    assert run(["abcEN"], ["END"])[0] == ["abc", "EN"]


def test_text_stream_shows_what_was_held_back_when_it_proves_harmless():
    shown, _, stopped = run(["abcEN", "TER"], ["END"])
    assert (shown[:2], stopped) == (["abc", "ENT"], False)


def test_text_stream_stops_at_the_first_of_several_stop_strings():
    assert run(["a second first"], ["first", "second"])[1].text == "a "


def test_text_stream_prefers_the_earlier_of_overlapping_stop_strings():
    assert run(["xabcd"], ["bc", "abc"])[1].text == "x"


def test_text_stream_stop_string_that_overlaps_itself():
    assert run(["xa", "a", "ba", "aba"], ["aab"])[1].text == "x"


def test_text_stream_after_a_false_start_finds_the_stop_string():
    assert run(["a", "a", "a", "b", "c"], ["aab"])[1].text == "a"


def test_text_stream_is_finished_by_a_stop_string():
    assert run(["END"], ["END"])[1].is_finished


def test_text_stream_is_finished_by_finish():
    stream = TextStream(Pieces([]))
    assert not stream.is_finished
    stream.finish()
    assert stream.is_finished


def test_text_stream_finish_after_a_stop_string_adds_nothing():
    _, stream, _ = run(["ab", b"END\xe4"], ["END"])
    stream.finish()
    assert (stream.text, stream.take()) == ("ab", TextPiece("", "", ""))


def test_text_stream_waits_for_a_whole_character():
    first, second = "字".encode()[:1], "字".encode()[1:]
    assert run([first, second])[0] == ["", "字", ""]


def test_text_stream_ends_an_unfinished_character_as_a_replacement():
    assert run(["a", "字".encode()[:2]])[0] == ["a", "", "�"]


def test_text_stream_finds_a_stop_string_of_characters_cut_by_tokens():
    character = "完".encode()
    assert run(["好", character[:1], character[1:]], ["完"])[1].text == "好"


def test_text_stream_leaves_control_tokens_out():
    assert run(["a", None, "b"])[1].text == "ab"


def test_text_stream_finds_a_stop_string_around_a_control_token():
    assert run(["xE", None, "ND"], ["END"])[1].text == "x"


def test_text_stream_without_a_tokenizer_stays_empty():
    stream = stream_of(None, ("END",), is_open=True)
    stopped = stream.push(5)
    stream.finish()
    assert (stopped, stream.text, stream.take(), stream.is_finished) == (False, "", TextPiece("", "", ""), True)


@given(pieces=st.lists(letters, max_size=8), stop=stops)
def test_text_stream_pieces_joined_are_the_text(pieces, stop):
    shown, stream, _ = run(pieces, stop)
    assert "".join(shown) == stream.text


@given(pieces=st.lists(letters, max_size=8), stop=stops, min_tokens=st.integers(0, 4))
def test_text_stream_passes_stop_strings_that_end_within_the_first_tokens(pieces, stop, min_tokens):
    tokenizer = Pieces(pieces)
    stream = TextStream(tokenizer, stop, min_tokens=min_tokens)
    pushed = 0
    for piece in pieces:
        pushed += 1
        if stream.push(tokenizer.id_of(piece)):
            break
    whole, passed = "".join(pieces), len("".join(pieces[:min_tokens]))
    ends = [(at, s) for s in stop for at in range(len(whole)) if whole.startswith(s, at) and at + len(s) > passed]
    # The token that completes a stop string decides first, then where the string begins.
    lengths = [len("".join(pieces[:n])) for n in range(len(pieces) + 1)]
    done = [(next(n for n, length in enumerate(lengths) if length >= at + len(s)), at, s) for at, s in ends]
    if not done:
        assert (stream.text, stream.stop_string) == (whole, None)
        return
    token, begin, string = min(done)
    assert (pushed, stream.text, stream.stop_string) == (token, whole[:begin], string)


@given(pieces=st.lists(letters, max_size=8), stop=stops)
def test_text_stream_never_holds_a_stop_string(pieces, stop):
    _, stream, _ = run(pieces, stop)
    assert not any(s in stream.text for s in stop)


@given(pieces=st.lists(letters, max_size=8), stop=stops)
def test_text_stream_stops_exactly_when_a_stop_string_is_complete(pieces, stop):
    whole, expected = "", ("".join(pieces), False)
    for piece in pieces:
        whole += piece
        if found := [whole.find(s) for s in stop if s in whole]:
            expected = (whole[: min(found)], True)
            break
    _, stream, stopped = run(pieces, stop)
    assert (stream.text, stopped) == expected


@given(pieces=st.lists(letters, max_size=8), stop=letters.filter(bool))
def test_text_stream_does_not_depend_on_token_borders(pieces, stop):
    assert run(pieces, [stop])[1].text == "".join(pieces).partition(stop)[0]


@given(pieces=st.lists(letters, max_size=8), stop=stops)
def test_text_stream_holds_back_less_than_the_longest_stop_string(pieces, stop):
    tokenizer, shown = Pieces(pieces), ""
    stream = TextStream(tokenizer, stop)
    for piece in pieces:
        if stream.push(tokenizer.id_of(piece)):
            break
        shown += stream.take().text
        assert len(stream.text) - len(shown) < max(map(len, stop), default=1)


def test_text_stream_tells_reasoning_from_answer():
    assert split(REPLY) == ("so", "42")


def test_text_stream_keeps_the_tags_in_the_text():
    assert run(REPLY)[1].text == "<think>\nso\n</think>\n\n42"


def test_text_stream_shows_reasoning_and_answer_as_they_come():
    shown, _, _ = run_parts(["\n", *REPLY, "\n"])
    assert shown == [
        TextPiece("\n", "", ""),
        TextPiece("<think>", "", ""),
        TextPiece("\n", "", ""),
        TextPiece("so", "so", ""),
        TextPiece("\n", "", ""),
        TextPiece("</think>", "", ""),
        TextPiece("\n\n", "", ""),
        TextPiece("42", "", "42"),
        TextPiece("\n", "", ""),
        TextPiece("", "", ""),
    ]


def test_text_stream_that_is_open_needs_no_opening_tag():
    assert split(REPLY[2:], is_open=True) == ("so", "42")


def test_text_stream_that_is_open_takes_another_opening_tag_for_text():
    assert split(REPLY, is_open=True) == ("<think>\nso", "42")


CALLED = ["{", '"name"', "}", "</tool_call>"]


def test_text_stream_tool_call_ends_open_reasoning_and_belongs_to_the_answer():
    shown, stream, _ = run_parts([THINK, "so", "\n", CALL, *CALLED])
    assert (stream.reasoning, stream.answer) == ("so", '<tool_call>{"name"}</tool_call>')
    assert [piece.answer for piece in shown] == ["", "", "", CALL, *CALLED, ""]
    assert [piece.reasoning for piece in shown] == ["", "so", *[""] * 7]


def test_text_stream_tool_call_cuts_off_a_character_of_the_reasoning():
    assert split([THINK, "a", "字".encode()[:2], CALL, "b"]) == ("a�", "<tool_call>b")


def test_text_stream_closing_tag_after_a_tool_call_is_answer():
    assert split([THINK, "a", CALL, "b", END_THINK, "c"]) == ("a", "<tool_call>b</think>c")


def test_text_stream_tool_call_after_the_reasoning_changes_nothing():
    assert split([THINK, "a", END_THINK, "b", CALL, "c"]) == ("a", "b<tool_call>c")


def test_text_stream_reasoning_that_the_tag_only_repeats_begins_behind_it():
    """A chat template that opens the reasoning, and a prompt that does not."""
    tokenizer = Pieces(["\n", *REPLY])
    tracker = ReasoningTracker(ReasoningFormat(tokenizer), is_open=True, may_open=True)
    for pieces in (["\n", *REPLY], REPLY[1:]):
        stream, shown = TextStream(tokenizer, (), tracker), []
        for piece in pieces:
            stream.push(tokenizer.id_of(piece))
            shown.append(stream.take())
        stream.finish()
        shown.append(stream.take())
        assert (stream.reasoning, stream.answer) == ("so", "42")
        assert tuple(map("".join, zip(*shown, strict=True)))[1:] == ("so", "42")


def test_text_stream_without_reasoning_is_all_answer():
    assert split(["\n", "42", "\n"]) == ("", "42")


def test_text_stream_without_the_tags_in_the_vocabulary_is_all_answer():
    assert split(REPLY, is_open=True, has_tags=False) == ("", "<think>\nso\n</think>\n\n42")


@pytest.mark.parametrize("is_open", [False, True])
def test_text_stream_takes_reasoning_never_closed_for_reasoning(is_open):
    pieces = ["hm", "\n", "so", "\n"] if is_open else [THINK, "\n", "hm", "\n", "so", "\n"]
    assert split(pieces, is_open=is_open) == ("hm\nso", "")


def test_text_stream_with_empty_reasoning():
    assert split([THINK, "\n\n", END_THINK, "\n\n", "42"]) == ("", "42")


def test_text_stream_strips_line_breaks_but_not_spaces():
    assert split([THINK, "\n  a \n", END_THINK, "\n  b \n"]) == ("  a ", "  b ")


def test_text_stream_keeps_line_breaks_inside_reasoning_and_answer():
    assert split([THINK, "a", "\n", "\n\n", "b", END_THINK, "c\n", "\nd"]) == ("a\n\n\nb", "c\n\nd")


def test_text_stream_shows_line_breaks_when_something_follows():
    shown, _, _ = run_parts(["a\n", "\n", "b"])
    assert [piece.answer for piece in shown] == ["a", "", "\n\nb", ""]


def test_text_stream_reasoning_after_whitespace_is_one():
    assert split(["\n", " ", None, *REPLY]) == ("so", "42")


def test_text_stream_reasoning_after_text_is_answer():
    assert split(["a", *REPLY]) == ("", "a<think>\nso\n</think>\n\n42")


def test_text_stream_reasoning_after_a_broken_character_is_answer():
    assert split(["字".encode()[:2], THINK, "a", END_THINK]) == ("", "�<think>a</think>")


def test_text_stream_second_reasoning_is_answer():
    assert split([*REPLY, THINK, "b", END_THINK]) == ("so", "42<think>b</think>")


def test_text_stream_opening_tag_inside_the_reasoning_is_reasoning():
    assert split([THINK, "a", THINK, "b", END_THINK, "c"]) == ("a<think>b", "c")


def test_text_stream_closing_tag_alone_is_answer():
    assert split(["a", END_THINK, "b"]) == ("", "a</think>b")


def test_text_stream_tags_spelled_out_are_text():
    assert split(["<thi", "nk>", "a", "</think", ">", "b"]) == ("", "<think>a</think>b")


def test_text_stream_closing_tag_spelled_out_does_not_end_the_reasoning():
    assert split([THINK, "say </think", ">", END_THINK, "b"]) == ("say </think>", "b")


def test_text_stream_tags_are_told_by_their_ids():
    # Other tokens whose text ends as a tag does.
    assert split(["\n<think>", "a"]) == ("", "<think>a")
    assert split([THINK, "a</think>", END_THINK, "b"]) == ("a</think>", "b")


def test_text_stream_whitespace_alone_is_answer_in_the_end():
    shown, stream, _ = run_parts([" ", "\n"])
    assert ([piece.answer for piece in shown], stream.answer) == (["", "", " "], " ")


def test_text_stream_character_cut_off_by_the_closing_tag_is_reasoning():
    assert split([THINK, "a", "字".encode()[:2], END_THINK, "b"]) == ("a�", "b")


def test_text_stream_reasoning_and_answer_of_characters_cut_by_tokens():
    reasoning, answer = "🙂".encode(), "答".encode()
    pieces = [THINK, reasoning[:1], reasoning[1:3], reasoning[3:], END_THINK, answer[:2], answer[2:]]
    assert split(pieces) == ("🙂", "答")


def test_text_stream_is_reasoning_from_the_opening_to_the_closing_tag():
    tokenizer = Pieces(["\n", *REPLY])
    stream, states = TextStream(tokenizer), []
    for piece in ["\n", *REPLY]:
        stream.push(tokenizer.id_of(piece))
        states.append(stream._tracker.is_open)
    assert states == [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize(("has_tags", "expected"), [(True, True), (False, False)])
def test_text_stream_is_reasoning_before_the_first_token_if_it_is_open(has_tags, expected):
    assert stream_of(Pieces([], has_tags), is_open=True)._tracker.is_open == expected


def test_text_stream_stop_string_in_the_reasoning_ends_the_reply():
    _, stream, stopped = run_parts([THINK, "a END b", END_THINK, "c"], ["END"])
    assert (stream.reasoning, stream.answer, stopped) == ("a ", "", True)


def test_text_stream_stop_string_of_a_tag_leaves_the_reasoning():
    assert split(REPLY, stop=[END_THINK]) == ("so", "")


def test_text_stream_stop_string_that_begins_in_the_reasoning_and_ends_in_the_answer():
    shown, stream, _ = run_parts([THINK, "a", "b", END_THINK, "c"], ["b</think>c"])
    assert (stream.reasoning, "".join(piece.reasoning for piece in shown), stream.answer) == ("a", "a", "")


@pytest.mark.parametrize(("beginning", "part"), [([THINK], "reasoning"), ([], "answer")])
def test_text_stream_never_shows_the_beginning_of_a_stop_string_in(beginning, part):
    shown, stream, _ = run_parts([*beginning, "one E", "N", "D two"], ["END"])
    assert ("".join(getattr(piece, part) for piece in shown), getattr(stream, part)) == ("one ", "one ")


def test_text_stream_opening_tag_cut_by_a_stop_string_is_no_answer():
    _, stream, _ = run_parts(REPLY, ["nk>"])
    assert (stream.text, stream.reasoning, stream.answer) == ("<thi", "", "")


@given(pieces=reply_pieces, stop=reply_stops, is_open=st.booleans())
def test_text_stream_pieces_joined_are_text_reasoning_and_answer(pieces, stop, is_open):
    shown, stream, _ = run_parts(pieces, stop, is_open)
    assert tuple(map("".join, zip(*shown, strict=True))) == (stream.text, stream.reasoning, stream.answer)


@given(pieces=reply_pieces, stop=reply_stops, is_open=st.booleans())
def test_text_stream_parts_are_those_of_the_whole_reply(pieces, stop, is_open):
    _, stream, _ = run_parts(pieces, stop, is_open)
    kept = labelled(pieces, is_open)[: len(stream.text)]
    reasoning, answer = ("".join(c for c, label in kept if label == part) for part in ("reasoning", "answer"))
    assert "".join(c for c, _ in kept) == stream.text
    assert (stream.reasoning, stream.answer) == (reasoning.strip("\n"), answer.strip("\n"))


@given(pieces=reply_pieces, is_open=st.booleans())
def test_text_stream_holds_back_only_line_breaks_of_the_reasoning(pieces, is_open):
    tokenizer, shown = Pieces(pieces), ""
    stream = stream_of(tokenizer, is_open=is_open)
    for piece in pieces:
        stream.push(tokenizer.id_of(piece))
        shown += stream.take().reasoning
        assert stream.reasoning == shown


@given(pieces=reply_pieces, stop=reply_stops, is_open=st.booleans(), takes=st.lists(st.booleans(), min_size=13))
def test_text_stream_does_not_depend_on_when_pieces_are_taken(pieces, stop, is_open, takes):
    tokenizer = Pieces(pieces)
    stream, shown = stream_of(tokenizer, stop, is_open), []
    for piece, is_taken in zip(pieces, takes, strict=False):
        stopped = stream.push(tokenizer.id_of(piece))
        if is_taken:
            shown.append(stream.take())
        if stopped:
            break
    stream.finish()
    shown.append(stream.take())
    assert tuple(map("".join, zip(*shown, strict=True))) == (stream.text, stream.reasoning, stream.answer)


sentences = st.text("ab <>/\n\r.é字答🙂👩‍🚀", max_size=12).map(lambda text: text.strip("\n"))


@given(reasoning=sentences, answer=sentences, is_open=st.booleans())
def test_text_stream_of_a_real_tokenizer_gives_back_reasoning_and_answer(tokenizer, reasoning, answer, is_open):
    reply = f"{reasoning}\n</think>\n\n{answer}"
    stream, shown = stream_of(tokenizer, is_open=is_open), []
    for token_id in tokenizer.encode(reply if is_open else f"<think>\n{reply}"):
        stream.push(token_id)
        shown.append(stream.take())
    stream.finish()
    shown.append(stream.take())
    assert (stream.reasoning, stream.answer) == (reasoning, answer)
    assert tuple(map("".join, zip(*shown, strict=True)))[1:] == (reasoning, answer)
