"""The text that the quality of tiny is measured on."""

from __future__ import annotations

from tiny_text import TASKS, tiny_text

from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.text.tokenizer import Tokenizer


def test_text_of_tiny_is_the_same_each_time_and_has_whole_conversations():
    text = tiny_text(rounds=2, seed=5)
    assert text == tiny_text(rounds=2, seed=5) != tiny_text(rounds=2, seed=6)
    assert text.count("<|im_start|>assistant\n<think>\n") >= 2 * len(TASKS)
    assert text.count("<|im_start|>") == text.count("<|im_end|>")
    ids = Tokenizer.from_folder(TINY_FOLDER).encode(text)
    assert len(ids) > 200
