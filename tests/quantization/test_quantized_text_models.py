"""What `quantize` and `save_quantized` write of models that read texts loads as such a model, with near results."""

import json

import pytest
import torch
from conftest import randomized, small_config, write_text_checkpoint
from safetensors.torch import load_file, save_file
from test_sentence_transformers import LAST, MEAN, PROMPTS, TEXTS, write

from qwen3fast import Classifier, Embedder, Generator, Reranker, load_model
from qwen3fast.checkpoint.metadata import read_checkpoint_config
from qwen3fast.cli import main
from qwen3fast.quantization.convert import formats_of

SIZES = {"hidden_size": 64, "intermediate_size": 96}
pytestmark = pytest.mark.usefixtures("one_thread")


def write_without_projection(folder, tokenizer_folder, **sizes):
    """A checkpoint without an output projection, its names without "model.": as Qwen3-Embedding-8B."""
    config = small_config(tie_word_embeddings=False, **SIZES, **sizes)
    write_text_checkpoint(folder, randomized(config), tokenizer_folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def add_score_head(folder, num_labels, **fields):
    tensors = load_file(folder / "model.safetensors")
    head_LE = torch.randn(num_labels, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    save_file({**tensors, "score.weight": head_LE.bfloat16()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"architectures": ["Qwen3ForSequenceClassification"], **fields}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def quantized(folder, name="int8", *options):
    output = folder.with_name("quantized")
    assert main(["quantize", "--model", str(folder), "--quantization", name, *options, "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("name", [None, "int8"])
def test_info_counts_an_output_projection_only_where_there_is_one(tmp_path, tokenizer_folder, capsys, name, has_head):
    source = tmp_path / "source"
    write_without_projection(source, tokenizer_folder, vocab_size=1024)
    if has_head:
        model = randomized(small_config(tie_word_embeddings=False, vocab_size=1024, **SIZES))
        write_text_checkpoint(source, model, tokenizer_folder)
    plain = load_model(source, "cpu", output_projection=has_head)
    folder = source if name is None else quantized(source, name)
    capsys.readouterr()
    assert main(["info", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f" {sum(p.numel() for p in plain.parameters()):,}\n" in out
    assert f" {load_model(folder, 'cpu', output_projection=has_head).num_bytes():,} bytes in" in out
    assert ("(no output projection)" in out) != has_head


@pytest.mark.parametrize("name", [None, "int8"])
def test_info_counts_a_score_head(tmp_path, tokenizer_folder, capsys, name):
    source = write_without_projection(tmp_path / "source", tokenizer_folder, vocab_size=1024)
    add_score_head(source, 3)
    folder = source if name is None else quantized(source, name)
    capsys.readouterr()
    assert main(["info", "--model", str(folder)]) == 0
    out, plain = capsys.readouterr().out, load_model(source, "cpu", output_projection=False)
    assert f" {sum(p.numel() for p in plain.parameters()) + 3 * 64:,}\n" in out
    num_bytes = load_model(folder, "cpu", output_projection=False).num_bytes()
    assert f" {num_bytes + 3 * 64 * 4:,} bytes in" in out and " 3 labels, float32\n" in out
    for file in folder.glob("*.safetensors"):  # config.json alone tells all but the labels
        file.unlink()
    assert main(["info", "--model", str(folder)]) == (0 if name is None else 2)


def test_info_refuses_another_format_than_a_folder_has(tmp_path, tokenizer_folder, capsys):
    folder = quantized(write_without_projection(tmp_path / "source", tokenizer_folder, vocab_size=1024))
    for name, status in (("int8", 0), ("int4", 2)):
        assert main(["info", "--model", str(folder), "--quantization", name]) == status
    assert f"{folder} is in int8 already; int4 needs the original weights" in capsys.readouterr().err


@pytest.mark.parametrize(("pooling", "kinds"), [(LAST, ("Pooling",)), (MEAN, ("Pooling", "Normalize"))])
@pytest.mark.parametrize("by_command", [True, False])
def test_the_files_of_sentence_transformers_are_kept(tmp_path, tokenizer_folder, pooling, kinds, by_command):
    source = tmp_path / "source"
    write(source, tokenizer_folder, pooling, kinds, "<|im_end|>", sizes=SIZES, default_prompt_name="query")
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    output = tmp_path / "quantized"
    if by_command:
        quantized(source)
    else:
        with Generator.from_pretrained(
            source, device="cpu", quantization="int8", compile=False, max_seq_len=64
        ) as generator:
            generator.save_quantized(output)
    before, after = (Embedder.from_pretrained(folder, device="cpu") for folder in (source, output))
    assert formats_of(after.model) == ["int8"] and before.settings == after.settings and after.max_length == 40
    assert after.settings.prompts == PROMPTS
    assert torch.cosine_similarity(before.encode(TEXTS), after.encode(TEXTS)).min() > 0.99
    assert after.encode(TEXTS).norm(dim=-1).allclose(before.encode(TEXTS).norm(dim=-1), rtol=0.1)


def test_a_damaged_list_of_modules_is_refused_before_anything_is_written(tmp_path, tokenizer_folder, capsys):
    source = write(tmp_path / "source", tokenizer_folder, LAST, sizes=SIZES)
    (source / "modules.json").write_text('[{"path": "../other", "type": "a.Pooling"}]')
    assert main(["quantize", "--model", str(source), "--no-calibrate", "--output", str(tmp_path / "quantized")]) == 2
    assert "modules.json: the model must lie in the folder itself" in capsys.readouterr().err
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize("options", [[], ["--no-calibrate"], ["--calibrate", "text.txt"]])
def test_a_model_without_an_output_projection_is_quantized(tmp_path, tokenizer_folder, options, capsys):
    source = write_without_projection(tmp_path / "source", tokenizer_folder, vocab_size=1024)
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 200, encoding="utf-8")
    output = quantized(source, "int4", *[option.replace("text", f"{tmp_path}/text") for option in options])
    before, after = (Embedder.from_pretrained(folder, device="cpu") for folder in (source, output))
    assert formats_of(after.model) == ["int4"] and after.model.lm_head is None
    assert torch.cosine_similarity(before.encode(TEXTS), after.encode(TEXTS)).min() > 0.8
    is_calibrated = "--calibrate" in options
    assert (read_checkpoint_config(output).calibration_tokens > 0) is is_calibrated
    assert ("has no output projection, so it writes no text" in capsys.readouterr().err) is not options
    assert main(["generate", "hello", "--model", str(output)]) == 2
    assert "lm_head" in capsys.readouterr().err


@pytest.mark.parametrize("head", [None, 1, 2])
def test_a_reranker_is_kept(tmp_path, yes_no_folder, head):
    sizes = SIZES | {"vocab_size": 1040, "max_position_embeddings": 1024}
    source = write_text_checkpoint(tmp_path / "source", randomized(small_config(**sizes)), yes_no_folder)
    if head:
        add_score_head(source, head)
    before, after = (Reranker.from_pretrained(folder, device="cpu") for folder in (source, quantized(source)))
    scores = [reranker.score("Where is it?", TEXTS) for reranker in (before, after)]
    assert formats_of(after.model) == ["int8"] and scores[1] == pytest.approx(scores[0], abs=0.1)
    assert (before._rows_LE - after._rows_LE).norm() < 0.02 * before._rows_LE.norm()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("problem", [{}, {"problem_type": "multi_label_classification"}])
def test_a_classifier_is_kept(tmp_path, tokenizer_folder, tied, problem):
    labels = {"0": "joy", "1": "anger", "2": "fear"}
    source = tmp_path / "source"
    if tied:
        write_text_checkpoint(source, randomized(small_config(vocab_size=1024, **SIZES)), tokenizer_folder)
    else:
        write_without_projection(source, tokenizer_folder, vocab_size=1024)
    add_score_head(source, 3, id2label=labels, **problem)
    output = quantized(source)
    before, after = (Classifier.from_pretrained(folder, device="cpu") for folder in (source, output))
    assert formats_of(after.model) == ["int8"] and torch.equal(before._head_LE, after._head_LE)
    assert after.labels == ("joy", "anger", "fear") and after.is_multi_label is bool(problem)
    logits = [classifier.logits(TEXTS) for classifier in (before, after)]
    assert torch.cosine_similarity(*logits).min() > 0.98
    assert json.loads((output / "config.json").read_text("utf-8"))["label2id"] == {"joy": 0, "anger": 1, "fear": 2}
