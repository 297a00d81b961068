"""Run many prompts on a few slots: as one list, and by `submit`, which returns at once.

python examples/batch_of_prompts.py
python examples/batch_of_prompts.py --model Qwen/Qwen3-0.6B --prompts 100
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from qwen3fast import Generator, SamplingParams


def question(generator: Generator, text: str) -> list[int]:
    """Return a question as the token ids of a chat: every method takes ids in place of text."""
    return generator.render([{"role": "user", "content": text}], enable_thinking=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub id, folder, .gguf file, or tiny (shipped)")
    parser.add_argument("--prompts", type=int, default=24)
    args = parser.parse_args(argv)

    # 8 slots: 8 requests decode together, the rest wait. A slot that becomes free goes to the next request at once.
    with Generator.from_pretrained(args.model, compile="auto", max_batch_size=8, max_seq_len=512) as generator:
        params = SamplingParams(temperature=0, max_tokens=32)
        prompts = [question(generator, f"Count from {i} to {i + 5}.") for i in range(args.prompts)]
        start = time.perf_counter()
        results = generator.generate(prompts, params)  # in the order of the prompts
        seconds = time.perf_counter() - start
        tokens = sum(len(result.token_ids) for result in results)
        print(f"first reply: {results[0].text}")
        print(f"{len(results)} replies, {tokens} tokens, {tokens / seconds:.0f} tokens/s together")

        # Handles can be waited for in any order, read piece by piece, or cancelled; each has parameters of its own.
        sums = ["4 + 5", "30 + 5"]
        handles = [generator.submit(question(generator, f"What is {text}?"), params) for text in sums]
        for text, handle in zip(sums, handles, strict=True):
            print(f"{text} = {handle.result(timeout=60).text}")


if __name__ == "__main__":
    main()
