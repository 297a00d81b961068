"""The tool that trains the tiny model: its data is right, held-out sums are held out, its format is the template's."""

import random

import pytest
import tiny_tasks
import torch
import train_tiny


@pytest.fixture(scope="module")
def base():
    return train_tiny.train_tokenizer(random.Random(0))


def test_additions_for_training_and_evaluation_never_overlap():
    rng = random.Random(0)
    trained = {tiny_tasks.addition(rng).thought for _ in range(3000)}
    held_out = {tiny_tasks.addition(rng, held_out=True).thought for _ in range(3000)}
    operands = [(a, b) for a in range(100) for b in range(100)]
    assert 0.08 < sum(tiny_tasks.is_held_out(a, b) for a, b in operands) / len(operands) < 0.12
    assert trained and held_out and not trained & held_out


@pytest.mark.parametrize("seed", range(20))
def test_lookup_answers_stand_in_the_text(seed):
    example = tiny_tasks.lookup(random.Random(seed), 200, 3)
    text = example.messages[0][1]
    for role, content in example.messages:
        if role == "assistant":
            name, surname = content.removeprefix("It is ").removesuffix(".").split()
            assert text.count(f"This is {name} {surname}.") == 1 and text.count(f"This is {name} ") == 1


@pytest.mark.parametrize("thinking", [False, True])
def test_training_format_is_the_chat_template(base, tokenizer, thinking):
    example = tiny_tasks.addition(random.Random(3))
    ids, labels = train_tiny.encode(base, example, thinking)
    question = [{"role": "user", "content": example.messages[0][1]}]
    prompt = tokenizer.apply_chat_template(question, enable_thinking=thinking)
    answer = f"<think>\n{example.thought}\n</think>\n\n{example.answer}" if thinking else example.answer
    assert base.decode(ids, skip_special_tokens=False) == prompt + answer + "<|im_end|>"
    trained = [i for i, label in zip(ids, labels, strict=True) if label != train_tiny.IGNORE]
    assert base.decode(trained, skip_special_tokens=False) == answer + "<|im_end|>"


def test_row_weights_sum_to_the_root_of_the_trained_tokens():
    ignore = train_tiny.IGNORE
    labels = torch.tensor([[ignore, 1, 2, 3, 4], [ignore, ignore, ignore, ignore, 7], [ignore] * 5])
    torch.testing.assert_close(train_tiny.row_weights(labels).sum(dim=1), torch.tensor([2.0, 1.0, 0.0]))


def test_batches_hold_every_row_once_and_pad_outside_the_loss(base):
    batches = train_tiny.make_batches(base, random.Random(1), 0.5, 2000, pool=60)
    assert sum(len(ids) for ids, _ in batches) == 60
    for ids, labels in batches:
        assert len(ids) == 1 or ids.numel() <= 2000
        is_trained = labels != train_tiny.IGNORE
        assert torch.equal(ids[is_trained], labels[is_trained])
