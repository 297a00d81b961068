"""The shipped tiny model: a trained Qwen3 whose answers can be checked, which reveals a wrong KV cache."""

import random

import pytest
import tiny_tasks
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen3fast import Generator, SamplingParams
from qwen3fast.checkpoint.source import TINY_FOLDER

GREEDY = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def tiny():
    with Generator.from_pretrained("tiny", dtype="float32", max_batch_size=4, compile=False) as generator:
        yield generator


def ask(generator, *questions, enable_thinking=False, **options):
    """Greedy answers to independent questions, as one batch."""
    prompts = [
        generator.tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], enable_thinking=enable_thinking, tokenize=True
        )
        for q in questions
    ]
    return [r.text for r in generator.generate(prompts, GREEDY, **options)]


def task_examples(make, count, seed=77):
    rng = random.Random(seed)
    return [make(rng) for _ in range(count)]


def share_right(generator, examples, **options):
    answers = ask(generator, *[e.messages[0][1] for e in examples], **options)
    return sum(a == e.answer for a, e in zip(answers, examples, strict=True)) / len(examples)


def test_tiny_checkpoint_is_small_enough():
    assert (TINY_FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_tiny_adds():
    with Generator.from_pretrained("tiny", compile=False) as generator:  # as users load it: bfloat16
        reply = generator.chat([{"role": "user", "content": "What is 17 + 25?"}], GREEDY, enable_thinking=False)
    assert (reply.text, reply.finish_reason) == ("42", "stop")


@pytest.mark.parametrize(
    "make", [lambda rng: tiny_tasks.addition(rng, held_out=True), tiny_tasks.copying], ids=["addition", "copying"]
)
def test_tiny_is_right_on_held_out_examples(tiny, make):
    assert share_right(tiny, task_examples(make, 20)) >= 0.9


def test_tiny_thinks_before_it_answers(tiny):
    with pytest.warns(UserWarning, match="greedy decoding"):
        reply = tiny.chat([{"role": "user", "content": "What is 17 + 25?"}], GREEDY, enable_thinking=True)
    assert reply.text.startswith("<think>\n7 + 5 = 12, carry 1.")
    assert reply.text.endswith("</think>\n\n42")


def test_tiny_looks_facts_up_at_2000_tokens(tiny):
    """A wrong KV cache would show: the fact is anywhere in the prompt, which takes several chunks of prefill."""
    examples = task_examples(lambda rng: tiny_tasks.lookup(rng, 1900), 5)
    assert all(len(tiny.tokenizer.encode(e.messages[0][1])) > 1900 for e in examples)
    assert share_right(tiny, examples) >= 0.85


@pytest.mark.parametrize("num_words", [400, 1100])  # prompts of one or two chunks, and of three
def test_tiny_long_context_is_the_same_with_and_without_cache(tiny, num_words):
    [example] = task_examples(lambda rng: tiny_tasks.lookup(rng, num_words), 1, seed=3)
    question = example.messages[0][1]
    assert len(tiny.tokenizer.encode(question)) > num_words
    assert ask(tiny, question) == ask(tiny, question, use_cache=False)


def test_tiny_answers_are_the_same_with_and_without_cache(tiny):
    questions = ["What is 38 + 57?", "Copy: red fox hill", "Reverse the words: one big dog", "Count from 5 to 9."]
    assert ask(tiny, *questions) == ask(tiny, *questions, use_cache=False)


def test_tiny_batched_answers_are_the_single_ones(tiny):
    questions = [e.messages[0][1] for e in task_examples(tiny_tasks.addition, 9)]
    assert ask(tiny, *questions) == [ask(tiny, q)[0] for q in questions]


def test_tiny_streamed_answer_is_the_whole_one(tiny):
    messages = [{"role": "user", "content": "Tell a short story about Alice."}]
    params = SamplingParams(seed=4, max_tokens=120)
    chunks = list(tiny.stream_chat(messages, params, enable_thinking=False))
    assert "".join(c.text for c in chunks) == tiny.chat(messages, params, enable_thinking=False).text


def test_tiny_generates_the_greedy_tokens_of_transformers(tiny):
    reference = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    for question in ("What is 64 + 29?", "Tell a short story about Tom."):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        theirs = reference.generate(ids, do_sample=False, max_new_tokens=60, temperature=None, top_k=None, top_p=None)
        ours = tiny.generate(tiny.tokenizer.apply_chat_template(messages, tokenize=True), GREEDY)
        assert ours.token_ids == theirs[0, ids.shape[1] :].tolist()


def test_tiny_continues_plain_text(tiny):
    result = tiny.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4))
    assert result.text.startswith(" Paris")
