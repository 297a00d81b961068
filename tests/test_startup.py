"""The command line as a program of its own: what it imports, and what a person or a shell may do to it."""

import os
import signal
import subprocess
import sys
import time

import pytest

GENERATE = [sys.executable, "-m", "qwen3fast", "generate", "--compile", "never", "--temperature", "0"]
QUESTION = "What is 17 + 25?"
# Slow to import, and of no use to a reply.
HEAVY = ("matplotlib", "transformers", "torch._dynamo", "torch._inductor", "qwen3fast.bench", "pandas", "PIL", "triton")


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def imported(importtime):
    """Names of modules in the output of `python -X importtime`."""
    return {line.rpartition("|")[2].strip() for line in importtime.splitlines() if line.startswith("import time:")}


def heavy_ones(modules):
    return sorted(m for m in modules if any(m == heavy or m.startswith(heavy + ".") for heavy in HEAVY))


def test_generate_imports_only_what_it_needs():
    done = run([sys.executable, "-X", "importtime", *GENERATE[1:], QUESTION])
    modules = imported(done.stderr)
    assert done.stdout == "42\n" and "torch" in modules and "qwen3fast.generator" in modules
    assert heavy_ones(modules) == []


def test_the_package_imports_nothing_heavy_and_its_names_nothing_needless():
    code = "import sys, qwen3fast; assert 'torch' not in sys.modules; qwen3fast.Generator; print(*sys.modules)"
    done = run([sys.executable, "-c", code], check=True)
    assert "torch" in done.stdout.split() and heavy_ones(done.stdout.split()) == []


def test_a_reader_that_leaves_ends_it_quietly():
    reply = [*GENERATE, "The", "--raw", "--max-tokens", "400"]
    with subprocess.Popen(reply, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, b"")


def test_a_reader_that_never_was_ends_help_quietly():
    with subprocess.Popen(
        [sys.executable, "-m", "qwen3fast", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode in (0, 141) and error == b""  # argparse itself ignores an error at once


def test_output_that_cannot_show_a_character_replaces_it():
    code = """
import sys
from unittest import mock
from qwen3fast import Generator, cli
from qwen3fast.results import StreamChunk
with mock.patch.object(Generator, "stream_chat", lambda *a, **k: iter([StreamChunk("caf\\xe9 \\u4f60 end", [])])):
    sys.exit(cli.main(["generate", "hi", "--compile", "never"]))
"""
    done = run([sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf? ? end\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*GENERATE, QUESTION], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("stage", ["importing", "generating"])
def test_ctrl_c_leaves_no_traceback(stage):
    if stage == "importing":  # at the first import after the program has begun
        code = """
import builtins, os, runpy, signal, sys
real = builtins.__import__
def interrupted(name, *arguments, **options):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *arguments, **options)
builtins.__import__ = interrupted
sys.argv = ["qwen3fast", "generate", "hi"]
runpy.run_module("qwen3fast", run_name="__main__")
"""
        done = run([sys.executable, "-c", code])
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
        return
    reply = [*GENERATE, "The", "--raw", "--max-tokens", "3000", "--max-seq-len", "4000"]
    with subprocess.Popen(reply, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, b"")
