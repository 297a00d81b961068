"""Rank 0's engine and one that follows it: after any requests they hold the same bits. Here both are in one process."""

from __future__ import annotations

import inspect
import pickle
from collections import deque
from functools import partial
from typing import Any

import pytest
import torch
from conftest import assert_same, engine_of, randomized, small_config
from parallel_worker import everything

from qwen3fast import Generator
from qwen3fast.engine import Engine
from qwen3fast.engine.distributed import NOT_BROADCAST, LeadingEngine, follow

CPU = torch.device("cpu")


class Tape:
    """Stands for `Ranks`: what rank 0 broadcasts and shares is kept, and played to the other rank later."""

    def __init__(self, is_leader: bool = True, messages: deque[Any] | None = None) -> None:
        self.is_leader, self.messages = is_leader, messages if messages is not None else deque()

    def broadcast(self, message: Any) -> None:
        self.messages.append(pickle.dumps(message))

    def receive(self) -> Any:
        return pickle.loads(self.messages.popleft())

    def share(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_leader:
            return self.messages.popleft()
        self.messages.append(x.clone())
        return x


@pytest.fixture(scope="module")
def model(tokenizer):
    eos = (tokenizer.base.token_to_id("<|im_end|>"),)
    return randomized(small_config(vocab_size=tokenizer.vocab_size, num_hidden_layers=1, eos_token_ids=eos), seed=5)


@pytest.mark.parametrize("lookahead", [0, 2])
def test_the_follower_ends_in_the_state_of_the_leader(model, tokenizer, monkeypatch, lookahead):
    # Attention of steps then reads as much in both: this engine's lookahead is a CUDA device's.
    make_engine = partial(engine_of, model, positions=200, lookahead=lookahead)
    monkeypatch.setattr("qwen3fast.generator.Engine", lambda *_, **__: make_engine())
    tape = Tape()
    with Generator(model, tokenizer, max_seq_len=200, max_batch_size=3, compile=False, ranks=tape) as generator:
        everything(generator)
        leader = generator.debug.engine
    names = {pickle.loads(message)[0] for message in tape.messages if isinstance(message, bytes)}
    assert {"prefill_step", "prefill_together", "sample_first", "launch"} <= names
    follower = make_engine()
    follow(follower, Tape(is_leader=False, messages=tape.messages))
    assert not tape.messages, "it has received all"
    for name, tensor in vars(leader.state).items():
        assert_same(getattr(follower.state, name), tensor)
    for ours, theirs in zip(follower.cache.tensors(), leader.cache.tensors(), strict=True):
        assert_same(ours, theirs)
    for ours, theirs in zip(follower.processors.tensors, leader.processors.tensors, strict=True):
        assert_same(ours, theirs)


METHODS = sorted(name for name, value in vars(Engine).items() if inspect.isfunction(value) and name[0] != "_")
ARGUMENTS = {
    "sample_first": (0, torch.zeros(1, 3), None),
    "launch": (1, 1, None),
}  # of methods with messages of their own


def test_methods_that_are_not_broadcast_are_some_of_the_engines():
    assert NOT_BROADCAST.issubset(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_engine_is_broadcast_or_named_as_not_broadcast(model, monkeypatch, name):
    tape, done = Tape(), []
    monkeypatch.setattr(Engine, name, lambda *arguments: done.append(arguments))
    getattr(LeadingEngine(engine_of(model), tape), name)(*ARGUMENTS.get(name, ()))
    assert len(done) == 1
    assert [pickle.loads(message)[0] for message in tape.messages] == ([] if name in NOT_BROADCAST else [name])


def test_methods_are_broadcast_with_their_arguments_and_give_what_the_engine_gives(model):
    tape = Tape()
    engine = LeadingEngine(engine_of(model), tape)
    engine.copy_row(0, 1, 5)
    assert_same(engine.prefill_whole(0, [1, 2, 3]), engine_of(model).prefill_whole(0, [1, 2, 3]))
    assert engine.batch_bucket(3) == 3
    sent = [pickle.loads(message) for message in tape.messages]
    assert sent == [("copy_row", (0, 1, 5)), ("prefill_whole", (0, [1, 2, 3]))]


def test_warmup_is_broadcast_without_what_reports(model):
    tape, parts = Tape(), []
    LeadingEngine(engine_of(model), tape).warmup(parts.append)
    assert parts[0] == "prefill"
    assert pickle.loads(tape.messages[0]) == ("warmup", ())
    assert len(tape.messages) == 1


def test_a_leader_whose_step_failed_refuses_all_later_calls(model, monkeypatch):
    engine = LeadingEngine(engine_of(model), Tape())
    monkeypatch.setattr(Engine, "copy_row", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.copy_row(0, 1, 5)
    with pytest.raises(RuntimeError, match="the ranks are out of step since an earlier error; restart them"):
        engine.clear_row(0)


def test_a_split_model_cannot_be_saved(model, tmp_path):
    with (
        Generator(model, max_seq_len=64, compile=False, ranks=Tape()) as generator,
        pytest.raises(ValueError, match="split over processes cannot be saved; load it in one process for that"),
    ):
        generator.save_quantized(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_closing_goes_on_where_the_other_ranks_are_gone(model, caplog):
    class Gone(Tape):
        def broadcast(self, message: Any) -> None:
            raise RuntimeError("connection closed by peer")

    LeadingEngine(engine_of(model), Gone()).close()
    assert "could not end the other ranks: connection closed by peer" in caplog.text
