"""From token ids to text that may be shown: whole characters only, and never any part of a stop string."""

from __future__ import annotations

from qwen3fast.tokenizer import IncrementalDecoder, Tokenizer


class TextStream:
    """Collects the text of one reply. Without a tokenizer (random weights) the text stays empty."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()) -> None:
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._stop = stop
        self._held_back = max((len(s) for s in stop), default=1) - 1
        self._shown = 0
        self.text = ""
        self.is_finished = False

    def push(self, token_id: int) -> bool:
        """Add a token. Returns whether a stop string is now complete; it and all after it are cut from the text."""
        if self._decoder is None:
            return False
        return self._append(self._decoder.push(token_id))

    def finish(self) -> None:
        """No more tokens: nothing is held back any longer."""
        if not self.is_finished and self._decoder is not None:
            self._append(self._decoder.finish())
        self.is_finished = True

    def take(self) -> str:
        """Text that has become safe to show since the last call."""
        end = len(self.text) if self.is_finished else max(self._shown, len(self.text) - self._held_back)
        piece, self._shown = self.text[self._shown : end], end
        return piece

    def _append(self, piece: str) -> bool:
        # A stop string may have begun in text seen before, but not further back than its own length.
        search_from = max(0, len(self.text) - self._held_back)
        self.text += piece
        found = [at for s in self._stop if (at := self.text.find(s, search_from)) >= 0]
        if not found:
            return False
        self.text = self.text[: min(found)]
        self.is_finished = True
        return True
