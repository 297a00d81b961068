"""The shared library of C++ operations: only what was built is loaded, and nothing that others could have put there."""

import _ctypes
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_double, c_float, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen3fast.engine.compile import StepCompiler
from qwen3fast.kernels import cpu, forms_file
from qwen3fast.kernels.cpu import building, levels, library

IS_LOADED = cpu.load()
BUILT = next(library.cache_folder().glob(f"ops-{library.source_key()}-*.so"), Path())

pytestmark = pytest.mark.skipif(not IS_LOADED, reason="no compiler for the C++ operations on this machine")


@pytest.fixture
def builds(monkeypatch):
    """Record what is "built", by copying the library that the tests' process has built before."""
    built, builds = BUILT, []

    def build(compiler, flags, folder, prefix, jobs):
        builds.append(compiler)
        return Path(shutil.copy(built, folder / built.name))

    library._made_temporary_folder.cache_clear()
    library._temporary_folder.cache_clear()
    monkeypatch.setattr(library, "build", build)
    monkeypatch.setenv(library.PIN, "native")
    return builds


@pytest.fixture
def folder(monkeypatch, tmp_path, builds):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return library.cache_folder()


@pytest.mark.parametrize("given", ["", "relative", "./cache"])
def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert forms_file.path() == library.own_folder() / "forms.json" == tmp_path / ".cache" / "qwen3fast" / "forms.json"


DECLARED = re.findall(r"QWEN3FAST_API \w+ (qwen3fast_\w+)\(", (library.FOLDER / "ops.h").read_text("utf-8"))


def test_functions_have_the_types_of_the_header():
    assert len(DECLARED) > 10 and all(getattr(cpu.library.functions(), name).argtypes is not None for name in DECLARED)
    rows, try_tiles, step = (
        getattr(cpu.library.functions(), f"qwen3fast_{n}") for n in ("quantized_rows", "try_tiles", "decode_step")
    )
    assert (rows.restype, rows.argtypes) == (c_bool, [c_void_p, c_void_p, c_void_p, c_int64, c_int64])
    assert (try_tiles.restype, try_tiles.argtypes) == (c_bool, [])
    assert (step.restype, step.argtypes) == (c_double, [c_void_p, c_int64, *[c_void_p] * 7, c_int64, c_int64])


def test_structures_have_the_fields_of_the_header():
    found = library.structures()
    numbers = [(name, c_int64) for name in ("N", "K", "bits", "span", "record")]
    assert found["Linear"]._fields_ == [("weight", c_void_p), ("scale", c_void_p), *numbers, ("order", c_void_p)]
    assert found["Sizes"]._fields_ == [*((name, c_int64) for name in "MEHKDS"), ("eps", c_float)]
    kinds = dict(found["Layer"]._fields_)
    assert (kinds["post_norm"], kinds["router"], kinds["cache"]) == (c_void_p, found["Linear"], found["Cache"])


def test_a_library_without_a_function_is_refused():
    with pytest.raises(AttributeError):
        library.with_types(ctypes.CDLL(None))


def is_whole(opened):
    return all(hasattr(opened, name) for name in DECLARED)


def test_a_library_is_built_once(folder, builds):
    for _ in range(3):
        assert is_whole(library.open_library())
    assert len(builds) == 1


@pytest.fixture
def unloaded(monkeypatch):
    """As in a process that has not loaded a library; afterwards, the one that it had is in use again."""
    for name in ("_was_tried", "_is_ready"):
        monkeypatch.setattr(cpu, name, False)
    monkeypatch.setattr(library, "_used", None)


def test_auto_uses_a_library_that_is_there_and_builds_none_at_once(folder, builds, unloaded):
    compiler = StepCompiler("auto", torch.device("cpu"))
    compiler.close(wait=True)
    assert not builds and not cpu.is_loaded()
    shutil.copy(BUILT, folder / BUILT.name)
    compiler = StepCompiler("auto", torch.device("cpu"))
    compiler.close(wait=True)
    assert not builds and cpu.is_loaded()


def test_auto_does_not_wait_for_another_thread_that_builds(unloaded):
    with ThreadPoolExecutor(1) as pool, cpu._loading:  # which such a thread holds, for a minute
        pool.submit(StepCompiler, "auto", torch.device("cpu")).result(timeout=20).close()
    assert not cpu.is_loaded()


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs a safe os.fork")
def test_a_process_forked_during_a_build_opens_its_own(folder, unloaded):
    shutil.copy(BUILT, folder / BUILT.name)
    with cpu._loading:  # which another thread holds for a minute
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends it
            os._exit(0 if cpu.load() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(100), None], ids=["empty", "foreign", "truncated"])
def test_a_library_that_is_not_what_was_built_is_built_again(folder, builds, content, caplog):
    wrong = folder / BUILT.name
    wrong.write_bytes(BUILT.read_bytes()[:50_000] if content is None else content)
    assert is_whole(library.open_library())
    assert len(builds) == 1 and "is not what was built" in caplog.text
    assert wrong.read_bytes() == BUILT.read_bytes()


def test_a_library_without_the_functions_is_built_again(folder, builds):
    other = Path(_ctypes.__file__)
    name = f"ops-{library.source_key()}-{library.digest(other.read_bytes())}.so"
    shutil.copy(other, folder / name)
    assert is_whole(library.open_library())
    assert len(builds) == 1 and not (folder / name).exists()


def test_without_a_compiler_a_library_that_is_built_is_used(folder, monkeypatch):
    shutil.copy(BUILT, folder / BUILT.name)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert is_whole(library.open_library())
    (folder / BUILT.name).unlink()
    with pytest.raises(library.NoCompilerError, match=r"need g\+\+ or clang\+\+"):
        library.open_library()


@pytest.mark.parametrize(
    ("system", "flags"), [("linux", library.TARGET_FLAGS), ("darwin", levels.levels_of("arm64")[0].flags)]
)
def test_macos_gets_what_is_built_for_its_level(folder, monkeypatch, system, flags):
    def build(compiler, target_flags, folder, prefix, jobs):
        assert target_flags == flags
        return Path(shutil.copy(BUILT, folder / BUILT.name))

    monkeypatch.setattr(library, "build", build)
    monkeypatch.delenv(library.PIN)
    monkeypatch.setattr(library, "this_machine", lambda: levels.levels_of("arm64"))
    monkeypatch.setattr(library, "sys", SimpleNamespace(platform=system))
    assert is_whole(library.open_library())


def test_other_systems_build_nothing(monkeypatch):
    monkeypatch.setattr(library, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(library.NoCompilerError, match="need Linux or macOS"):
        library.open_library()


@pytest.mark.parametrize(
    ("version", "flag"),
    [
        ("g++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.", "-fopenmp"),
        ("Apple clang version 15.0.0 (clang-1500.3.9.4)\nTarget: arm64-apple-darwin23.4.0", "-pthread"),
    ],
)
def test_only_gcc_gets_openmp(version, flag, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho '{version}'\n")
    compiler.chmod(0o700)
    assert building.threads_flag([str(compiler)]) == flag


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_what_lies_in_a_folder_that_others_could_write_to_is_not_loaded(folder, builds, mode, caplog):
    planted = folder / BUILT.name
    shutil.copy(BUILT, planted)
    folder.chmod(mode)
    library.open_library()
    assert "others could write to" in caplog.text
    assert len(builds) == 1 and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_not_used(folder, monkeypatch, caplog):
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    if me == 0:  # root's folders are trusted: make it a third user's
        os.chown(folder, 12345, 12345)
    other = library.cache_folder()
    assert other != folder and other.stat().st_mode & 0o777 == 0o700
    assert "built for this process alone" in caplog.text


def test_a_folder_below_one_that_others_can_write_to_is_not_used(folder):
    folder.parent.chmod(0o777)
    assert library.cache_folder() != folder
    folder.parent.chmod(0o1777)  # as /tmp: others cannot rename it
    assert library.cache_folder() == folder


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("cause", ["a file is there", "no home", "read-only"])
def test_without_a_folder_to_write_to_a_temporary_one_is_used(cause, folder, builds, monkeypatch, caplog):
    if cause == "a file is there":
        folder.rmdir()
        folder.write_text("")
    elif cause == "no home":
        monkeypatch.setattr(library, "own_folder", no_home)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    opened = Path(library.open_library()._name)
    assert len(builds) == 1 and opened.parent != folder and opened.parent.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count("set XDG_CACHE_HOME to a folder of your own") == 1


def test_a_folder_that_cannot_be_written_to_is_read(folder, builds, monkeypatch, caplog):
    shutil.copy(BUILT, folder / BUILT.name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert library.open_library()._name == str(folder / BUILT.name)
    assert not builds and not caplog.text


def test_building_removes_what_was_not_used_for_long(folder, builds):
    now = time.time()
    for name, age in (("ops-a.so", library.UNUSED_S), ("ops-b.so", 0), ("tmpa", library.ABANDONED_S), ("tmpb", 0)):
        path = folder / name
        path.touch() if path.suffix else (path / "objects").mkdir(parents=True)
        os.utime(path, (now, now - age - 60))
    (folder / "calibrated").mkdir()
    os.utime(folder / "calibrated", (0, 0))
    library.open_library()
    assert {path.name for path in folder.iterdir()} == {"ops-b.so", "tmpb", "calibrated", BUILT.name}


def test_opening_a_library_counts_as_its_use(folder):
    shutil.copy(BUILT, folder / BUILT.name)
    os.utime(folder / BUILT.name, (0, 0))
    library.open_library()
    assert time.time() - (folder / BUILT.name).stat().st_mtime < 60


PROGRAM = "from qwen3fast.kernels import cpu; raise SystemExit(0 if cpu.load() else 3)"


def test_a_truncated_library_does_not_end_the_process(folder):
    """Loaded as it is, it would: SIGBUS where its pages are missing."""
    shutil.copy(BUILT, folder / BUILT.name)
    os.truncate(folder / BUILT.name, 20_000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": "/nonexistent"}
    environment.pop("CXX", None)
    environment[library.PIN] = "native"
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr  # no compiler: PyTorch's forms
