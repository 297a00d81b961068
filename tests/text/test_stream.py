"""TextStream: what may be shown, and when, whatever the borders between tokens; what is thought and what is answer."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.text.stream import Piece, TextStream

letters = st.text("ab", max_size=4)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)

THINK, END_THINK = "<think>", "</think>"
REPLY = [THINK, "\n", "so", "\n", END_THINK, "\n\n", "42"]

# Tags as tokens, tags spelled out, line breaks at all ends, whole characters and halves of some.
characters = ["字", "字".encode()[:1], "字".encode()[1:], "🙂".encode()[:2], "🙂".encode()[2:]]
spelled_out = ["<thi", "nk>", "</"]
line_breaks = ["\n", "\n\n", " ", "a\n", "\nb"]
any_pieces = st.sampled_from([THINK, END_THINK, *spelled_out, *line_breaks, *characters, "a", "b", None])
# Every other reply begins with a thought.
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
        self._pieces = [*([THINK, END_THINK] if has_tags else []), *pieces]
        self.base = SimpleNamespace(token_to_id=lambda token: self.id_of(token) if has_tags else None)

    def id_of(self, piece) -> int:
        return self._pieces.index(piece)

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        return b"<|control|>" if piece is None else piece.encode() if isinstance(piece, str) else piece

    def is_special(self, token_id: int) -> bool:
        return self._pieces[token_id] is None


def run_parts(pieces, stop=(), starts_in_thought=False, has_tags=True) -> tuple[list[Piece], TextStream, bool]:
    """Push the pieces until a stop string is complete. Returns what was shown after each, the stream, and whether."""
    tokenizer = Pieces(pieces, has_tags)
    stream, shown = TextStream(tokenizer, tuple(stop), starts_in_thought), []
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
    """Thought and answer."""
    _, stream, _ = run_parts(pieces, **options)
    return stream.reasoning, stream.answer


def labelled(pieces, starts_in_thought) -> list[tuple[str, str]]:
    """Each character of the whole reply and what it is: thought, answer, or neither. Written another way than ours."""
    pieces = [p.encode() if isinstance(p, str) else p for p in pieces if p is not None]
    begin, end = THINK.encode(), END_THINK.encode()
    rest, parts = pieces, []
    if begin in pieces and not starts_in_thought:
        at = pieces.index(begin)
        if not decoded(pieces[:at]).strip():
            parts += [(pieces[: at + 1], "neither")]
            rest, starts_in_thought = pieces[at + 1 :], True
    if starts_in_thought:
        at = rest.index(end) if end in rest else len(rest)
        parts += [(rest[:at], "thought"), (rest[at : at + 1], "neither")]
        rest = rest[at + 1 :]
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
    assert (stream.text, stream.take()) == ("ab", Piece("", "", ""))


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
    stream = TextStream(None, ("END",), starts_in_thought=True)
    stopped = stream.push(5)
    stream.finish()
    assert (stopped, stream.text, stream.take(), stream.is_finished) == (False, "", Piece("", "", ""), True)


@given(pieces=st.lists(letters, max_size=8), stop=stops)
def test_text_stream_pieces_joined_are_the_text(pieces, stop):
    shown, stream, _ = run(pieces, stop)
    assert "".join(shown) == stream.text


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


def test_text_stream_tells_thought_from_answer():
    assert split(REPLY) == ("so", "42")


def test_text_stream_keeps_the_tags_in_the_text():
    assert run(REPLY)[1].text == "<think>\nso\n</think>\n\n42"


def test_text_stream_shows_thought_and_answer_as_they_come():
    shown, _, _ = run_parts(["\n", *REPLY, "\n"])
    assert shown == [
        Piece("\n", "", ""),
        Piece("<think>", "", ""),
        Piece("\n", "", ""),
        Piece("so", "so", ""),
        Piece("\n", "", ""),
        Piece("</think>", "", ""),
        Piece("\n\n", "", ""),
        Piece("42", "", "42"),
        Piece("\n", "", ""),
        Piece("", "", ""),
    ]


def test_text_stream_starting_in_thought_needs_no_opening_tag():
    assert split(REPLY[2:], starts_in_thought=True) == ("so", "42")


def test_text_stream_starting_in_thought_takes_another_opening_tag_for_text():
    assert split(REPLY, starts_in_thought=True) == ("<think>\nso", "42")


def test_text_stream_without_a_thought_is_all_answer():
    assert split(["\n", "42", "\n"]) == ("", "42")


def test_text_stream_without_the_tags_in_the_vocabulary_is_all_answer():
    assert split(REPLY, starts_in_thought=True, has_tags=False) == ("", "<think>\nso\n</think>\n\n42")


@pytest.mark.parametrize("starts_in_thought", [False, True])
def test_text_stream_takes_a_thought_never_closed_for_thought(starts_in_thought):
    pieces = ["hm", "\n", "so", "\n"] if starts_in_thought else [THINK, "\n", "hm", "\n", "so", "\n"]
    assert split(pieces, starts_in_thought=starts_in_thought) == ("hm\nso", "")


def test_text_stream_with_an_empty_thought():
    assert split([THINK, "\n\n", END_THINK, "\n\n", "42"]) == ("", "42")


def test_text_stream_strips_line_breaks_but_not_spaces():
    assert split([THINK, "\n  a \n", END_THINK, "\n  b \n"]) == ("  a ", "  b ")


def test_text_stream_keeps_line_breaks_inside_thought_and_answer():
    assert split([THINK, "a", "\n", "\n\n", "b", END_THINK, "c\n", "\nd"]) == ("a\n\n\nb", "c\n\nd")


def test_text_stream_shows_line_breaks_when_something_follows():
    shown, _, _ = run_parts(["a\n", "\n", "b"])
    assert [piece.answer for piece in shown] == ["a", "", "\n\nb", ""]


def test_text_stream_thought_after_whitespace_is_one():
    assert split(["\n", " ", None, *REPLY]) == ("so", "42")


def test_text_stream_thought_after_text_is_answer():
    assert split(["a", *REPLY]) == ("", "a<think>\nso\n</think>\n\n42")


def test_text_stream_thought_after_a_broken_character_is_answer():
    assert split(["字".encode()[:2], THINK, "a", END_THINK]) == ("", "�<think>a</think>")


def test_text_stream_second_thought_is_answer():
    assert split([*REPLY, THINK, "b", END_THINK]) == ("so", "42<think>b</think>")


def test_text_stream_opening_tag_inside_the_thought_is_thought():
    assert split([THINK, "a", THINK, "b", END_THINK, "c"]) == ("a<think>b", "c")


def test_text_stream_closing_tag_alone_is_answer():
    assert split(["a", END_THINK, "b"]) == ("", "a</think>b")


def test_text_stream_tags_spelled_out_are_text():
    assert split(["<thi", "nk>", "a", "</think", ">", "b"]) == ("", "<think>a</think>b")


def test_text_stream_closing_tag_spelled_out_ends_no_thought():
    assert split([THINK, "say </think", ">", END_THINK, "b"]) == ("say </think>", "b")


def test_text_stream_tags_are_told_by_their_ids():
    # Other tokens whose text ends as a tag does.
    assert split(["\n<think>", "a"]) == ("", "<think>a")
    assert split([THINK, "a</think>", END_THINK, "b"]) == ("a</think>", "b")


def test_text_stream_whitespace_alone_is_answer_in_the_end():
    shown, stream, _ = run_parts([" ", "\n"])
    assert ([piece.answer for piece in shown], stream.answer) == (["", "", " "], " ")


def test_text_stream_character_cut_off_by_the_closing_tag_is_thought():
    assert split([THINK, "a", "字".encode()[:2], END_THINK, "b"]) == ("a�", "b")


def test_text_stream_thought_and_answer_of_characters_cut_by_tokens():
    thought, answer = "🙂".encode(), "答".encode()
    pieces = [THINK, thought[:1], thought[1:3], thought[3:], END_THINK, answer[:2], answer[2:]]
    assert split(pieces) == ("🙂", "答")


def test_text_stream_is_thinking_from_the_opening_to_the_closing_tag():
    tokenizer = Pieces(["\n", *REPLY])
    stream, states = TextStream(tokenizer), []
    for piece in ["\n", *REPLY]:
        stream.push(tokenizer.id_of(piece))
        states.append(stream.is_thinking)
    assert states == [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize(("has_tags", "expected"), [(True, True), (False, False)])
def test_text_stream_is_thinking_before_the_first_token_if_it_starts_in_thought(has_tags, expected):
    assert TextStream(Pieces([], has_tags), starts_in_thought=True).is_thinking == expected


def test_text_stream_stop_string_in_the_thought_ends_the_reply():
    _, stream, stopped = run_parts([THINK, "a END b", END_THINK, "c"], ["END"])
    assert (stream.reasoning, stream.answer, stopped) == ("a ", "", True)


def test_text_stream_stop_string_of_a_tag_leaves_the_thought():
    assert split(REPLY, stop=[END_THINK]) == ("so", "")


def test_text_stream_stop_string_that_begins_in_the_thought_and_ends_in_the_answer():
    shown, stream, _ = run_parts([THINK, "a", "b", END_THINK, "c"], ["b</think>c"])
    assert (stream.reasoning, "".join(piece.reasoning for piece in shown), stream.answer) == ("a", "a", "")


@pytest.mark.parametrize(("beginning", "part"), [([THINK], "reasoning"), ([], "answer")])
def test_text_stream_never_shows_the_beginning_of_a_stop_string_in(beginning, part):
    shown, stream, _ = run_parts([*beginning, "one E", "N", "D two"], ["END"])
    assert ("".join(getattr(piece, part) for piece in shown), getattr(stream, part)) == ("one ", "one ")


def test_text_stream_opening_tag_cut_by_a_stop_string_is_no_answer():
    _, stream, _ = run_parts(REPLY, ["nk>"])
    assert (stream.text, stream.reasoning, stream.answer) == ("<thi", "", "")


@given(pieces=reply_pieces, stop=reply_stops, starts_in_thought=st.booleans())
def test_text_stream_pieces_joined_are_text_thought_and_answer(pieces, stop, starts_in_thought):
    shown, stream, _ = run_parts(pieces, stop, starts_in_thought)
    assert tuple(map("".join, zip(*shown, strict=True))) == (stream.text, stream.reasoning, stream.answer)


@given(pieces=reply_pieces, stop=reply_stops, starts_in_thought=st.booleans())
def test_text_stream_parts_are_those_of_the_whole_reply(pieces, stop, starts_in_thought):
    _, stream, _ = run_parts(pieces, stop, starts_in_thought)
    kept = labelled(pieces, starts_in_thought)[: len(stream.text)]
    thought, answer = ("".join(c for c, label in kept if label == part) for part in ("thought", "answer"))
    assert "".join(c for c, _ in kept) == stream.text
    assert (stream.reasoning, stream.answer) == (thought.strip("\n"), answer.strip("\n"))


@given(pieces=reply_pieces, starts_in_thought=st.booleans())
def test_text_stream_holds_back_only_line_breaks_of_the_thought(pieces, starts_in_thought):
    tokenizer, shown = Pieces(pieces), ""
    stream = TextStream(tokenizer, starts_in_thought=starts_in_thought)
    for piece in pieces:
        stream.push(tokenizer.id_of(piece))
        shown += stream.take().reasoning
        assert stream.reasoning == shown


@given(
    pieces=reply_pieces, stop=reply_stops, starts_in_thought=st.booleans(), takes=st.lists(st.booleans(), min_size=13)
)
def test_text_stream_does_not_depend_on_when_pieces_are_taken(pieces, stop, starts_in_thought, takes):
    tokenizer = Pieces(pieces)
    stream, shown = TextStream(tokenizer, stop, starts_in_thought), []
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


@given(thought=sentences, answer=sentences, starts_in_thought=st.booleans())
def test_text_stream_of_a_real_tokenizer_gives_back_thought_and_answer(tokenizer, thought, answer, starts_in_thought):
    reply = f"{thought}\n</think>\n\n{answer}"
    stream, shown = TextStream(tokenizer, starts_in_thought=starts_in_thought), []
    for token_id in tokenizer.encode(reply if starts_in_thought else f"<think>\n{reply}"):
        stream.push(token_id)
        shown.append(stream.take())
    stream.finish()
    shown.append(stream.take())
    assert (stream.reasoning, stream.answer) == (thought, answer)
    assert tuple(map("".join, zip(*shown, strict=True)))[1:] == (thought, answer)
