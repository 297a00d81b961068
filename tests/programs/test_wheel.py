"""The wheel, built, installed in an environment of its own, and used where there is no compiler."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from qwen3fast.kernels.cpu import building, levels

ROOT = Path(__file__).parents[2]
LEVEL = next(iter(levels.this_machine()), None)
pytestmark = pytest.mark.skipif(
    LEVEL is None or not shutil.which("g++"), reason="no GCC to build with, or no level of this machine"
)
PROGRAM = """
import os, warnings
warnings.simplefilter("ignore")
from qwen3fast import Generator, SamplingParams
from qwen3fast.kernels import cpu
for options in ({"dtype": "bfloat16"}, {"quantization": "int4", "calibrate": False}):
    if os.fork():  # each in a process of its own, which finds everything imported
        os.wait()
        continue
    generator, question = Generator.from_pretrained("tiny", **options), {"role": "user", "content": "What is 17 + 25?"}
    print(generator.chat([question], SamplingParams(temperature=0), enable_thinking=False).text)
    print(cpu.is_loaded() and cpu.library.functions()._name)
    break
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def source_files():
    """All that a wheel is made of."""
    found = [path for path in (ROOT / "qwen3fast").rglob("*") if path.is_file()]
    package = [path for path in found if not {"__pycache__", "lib"} & set(path.relative_to(ROOT).parts)]
    return sorted(package) + [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]


def copy_source(folder):
    for path in source_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def build_wheel(folder):
    """A wheel with this machine's best level alone, not optimized much: building all takes most of a minute."""
    source = copy_source(folder / "source")
    environment = os.environ | {"QWEN3FAST_BUILD_LEVELS": LEVEL.name, "CXXFLAGS": "-O1"}
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source, env=environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, pytestconfig):
    """The wheel, which pytest's cache keeps for later runs with the same sources and tools."""
    if getattr(pytestconfig, "cache", None) is None:
        return build_wheel(tmp_path_factory.mktemp("wheel"))
    tools = sys.version, torch.__version__, version("setuptools"), LEVEL.name, run("g++", "--version")
    key = hashlib.sha256(repr(tools).encode())
    for path in source_files():
        key.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    cache = Path(pytestconfig.cache.mkdir("wheel"))
    kept = cache / key.hexdigest()
    if not kept.is_dir():
        built = build_wheel(tmp_path_factory.mktemp("wheel"))
        for old in cache.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        new = Path(tempfile.mkdtemp(dir=cache))
        shutil.copy(built, new)
        new.replace(kept)  # whole, or not there
    return next(kept.glob("*.whl"))


def test_the_wheel_serves_every_python_on_this_kind_of_machine(wheel):
    assert wheel.name.endswith(f"_{LEVEL.machine}.whl") and "-py3-none-manylinux_2_" in wheel.name
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert len(libraries) == 1 and libraries[0].startswith(f"qwen3fast/kernels/cpu/lib/{LEVEL.name}-")


def test_its_library_is_whole_and_leaves_openmp_to_pytorch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".so"))
        library = Path(archive.extract(name, tmp_path))
    assert building.is_what_was_built(library)
    assert b"GOMP_parallel" in library.read_bytes() and b"libgomp" not in library.read_bytes()


def test_without_a_compiler_the_installed_wheel_uses_its_operations(wheel, tmp_path):
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))  # with the pip that comes with Python
    python = str(tmp_path / "env/bin/python")
    # Isolated: a PYTHONPATH that holds qwen3fast would count as installed.
    run(python, "-I", "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", str(wheel))
    packages = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    environment = {"PATH": str(tmp_path / "env" / "bin"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    printed = run(python, "-c", PROGRAM, cwd=tmp_path, env=environment).splitlines()
    folder = packages / "qwen3fast/kernels/cpu/lib"
    assert [line if i % 2 == 0 else Path(line).parent for i, line in enumerate(printed)] == ["42", folder] * 2


def test_an_editable_install_builds_what_the_first_use_finds(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o700)
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("QWEN3FAST_BUILD_LEVELS", None)
    without_torch = "import sys; sys.modules['torch'] = None; "
    code = f"{without_torch} from setuptools.build_meta import build_editable; build_editable('.')"
    run(sys.executable, "-c", code, cwd=copy_source(tmp_path / "source"), env=environment)
    compiler.unlink()
    open_library = "from qwen3fast.kernels.cpu.library import open_library; print(open_library()._name)"
    opened = run(sys.executable, "-c", open_library, cwd=tmp_path / "source", env=environment)
    assert list((tmp_path / "cache/qwen3fast").glob("ops-*.so")) == [Path(opened.strip())]


def test_an_editable_install_tells_which_compiler_it_needs(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho old GCC >&2; exit 1\n")
    compiler.chmod(0o700)
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("QWEN3FAST_BUILD_LEVELS", None)
    code = "import sys; sys.argv[1:] = ['--version']; import setup; setup.build_for_this_machine()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "old GCC" in done.stderr and f"needed: {building.NEEDED}" in done.stderr


NEEDS = "print(setup.glibc_version(pathlib.Path(sys.argv[2])))"


@pytest.mark.parametrize(
    ("symbols", "expected"),
    [
        ("GLIBC_2.27 GLIBCXX_3.4.11", "27"),
        ("GLIBC_2.27 GLIBCXX_3.4.29", "34"),  # std::__throw_bad_array_new_length of GCC 11
        ("GLIBC_2.38 GLIBCXX_3.4.30", "38"),
        ("GLIBCXX_3.4", "17"),
        ("GLIBCXX_3.4.99", "OSError: the libraries need GLIBCXX_3.4.99, newer than any manylinux has"),
        ("__kmpc_fork_call", "OSError: the wheel's libraries must be built by GCC"),
    ],
)
def test_the_tag_names_a_system_with_all_that_a_library_needs(symbols, expected, tmp_path):
    (tmp_path / "library.so").write_bytes(symbols.replace(" ", "\0").encode())
    code = f"import pathlib, sys; sys.argv[1:] = ['--version', 'library.so']; import setup; {NEEDS}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.stderr if "Error" in expected else done.stdout).strip().splitlines()[-1].startswith(expected)


def test_without_a_level_the_wheel_is_python_alone(tmp_path):
    """As where there is no compiler: the first use builds, or PyTorch's forms run."""
    environment = os.environ | {"PATH": "/nonexistent", "PYTHONPATH": str(ROOT)}
    environment.pop("CXX", None)
    build = "print(setup.build_libraries(pathlib.Path('x')))"
    code = f"import pathlib, sys; sys.argv[1:] = ['--version']; import setup; {build}"
    done = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert done.splitlines()[-1] == "None" and not (tmp_path / "x").exists()


def test_an_unknown_level_ends_the_build():
    environment = os.environ | {"QWEN3FAST_BUILD_LEVELS": "avx2, amx9000", "PYTHONPATH": str(ROOT)}
    code = "import sys; sys.argv[1:] = ['--version']; import setup; setup.wanted('x86_64')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ValueError: QWEN3FAST_BUILD_LEVELS must name levels of ['amx', " in done.stderr
    assert done.stderr.endswith("got 'amx9000'\n")
