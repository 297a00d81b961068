"""The parts of a model that ranks hold: together the whole, read from files without more than is needed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same, randomized, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_checkpoint import tensors_of, write_checkpoint
from test_expert_checkpoints import tensors_by_expert

from qwen3fast import load_model
from qwen3fast.checkpoint import fill
from qwen3fast.checkpoint.fill import FillOptions, load_weights
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Split
from qwen3fast.parallel.shard import split_dim

CPU = torch.device("cpu")
CONFIG = small_config(num_attention_heads=8, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=False)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": (0,)}


def load_part(config: ModelConfig, folder, rank: int, size: int) -> Qwen3:
    """The part of one of `size` ranks, without any process but this one."""
    split = Split(config, rank, size)
    model = split.build_on_meta()
    load_weights(model, folder, FillOptions(CPU, torch.float32, split=split))
    return model


def assert_parts_make(parts: list[Qwen3], whole: Qwen3) -> None:
    """Side by side, the parts' weights are the whole model's."""
    for name, expected in whole.named_parameters():
        dim, held = split_dim(name), [part.get_parameter(name) for part in parts]
        if dim is None:
            for tensor in held:
                assert_same(tensor, expected)
        elif name.endswith("gate_up_proj"):  # each has some rows of gate, and the same ones of up
            halves = zip(*(tensor.chunk(2, dim) for tensor in held), strict=True)
            assert_same(torch.cat([torch.cat(half, dim) for half in halves], dim), expected)
        else:
            assert_same(torch.cat(held, dim), expected)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("changes", "layout"), [({}, tensors_of), (EXPERTS, tensors_of), (EXPERTS, tensors_by_expert)])
def test_parts_that_are_loaded_make_the_whole(tmp_path, changes, layout, size):
    whole = randomized(small_config(**{**vars(CONFIG), **changes}))
    write_checkpoint(tmp_path, whole.config, layout(whole), files=3)
    assert_parts_make([load_part(whole.config, tmp_path, rank, size) for rank in range(size)], whole)


def test_parts_of_random_weights_make_the_whole():
    config = small_config(**{**vars(CONFIG), **EXPERTS})
    parts = [random_model(config, CPU, torch.float32, 3, split=Split(config, rank, 2)) for rank in range(2)]
    with torch.device("meta"):  # an application's default device
        whole = random_model(config, CPU, torch.float32, 3)
    assert_parts_make(parts, whole)


def test_a_rank_reads_its_part_alone(tmp_path, monkeypatch):
    whole = randomized(CONFIG)
    write_checkpoint(tmp_path, CONFIG, tensors_of(whole))
    read: dict[str, int] = {}

    class Watched:
        """An open file that notes how many numbers are asked for."""

        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception) -> None: ...

        def keys(self):
            return self.file.keys()

        def get_slice(self, name: str):
            inner = self.file.get_slice(name)

            class Slice:
                get_shape, get_dtype = inner.get_shape, inner.get_dtype

                def __getitem__(self, index):
                    read[name] = inner[index].numel()
                    return inner[index]

            return Slice()

    monkeypatch.setattr(fill, "open_tensors", lambda file: Watched(safe_open(file, "pt")))
    model = load_part(CONFIG, tmp_path, rank=1, size=4)
    assert read == {name: p.numel() for name, p in model.named_parameters()}
    assert sum(read.values()) < 0.3 * sum(p.numel() for p in whole.parameters())
    copied = model.model.layers[0].self_attn.o_proj.weight
    assert copied.untyped_storage().nbytes() == copied.nbytes


def test_a_part_is_a_smaller_model_with_the_whole_vocabulary():
    part = Split(CONFIG, 3, 4).build_on_meta()
    assert (part.config.num_attention_heads, part.config.num_key_value_heads) == (2, 1)
    assert (part.config.vocab_size, part.lm_head.weight.shape) == (97, (97 - 3 * 25, 48))
    assert part.model.layers[0].self_attn.num_heads == 2
    assert part.model.layers[0].mlp.down_proj.weight.shape == (48, 20)


@settings(max_examples=20)
@given(vocab_size=st.integers(1, 40), size=st.integers(1, 8))
def test_parts_are_those_of_torch_chunk(vocab_size, size):
    config = small_config(
        vocab_size=vocab_size, num_attention_heads=8 * size, num_key_value_heads=size, intermediate_size=size
    )
    chunks = torch.arange(vocab_size).chunk(size)
    for rank in range(size):
        if rank < len(chunks):
            assert torch.arange(vocab_size)[Split(config, rank, size).vocabulary].equal(chunks[rank])
        else:
            with pytest.raises(ValueError, match=f"vocab_size {vocab_size} is too small to be split over {size}"):
                Split(config, rank, size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, r"num_key_value_heads \(2\) cannot be split over 4 processes; .* over 1, 2$"),
        ({"intermediate_size": 81}, r"intermediate_size \(81\) cannot be split over 4 processes; .* over 1$"),
        (EXPERTS | {"moe_intermediate_size": 18}, r"moe_intermediate_size \(18\) cannot .* over 1, 2$"),
    ],
)
def test_split_says_what_divides(changes, message):
    with pytest.raises(ValueError, match=message):
        Split(small_config(**{**vars(CONFIG), **changes}), 0, 4)


def test_shapes_in_files_are_those_of_the_whole_model(tmp_path):
    tensors = tensors_of(randomized(CONFIG))
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:40].clone()
    write_checkpoint(tmp_path, CONFIG, tensors)
    with pytest.raises(ValueError, match=r"up_proj.weight in .*: shape \(40, 48\), expected \(80, 48\)"):
        load_part(CONFIG, tmp_path, 0, 2)


def test_load_refuses_what_cannot_be_split_yet(tmp_path):
    ranks = SimpleNamespace(rank=0, size=2)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    with pytest.raises(ValueError, match="adapter= is not supported with tensor parallelism yet"):
        load_model("tiny", "cpu", adapter=tmp_path, ranks=ranks)
    write_checkpoint(tmp_path, small_config(), {})
    stored = CheckpointConfig(small_config(), quantization="int8")
    (tmp_path / "config.json").write_text(json.dumps(stored.to_dict()))
    with pytest.raises(
        ValueError, match=r"quantized already \(int8\) cannot be split .* weights with quantization='int8'"
    ):
        load_model(tmp_path, "cpu", ranks=ranks)
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    stored = CheckpointConfig(small_config()).to_dict() | {"quantization_config": fp8}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"quantized already \(fp8\) cannot be split .* with quantization='fp8'"):
        load_model(tmp_path, "cpu", ranks=ranks)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"model\.gguf: GGUF files cannot be split .* yet; use safetensors"):
        load_model(tmp_path / "model.gguf", "cpu", ranks=ranks)
