"""The argument rope_scaling: another scaling of RoPE than the checkpoint's."""

import json
import shutil

import pytest
import torch

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main
from qwen3fast.model.yarn import Yarn

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(1, 400))


@pytest.fixture(scope="module")
def scaled_folder(tmp_path_factory):
    """The tiny checkpoint with YARN in its config.json."""
    folder = tmp_path_factory.mktemp("scaled") / "tiny"
    shutil.copytree(TINY_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": YARN}))
    return folder


def logits_of(model):
    return model(torch.tensor([PROMPT]))[0]


def test_it_gives_the_logits_of_a_checkpoint_with_the_same_scaling(scaled_folder):
    plain = load_model("tiny", "cpu", "float32")
    expected = load_model(scaled_folder, "cpu", "float32")
    model = load_model("tiny", "cpu", "float32", rope_scaling=YARN)
    assert model.config == expected.config and model.config.yarn == Yarn(4.0, 1024)
    assert torch.equal(logits_of(model), logits_of(expected))
    assert not torch.allclose(logits_of(model), logits_of(plain), atol=1e-2)


def test_the_default_type_removes_a_checkpoints_scaling(scaled_folder):
    model = load_model(scaled_folder, "cpu", "float32", rope_scaling={"rope_type": "default"})
    assert torch.equal(logits_of(model), logits_of(load_model("tiny", "cpu", "float32")))


def test_rope_theta_among_the_settings_counts():
    model = load_model("tiny", "cpu", rope_scaling={"rope_type": "default", "rope_theta": 5e6})
    assert (model.config.rope_theta, model.config.yarn) == (5e6, None)


@pytest.mark.parametrize("compile", [True, False])
def test_a_generator_runs_with_it_beyond_the_models_positions(scaled_folder, compile):
    options = {"device": "cpu", "max_seq_len": 4097, "compile": compile}
    with pytest.raises(ValueError, match=r"max_seq_len 4097 exceeds .* 4096; .* rope_scaling \(--rope-scaling\)"):
        Generator.from_pretrained("tiny", **options)
    longer = {**YARN, "original_max_position_embeddings": 2048}
    with Generator.from_pretrained("tiny", rope_scaling=longer, **options) as generator:
        assert generator.config.longest_context == 8192
        assert len(generator.generate(PROMPT * 10, GREEDY).token_ids) == 8
    with (
        Generator.from_pretrained("tiny", rope_scaling=YARN, device="cpu", compile=compile) as generator,
        Generator.from_pretrained(scaled_folder, device="cpu", compile=compile) as expected,
    ):
        assert generator.generate(PROMPT, GREEDY).token_ids == expected.generate(PROMPT, GREEDY).token_ids


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"rope_type": "yarn"}, "YaRN: missing factor"),
        ({"rope_type": "linear", "factor": 2.0}, "RoPE scaling 'linear' is not supported"),
        ({**YARN, "factr": 1}, "YaRN: factr is not supported"),
        ({**YARN, "rope_theta": -1}, "rope_theta must be a positive number"),
        ("yarn", "rope_scaling must be an object, got 'yarn'"),
    ],
)
@pytest.mark.parametrize("load", [load_model, Generator.from_pretrained])
def test_settings_are_refused_before_weights_are_read(tmp_path, load, settings, error):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_FOLDER / name, tmp_path)
    with pytest.raises(ValueError, match=error):
        load(tmp_path, device="cpu", rope_scaling=settings)


def test_saved_checkpoints_keep_it(tmp_path):
    options = {"device": "cpu", "compile": False, "quantization": "int8"}
    with Generator.from_pretrained("tiny", rope_scaling=YARN, **options) as generator:
        generator.save_quantized(tmp_path / "saved")
    assert load_model(tmp_path / "saved", "cpu").config.yarn == Yarn(4.0, 1024)


def test_the_command_line_takes_json(capsys):
    command = ["generate", "What is 17 + 25?", "--compile", "never", "--max-tokens", "2", "--max-seq-len", "4097"]
    assert main([*command, "--rope-scaling", json.dumps({**YARN, "original_max_position_embeddings": 2048})]) == 0
    assert capsys.readouterr().out
    assert main(command) == 2
    assert "rope_scaling" in capsys.readouterr().err
    for text in ("yarn", "[1]"):
        with pytest.raises(SystemExit) as exit:
            main([*command, "--rope-scaling", text])
        assert exit.value.code == 2
        assert "--rope-scaling: expected a JSON object" in capsys.readouterr().err
