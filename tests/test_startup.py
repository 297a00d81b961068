"""The command line as a program of its own: what it imports, and what a person or a shell may do to it."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from bench_fakes import make_case, make_record

from qwen3fast import Generator
from qwen3fast.bench.record import write_json
from qwen3fast.cli import main
from qwen3fast.results import StreamChunk

GENERATE = ["generate", "--compile", "never", "--temperature", "0"]
QUESTION = "What is 17 + 25?"
# Slow to import, and of no use to a reply.
HEAVY = ("matplotlib", "transformers", "torch._dynamo", "torch._inductor", "qwen3fast.bench", "pandas", "PIL", "triton")


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def heavy_ones(modules):
    return sorted(m for m in modules if any(m == heavy or m.startswith(heavy + ".") for heavy in HEAVY))


# One process, which imports more and more, and prints the names of its modules in between.
IMPORTS = """
import sys
import qwen3fast
print(*sys.modules)
qwen3fast.Generator
print(*sys.modules)
from qwen3fast.__main__ import main
record, *sys.argv[1:] = sys.argv[1:]
main()
print(*sys.modules)
from qwen3fast.bench.__main__ import main
main(["table", record, "-o", record + ".md"])
print(*sys.modules)
"""


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path):
    write_json(make_record(make_case([1.0])).to_dict(), tmp_path / "a.json")
    done = run([sys.executable, "-c", IMPORTS, str(tmp_path / "a.json"), *GENERATE, QUESTION], check=True)
    package, names, answer, generate, table = (line.split() for line in done.stdout.splitlines())
    assert "qwen3fast" in package and "torch" not in package
    assert "torch" in names and heavy_ones(names) == []
    assert answer == ["42"] and "qwen3fast.generator" in generate and heavy_ones(generate) == []
    assert "qwen3fast.bench.table" in table and "matplotlib" not in table  # which only draws


# Ends command lines in all ways of ENDINGS, each in a fork of one process: importing takes seconds. Prints a list of
# exit statuses and standard errors.
ENDS = """
import fcntl, json, os, signal, sys, tempfile, time
import qwen3fast.cli, qwen3fast.generator
from qwen3fast.__main__ import main

def ended(how, arguments):
    (reader, writer), error = os.pipe(), tempfile.TemporaryFile()
    if how == "Ctrl-C" and hasattr(fcntl, "F_SETPIPE_SZ"):  # it cannot end before the signal comes
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    if how == "full disk":
        writer = os.open("/dev/full", os.O_WRONLY)
    if how == "no reader":
        os.close(reader)
    if not (child := os.fork()):
        if how != "no reader":
            os.close(reader)
        os.dup2(writer, 1)
        os.dup2(error.fileno(), 2)
        sys.argv[1:] = arguments
        sys.exit(main())
    os.close(writer)
    if how in ("reader leaves", "Ctrl-C"):
        os.read(reader, 1)
    if how == "reader leaves":
        os.close(reader)
    if how == "Ctrl-C":
        time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        while os.read(reader, 2**16):
            pass
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    error.seek(0)
    return status, error.read().decode()

print(json.dumps([ended(*ending) for ending in json.loads(sys.argv[1])]))
"""
ENDINGS = {  # the tiny model continues "a" without an end
    "reader leaves": [*GENERATE, "a", "--raw", "--max-tokens", "400"],
    "no reader": ["--help"],
    "full disk": [*GENERATE, QUESTION],
    "Ctrl-C": [*GENERATE, "a", "--raw", "--max-tokens", "3000", "--max-seq-len", "4000"],
}


@pytest.fixture(scope="module")
def ends():
    """Exit status and standard error by the name of the ending."""
    if not hasattr(os, "fork"):
        pytest.skip("no os.fork")
    endings = {name: of for name, of in ENDINGS.items() if name != "full disk" or os.path.exists("/dev/full")}
    done = run([sys.executable, "-c", ENDS, json.dumps([*endings.items()])], check=True)
    return dict(zip(endings, json.loads(done.stdout), strict=True))


def test_a_reader_that_leaves_ends_it_quietly(ends):
    assert ends["reader leaves"] == [141, ""]


def test_a_reader_that_never_was_ends_help_quietly(ends):
    status, error = ends["no reader"]
    assert status in (0, 141) and error == ""  # argparse itself ignores an error at once


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line(ends):
    status, error = ends["full disk"]
    assert status == 1 and error.count("\n") == 1 and "No space left" in error


def test_ctrl_c_leaves_no_traceback(ends):
    assert ends["Ctrl-C"] == [130, ""]


# Interrupted at the first import after the program has begun.
INTERRUPTED = """
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


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("arguments", [["--version"], ["info", "none"]])
def test_ctrl_c_while_python_ends_leaves_no_traceback(arguments):
    program = "import atexit, signal; from qwen3fast.__main__ import main; "
    program += "atexit.register(signal.raise_signal, signal.SIGINT); raise SystemExit(main())"
    done = run([sys.executable, "-c", program, *arguments])
    assert done.returncode == -signal.SIGINT and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_program_that_calls_it_keeps_its_own_ctrl_c():
    program = "import signal, threading\nfrom qwen3fast.__main__ import main\n"
    program += "other = threading.Thread(target=main)\nother.start()\nother.join()\n"
    program += "try: main()\nexcept SystemExit: pass\n"
    program += "try: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: print('kept')"
    done = run([sys.executable, "-c", program, "--version"])
    assert done.returncode == 0 and done.stdout.endswith("\nkept\n") and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_it_imports_leaves_no_traceback():
    done = run([sys.executable, "-c", INTERRUPTED])
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_output_that_cannot_show_a_character_replaces_it(monkeypatch, capsys):
    chunks = [StreamChunk("caf\xe9 \u4f60 end", [])]
    monkeypatch.setattr(Generator, "stream_chat", lambda *arguments, **options: iter(chunks))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["generate", "hi", "--compile", "never"]) == 0
    assert sys.stdout.buffer.getvalue() == b"caf? ? end\n" and capsys.readouterr().err == ""
