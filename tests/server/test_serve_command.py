"""`python -m qwen3fast serve` as a process: it listens, drains at the first signal, ends at once at the second."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from qwen3fast import Generator
from qwen3fast.cli import main

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from qwen3fast.server.command import bind  # noqa: E402  needs uvicorn
from qwen3fast.server.loading import _name_and_source, add_model_arguments, load_models  # noqa: E402

ENDLESS = {"prompt": "a", "max_tokens": 600, "ignore_eos": True, "stream": True}


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen, str]]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "qwen3fast", "serve", "--model", "mine=tiny", "--no-warmup", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # nothing is compiled
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"serving mine on (http://127\.0\.0\.1:[1-9]\d+)", line):
                    break
            else:
                pytest.fail("it did not listen")
            yield process, found[1]
        finally:
            process.kill()


def test_the_first_signal_drains_and_the_port_is_free_at_once(process):
    """Although a connection lingers."""
    server, url = process
    address = "127.0.0.1", int(url.rpartition(":")[2])
    with socket.create_connection(address):
        with httpx.Client(base_url=url, timeout=30) as client:
            assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["mine"]
            with client.stream("POST", "/v1/completions", json=ENDLESS) as reply:
                lines = reply.iter_lines()
                next(lines)
                server.send_signal(signal.SIGTERM)
                while client.get("/ready").status_code == 200:
                    pass
                assert client.post("/v1/completions", json=ENDLESS).status_code == 503
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(20) == 0
    bind(*address, 1.0).close()


def test_the_second_signal_ends_at_once(process):
    server, url = process
    with (
        httpx.Client(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json={**ENDLESS, "max_tokens": 4000}) as reply,
    ):
        next(reply.iter_lines())
        server.send_signal(signal.SIGINT)
        while client.get("/ready").status_code == 200:
            pass
        server.send_signal(signal.SIGINT)
        assert server.wait(10) >= 0


@pytest.mark.parametrize("port", ["-1", "65536", "1e3", "http", ""])
def test_a_port_that_is_none_is_refused(capsys, port):
    with pytest.raises(SystemExit, match="2"):
        main(["serve", f"--port={port}"])
    assert f"argument --port: {port!r} is not a port from 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1", "Address already in use"), ("no.such.host.invalid", "Name or service|failure")]
)
def test_an_address_that_cannot_be_had_is_told_before_models_load(monkeypatch, capsys, host, reason):
    monkeypatch.setattr("qwen3fast.server.command.load_models", lambda args: pytest.fail("it loads"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--host", host, "--port", port]) == 1
    assert re.search(f"cannot listen on {host}, port {port}: .*({reason}).*; choose other", capsys.readouterr().err)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_second_server_is_refused_while_the_first_one_loads(monkeypatch, capsys, restarted):
    """restarted: a connection of an ended server remains in TIME_WAIT on the port."""
    with socket.create_server(("127.0.0.1", 0)) as ended:
        port = ended.getsockname()[1]
        if restarted:
            with socket.create_connection(("127.0.0.1", port)) as client:
                ended.accept()[0].close()
                client.recv(1)
    monkeypatch.setattr("qwen3fast.server.command.load_models", lambda args: pytest.fail("it loads"))
    with bind("127.0.0.1", port, 1.0):
        assert main(["serve", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_the_config_of_an_adapter_that_is_damaged_is_named(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    assert f"{tmp_path}/adapter_config.json is not valid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tiny", "--model", "no-such"], "no folder 'no-such'"),
        (["--model", "tiny", "--embedder", "/no/such"], "no folder '/no/such'"),
        (["--model", "tiny", "--adapter", "a=/no/such"], "/no/such/adapter_config.json not found"),
    ],
)
def test_all_sources_are_found_before_the_first_model_loads(options, message, monkeypatch, capsys):
    monkeypatch.setattr(Generator, "from_pretrained", lambda *args, **options: pytest.fail("it loads"))
    assert main(["serve", "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_source_may_hold_equals_signs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4").mkdir()
    assert _name_and_source("lr=1e-4") == ("lr=1e-4", "lr=1e-4")
    assert _name_and_source("mine=lr=1e-4") == ("mine", "lr=1e-4")
    assert _name_and_source("mine=Qwen/Qwen3-0.6B") == ("mine", "Qwen/Qwen3-0.6B")
    assert _name_and_source("tiny") == ("tiny", "tiny")


def test_options_reach_the_model(monkeypatch):
    asked = []
    name = "qwen3fast.server.loading.resolve_source"
    monkeypatch.setattr(name, lambda source, revision: asked.append(revision) or source)
    add_model_arguments(parser := argparse.ArgumentParser())
    words = ["--model", "tiny", "--revision", "abc", "--kv-cache-dtype", "int8", "--max-seq-len", "64", "--no-compile"]
    with load_models(parser.parse_args(words))["tiny"] as generator:
        assert asked == ["abc"] and generator.options.kv_cache_dtype == "int8"
        assert generator.options.compile is False
    with pytest.raises(ValueError, match="--revision is for a single model, got 2"):
        load_models(parser.parse_args([*words, "--embedder", "b=tiny"]))


@pytest.mark.parametrize("spec", ["", "mine="])
def test_a_model_without_a_source_is_refused(capsys, spec):
    assert main(["serve", "--port", "0", "--model", spec]) == 2
    assert f"{spec!r} names no model; expected [NAME=]SOURCE" in capsys.readouterr().err
