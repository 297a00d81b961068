"""The chat page: one self-contained HTML document, and a policy that allows only its own script and style."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response


@cache
def page() -> tuple[str, dict[str, str]]:
    """Return the document and its headers.

    The policy names style and script by their digests: script in a reply would not run.
    Source: Content Security Policy Level 3, section 6.7.3 (hashes).
    """
    folder = files("qwen3fast.server") / "web"
    html, css, script = ((folder / name).read_text("utf-8") for name in ("index.html", "page.css", "page.js"))
    html = html.replace("/* page.css */", css).replace("/* page.js */", script)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(css)}'; connect-src 'self'; "
        "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html, headers


async def index(request: Request) -> Response:
    """Return the page."""
    html, headers = page()
    return HTMLResponse(html, headers=headers)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
