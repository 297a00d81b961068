"""SamplingParams: what is refused, what the checkpoint's preset fills in, and that new fields change nothing."""

import copy
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch

import qwen3fast
from qwen3fast.sampling_params import OTHER_NAMES, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 2**63),
        ("top_k", "20"),
        ("top_k", 2.5),
        ("top_k", math.inf),
        ("top_k", math.nan),
        ("top_p", 0.0),
        ("top_p", 1e-40),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("max_tokens", math.inf),
        ("max_tokens", True),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", "1"),
        ("stop", ""),
        ("stop", 5),
        ("stop", {"a": "b"}),
        ("stop", b"a"),
        ("stop", ("a", 1)),
        pytest.param("stop", ["a"] * 1025, id="stop-too many"),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", "5"),
        ("ignore_eos", "no"),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", True),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("presence_penalty", None),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", "1"),
        ("frequency_penalty", None),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {3: 1e39}),  # infinite in float32
        ("logit_bias", {3: None}),
        ("logit_bias", {3: True}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", [3]),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", [1.0]),
        ("allowed_token_ids", [True]),
        ("allowed_token_ids", "12"),
        ("allowed_token_ids", 12),
        ("allowed_token_ids", iter([1])),
        ("allowed_token_ids", torch.tensor([1.5])),
        ("allowed_token_ids", torch.tensor(3)),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", 0.5),
        ("logprobs", True),
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("n", None),
        ("logits_processor", 3),
        ("json_schema", "no json"),
        ("json_schema", "[]"),
        ("json_schema", ""),
        pytest.param("json_schema", "[" * 100_000, id="json_schema-nested too deeply"),
        ("json_schema", True),
        ("regex", ""),
        ("grammar", ""),
        ("grammar", 5),
        ("regex", re.compile("a")),
        ("thinking_budget", -1),
        ("thinking_budget", 1.5),
    ],
)
def test_sampling_params_refuse_bad_values(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {re.escape(repr(value)[:200])}$"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "place"), [("stop", "stop[1]"), ("regex", "regex"), ("json_schema", "json_schema")])
def test_sampling_params_refuse_lone_surrogates_naming_the_place(field, place):
    value = {"stop": ["a", "b\ud83d"], "regex": "b\ud83d", "json_schema": '{"a": "\ud83d"}'}[field]
    with pytest.raises(ValueError, match=rf"^{re.escape(place)} holds the lone surrogate '\\ud83d' at character \d"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"const": "\ud800"}, r"json_schema\['const'\] holds the lone surrogate"),
        ({"enum": [{1, 2}]}, r"json_schema\['enum'\]\[0\] must be text, a number, a list or a dict, got set"),
    ],
)
def test_sampling_params_refuse_schemas_that_are_no_json_naming_the_place(schema, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(json_schema=schema)


def test_sampling_params_refuse_two_constraints():
    with pytest.raises(ValueError, match=r"^json_schema must be None where regex .* got json_schema={} and "):
        SamplingParams(json_schema={}, regex="a")
    with pytest.raises(ValueError, match=r"^regex must be None where grammar .* got regex='a' and grammar='b'"):
        SamplingParams(regex="a", grammar="b")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", 0),
        ("seed", -(2**63)),
        ("repetition_penalty", 1e-3),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("logit_bias", {}),
        ("logit_bias", {0: -math.inf, 151_935: 100, 7: -1e300}),
        ("logprobs", 0),
        ("logprobs", 20),
        ("n", 128),
        ("json_schema", {}),
        ("json_schema", '{"type": "object"}'),
        ("regex", r"\d+"),
        ("thinking_budget", 0),
        ("logits_processor", torch.add),
    ],
)
def test_sampling_params_keep_good_values(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


COLLECTIONS = [{5}, [5], (5,), range(5, 6), frozenset([5]), {5: 1.0}.keys(), np.array([5]), torch.tensor([5])]


@pytest.mark.parametrize("field", ["allowed_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("ids", COLLECTIONS, ids=lambda ids: type(ids).__name__)
def test_sampling_params_take_any_collection_of_token_ids(field, ids):
    taken = getattr(SamplingParams(**{field: ids}), field)
    assert taken == (5,) and type(taken[0]) is int


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", np.float32(0.5)),
        ("top_k", np.int64(3)),
        ("top_p", np.float64(0.5)),
        ("max_tokens", np.uint8(3)),
        ("seed", torch.tensor(3)),
        ("ignore_eos", np.True_),
    ],
)
def test_sampling_params_turn_numbers_of_other_libraries_into_pythons(field, value):
    taken = getattr(SamplingParams(**{field: value}), field)
    assert taken == value.item() and type(taken) is type(value.item())


def test_sampling_params_none_stops_nothing():
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stop, params.stop_token_ids) == ((), ())


@pytest.mark.parametrize("field", ["top_k", "max_tokens", "seed", "logprobs", "n", "thinking_budget"])
def test_sampling_params_turn_whole_numbers_into_integers(field):
    assert type(getattr(SamplingParams(**{field: 3.0}), field)) is int


def test_sampling_params_do_not_change_with_the_dict_they_were_given():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = math.nan
    assert params.logit_bias == {3: 1.0}


def test_sampling_params_new_fields_change_nothing_by_default():
    params = SamplingParams().with_defaults(SamplingParams.from_generation_config({}))
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty, params.n) == (1, 0, 0, 1)
    none = ["logit_bias", "allowed_token_ids", "logprobs", "logits_processor", "json_schema", "regex", "grammar"]
    assert [getattr(params, name) for name in [*none, "thinking_budget"]] == [None] * 8


def test_sampling_params_take_the_preset_where_unset():
    preset = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
    }
    default = SamplingParams.from_generation_config(preset)
    taken = SamplingParams(top_k=5, presence_penalty=1.5).with_defaults(default)
    assert taken == SamplingParams(0.6, 5, 0.95, 0.1, repetition_penalty=1.05, presence_penalty=1.5)
    assert SamplingParams(repetition_penalty=1.0).with_defaults(default).repetition_penalty == 1.0


def test_sampling_params_are_greedy_unless_the_preset_samples():
    preset = {"temperature": 0.6, "repetition_penalty": None}
    assert SamplingParams.from_generation_config(preset) == SamplingParams(0.0, 0, 1.0, 0.0, repetition_penalty=1.0)


@pytest.mark.parametrize(("name", "ours"), OTHER_NAMES.items())
def test_sampling_params_tell_their_name_of_what_is_called_otherwise_elsewhere(name, ours):
    with pytest.raises(TypeError, match=rf"^SamplingParams\(\) takes no keyword {name}; pass SamplingParams\({ours}="):
        SamplingParams(**{name: 1})
    assert ours in inspect.signature(SamplingParams).parameters


def test_sampling_params_are_plain_values():
    params = SamplingParams(temperature=0.5, stop="a", allowed_token_ids=[1], n=2)
    assert hash(params) == hash(copy.deepcopy(params)) and pickle.loads(pickle.dumps(params)) == params


def test_sampling_params_are_a_public_name():
    assert qwen3fast.SamplingParams is SamplingParams
