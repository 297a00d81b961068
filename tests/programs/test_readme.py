"""The README is a front page: short, in a fixed order, and without a claim that nothing beside it shows.

Its code blocks, commands, links and tables are tested in test_docs.py, with the other documents.
"""

import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= 180


def test_readme_has_its_parts_in_order():
    sections = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    order = ["Two commands", "Five lines", "Features", "Speed", "How a request flows", "Qwen3 in an hour"]
    assert sections == [*order, "Supported", "Develop"]
    assert TEXT.index("![") < TEXT.index("## ")  # one picture, at the top
    assert TEXT.count("![") == 1


def test_fastest_is_said_beside_the_table_only_and_of_cpus():
    speed = TEXT[TEXT.index("## Speed") : TEXT.index("## How a request flows")]
    assert TEXT.lower().count("fastest") == speed.lower().count("fastest")
    verdict = re.search(r"^qwen3fast is the fastest .* on these CPUs in .*$", speed, re.MULTILINE)[0]
    counts = re.search(r" in (\d+) of (\d+) cases, slower in (\d+)\b.*, undecided .* in (\d+)\b", verdict).groups()
    wins, cells, losses, level = map(int, counts)
    lines = re.findall(r"^\| (?:bf16|int8|int4), .*$", speed, re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    own, others = ([cell for row in rows for cell in row[first::3]] for first in (0, 1))
    assert len(rows) == 9 and {len(row) for row in rows} == {9}  # three kinds of processor, side by side
    assert wins + losses + level == cells >= len(own)
    if cells == len(own):  # otherwise the sentence counts lengths that have no row here
        assert sum("**" in cell for cell in own) == wins and sum("**" in cell for cell in others) == losses


def test_ci_gives_pip_one_constraint_in_a_folder_with_spaces(tmp_path):
    line = re.search(r"^export PIP_CONSTRAINT=.*$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)[0]
    folder = tmp_path / "a b c"
    folder.mkdir()
    command = ["bash", "-c", f'{line}\nprintf %s "$PIP_CONSTRAINT"']
    [url] = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    assert Path(url2pathname(urlparse(url).path)) == folder / ".ci/constraints.txt"


def test_five_lines_are_five():
    code = re.search(r"## Five lines\n\n```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) == 5


def test_the_model_of_gpu_time_is_what_its_program_prints(capsys):
    import gpu_model

    gpu_model.main()
    assert (ROOT / "benchmarks" / "gpu_model.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_module_runs_as_a_program(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # set back at the end
    monkeypatch.setattr(sys, "argv", ["qwen3fast", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("qwen3fast", run_name="__main__")
    assert capsys.readouterr().out.startswith("qwen3fast 0.")
