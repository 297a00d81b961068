"""Threads of the C++ operations (parallel.h), by OpenMP and without it, in the program parallel_cases.cpp."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("parallel_cases.cpp")
CASES = ["calls", "nested", "team", "leaders", "slept", "exit asleep", "exit awake"]
OWN_CASES = ["forked", "refused"]  # GCC's OpenMP waits forever in a forked process, and ends one that gets no thread


@pytest.fixture(scope="module", params=["g++ -fopenmp", "g++ -pthread", "clang++ -pthread"])
def program(request, tmp_path_factory):
    """The program, compiled, and whether threads are our own."""
    compiler, flag = request.param.split()
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    path = tmp_path_factory.mktemp("parallel") / "cases"
    subprocess.run([compiler, flag, "-O1", "-std=c++20", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", path], check=True)
    return path, flag == "-pthread"


@pytest.mark.parametrize("case", CASES + OWN_CASES)
def test_threads_share_work(program, case):
    path, is_own = program
    if case in OWN_CASES and not is_own:
        pytest.skip("not of OpenMP")
    done = subprocess.run([path, case], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
