"""qwen3fast/reference.py, the one-file Qwen3, computes what the engine computes; it imports torch alone."""

import ast
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import assert_near, random_ids, randomized, small_config

from qwen3fast import Generator, ModelConfig, SamplingParams, load_model, reference

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = ["What is 17 + 25?", "Once upon a time", "a"]


@pytest.fixture(scope="module")
def tiny():
    """The shipped model in float32, and the reference with its weights."""
    engine_model = load_model("tiny", device="cpu", dtype="float32")
    model = reference.Qwen3(engine_model.config)
    model.load_state_dict(engine_model.state_dict())
    return engine_model, model


@torch.inference_mode()
def test_logits_equal_the_engines_model(tiny):
    engine_model, model = tiny
    token_BT = random_ids(2, 150, vocab_size=1024)
    assert_near(model(token_BT), engine_model(token_BT))


@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_on_random_weights(tied):
    engine_model = randomized(small_config(tie_word_embeddings=tied))
    model = reference.Qwen3(engine_model.config)
    model.load_state_dict(engine_model.state_dict())
    token_BT = random_ids(2, 40)
    assert_near(model(token_BT), engine_model(token_BT))


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 12]])
def test_a_cache_filled_in_any_chunks_gives_the_logits_without_it(tiny, chunks):
    _, model = tiny
    token_BT = random_ids(2, 20, vocab_size=1024)
    cache = model.new_cache(batch_size=2, max_seq_len=32)
    logits = torch.cat([model(part, cache) for part in token_BT.split(chunks, dim=1)], dim=1)
    assert_near(logits, model(token_BT))
    assert [layer.length for layer in cache] == [20] * 5


@pytest.fixture(scope="module")
def generated():
    """Prompt ids and greedy token ids by the engine, for each prompt."""
    with Generator.from_pretrained("tiny", dtype="float32", device="cpu", compile=False, max_seq_len=256) as generator:
        results = generator.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
        return [
            (generator.tokenizer.encode(prompt), result.token_ids)
            for prompt, result in zip(PROMPTS, results, strict=True)
        ]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_the_generators(tiny, generated, use_cache):
    engine_model, model = tiny
    for prompt_ids, expected in generated:
        assert reference.generate(model, prompt_ids, 24, engine_model.config.eos_token_ids, use_cache) == expected


def test_it_stops_at_a_stop_id_and_at_max_tokens(tiny):
    _, model = tiny
    free = reference.generate(model, [1, 2, 3], 5)
    assert len(free) == 5
    stop = free[2]
    assert reference.generate(model, [1, 2, 3], 5, stop_ids=(stop,)) == free[: free.index(stop) + 1]


def test_defaults_are_those_of_the_published_06b():
    published = ModelConfig.named("0.6b")
    for field in fields(reference.Config):
        assert getattr(reference.Config(), field.name) == getattr(published, field.name), field.name
    with torch.device("meta"):
        model = reference.Qwen3(reference.Config())
    assert sum(p.numel() for p in model.parameters()) == 596_049_920 == published.num_parameters


def test_it_is_short_and_imports_torch_alone():
    text = Path(reference.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_example_of_its_docstring_runs():
    lines = reference.__doc__.splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines[lines.index("    from qwen3fast import load_model") :])
    code = code.partition("\n\nSource:")[0]
    names = {}
    exec(compile(code, "reference.py", "exec"), names)
    assert names["model"].model.config.hidden_size == 192
