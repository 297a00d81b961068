"""Checkpoints: read from one file or several, refused when they do not fit, found on disk or on the hub, or made up."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import struct
import sys
import threading
from contextlib import suppress
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, random_ids, randomized, small_config
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import save_file
from torch import Tensor

from qwen3fast import Generator, load_model
from qwen3fast.checkpoint import read_ahead
from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.checkpoint.random_weights import random_model
from qwen3fast.checkpoint.source import TINY_FOLDER, resolve_source
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig

CPU = torch.device("cpu")
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def tensors_of(model: Qwen3) -> dict[str, Tensor]:
    """The tensors that a published checkpoint of this model holds: a tied output projection is left out."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_checkpoint(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], files: int = 1) -> Path:
    """Write config.json and the tensors in Hugging Face layout, dealt out to one or several files."""
    (folder / "config.json").write_text(json.dumps(CheckpointConfig(config).to_dict()), encoding="utf-8")
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    """Write the index of a checkpoint in several files."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]


def assert_same_weights(model: Qwen3, expected: Qwen3) -> None:
    """Both models hold the same names and the same bits."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same(ours[name], tensor)


@pytest.fixture
def config() -> ModelConfig:
    """A small tied config."""
    return small_config()


@pytest.fixture
def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a random model of `config`."""
    return tensors_of(randomized(config))


@pytest.mark.parametrize("files", [1, 2, 5])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}], ids=str)
def test_load_gives_back_what_was_saved(tmp_path, files, changes):
    model = randomized(small_config(**changes))
    write_checkpoint(tmp_path, model.config, tensors_of(model), files)
    assert_same_weights(load_model(tmp_path, device="cpu"), model)


def test_load_gives_a_model_that_computes_the_same(tmp_path):
    model = randomized(small_config())
    write_checkpoint(tmp_path, model.config, tensors_of(model))
    token_BT = random_ids(2, 5)
    assert_same(load_model(tmp_path, device="cpu")(token_BT), model(token_BT))


def test_load_accepts_a_path_as_text(tmp_path, config, tensors):
    write_checkpoint(tmp_path, config, tensors)
    assert load_model(str(tmp_path), device="cpu").config == config


def test_load_shares_the_embedding_of_a_tied_model(tmp_path, config, tensors):
    model = load_model(write_checkpoint(tmp_path, config, tensors), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("files", [1, 2])
def test_load_accepts_a_tied_checkpoint_that_repeats_the_embedding(tmp_path, config, tensors, files):
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    model = load_model(write_checkpoint(tmp_path, config, tensors, files), device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_load_reads_the_output_projection_of_an_untied_model(tmp_path):
    model = randomized(small_config(tie_word_embeddings=False))
    write_checkpoint(tmp_path, model.config, tensors_of(model))
    loaded = load_model(tmp_path, device="cpu")
    assert_same(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_load_refuses_an_untied_checkpoint_without_output_projection(tmp_path, tensors):
    write_checkpoint(tmp_path, small_config(tie_word_embeddings=False), tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing, expected shape \(97, 48\)"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("files", [1, 3])
def test_load_maps_the_files_instead_of_copying(tmp_path, config, tensors, files):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    model = load_model(write_checkpoint(tmp_path, config, tensors, files), device="cpu")
    mapped = []
    for line in maps.read_text().splitlines():
        if str(tmp_path) in line:
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            mapped.append(range(start, end))
    outside = [n for n, p in model.named_parameters() if not any(p.data_ptr() in pages for pages in mapped)]
    assert mapped
    assert outside == []


@pytest.mark.parametrize(("pages", "is_read"), [(10**9, True), (2, False)])
def test_load_has_files_read_ahead_that_fit_the_memory(monkeypatch, tmp_path, config, tensors, pages, is_read):
    write_checkpoint(tmp_path, config, tensors, files=3)
    read = []
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(read_ahead, "populate", lambda files: read.append((files, threading.current_thread())))
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.get, raising=False)
    load_model(tmp_path, device="cpu")
    for thread in threading.enumerate():
        if thread.name == "qwen3fast-read-ahead":
            thread.join()
    assert [files for files, _ in read] == ([sorted(tmp_path.glob("model-*.safetensors"))] if is_read else [])
    assert all(thread is not threading.main_thread() for _, thread in read)


def resident_pages(file: Path) -> list[int]:
    """For each page of a file whether it is in memory, asked of the system."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        found = (ctypes.c_ubyte * -(-pages.size // mmap.PAGESIZE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.size), found) == 0
        del pages
    return [page & 1 for page in found]


@pytest.mark.skipif(sys.platform != "linux", reason="reading ahead is for Linux")
def test_reading_ahead_brings_all_pages_into_memory(tmp_path):
    release = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2])
    if release < (5, 14):
        pytest.skip("needs Linux 5.14")
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 2**14)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if all(resident_pages(file)):
        pytest.skip("this file system keeps its pages in memory")
    read_ahead.populate([file, tmp_path / "no such file"])
    assert all(resident_pages(file))


def test_load_never_writes_to_the_files(tmp_path, config, tensors):
    model = load_model(write_checkpoint(tmp_path, config, tensors), device="cpu")
    model.model.norm.weight.zero_()
    assert_same(load_model(tmp_path, device="cpu").model.norm.weight, tensors[NORM])


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.bfloat16), ("float16", torch.float16)])
def test_load_dtype(tmp_path, tensors, asked, dtype):
    in_bfloat16 = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, small_config(dtype=torch.bfloat16), in_bfloat16)
    assert {p.dtype for p in load_model(tmp_path, device="cpu", dtype=asked).parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_converts_each_value(tmp_path, config, tensors, dtype):
    model = load_model(write_checkpoint(tmp_path, config, tensors), device="cpu", dtype=dtype)
    for name, parameter in model.named_parameters():
        assert_same(parameter, tensors[name].to(dtype))


def test_load_refuses_an_unknown_dtype(tmp_path, config, tensors):
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="dtype 'int4' is not supported; supported: auto, bfloat16"):
        load_model(tmp_path, device="cpu", dtype="int4")


@pytest.mark.parametrize("files", [1, 2])
def test_load_needs_no_gradients(tmp_path, config, tensors, files):
    model = load_model(write_checkpoint(tmp_path, config, tensors, files), device="cpu")
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("files", [1, 2])
def test_load_names_a_missing_tensor(tmp_path, config, tensors, files):
    del tensors[NORM]
    write_checkpoint(tmp_path, config, tensors, files)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: missing, expected shape \(48,\)"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("files", [1, 2])
def test_load_names_an_unexpected_tensor(tmp_path, config, tensors, files):
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(3)
    write_checkpoint(tmp_path, config, tensors, files)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight in model.*safetensors: unexpected"):
        load_model(tmp_path, device="cpu")


def test_load_does_not_drop_biases_that_the_config_does_not_announce(tmp_path, config):
    tensors = tensors_of(randomized(small_config(attention_bias=True)))
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.bias in model\.safetensors: unexpected"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("shape", [(47,), (48, 1), ()])
def test_load_names_a_misshaped_tensor(tmp_path, config, tensors, files, shape):
    tensors[NORM] = torch.zeros(shape)
    write_checkpoint(tmp_path, config, tensors, files)
    with pytest.raises(ValueError, match=r"model\.norm\.weight in model.*: shape \(.*\), expected \(48,\)"):
        load_model(tmp_path, device="cpu")


def test_load_names_all_problems_in_one_message(tmp_path, config, tensors):
    tensors[NORM] = torch.zeros(5)
    tensors["surplus"] = torch.zeros(1)
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="do not fit its config") as error:
        load_model(tmp_path, device="cpu")
    text = str(error.value)
    assert [text.count(name) for name in (NORM, "surplus", "layers.1.self_attn.q_norm")] == [1, 1, 1]


def test_load_shortens_a_long_list_of_problems(tmp_path, config, tensors):
    kept = {EMBEDDING: tensors[EMBEDDING]}
    write_checkpoint(tmp_path, config, kept)
    with pytest.raises(ValueError, match=rf"\.\.\. and {len(tensors) - 1 - 8} more"):
        load_model(tmp_path, device="cpu")


def test_load_names_a_tensor_that_the_index_promises_in_vain(tmp_path, config, tensors):
    write_checkpoint(tmp_path, config, tensors, files=2)
    index = read_index(tmp_path)
    other_file = next(file for file in index.values() if file != index[NORM])
    write_index(tmp_path, {**index, NORM: other_file})
    message = rf"model\.norm\.weight: the index names {other_file}, which does not hold it"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, device="cpu")


def test_load_names_a_file_that_is_missing(tmp_path, config, tensors):
    write_checkpoint(tmp_path, config, tensors, files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors, named in .*index\.json"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("place", ["../model.safetensors", "sub/model.safetensors", "/etc/passwd"])
def test_load_refuses_an_index_that_leaves_the_folder(tmp_path, config, tensors, place):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_checkpoint(folder, config, tensors, files=2)
    save_file({NORM: tensors[NORM]}, tmp_path / "model.safetensors")
    write_index(folder, {**read_index(folder), NORM: place})
    with pytest.raises(ValueError, match=f"{place!r} must be a file name without folders"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("weight_map", [None, {}, ["model.safetensors"]])
def test_load_refuses_an_index_without_a_weight_map(tmp_path, config, tensors, weight_map):
    write_checkpoint(tmp_path, config, tensors, files=2)  # a whole file would be read without its index
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match=r"index\.json has no 'weight_map'"):
        load_model(tmp_path, device="cpu")


def cut_in_half(content: bytes) -> bytes:
    """A download that stopped."""
    return content[: len(content) // 2]


def cut_in_the_header(content: bytes) -> bytes:
    """A download that stopped early."""
    return content[:20]


def promise_a_huge_header(content: bytes) -> bytes:
    """A first number that is wrong."""
    return struct.pack("<Q", 2**60) + content[8:]


@pytest.mark.parametrize("damage", [cut_in_half, cut_in_the_header, promise_a_huge_header, lambda _: b""])
def test_load_names_a_damaged_file(tmp_path, config, tensors, damage):
    file = write_checkpoint(tmp_path, config, tensors) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        load_model(tmp_path, device="cpu")


def test_load_without_weights_says_what_it_expects(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(CheckpointConfig(config).to_dict()), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"holds no weights; expected model\.safetensors or model\."):
        load_model(tmp_path, device="cpu")


def test_load_without_a_config_says_what_it_expects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json not found"):
        load_model(tmp_path, device="cpu")


def test_load_refuses_the_config_before_it_reads_weights(tmp_path, config):
    settings = {**CheckpointConfig(config).to_dict(), "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match="hidden_act='gelu' is not supported"):
        load_model(tmp_path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_load_refuses_a_device_that_is_not_there(tmp_path, config, tensors):
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"device 'cuda' was asked for, but .* use device='cpu'"):
        load_model(tmp_path, device="cuda")


def test_any_cuda_device_that_is_there_can_be_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device 'cuda:2' was asked for, but this PyTorch sees 2 CUDA device\(s\)"):
        load_model("tiny", device="cuda:2")


# Where a name leads.


def forbid_downloads(monkeypatch) -> None:
    """Make any use of the hub an error."""

    def fail(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr("qwen3fast.checkpoint.source.snapshot_download", fail)


def test_source_tiny_is_the_shipped_folder(monkeypatch):
    forbid_downloads(monkeypatch)
    assert resolve_source("tiny") == TINY_FOLDER


def test_source_existing_folder_is_itself(monkeypatch, tmp_path):
    forbid_downloads(monkeypatch)
    assert resolve_source(tmp_path) == tmp_path


def test_source_existing_folder_wins_over_a_hub_id(monkeypatch, tmp_path):
    forbid_downloads(monkeypatch)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_source("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


def test_source_expands_the_home_folder(monkeypatch, tmp_path):
    forbid_downloads(monkeypatch)
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/checkpoint") == tmp_path / "checkpoint"


def test_source_file_is_refused(monkeypatch, tmp_path):
    forbid_downloads(monkeypatch)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file; expected the folder"):
        resolve_source(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no.gguf", "no file './no.gguf'; expected a local folder"),
        ("", "the name of the model is empty; expected a local folder"),
        ("adapter", "adapter holds a LoRA adapter; load its base model with adapter='adapter'"),
    ],
)
def test_sources_that_are_something_else_are_named(monkeypatch, name, message, tmp_path):
    forbid_downloads(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match=message):
        resolve_source(name)


def test_gguf_in_capitals_is_gguf(tmp_path):
    file = tmp_path / "model.GGUF"
    file.touch()
    assert resolve_source(file) == file


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", "a/b/c", "Qwen/Qwen3 0.6B", "../no", "./no"])
def test_source_that_is_nothing_is_refused(monkeypatch, name, tmp_path):
    forbid_downloads(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder '{name}'; expected a local folder, a hub id such as"):
        resolve_source(name)


def test_source_that_the_hub_would_not_accept_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'owner/a--b' is neither .*\(HFValidationError: "):
        resolve_source("owner/a--b")


@pytest.fixture
def hub_calls(monkeypatch, tmp_path) -> list[tuple]:
    """A hub that answers every request with a folder and notes what was asked."""
    (tmp_path / "model.safetensors").touch()
    calls = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("qwen3fast.checkpoint.source.snapshot_download", snapshot_download)
    return calls


def test_hub_answer_is_the_folder(hub_calls, tmp_path):
    assert resolve_source("Qwen/Qwen3-0.6B") == tmp_path


@pytest.mark.parametrize("revision", [None, "main", "c1899de289a04d12100db370d81485cdf75e47ca"])
def test_hub_is_asked_for_the_name_and_revision(hub_calls, revision):
    resolve_source("Qwen/Qwen3-0.6B", revision)
    # Once for the model, and once more for older files of a tokenizer where there is no tokenizer.json.
    assert {(name, asked) for name, asked, _ in hub_calls} == {("Qwen/Qwen3-0.6B", revision)}


def test_hub_revision_is_passed_on_by_load_model(hub_calls, tmp_path, config, tensors, caplog):
    write_checkpoint(tmp_path, config, tensors)
    load_model("Qwen/Qwen3-0.6B", device="cpu", revision="v1")
    assert hub_calls[0][:2] == ("Qwen/Qwen3-0.6B", "v1")
    assert caplog.text == ""


def test_a_revision_of_what_is_local_is_said_to_be_ignored_once(tmp_path, config, tensors, caplog):
    write_checkpoint(tmp_path, config, tensors)
    for _ in range(2):
        Generator.from_pretrained(tmp_path, revision="v1", max_seq_len=16, compile=False).close()
    [record] = caplog.records
    assert record.message.startswith(f"revision 'v1' is ignored: {tmp_path} is local")


@pytest.mark.parametrize(
    ("file", "is_asked_for"),
    [
        ("config.json", True),
        ("generation_config.json", True),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("chat_template.jinja", True),
        ("model.safetensors", True),
        ("model.safetensors.index.json", True),
        ("model-00001-of-00005.safetensors", True),
        ("pytorch_model.bin", False),
        ("model-00001-of-00005.gguf", False),
        ("original/model.safetensors", False),
        ("modeling_custom.py", False),
    ],
)
def test_hub_is_asked_for_the_files_of_a_qwen3_only(hub_calls, file, is_asked_for):
    resolve_source("Qwen/Qwen3-0.6B")
    assert any(fnmatch(file, pattern) for pattern in hub_calls[0][2]) == is_asked_for


@pytest.fixture
def gguf_hub(monkeypatch, tmp_path):
    """A hub with GGUF files alone, which gives those that match the patterns; it notes what was asked."""
    names = ["x-Q8_0.gguf", "x-Q4_K_M.gguf", "x-Q4_K_S.gguf", "x-bf16.gguf"]
    names += ["Q6_K/x-00001-of-00002.gguf", "Q6_K/x-00002-of-00002.gguf"]
    calls = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision))
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("qwen3fast.checkpoint.source.snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("Q8_0", "x-Q8_0.gguf"),
        ("q8_0", "x-Q8_0.gguf"),
        ("Q4_K_M", "x-Q4_K_M.gguf"),
        ("BF16", "x-bf16.gguf"),
        ("Q6_K", "Q6_K/x-00001-of-00002.gguf"),
        ("x-Q4_K_S.gguf", "x-Q4_K_S.gguf"),
    ],
)
def test_a_gguf_file_on_the_hub_is_named_by_its_format(gguf_hub, tmp_path, format, file):
    (tmp_path / "x-Q2_K.gguf").touch()  # downloaded earlier
    assert resolve_source(f"owner/x-GGUF:{format}", "v1") == tmp_path / file
    assert gguf_hub == [("owner/x-GGUF", "v1")]


def test_a_format_of_several_gguf_files_or_of_none_is_refused(gguf_hub):
    with pytest.raises(
        ValueError, match=r"several files '\*Q4_K\*\.gguf': x-Q4_K_M.gguf, x-Q4_K_S.gguf; pass owner/x:x-Q4"
    ):
        resolve_source("owner/x:Q4_K")
    with pytest.raises(FileNotFoundError, match=r"'owner/x' has no file '\*Q3_K\*\.gguf' on the hub"):
        resolve_source("owner/x:Q3_K")


def http_error() -> HfHubHTTPError:
    """Return the hub's answer for an unknown name."""
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, "404: not there")
    return error


@pytest.mark.parametrize(
    "error",
    [http_error(), LocalEntryNotFoundError("no copy"), OfflineModeIsEnabled("offline"), OSError("disk full")],
    ids=lambda error: type(error).__name__,
)
def test_hub_error_becomes_file_not_found(monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr("qwen3fast.checkpoint.source.snapshot_download", snapshot_download)
    with pytest.raises(
        FileNotFoundError, match=f"'a/b' at revision 'v1' is neither .*{type(error).__name__}"
    ) as raised:
        resolve_source("a/b", "v1")
    assert raised.value.__cause__ is error


# Models made up.


def test_random_model_is_the_same_for_the_same_seed():
    models = [random_model(small_config(), CPU, torch.float32, seed=3) for _ in range(2)]
    assert_same_weights(*models)


def test_random_model_differs_for_another_seed():
    first, second = (random_model(small_config(), CPU, torch.float32, seed).state_dict() for seed in (0, 1))
    equal = {name for name in first if torch.equal(first[name], second[name])}
    assert equal == {name for name in first if "norm" in name}


def test_random_model_matrices_differ_from_each_other():
    matrices = [p.flatten()[:50] for p in random_model(small_config(), CPU, torch.float32).parameters() if p.dim() == 2]
    assert len({tuple(values.tolist()) for values in matrices}) == len(matrices)


def test_random_model_has_the_promised_values():
    model = random_model(small_config(attention_bias=True), CPU, torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            weight = 1.5 if "q_norm" in name or "k_norm" in name else 1.0
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else weight}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_model_is_complete(tied, dtype):
    model = random_model(small_config(tie_word_embeddings=tied), CPU, dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", dtype)}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_random_model_fills_a_tensor_larger_than_its_pool(monkeypatch):
    monkeypatch.setattr("qwen3fast.checkpoint.random_weights.POOL_SIZE", 1000)
    weight = random_model(small_config(), CPU, torch.float32).model.embed_tokens.weight.flatten()
    assert_same(weight[:1000], weight[1000:2000])
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("source", "seed"), [("random:0.6b", 0), ("random:0.6B:7", 7)])
def test_load_model_random_takes_shape_and_seed_from_the_name(monkeypatch, source, seed):
    seen = []
    monkeypatch.setattr("qwen3fast.checkpoint.loaders.random_model", lambda *args: seen.append(args))
    with suppress(AttributeError):  # there is no model to go on with
        load_model(source, device="cpu")
    assert seen == [(ModelConfig.named("0.6b"), CPU, torch.bfloat16, seed, None, None)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("random:7b", "unknown Qwen3 shape '7b'"),
        ("random:", "unknown Qwen3 shape ''"),
        ("random:0.6b:x", "'random:0.6b:x': the seed must be a whole number"),
        ("random:0.6b:-1", "the seed must be a whole number"),
        ("random:0.6b:1:2", "the seed must be a whole number"),
    ],
)
def test_load_model_random_refuses_a_bad_name(source, message):
    with pytest.raises(ValueError, match=message):
        load_model(source, device="cpu")
