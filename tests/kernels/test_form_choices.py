"""The choice of forms: the fastest wins, earlier measurements are kept, damage and pins are handled."""

from __future__ import annotations

import json
import threading

import pytest

from qwen3fast.kernels import forms, forms_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, nothing chosen in this process, and no pin."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(forms.VARIABLE, raising=False)
    monkeypatch.setattr(forms, "_used", {})
    return tmp_path / "qwen3fast" / "forms.json"


class Clock:
    """A clock that stands still except during the work of `calls`: seconds of each call, by form."""

    def __init__(self, **seconds):
        self.now, self.order, self.seconds = 0.0, [], {name: iter(each) for name, each in seconds.items()}

    def __call__(self):
        return self.now

    def calls(self):
        def work(name):
            self.order.append(name)
            self.now += next(self.seconds[name])

        return {name: (lambda name=name: work(name)) for name in self.seconds}


def case(what="x", key="k", names=("a", "b")):
    return forms.FormCase(what, key, names, dict)


def told(monkeypatch, **seconds):
    """Have `measure` give these times, the same in each round."""
    monkeypatch.setattr(forms, "measure", lambda calls: {name: [s] * 3 for name, s in seconds.items()})


def new_process(monkeypatch):
    monkeypatch.setattr(forms, "_used", {})


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ({"a": [1.0, 1.0, 1.0], "b": [0.5, 0.5, 0.5]}, "b"),
        ({"a": [0.5, 0.5, 0.5], "b": [1.0, 1.0, 1.0]}, "a"),
        ({"a": [1.0, 1.0, 1.0], "b": [0.97, 0.97, 0.97]}, "a"),  # too close
        ({"a": [1.0, 1.0, 1.0], "b": [0.5, 1.1, 0.5]}, "a"),  # not in every round
        ({"a": [1.0, 9.0, 1.0], "b": [0.9, 8.0, 0.9], "c": [0.8, 8.2, 0.8]}, "c"),
    ],
)
def test_another_form_must_be_clearly_faster_in_every_round(rounds, expected):
    assert forms.winner(rounds) == expected


def test_measuring_takes_turns_and_leaves_the_first_call_out():
    clock = Clock(a=[50.0, 0.01, 0.01, 0.01], b=[0.01] * 4)
    assert forms.measure(clock.calls(), 0, clock, lambda: 0) == {
        "a": pytest.approx([0.01] * 3),
        "b": pytest.approx([0.01] * 3),
    }
    assert clock.order == ["a", "b"] * 4


def test_measuring_ends_after_its_budget_or_all_rounds_or_when_one_form_is_clearly_faster():
    def rounds(a, b, budget_s):
        clock = Clock(a=[a] * 9, b=[b] * 9)
        return len(forms.measure(clock.calls(), budget_s, clock, lambda: 0)["a"])

    assert rounds(0.01, 0.01, budget_s=1) == forms.MAX_ROUNDS == 5
    assert rounds(0.01, 0.01, budget_s=0) == forms.MIN_ROUNDS == 3
    assert rounds(0.01, 0.02, budget_s=1) == forms.CLEAR_ROUNDS == 2
    assert rounds(0.02, 0.01, budget_s=1) == forms.CLEAR_ROUNDS == 2
    assert rounds(0.014, 0.01, budget_s=1) == 5


def test_rounds_that_other_work_interrupted_do_not_count():
    clock = Clock(a=[0.01, 9.0, 0.01, 9.0, 0.01, 0.01], b=[0.01] * 20)
    counts = iter([0, 1, 1, 1, 1, 2, 2, 2, 2, 2])  # before and after each round
    rounds = forms.measure(clock.calls(), 0, clock, lambda: next(counts))
    assert rounds == {"a": pytest.approx([0.01] * 3), "b": pytest.approx([0.01] * 3)}


def test_a_machine_that_is_busy_all_the_time_gives_no_rounds():
    clock, counts = Clock(a=[0.01] * 20, b=[0.001] * 20), iter(range(1000))
    assert forms.measure(clock.calls(), 0, clock, lambda: next(counts)) == {"a": [], "b": []}
    assert len(clock.order) == 2 * (1 + 2 * forms.MIN_ROUNDS)
    clock = Clock(a=[0.01] * 20, b=[0.001] * 20)
    assert forms.measure(clock.calls(), 9, clock, lambda: next(counts)) == {"a": [], "b": []}
    assert len(clock.order) == 2 * (1 + forms.MAX_TRIES)


def test_interruptions_are_counted():
    assert forms.interruptions() >= 0


def test_a_form_that_is_clearly_slower_is_not_measured_further():
    clock = Clock(a=[0.03] * 9, b=[0.01] * 9, c=[0.011] * 9)
    rounds = forms.measure(clock.calls(), 1, clock, lambda: 0)
    assert {name: len(times) for name, times in rounds.items()} == {"a": 2, "b": 5, "c": 5}
    assert forms.winner(rounds) == "b"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1.0, 1.0], [0.6, 0.5], "b"), ([1.0, 1.0], [0.7, 0.5], "a"), ([1.0], [0.1], "a"), ([], [], "a")],
)
def test_fewer_than_three_rounds_displace_the_first_form_if_it_is_clearly_slower(a, b, expected):
    assert forms.winner({"a": a, "b": b}) == expected


@pytest.mark.parametrize(
    ("names", "least"),
    [("ab", 2), ("bb", 1), ("ba", forms.NEVER), ("aa", forms.NEVER), ("bab", 3), ("", forms.NEVER)],
)
def test_a_form_is_used_from_the_size_above_which_it_always_won(names, least):
    assert forms.used_from(list(enumerate(names, 1)), "b") == least


def test_of_two_forms_either_may_be_used_from_a_size():
    assert forms.used_from([(1, "a"), (2, "b"), (3, "c")], "b", "c") == 2


def test_a_measurement_is_kept_for_its_key_alone(monkeypatch, own_cache):
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose(case()).reason == "measured now"
    new_process(monkeypatch)
    told(monkeypatch, a=0.5, b=1.0)
    kept = forms.choose(case())
    assert (kept.name, kept.reason, kept.seconds) == ("b", "measured earlier", {"a": 1.0, "b": 0.5})
    for other in (case(what="y"), case(key="l")):
        assert forms.choose(other).name == "a"
    assert len(json.loads(own_cache.read_text())) == 3


@pytest.mark.parametrize("change", ["processor", "version", "threads", "torch", "__version__", "capability", "limit"])
def test_a_measurement_is_of_one_machine_and_its_versions(monkeypatch, change):
    told(monkeypatch, a=1.0, b=0.5)
    forms.choose(case())
    new_process(monkeypatch)
    told(monkeypatch, a=0.5, b=1.0)
    if change == "threads":
        monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    elif change == "torch":
        monkeypatch.setattr("torch.__version__", "0.0")
    elif change == "__version__":
        monkeypatch.setattr(forms_file, "__version__", "0.0")
    elif change == "capability":
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    elif change == "limit":
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    else:
        monkeypatch.setattr(forms_file, change, lambda: "another")
    assert forms_file.all_kept() == {}
    assert forms.choose(case()).name == "a"
    assert list(forms_file.all_kept()) == [("x", "k")]


def test_of_other_machines_and_versions_the_newest_are_kept(monkeypatch, own_cache):
    told(monkeypatch, a=1.0, b=0.5)
    for key in ("k", "l"):
        for number in range(forms_file.MAX_MACHINES + 3):
            monkeypatch.setattr(forms_file, "version", lambda number=number: f"build {number}")
            forms.measure_and_keep(case(key=key))
    kept = [key.rpartition("build ")[2] for key in json.loads(own_cache.read_text())]
    expected = [str(number) for number in range(3, forms_file.MAX_MACHINES + 3)]
    assert kept[-len(expected) :] == expected and set(kept) == set(expected)
    assert list(forms_file.all_kept()) == [("x", "l")]


def test_the_file_is_parsed_once_until_it_is_replaced(monkeypatch, own_cache):
    told(monkeypatch, a=1.0, b=0.5)
    forms.measure_and_keep(case())
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    for _ in range(3):
        assert forms_file.kept(forms.machine_key(case())).name == "b"
    assert len(parsed) == 1
    own_cache.write_text("{}")
    assert forms_file.kept(forms.machine_key(case())) is None


def test_a_choice_does_not_change_within_a_process(monkeypatch, own_cache):
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose(case()).name == "b"
    told(monkeypatch, a=0.5, b=1.0)
    forms.measure_and_keep(case())  # as another process may
    assert json.loads(own_cache.read_text())[forms.machine_key(case())]["form"] == "a"
    assert forms.choose(case()).name == "b"
    new_process(monkeypatch)
    assert forms.choose(case()).name == "a"


def test_without_leave_to_measure_the_first_form_is_used_and_nothing_is_settled(monkeypatch):
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose(case(), may_measure=False) == forms_file.Choice("a", "not measured yet")
    assert forms.choose(case()).name == "b"
    assert forms.choose(case(), may_measure=False).name == "b"


DAMAGED = ["", "{", "[]", '{"x": 1}', "\x00", "[" * 100_000]
ENTRIES = [1, {}, {"form": "a"}, {"form": "c", "seconds": {"a": 1.0, "b": 1.0}}, {"form": "a", "seconds": {"a": "1"}},
           {"form": "a", "seconds": {"a": -1.0, "b": 1.0}}, {"form": "a", "seconds": {"a": float("nan"), "b": 1.0}},
           {"form": "a", "seconds": {"a": 0.1}}, {"form": ["a"], "seconds": {"a": 0.1, "b": 1.0}},
           {"form": "a", "seconds": {"a": 0.1, "b": 1.0, "c": 1.0}}]  # fmt: skip


@pytest.mark.parametrize("content", [*DAMAGED, *ENTRIES], ids=str)
def test_a_damaged_file_is_measured_again(monkeypatch, own_cache, content):
    own_cache.parent.mkdir()
    own_cache.write_text(content if isinstance(content, str) else json.dumps({forms.machine_key(case()): content}))
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose(case()).name == "b"
    new_process(monkeypatch)
    assert forms.choose(case()).reason == "measured earlier"


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    told(monkeypatch, a=1.0, b=0.5)
    assert forms.choose(case()).name == "b"


def test_the_file_is_whole_at_any_time(monkeypatch, own_cache):
    """Threads in place of processes: readers meet valid JSON, and nothing else is left in the folder."""
    told(monkeypatch, a=1.0, b=0.5)
    forms.measure_and_keep(case())
    writers = [threading.Thread(target=forms.measure_and_keep, args=(case(key=str(i)),)) for i in range(8)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert json.loads(own_cache.read_text())
    for writer in writers:
        writer.join()
    assert [path.name for path in own_cache.parent.iterdir()] == ["forms.json"]


def test_pinned_forms_are_not_measured(monkeypatch):
    monkeypatch.setattr(forms, "measure", lambda calls: pytest.fail("measured"))
    assert forms.choose(case(), is_first=True) == forms_file.Choice("a", "pinned")
    monkeypatch.setenv(forms.VARIABLE, "first")
    assert forms.choose(case()) == forms_file.Choice("a", "pinned")
    monkeypatch.setenv(forms.VARIABLE, "fast")
    with pytest.raises(ValueError, match="QWEN3FAST_FORMS must be 'measured' or 'first', or unset, got 'fast'"):
        forms.choose(case())


def test_a_single_form_is_not_measured(monkeypatch):
    monkeypatch.setattr(forms, "measure", lambda calls: pytest.fail("measured"))
    assert forms.choose(case(names=("a",))).reason == "the only form that serves"


def test_a_choice_tells_form_reason_and_times():
    assert str(forms_file.Choice("a", "pinned")) == "a (pinned)"
    choice = forms_file.Choice("a", "measured now", {"a": 0.0123, "b": 0.1})
    assert str(choice) == "a (measured now: a 12.3 ms, b 100 ms)"
