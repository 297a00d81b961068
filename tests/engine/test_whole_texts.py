"""Texts read in one C++ operation: the states of the plain model, whatever shares a batch, and after weights move."""

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, randomized, small_config

from qwen3fast.engine import last_token
from qwen3fast.engine.last_token import TextReader
from qwen3fast.engine.whole_texts import WholeTexts
from qwen3fast.kernels import cpu
from qwen3fast.quantization.convert import quantize_model

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 97, "dtype": torch.bfloat16}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LENGTHS = (1, 3, 8, 9, 40, 130, 2, 17)


def make_model(format=None, **changes):
    model = randomized(small_config(**SIZES | changes)).bfloat16()
    if format is not None:
        quantize_model(model, format, torch.bfloat16)
    return model


def make_rows(lengths=LENGTHS, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (length,), generator=rng).tolist() for length in lengths]


def plain(model, rows, is_mean=False):
    """The definition, row by row, in float32 from the model's own forward pass."""
    with torch.no_grad():
        states = [model.model.norm(model.hidden(torch.tensor([row])))[0].float() for row in rows]
    return torch.stack([state.mean(dim=0) if is_mean else state[-1] for state in states])


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the passes through the operation."""
    seen = []
    run = WholeTexts.hidden

    def hidden(self, token_BT, last_B):
        x_BTE = run(self, token_BT, last_B)
        seen.append((tuple(token_BT.shape), x_BTE is not None))
        return x_BTE

    monkeypatch.setattr(WholeTexts, "hidden", hidden)
    return seen


@pytest.mark.parametrize("is_mean", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("format", "changes"),
    [(None, {}), ("int8", {}), ("int4", {}), (None, {"rope_theta": 5e5, "num_key_value_heads": 1}), ("int8", EXPERTS)],
    ids=["bf16", "int8", "int4", "one key head", "experts"],
)
def test_states_are_those_of_the_plain_model(format, changes, batch_size, is_mean, calls):
    model, rows = make_model(format, **changes), make_rows()
    expected = plain(model, rows, is_mean)
    actual = TextReader(model).last_states(rows, batch_size, is_mean=is_mean)
    assert calls and all(served for _, served in calls)
    assert max(shape[0] for shape, _ in calls) == min(batch_size, len(rows))
    if format is None:
        assert_near(actual, expected, torch.bfloat16)
    else:  # many rows are quantized to bytes, a few are not
        assert F.cosine_similarity(actual, expected).min() > 0.998


def test_a_pass_has_a_bounded_number_of_tokens(monkeypatch, calls):
    monkeypatch.setattr(last_token, "MAX_TOKENS", 100)
    model, rows = make_model(), make_rows()
    assert_near(TextReader(model).last_states(rows, 8), plain(model, rows), torch.bfloat16)
    assert [shape for shape, _ in calls] == [(1, 130), (2, 40), (5, 9)]


def test_longer_texts_and_larger_batches_get_more_memory(calls):
    model, reader = make_model(), None
    reader = TextReader(model)
    for lengths in ((5,), (200, 3), (7, 5, 9, 2), (256,)):
        rows = make_rows(lengths)
        assert_near(reader.last_states(rows, 8), plain(model, rows), torch.bfloat16)
    assert all(served for _, served in calls)


def test_weights_that_change_or_move_are_followed(calls):
    model, rows = make_model(), make_rows()
    reader, other = TextReader(model), randomized(small_config(**SIZES), seed=9).bfloat16()
    before = reader.last_states(rows, 8)
    model.load_state_dict(other.state_dict(), assign=True)
    after = reader.last_states(rows, 8)
    assert_near(after, plain(other, rows), torch.bfloat16)
    assert not torch.allclose(before, after, atol=0.1)
    del calls[:]
    model.float()
    assert_near(reader.last_states(rows, 8), plain(model, rows))
    assert not calls


def test_models_that_the_operation_does_not_serve_are_read_by_the_plain_form(calls):
    for changes in ({"head_dim": 16}, {"dtype": torch.float32}, {"attention_bias": True}):
        model = randomized(small_config(**SIZES | changes))
        model = model.bfloat16() if "dtype" not in changes else model
        rows = make_rows()
        assert_near(TextReader(model).last_states(rows, 8), plain(model, rows), torch.bfloat16)
    assert not any(served for _, served in calls)


def test_threads_share_a_reader():
    model, found = make_model(), {}
    reader, texts = TextReader(model), [make_rows(seed=seed) for seed in range(4)]
    expected = [reader.last_states(rows, 8) for rows in texts]

    def read(number):
        found[number] = [reader.last_states(texts[number], 8) for _ in range(5)]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(state, expected[number]) for number, states in found.items() for state in states)
    assert len(found) == 4
