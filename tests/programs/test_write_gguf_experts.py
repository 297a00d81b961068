"""tools/write_gguf_experts.py in a very small shape: the file's types, what is loaded, and the memory that it takes."""

import math
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import write_gguf_experts
from conftest import assert_same
from gguf_files import decode

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.gguf.tensors import StoredTensor, release_pages
from qwen3fast.quantization.experts import QuantizedExperts

SMALL = replace(
    write_gguf_experts.coder_config(8),
    vocab_size=1024, hidden_size=256, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=256, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("coder") / "coder.gguf"
    written = write_gguf_experts.write(file, SMALL)
    assert written == sum(t.n_bytes for t in gguf.GGUFReader(file).tensors)
    return file


def test_half_of_the_layers_have_more_bits():
    layers = [layer for layer in range(48) if write_gguf_experts.has_more_bits(layer, 48)]
    assert layers == [*range(6), *range(8, 42, 3), *range(42, 48)] and len(layers) == 24


def test_the_full_shape_is_coders():
    tensors = write_gguf_experts.plan(write_gguf_experts.coder_config())
    assert sum(math.prod(tensor.shape) for tensor in tensors) == 30_532_122_624
    assert 18e9 < sum(map(write_gguf_experts.num_bytes, tensors)) < 19e9
    assert write_gguf_experts.coder_config(4).num_hidden_layers == 4


def test_each_matrix_is_kept_in_its_format(small_file):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(small_file).tensors}
    model = load_model(small_file, "cpu")
    assert model.config == replace(
        SMALL, rms_norm_eps=model.config.rms_norm_eps, eos_token_ids=model.config.eos_token_ids
    )
    assert model.lm_head.format.name == "int6" and model.model.embed_tokens.format.name == "uint4"
    for layer, block in enumerate(model.model.layers):
        experts, attention = block.mlp.experts, block.self_attn
        assert isinstance(experts, QuantizedExperts)
        more = "int6" if write_gguf_experts.has_more_bits(layer, 8) else "uint4"
        assert (
            experts.gate_up_proj.format.name == attention.q_proj.format.name == attention.k_proj.format.name == "uint4"
        )
        assert experts.down_proj.format.name == attention.v_proj.format.name == more
        gate, up, down = (
            decode(np.array(t.data), t.tensor_type.name)
            for t in (stored[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        )
        assert 0.5 < gate.std() * 256**0.5 < 2 and abs(gate.mean()) < 0.05 * gate.std()
        assert_same(experts.dequantize(experts.gate_up_proj), torch.cat([gate, up], dim=1))
        if more == "uint4":
            assert_same(experts.dequantize(experts.down_proj), down)


def test_it_generates_the_tokens_of_its_dequantized_weights(small_file):
    """With exact products; the experts' operation rounds activations."""
    prompt, greedy = [5, 900, 17, 3], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    plain = load_model(small_file, "cpu", "float32", quantization="dequantize")
    ids = list(prompt)
    with Generator.from_pretrained(small_file, device="cpu", compile=False, max_seq_len=64) as generator:
        ids += generator.generate(prompt, greedy).token_ids
    logits = plain(torch.tensor([ids]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(ids[len(prompt) :])[:, None])[:, 0]
    assert (logits.amax(dim=1) - chosen).max() < 0.05 * logits.abs().max()  # the best, or next to it


def test_loading_holds_some_rows_of_one_tensor_beside_the_result(small_file, monkeypatch):
    rows, released = [], []
    parts = StoredTensor._parts

    def watched(self):
        for start, part in parts(self):
            rows.append(len(part) * self.shape[-1])
            yield start, part

    monkeypatch.setattr("qwen3fast.checkpoint.gguf.tensors.NUMBERS_AT_ONCE", 2**13)
    monkeypatch.setattr(StoredTensor, "_parts", watched)
    monkeypatch.setattr("qwen3fast.checkpoint.gguf.tensors.release_pages", lambda data: released.append(data.nbytes))
    load_model(small_file, "cpu")
    packed = [t for t in write_gguf_experts.plan(SMALL) if t.kind != write_gguf_experts.Kind.F32]
    assert max(rows) == 2**13 and sorted(released) == sorted(map(write_gguf_experts.num_bytes, packed))


def test_released_pages_are_read_again(tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 256)
    data = np.memmap(file, mode="c")
    data[100] = 7  # changed in memory; its page is not wholly the part's, which begins after it
    part = data[5000:60000]
    before = part.copy()
    release_pages(part)
    assert (part == before).all() and data[100] == 7
    release_pages(before)  # not mapped: nothing happens
