"""The chat page in a real browser: headless Chromium, driven by Playwright. Skipped where either is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from serving import running, tiny_generator  # noqa: F401  fixtures

from qwen3fast import Generator
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.page import page as make_page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
ATTACK = '<img src=x onerror="document.title=1"><script>document.title=2</script>[x](javascript:alert(1))'
# Where screenshots go, for a person to look at.
SHOTS = os.environ.get("QWEN3FAST_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def view(browser, tiny_generator):  # noqa: F811
    """The page of a server with tiny, in a fresh profile; no script error may happen on it."""
    with running({"tiny": tiny_generator}, ServerOptions(strict=True)) as url:
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        view = context.new_page()
        errors: list[str] = []
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(url)
        sync_api.expect(view.locator("#model")).to_have_value("tiny")
        yield view
        context.close()
        assert errors == []


def shoot(view, name: str) -> None:
    """Keep a screenshot if that was asked for."""
    if SHOTS:
        view.screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def ask(view, text: str) -> None:
    """Type a message and send it with Enter."""
    view.fill("#input", text)
    view.press("#input", "Enter")


def test_a_question_is_answered_with_folded_reasoning(view):
    view.click("#settings summary")
    view.fill("#temperature", "0")
    ask(view, "What is 17 + 25?")
    reply = view.locator(".assistant").last
    sync_api.expect(reply.locator(".body")).to_have_text("42")
    assert not reply.locator("details.reasoning").evaluate("fold => fold.open")
    reply.locator("summary").click()
    sync_api.expect(reply.locator(".reasoning .text")).to_contain_text("carry 1")
    sync_api.expect(view.locator("#speed")).to_contain_text("tokens/s")
    shoot(view, "answered")
    view.reload()
    sync_api.expect(view.locator(".assistant .body")).to_have_text("42")
    view.locator(".assistant").get_by_text("Regenerate").click()
    sync_api.expect(view.locator(".assistant .body")).to_have_text("42")
    view.locator(".user").get_by_text("Edit").click()
    assert view.input_value("#input") == "What is 17 + 25?"
    assert view.locator(".message").count() == 0


def test_a_reply_can_be_stopped(view, tiny_generator: Generator):  # noqa: F811
    view.route("**/v1/chat/completions", lambda route: route.continue_(
        post_data={**route.request.post_data_json, "ignore_eos": True, "max_tokens": 450}
    ))  # fmt: skip
    ask(view, "Go on and on")
    sync_api.expect(view.locator("#stop")).to_be_visible()
    sync_api.expect(view.locator(".assistant")).to_be_visible()
    shoot(view, "streaming")
    view.click("#stop")
    sync_api.expect(view.locator("#send")).to_be_visible()
    for _ in range(200):
        if tiny_generator.stats.slots_in_use == 0:
            break
        view.wait_for_timeout(10)
    assert tiny_generator.stats.slots_in_use == 0


def fake_reply(view, content: str) -> None:
    """Have the server's place taken by one reply."""
    chunk = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    view.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, headers={"Content-Type": "text/event-stream"})
    )


def test_what_a_model_or_user_writes_is_never_run(view):
    fake_reply(view, f"{ATTACK}\n\n```\n{ATTACK}\n```\n| a |\n|---|\n| {ATTACK} |")
    title = view.title()
    ask(view, ATTACK)
    sync_api.expect(view.locator(".assistant .body")).to_contain_text("onerror")
    assert view.locator("#log img, #log script, #log a").count() == 0
    view.reload()
    assert view.title() == title
    assert "<img" in view.locator("#conversations button").first.inner_text()


def test_markdown_becomes_elements(view):
    fake_reply(
        view, "# Title\n\nSome **bold** `code`\n\n1. one\n2. two\n\n```py\nx = 1\n```\n\n[a](https://example.org)"
    )
    ask(view, "x")
    body = view.locator(".assistant .body")
    for selector, text in {"h3": "Title", "strong": "bold", "li >> nth=1": "two", "pre": "x = 1", "a": "a"}.items():
        sync_api.expect(body.locator(selector)).to_have_text(text)
    shoot(view, "markdown")


def test_a_server_that_is_gone_is_told_and_the_next_try_works(view):
    view.route("**/v1/chat/completions", lambda route: route.abort())
    ask(view, "What is 17 + 25?")
    sync_api.expect(view.locator("#status")).to_contain_text("No reply")
    shoot(view, "no-server")
    view.unroute("**/v1/chat/completions")
    ask(view, "What is 17 + 25?")
    sync_api.expect(view.locator(".assistant .body").last).to_have_text("42")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, tiny_generator, scheme):  # noqa: F811
    with running({"tiny": tiny_generator}) as url:
        context = browser.new_context(viewport={"width": 380, "height": 700}, color_scheme=scheme)
        view = context.new_page()
        view.goto(url)
        ask(view, "What is 17 + 25?")
        sync_api.expect(view.locator("#send")).to_be_visible()
        shoot(view, f"phone-{scheme}")
        view.evaluate("document.querySelector('#speed').textContent = '12345.6 tokens/s, first token after 123456 ms'")
        assert view.evaluate("document.documentElement.scrollWidth") <= 380
        view.click("#menu")
        sync_api.expect(view.locator("#new")).to_be_visible()
        context.close()


def test_the_policy_lets_nothing_else_run():
    html, headers = make_page()
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "src=" not in html and "@import" not in html
