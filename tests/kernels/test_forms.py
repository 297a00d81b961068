"""The choice of forms: the fastest wins, earlier measurements are kept, damage and pins are handled."""

from __future__ import annotations

import json
import time

import pytest

from qwen3fast.kernels import forms


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no pin."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(forms.VARIABLE, raising=False)
    return tmp_path / "qwen3fast" / "forms.json"


def fake_forms(**seconds):
    """Forms that count their calls and take no time; `measure` is told their times."""
    calls = dict.fromkeys(seconds, 0)

    def call(name):
        calls[name] += 1

    return {name: (lambda name=name: call(name)) for name in seconds}, calls


def told(monkeypatch, **seconds):
    """Have `measure` give these times."""
    monkeypatch.setattr(forms, "measure", lambda each: {name: seconds[name] for name in each})


@pytest.mark.parametrize(
    ("seconds", "winner"), [((1.0, 0.5), "b"), ((0.5, 1.0), "a"), ((1.0, 0.97), "a"), ((1.0, 0.9), "b")]
)
def test_the_fastest_wins_and_the_first_where_they_are_close(monkeypatch, seconds, winner):
    each, _ = fake_forms(a=0, b=0)
    told(monkeypatch, a=seconds[0], b=seconds[1])
    assert forms.choose("x", "k", each).name == winner


def test_a_measurement_is_kept_for_its_key_alone(monkeypatch, own_cache):
    each, _ = fake_forms(a=0, b=0)
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose("x", "k", each).reason == "measured now"
    told(monkeypatch, a=0.5, b=1.0)
    kept = forms.choose("x", "k", each)
    assert (kept.name, kept.reason, kept.seconds) == ("b", "measured earlier", {"a": 1.0, "b": 0.5})
    for what, key, version in (("y", "k", ""), ("x", "l", ""), ("x", "k", "2")):
        assert forms.choose(what, key, each, version).name == "a"
    assert len(json.loads(own_cache.read_text())) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', "\x00", "[" * 100_000])
def test_a_damaged_file_is_measured_anew(monkeypatch, own_cache, text):
    own_cache.parent.mkdir()
    own_cache.write_text(text)
    each, _ = fake_forms(a=0, b=0)
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose("x", "k", each).name == "b"
    assert forms.choose("x", "k", each).reason == "measured earlier"


def test_a_kept_measurement_of_other_forms_does_not_count(monkeypatch):
    told(monkeypatch, a=1.0, b=0.5, c=0.1)
    forms.choose("x", "k", fake_forms(a=0, b=0)[0])
    assert forms.choose("x", "k", fake_forms(a=0, b=0, c=0)[0]).name == "c"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose("x", "k", fake_forms(a=0, b=0)[0]).name == "b"


def test_pinned_forms_are_not_measured(monkeypatch):
    each, calls = fake_forms(a=0, b=0)
    monkeypatch.setenv(forms.VARIABLE, "first")
    assert forms.choose("x", "k", each).name == "a"
    assert calls == {"a": 0, "b": 0}
    monkeypatch.setenv(forms.VARIABLE, "fast")
    with pytest.raises(ValueError, match="QWEN3FAST_FORMS must be 'first' or unset, got 'fast'"):
        forms.choose("x", "k", each)


def test_measuring_takes_turns_and_leaves_the_first_call_out():
    order, slow_once = [], [True]

    def a():
        order.append("a")
        if slow_once.pop() if slow_once else False:
            time.sleep(0.05)

    seconds = forms.measure({"a": a, "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert seconds["a"] < 0.05
