"""generation_config.json: what null, zero and odd values mean, as transformers' `generate` has it."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import pytest
import torch
from conftest import randomized, small_config

from qwen3fast import Generator, SamplingParams
from qwen3fast.checkpoint.source import TINY_FOLDER


def preset(**fields) -> SamplingParams:
    return SamplingParams.from_generation_config(fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingParams(0.0, 0, 1.0, 0.0, repetition_penalty=1.0)),
        ({"do_sample": None, "temperature": 0.5}, SamplingParams(0.0, 0, 1.0, 0.0, repetition_penalty=1.0)),
        ({"do_sample": False, "temperature": 0.0}, SamplingParams(0.0, 0, 1.0, 0.0, repetition_penalty=1.0)),
        ({"do_sample": True}, SamplingParams(1.0, 50, 1.0, 0.0, repetition_penalty=1.0)),
        (
            {"do_sample": True, **dict.fromkeys(["temperature", "top_k", "top_p", "min_p", "repetition_penalty"])},
            SamplingParams(1.0, 50, 1.0, 0.0, repetition_penalty=1.0),
        ),
        ({"do_sample": True, "top_k": 0, "min_p": 0}, SamplingParams(1.0, 0, 1.0, 0.0, repetition_penalty=1.0)),
        ({"do_sample": True, "top_p": 0.0}, SamplingParams(1.0, 1, 1.0, 0.0, repetition_penalty=1.0)),
        ({"max_new_tokens": 7}, SamplingParams(0.0, 0, 1.0, 0.0, repetition_penalty=1.0, max_tokens=7)),
        ({"max_new_tokens": None}, SamplingParams(0.0, 0, 1.0, 0.0, repetition_penalty=1.0)),
    ],
    ids=str,
)
def test_preset_means_what_transformers_makes_of_it(fields, expected):
    assert SamplingParams.from_generation_config(fields) == expected


BAD = [
    ({"do_sample": "yes"}, "do_sample must be true, false or null, got 'yes'"),
    ({"do_sample": True, "temperature": 0}, "temperature must be above 0 where do_sample is true"),
    ({"do_sample": True, "temperature": -1}, "temperature must be"),
    ({"do_sample": False, "temperature": "0.6"}, "temperature must be .*got '0.6'"),
    ({"temperature": math.nan}, "temperature must be"),
    ({"top_k": -1}, "top_k must be"),
    ({"top_k": [20]}, "top_k must be"),
    ({"top_p": 1.5}, "top_p must be"),
    ({"top_p": True}, "top_p must be"),
    ({"min_p": "0"}, "min_p must be"),
    ({"repetition_penalty": 0}, "repetition_penalty must be"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 to 2147483647, or None, got 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
    ({"max_new_tokens": "7"}, "max_new_tokens must be"),
    ({"eos_token_id": True}, "token ids must be"),
    ({"eos_token_id": [3, 10**30]}, "token ids must be"),
    ({"eos_token_id": {"a": 1}}, "token ids must be"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=str)
def test_bad_values_are_refused_naming_the_file(tmp_path, fields, message):
    shutil.copytree(TINY_FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}.*correct it, or delete the file"):
        Generator.from_pretrained(tmp_path, device="cpu", compile=False)


@pytest.mark.parametrize("fields", [fields for fields, _ in BAD if fields.get("do_sample") and "temperature" in fields])
def test_transformers_refuses_the_same_temperatures(fields):
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    with pytest.raises(ValueError, match="strictly positive float"):
        logits_process.TemperatureLogitsWarper(float(fields["temperature"]))


def test_transformers_has_the_same_defaults():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    ours = preset(do_sample=True)
    assert [getattr(ours, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")] == [
        defaults[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")
    ]
    kept = transformers.TopPLogitsWarper(0.0)(None, torch.tensor([[0.5, 2.0, 1.0]]))
    assert kept.isfinite().tolist() == [[False, True, False]]  # top_p of 0 keeps one token


@pytest.mark.parametrize(("asked", "expected"), [(None, 5), (3, 3), (9, 9)])
def test_max_new_tokens_is_the_default_of_max_tokens(asked, expected):
    model = randomized(small_config(eos_token_ids=()))
    with Generator(model, generation_config={"max_new_tokens": 5}, max_seq_len=64, compile=False) as generator:
        result = generator.generate([1, 2, 3], SamplingParams(max_tokens=asked))
    assert len(result.token_ids) == expected


def test_max_new_tokens_never_makes_a_prompt_too_long():
    model = randomized(small_config(eos_token_ids=()))
    with Generator(model, generation_config={"max_new_tokens": 2048}, max_seq_len=16, compile=False) as generator:
        assert len(generator.generate([1, 2, 3]).token_ids) == 13


@pytest.mark.parametrize("ids", [-1, [-1], [-1, 3]])
def test_negative_end_ids_are_no_tokens(ids):
    model = randomized(small_config(eos_token_ids=()))
    with Generator(model, generation_config={"eos_token_id": ids}, max_seq_len=16, compile=False) as generator:
        assert generator._builder._eos_ids == ({3} if ids == [-1, 3] else set())


def test_fields_that_are_not_supported_are_told_at_load():
    neutral = {"suppress_tokens": None, "num_beams": 1, "no_repeat_ngram_size": 0, "stop_strings": []}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset(**neutral)
    given = {"suppress_tokens": [1], "num_beams": 4, "min_new_tokens": 2, "stop_strings": ["a"]}
    model = randomized(small_config())
    with pytest.warns(UserWarning, match="suppress_tokens, stop_strings, min_new_tokens, num_beams of generation_conf"):
        Generator(model, generation_config=given, compile=False, max_seq_len=16).close()
