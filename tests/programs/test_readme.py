"""The README tells the truth: its tables come from recorded results, its commands and links exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import update_readme

from qwen3fast.bench.__main__ import build_parser as build_bench_parser
from qwen3fast.cli import build_parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_tables_are_those_of_the_recorded_results():
    assert update_readme.BLOCK.search(TEXT)
    assert update_readme.update(TEXT) == TEXT


def test_the_model_of_gpu_time_is_what_its_program_prints(capsys):
    import gpu_model

    gpu_model.main()
    assert (ROOT / "benchmarks" / "gpu_model.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_readme_five_lines_run(monkeypatch, capsys):
    from qwen3fast import Generator

    real = Generator.from_pretrained
    monkeypatch.setattr(Generator, "from_pretrained", lambda source: real("tiny", compile=False))
    code = re.search(r"## Five lines\n\n```python\n(.*?)```", TEXT, re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_readme_command_lines_parse():
    commands = re.findall(r"^python -m qwen3fast(?:\.bench)? .*$", TEXT, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        module, *words = shlex.split(command.partition("#")[0])[2:]
        if module == "qwen3fast":
            args = build_parser().parse_args(words)
            if args.command != "bench":
                continue
            words = args.options
        build_bench_parser().parse_args(words)


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "qwen3fast", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qwen3fast 0.")
