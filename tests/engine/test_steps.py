"""Steps with processors, constraints, hooks and log-probabilities: beside plain requests each gets what the slow
reference gives it alone, and what fails of a request fails that request alone."""

from functools import cache

import pytest
import torch
from conftest import assert_same, engine_of, randomized, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import finish, make_request, run

from qwen3fast.bench.measure import run_uncached
from qwen3fast.sampling.constraints import bits_of
from qwen3fast.sampling.processors import process_logits
from qwen3fast.scheduling.scheduler import Scheduler

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 97
# Softer than the other tests' weights: processors change tokens, and log-probabilities are not all 0.
MODEL = randomized(
    small_config(num_hidden_layers=1, max_position_embeddings=1024, eos_token_ids=(), tie_word_embeddings=False), seed=3
)


class Remainder:
    """Allows the tokens whose remainder by 3 is that of the number of tokens so far; at some tokens it allows all.

    calls: of each method. fail: (method, number of its call) that raises `error`.
    """

    def __init__(self, is_always_active=True, fail=None, error=None):
        self.is_always_active, self.fail, self.error = is_always_active, fail, error
        self.tokens, self.calls = [], {"is_active": 0, "fill_mask": 0, "accept": 0}

    def _call(self, method):
        self.calls[method] += 1
        if self.fail == (method, self.calls[method]):
            raise self.error

    def is_active(self):
        self._call("is_active")
        return self.is_always_active or len(self.tokens) % 4 in (1, 2)

    def fill_mask(self, words_W):
        self._call("fill_mask")
        words_W &= bits_of(range(len(self.tokens) % 3, VOCABULARY, 3), len(words_W))

    def accept(self, token):
        self._call("accept")
        self.tokens.append(token)

    def is_free_for(self, num_tokens):
        return False


class NowAndThen(Remainder):
    """Restricts two tokens of ten, and says ahead of time which are free."""

    def _restricts(self, index):
        return index % 10 in (7, 8)

    def is_active(self):
        return self._restricts(len(self.tokens))

    def is_free_for(self, num_tokens):
        return not any(self._restricts(len(self.tokens) + i) for i in range(num_tokens))


class ForbidAll:
    """Allows nothing once there are so many tokens."""

    def __init__(self, tokens):
        self.left = tokens

    def is_active(self):
        return self.left == 0

    def fill_mask(self, words_W):
        words_W[:] = 0

    def accept(self, token):
        self.left -= 1

    def is_free_for(self, num_tokens):
        return False


def shifted(logits_V, output_T):
    """Logits that differ at each token: those of another row or token would be noticed."""
    return logits_V.roll(len(output_T)) + (output_T[-1] % 7 if len(output_T) else 0) * torch.arange(VOCABULARY) / 50


# The features of a request; made for each run, since constraints have a state.
FEATURES = {
    "plain": lambda: {},
    "repetition penalty": lambda: {"repetition_penalty": 1.8},
    "presence penalty": lambda: {"presence_penalty": 2.0},
    "frequency penalty": lambda: {"frequency_penalty": 1.7},
    "negative penalties": lambda: {"repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": -0.2},
    "bias": lambda: {"logit_bias": {3: 9.0, 96: -float("inf"), 50: 8.0, 0: -3.0}},
    "allowed ids": lambda: {"allowed_token_ids": frozenset(range(10, 60))},
    "log-probabilities": lambda: {"logprobs": 4},
    "of the chosen token": lambda: {"logprobs": 0},
    "constraint": lambda: {"constraint": Remainder()},
    "constraint at times": lambda: {"constraint": Remainder(is_always_active=False)},
    "constraint now and then": lambda: {"constraint": NowAndThen()},
    "hook": lambda: {"logits_processor": shifted},
    "everything": lambda: {
        **{"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logprobs": 20},
        **{"logit_bias": {3: 4.0, 5: -1.0}, "allowed_token_ids": frozenset(range(80))},
        **{"constraint": Remainder(is_always_active=False), "logits_processor": shifted},
    },
}


def featured(name, length, max_tokens, seed, temperature):
    return make_request(length, max_tokens, seed, temperature=temperature, **FEATURES[name]())


@cache
def uncached(*arguments):
    """The same request, run by the slow reference."""
    request = featured(*arguments)
    run_uncached(engine_of(MODEL, 1), request)
    return request


def assert_alike(actual, expected):
    """The same tokens, and log-probabilities within 1e-4."""
    assert (actual.output_ids, actual.finish_reason) == (expected.output_ids, expected.finish_reason)
    assert len(actual.output_logprobs) == (0 if actual.logprobs is None else len(actual.output_ids))
    for at, reference in zip(actual.output_logprobs, expected.output_logprobs, strict=True):
        assert at.ids == reference.ids and len(at.ids) == actual.logprobs
        values = torch.tensor([at.chosen, *at.values])
        torch.testing.assert_close(values, torch.tensor([reference.chosen, *reference.values]), rtol=0, atol=1e-4)


def assert_clean(scheduler):
    """No row is in use, and whatever stands in a row's processors changes no logits."""
    engine = scheduler.engine
    assert not scheduler.active and not scheduler.waiting
    assert engine.state.advance_R.tolist() == [0] * engine.cache.max_batch_size
    assert engine.state.position_R.tolist() == [-1] * engine.cache.max_batch_size
    if engine.processors is not None:
        logits_RV = torch.randn(engine.cache.max_batch_size, VOCABULARY, generator=torch.Generator().manual_seed(0))
        assert_same(process_logits(logits_RV, engine.processors.tensors), logits_RV)


def test_every_feature_changes_the_tokens_of_these_tests():
    """Or the result shows it in another way: the tests below can fail."""
    plain = uncached("plain", 12, 40, 1, 3.0).output_ids
    for name in FEATURES:
        request = uncached(name, 12, 40, 1, 3.0)
        is_alike = name in ("plain", "log-probabilities", "of the chosen token")
        assert (request.output_ids == plain) == is_alike, name


@pytest.mark.parametrize(("name", "is_greedy"), [(name, greedy) for name in FEATURES for greedy in (True, False)])
def test_a_request_gets_the_tokens_of_the_reference_beside_plain_ones(name, is_greedy):
    """Every feature greedy and sampled, and with and without lookahead; half of them with each pair of these."""
    temperature = 0.0 if is_greedy else 3.0
    lookahead = 2 if is_greedy == bool(list(FEATURES).index(name) % 2) else 0
    scheduler = Scheduler(engine_of(MODEL, 3, lookahead=lookahead))
    arguments = [("plain", 30, 12, 1, temperature), (name, 12, 20, 2, temperature), ("plain", 3, 25, 3, 3.0)]
    requests = [featured(*each) for each in arguments]
    run(scheduler, *requests)
    for request, each in zip(requests, arguments, strict=True):
        assert_alike(request, uncached(*each))
    assert_clean(scheduler)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 5),  # steps until it comes
        st.sampled_from(list(FEATURES)),
        st.integers(1, 60),  # length of the prompt
        st.integers(1, 10),  # tokens
        st.sampled_from([0.0, 3.0]),  # temperature
        st.booleans(),  # the prompt of the one before
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=25)
@given(arrivals=arrivals, rows=st.integers(1, 4), lookahead=st.sampled_from([0, 2]))
def test_requests_of_all_kinds_in_any_order_get_the_tokens_of_the_reference(arrivals, rows, lookahead):
    scheduler, requests, expected, length = Scheduler(engine_of(MODEL, rows, lookahead=lookahead)), [], [], 1
    for i, (wait, name, new_length, max_tokens, temperature, is_again) in enumerate(arrivals):
        for _ in range(wait):
            scheduler.step()
        length, seed = (length, i - 1) if is_again and i else (new_length, i)
        arguments = (name, length, max_tokens, seed, temperature)
        requests.append(featured(*arguments))
        expected.append(uncached(*arguments))
        scheduler.add(requests[-1])
    finish(scheduler, requests)
    for request, reference in zip(requests, expected, strict=True):
        assert_alike(request, reference)
    assert_clean(scheduler)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_constraint_sees_every_token_once_and_in_order(lookahead):
    scheduler = Scheduler(engine_of(MODEL, 2, lookahead=lookahead))
    constraint = Remainder()
    request = make_request(9, 12, constraint=constraint)
    run(scheduler, make_request(20, 40, seed=1), request)
    assert constraint.tokens == request.output_ids
    assert [token % 3 for token in request.output_ids] == [i % 3 for i in range(12)]


def test_steps_run_ahead_while_no_constraint_is_near():
    scheduler = Scheduler(engine_of(MODEL, 2, lookahead=2))
    request = make_request(9, 24, constraint=NowAndThen())
    scheduler.add(request)
    in_flight = {}
    while request.finish_reason is None:
        scheduler.step()
        in_flight[len(request.output_ids)] = len(scheduler._in_flight)
    # Tokens 7, 8 and 17, 18 are restricted: the next one can be launched with two in flight while all three are free.
    assert {n for n, ahead in in_flight.items() if ahead == 2} == {*range(1, 5), *range(9, 15), *range(19, 23)}
    assert all(in_flight[n] == 0 for n in in_flight if n in (5, 6, 7, 8, 15, 16, 17, 18))


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("is_always_active", [True, False])
def test_a_constraint_holds_while_it_is_active_and_no_longer(is_always_active, lookahead):
    """The same as a hook that forbids the same tokens."""

    def forbid(logits_V, output_T):
        i = len(output_T)
        is_allowed_V = torch.arange(VOCABULARY) % 3 == i % 3
        return logits_V.masked_fill(~is_allowed_V, -torch.inf) if is_always_active or i % 4 in (1, 2) else logits_V

    constraint = Remainder(is_always_active)
    request, hooked = make_request(9, 40, constraint=constraint), make_request(9, 40, logits_processor=forbid)
    scheduler = Scheduler(engine_of(MODEL, 2, lookahead=lookahead))
    run(scheduler, make_request(20, 50, seed=1), request)
    assert [request.output_ids] == run(Scheduler(engine_of(MODEL, 1)), hooked)
    assert all(token % 3 == i % 3 for i, token in enumerate(request.output_ids)) == is_always_active


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_hook_sees_the_logits_of_its_own_request_at_each_token_once(lookahead):
    seen = []

    def note(logits_V, output_T):
        seen.append((logits_V.clone(), output_T.tolist()))
        return logits_V

    scheduler = Scheduler(engine_of(MODEL, 3, lookahead=lookahead))
    request = make_request(9, 12, logits_processor=note)
    run(scheduler, make_request(20, 5, seed=1), request, make_request(30, 4, seed=2))
    assert [output_ids for _, output_ids in seen] == [request.output_ids[:i] for i in range(12)]
    for logits_V, output_ids in seen:
        assert logits_V.shape == (VOCABULARY,) and logits_V.dtype is torch.float32
        expected_1V = engine_of(MODEL, 1).logits_uncached(request.prompt_ids + output_ids)
        torch.testing.assert_close(logits_V, expected_1V[0], rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_of_the_model_itself_whatever_was_done_to_its_logits():
    scheduler = Scheduler(engine_of(MODEL, 2))
    request = make_request(9, 12, logprobs=2, constraint=Remainder(), presence_penalty=2.0, logits_processor=shifted)
    run(scheduler, make_request(20, 5, seed=1), request)
    for i, at in enumerate(request.output_logprobs):
        ids = request.prompt_ids + request.output_ids[:i]
        exact_V = engine_of(MODEL, 1).logits_uncached(ids)[0].double().log_softmax(-1)
        assert at.ids == exact_V.topk(2).indices.tolist()
        assert at.chosen == pytest.approx(exact_V[request.output_ids[i]].item(), abs=1e-4)
        assert at.values == pytest.approx(exact_V.topk(2).values.tolist(), abs=1e-4)


def test_rows_are_cleared_of_what_a_request_brought_along():
    scheduler = Scheduler(engine_of(MODEL, 2))
    run(scheduler, featured("everything", 9, 12, 1, 3.0), featured("negative penalties", 20, 30, 2, 3.0))
    state = scheduler.engine.processors
    for tensor, neutral in zip(state.tensors, (1, 0, 0, 0, 0, 0, -1), strict=True):
        assert_same(tensor, torch.full_like(tensor, neutral))


def test_a_request_that_is_cancelled_leaves_no_trace():
    scheduler = Scheduler(engine_of(MODEL, 2, lookahead=2))
    cancelled, other = featured("everything", 9, 12, 1, 3.0), featured("bias", 20, 30, 2, 3.0)
    scheduler.add(cancelled)
    scheduler.add(other)
    for _ in range(5):
        scheduler.step()
    scheduler.cancel(cancelled)
    finish(scheduler, [other])
    assert_alike(other, uncached("bias", 20, 30, 2, 3.0))
    assert_clean(scheduler)


# ------------------------------------------------------------------------------------------------------------ failures


def failing_at(call, error, result):
    """A function that gives a result, but raises at this call of it."""
    count = [0]

    def function(*arguments):
        count[0] += 1
        if count[0] == call:
            raise error
        return result(*arguments)

    return function


def failing_request(what, call, error, max_tokens=12):
    """What: a method of its constraint, or a function of its own; it raises the error at this call."""
    if what == "on_token":
        changes = {"on_token": failing_at(call, error, lambda token: False)}
    elif what == "logits_processor":
        changes = {"logits_processor": failing_at(call, error, lambda logits_V, output_T: logits_V)}
    else:
        changes = {"constraint": Remainder(fail=(what, call), error=error)}
    return make_request(9, max_tokens, seed=7, **changes)


FAILURES = ["is_active", "fill_mask", "accept", "logits_processor", "on_token"]


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize(("place", "call", "lookahead"), [(0, 1, 0), (0, 3, 2), (2, 1, 2), (2, 3, 0)])  # all pairs
def test_what_fails_of_a_request_fails_that_request_alone(place, what, call, lookahead):
    """place: its row, beside a plain request and one whose every token is watched."""
    error = ValueError("of its own")
    scheduler = Scheduler(engine_of(MODEL, 3, lookahead=lookahead))
    failing = failing_request(what, call, error)
    others = {("plain", 30, 20, 1, 3.0): None, ("everything", 12, 20, 2, 3.0): None}
    for arguments in others:
        others[arguments] = featured(*arguments)
    requests = list(others.values())
    requests.insert(place, failing)
    run(scheduler, *requests)
    assert failing.finish_reason == "error" and failing.error is error
    # A constraint and a hook are asked before the token; accept and on_token are told of it.
    assert len(failing.output_ids) == (call if what in ("accept", "on_token") else call - 1)
    for arguments, request in others.items():
        assert_alike(request, uncached(*arguments))
    assert_clean(scheduler)
    held = [scheduler.prefixes.tokens(row, {}) for row in range(3)]
    assert failing.prompt_ids not in [ids[:9] for ids in held] and [] in held
    for arguments in (("plain", 9, 10, 7, 3.0), ("everything", 9, 10, 7, 3.0)):  # the prompt of the one that failed
        again = featured(*arguments)
        run(scheduler, again)
        assert_alike(again, uncached(*arguments))


@pytest.mark.parametrize("what", FAILURES)
def test_the_reference_fails_as_the_batch_does(what):
    error = ValueError("of its own")
    request = failing_request(what, 3, error)
    if what in ("accept", "on_token"):
        run_uncached(engine_of(MODEL, 1), request)
        assert request.error is error
    else:
        with pytest.raises(ValueError, match="of its own"):
            run_uncached(engine_of(MODEL, 1), request)


def test_a_hook_is_not_called_again_because_another_failed():
    lengths = []

    def note(logits_V, output_T):
        lengths.append(len(output_T))
        return logits_V

    scheduler = Scheduler(engine_of(MODEL, 2))
    run(scheduler, make_request(20, 8, logits_processor=note), failing_request("logits_processor", 3, ValueError("no")))
    assert lengths == list(range(8))


def test_several_may_fail_in_one_step():
    errors = [ValueError(what) for what in FAILURES]
    scheduler = Scheduler(engine_of(MODEL, 6))
    failing = [failing_request(what, 3, error) for what, error in zip(FAILURES, errors, strict=True)]
    other = featured("everything", 20, 20, 2, 3.0)
    run(scheduler, *failing, other)
    assert all(request.error is error for request, error in zip(failing, errors, strict=True))
    assert_alike(other, uncached("everything", 20, 20, 2, 3.0))
    assert_clean(scheduler)


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_constraint_that_forbids_everything_says_so(tokens, lookahead):
    scheduler = Scheduler(engine_of(MODEL, 2, lookahead=lookahead))
    stuck, other = make_request(9, 12, constraint=ForbidAll(tokens)), featured("plain", 30, 20, 1, 3.0)
    run(scheduler, stuck, other)
    assert isinstance(stuck.error, ValueError) and len(stuck.output_ids) == tokens
    assert f"no token is allowed at token {tokens} of the reply: allowed_token_ids, logit" in str(stuck.error)
    assert_alike(other, uncached("plain", 30, 20, 1, 3.0))
    assert_clean(scheduler)


def test_a_bias_that_forbids_everything_says_so():
    request = make_request(9, 12, logit_bias=dict.fromkeys(range(VOCABULARY), -float("inf")))
    run(Scheduler(engine_of(MODEL, 1)), request)
    assert "no token is allowed" in str(request.error)


def test_invalid_logits_of_a_plain_request_are_not_blamed_on_what_it_allows():
    engine = engine_of(MODEL, 1)
    object.__setattr__(engine.parts, "logits", lambda head, x_B1E: torch.full((len(x_B1E), 1, VOCABULARY), torch.nan))
    request = make_request(9, 12)
    run(Scheduler(engine), request)
    assert isinstance(request.error, FloatingPointError) and "no token is allowed" not in str(request.error)


@pytest.mark.parametrize(
    "bad", [lambda x, ids: x[:-1], lambda x, ids: x[None], lambda x, ids: None, lambda x, ids: 3.0]
)
def test_a_hook_that_gives_no_logits_is_told_so(bad):
    scheduler = Scheduler(engine_of(MODEL, 2))
    request, other = make_request(9, 12, logits_processor=bad), featured("plain", 30, 20, 1, 3.0)
    run(scheduler, request, other)
    assert isinstance(request.error, ValueError)
    assert "logits_processor must return logits of shape (97,), got " in str(request.error)
    assert_alike(other, uncached("plain", 30, 20, 1, 3.0))


def test_a_step_that_breaks_ends_all_requests_in_it_and_nothing_is_kept():
    scheduler, error = Scheduler(engine_of(MODEL, 3, lookahead=2)), RuntimeError("the device is gone")
    kept = featured("plain", 40, 3, 4, 3.0)
    run(scheduler, kept)
    running = [featured("plain", 30, 20, 1, 3.0), featured("everything", 12, 20, 2, 3.0)]
    waiting = featured("bias", 9, 10, 3, 3.0)
    for request in running:
        scheduler.add(request)
    for _ in range(4):
        scheduler.step()
    scheduler.add(waiting)
    scheduler.fail_all(error)
    assert all(request.error is error for request in running) and waiting.finish_reason is None
    assert [scheduler.prefixes.tokens(row, {}) for row in range(3)] == [[], [], []]
    finish(scheduler, [waiting])
    assert_alike(waiting, uncached("bias", 9, 10, 3, 3.0))
    assert_clean(scheduler)
