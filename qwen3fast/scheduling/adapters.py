"""Adapter: a LoRA adapter that an engine holds. Requests refer to the object, not to its name, which may be reused."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3fast.checks import checked_text


@dataclass(eq=False)
class Adapter:
    """A LoRA adapter in a slot of the engine.

    is_loaded: False once it is being unloaded: requests that are queued later are refused, earlier ones finish.
    """

    name: str
    slot: int
    is_loaded: bool = True

    def check_loaded(self) -> None:
        """Raises: RuntimeError if it is being unloaded."""
        if not self.is_loaded:
            raise RuntimeError(f"adapter {self.name!r} was unloaded before this request began")


def checked_name(name: object) -> str:
    """Return the name of an adapter. Raises: ValueError unless it is a non-empty string."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"an adapter's name must be a non-empty string, got {name!r:.200}")
    return checked_text("an adapter's name", name)
