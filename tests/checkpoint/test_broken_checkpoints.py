"""Damaged and hostile checkpoints: each is refused with the file, the cause and what to do, whatever the damage."""

from __future__ import annotations

import ast
import json
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomized, small_config, write_text_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import EMBEDDING, INDEX, NORM, read_index, tensors_of, write_checkpoint, write_index
from test_expert_checkpoints import CONFIG as EXPERTS_CONFIG
from test_expert_checkpoints import tensors_by_expert
from test_imports import TREES
from test_lora import modules_of, write_adapter
from torch import Tensor

from qwen3fast import Embedder, Generator, Reranker, load_model
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.save import save_model
from qwen3fast.cli import main
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.text.tokenizer import Tokenizer

REFUSALS = (ValueError, FileNotFoundError)
SINGLE = "model.safetensors"
Header = dict[str, Any]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """The tensors of a small random model."""
    return tensors_of(randomized(small_config()))


@pytest.fixture
def folder(tmp_path, tensors) -> Path:
    """A good checkpoint in one file."""
    return write_checkpoint(tmp_path, small_config(), tensors)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    """A good checkpoint in two files, for properties, which copy what they damage."""
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder, small_config(), tensors_of(randomized(small_config())), files=2)
    return folder


def split_file(content: bytes) -> tuple[Header, bytes]:
    """The header of a safetensors file, and the bytes after it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(header: Header | bytes, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file; length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def set_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# Shards.


@pytest.mark.parametrize(
    "damage",
    [
        lambda header, body: join_file(header, body[:-1]),
        lambda header, body: join_file(header, body + b"\0"),
        lambda header, body: join_file(header, body, length=len(body) + 10_000),
        lambda header, body: join_file(header, body, length=99_999_999),
        lambda header, body: join_file(header, body, length=2**63),
        lambda header, body: join_file(b"{" + b" " * 50, body),
        lambda header, body: join_file(b"[]", body),
        lambda header, body: join_file(b'{"a":' * 10_000, body),
        lambda header, body: join_file(b"\xff" * 40, body),
        lambda header, body: join_file({**header, NORM: {**header[NORM], "data_offsets": [0, 192]}}, body),
        lambda header, body: join_file({**header, NORM: {**header[NORM], "data_offsets": [0, 2**62]}}, body),
        lambda header, body: join_file({**header, NORM: {**header[NORM], "shape": [2**40, 2**40]}}, body),
        lambda header, body: join_file({**header, NORM: {**header[NORM], "shape": [-48]}}, body),
        lambda header, body: join_file({**header, NORM: {**header[NORM], "dtype": "I4"}}, body),
        lambda header, body: join_file({name: 3 for name in header}, body),
    ],
)
def test_load_refuses_a_bad_header(folder, damage):
    file = folder / SINGLE
    file.write_bytes(damage(*split_file(file.read_bytes())))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated .*download it again"):
        load_model(folder, device="cpu")


def test_load_refuses_a_header_that_names_a_tensor_twice(folder):
    file = folder / SINGLE
    header, body = split_file(file.read_bytes())
    again = json.dumps(header[EMBEDDING])
    text = json.dumps({name: entry for name, entry in header.items() if name != NORM})
    file.write_bytes(join_file(f'{text[:-1]}, "{EMBEDDING}": {again}}}'.encode(), body))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("dtype", "spelling"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.complex64, "C64"),
    ],
)
@pytest.mark.parametrize("files", [1, 2])
def test_load_names_tensors_of_a_wrong_dtype(tmp_path, tensors, dtype, spelling, files):
    tensors[NORM] = torch.ones(48).to(dtype)
    write_checkpoint(tmp_path, small_config(), tensors, files)
    message = rf"model\.norm\.weight in model.*safetensors: dtype {spelling}, expected one of F64, F32, F16, BF16"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("spelling", ["F6_E2M3", "F4", "F8_E8M0"])
def test_load_names_tensors_of_dtypes_that_torch_may_lack(tmp_path, tensors, spelling):
    file = write_checkpoint(tmp_path, small_config(), tensors) / SINGLE
    header, body = split_file(file.read_bytes())
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    start, end = header[last]["data_offsets"]
    bits = {"F6_E2M3": 6, "F4": 4, "F8_E8M0": 8}[spelling]
    stored = (end - start) // 32 * bits
    header[last] |= {"dtype": spelling, "data_offsets": [start, start + stored]}
    file.write_bytes(join_file(header, body[: start + stored]))
    with pytest.raises(ValueError, match=rf"{last} in model\.safetensors: dtype {spelling}, expected one of F64"):
        load_model(tmp_path, device="cpu")


def test_load_converts_every_float_dtype(tmp_path, tensors):
    tensors[NORM] = torch.ones(48, dtype=torch.float64)
    tensors[EMBEDDING] = tensors[EMBEDDING].half()
    write_checkpoint(tmp_path, small_config(), tensors)
    assert {p.dtype for p in load_model(tmp_path, device="cpu").parameters()} == {torch.float32}


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_load_names_quantized_tensors_of_a_wrong_dtype(tmp_path, part):
    model = randomized(small_config(hidden_size=64))
    quantize_model(model, "int8", torch.float32)
    save_model(model, tmp_path)
    state = {name: p.clone() for name, p in model.named_parameters()}
    name = next(name for name in state if name.endswith(part))
    expected = {"weight_packed": "U8", "weight_scale": "F32"}[part]
    save_file({**state, name: state[name].to(torch.float64)}, tmp_path / SINGLE)
    with pytest.raises(ValueError, match=rf"{name} in model\.safetensors: dtype F64, expected {expected}"):
        load_model(tmp_path, device="cpu")


def test_load_copies_tensors_that_are_not_aligned(folder, tensors):
    file = folder / SINGLE
    header, body = split_file(file.read_bytes())
    text = json.dumps(header).encode()
    file.write_bytes(join_file(text + b" " * (1 + -len(text) % 8), body))
    model = load_model(folder, device="cpu")
    assert [name for name, p in model.named_parameters() if p.data_ptr() % 4] == []
    torch.testing.assert_close(model.model.norm.weight, tensors[NORM], rtol=0, atol=0)


def test_load_names_a_tensor_that_comes_alone_and_with_its_experts(tmp_path):
    model = randomized(EXPERTS_CONFIG)
    stack = "model.layers.0.mlp.experts.down_proj"
    tensors = {stack: tensors_of(model)[stack], **tensors_by_expert(model)}
    write_checkpoint(tmp_path, model.config, tensors, files=2)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight in .*was loaded already") as error:
        load_model(tmp_path, device="cpu")
    assert str(error.value).count("was loaded already") == EXPERTS_CONFIG.num_experts


# The index.


@pytest.mark.parametrize("place", [5, None, ["a"], {"a": 1}, "a" * 300, "../model.safetensors", ".\0/x"])
def test_load_refuses_an_index_whose_entries_are_no_file_names(folder, place):
    (folder / "model.safetensors").unlink()
    write_index(folder, {NORM: place})
    with pytest.raises(ValueError, match=r"index\.json: .* must be a file name without folders"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("place", ["pytorch_model.bin", "config.json", "", ".."])
def test_load_refuses_an_index_of_other_files(folder, place):
    (folder / "pytorch_model.bin").touch()
    (folder / "model.safetensors").unlink()
    write_index(folder, {NORM: place})
    with pytest.raises(ValueError, match=r"index\.json: .* is not a safetensors file; no others are read"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"weight_map": ' + "[" * 100_000, '{"weight_map": ' + "9" * 5000])
def test_load_refuses_an_index_that_is_not_json(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json (is not valid JSON: .*download it again|must hold a JSON obj)"):
        load_model(folder, device="cpu")


def test_load_takes_a_tensor_that_the_index_leaves_out(tmp_path, tensors):
    write_checkpoint(tmp_path, small_config(), tensors, files=2)
    index = read_index(tmp_path)
    del index[NORM]
    write_index(tmp_path, index)
    assert torch.equal(load_model(tmp_path, device="cpu").model.norm.weight, tensors[NORM])


# Pickles.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_load_never_reads_pickles(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(CheckpointConfig(small_config()).to_dict()))
    (tmp_path / name).write_bytes(b"\x80\x04cbuiltins\nexit\n(I7\ntR.")  # would end the process
    with pytest.raises(FileNotFoundError, match=rf"holds pickles only \({name}\), which are never read, .* revision"):
        load_model(tmp_path, device="cpu")


def test_load_does_not_read_a_pickle_that_is_called_safetensors(folder):
    (folder / SINGLE).write_bytes(b"\x80\x04cbuiltins\nexit\n(I7\ntR.")
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_model(folder, device="cpu")


def test_the_package_unpickles_nothing():
    # weights_only is the default of torch.load, but a plain refusal is easier to trust.
    readers = {"load", "load_state_dict_from_url", "jit.load", "hub.load", "export.load"}
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [(module, name) for name in names if name.split(".")[0] in banned]
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [(module, alias.name) for alias in node.names if alias.name in readers]
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {f"torch.{name}" for name in readers}:
                found.append((module, ast.unparse(node)))
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                found.append((module, "allow_pickle"))
    assert found == []


# config.json and its neighbors.


@pytest.mark.parametrize(
    "text", [b"", b'{"vocab_size": 9', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_load_refuses_a_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: .*download it again"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 10**12}, r"config\.json: vocab_size must be at most 1,000,000,000"),
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers must be at most 10,000"),
        ({"vocab_size": 10**9}, r"config\.json describes 48,000,.* parameters, but the weights are .* bytes"),
        ({"num_hidden_layers": 10_000}, r"config\.json describes 2.* parameters, but the weights are .* bytes"),
        ({"intermediate_size": 10**8, "hidden_size": 10**8}, r"config\.json describes .* download both again"),
        ({"hidden_size": 10**400}, r"config\.json: hidden_size must be at most"),
        ({"rope_theta": 10**400}, r"config\.json: rope_theta must be a positive number up to 1e\+15"),
        ({"rms_norm_eps": float("nan")}, r"config\.json: rms_norm_eps must be a positive number up to 1, got nan"),
        ({"rms_norm_eps": float("inf")}, r"config\.json: rms_norm_eps must be a positive number up to 1, got inf"),
        ({"architectures": "Qwen3ForCausalM"}, r"config\.json: architecture 'Qwen3ForCausalM' is not supported"),
        ({"architectures": 5}, r"config\.json: architecture 5 is not supported"),
        ({"architectures": [{}]}, r"config\.json: architecture {} is not supported"),
        ({"architectures": None, "model_type": ["x"]}, r"config\.json: architecture \['x'\] is not supported"),
        ({"layer_types": 5}, r"config\.json: layer_types=5 is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1e300}},
            r"config\.json: YaRN: factor must be a positive number up to 1e\+06, got 1e\+300",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 10**400}},
            r"config\.json: YaRN: mscale must be a positive number",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_load_refuses_absurd_values_of_the_config(folder, fields, message):
    set_config(folder, **fields)
    with pytest.raises(ValueError, match=message):
        load_model(folder, device="cpu")


def test_load_refuses_experts_of_no_heads(tmp_path):
    write_checkpoint(tmp_path, EXPERTS_CONFIG, {})
    set_config(tmp_path, num_attention_heads=0, head_dim=None)
    with pytest.raises(ValueError, match=r"config\.json: .*zero"):
        load_model(tmp_path, device="cpu")


@pytest.fixture
def text_folder(tmp_path, tokenizer_folder) -> Path:
    """A good checkpoint with a tokenizer."""
    return write_text_checkpoint(tmp_path / "text", randomized(small_config(vocab_size=1100)), tokenizer_folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", '{"model": ', "is not a tokenizer: .*download it again"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", '{"eos_token": ', "is not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token=5 names no token"),
        ("tokenizer_config.json", '{"eos_token": {"text": "a"}}', "eos_token={'text': 'a'} names no token"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be a text, got 5"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": 7}]}', "must be a text, got 7"),
        ("chat_template.jinja", "\xff", "is not text in UTF-8"),
        ("generation_config.json", "{", "is not valid JSON"),
        (
            "generation_config.json",
            '{"do_sample": true, "temperature": "hot"}',
            "temperature must be .*delete the file",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', "token ids must be a number .*delete the file"),
    ],
)
def test_generator_names_the_damaged_file_beside_the_weights(text_folder, file, text, message):
    (text_folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{file}:? .*{message}|{file} {message}"):
        Generator.from_pretrained(text_folder, device="cpu", compile=False, max_seq_len=64)


def test_chat_templates_without_a_default_are_none(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "other", "template": "x"}, 5]}')
    assert Tokenizer.from_folder(tmp_path).chat_template is None


# Numbers.


def with_bad_numbers(tensors: dict[str, Tensor]) -> None:
    """Three NaN in one tensor, a NaN and two infinities in another."""
    tensors[EMBEDDING][5, :3] = torch.nan
    tensors[NORM][:3] = torch.tensor([torch.inf, torch.nan, -torch.inf])


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_check_weights_names_tensors_and_counts(tmp_path, tensors, files, dtype):
    with_bad_numbers(tensors)
    write_checkpoint(tmp_path, small_config(), tensors, files)
    with pytest.raises(ValueError, match=r"are not all finite in (float32|bfloat16):") as error:
        load_model(tmp_path, device="cpu", dtype=dtype, check_weights=True)
    text = str(error.value)
    assert f"{EMBEDDING} in model" in text
    assert ": 3 NaN and 0 infinite of 4,656" in text
    assert ": 1 NaN and 2 infinite of 48" in text
    assert len(text.splitlines()) == 3


def test_check_weights_is_off_by_default_and_accepts_good_ones(tmp_path, tensors):
    write_checkpoint(tmp_path, small_config(), tensors)
    load_model(tmp_path, device="cpu", check_weights=True)
    with_bad_numbers(tensors)
    write_checkpoint(tmp_path, small_config(), tensors)
    assert load_model(tmp_path, device="cpu").model.norm.weight[1].isnan()


def test_check_weights_finds_what_the_dtype_cannot_hold(tmp_path, tensors):
    tensors[NORM][7] = 1e30
    write_checkpoint(tmp_path, small_config(), tensors)
    load_model(tmp_path, device="cpu", check_weights=True)
    with pytest.raises(
        ValueError, match=r"finite in float16:\n  model\.norm\.weight in .*: 0 NaN and 1 infinite of 48"
    ):
        load_model(tmp_path, device="cpu", dtype="float16", check_weights=True)


def test_check_weights_looks_at_experts_and_scales(tmp_path):
    model = randomized(EXPERTS_CONFIG)
    tensors = tensors_by_expert(model)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name][3, 4] = torch.nan
    write_checkpoint(tmp_path, model.config, tensors)
    with pytest.raises(ValueError, match=f"{name} in .*: 1 NaN"):
        load_model(tmp_path, device="cpu", check_weights=True)
    quantized = randomized(small_config(hidden_size=64))
    quantized.model.layers[0].mlp.up_proj.weight[2, 2] = torch.inf
    quantize_model(quantized, "int8", torch.float32)
    save_model(quantized, tmp_path)
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale in .*: 0 NaN and 1 infinite of 80"):
        load_model(tmp_path, device="cpu", check_weights=True)


def test_check_weights_counts_a_tensor_in_parts(monkeypatch, tmp_path, tensors):
    monkeypatch.setattr("qwen3fast.checkpoint.checks.CHECKED_AT_ONCE", 7)
    with_bad_numbers(tensors)
    write_checkpoint(tmp_path, small_config(), tensors)
    with pytest.raises(ValueError, match="3 NaN and 0 infinite of 4,656"):
        load_model(tmp_path, device="cpu", check_weights=True)


@pytest.mark.parametrize("kind", [Generator, Embedder, Reranker])
def test_check_weights_reaches_the_loader(text_folder, yes_no_folder, kind):
    shutil.copytree(yes_no_folder, text_folder, dirs_exist_ok=True)
    tensors = tensors_of(randomized(small_config(vocab_size=1100)))
    tensors[NORM][0] = torch.nan
    save_file(tensors, text_folder / SINGLE)
    changes = {"compile": False, "max_seq_len": 64} if kind is Generator else {"max_length": 64}
    kind.from_pretrained(text_folder, device="cpu", **changes)
    with pytest.raises(ValueError, match=r"model\.norm\.weight in model\.safetensors: 1 NaN"):
        kind.from_pretrained(text_folder, device="cpu", check_weights=True, **changes)


def test_check_weights_on_the_command_line(text_folder, capsys):
    tensors = tensors_of(randomized(small_config(vocab_size=1100)))
    tensors[NORM][0] = torch.nan
    save_file(tensors, text_folder / SINGLE)
    assert main(["generate", "x", "--model", str(text_folder), "--compile", "never", "--check-weights"]) == 2
    assert "are not all finite in float32:\n  model.norm.weight in model.safetensors: 1 NaN" in capsys.readouterr().err


# Adapters.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that fits the small model."""
    folder = tmp_path_factory.mktemp("adapter")
    model = randomized(small_config())
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 16}}
    write_adapter(folder, model, modules_of(model, ["q_proj"]), **patterns)
    return folder


@pytest.mark.parametrize(
    ("value", "check", "message"),
    [
        (torch.ones(4, 48, dtype=torch.int8), False, r"lora_A\.weight: dtype I8, expected one of F64"),
        (torch.full((4, 48), torch.nan), True, r"lora_A\.weight: 192 NaN and 0 infinite of 192"),
    ],
)
def test_load_refuses_an_adapter_of_bad_numbers(folder, adapter, tmp_path, value, check, message):
    broken = copy_of(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: value}, broken / "adapter_model.safetensors")
    load_model(folder, device="cpu", adapter=adapter, check_weights=True)
    with pytest.raises(ValueError, match=message):
        load_model(folder, device="cpu", adapter=broken, check_weights=check)


@settings(max_examples=30)
@given(data=st.data())
def test_any_changed_adapter_loads_or_is_refused(good_folder, adapter, tmp_path_factory, data):
    broken = copy_of(adapter, tmp_path_factory.getbasetemp() / "broken-adapter")
    file = broken / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = file.read_bytes()
    header, body = split_file(content) if file.suffix == ".safetensors" else (json.loads(content), b"")
    change_json(data, header)
    text = json.dumps(header).encode()
    file.write_bytes(join_file(text, body) if body else text)
    with suppress(*REFUSALS):
        load_model(good_folder, device="cpu", adapter=broken)


# Whatever the damage.


def load_or_refuse(folder: Path) -> bool:
    """Return whether a checkpoint loads; it must have the model's shape then. Errors must be ours and name the file."""
    try:
        model = load_model(folder, device="cpu", check_weights=True)
    except REFUSALS as error:
        assert folder.name in str(error)
        return False
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in randomized(model.config).named_parameters()
    }
    return True


def copy_of(folder: Path, to: Path) -> Path:
    """A copy to damage, in place of the last one."""
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(folder, to)


FILES = ["config.json", INDEX, "model-00001-of-00002.safetensors"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 48, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")]),
    st.sampled_from(
        ["", "F32", "BF16", "I8", "F4", "qwen3", "Qwen3ForCausalLM", "yarn", "../x", "x.safetensors", "\0"]
    ),
    st.text(max_size=5),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_or_cut_bytes_load_or_are_refused(good_folder, tmp_path_factory, data):
    folder = copy_of(good_folder, tmp_path_factory.getbasetemp() / "bytes")
    file = folder / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    head = min(len(content), 2000)  # where almost all damage is that can be seen
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content)), st.integers(0, head)))
    file.write_bytes(content[:cut])
    load_or_refuse(folder)


def change_json(data: st.DataObject, value: Any) -> None:
    """Put something else at a random place of a JSON value, or take the place away."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            value = inner
            continue
        if data.draw(st.integers(0, 3)) == 0:
            del value[key]
        else:
            value[key] = data.draw(VALUES)
        return


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_json_loads_or_is_refused(good_folder, tmp_path_factory, name, data):
    folder = copy_of(good_folder, tmp_path_factory.getbasetemp() / "json")
    file = folder / name
    content = file.read_bytes()
    header, body = split_file(content) if name.endswith(".safetensors") else (json.loads(content), b"")
    for _ in range(data.draw(st.integers(1, 2))):
        if header:
            change_json(data, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(join_file(text, body) if body else text)
    load_or_refuse(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_any_config_of_experts_loads_or_is_refused(tmp_path_factory, data):
    raw = CheckpointConfig(EXPERTS_CONFIG).to_dict() | {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}
    }
    change_json(data, raw)
    try:
        config = CheckpointConfig.from_dict(raw).model
    except ValueError:
        return
    assert config.longest_context < 10**16
    assert config.num_parameters > 0


def test_a_good_copy_loads(good_folder, tmp_path):
    assert load_or_refuse(copy_of(good_folder, tmp_path / "copy"))
