"""GeneratorOptions and the other options of a Generator: each checked, none of them costing anybody else's request."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import randomized, small_config

from qwen3fast import Embedder, Generator, Reranker, SamplingParams
from qwen3fast.checks import VARIABLES
from qwen3fast.options import GeneratorOptions

NAN, INFINITY = float("nan"), float("inf")
NO_INTEGERS = (1.5, 2.0, "2", None, True, [2], NAN, np.float32(2), np.bool_(True), torch.tensor(2.0), object())
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def model():
    return randomized(small_config(eos_token_ids=()), seed=1)


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size", "max_queue"])
def test_sizes_must_be_integers_in_range(name):
    for bad in (*NO_INTEGERS, 0, -1, 2**31, 2**63, 10**30):
        with pytest.raises(ValueError, match=rf"{name} must be an integer from 1 to \d+, got"):
            GeneratorOptions(**{name: bad})
    for good in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        value = getattr(GeneratorOptions(**{name: good}), name)
        assert value == 2 and type(value) is int


@pytest.mark.parametrize("name", ["cuda_graphs", "prefix_reuse"])
def test_flags_must_be_bools(name):
    for bad in ("no", "", 0, 1, None, [], np.array([True])):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got"):
            GeneratorOptions(**{name: bad})
    assert getattr(GeneratorOptions(**{name: np.bool_(False)}), name) is False


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_of_the_environment_must_be_known(name, monkeypatch):
    monkeypatch.setenv(name, "no")
    with pytest.raises(ValueError, match=rf"{name} must be '\w+' or '\w+', or unset, got 'no'"):
        GeneratorOptions()
    for good in (*VARIABLES[name], ""):
        monkeypatch.setenv(name, good)
        GeneratorOptions()


def test_a_level_must_be_one_of_this_machine(monkeypatch):
    monkeypatch.setenv("QWEN3FAST_CPU_LEVEL", "avx9000")
    with pytest.raises(ValueError, match=r"QWEN3FAST_CPU_LEVEL must be native or a level .* got 'avx9000'"):
        GeneratorOptions(compile=False)


def test_compile_and_cache_dtype_must_be_known():
    for bad in ("always", 1, None, [], "True", torch.bfloat16):
        with pytest.raises(ValueError, match="compile must be True, False or 'auto', got"):
            GeneratorOptions(compile=bad)
        with pytest.raises(ValueError, match="kv_cache_dtype must be 'auto' or 'int8', got"):
            GeneratorOptions(kv_cache_dtype=bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is not supported; supported: auto, cpu, cuda"),
        ({"device": "mps"}, "device 'mps' is not supported; supported: auto, cpu, cuda"),
        ({"device": "xpu"}, "device 'xpu' is not supported; supported: auto, cpu, cuda"),
        ({"device": 5.5}, "device 5.5 is not supported"),
        ({"device": ""}, "device '' is not supported"),
        ({"dtype": "int3"}, "dtype 'int3' is not supported; supported: auto, bfloat16"),
        ({"dtype": torch.int8}, "dtype torch.int8 is not supported"),
        ({"dtype": []}, r"dtype \[\] is not supported"),
        ({"progress": "no"}, "progress must be True or False"),
        ({"check_weights": 1}, "check_weights must be True or False"),
        ({"quantization": 5}, "quantization must be a string, or None, got 5"),
        ({"quantization": []}, r"quantization must be a string, or None, got \[\]"),
        ({"quantization": "int5"}, "quantization='int5' is not supported"),
        ({"revision": 5}, "revision must be a string, or None, got 5"),
        ({"adapter": 5}, "adapter must be a path, or None, got int"),
        ({"tensor_parallel": 2}, "tensor_parallel must be True or False"),
        ({"max_seq_len": 10**6}, "max_seq_len 1000000 exceeds the model's max_position_embeddings"),
    ],
)
def test_bad_options_of_from_pretrained_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Generator.from_pretrained("tiny", **{"compile": False, **options})


@pytest.mark.parametrize("kind", [Generator, Embedder, Reranker])
def test_bad_sources_and_forms_are_named(kind):
    for source in (None, 5, b"tiny", ["tiny"]):
        with pytest.raises(ValueError, match="source must be a hub id or a path, got"):
            kind.from_pretrained(source)
    for options in ({"quantization": 8}, {"device": "tpu"}, {"dtype": 5}, {"check_weights": "no"}, {"threads": "2"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}.*{next(iter(options.values()))!r}"):
            kind.from_pretrained("tiny", **options)


def test_an_unknown_option_is_a_type_error(model):
    for make in (lambda: Generator(model, max_len=5), lambda: Generator.from_pretrained("tiny", max_len=5)):
        with pytest.raises(TypeError, match="max_len"):
            make()


def test_signatures_show_every_option():
    for function in (Generator, Generator.from_pretrained):
        parameters = inspect.signature(function).parameters
        for field in fields(GeneratorOptions):
            assert parameters[field.name].default == field.default
            assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert "options" not in parameters


def test_options_reach_the_engine(model):
    sizes = {"max_seq_len": np.int32(70), "max_batch_size": np.int64(3), "max_queue": np.int64(5)}
    with Generator(model, compile=False, **sizes) as generator:
        assert generator.options == GeneratorOptions(70, 3, compile=False, max_queue=5)
        assert (generator.max_seq_len, generator.stats.max_batch_size, generator.debug.admission.places) == (70, 3, 5)


def test_bad_arguments_cost_nobody_elses_request(model):
    with Generator(model, max_seq_len=200, max_batch_size=2, compile=False) as generator:
        expected = generator.generate([1, 2], GREEDY).token_ids
        other = generator.stream([1, 2], GREEDY)
        first = next(other)
        for bad in ("soon", -1, NAN, True, [1]):
            with pytest.raises(ValueError, match="timeout must be a number of seconds >= 0, or None"):
                generator.submit([1, 2], GREEDY, timeout=bad)
        for bad in ("no", 1, None):
            with pytest.raises(ValueError, match="use_cache must be True or False"):
                generator.generate([1, 2], GREEDY, use_cache=bad)
        for bad in ({"max_tokens": 2}, 5, "greedy"):
            with pytest.raises(ValueError, match="params must be a SamplingParams"):
                generator.generate([1, 2], bad)
        for call in (lambda: generator.generate([1], progress="no"), lambda: generator.warmup(progress=1)):
            with pytest.raises(ValueError, match="progress must be True or False"):
                call()
        handle = generator.submit([1, 2], GREEDY, timeout=10**400)
        assert handle.result(INFINITY).token_ids == expected
        with pytest.raises(ValueError, match="timeout must be a number of seconds"):
            handle.result("5")
        assert [*first.token_ids, *(token for chunk in other for token in chunk.token_ids)] == expected
