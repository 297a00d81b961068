"""The model of lm-evaluation-harness: on a stand-in for its interface, and with the harness where it is installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import randomized, small_config, write_text_checkpoint
from tokenizers.processors import TemplateProcessing

from qwen3fast import SamplingParams

TASKS = Path(__file__).parents[1] / "examples/eval_tasks"

pytestmark = pytest.mark.usefixtures("one_thread")


class StandIn:
    """What the adapter uses of lm_eval.api.model.TemplateLM."""

    def __init__(self):
        self.cached = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: self.cached.append(arguments))


def windows(token_list, prefix_token, max_seq_len, context_len):
    """Every token once, each with as much context as makes max_seq_len tokens, the prefix before the first ones."""
    assert context_len == 1
    for begin in range(0, len(token_list), max_seq_len):
        end = min(begin + max_seq_len, len(token_list))
        context = token_list[end - max_seq_len - 1 : begin] if begin else [prefix_token]
        yield context + token_list[begin : end - 1], token_list[begin:end]


def disjoint(pair):
    """Leave out the context's tokens that are predicted."""
    return pair[0][: len(pair[0]) - len(pair[1]) + 1], pair[1]


def test_windows_of_the_stand_in_are_the_harness_own():
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 39, 40, 41, 80, 95):
        sizes = {"token_list": list(range(length)), "prefix_token": 999, "max_seq_len": 40, "context_len": 1}
        expected = list(map(utils.make_disjoint_window, utils.get_rolling_token_windows(**sizes)))
        assert list(map(disjoint, windows(**sizes))) == expected


@pytest.fixture
def adapter(monkeypatch):
    """The module, on stand-ins."""
    names = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"TemplateLM": StandIn}}
    names["lm_eval.api.registry"] = {"register_model": lambda name: lambda cls: cls}
    names["lm_eval.utils"] = {"get_rolling_token_windows": windows, "make_disjoint_window": disjoint}
    for name, attributes in names.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(attributes)
    monkeypatch.delitem(sys.modules, "qwen3fast.lm_eval", raising=False)
    yield importlib.import_module("qwen3fast.lm_eval")
    sys.modules.pop("qwen3fast.lm_eval")


@pytest.fixture
def folder(tmp_path, tokenizer, tokenizer_folder):
    config = small_config(vocab_size=tokenizer.vocab_size, eos_token_ids=(tokenizer.base.token_to_id("<|im_end|>"),))
    return write_text_checkpoint(tmp_path / "model", randomized(config, seed=4), tokenizer_folder)


@pytest.fixture
def model(adapter, folder):
    model = adapter.HarnessModel(str(folder), compile=False, max_length=40, batch_size="2")
    yield model
    model.generator.close()


@torch.no_grad()
def plain_score(model, context, continuation):
    """By the plain model, on everything but the last token."""
    ids = [*context, *continuation]
    rows = model.generator.model(torch.tensor([ids[:-1]]))[0].float().log_softmax(-1)[len(context) - 1 :]
    chosen = rows.gather(1, torch.tensor(continuation)[:, None])
    return pytest.approx(float(chosen.sum()), abs=2e-3), rows.argmax(-1).tolist() == continuation


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_loglikelihood_is_the_plain_models_in_the_order_of_the_requests(model):
    context = [5, 6, 7, 8]
    greedy = model.generator.generate(context, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)).token_ids
    pairs = [([9], [1]), (context, greedy), (context, [3, 2]), ([2, 3], [8, 8, 8]), (context, [4]), ([1], [])]
    requests = [((f"context {i}", "continuation"), *pair) for i, pair in enumerate(pairs)]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert found == [*(plain_score(model, *pair) for pair in pairs[:-1]), (0.0, True)]
    assert found[1][1]
    assert sorted(model.cached) == sorted(("loglikelihood", r[0], f) for r, f in zip(requests[:5], found, strict=False))


def test_contexts_that_are_too_long_lose_their_beginning(model):
    context, continuation = [(7 * i) % 900 for i in range(100)], [5, 6, 7]
    [found] = model._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
    assert found == plain_score(model, context[-38:], continuation)  # the model sees 40 tokens
    assert model.cached == []
    [found] = model._loglikelihood_tokens([(None, context, context[:40])], disable_tqdm=True)
    assert found == plain_score(model, context[-1:], context[:40])
    with pytest.raises(ValueError, match="a continuation of 41 tokens exceeds max_length 40"):
        model._loglikelihood_tokens([(None, context, context[:41])], disable_tqdm=True)


def test_loglikelihood_rolling_sums_windows(model):
    text = "the dog and the zebra " * 12
    ids = model.tok_encode(text)
    assert len(ids) > 80
    found = model.loglikelihood_rolling([request(text), request(""), request("a")], disable_tqdm=True)
    prefix = model.generator.tokenizer.base.token_to_id("<|im_end|>")  # eos_token, since there is no bos_token
    expected, done = 0.0, 0
    while done < len(ids):
        end = min(done + 40, len(ids))
        context = ids[end - 41 : done] if done else [prefix]
        expected += plain_score(model, context, ids[done:end])[0].expected
        done = end
    assert found[0] == pytest.approx(expected, abs=1e-2)
    assert found[1] == 0 and found[2] == plain_score(model, [prefix], model.tok_encode("a"))[0]
    assert [entry[:2] for entry in model.cached] == [("loglikelihood_rolling", (t,)) for t in (text, "", "a")]


def test_a_bos_token_comes_first_where_the_tokenizer_puts_one(model):
    base = model.tokenizer.base
    bos, ids = base.token_to_id("<|endoftext|>"), model.tok_encode("the dog")
    plain = model.loglikelihood_rolling([request("the dog")], disable_tqdm=True)
    base.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)])
    assert model.prefix_token_id == bos
    assert model.tok_encode("the dog") == [bos, *ids] and model.tok_encode("the dog", add_special_tokens=False) == ids
    assert model._job("the dog", {"max_gen_toks": 4})[0] == [bos, *ids] and model._job("", {})[0] == [bos]
    expected = plain_score(model, [bos], ids)[0]
    # The harness gives an empty context as the prefix, and encodes the continuation as it encodes any text.
    found = model._loglikelihood_tokens([(("", "the dog"), [bos], [bos, *ids]), (None, [bos], ids)])
    assert [score for score, _ in found] == [expected, expected]
    assert model.loglikelihood_rolling([request("the dog")], disable_tqdm=True) == [expected] != plain


def test_generate_until_ends_before_a_stop_string(model):
    context = "the dog"
    whole = model.generator.generate(context, SamplingParams(temperature=0, max_tokens=12)).text
    stop = whole[3:5]
    arguments = [
        {"until": [stop], "max_gen_toks": 12, "do_sample": False},
        {"max_new_tokens": 12, "temperature": 0.0},
        {"until": stop, "max_tokens": 12},
        {"until": ["", "never so"], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0, "seed": 3},
    ]
    found = model.generate_until([request(context, kwargs) for kwargs in arguments], disable_tqdm=True)
    sampled = model.generator.generate(context, SamplingParams(temperature=1.0, max_tokens=5, seed=3)).text
    assert found == [whole[: whole.find(stop)], whole, whole[: whole.find(stop)], sampled]
    assert [entry[1] for entry in model.cached] == [(context, kwargs) for kwargs in arguments]


def test_a_long_context_leaves_room_for_the_reply(model):
    ids = model.tok_encode("the dog and the zebra " * 12)
    prompt, params, _ = model._job("the dog and the zebra " * 12, {"max_gen_toks": 10})
    assert (prompt, params.max_tokens, params.temperature) == (ids[-30:], 10, 0.0)
    prompt, params, _ = model._job("", {})
    assert (prompt, params.max_tokens) == ([model.prefix_token_id], 39)


def test_keywords_that_cannot_be_followed_are_named(model):
    with pytest.raises(ValueError, match=r"cannot be followed: .*num_beams"):
        model._job("a", {"num_beams": 4})


def test_reasoning_is_left_out_and_stop_strings_apply_to_the_answer(model, monkeypatch):
    reply = SimpleNamespace(answer="one\n\ntwo", text="a\n\nb one\n\ntwo")
    asked = []
    monkeypatch.setattr(model.generator, "generate", lambda prompts, params: asked.extend(params) or [reply])
    model.enable_thinking = True
    assert model.generate_until([request("a", {"until": ["\n\n"]})], disable_tqdm=True) == ["one"]
    assert asked[0].stop == ()
    model.enable_thinking = False
    assert model.generate_until([request("a", {"until": ["END"]})], disable_tqdm=True) == [reply.text]


def test_chat_templates(model):
    messages = [{"role": "user", "content": "hello"}]
    expected = model.tokenizer.apply_chat_template(messages, enable_thinking=False)
    assert model.apply_chat_template(messages) == expected
    open_ended = model.apply_chat_template([*messages, {"role": "assistant", "content": "It"}], False)
    assert open_ended.endswith("It")


def test_options_reach_the_generator(adapter, folder):
    model = adapter.HarnessModel(folder, compile=False, kv_cache_dtype="int8", batch_size="auto", prefix_token_id=5)
    try:
        options = model.generator.options
        assert (options.kv_cache_dtype, options.max_batch_size) == ("int8", adapter.AUTO_BATCH_SIZE)
        assert (options.max_seq_len, model.max_length) == (256, 254)  # all the model's positions
        assert model.prefix_token_id == 5
    finally:
        model.generator.close()


def test_a_model_without_a_tokenizer_is_refused(adapter, tmp_path):
    (tmp_path / "none").mkdir()
    bare = write_text_checkpoint(tmp_path / "bare", randomized(small_config()), tmp_path / "none")
    for source in ("random:0.6b", bare):
        with pytest.raises(ValueError, match=f"'{source}' has no tokenizer, which tasks need"):
            adapter.HarnessModel(source, compile=False)


def test_tasks_of_the_examples_run_in_the_harness():
    """Tiny knows these sums."""
    pytest.importorskip("lm_eval.api.model")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    adapter = importlib.import_module("qwen3fast.lm_eval")
    model = adapter.HarnessModel("tiny", compile=False, max_length=256, batch_size=4)
    options = {"task_manager": TaskManager(include_path=str(TASKS)), "apply_chat_template": True, "limit": 8}
    found = simple_evaluate(model, tasks=["sums_choice", "sums", "sums_text"], **options)["results"]
    model.generator.close()
    assert found["sums_choice"]["acc,none"] == 1 and found["sums"]["exact_match,none"] == 1
    assert found["sums_text"]["bits_per_byte,none"] > 0


def test_questions_of_the_examples_are_right():
    for line in (TASKS / "sums.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        a, b = (int(number) for number in row["question"].removeprefix("What is ").removesuffix("?").split(" + "))
        assert row["answer"] == str(a + b) == row["choices"][row["label"]] and len(set(row["choices"])) == 4


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "qwen3fast.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'qwen3fast\[eval\]'"):
        importlib.import_module("qwen3fast.lm_eval")
