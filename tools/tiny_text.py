"""Text of the kind that the shipped tiny model was trained on, as the suite `quality` reads it.

    python tools/tiny_text.py > tiny.txt
    python -m qwen3fast.bench --suite quality --model tiny --text tiny.txt

Conversations of tools/tiny_tasks.py in the chat template's format, and plain text, one after the other; sums are held
out from training. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import random

import tiny_tasks
from tokenizers import Tokenizer
from train_tiny import encode

from qwen3fast.checkpoint.source import TINY_FOLDER

TASKS = (
    lambda rng: tiny_tasks.addition(rng, held_out=True),
    tiny_tasks.counting,
    tiny_tasks.copying,
    tiny_tasks.reversing,
    lambda rng: tiny_tasks.lookup(rng, 60),
    tiny_tasks.talk,
)


def tiny_text(rounds: int, seed: int) -> str:
    """Return `rounds` conversations of each task, with reasoning in every other round, and as many plain texts."""
    rng, tokenizer = random.Random(seed), Tokenizer.from_file(str(TINY_FOLDER / "tokenizer.json"))
    texts = []
    for number in range(rounds):
        for make in TASKS:
            example = make(rng)
            ids, _ = encode(tokenizer, example, thinking=bool(number % 2 and example.thought))
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
        texts.append(tiny_tasks.plain_text(rng))
    return "\n".join(texts) + "\n"


def main() -> None:
    """Print the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=5, help="[%(default)s]")
    args = parser.parse_args()
    print(tiny_text(args.rounds, args.seed), end="")


if __name__ == "__main__":
    main()
