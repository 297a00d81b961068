"""ServerOptions: the server's settings, all of them command-line options as well."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:\d+)?")  # as browsers write them


@dataclass(frozen=True)
class ServerOptions:
    """Settings of a server.

    Attributes:
        api_keys: each gives access to all endpoints; `/health` and `/ready` need none. Empty: no keys are needed.
        allow_origins: web pages of these origins (https://example.org), or of any ("*"), may ask in a browser.
        strict: refuse unknown fields with status 400 instead of naming them in the header `X-Ignored-Fields`.
        max_body_bytes: larger request bodies get status 413.
        request_timeout_s: a reply that takes longer ends with status 504 (in a stream, with an error event).
        receive_timeout_s: a client that sends nothing of its body for this time gets status 408.
        send_timeout_s: a streaming client that reads nothing for this time is disconnected.
        heartbeat_s: interval of comments in a stream without events.
        stream_interval_s: the least time between two events with text of one reply; the first text and the end are sent
            at once. At high speed several tokens share an event; 0 sends each token when it comes.
        compile_timeout_s: a JSON schema or regular expression that takes longer to compile is refused.
        log_prompts: write prompts and replies to the log; otherwise the log holds no text of users.
        enable_thinking: replies to chat completions and responses may begin with reasoning, where a request does not
            say. (Messages reason only if asked to.)
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] = ()
    strict: bool = False
    max_body_bytes: int = 8 * 2**20
    request_timeout_s: float = 600.0
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    heartbeat_s: float = 10.0
    stream_interval_s: float = 0.03  # faster than anyone reads
    compile_timeout_s: float = 1.0
    log_prompts: bool = False
    enable_thinking: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError naming the option and its value."""
        for name, value in vars(self).items():
            if name == "stream_interval_s":
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name} must be 0 or a positive number, got {value!r}")
            elif name.endswith(("_s", "_bytes")) and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("api_keys", "allow_origins"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of strings, got a string")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise ValueError("an API key must be a non-empty ASCII string")
        for origin in self.allow_origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"an allowed origin must be * or like https://example.org, got {origin!r}")
