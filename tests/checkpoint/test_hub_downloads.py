"""Downloads from a hub of our own, on this machine: what is asked for, and what happens when the line breaks.

Resuming is huggingface_hub's work; that our errors and a second call fit to it is ours.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from conftest import randomized, small_config
from test_checkpoint import assert_same_weights, tensors_of, write_checkpoint

from qwen3fast import load_model
from qwen3fast.checkpoint.source import resolve_adapter
from qwen3fast.cli import main

NAME, COMMIT = "owner/model", "0123456789abcdef0123456789abcdef01234567"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


class Hub(ThreadingHTTPServer):
    """A hub with one model.

    Attributes:
        breaks_at: the connection ends after so many bytes of the second shard, once.
        then_down: afterwards, that shard cannot be had.
        asked: each request for a shard, and its Range.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.breaks_at: int | None = None
        self.then_down = self.is_down = False
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """The parts of the hub's interface that a download of a whole model needs."""

    server: Hub

    def do_HEAD(self) -> None:
        """As GET without content."""
        self.do_GET()

    def do_GET(self) -> None:
        """The list of files, or one of them."""
        path = self.path.partition("?")[0]
        names = [file.name for file in self.server.folder.iterdir()]
        if path.startswith(f"/api/models/{NAME}/tree/"):
            self._answer(json.dumps([self._entry(name) for name in names]).encode())
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in names]
            self._answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/{NAME}/resolve/") and path.rpartition("/")[2] in names:
            self._send_file(path.rpartition("/")[2])
        else:
            self._answer(b"", {"X-Error-Code": "RepoNotFound"}, 404)

    def _entry(self, name: str) -> dict[str, object]:
        content = (self.server.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_file(self, name: str) -> None:
        content = (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD" or not name.endswith(".safetensors"):
            self._answer(content, headers)
            return
        asked = self.headers.get("Range")
        self.server.asked.append((name, asked))
        if name == SECOND and self.server.is_down:
            self.send_error(503)
        elif name == SECOND and self.server.breaks_at is not None:
            most, self.server.breaks_at, self.server.is_down = self.server.breaks_at, None, self.server.then_down
            self._answer(content, headers, most=most)
        elif asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(content[start:], {**headers, "Content-Range": place}, 206)
        else:
            self._answer(content, headers)

    def _answer(
        self, content: bytes, headers: dict[str, str] | None = None, status: int = 200, most: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:most])

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub that serves a small model to `load_model`, and an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    model = randomized(small_config())
    write_checkpoint(folder, model.config, tensors_of(model), files=2)
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    download = functools.partial(
        huggingface_hub.snapshot_download,
        endpoint=f"http://127.0.0.1:{server.server_port}",
        cache_dir=tmp_path / "cache",
    )
    for module in ("source", "outline"):
        monkeypatch.setattr(f"qwen3fast.checkpoint.{module}.snapshot_download", download)
    headers = huggingface_hub.HfApi(f"http://127.0.0.1:{server.server_port}").get_safetensors_metadata
    monkeypatch.setattr("qwen3fast.checkpoint.outline.get_safetensors_metadata", headers)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_model_of_the_hub_is_downloaded_once(hub, tmp_path):
    for _ in range(2):
        assert_same_weights(load_model(NAME, device="cpu"), randomized(small_config()))
    assert sorted(hub.asked) == [(FIRST, None), (SECOND, None)]
    assert [path.name for path in (tmp_path / "cache").rglob("*.bin")] == []


def test_info_reads_headers_alone_of_what_is_not_downloaded(hub, monkeypatch, capsys):
    def info(model, *options):
        assert main(["info", "--model", str(model), "--device", "cpu", *options]) == 0
        return capsys.readouterr().out.splitlines()

    title, *lines = info(NAME)
    assert title == "owner/model (not downloaded)" and lines == info(hub.folder)[1:]
    assert sorted(hub.asked) == [(FIRST, "bytes=0-100000"), (SECOND, "bytes=0-100000")]
    monkeypatch.delenv("QWEN3FAST_CALIBRATE", raising=False)
    assert any(line.endswith("for cpu, by the first load") for line in info(NAME, "--quantization", "int4"))
    load_model(NAME, device="cpu")
    hub.asked.clear()
    assert info(NAME) == [NAME, *lines] and not hub.asked


def test_info_names_what_is_wrong_on_the_hub(hub, capsys):
    assert main(["info", "--model", "owner/modle"]) == 2
    assert "the hub has no such name" in capsys.readouterr().err
    (hub.folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    assert main(["info", "--model", NAME]) == 2
    assert NAME in capsys.readouterr().err


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("command", [["info"], ["generate", "hi"], ["quantize", "--output", "never written"]])
def test_a_model_without_safetensors_is_refused_by_name(hub, capsys, command, has_config):
    for file in hub.folder.iterdir():
        if not has_config or file.name != "config.json":
            file.unlink()
    (hub.folder / "model-Q8_0.gguf").write_bytes(b"never asked for")
    assert main([*command, "--model", NAME]) == 2
    error = capsys.readouterr().err
    assert f"error: '{NAME}' has no safetensors on the hub" in error
    assert "of .gguf files, name one (NAME:Q4_K_M)" in error


def test_a_broken_connection_is_taken_up_where_it_broke(hub):
    hub.breaks_at = 50_000
    assert_same_weights(load_model(NAME, device="cpu"), randomized(small_config()))
    assert [asked for name, asked in hub.asked if name == SECOND] == [None, "bytes=50000-"]


def test_a_failed_download_is_named_and_the_next_call_keeps_finished_files(hub):
    hub.breaks_at, hub.then_down = 50_000, True
    with pytest.raises(FileNotFoundError, match=f"'{NAME}' is neither a local folder nor available from the hub .*503"):
        load_model(NAME, device="cpu")
    hub.is_down = False
    assert_same_weights(load_model(NAME, device="cpu"), randomized(small_config()))
    assert [asked for name, asked in hub.asked if name == FIRST] == [None]


def test_a_name_that_the_hub_does_not_have_is_said_to_be_wrong(hub):
    with pytest.raises(FileNotFoundError, match=r"'owner/modle' is .*; the hub has no such name, or keeps it private"):
        load_model("owner/modle", device="cpu")


@pytest.mark.parametrize("is_down", [True, False])
def test_without_a_connection_the_network_or_the_name_may_be_at_fault(hub, monkeypatch, is_down):
    if is_down:
        hub.shutdown()
        hub.server_close()
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    advice = (
        "no copy of it is cached, and either the hub cannot be reached or the name is wrong: check the spelling, the"
    )
    for call in (load_model, resolve_adapter):
        with pytest.raises(FileNotFoundError, match=f"'{NAME}' is neither .*; {advice} network"):
            call(NAME)
