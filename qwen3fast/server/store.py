"""The latest responses of `/v1/responses`, which later requests can continue."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from qwen3fast.server.errors import ApiError

MAX_STORED = 1000  # the oldest go first


@dataclass(frozen=True)
class Stored:
    """A response, and the whole conversation up to and including it."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]


class ResponseStore:
    """The latest responses, in memory."""

    def __init__(self) -> None:
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def add(self, stored: Stored) -> None:
        """Store a response, and delete the oldest ones beyond the limit."""
        self._stored[stored.response["id"]] = stored
        while len(self._stored) > MAX_STORED:
            self._stored.popitem(last=False)

    def get(self, response_id: str) -> Stored:
        """Return a response. Raises: ApiError (404)."""
        stored = self._stored.get(response_id)
        if stored is None:
            message = f"response {response_id!r:.100} is not stored; only the latest {MAX_STORED} are kept"
            raise ApiError(404, message, code="not_found")
        return stored

    def delete(self, response_id: str) -> None:
        """Delete a response. Raises: ApiError (404)."""
        self.get(response_id)
        del self._stored[response_id]
