"""benchmarks/compare_servers.py from its options to its record, with servers that are small programs, not engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compare_servers
import pytest
import torch
from conftest import randomized, small_config
from servers import kinds, process, weights
from transformers import AutoTokenizer

from qwen3fast import load_model
from qwen3fast.bench.record import load_record
from qwen3fast.bench.serving import word_tokenizer
from qwen3fast.checkpoint.save import save_model

VOCAB = 96
# Streams the words of the tokens in a file, as many as asked for. `crash` ends it at the first request after so many.
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, words, crash = int(sys.argv[1]), json.load(open(sys.argv[2])), int(sys.argv[3])
served = 0

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        global served
        served += 1
        if served == crash:
            print("out of luck", flush=True)
            os._exit(3)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"] if isinstance(body["prompt"], str) else str(body["prompt"])
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        answer = words.get(prompt, [" aaaa"])
        for i in range(body["max_tokens"]):
            self.chunk({"choices": [{"text": answer[i % len(answer)]}]})
        self.wfile.write(b"0\\r\\n\\r\\n")

    def chunk(self, data):
        data = b"data: " + json.dumps(data).encode() + b"\\n\\n"
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))

    def log_message(self, *arguments):
        pass

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def folder(tmp_path, one_thread):
    """A folder of weights, and beside it the right words after the prompt that is checked, by ids and by text."""
    model = randomized(small_config(vocab_size=VOCAB, eos_token_ids=()), seed=3)
    save_model(model, tmp_path / "weights")
    args = compare_servers.parse(["--model", "tiny", "--prompt-tokens", "6"])
    args.vocab_size = VOCAB
    tokenizer = word_tokenizer(VOCAB)
    work, [text] = compare_servers.work_of(args, tokenizer, 1, compare_servers.CHECK_TOKENS, seed=1)
    ids = list(work[0][0])
    with torch.no_grad():
        for _ in range(compare_servers.CHECK_TOKENS):
            ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
    words = [tokenizer.decode([i]) for i in ids[6:]]
    (tmp_path / "words.json").write_text(json.dumps({text: words, str(work[0][0]): words}))
    (tmp_path / "server.py").write_text(SERVER)
    return tmp_path / "weights"


def fake(name: str, crash: int = 0, sends_text: bool = False, format: str = "bf16") -> kinds.Kind:
    """Return a kind of server that is the small program."""

    def command(s, port):
        beside = s.folder.parent
        return [sys.executable, str(beside / "server.py"), str(port), str(beside / "words.json"), str(crash)]

    program = (lambda s: Path("/nowhere/server")) if name == "missing" else (lambda s: Path(sys.executable))
    return kinds.Kind(name, format, "as it is", program, command, lambda s: "1.0", sends_text)


def run(monkeypatch, folder, *servers: kinds.Kind):
    """Run the program. Returns exit status and record."""
    monkeypatch.setattr(compare_servers, "KINDS", servers)
    monkeypatch.setattr(compare_servers, "CACHE", folder.parent)
    probe = type("Probe", (), {"__init__": lambda self, device: None, "measure": lambda self: 20.0})
    monkeypatch.setattr(compare_servers, "BandwidthProbe", probe)
    output = folder.parent / "servers.json"
    options = ["--weights", str(folder), "--prompt-tokens", "6", "--new-tokens", "4", "--clients", "1,2"]
    options += ["--rounds", "2", "--formats", "bf16,int4", "--model", "random:fake", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["compare_servers.py", *options])
    return compare_servers.main(), load_record(output)


def test_servers_take_turns_and_those_that_fail_are_reported(monkeypatch, folder, capsys):
    servers = [fake("qwen3fast"), fake("other", sends_text=True), fake("missing"), fake("falls", crash=4)]
    status, record = run(monkeypatch, folder, *servers)
    assert status == 0
    assert {(c.labels["server"], c.labels["clients"]) for c in record.cases if len(c.samples["seconds"]) == 2} >= {
        ("qwen3fast", 1), ("qwen3fast", 2), ("other", 1), ("other", 2),
    }  # fmt: skip
    assert all(check["passed"] and check["exact"] == 8 for check in record.checks.values()) and len(record.checks) == 3
    left_out = record.notes["left_out"]
    assert set(left_out) == {"missing, bf16", "falls, bf16"}
    assert "/nowhere/server is missing; run with --setup" in left_out["missing, bf16"]
    assert "the clients failed" in left_out["falls, bf16"] and "out of luck" in left_out["falls, bf16"]
    printed = capsys.readouterr()
    assert "tokens/s, 2 clients" in printed.out and "LEFT OUT: falls, bf16" in printed.err
    assert (folder.parent / "servers.png").stat().st_size > 10_000


def test_wrong_tokens_of_a_bfloat16_server_fail_the_run(monkeypatch, folder):
    (folder.parent / "words.json").write_text("{}")
    status, record = run(monkeypatch, folder, fake("qwen3fast"), fake("four", format="int4"))
    assert status == 1 and list(record.checks) == ["qwen3fast, bf16"] and not record.passed
    assert record.notes["tokens"]["four, int4"]["exact"] < 8  # noted, and allowed


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path):
    settings = kinds.Settings(tmp_path, tmp_path, tmp_path, 1, 1)
    broken = kinds.Kind("broken", "bf16", "", lambda s: tmp_path, lambda s, port: [sys.executable, "-c", "0 / 0"], str)
    with pytest.raises(process.ServerError, match=r"ended with status 1; the end of its log:(?s:.*)ZeroDivisionError"):
        process.ServerProcess(broken, settings, tmp_path / "logs" / "broken.log")


def test_all_servers_get_the_same_weights_and_words(tmp_path, monkeypatch):
    weights.write_folder("tiny", tmp_path / "tiny")
    texts, ids = " aaaa baaa zbaa", [0, 1, 51]
    assert AutoTokenizer.from_pretrained(tmp_path / "tiny")(texts)["input_ids"] == ids
    assert word_tokenizer(1024).decode(ids) == texts
    assert load_model(tmp_path / "tiny", "cpu").config.eos_token_ids == ()
    called = []
    monkeypatch.setattr(weights.subprocess, "run", lambda command, check: called.append(command))
    monkeypatch.setattr(Path, "rename", lambda self, target: None)
    (tmp_path / "tiny-bf16.gguf").touch()
    weights.write_gguf_files(tmp_path / "tiny", Path("quantizer"), ("bf16", "int4"))
    assert [command[0] for command in called] == [Path("quantizer")] and called[0][1:3] == [
        "--pure", tmp_path / "tiny-bf16.gguf",
    ]  # fmt: skip
    commands = [kind.command(kinds.Settings(tmp_path / "tiny", Path("l"), Path("p"), 2, 8), 5) for kind in kinds.KINDS]
    assert all("5" in command and str(tmp_path) in " ".join(command) for command in commands)
