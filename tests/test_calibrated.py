"""4 bits by default: calibrated on the first load of a checkpoint, kept in the cache folder, read by later loads."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_ids, randomized, small_config, write_text_checkpoint
from gguf_files import write_gguf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_library import BUILT
from test_lora import modules_of, write_adapter

import qwen3fast
from qwen3fast import Classifier, Embedder, Generator, Reranker
from qwen3fast import calibrated as calibrated_module
from qwen3fast.calibrated import CalibratedLoader, is_to_be_calibrated
from qwen3fast.checkpoint import kept as kept_module
from qwen3fast.checkpoint.choices import choose_device
from qwen3fast.checkpoint.kept import KeptCopy, kept_root
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.checkpoint.metadata import read_checkpoint_config, read_tokenizer
from qwen3fast.checkpoint.save import stored
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main
from qwen3fast.engine import own_text
from qwen3fast.model import Qwen3
from qwen3fast.quantization.calibrate import CALIBRATED
from qwen3fast.quantization.convert import formats_of

CPU = torch.device("cpu")
load_model = partial(qwen3fast.load_model, calibrate=False)
pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, with calibration by default as users have it. Returns: the folder of copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QWEN3FAST_CALIBRATE")
    monkeypatch.setattr(calibrated_module, "TOKENS", 64)
    monkeypatch.setattr(own_text, "OWN_WINDOW", 32)
    return tmp_path / "cache" / "qwen3fast" / "calibrated"


@pytest.fixture
def runs(monkeypatch):
    """The formats of the calibrations that have run."""
    runs, real = [], calibrated_module.quantize_calibrated

    def quantize_calibrated(model, token_BT, name, progress):
        runs.append(name)
        real(model, token_BT, name, progress)

    monkeypatch.setattr(calibrated_module, "quantize_calibrated", quantize_calibrated)
    return runs


@pytest.fixture
def checkpoint(tmp_path, tokenizer_folder):
    """A checkpoint of random weights, small enough to be calibrated at once."""
    config = small_config(vocab_size=1024, hidden_size=64, intermediate_size=96)
    return write_text_checkpoint(tmp_path / "checkpoint", randomized(config), tokenizer_folder)


def loaded(source, calibrate=None, quantization="int4", **options) -> Qwen3:
    """Return the model of `Generator.from_pretrained`."""
    defaults = {"device": "cpu", "compile": False, "max_seq_len": 64}
    arguments = {**defaults, "quantization": quantization, "calibrate": calibrate, **options}
    with Generator.from_pretrained(source, **arguments) as generator:
        return generator.model


@torch.no_grad()
def logits(model):
    return model(random_ids(1, 12, vocab_size=model.config.vocab_size))


def is_same(a, b):
    """Return whether two models have the same weights, bit by bit, as files would hold them."""
    a, b = ([stored(name, tensor) for name, tensor in model.named_parameters()] for model in (a, b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def visible(folder):
    """Return the names in a folder, without locks and temporary folders."""
    return sorted(entry.name for entry in folder.glob("*") if not entry.name.startswith("."))


@pytest.mark.parametrize("name", CALIBRATED)
def test_the_first_load_calibrates_and_the_second_one_reads_what_is_kept(name, cache, runs, caplog):
    caplog.set_level(logging.INFO, "qwen3fast.calibrated")
    first = loaded("tiny", quantization=name)
    assert runs == [name] and formats_of(first) == [name]
    (copy,) = visible(cache)
    assert f"calibrating {name}, once; kept in {cache / copy}" in caplog.text
    caplog.clear()
    second = loaded("tiny", quantization=name)
    assert runs == [name] and visible(cache) == [copy]
    assert [record.getMessage() for record in caplog.records] == [
        f"{TINY_FOLDER}: calibrated {name}, kept in {cache / copy}"
    ]
    assert is_same(first, second) and torch.equal(logits(first), logits(second))
    assert copy.startswith("tiny-") and not list(cache.glob(".tiny-*-*-*"))
    assert read_checkpoint_config(cache / copy).calibration_tokens == 64
    assert not is_same(first, load_model("tiny", "cpu", quantization=name))


def test_the_tokenizer_and_the_preset_are_the_source_s(cache):
    for _ in range(2):
        with Generator.from_pretrained("tiny", device="cpu", quantization="int4", compile=False) as generator:
            assert generator.tokenizer.encode("Hello") == read_tokenizer(TINY_FOLDER).encode("Hello")
            assert generator.default_params.top_k == json.loads(
                (TINY_FOLDER / "generation_config.json").read_text("utf-8")
            ).get("top_k", generator.default_params.top_k)


@pytest.mark.parametrize("is_off", ["argument", "environment", "int8", "no format"])
def test_without_calibration_weights_are_the_plain_format_s(is_off, cache, runs, monkeypatch):
    name = {"int8": "int8", "no format": None}.get(is_off, "int4")
    if is_off == "environment":
        monkeypatch.setenv("QWEN3FAST_CALIBRATE", "0")
    ours = loaded("tiny", False if is_off == "argument" else None, name)
    assert is_same(ours, load_model("tiny", "cpu", quantization=name))
    assert runs == [] and not cache.exists()


def test_an_unknown_value_in_the_environment_is_refused(cache, monkeypatch):
    monkeypatch.setenv("QWEN3FAST_CALIBRATE", "false")
    with pytest.raises(ValueError, match="QWEN3FAST_CALIBRATE must be '1' or '0', or unset, got 'false'"):
        loaded("tiny", None)


def test_true_calibrates_although_the_environment_says_no(cache, runs, monkeypatch):
    monkeypatch.setenv("QWEN3FAST_CALIBRATE", "0")
    loaded("tiny", True)
    assert runs == ["int4"]


def change_weights(folder):
    file = folder / "model.safetensors"
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))


def change_template(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text("utf-8") + "\n", encoding="utf-8")


def change_config(folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "rope_theta": 20_000.0}), encoding="utf-8")


@pytest.mark.parametrize("change", [change_weights, change_template, change_config])
def test_a_source_that_changes_is_calibrated_again(change, checkpoint, cache, runs, caplog):
    caplog.set_level(logging.INFO, "qwen3fast.checkpoint.kept")
    loaded(checkpoint)
    change(checkpoint)
    loaded(checkpoint)
    loaded(checkpoint)
    assert len(runs) == 2 and len(visible(cache)) == 1  # the older copy is gone
    assert caplog.text.count("is deleted: a newer copy replaces it") == 1


def test_copies_that_no_load_reads_are_deleted_in_time(checkpoint, cache, caplog):
    caplog.set_level(logging.INFO, "qwen3fast.checkpoint.kept")
    days = kept_module.UNREAD_DAYS * 24 * 3600
    loaded("tiny")
    (tiny,) = visible(cache)
    loaded("tiny", quantization="uint4")
    unread, read = [cache / name for name in sorted(visible(cache), key=tiny.__ne__)]
    left = cache / ".some-copy-written"  # by a killed process
    left.mkdir()
    for folder in (unread, read, left):
        os.utime(folder, (time.time() - days - 60,) * 2)
    loaded("tiny", quantization="uint4")
    assert unread.exists() and caplog.text == ""  # only writing deletes
    loaded(checkpoint)
    assert not unread.exists() and not left.exists()
    assert read.exists() and len(visible(cache)) == 2
    assert f"{unread} is deleted: no load has read it for 90 days" in caplog.text


def test_copies_are_of_a_format_a_dtype_a_kind_of_device_and_a_version(checkpoint, cache, monkeypatch):
    def place(dtype="auto", name="int4", device="cpu"):
        return CalibratedLoader(checkpoint, Loader(torch.device(device), dtype, name)).place().folder.name

    places = {place(), place("bfloat16"), place(name="uint4"), place(device="cuda")}
    monkeypatch.setattr(kept_module, "VERSION", kept_module.VERSION + 1)
    assert len(places) == 4 and place() not in places
    assert place("float32") == place()  # the checkpoint's own
    before = place()
    (checkpoint / "generation_config.json").write_text('{"top_k": 7}', encoding="utf-8")
    assert place() == before  # sampling of replies has no part in it


def test_links_count_as_what_they_point_at(checkpoint, cache, tmp_path):
    """As the hub's snapshots are made: the revision's folder has links to files that are named by their content."""
    blob = tmp_path / "models--Qwen--Some-0.6B" / "blobs" / "1234"
    blob.parent.mkdir(parents=True)
    (checkpoint / "model.safetensors").rename(blob)
    places = []
    for revision in ("a1", "b2"):
        snapshot = blob.parent.parent / "snapshots" / revision
        shutil.copytree(checkpoint, snapshot)
        (snapshot / "model.safetensors").symlink_to(blob)
        places.append(KeptCopy.of(snapshot))
    assert places[0] == places[1] and places[0].folder.name.startswith("Qwen--Some-0.6B-")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def spoil_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [truncate, remove_weights, spoil_config])
def test_a_damaged_copy_is_made_again_with_one_warning(damage, checkpoint, cache, runs, caplog):
    first = loaded(checkpoint)
    damage(cache / visible(cache)[0])
    assert is_same(loaded(checkpoint), first) and len(runs) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and f"the calibrated copy of {checkpoint} is damaged and is made again" in warnings[0]
    assert is_same(loaded(checkpoint), first) and len(runs) == 2


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_disk_that_fills_up_leaves_the_weights_in_memory(error, checkpoint, cache, runs, caplog, monkeypatch):
    def save_file(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("qwen3fast.checkpoint.save.save_file", save_file)
        first = loaded(checkpoint)
    assert "the calibrated weights cannot be kept" in caplog.text and "No space left" in caplog.text
    assert visible(cache) == [] and not list(cache.rglob("*.safetensors"))
    assert is_same(loaded(checkpoint), first) and len(runs) == 2 and len(visible(cache)) == 1


def block_cache(cache, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in its place", encoding="utf-8")
    return "cannot be written"


def fill_disk(cache, monkeypatch):
    monkeypatch.setattr(kept_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=kept_module.SPARE))
    return "has 0.1 GB of free space, and 0.1 GB are needed"


def lose_home(cache, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    return "Could not determine home directory"


@pytest.mark.parametrize("trouble", [block_cache, fill_disk, lose_home])
def test_where_nothing_can_be_kept_only_true_calibrates(trouble, checkpoint, cache, runs, caplog, monkeypatch):
    message = trouble(cache, monkeypatch)
    ours = loaded(checkpoint)
    assert is_same(ours, load_model(checkpoint, "cpu", quantization="int4")) and runs == []
    assert message in caplog.text and "int4 without calibration (set XDG_CACHE_HOME" in caplog.text
    assert not is_same(loaded(checkpoint, True), ours) and runs == ["int4"]
    assert "calibrating for this load alone" in caplog.text


@pytest.mark.parametrize("place", ["own_text", "quantize_calibrated"])
def test_ctrl_c_leaves_nothing_behind(place, checkpoint, cache, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrated_module, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            loaded(checkpoint)
    assert visible(cache) == [] and not list(cache.rglob("*.safetensors"))
    loaded(checkpoint)
    assert len(visible(cache)) == 1


def test_ctrl_c_while_writing_leaves_nothing_behind(checkpoint, cache, monkeypatch):
    def save_file(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3fast.checkpoint.save.save_file", save_file)
    with pytest.raises(KeyboardInterrupt):
        loaded(checkpoint)
    assert visible(cache) == [] and not list(cache.rglob("*.safetensors"))


def test_what_a_killed_process_left_is_removed(checkpoint, cache):
    kept = CalibratedLoader(checkpoint, Loader(CPU, quantization="int4")).place()
    left, others = (cache / f".{name}-x1y2" for name in (kept.folder.name, "other-0123"))
    for folder in (left, others):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(8))
    loaded(checkpoint)
    assert not left.exists() and others.exists() and visible(cache) == [kept.folder.name]


def test_a_second_load_waits_for_the_first_and_reads_its_result(checkpoint, cache, runs):
    first = loaded(checkpoint)
    kept = CalibratedLoader(checkpoint, Loader(CPU, quantization="int4")).place()
    aside = cache.parent / "aside"
    kept.folder.rename(aside)  # as before the first has written it
    models = []
    thread = threading.Thread(target=lambda: models.append(loaded(checkpoint)))
    with kept.locked():
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and models == []
        aside.rename(kept.folder)
    thread.join(60)
    assert runs == ["int4"] and is_same(models[0], first)


LOAD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from qwen3fast import Generator, calibrated
from qwen3fast.engine import own_text
calibrated.TOKENS, own_text.OWN_WINDOW = 64, 32
Generator.from_pretrained(sys.argv[1], device="cpu", quantization="int4", compile=False, max_seq_len=64).close()
"""


@pytest.mark.skipif(not BUILT.is_file(), reason="no compiler for the C++ operations on this machine")
def test_two_processes_calibrate_once(checkpoint, cache, caplog):
    """And the second one reads the weights that the first one has written."""
    caplog.set_level(logging.INFO, "qwen3fast.calibrated")
    cache.parent.mkdir(mode=0o700, parents=True)
    shutil.copy(BUILT, cache.parent)
    command = [sys.executable, "-c", LOAD, str(checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        loaded(checkpoint)
        log = other.communicate(timeout=120)[0]
    assert other.returncode == 0
    assert (log + caplog.text).count("calibrating int4, once") == 1
    assert (log + caplog.text).count("calibrated int4, kept in") == 1


def test_the_command_writes_what_the_first_load_gives(checkpoint, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrated_module, "TOKENS", 128)
    options = ["--calibration-tokens", "128", "--device", "cpu", "--output", str(tmp_path / "q")]
    assert main(["quantize", "--model", str(checkpoint), *options]) == 0
    assert is_same(load_model(tmp_path / "q", "cpu"), loaded(checkpoint))


def test_weights_that_are_not_finite_are_not_calibrated(tmp_path, tokenizer_folder, cache, runs, caplog):
    model = randomized(small_config(vocab_size=1024, hidden_size=64, intermediate_size=96))
    model.model.norm.weight[3] = torch.nan
    checkpoint = write_text_checkpoint(tmp_path / "nan", model, tokenizer_folder)
    ours = loaded(checkpoint)
    assert formats_of(ours) == ["int4"] and runs == [] and visible(cache) == []
    assert "int4 without calibration: the model's logits are not finite" in caplog.text
    with pytest.raises(ValueError, match="logits are not finite"):
        loaded(checkpoint, True)


@pytest.mark.parametrize("place", ["load", "own_text", "quantize_calibrated"])
def test_where_a_device_s_memory_is_too_small_only_true_raises(place, checkpoint, cache, caplog, monkeypatch):
    real = Loader.load

    def run_out(model, *args, **kwargs):
        if place == "load" and model.quantization is not None:
            return real(model, *args)
        if place != "load":
            model.model.layers[0] = None  # half done
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Loader if place == "load" else calibrated_module, place, run_out)
    assert is_same(loaded(checkpoint), load_model(checkpoint, "cpu", quantization="int4")) and visible(cache) == []
    assert "int4 without calibration: CUDA out of memory" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        loaded(checkpoint, True)


def untied_checkpoint(tmp_path, tokenizer_folder, has_head=True):
    """A checkpoint with an untied output projection, or with none, like an embedding model."""
    config = small_config(vocab_size=1024, hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    folder = write_text_checkpoint(tmp_path / "untied", randomized(config), tokenizer_folder)
    if not has_head:
        file = folder / "model.safetensors"
        save_file({name: x for name, x in load_file(file).items() if name != "lm_head.weight"}, file)
    return folder


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("random:0.6b", {}, "random weights are not calibrated"),
        ("tiny", {"quantization": "int8"}, "only int4 and uint4 are calibrated, not quantization='int8'"),
        ("tiny", {"quantization": None}, "only int4 and uint4 are calibrated, not quantization=None"),
        ("quantized", {}, "quantized is quantized already"),
        ("experts", {}, "experts are not calibrated"),
        ("no head", {}, "has no output projection, without which it writes no text"),
    ],
)
def test_true_is_refused_where_it_is_impossible(source, options, message, tmp_path, tokenizer_folder, cache):
    if source == "quantized":
        source = tmp_path / source
        assert main(["quantize", "--model", "tiny", "--no-calibrate", "--output", str(source)]) == 0
    elif source == "experts":
        config = small_config(vocab_size=1024, hidden_size=64, intermediate_size=96, **EXPERTS)
        source = write_text_checkpoint(tmp_path / source, randomized(config), tokenizer_folder)
    elif source == "no head":
        source = untied_checkpoint(tmp_path, tokenizer_folder, has_head=False)
        options = {"output_projection": False}
    with pytest.raises(ValueError, match=f"calibrate=True is impossible: .*{message}"):
        qwen3fast.load_model(source, "cpu", calibrate=True, **{"quantization": "int4", **options})
    if source != "random:0.6b":  # by default, it is loaded as it was before
        qwen3fast.load_model(source, "cpu", **{"quantization": "int4", **options})
    assert not cache.exists()


def test_split_models_are_not_calibrated(cache):
    assert not is_to_be_calibrated(None, TINY_FOLDER, "int4", CPU, is_split=True)
    with pytest.raises(ValueError, match="split over processes is not calibrated"):
        is_to_be_calibrated(True, TINY_FOLDER, "int4", CPU, is_split=True)


def test_large_models_are_calibrated_by_default_on_gpus_alone(cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "qwen3fast.calibrated")
    assert is_to_be_calibrated(None, TINY_FOLDER, "int4", CPU) and caplog.text == ""
    size = read_checkpoint_config(TINY_FOLDER).model.num_parameters
    monkeypatch.setattr(calibrated_module, "MAX_PARAMETERS_ON_CPU", size - 1)
    assert not is_to_be_calibrated(None, TINY_FOLDER, "int4", CPU)
    assert "calibrate=True does it once" in caplog.text and "`python -m qwen3fast quantize`" in caplog.text
    assert is_to_be_calibrated(True, TINY_FOLDER, "int4", CPU)
    assert is_to_be_calibrated(None, TINY_FOLDER, "int4", torch.device("cuda"))


@pytest.mark.parametrize("value", ["yes", 1, [0]])
def test_other_values_are_refused(value, cache):
    with pytest.raises(ValueError, match="calibrate must be True, False or None, got"):
        loaded("tiny", value)


def test_gguf_files_with_plain_weights_are_calibrated(tmp_path, tokenizer_folder, cache, runs):
    plain, packed = (tmp_path / f"{kind}.gguf" for kind in ("plain", "packed"))
    model = randomized(small_config(vocab_size=1024, hidden_size=64, intermediate_size=96))
    write_gguf(plain, model, "F32", tokenizer_folder=tokenizer_folder)
    write_gguf(packed, model, "Q4_0", tokenizer_folder=tokenizer_folder)
    assert is_same(loaded(plain), loaded(plain)) and runs == ["int4"]
    assert [name.startswith("plain-") for name in visible(cache)] == [True]
    loaded(packed)
    with pytest.raises(ValueError, match=r"packed\.gguf is quantized already"):
        loaded(packed, True)
    assert runs == ["int4"]


def test_all_parts_of_a_gguf_file_count(tmp_path, cache):
    parts = [tmp_path / f"some[1]-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(bytes(8))
    before = KeptCopy.of(parts[0])
    parts[1].write_bytes(bytes(9))
    assert KeptCopy.of(parts[0]) != before


@pytest.mark.parametrize("name", CALIBRATED)
def test_info_tells_where_the_calibrated_copy_lies(name, cache, monkeypatch, capsys):
    def line(*options):
        assert main(["info", *options]) == 0
        return next((x.strip() for x in capsys.readouterr().out.splitlines() if x.startswith("  calibration")), "")

    of_tiny = ["--model", "tiny", "--quantization", name]
    first = "by the first load, which keeps it in"
    assert f"for {choose_device('auto')}, {first} {kept_root()}" in line(*of_tiny)
    loaded("tiny", quantization=name)
    assert f"for cpu, kept in {cache / visible(cache)[0]}" in line(*of_tiny, "--device", "cpu")
    with monkeypatch.context() as patch:  # the copy is of one kind of device; "auto" means another one here
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert f"for cuda, {first} {kept_root()}" in line(*of_tiny)
    assert line("--model", str(cache / visible(cache)[0])).endswith("on 64 tokens")
    assert line("--model", "random:0.6b", "--quantization", name).endswith("none by default")
    assert line("--model", "tiny", "--quantization", "int8") == line("--model", "tiny") == ""


@pytest.mark.parametrize(("options", "expected"), [([], None), (["--no-calibrate"], False)])
def test_the_command_line_passes_the_choice_on(options, expected, monkeypatch):
    given = []

    def from_pretrained(source, **arguments):
        given.append(arguments["calibrate"])
        raise ValueError("far enough")

    monkeypatch.setattr(Generator, "from_pretrained", from_pretrained)
    for kind in (Embedder, Reranker):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    sources = ["generate", "hello", "--model"], ["serve", "--model"], ["serve", "--embedder"], ["serve", "--reranker"]
    for command in sources:
        assert main([*command, "tiny", "--quantization", "int4", *options]) == 2
    assert given == [expected] * len(sources)


def test_a_bare_model_is_the_generator_s(checkpoint, cache, runs):
    ours = qwen3fast.load_model(checkpoint, "cpu", quantization="int4")
    assert is_same(ours, loaded(checkpoint)) and runs == ["int4"] and len(visible(cache)) == 1
    plain = qwen3fast.load_model(checkpoint, "cpu", quantization="int4", calibrate=False)
    assert is_same(plain, load_model(checkpoint, "cpu", quantization="int4")) and not is_same(plain, ours)


def test_without_a_tokenizer_no_text_begins_as_a_conversation(tmp_path, cache, runs):
    config = small_config(vocab_size=1024, hidden_size=64, intermediate_size=96)
    (tmp_path / "no tokenizer").mkdir()
    bare = write_text_checkpoint(tmp_path / "bare", randomized(config), tmp_path / "no tokenizer")
    assert formats_of(qwen3fast.load_model(bare, "cpu", quantization="int4")) == ["int4"] and runs == ["int4"]


def test_adapters_are_merged_before_calibration(checkpoint, cache, runs, tmp_path, tokenizer_folder):
    base = load_model(checkpoint, "cpu")
    adapters = [tmp_path / name for name in ("a", "b")]
    for rank, folder in enumerate(adapters, start=2):
        write_adapter(folder, base, modules_of(base, ["q_proj"]), rank=rank, r=rank)
    models = [loaded(checkpoint, adapter=adapter) for adapter in (*adapters, *adapters, None)]
    assert len(runs) == len(visible(cache)) == 3  # of two adapters, and of the base
    assert is_same(models[0], models[2]) and is_same(models[1], models[3])
    merged = write_text_checkpoint(
        tmp_path / "merged", load_model(checkpoint, "cpu", adapter=adapters[0]), tokenizer_folder
    )
    assert is_same(loaded(merged), models[0]) and not is_same(models[0], models[1])
    write_adapter(adapters[0], base, modules_of(base, ["k_proj"]), rank=5, r=5)
    changed = loaded(checkpoint, adapter=adapters[0])
    assert not is_same(changed, models[0]) and len(runs) == 5 and len(visible(cache)) == 4  # in place of the older one
    shutil.rmtree(adapters[0])
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        loaded(checkpoint, adapter=adapters[0])


def test_models_that_read_texts_are_calibrated(yes_no_checkpoint, cache, runs):
    """All of one checkpoint share its copy."""
    options = {"device": "cpu", "quantization": "int4"}
    models = [kind.from_pretrained(yes_no_checkpoint, **options) for kind in (Embedder, Reranker)]
    assert runs == ["int4"] and len(visible(cache)) == 1 and is_same(models[0].model, models[1].model)
    plain = Embedder.from_pretrained(yes_no_checkpoint, calibrate=False, **options)
    assert is_same(plain.model, load_model(yes_no_checkpoint, "cpu", quantization="int4"))


def test_classifiers_are_calibrated(checkpoint, cache, runs):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, "score.weight": torch.ones(3, 64)}, checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["architectures"] = ["Qwen3ForSequenceClassification"]
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    models = [Classifier.from_pretrained(checkpoint, device="cpu", quantization="int4") for _ in range(2)]
    assert runs == ["int4"] and is_same(models[0].model, models[1].model) and models[0].logits("text").shape == (1, 3)


def test_an_output_projection_that_is_not_needed_serves_calibration_alone(tmp_path, tokenizer_folder, cache, runs):
    source = untied_checkpoint(tmp_path, tokenizer_folder)
    bodies = [qwen3fast.load_model(source, "cpu", quantization="int4", output_projection=False) for _ in range(2)]
    assert runs == ["int4"] and bodies[0].lm_head is bodies[1].lm_head is None and is_same(*bodies)
    whole = loaded(source)
    assert runs == ["int4"] and whole.lm_head is not None and is_same(whole.model, bodies[0].model)


def test_by_default_no_weights_are_read_that_do_not_fit_the_memory(checkpoint, cache, runs, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(calibrated_module, "free_bytes", lambda device: 1000)
        assert is_same(loaded(checkpoint), load_model(checkpoint, "cpu", quantization="int4")) and runs == []
        assert "int4 without calibration: it reads 0.0 GB of weights many times; 0.0 GB are free" in caplog.text
        first = loaded(checkpoint, True)
        assert runs == ["int4"] and is_same(loaded(checkpoint), first)  # a copy that is kept is read


def test_a_folder_of_another_user_holds_no_copy(tmp_path, monkeypatch):
    def stat(path, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", stat)
    assert not KeptCopy(tmp_path / "copy", "copy-*").exists()


def test_tests_keep_nothing_in_the_real_cache_folder(runs):
    loaded("tiny")
    assert runs == []
