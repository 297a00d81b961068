"""Compilation while the server answers: the requests that cause it, what `/ready` tells meanwhile, and its end."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from dataclasses import replace

from serving import tiny_generator  # noqa: F401  fixtures

from qwen3fast import Generator, QueueFullError
from qwen3fast.server import compiling
from qwen3fast.server.app import create_app
from qwen3fast.server.status import ready

STATS = Generator.stats


def ask_ready(app):
    """Return what /ready answers."""
    request = type("Request", (), {"app": app})()
    response = asyncio.run(ready(request))
    return response.status_code, json.loads(response.body)


def test_ready_tells_how_much_is_left_to_compile(tiny_generator, monkeypatch, caplog):  # noqa: F811
    caplog.set_level(logging.INFO, "qwen3fast.server")
    state, go_on, asked = {"compiling": 3, "compilations": 0}, threading.Event(), threading.Event()

    def wait(seconds):
        asked.set()
        assert go_on.wait(30)
        state.update(compiling=0, compilations=state["compilations"] + (state["compilations"] == 0))

    monkeypatch.setattr(compiling, "time", type("Time", (), {"sleep": staticmethod(wait), "perf_counter": float}))
    monkeypatch.setattr(compiling, "_run", lambda *arguments: None)
    monkeypatch.setattr(Generator, "stats", property(lambda self: replace(STATS.__get__(self), **state)))
    app = create_app({"tiny": tiny_generator})
    thread = compiling.compile_meanwhile(app.state.server)
    assert asked.wait(30)
    assert ask_ready(app) == (200, {"status": "ready", "compiling": {"tiny": 3}})
    go_on.set()
    thread.join(30)
    assert ask_ready(app) == (200, {"status": "ready"})
    assert "tiny: ready after 0 s, 1 compiled forms" in caplog.messages


def test_all_numbers_of_rows_and_all_samplers_are_asked_for(tiny_generator, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(compiling, "_run", lambda generator, count, params, rng: asked.append((count, params)))
    compiling.compile_meanwhile(create_app({"tiny": tiny_generator}).state.server).join(30)
    assert asked == 2 * [(count, params) for count in (1, 2, 4) for params in compiling.SAMPLINGS]


def test_its_requests_are_answered_and_a_full_queue_does_not_end_it(tiny_generator, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compiling, "POLL_S", 0)
    before = tiny_generator.stats.prefilled_tokens
    compiling._run(tiny_generator, 3, compiling.SAMPLINGS[0], random.Random(1))
    assert tiny_generator.stats.prefilled_tokens - before == 3 * compiling.PROMPT_TOKENS

    def refuse(self, *arguments, **more):
        raise QueueFullError("full")

    monkeypatch.setattr(Generator, "submit", refuse)
    compiling._run(tiny_generator, 3, compiling.SAMPLINGS[0], random.Random(1))


def test_a_closed_generator_ends_it(caplog):
    caplog.set_level(logging.INFO, "qwen3fast.server")
    with Generator.from_pretrained("tiny", compile=False, max_seq_len=64) as generator:
        app = create_app({"tiny": generator})
    thread = compiling.compile_meanwhile(app.state.server)
    thread.join(30)
    assert not thread.is_alive() and not app.state.server.compiling and not caplog.messages
