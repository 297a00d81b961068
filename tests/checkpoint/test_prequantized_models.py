"""Models whose weights others quantized: what they generate, saved again, adapted, as Embedder and Reranker."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import assert_near, small_config
from prequantized_layouts import AWQ, FP8, GPTQ, compressed, write_prequantized
from test_checkpoint import assert_same_weights
from test_lora import modules_of, write_adapter

from qwen3fast import Embedder, Generator, Reranker, SamplingParams, load_model
from qwen3fast.checkpoint.lora.merge import merge_lora
from qwen3fast.checkpoint.prequantized.levels import Levels
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli import main
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cpu
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.convert import formats_of, quantize_model

CONFIG = small_config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    head_dim=32,
    tie_word_embeddings=False,
    dtype=torch.bfloat16,
)
LAYOUTS = {
    "fp8": FP8,
    "compressed fp8": compressed("float-quantized", "channel"),
    "awq": AWQ,
    "gptq": GPTQ,
    "gptq8": {**GPTQ, "bits": 8},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
layouts = pytest.mark.parametrize("name", LAYOUTS)
needs_operation = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")


def assert_greedy(reference, token_ids: list[int], num_prompt: int, tolerance: float) -> None:
    """Each token after the prompt is the reference's choice, or next to it within a share of the logits' range."""
    logits_TV = reference(torch.tensor([token_ids]))[0, num_prompt - 1 : -1].float()
    chosen_T = logits_TV.gather(1, torch.tensor(token_ids[num_prompt:])[:, None])[:, 0]
    assert (logits_TV.amax(dim=1) - chosen_T).max() <= tolerance * logits_TV.abs().max()


@needs_operation
@layouts
@pytest.mark.parametrize("tied", [True, False])
def test_generation_takes_the_fast_path_and_follows_the_dequantized_model(tmp_path, tokenizer_folder, name, tied):
    config = replace(CONFIG, tie_word_embeddings=tied)
    reference = write_prequantized(tmp_path, config, LAYOUTS[name], tokenizer_folder=tokenizer_folder, files=2)
    with Generator.from_pretrained(tmp_path, device="cpu", compile=False, max_seq_len=64) as generator:
        cache = StaticKVCache(generator.config, 1, 32, torch.bfloat16, torch.device("cpu"))
        assert DecodeLayers(generator.model, cache).serves(1)
        prompt = generator.tokenizer.encode(PROMPT)
        result = generator.generate(prompt, GREEDY)
        assert len(result.token_ids) == 12
        assert_greedy(reference, [*prompt, *result.token_ids], len(prompt), tolerance=0.04)
        uncached = generator.generate(prompt, GREEDY, use_cache=False)
        assert_greedy(reference, [*prompt, *uncached.token_ids], len(prompt), tolerance=0.04)


def test_compiled_cached_and_uncached_give_the_same_tokens(tmp_path, tokenizer_folder, graphs):
    """With layers that are unlike each other; test_ordered.py has 4 bits."""
    write_prequantized(
        tmp_path, CONFIG, FP8, tokenizer_folder=tokenizer_folder, kept=("lm_head", "layers.1.mlp.down_proj")
    )
    options = {"device": "cpu", "dtype": "float32", "max_seq_len": 64}
    with Generator.from_pretrained(tmp_path, compile=False, **options) as generator:
        expected = generator.generate(PROMPT, GREEDY).token_ids
        assert expected == generator.generate(PROMPT, GREEDY, use_cache=False).token_ids
    with Generator.from_pretrained(tmp_path, compile=True, **options) as generator:
        assert generator.generate(PROMPT, GREEDY).token_ids == expected
        assert generator.stats.compilations == len(graphs) > 0


def test_float16_checkpoints_run(tmp_path, tokenizer_folder):
    reference = write_prequantized(
        tmp_path, replace(CONFIG, dtype=torch.float16), AWQ, tokenizer_folder=tokenizer_folder
    )
    with Generator.from_pretrained(tmp_path, device="cpu", compile=False, max_seq_len=64) as generator:
        assert generator.model.model.norm.weight.dtype == torch.float16
        prompt = generator.tokenizer.encode(PROMPT)
        ids = [*prompt, *generator.generate(prompt, GREEDY).token_ids]
        assert_greedy(reference, ids, len(prompt), tolerance=0.04)


@needs_operation
@pytest.mark.parametrize("kept", ["q_proj", "up_proj", "layers.1.mlp.down_proj"])
def test_blocks_of_unlike_layers_run(tmp_path, tokenizer_folder, kept):
    reference = write_prequantized(tmp_path, CONFIG, GPTQ, tokenizer_folder=tokenizer_folder, kept=("lm_head", kept))
    with Generator.from_pretrained(tmp_path, device="cpu", compile=False, max_seq_len=64) as generator:
        cache = StaticKVCache(generator.config, 1, 32, torch.bfloat16, torch.device("cpu"))
        # Layers with the same input must have one format for C++; a layer with an input of its own may be plain.
        assert DecodeLayers(generator.model, cache).serves(1) == kept.endswith("down_proj")
        prompt = generator.tokenizer.encode(PROMPT)
        ids = [*prompt, *generator.generate(prompt, GREEDY).token_ids]
        assert_greedy(reference, ids, len(prompt), tolerance=0.04)


@pytest.mark.parametrize(
    ("name", "kept", "tied", "changes"),
    [
        ("awq", ("lm_head",), True, {}),
        ("gptq", ("lm_head", "o_proj"), False, {}),
        ("fp8", ("lm_head", "o_proj"), True, {"hidden_size": 160}),
        ("fp8", ("lm_head",), False, EXPERTS),
        ("fp8", ("lm_head", "gate_proj", "up_proj", "down_proj"), False, EXPERTS),
        ("compressed fp8", ("lm_head",), True, {}),
        ("compressed fp8", ("lm_head",), False, EXPERTS),
    ],
)
def test_saved_model_loads_as_it_was(tmp_path, tokenizer_folder, name, kept, tied, changes, capsys):
    config = replace(CONFIG, tie_word_embeddings=tied, **changes)
    write_prequantized(tmp_path / "theirs", config, LAYOUTS[name], kept=kept, tokenizer_folder=tokenizer_folder)
    with Generator.from_pretrained(tmp_path / "theirs", device="cpu", compile=False, max_seq_len=64) as generator:
        generator.save_quantized(tmp_path / "ours")
        model = generator.model
    loaded = load_model(tmp_path / "ours", device="cpu")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    raw = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))
    assert raw["quantization_config"]["quant_method"] == "qwen3fast"
    assert "lm_head" in raw["quantization_config"]["modules_to_not_convert"]
    assert main(["info", "--model", str(tmp_path / "ours")]) == 0
    assert f"{model.num_bytes():,} bytes in {formats_of(model)[0]}, " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fp8", "compressed fp8"])
@pytest.mark.parametrize("head", ["fp8", "int8", "int4", "uint4"])
def test_saved_floats_beside_another_format_load_as_they_were(tmp_path, name, head):
    write_prequantized(tmp_path / "theirs", replace(CONFIG, tie_word_embeddings=True), LAYOUTS[name])
    model = load_model(tmp_path / "theirs", device="cpu")
    quantize_model(model, head, torch.bfloat16)  # the embedding, which is the output projection
    if (name, head) == ("compressed fp8", "int8"):
        with pytest.raises(ValueError, match="layers in fp8 and int8 cannot be saved: a file would not tell"):
            save_model(model, tmp_path / "ours")
        return
    save_model(model, tmp_path / "ours")
    loaded = load_model(tmp_path / "ours", device="cpu")
    formats = {n: m.format.name for n, m in model.named_modules() if hasattr(m, "format")}
    assert formats["lm_head"] == head and formats["model.layers.0.mlp.up_proj"] == "fp8"
    assert formats == {n: m.format.name for n, m in loaded.named_modules() if hasattr(m, "format")}
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("name", ["fp8", "compressed fp8"])
def test_experts_in_fp8_generate_what_the_dequantized_ones_do(tmp_path, tokenizer_folder, name):
    config = replace(CONFIG, **EXPERTS)
    reference = write_prequantized(tmp_path, config, LAYOUTS[name], tokenizer_folder=tokenizer_folder)
    with Generator.from_pretrained(tmp_path, device="cpu", compile=False, max_seq_len=64) as generator:
        assert formats_of(generator.model) == ["fp8"]
        prompt = generator.tokenizer.encode(PROMPT)
        ids = [*prompt, *generator.generate(prompt, GREEDY).token_ids]
        assert_greedy(reference, ids, len(prompt), tolerance=0.04)


def test_saved_model_whose_list_of_plain_modules_is_none_is_refused(tmp_path):
    write_prequantized(tmp_path / "theirs", CONFIG, GPTQ)
    save_model(load_model(tmp_path / "theirs", device="cpu"), tmp_path / "ours")
    file = tmp_path / "ours" / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["quantization_config"]["modules_to_not_convert"] = "lm_head"
    file.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match=r"quantization_config=.* is not supported by this version"):
        load_model(tmp_path / "ours", device="cpu")


@pytest.mark.parametrize(("name", "stored"), [("awq", "awq, 4 bits"), ("gptq", "gptq, 4 bits"), ("fp8", "fp8, one")])
def test_adapters_are_refused_for_weights_that_stay_rounded(tmp_path, name, stored):
    reference = write_prequantized(tmp_path / "model", CONFIG, LAYOUTS[name])
    write_adapter(tmp_path / "adapter", reference, modules_of(reference, ["q_proj"]))
    (tmp_path / "model" / "model.safetensors").unlink()  # before any weight is read
    with pytest.raises(ValueError, match=rf"an adapter needs .* \({stored}.*Use quantization='dequantize'"):
        load_model(tmp_path / "model", device="cpu", adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("fp8", "dequantize"),
        ("fp8", "fp8"),
        ("fp8", "int4"),
        ("awq", "dequantize"),
        ("gptq", "dequantize"),
        ("gptq", "int4"),
        ("gptq8", "int8"),
    ],
)
def test_adapters_are_merged_into_dequantized_weights_and_rounded_afterwards(tmp_path, name, quantization):
    reference = write_prequantized(tmp_path / "model", CONFIG, LAYOUTS[name])
    write_adapter(tmp_path / "adapter", reference, modules_of(reference, ["q_proj", "down_proj"]))
    options = {"device": "cpu", "dtype": "float32", "quantization": quantization}
    model = load_model(tmp_path / "model", adapter=tmp_path / "adapter", **options)
    expected = load_model(tmp_path / "model", device="cpu", dtype="float32", quantization="dequantize")
    merge_lora(expected, tmp_path / "adapter")
    if quantization != "dequantize":
        quantize_model(expected, quantization, torch.float32)
    assert model.config == expected.config
    assert_same_weights(model, expected)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantize_takes_floats_but_quantizes_them_once(tmp_path, tokenizer_folder, capsys, quantization):
    write_prequantized(tmp_path / "theirs", CONFIG, FP8, tokenizer_folder=tokenizer_folder)
    options = ["--quantization", quantization, "--device", "cpu", "--output", str(tmp_path / "ours")]
    status = main(["quantize", "--model", str(tmp_path / "theirs"), *options])
    if quantization == "fp8":
        assert status == 2 and "is quantized already (fp8)" in capsys.readouterr().err
        return
    assert status == 0
    expected = load_model(tmp_path / "theirs", device="cpu", quantization="dequantize")
    quantize_model(expected, quantization, torch.bfloat16)
    assert_same_weights(load_model(tmp_path / "ours", device="cpu"), expected)


@pytest.mark.parametrize("name", ["fp8", "gptq"])
def test_embedder_reads_checkpoints_without_the_prefix(tmp_path, tokenizer_folder, name):
    config = replace(CONFIG, tie_word_embeddings=True, dtype=torch.float32)
    options = {"prefix": "", "files": 2, "tokenizer_folder": tokenizer_folder}
    reference = write_prequantized(tmp_path, config, LAYOUTS[name], **options)
    embedder = Embedder.from_pretrained(tmp_path, device="cpu", quantization="dequantize")
    assert_near(embedder.encode("A cat sat."), Embedder(reference, embedder.tokenizer).encode("A cat sat."))
    small = Embedder.from_pretrained(tmp_path, device="cpu").encode("A cat sat.")
    assert (small * embedder.encode("A cat sat.")).sum() > 0.99


@layouts
def test_embedder_leaves_the_output_projection_out(tmp_path, tokenizer_folder, name):
    write_prequantized(tmp_path, CONFIG, LAYOUTS[name], kept=(), tokenizer_folder=tokenizer_folder)
    assert Embedder.from_pretrained(tmp_path, device="cpu").model.lm_head is None


@pytest.mark.parametrize("kept", [("lm_head",), ()])
def test_reranker_reads_a_plain_and_a_quantized_output_projection(tmp_path, yes_no_folder, kept):
    config = replace(CONFIG, vocab_size=1040, max_position_embeddings=512, dtype=torch.float32)
    reference = write_prequantized(tmp_path, config, GPTQ, kept=kept, tokenizer_folder=yes_no_folder)
    reranker = Reranker.from_pretrained(tmp_path, device="cpu")
    assert hasattr(reranker.model.lm_head, "weight") == bool(kept)
    expected = Reranker(reference, reranker.tokenizer).score("Where?", ["Paris.", "x"])
    assert reranker.score("Where?", ["Paris.", "x"]) == pytest.approx(expected, abs=0.05)


def test_command_line_dequantizes(tmp_path, tokenizer_folder, capsys, opened):
    write_prequantized(tmp_path, CONFIG, AWQ, tokenizer_folder=tokenizer_folder)
    options = ["--quantization", "dequantize", "--temperature", "0", "--max-tokens", "3", "--compile", "never"]
    assert main(["generate", "Hello", "--raw", "--model", str(tmp_path), "--max-seq-len", "64", *options]) == 0
    assert capsys.readouterr().out.strip()
    assert [formats_of(generator.model) for generator in opened] == [[]]


def test_loading_holds_some_rows_at_a_time_in_plain_numbers(tmp_path, monkeypatch):
    write_prequantized(tmp_path, CONFIG, {**GPTQ, "bits": 8, "group_size": 64})
    sizes = []
    weight = Levels.weight

    def noted(levels: Levels) -> torch.Tensor:
        sizes.append(weight(levels).shape)
        return weight(levels)

    monkeypatch.setattr("qwen3fast.quantization.formats.WEIGHTS_AT_ONCE", 32 * 128)
    monkeypatch.setattr(Levels, "weight", noted)
    load_model(tmp_path, device="cpu")
    assert {(32, 128), (16, 256)} == set(sizes)
