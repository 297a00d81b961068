"""The servers that take part: how each is installed and started, and the form in which it takes prompts."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from peers.protocol import CACHE
from tables import OURS

from servers.weights import gguf_path

LLAMA_CPP = "llama-cpp-python==0.3.36"  # whose source archive holds llama.cpp's
TRANSFORMERS = ("transformers[serving]==5.24.0", "torch")
MAX_SEQ_LEN = 512
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF "
    "-DLLAMA_OPENSSL=OFF"
).split()


@dataclass(frozen=True)
class Settings:
    """What all servers are started with. slots: requests that may run at once."""

    folder: Path
    llama_server: Path
    transformers_python: Path
    threads: int
    slots: int


@dataclass(frozen=True)
class Kind:
    """A server in a format.

    command: returns its arguments for the settings and a port. program: returns the file without which it cannot run.
    version: returns its version. computes: precisions, in words, for the record. sends_text: prompts are sent as text.
    model: the name that requests use; None for the folder of the weights.
    """

    name: str
    format: str
    computes: str
    program: Callable[[Settings], Path]
    command: Callable[[Settings, int], list[str]]
    version: Callable[[Settings], str]
    sends_text: bool = False
    model: str | None = "bench"

    @property
    def full_name(self) -> str:
        """The name with the format."""
        return f"{self.name}, {self.format}"


def _ours(format: str, computes: str) -> Kind:
    def command(s: Settings, port: int) -> list[str]:
        quantization = [] if format == "bf16" else ["--quantization", format]
        return [
            sys.executable, "-m", "qwen3fast", "serve", "--model", f"bench={s.folder}", "--port", str(port), "--warmup",
            "--max-seq-len", str(MAX_SEQ_LEN), "--max-batch-size", str(s.slots), "--threads", str(s.threads),
            *quantization,
        ]  # fmt: skip

    return Kind(OURS, format, computes, lambda s: Path(sys.executable), command, lambda s: version("qwen3fast"))


def _llama(format: str, computes: str) -> Kind:
    def command(s: Settings, port: int) -> list[str]:
        return [
            str(s.llama_server), "--model", str(gguf_path(s.folder, format)), "--port", str(port), "--alias", "bench",
            "--parallel", str(s.slots), "--ctx-size", str(s.slots * MAX_SEQ_LEN), "--threads", str(s.threads),
        ]  # fmt: skip

    return Kind("llama-server", format, computes, lambda s: s.llama_server, command, lambda s: LLAMA_CPP)


def _transformers(name: str, *options: str) -> Kind:
    def command(s: Settings, port: int) -> list[str]:
        program = s.transformers_python.with_name("transformers")
        return [str(program), "serve", str(s.folder), "--port", str(port), "--host", "127.0.0.1", *options]

    def installed(s: Settings) -> str:
        code = "import importlib.metadata as m; print(m.version('transformers'))"
        return subprocess.run([s.transformers_python, "-c", code], capture_output=True, text=True).stdout.strip()

    return Kind(
        name, "bf16", "bf16", lambda s: s.transformers_python, command, installed, sends_text=True, model=None
    )  # fmt: skip


KINDS = (
    _ours("bf16", "bf16 weights and cache"),
    _ours("int4", "int4 weights, a scale per 32 (4.26 bits per weight), all matrices; bf16 cache"),
    _llama("bf16", "bf16 weights, fp16 cache"),
    _llama("int4", "Q4_0 (4.5 bits per weight), all matrices (--pure); fp16 cache"),
    _transformers("transformers serve"),
    _transformers("transformers serve, continuous", "--continuous-batching"),
)


def set_up(llama_server: Path, transformers_python: Path) -> None:
    """Build llama.cpp's server and create transformers' environment if they are missing. Raises: OSError,
    subprocess.SubprocessError."""
    if not transformers_python.is_file():
        venv.create(transformers_python.parent.parent, with_pip=True)
        subprocess.run([transformers_python, "-m", "pip", "install", *TRANSFORMERS], check=True)
    if not llama_server.is_file():
        work = CACHE / "llama-server-source"
        work.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(work)]
        subprocess.run([*pip, LLAMA_CPP], check=True)
        [archive] = work.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(work, filter="data")
        source = work / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
        build = llama_server.parent.parent
        subprocess.run(["cmake", "-S", source, "-B", build, *CMAKE], check=True)
        targets = ["--target", "llama-server", "--target", "llama-quantize"]
        subprocess.run(["cmake", "--build", build, "--parallel", str(os.cpu_count()), *targets], check=True)
