"""Load a model, continue a text, stream another, and chat.

python examples/quickstart.py
python examples/quickstart.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qwen3fast import Generator, SamplingParams


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub id, folder, .gguf file, or tiny (shipped)")
    args = parser.parse_args(argv)

    # compile="auto" answers at once and compiles meanwhile; the default compiles first.
    with Generator.from_pretrained(args.model, compile="auto") as generator:
        greedy = SamplingParams(temperature=0, max_tokens=32)
        result = generator.generate("The capital of France is", greedy)
        print(f"The capital of France is{result.text}\n")

        print("Once upon a time", end="")
        for chunk in generator.stream("Once upon a time", SamplingParams(temperature=0.7, seed=1, max_tokens=48)):
            print(chunk.text, end="", flush=True)
        print("\n")

        reply = generator.chat([{"role": "user", "content": "What is 17 + 25?"}], greedy, enable_thinking=False)
        print(f"What is 17 + 25? {reply.text}")
        speed = reply.metrics
        print(f"(first token after {speed.time_to_first_token_s * 1000:.0f} ms; ended by {reply.finish_reason!r})")


if __name__ == "__main__":
    main()
