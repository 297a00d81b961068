"""Levels of processors: which library a machine gets, and what becomes of one that is not whole."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import building, levels, library

HASWELL = "fpu avx avx2 bmi1 bmi2 f16c fma abm movbe sse4_2"
ALDER_LAKE = HASWELL + " avx_vnni"
SKYLAKE_X = HASWELL + " avx512f avx512bw avx512cd avx512dq avx512vl"
CASCADE_LAKE = SKYLAKE_X + " avx512_vnni"
COOPER_LAKE = CASCADE_LAKE + " avx512_bf16"
ZEN_4 = COOPER_LAKE + " avx512vbmi"
OF_VNNI = ["avx512vnni", "avx2"]
NEOVERSE_N1 = "fp asimd evtstrm aes crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp ssbs"

M1 = "hw.optional.arm.FEAT_I8MM: 0\nhw.optional.arm.FEAT_BF16: 0\nhw.optional.arm64: 1\n"  # lines of macOS's sysctl


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", HASWELL, ["avx2"]),
        ("x86_64", HASWELL.replace(" fma", ""), []),
        ("x86_64", ALDER_LAKE, ["avxvnni", "avx2"]),
        ("x86_64", SKYLAKE_X, ["avx2"]),
        ("x86_64", CASCADE_LAKE, OF_VNNI),
        ("x86_64", COOPER_LAKE, OF_VNNI),
        ("x86_64", ZEN_4, ["avx512", *OF_VNNI]),
        ("x86_64", ZEN_4 + " avx_vnni", ["avx512", "avx512vnni", "avxvnni", "avx2"]),
        ("x86_64", ZEN_4 + " amx_tile amx_bf16 amx_int8", ["amx", "avx512", *OF_VNNI]),
        ("x86_64", ZEN_4 + " amx_tile amx_bf16", ["avx512", *OF_VNNI]),
        ("aarch64", NEOVERSE_N1, ["dotprod"]),
        ("aarch64", NEOVERSE_N1 + " i8mm bf16", ["i8mm", "dotprod"]),
        ("arm64", levels.apple_features(M1), ["dotprod"]),
        ("arm64", levels.apple_features(M1.replace("0", "1")), ["i8mm", "dotprod"]),
        ("x86_64", levels.apple_features("hw.optional.avx2_0: 1"), []),
        ("aarch64", "fp asimd aes crc32", []),
        ("riscv64", ZEN_4, []),
    ],
)
def test_a_processor_gets_the_levels_it_has_all_features_of(machine, features, expected):
    assert [level.name for level in levels.usable_levels(machine, features.split())] == expected


@pytest.mark.skipif(platform.machine() != "x86_64" or not building.find_compiler(), reason="for compilers of x86")
def test_this_machine_has_the_levels_that_its_compiler_finds():
    command = [*building.find_compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    found = {level.name for level in levels.this_machine()}
    assert ("avx512" in found) == ({"__AVX512VNNI__", "__AVX512BF16__", "__AVX512VBMI__"} <= macros)
    assert ("avx512vnni" in found, "avxvnni" in found) == ("__AVX512VNNI__" in macros, "__AVXVNNI__" in macros)


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx2 fma", "Features\t: fpu avx2 fma"])
def test_features_are_read_from_cpuinfo(line, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\nbugs\t: none\n")
    field = line.partition(":")[0].strip()
    assert levels.cpu_info(field, tmp_path / "cpuinfo").split() == ["fpu", "avx2", "fma"]
    assert levels.cpu_info("model name", tmp_path / "cpuinfo") == levels.cpu_info(field, tmp_path / "missing") == ""


def test_a_pin_that_this_machine_has_not_is_refused(monkeypatch):
    monkeypatch.setenv(library.PIN, "amx9000")
    with pytest.raises(ValueError, match=r"QWEN3FAST_CPU_LEVEL must be native or a level .* got 'amx9000'"):
        library.open_library()


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A folder `lib` with a library of this machine's best level, and no compiler to take its place."""
    if not cpu.load() or not levels.this_machine():
        pytest.skip("no library, or no level, of this machine")
    folder = tmp_path / "lib"
    folder.mkdir()
    source = Path(cpu.library.functions()._name)
    name = f"{levels.this_machine()[0].name}-{library.digest(source.read_bytes())}.so"
    shutil.copy(source, folder / name)
    monkeypatch.setattr(library, "SHIPPED", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(library.PIN, raising=False)
    return folder / name


def test_the_shipped_library_of_the_level_is_used(shipped):
    assert library.open_library()._name == str(shipped)
    assert not (shipped.parent.parent / "cache").exists()


@pytest.mark.parametrize("pin", ["", "level", "native"])
def test_a_pin_chooses_between_shipped_and_native(shipped, pin, monkeypatch):
    monkeypatch.setenv(library.PIN, shipped.name.partition("-")[0] if pin == "level" else pin)
    if pin == "native":  # must be built, which it cannot be here
        with pytest.raises(library.NoCompilerError):
            library.open_library()
    else:
        assert library.open_library()._name == str(shipped)


def test_a_shipped_library_that_the_system_cannot_load_is_reported_with_its_reason(shipped, caplog):
    other = shipped.with_name(f"{shipped.name.partition('-')[0]}-{library.digest(bytes(100))}.so")
    other.write_bytes(bytes(100))
    shipped.unlink()
    with pytest.raises(library.NoCompilerError):
        library.open_library()
    assert "invalid ELF header" in caplog.text and "install qwen3fast again" not in caplog.text


@pytest.mark.parametrize("is_loaded", [False, True])
def test_the_version_is_of_the_library_that_is_used(shipped, is_loaded, monkeypatch):
    """Measurements of one must not be taken for another's."""
    found = []
    for pin in ("", "native"):
        monkeypatch.setenv(library.PIN, pin)
        path = f"ops-{library.source_key()}-{'0' * 64}.so" if pin else str(shipped)
        monkeypatch.setattr(library, "_used", SimpleNamespace(_name=path) if is_loaded else None)
        found.append(library.version())
    assert found == [shipped.name[:20], f"ops-{library.source_key()}"]


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "truncated"])
def test_a_shipped_library_that_is_not_whole_is_passed_over(shipped, content, caplog):
    if content is None:
        os.truncate(shipped, 20_000)  # loaded, it would end the process with SIGBUS
    else:
        shipped.write_bytes(content)
    with pytest.raises(library.NoCompilerError):
        library.open_library()
    assert "install qwen3fast again" in caplog.text and shipped.exists()
