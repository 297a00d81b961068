"""TextStream: what may be shown, and when, whatever the borders between tokens."""

from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.text_stream import TextStream

letters = st.text("ab", max_size=4)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


class Pieces:
    """A tokenizer in which token i stands for the i-th of the given pieces; None is a control token."""

    def __init__(self, pieces):
        self._pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def token_bytes(self, token_id: int) -> bytes:
        return b"<|control|>" if self.is_special(token_id) else self._pieces[token_id]

    def is_special(self, token_id: int) -> bool:
        return self._pieces[token_id] is None


def run(pieces, stop=()) -> tuple[list[str], TextStream, bool]:
    """Push the pieces until a stop string is complete. Returns what was shown after each, the stream, and whether."""
    stream, shown = TextStream(Pieces(pieces), tuple(stop)), []
    for token_id in range(len(pieces)):
        stopped = stream.push(token_id)
        shown.append(stream.take())
        if stopped:
            return shown, stream, True
    stream.finish()
    return [*shown, stream.take()], stream, False


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
    stream = TextStream(Pieces(["abcEN"]), ("END",))
    stream.push(0)
    assert stream.take() == "abc"


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
    assert (stream.text, stream.take()) == ("ab", "")


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
    stream = TextStream(None, ("END",))
    stopped = stream.push(5)
    stream.finish()
    assert (stopped, stream.text, stream.take(), stream.is_finished) == (False, "", "", True)


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
    stream, shown = TextStream(Pieces(pieces), stop), ""
    for token_id in range(len(pieces)):
        if stream.push(token_id):
            break
        shown += stream.take()
        assert len(stream.text) - len(shown) < max(map(len, stop), default=1)
