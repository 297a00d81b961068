"""Qwen3Guard-Gen and DeepSeek-R1-0528-Qwen3-8B: small checkpoints in their layouts against transformers.

What is particular in them: Qwen3Guard-Gen's template puts the conversation into one user message, asks about its last
role, and writes the beginning of the reply, with an empty reasoning, whether it is asked for or not. DeepSeek's has a
bos_token, turns without an end of their own, and reasoning that the model opens; its YaRN has `attn_factor`.
The templates are of the tests' own.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import assert_near
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.text.reasoning import ReasoningFormat
from qwen3fast.text.tokenizer import Tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 1040}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}

GUARD_TEMPLATE = """\
{%- set ns = namespace(last='', text='') -%}
{%- for message in messages -%}
{%- if message.role in ('user', 'assistant') -%}
{%- set ns.last = message.role -%}
{%- set ns.text = ns.text ~ message.role | upper ~ ': ' ~ message.content | trim ~ '\\n\\n' -%}
{%- endif -%}
{%- endfor -%}
<|im_start|>user
Rate the safety of the last {{ ns.last }} message.

<CONVERSATION>
{{ ns.text }}</CONVERSATION>

Answer with Safety: and Categories:{% if ns.last == 'assistant' %} and Refusal:{% endif %}.<|im_end|>
<|im_start|>assistant
{{ '<think>\n\n</think>\n\n' }}"""
DEEPSEEK_TEMPLATE = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set ns.system = ns.system + message['content'] -%}
{%- endfor -%}
{{- bos_token + ns.system -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{%- set content = message['content'] -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""
OPTIONS = {"device": "cpu", "dtype": "float32", "compile": False}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
ASKED = [{"role": "user", "content": "What is a fuse?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "It burns.\n"}]
FOLLOWED = [{"role": "system", "content": "Be short."}, *ANSWERED, {"role": "user", "content": "<b>Why?</b>"}]
CONVERSATIONS = pytest.mark.parametrize("messages", [ASKED, ANSWERED, FOLLOWED], ids=["asked", "answered", "followed"])


def write_model(folder, **config) -> Qwen3ForCausalLM:
    """A small model as transformers saves it."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "rope_theta": 1e6, **config})).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def guard(tmp_path, tokenizer_folder):
    """Qwen3Guard-Gen's layout: Qwen3's own tokenizer, and another template in a file of its own."""
    model = write_model(tmp_path, tie_word_embeddings=True, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tokenizer_folder / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(GUARD_TEMPLATE, encoding="utf-8")
    return model


@CONVERSATIONS
@pytest.mark.parametrize("add", [True, False])
def test_qwen3guard_renders_what_transformers_renders(guard, tmp_path, messages, add):
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
    assert ours.apply_chat_template(messages, add_generation_prompt=add) == text
    assert text.endswith("</think>\n\n") and ("Refusal" in text) == (messages is ANSWERED)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
    assert ours.apply_chat_template(messages, add_generation_prompt=add, tokenize=True) == ids


@CONVERSATIONS
def test_qwen3guard_replies_as_in_transformers_without_reasoning(guard, tmp_path, messages):
    with Generator.from_pretrained(tmp_path, max_seq_len=256, **OPTIONS) as generator:
        ids = generator.tokenizer.apply_chat_template(messages, tokenize=True)
        assert not ReasoningFormat(generator.tokenizer).may_begin(ids)
        reply = generator.chat(messages, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    with torch.no_grad():
        theirs = guard.generate(torch.tensor([ids]), **GREEDY)
    assert reply.token_ids == theirs[0, len(ids) :].tolist()
    assert reply.reasoning == ""


def deepseek_config(**changes):
    """The particular settings of DeepSeek-R1-0528-Qwen3-8B's config.json, for a short context."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **changes}
    return {"tie_word_embeddings": False, "max_position_embeddings": 128, "rope_scaling": yarn}


@pytest.fixture(params=[True, False], ids=["bos added", "bos not added"])
def deepseek(request, tmp_path, tokenizer_folder):
    """DeepSeek-R1-0528-Qwen3-8B's layout; tokenizer.json decides whether texts get the bos_token."""
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    names = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>")
    tokenizer.base.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if request.param:
        bos = (BOS, tokenizer.base.token_to_id(BOS))
        tokenizer.base.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    model = write_model(tmp_path, **deepseek_config(attention_factor=1.0), eos_token_id=tokenizer.base.token_to_id(EOS))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("rope_parameters", None)
    raw |= deepseek_config(attn_factor=0.8782488562869419) | {"rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokenizer.base.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": request.param, "bos_token": BOS}
    settings |= {"eos_token": {"content": EOS, "__type": "AddedToken"}, "pad_token": EOS, "unk_token": None}
    settings["chat_template"] = DEEPSEEK_TEMPLATE
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model


@CONVERSATIONS
def test_deepseek_renders_and_tokenizes_as_transformers_does(deepseek, tmp_path, messages):
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(messages) == text and text.startswith(BOS)
    assert ours.apply_chat_template(messages, tokenize=True) == ids
    assert ids.count(theirs.bos_token_id) == 1
    assert ours.encode_prompt("A fuse.") == theirs("A fuse.").input_ids
    assert ours.encode_prompt(text) == ids  # a prompt that was rendered before gets no second bos_token
    assert ours.decode(ids) == theirs.decode(ids)
    assert all(map(ours.is_special, theirs.all_special_ids))


def test_deepseek_gives_the_logits_of_transformers_with_yarn(deepseek, tmp_path):
    """transformers ignores `attn_factor`, which makes the factor of cosines and sines 1: it gets this factor."""
    ours = load_model(tmp_path, device="cpu", dtype="float32")
    token_BT = torch.randint(1028, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_near(ours(token_BT), deepseek(token_BT).logits)
    assert ours.config.longest_context == 128


def test_deepseek_replies_as_in_transformers(deepseek, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with Generator.from_pretrained(tmp_path, max_seq_len=128, **OPTIONS) as generator:
        chat = tokenizer.apply_chat_template(FOLLOWED, add_generation_prompt=True, return_dict=False)
        replies = [generator.chat(FOLLOWED, params).token_ids, generator.generate("A fuse.", params).token_ids]
        whole = generator.score("A fuse.", " burns")
        assert whole.token_ids == generator.tokenizer.encode(" burns")  # a continuation has nothing before it
    for ids, reply in zip((chat, tokenizer("A fuse.").input_ids), replies, strict=True):
        with torch.no_grad():
            assert reply == deepseek.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist()


def test_deepseek_reasons_between_tags_in_turns_of_its_own(deepseek, tmp_path):
    tokenizer = Tokenizer.from_folder(tmp_path)
    reasoning = ReasoningFormat(tokenizer)
    tracker = reasoning.tracker_after(tokenizer.apply_chat_template(FOLLOWED, tokenize=True))
    assert tracker.may_open and not tracker.is_open
    tracker.push(reasoning.begin_id)
    assert tracker.is_open
    closed, end = DEEPSEEK_TEMPLATE.rsplit("<｜Assistant｜>", 1)
    opened = f"{closed}<｜Assistant｜><think>\n{end}"
    ids = tokenizer.apply_chat_template(FOLLOWED, tokenize=True, chat_template=opened)
    assert reasoning.tracker_after(ids).is_open
