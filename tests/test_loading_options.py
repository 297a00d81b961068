"""Options of from_pretrained in place of a checkpoint's own files: chat template and sampling preset."""

import json
import shutil

import pytest

from qwen3fast import Generator, SamplingParams
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
TEMPLATE = "{{ messages[0].content }} It is"
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def open_tiny(**options):
    return Generator.from_pretrained("tiny", device="cpu", compile=False, **options)


@pytest.mark.parametrize("is_file", [True, False])
def test_a_chat_template_takes_the_place_of_the_checkpoints(tmp_path, is_file):
    file = tmp_path / "other.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    with open_tiny(chat_template=file if is_file else TEMPLATE) as generator:
        expected = "What is 17 + 25? It is"
        assert generator.tokenizer.apply_chat_template(QUESTION) == expected
        assert generator.chat(QUESTION, GREEDY).token_ids == generator.generate(expected, GREEDY).token_ids


def test_a_chat_template_that_is_not_there_is_refused_before_weights_are_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file 'missing\.jinja'; chat_template takes"):
        open_tiny(chat_template="missing.jinja")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff{{")
    with pytest.raises(ValueError, match=r"bytes\.jinja is not text in UTF-8"):
        open_tiny(chat_template=tmp_path / "bytes.jinja")
    with pytest.raises(ValueError, match=r"chat_template needs a tokenizer, which random:0\.6b does not"):
        Generator.from_pretrained("random:0.6b", chat_template=TEMPLATE)


def test_fields_of_the_sampling_preset_are_replaced():
    with open_tiny(generation_config={"temperature": 1.5, "max_new_tokens": 7}) as generator:
        own = generator.default_params
        assert (own.temperature, own.top_p, own.top_k, own.max_tokens) == (1.5, 0.95, 20, 7)
        given = generator.generate("a", SamplingParams(seed=1)).token_ids
        assert given == generator.generate("a", SamplingParams(seed=1, temperature=1.5, max_tokens=7)).token_ids
    with open_tiny(generation_config={"temperature": 0}) as generator:
        assert generator.default_params.temperature == 0
    with open_tiny(generation_config={"do_sample": False}) as generator:
        assert generator.default_params.temperature == 0


def test_a_preset_with_a_temperature_samples_where_the_checkpoint_has_none(tmp_path):
    with open_tiny(generation_config={"top_k": 3, "eos_token_id": 5}) as generator:
        assert (generator.default_params.temperature, generator.default_params.top_k) == (0.6, 3)
        reply = generator.generate("a", SamplingParams(temperature=0, max_tokens=30, logit_bias={5: 1e6}))
        assert reply.token_ids == [5] and reply.finish_reason == "stop"
    folder = tmp_path / "tiny"
    shutil.copytree(TINY_FOLDER, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    for own, temperature in ((None, 0), ({"top_k": 3}, 0), ({"temperature": 0.7}, 0.7)):
        with Generator.from_pretrained(folder, device="cpu", compile=False, generation_config=own) as generator:
            assert generator.default_params.temperature == temperature


@pytest.mark.parametrize(
    ("preset", "error"),
    [
        ({"temperature": -1}, "generation_config: temperature must be a number from 0"),
        ({"top_p": 2}, "generation_config: top_p must be a number"),
        ({"eos_token_id": "a"}, "generation_config: token ids must be a number"),
        ({"do_sample": 1}, "generation_config: do_sample must be true, false or null"),
    ],
)
def test_a_preset_that_no_request_may_have_is_refused_before_weights_are_read(preset, error):
    with pytest.raises(ValueError, match=error):
        Generator.from_pretrained("random:235b-a22b", generation_config=preset)


def test_a_preset_must_be_a_dict():
    with pytest.raises(TypeError, match="generation_config must be a dict"):
        open_tiny(generation_config=["temperature"])


def test_the_command_line_takes_both(tmp_path, capsys):
    (tmp_path / "other.jinja").write_text("The capital of France is", encoding="utf-8")
    command = ["generate", "?", "--compile", "never", "--chat-template", str(tmp_path / "other.jinja")]
    preset = json.dumps({"temperature": 0, "max_new_tokens": 2})
    assert main([*command, "--override-generation-config", preset]) == 0
    assert capsys.readouterr().out.startswith(" Paris")
    with pytest.raises(SystemExit):
        main([*command, "--override-generation-config", "{"])
    assert "--override-generation-config: expected a JSON object" in capsys.readouterr().err
