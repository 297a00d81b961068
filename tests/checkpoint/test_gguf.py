"""GGUF files: weights, config and tokenizer as llama.cpp's own package defines them; broken files are refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from conftest import assert_near, assert_same, random_ids, random_tensor, randomized, small_config
from gguf_files import YARN, add_yarn, decode, gguf_tensors, write_gguf
from test_cpu_ops import run_layers, run_layers_plainly
from test_lora import modules_of, write_adapter

from qwen3fast import Embedder, Generator, SamplingParams, load_model
from qwen3fast.checkpoint.gguf.config import config_of
from qwen3fast.checkpoint.gguf.header import read_header
from qwen3fast.checkpoint.gguf.layout import choose_formats
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.metadata import read_config, read_generation_config
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cpu
from qwen3fast.model import Block, Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.model.linears import linears
from qwen3fast.quantization.convert import formats_of
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import FORMATS, Packed, quantize
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qwen3fast.quantization.uint4 import Layout
from qwen3fast.text.tokenizer import Tokenizer

# Rows of 256 numbers, which the K-types come in.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


def layers_by_gguf_name(model: Qwen3) -> dict[str, torch.Tensor]:
    """The weight that each layer computes with, be it packed or plain, in float32."""
    plain = randomized(model.config)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.dequantize()
        elif isinstance(module, QuantizedEmbedding):
            ids = torch.arange(plain.config.vocab_size)
            plain.get_submodule(name).weight.data = module.format.rows(
                Packed(module.weight_packed, module.weight_scale), ids
            )
        elif isinstance(getattr(module, "weight", None), torch.Tensor):
            plain.get_submodule(name).weight.data = module.weight.float()
    return gguf_tensors(plain)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in F32."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, load_model("tiny", "cpu", "float32"), tokenizer_folder=TINY_FOLDER)
    return file


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("tied", [True, False])
def test_floats_load_as_they_are(tmp_path, tied):
    model = randomized(small_config(tie_word_embeddings=tied))
    write_gguf(tmp_path / "model.gguf", model)
    loaded = load_model(tmp_path / "model.gguf", "cpu")
    expected = replace(model.config, rms_norm_eps=loaded.config.rms_norm_eps, eos_token_ids=())
    assert loaded.config == expected  # float32 has another 1e-6
    assert loaded.config.rms_norm_eps == pytest.approx(1e-6)
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)
    ids = random_ids(2, 9)
    assert_near(loaded(ids), model(ids))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_keep_their_dtype_and_are_the_mapped_pages(tmp_path, kind):
    model = randomized(small_config())
    file = tmp_path / "model.gguf"
    written = write_gguf(file, model, kind)
    before = file.read_bytes()
    loaded = load_model(file, "cpu")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert loaded.config.dtype == dtype and {p.dtype for p in loaded.parameters()} == {dtype}
    tensors = gguf_tensors(loaded)
    for name, (data, stored) in written.items():
        assert_same(tensors[name].float(), decode(data, stored).to(dtype).float())
    start = {t.name: t.data_offset for t in gguf.GGUFReader(file).tensors}
    first, second = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
    assert tensors[second].data_ptr() - tensors[first].data_ptr() == start[second] - start[first]
    with torch.no_grad():
        loaded.model.layers[0].self_attn.q_proj.weight.zero_()
    assert file.read_bytes() == before


KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_the_numbers_that_gguf_defines(tmp_path, kind):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(small_config(**SIZES)), kind)
    loaded = load_model(file, "cpu", "float32", quantization="dequantize")
    assert not formats_of(loaded) and loaded.config.dtype == torch.bfloat16
    for name, tensor in gguf_tensors(loaded).items():
        assert_same(tensor, decode(*written[name]))


def test_logits_are_those_of_the_dequantized_weights(tmp_path):
    file = tmp_path / "model.gguf"
    model = randomized(small_config(**SIZES, tie_word_embeddings=False))
    written = write_gguf(file, model, "Q4_K")
    reference = randomized(model.config)
    for name, tensor in gguf_tensors(reference).items():
        tensor.copy_(decode(*written[name]))
    ids = random_ids(2, 9, vocab_size=96)
    assert_near(load_model(file, "cpu", "float32", quantization="dequantize")(ids), reference(ids))


def test_q4_0_keeps_its_levels_and_rounds_its_scales(tmp_path):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(small_config(**SIZES)), "Q4_0")
    loaded = load_model(file, "cpu")
    assert formats_of(loaded) == ["int4"]
    assert {module.format.name for module in loaded.modules() if isinstance(module, QuantizedLinear)} == {"int4"}
    ours = layers_by_gguf_name(loaded)
    for name, (data, kind) in written.items():
        if kind == "Q4_0":
            exact = decode(data, kind)
            assert ((ours[name] - exact).abs() <= exact.abs() * 2**-8).all()
            scales = torch.from_numpy(data.reshape(len(data), -1, 18)[..., :2].copy()).view(torch.float16).float()
            levels = (exact.view(*scales.shape[:2], 32) / scales).round()
            assert_same(ours[name].view_as(levels), levels * scales.bfloat16().float())


@pytest.mark.parametrize(
    ("kind", "quantization", "layout"),
    [
        ("Q4_K", None, Layout(256, is_short=True)),
        ("Q4_1", None, Layout(32)),
        ("Q4_0", "uint4", Layout(32, has_zero=True)),
    ],
)
def test_levels_and_minimums_of_4_bits_are_kept_exactly(tmp_path, kind, quantization, layout):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(small_config(**SIZES, tie_word_embeddings=False)), kind)
    with torch.device("meta"):  # an application's default device
        loaded = load_model(file, "cpu", quantization=quantization)
    assert formats_of(loaded) == ["uint4"]
    for layer in loaded.modules():
        if isinstance(layer, QuantizedLinear):
            assert Layout.of(Packed(layer.weight_packed, layer.weight_scale)) == layout
    for name, ours in layers_by_gguf_name(loaded).items():
        if ours.dim() == 2:
            assert_same(ours, decode(*written[name]))  # bit for bit


@pytest.mark.parametrize("num_experts", [0, 4])
def test_language_model_of_qwen3_vl_is_loaded_as_qwen3(tmp_path, num_experts):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    model = randomized(small_config(**SIZES, **(experts if num_experts else {})))
    name = "qwen3vlmoe" if num_experts else "qwen3vl"

    def add_vision(writer):
        writer.add_rope_dimension_sections([4, 2, 2, 0])
        writer.add_uint32(f"{name}.n_deepstack_layers", 3)

    write_gguf(tmp_path / "model.gguf", model, architecture=name, change=add_vision)
    loaded, tokens = load_model(tmp_path / "model.gguf", "cpu"), random_ids(1, 9, vocab_size=96)
    assert_near(loaded(tokens), model(tokens))


@pytest.mark.parametrize("kind", ["F32", "Q4_K", "Q6_K"])
def test_info_states_the_bytes_that_experts_take(tmp_path, capsys, kind):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES, **experts)), kind)
    assert main(["info", "--model", str(tmp_path / "model.gguf")]) == 0
    assert f"{load_model(tmp_path / 'model.gguf', 'cpu').num_bytes():,} bytes" in capsys.readouterr().out


def test_the_part_that_reads_images_is_refused_with_what_to_load(tmp_path):
    write_gguf(tmp_path / "mmproj.gguf", randomized(small_config(**SIZES)), architecture="clip")
    with pytest.raises(ValueError, match="'clip' is not supported; it reads images: load the language model's file"):
        load_model(tmp_path / "mmproj.gguf", "cpu")


@pytest.mark.parametrize(
    ("kind", "format", "more_bits"),
    [
        ("Q5_K", "uint5", 0), ("Q6_K", "int6", 0), ("Q5_0", "uint5", 0.25), ("Q5_1", "uint5", 0.5),
        ("IQ4_NL", "nl4", 0), ("IQ4_XS", "nl4", 0.0625),
    ],
)  # fmt: skip
def test_types_for_cpus_are_kept_exactly(tmp_path, kind, format, more_bits):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(small_config(**SIZES, tie_word_embeddings=False)), kind)
    with torch.device("meta"):  # an application's default device
        loaded = load_model(file, "cpu")
    assert formats_of(loaded) == [format]
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    packed = sum(t.nbytes for layer in layers.values() for t in (layer.weight_packed, layer.weight_scale))
    stored = {name: data for name, (data, stored_as) in written.items() if stored_as == kind}
    assert len(stored) == len(layers)
    numbers = sum(layer.weight_packed.numel() * 8 // layer.format.bits for layer in layers.values())
    assert packed == sum(data.nbytes for data in stored.values()) + more_bits * numbers / 8
    for name, ours in layers_by_gguf_name(loaded).items():
        if ours.dim() == 2:
            assert_same(ours, decode(*written[name]))  # bit for bit


@pytest.mark.parametrize("kind", ["Q8_0", "Q3_K"])
def test_other_types_become_int8_within_half_a_step(tmp_path, kind):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(small_config(**SIZES, tie_word_embeddings=False)), kind)
    loaded = load_model(file, "cpu")
    assert formats_of(loaded) == ["int8"]
    for name, ours in layers_by_gguf_name(loaded).items():
        exact = decode(*written[name])
        if exact.dim() == 2:
            step = exact.abs().amax(dim=1, keepdim=True) / 127
            assert ((ours - exact).abs() <= step * 0.501).all()


@pytest.mark.parametrize("name", ["int8", "int4", "uint4"])
def test_quantization_of_gguf_weights_equals_quantizing_the_dequantized_ones(tmp_path, name):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(small_config(**SIZES)), "Q6_K")
    loaded = load_model(file, "cpu", quantization=name)
    assert formats_of(loaded) == [name]
    ours = layers_by_gguf_name(loaded)
    for tensor, (data, kind) in written.items():
        if kind == "Q6_K":
            expected = quantize(decode(data, kind), FORMATS[name])
            assert_same(ours[tensor], FORMATS[name].dequantize(expected))


# --------------------------------------------------------------------------------------------------------- mixtures


def mixed(name: str) -> str:
    """As llama-quantize mixes types: more bits for the embedding, and for some layers of some blocks."""
    if name == "token_embd.weight":
        return "Q6_K"
    return "Q8_0" if name in ("blk.0.ffn_down.weight", "blk.1.attn_v.weight") else "Q4_0"


def test_a_mixture_keeps_each_layer_in_its_form(tmp_path):
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES)), mixed)
    loaded = load_model(tmp_path / "model.gguf", "cpu")
    found = {n: m.format.name for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)}
    first, second = ({n[15:]: f for n, f in found.items() if n.startswith(f"model.layers.{i}.")} for i in (0, 1))
    assert first.pop("mlp.down_proj") == "int8" and set(first.values()) == {"int4"}
    # Layers that read the same input may have different formats.
    assert second.pop("self_attn.v_proj") == "int8" and set(second.values()) == {"int4"}
    assert found["model.embed_tokens"] == found["lm_head"] == "int6"
    assert formats_of(loaded) == ["int4", "int6", "int8"]
    assert loaded.model.embed_tokens.weight_packed is loaded.lm_head.weight_packed


@pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")
def test_a_mixture_decodes_in_one_call_like_its_blocks(tmp_path):
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES)), mixed)
    model = load_model(tmp_path / "model.gguf", "cpu")
    cache = StaticKVCache(model.config, 3, 64, torch.bfloat16, torch.device("cpu"))
    x_B1E, position_B1 = model.embed(torch.tensor([[5], [17]])), torch.tensor([[0], [0]])
    expected = run_layers_plainly(model, copy.deepcopy(cache), x_B1E, position_B1)
    assert DecodeLayers(model, cache).serves(2)
    assert_near(run_layers(model, cache, x_B1E, position_B1), expected, torch.bfloat16)


def test_layers_of_one_input_in_two_formats_run_in_one_call(tmp_path):
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES)), mixed)
    model = load_model(tmp_path / "model.gguf", "cpu")
    attention = model.model.layers[1].self_attn
    assert attention.v_proj.format.name == "int8" and attention.q_proj.format.name == "int4"
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    x = random_tensor(3, 256).bfloat16()
    for together, layer in zip(linears(x, *layers), layers, strict=True):
        assert_same(together, layer(x))
    cache = StaticKVCache(model.config, 1, 64, torch.bfloat16, torch.device("cpu"))
    assert DecodeLayers(model, cache).serves(1)
    with Generator(model, max_seq_len=64, compile=False) as generator:
        assert len(generator.generate([5, 17, 3], GREEDY).token_ids) == GREEDY.max_tokens


def test_blocks_of_other_formats_do_not_share_a_compiled_form(tmp_path, monkeypatch):
    # Compiled code is replaced by the module that it was made for: running another one with it would be seen.
    def compile(self, function, module, tensors, ranges, is_tuned):
        return lambda given, *arguments: seen.append((module, given)) or function(given, *arguments)

    seen = []
    monkeypatch.setattr(StepCompiler, "compile", compile)
    monkeypatch.setattr(DecodeLayers, "serves", lambda self, rows: False)
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES, num_hidden_layers=4)), mixed)
    model = load_model(tmp_path / "model.gguf", "cpu")
    with Generator(model, max_seq_len=64, compile=True) as generator:
        generator.generate([5, 17, 3], GREEDY)
    shapes = [[[p.shape for p in module.parameters()] for module in pair] for pair in seen if None not in pair]
    assert len(shapes) > 40 and all(made_for == given for made_for, given in shapes)
    assert len({id(module) for module, given in seen if isinstance(given, Block)}) == 3


# ----------------------------------------------------------------------------------------- config, experts, adapters


def test_yarn_is_that_of_config_json(tmp_path):
    model = randomized(small_config())
    write_gguf(tmp_path / "model.gguf", model, change=add_yarn)
    expected = CheckpointConfig.from_dict({**CheckpointConfig(model.config).to_dict(), "rope_scaling": YARN}).model
    assert read_config(tmp_path / "model.gguf").yarn == expected.yarn


def test_sampling_defaults_are_the_preset(tmp_path):
    def add_sampling(writer):
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)

    file = tmp_path / "model.gguf"
    write_gguf(file, randomized(small_config()), change=add_sampling)
    assert read_generation_config(file) == {"temperature": 0.5, "top_k": 20, "do_sample": True}
    write_gguf(file, randomized(small_config()))
    assert read_generation_config(file) is None


def test_a_preset_that_no_request_could_set_is_refused(tmp_path, tokenizer_folder):
    def add_sampling(writer):
        writer.add_float32("general.sampling.temp", -1.0)

    file, model = tmp_path / "model.gguf", randomized(small_config(vocab_size=1024))
    write_gguf(file, model, tokenizer_folder=tokenizer_folder, change=add_sampling)
    with pytest.raises(ValueError, match=r"model\.gguf: its sampling settings are damaged: temperature must be"):
        Generator.from_pretrained(file, device="cpu", compile=False)


def moe_config(**changes) -> ModelConfig:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return small_config(**{"hidden_size": 64, **experts, **changes})


def test_experts_load_into_their_stacks(tmp_path):
    model = randomized(moe_config())
    write_gguf(tmp_path / "model.gguf", model)
    loaded = load_model(tmp_path / "model.gguf", "cpu")
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)
    assert_near(loaded(random_ids(2, 9)), model(random_ids(2, 9)))


def test_quantized_experts_load_dequantized(tmp_path):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(moe_config()), lambda name: "Q8_0" if "exps" in name else "F16")
    for name, tensor in gguf_tensors(load_model(file, "cpu", "float32", quantization="dequantize")).items():
        assert_same(tensor, decode(*written[name]))
    assert main(["info", "--model", str(file)]) == 0


def kinds_of_experts(name: str) -> str:
    """A mixture as Q4_K_M files have it: more bits for the down projections."""
    return {"ffn_down_exps": "Q8_0"}.get(name.split(".")[2], "Q4_0") if "exps" in name else "F32"


@pytest.mark.parametrize(
    ("kinds", "quantization", "format"),
    [
        (lambda name: "Q4_0" if "exps" in name else "F32", None, "int4"),
        (kinds_of_experts, None, None),
        (kinds_of_experts, "int4", "int4"),
        ("F32", "int8", "int8"),
    ],
    ids=["Q4_0", "mixed", "mixed, int4", "floats, int8"],
)
def test_quantized_experts_load_packed(tmp_path, kinds, quantization, format):
    file = tmp_path / "model.gguf"
    written = write_gguf(file, randomized(moe_config()), kinds)
    model = load_model(file, "cpu", "float32", quantization=quantization)
    for layer, block in enumerate(model.model.layers):
        experts = block.mlp.experts
        assert isinstance(experts, QuantizedExperts)
        own = [experts.gate_up_proj.format.name, experts.down_proj.format.name]
        assert own == (["int4", "int8"] if format is None else [format] * 2)
        assert isinstance(block.mlp.gate, torch.nn.Linear)
        gate, up, down = (decode(*written[f"blk.{layer}.ffn_{name}_exps.weight"]) for name in ("gate", "up", "down"))
        for packed, plain in ((experts.gate_up_proj, torch.cat([gate, up], dim=1)), (experts.down_proj, down)):
            dequantized = packed.dequantize().view_as(plain)
            name = packed.format.name
            kind = written[f"blk.{layer}.ffn_{'down' if plain is down else 'up'}_exps.weight"][1]
            if (name, kind) == ("int4", "Q4_0"):
                assert ((dequantized - plain).abs() <= plain.abs() * 2**-8).all()  # the same levels
            else:
                again = FORMATS[name].quantize(plain.flatten(0, 1))
                assert_same(packed.weight_packed, again.weight)
                assert_same(packed.weight_scale, again.scale)
    plain = load_model(file, "cpu", "float32", quantization="dequantize")
    tokens = random_ids(2, 9)
    error = (model(tokens) - plain(tokens)).abs().max() / plain(tokens).abs().max()
    assert 0 < error < (0.03 if quantization is None else 0.3)  # of all layers: tokens may go to other experts


def test_adapters_need_plain_weights(tmp_path):
    model = randomized(small_config(**SIZES))
    write_gguf(tmp_path / "model.gguf", model, "Q8_0")
    modules = modules_of(model, ["q_proj"])
    write_adapter(tmp_path / "adapter", model, modules)
    with pytest.raises(ValueError, match=r"an adapter needs plain weights, .* add quantization='dequantize'"):
        load_model(tmp_path / "model.gguf", "cpu", adapter=tmp_path / "adapter")
    options = {"adapter": tmp_path / "adapter"}
    merged = load_model(tmp_path / "model.gguf", "cpu", quantization="dequantize", **options)
    base = load_model(tmp_path / "model.gguf", "cpu", quantization="dequantize")
    assert not torch.equal(*(m.get_submodule(modules[0]).weight for m in (merged, base)))
    quantized = load_model(tmp_path / "model.gguf", "cpu", quantization="int8", **options)
    expected = quantize(merged.get_submodule(modules[0]).weight, FORMATS["int8"])
    assert_same(quantized.get_submodule(modules[0]).weight_packed, expected.weight)


def test_embedder_leaves_the_output_projection_out(tmp_path, tokenizer_folder):
    model = randomized(small_config(vocab_size=1024, tie_word_embeddings=False))
    write_gguf(tmp_path / "model.gguf", model, tokenizer_folder=tokenizer_folder)
    embedder = Embedder.from_pretrained(tmp_path / "model.gguf", device="cpu")
    assert embedder.model.lm_head is None
    expected = Embedder(model, Tokenizer.from_folder(tokenizer_folder)).encode(["a text", "another"])
    assert_near(embedder.encode(["a text", "another"]), expected)


# ------------------------------------------------------------------------------------------------------- end to end


def test_tiny_answers_as_it_does_from_its_folder(tiny_file):
    params = SamplingParams(temperature=0, max_tokens=24)
    with (
        Generator.from_pretrained(tiny_file, device="cpu", compile=False) as ours,
        Generator.from_pretrained("tiny", device="cpu", dtype="float32", compile=False) as original,
    ):
        assert ours.config.eos_token_ids == (1017, 1015)
        for text in ("The capital of France is", "Once upon a time"):
            result, expected = ours.generate(text, params), original.generate(text, params)
            assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
        reply = ours.chat(QUESTION, params, enable_thinking=False)
        assert (reply.text, reply.finish_reason) == ("42", "stop")
        assert ours.default_params.temperature == 0  # a GGUF file without general.sampling has no preset


def test_save_quantized_writes_a_folder_with_the_tokenizer(tmp_path, tiny_file):
    params = SamplingParams(temperature=0, max_tokens=8)
    with Generator.from_pretrained(tiny_file, device="cpu", quantization="int8", compile=False) as generator:
        expected = generator.chat(QUESTION, params, enable_thinking=False)
        generator.save_quantized(tmp_path / "saved")
    with Generator.from_pretrained(tmp_path / "saved", device="cpu", compile=False) as saved:
        assert saved.chat(QUESTION, params, enable_thinking=False).token_ids == expected.token_ids
        assert saved.config.eos_token_ids == (1017, 1015)


def kinds_of_k_quants(name: str) -> str:
    """A mixture with several formats and layouts, one of them in the embedding."""
    kinds = {"attn_v": "Q6_K", "attn_k": "Q4_1", "attn_output": "Q5_K", "attn_q": "Q5_0"}
    kinds |= {"ffn_down": "Q4_0", "ffn_down_exps": "Q6_K", "ffn_up": "Q5_1", "ffn_gate": "IQ4_XS"}
    return kinds.get(name.split(".")[-2], "F32" if "gate_inp" in name else "Q4_K")


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_mixture_loads_as_it_was(tmp_path, experts, tied, capsys):
    write_gguf(
        tmp_path / "model.gguf",
        randomized(small_config(**SIZES, tie_word_embeddings=tied, **experts)),
        kinds_of_k_quants,
    )
    with Generator(load_model(tmp_path / "model.gguf", "cpu"), max_seq_len=32, compile=False) as generator:
        generator.save_quantized(tmp_path / "saved")
        model = generator.model
        expected = generator.generate([5, 17, 3], GREEDY).token_ids
    assert formats_of(model) == (["int6", "uint4", "uint5"] if experts else ["int4", "int6", "nl4", "uint4", "uint5"])
    loaded = load_model(tmp_path / "saved", "cpu")
    kinds = QuantizedLinear | QuantizedEmbedding
    found = [{n: m.format.name for n, m in x.named_modules() if isinstance(m, kinds)} for x in (loaded, model)]
    assert found[0] == found[1]
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)
    with Generator(loaded, max_seq_len=32, compile=False) as generator:
        assert generator.generate([5, 17, 3], GREEDY).token_ids == expected
    assert main(["info", "--model", str(tmp_path / "saved")]) == 0
    assert f"{model.num_bytes():,} bytes in " in capsys.readouterr().out


def test_command_line_takes_gguf_files(tiny_file, capsys):
    assert main(["info", "--model", str(tiny_file)]) == 0
    assert "bytes in float32" in capsys.readouterr().out
    options = ["--model", str(tiny_file), "--temperature", "0", "--compile", "never"]
    assert main(["generate", "What is 17 + 25?", *options]) == 0
    assert capsys.readouterr().out == "42\n"


def test_info_names_the_formats_of_a_mixture(tmp_path, capsys):
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES)), mixed)
    assert main(["info", "--model", str(tmp_path / "model.gguf")]) == 0
    loaded = load_model(tmp_path / "model.gguf", "cpu")
    assert f"{loaded.num_bytes():,} bytes in int4, int6, int8\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "uint4", "int6", "uint5", "nl4"])
def test_info_shows_the_format_that_is_asked_for(tmp_path, capsys, kind, quantization):
    file = tmp_path / "model.gguf"
    write_gguf(file, randomized(small_config(**SIZES)), kind)
    assert main(["info", "--model", str(file), "--quantization", quantization]) == 0
    model, out = load_model(file, "cpu", quantization=quantization), capsys.readouterr().out
    assert f" {model.num_bytes():,} bytes in {quantization}" in out


def formats_chosen(file: Path, *options: str | None) -> dict[str, str]:
    """Return the format of each tensor of the first block that gets packed, by llama.cpp's name of the layer."""
    header = read_header(file)
    chosen = choose_formats(header, config_of(header), *options)
    return {name.split(".")[2]: format.name for name, format in chosen.items() if name.startswith("blk.0.")}


def test_on_cuda_devices_layers_of_one_input_get_one_format(tmp_path):
    write_gguf(tmp_path / "model.gguf", randomized(small_config(**SIZES)), kinds_of_k_quants)
    own = {"attn_q": "uint5", "attn_k": "uint4", "attn_v": "int6", "attn_output": "uint5"}
    own |= {"ffn_gate": "nl4", "ffn_up": "uint5", "ffn_down": "int4"}
    assert formats_chosen(tmp_path / "model.gguf", None) == own
    # There are no kernels for 5 and 6 bits and nl4.
    in_8_bits = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), "int8")
    assert formats_chosen(tmp_path / "model.gguf", None, "cuda") == own | in_8_bits
    assert set(formats_chosen(tmp_path / "model.gguf", "int4").values()) == {"int4"}
    assert formats_chosen(tmp_path / "model.gguf", "dequantize") == {}


@pytest.mark.parametrize("up", ["Q4_1", "Q4_0", "Q6_K", "F32"])
def test_gate_and_up_of_experts_get_one_format(tmp_path, up):
    config = small_config(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256)
    kinds = {"ffn_up_exps": up, "ffn_gate_exps": "Q4_K", "ffn_down_exps": "Q4_K"}
    written = write_gguf(
        tmp_path / "model.gguf", randomized(config), lambda name: kinds.get(name.split(".")[-2], "F32")
    )
    model = load_model(tmp_path / "model.gguf", "cpu", "float32")
    experts = model.model.layers[0].mlp.experts
    if up == "F32":  # plain: an input is quantized for all of its layers, or for none
        assert not isinstance(experts, QuantizedExperts)
        return
    assert (experts.gate_up_proj.format.name, experts.down_proj.format.name) == ("int8", "uint4")
    plain = torch.cat([decode(*written[f"blk.0.ffn_{name}_exps.weight"]) for name in ("gate", "up")], dim=1)
    step = plain.abs().amax(dim=2, keepdim=True) / 127
    assert ((experts.dequantize(experts.gate_up_proj) - plain).abs() <= step * 0.501).all()
    assert_same(experts.dequantize(experts.down_proj), decode(*written["blk.0.ffn_down_exps.weight"]))
