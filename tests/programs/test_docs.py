"""README and docs: Python blocks run, command lines parse, links lead somewhere, tables match the records."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import update_readme

import qwen3fast
from qwen3fast import Embedder, Generator, ModelConfig, Reranker
from qwen3fast.model import build_on_meta
from qwen3fast.quantization.convert import quantize_model

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/qwen3fast/qwen3fast"
RAW = "https://raw.githubusercontent.com/qwen3fast/qwen3fast/main"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "examples/README.md")
] + PAGES
TEXTS = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in DOCUMENTS}
NOTEBOOK = "examples/qwen3_from_scratch.ipynb"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!#)([^)\s]+)\)")

# Blocks that are compiled but not run, by document and first line, and what they need. All others run, with tiny in
# place of what they would download.
NOT_RUN = {
    ("docs/guides/quantization.md", 'theirs = Generator.from_pretrained("Qwen/Qwen3-8B-AWQ")'): "GGUF files",
    ("docs/guides/adapters.md", "from qwen3fast import Generator, SamplingParams"): "adapters",
    ("docs/guides/devices.md", "from qwen3fast import Generator"): "torchrun",
    ("docs/guides/embeddings.md", "from qwen3fast import Classifier"): "a score head",
    ("docs/guides/devices.md", 'generator = Generator.from_pretrained("Qwen/Qwen3-0.6B", device="cuda")'): "a GPU",
}


def blocks(document: str, language: str) -> list[str]:
    """Return the code blocks of one language."""
    return [code for found, code in FENCE.findall(TEXTS[document]) if found == language]


def first_line(code: str) -> str:
    return code.partition("\n")[0]


@pytest.fixture
def offline(document, monkeypatch, yes_no_checkpoint):
    """Models of the hub are tiny, and nothing is compiled by Inductor: the texts stay true, and short."""
    opened = []

    def replaced(cls, source_of):
        real = cls.from_pretrained

        def from_pretrained(source, **options):
            source = source_of() if str(source).startswith("Qwen/") else source
            if cls is Generator:  # C++ serves what has a cache
                options["compile"] = "use_cache=False" not in TEXTS[document]
            opened.append(real(source, **options))
            return opened[-1]

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    replaced(Generator, lambda: "tiny")
    replaced(Embedder, lambda: "tiny")
    replaced(Reranker, lambda: yes_no_checkpoint)
    yield
    for model in opened:
        if isinstance(model, Generator):
            model.close()


@pytest.mark.parametrize("document", [name for name in TEXTS if blocks(name, "python")])
def test_python_blocks_run(document, offline, capsys):
    names = {"__name__": document}
    for code in blocks(document, "python"):
        compiled = compile(code, document, "exec")
        if (document, first_line(code)) not in NOT_RUN:
            exec(compiled, names)
    if document == "README.md":
        assert " Paris." in capsys.readouterr().out


def test_blocks_that_do_not_run_exist():
    present = {(name, first_line(code)) for name in TEXTS for code in blocks(name, "python")}
    assert NOT_RUN.keys() <= present


def commands(document: str) -> list[str]:
    lines = "\n".join(blocks(document, "bash")).splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


ALL_COMMANDS = sorted({command for name in TEXTS for command in commands(name)})


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if re.search(r"python -m qwen3fast\b(?!\.)", c)])
def test_commands_of_the_package_parse(command):
    from qwen3fast.cli import parse

    words = shlex.split(command.partition("-m qwen3fast ")[2])
    assert parse(words).command == words[0]


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if "python -m qwen3fast.bench" in c])
def test_commands_of_the_benchmark_parse(command, monkeypatch):
    from qwen3fast.bench.__main__ import main

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_leave(*arguments):
        """Options are parsed; nothing is run."""
        parse_args(*arguments)
        sys.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command.partition("-m qwen3fast.bench")[2]))
    assert left.value.code == 0


def test_programs_that_commands_name_exist():
    named = {word for command in ALL_COMMANDS for word in shlex.split(command) if word.endswith(".py")}
    assert named - {"program.py"}
    assert [name for name in sorted(named - {"program.py"}) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("document", [*TEXTS, NOTEBOOK])
def test_links_lead_somewhere(document):
    missing = []
    for link in LINK.findall(FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if path.startswith((f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/", RAW)):
            target = ROOT / path.removeprefix(RAW).removeprefix(REPOSITORY).split("/main/")[-1].lstrip("/")
        elif "://" in path:
            continue
        else:
            target = (ROOT / document).parent / path if path else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_of_the_readme_work_on_pypi():
    links = LINK.findall(TEXTS["README.md"])
    assert links and all(link.startswith("https://") for link in links)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page


def num_bytes(config, format):
    """Return the bytes of a model's weights, whose layers are alike, from models of one layer and of two."""
    one, two = (build_on_meta(replace(config, num_hidden_layers=layers)) for layers in (1, 2))
    for model in (one, two) if format else ():
        quantize_model(model, format, config.dtype)
    return one.num_bytes() + (config.num_hidden_layers - 1) * (two.num_bytes() - one.num_bytes())


def test_memory_of_models_is_what_they_take():
    guide = TEXTS["docs/guides/quantization.md"]
    rows = re.findall(r"^\| (\S+b) \| (.*) \|$", guide, re.MULTILINE)
    assert len(rows) == 8
    for name, cells in rows:
        config = ModelConfig.named(name)
        formats = (None, "lossless", "int8", "fp8", "int4", "uint4")
        plain, lossless, int8, fp8, int4, uint4 = (f"{num_bytes(config, format) / 1e9:.2f}" for format in formats)
        assert int8 == fp8
        cache = (round(config.kv_bytes_per_token(dtype) / 1024, 2) for dtype in (torch.bfloat16, torch.int8))
        assert cells.split(" | ") == [plain, lossless, int8, int4, uint4, *(f"{kib:g}" for kib in cache)], name


def test_every_public_name_is_in_the_api_reference():
    documented = set(re.findall(r"^::: qwen3fast\.(\w+)$", TEXTS["docs/api.md"], re.MULTILINE))
    assert documented - {"reference"} == set(qwen3fast.__all__) - {"__version__"}


@pytest.mark.parametrize("document", update_readme.DOCUMENTS, ids=lambda file: file.name)
def test_tables_are_those_of_the_recorded_results(document):
    text = document.read_text(encoding="utf-8")
    assert update_readme.BLOCK.search(text)
    assert update_readme.update(text) == text


def test_every_record_is_shown():
    shown = {match["file"] for text in TEXTS.values() for match in update_readme.BLOCK.finditer(text)}
    records = (ROOT / "benchmarks" / "results").glob("*.json")
    assert shown - {"benchmarks/results"} == {f"benchmarks/results/{file.name}" for file in records}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Continue one prompt" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "benchmarks" / "results" / "cache-0.6b.png").is_file()
