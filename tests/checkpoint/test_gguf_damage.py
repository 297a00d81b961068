"""GGUF files: headers as the package gguf reads them, parts, what does not fit, and damage."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import assert_same, randomized, small_config
from gguf_files import add_yarn, gguf_tensors, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3fast import load_model
from qwen3fast.checkpoint.gguf.header import read_header
from qwen3fast.checkpoint.metadata import read_generation_config, read_tokenizer
from qwen3fast.checkpoint.source import TINY_FOLDER, resolve_source
from qwen3fast.cli import main

# Rows of 256 numbers, which the K-types come in.
SIZES = {"vocab_size": 96, "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in F32."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, load_model("tiny", "cpu", "float32"), tokenizer_folder=TINY_FOLDER)
    return file


def test_header_is_what_gguf_reads(tiny_file):
    header, reader = read_header(tiny_file), gguf.GGUFReader(tiny_file)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata == fields
    assert [tensor.name for tensor in reader.tensors] == list(header.tensors)
    for tensor in reader.tensors:
        assert header.tensors[tensor.name].shape == tuple(tensor.shape.tolist())[::-1]
        assert header.tensors[tensor.name].data.tobytes() == tensor.data.tobytes()


def test_a_folder_stands_for_its_only_gguf_file(tmp_path):
    model = randomized(small_config())
    write_gguf(tmp_path / "one.gguf", model)
    assert resolve_source(tmp_path) == tmp_path / "one.gguf"
    assert_same(load_model(tmp_path, "cpu").model.norm.weight, model.model.norm.weight)
    write_gguf(tmp_path / "two.gguf", model)
    with pytest.raises(ValueError, match=r"holds one\.gguf, two\.gguf; name one of them"):
        load_model(tmp_path, "cpu")
    (tmp_path / "model.safetensors").touch()
    assert resolve_source(tmp_path) == tmp_path


def test_split_files_load_as_one(tmp_path):
    model = randomized(small_config())
    write_gguf(tmp_path / "model.gguf", model, split_max_tensors=7)
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) == 4
    loaded = load_model(tmp_path, "cpu")  # its parts count as one
    for name, parameter in model.named_parameters():
        assert_same(loaded.get_parameter(name), parameter)
    with pytest.raises(ValueError, match=r"is not the first part; load model-00001-of-00004\.gguf"):
        load_model(parts[1], "cpu")
    parts[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00003-of-00004\.gguf, parts of model-00001"):
        load_model(parts[0], "cpu")
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"is one of 4 parts, and must be named so: model-00001-of-00004\.gguf"):
        load_model(tmp_path / "renamed.gguf", "cpu")


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    tensors = gguf_tensors(randomized(small_config()))
    del tensors["blk.1.ffn_up.weight"], tensors["output_norm.weight"]
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:32].contiguous()
    tensors["blk.0.attn_q.bias"] = torch.zeros(64)
    write_gguf(tmp_path / "model.gguf", randomized(small_config()), tensors=tensors)
    with pytest.raises(ValueError, match="do not fit its metadata") as error:
        load_model(tmp_path / "model.gguf", "cpu")
    for problem in (
        r"blk.0.attn_q.weight in model.gguf: shape (32, 48), expected (64, 48)",
        r"blk.0.attn_q.bias in model.gguf: unexpected",
        r"blk.1.ffn_up.weight: missing, expected shape (80, 48)",
        r"output_norm.weight: missing, expected shape (48,)",
    ):
        assert problem in str(error.value)


def test_types_that_gguf_cannot_decode_are_named(tmp_path):
    def add_integers(writer):
        writer.add_tensor("output.weight", np.zeros((97, 48), np.int32))

    write_gguf(tmp_path / "model.gguf", randomized(small_config()), change=add_integers)
    with pytest.raises(ValueError, match=r"output.weight in model.gguf: type I32 is not supported"):
        load_model(tmp_path / "model.gguf", "cpu")


@pytest.mark.parametrize(
    ("kind", "quantization", "counts"),
    [
        ("F32", None, "1 NaN"),
        ("F32", "int8", "1 NaN"),
        ("F16", "int4", "1 NaN"),
        ("Q4_0", None, "32 NaN"),  # of a block, whose scale is NaN
        ("Q4_0", "dequantize", "32 NaN"),
        ("Q8_0", None, "32 NaN"),
        ("Q4_K", None, "256 NaN"),
        ("Q4_K", "uint4", "256 NaN"),
    ],
)
@pytest.mark.parametrize("kind_of_layer", ["attn_q", "ffn_down_exps", "ffn_up_exps"])
def test_check_weights_finds_nan(tmp_path, kind_of_layer, kind, quantization, counts):
    file, name = tmp_path / "model.gguf", f"blk.1.{kind_of_layer}.weight"
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 256} if "exps" in name else {}
    written = write_gguf(file, randomized(small_config(**SIZES, **experts)), kind)
    load_model(file, "cpu", quantization=quantization, check_weights=True)
    good = written[name][0].tobytes()
    nan = np.array(np.nan, np.float32 if kind == "F32" else np.float16).tobytes()
    file.write_bytes(file.read_bytes().replace(good, nan + good[len(nan) :]))
    load_model(file, "cpu", quantization=quantization)
    message = rf"not all finite in b?float\d+:\n  {name} in model\.gguf: {counts} and 0"
    with pytest.raises(ValueError, match=message) as error:
        load_model(file, "cpu", quantization=quantization, check_weights=True)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_uint32("qwen3.attention.value_length", 8), "attention.value_length must be .*key_length, 16"),
        (lambda w: w.add_uint32("qwen3.block_count", 0), "qwen3.block_count must be from 1 to 262144, got 0"),
        (lambda w: w.add_uint32("qwen3.block_count", 10**5), "block_count is 100000, but there are 24 tensors"),
        (lambda w: w.add_uint32("qwen3.embedding_length", 2**31), "qwen3.embedding_length must be from 1 to"),
        (lambda w: w.add_float32("qwen3.rope.freq_base", float("nan")), "qwen3.rope.freq_base must be a positive"),
        (lambda w: w.add_string("qwen3.rope.freq_base", "x"), "qwen3.rope.freq_base has an unexpected type"),
        (lambda w: w.add_string("qwen3.rope.scaling.type", "linear"), "RoPE scaling 'linear' is not supported"),
        (
            lambda w: (add_yarn(w), w.add_float32("qwen3.rope.scaling.yarn_attn_factor", 2.0)),
            r"qwen3.rope.scaling.yarn_attn_factor=2.0 is not supported",
        ),
        (lambda w: w.add_string("general.architecture", "qwen2"), "architecture 'qwen2' is not supported; supported:"),
        (lambda w: w.add_uint32("general.alignment", 24), "general.alignment must be a power of two from 8, got 24"),
    ],
)
def test_metadata_that_are_not_supported_are_refused(tmp_path, change, message):
    def replace_values(writer):
        # The writer refuses to set a key twice.
        class Last(dict):
            def __contains__(self, key):
                return False

        writer.kv_data[0] = Last(writer.kv_data[0])
        change(writer)

    write_gguf(tmp_path / "model.gguf", randomized(small_config()), change=replace_values)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.gguf", "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it ends at byte 0, inside its header"),
        (b"PK\x03\x04" + bytes(40), "it does not begin with 'GGUF'"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1 is not supported"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "it is big-endian, which is not supported"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "it ends at byte 24, inside its header"),
    ],
)
def test_files_that_are_no_gguf_are_refused(tmp_path, content, message):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=f"is not a GGUF file, or damaged or truncated: {message}"):
        load_model(tmp_path / "model.gguf", "cpu")


def text(value: str) -> bytes:
    """A string as it is stored."""
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, kind: int, value: bytes) -> bytes:
    """A key and its value."""
    return text(name) + struct.pack("<I", kind) + value


def tensor_info(shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    """Return a header's entry for a tensor, "a". shape: the fastest dimension comes first. kind 0: F32."""
    return text("a") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_bytes(entries: list[bytes], tensors: list[bytes]) -> bytes:
    """A file with this header and 128 bytes of zeros after it."""
    counts = struct.pack("<IQQ", 3, len(tensors), len(entries))
    return b"GGUF" + counts + b"".join(entries + tensors) + bytes(128)


@pytest.mark.parametrize(
    ("entries", "tensors", "message"),
    [
        ([entry("a", 4, bytes(4))] * 2, [], "'a' appears twice"),
        ([entry("a", 13, b"")], [], "metadata of the unknown type 13"),
        ([entry("a", 9, struct.pack("<IQ", 9, 1))], [], "an array of the type 9, which is not supported"),
        ([entry("a", 9, struct.pack("<IQ", 8, 100))], [], "it states 100 strings, more than its size allows"),
        ([], [tensor_info(())], "tensor 'a' has 0 dimensions"),
        ([], [tensor_info((1,) * 5)], "tensor 'a' has 5 dimensions"),
        ([], [tensor_info((8, 0))], "tensor 'a' has shape (0, 8)"),
        ([], [tensor_info()] * 2, "tensor 'a' appears twice"),
        ([], [tensor_info(offset=8)], "tensor 'a' begins at 8, not a multiple of 32"),
        ([], [tensor_info(kind=999)], "tensor 'a' has the unknown type 999"),
        ([], [tensor_info(kind=2)], "tensor 'a': Q4_0 comes in blocks of 32, but its rows have 8"),
        ([], [tensor_info((1000,))], "tensor 'a' ends at byte 4064, the file at 185"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, entries, tensors, message):
    (tmp_path / "model.gguf").write_bytes(file_bytes(entries, tensors))
    with pytest.raises(ValueError, match=re.escape(f"is not a GGUF file, or damaged or truncated: {message}")):
        load_model(tmp_path / "model.gguf", "cpu")


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    for part in ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf"):
        content = file_bytes([entry("split.count", 4, struct.pack("<I", 2))], [tensor_info()])
        (tmp_path / part).write_bytes(content)
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.gguf: a is in an earlier part already"):
        load_model(tmp_path, "cpu")


@pytest.fixture(scope="module")
def small_bytes(tmp_path_factory) -> tuple[bytes, Path]:
    """A whole file, small, and where to write damaged ones."""
    folder = tmp_path_factory.mktemp("damaged")
    config = small_config(vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    write_gguf(folder / "whole.gguf", randomized(config), "Q4_0", tokenizer_folder=TINY_FOLDER, change=add_yarn)
    return (folder / "whole.gguf").read_bytes(), folder / "damaged.gguf"


def load_all(file: Path) -> None:
    """Everything that reads a file. Raises: what users may get, or else the test fails."""
    try:
        load_model(file, "cpu")
        read_tokenizer(file)
        read_generation_config(file)
    except (ValueError, FileNotFoundError):
        pass


@settings(max_examples=25)
@given(share=st.floats(0, 0.9999))
def test_truncated_files_are_refused(small_bytes, share):
    content, file = small_bytes
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is not a GGUF file, or damaged or truncated"):
        load_model(file, "cpu")


@settings(max_examples=120)
@given(data=st.data())
def test_flipped_bytes_load_or_are_refused(small_bytes, data):
    content, file = small_bytes
    # The values before the tokens, the lists of tokens, what is after them; tensors' names and shapes.
    tokens, tensors = content.index(b"tokenizer.ggml.tokens"), content.index(b"token_embd.weight")
    ranges = [(0, tokens + 40), (tokens, tensors), (tensors - 300, tensors + 900)]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(ranges).flatmap(lambda ends: st.integers(*ends)))
        damaged[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0xFF]) | st.integers(0, 255))
    file.write_bytes(damaged)
    load_all(file)


def test_without_the_package_gguf_an_error_says_what_to_install(tiny_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"GGUF files need the package gguf; run: pip install 'qwen3fast\[gguf\]'"):
        load_model(tiny_file, "cpu")
    assert main(["info", "--model", str(tiny_file)]) == 1
    assert "pip install 'qwen3fast[gguf]'" in capsys.readouterr().err


def test_dequantize_is_for_quantized_checkpoints_of_others():
    with pytest.raises(ValueError, match="quantization='dequantize' is for checkpoints that other software quantized"):
        load_model("tiny", "cpu", quantization="dequantize")
    with pytest.raises(ValueError, match="quantization='dequantize' is for checkpoints that other software quantized"):
        load_model("random:0.6b", "cpu", quantization="dequantize")
