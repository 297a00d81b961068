"""Stream several replies at once in asyncio; a reply that is no longer wanted is cancelled.

python examples/streaming_async.py
python examples/streaming_async.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from qwen3fast import Generator, SamplingParams

PROMPTS = ["Once upon a time", "Once upon a time, a fox", "Once upon a time, Bob"]


async def read_all(generator: Generator, prompt: str, params: SamplingParams) -> str:
    """Return the whole reply, as a task that shares the engine with the others."""
    text = ""
    async for chunk in generator.astream(prompt, params):
        text += chunk.text
    return text


async def read_some(generator: Generator, prompt: str, params: SamplingParams, characters: int) -> str:
    """Return the beginning of a reply; the rest is never computed."""
    text = ""
    async with aclosing(generator.astream(prompt, params)) as chunks:  # leaving the block frees the slot at once
        async for chunk in chunks:
            text += chunk.text
            if len(text) >= characters:
                break
    return text


async def run(model: str) -> None:
    """Stream all prompts together: each decode step computes one token for every running reply."""
    with Generator.from_pretrained(model, compile="auto", max_batch_size=4) as generator:
        params = SamplingParams(temperature=0.3, seed=0, max_tokens=32)
        tasks = [read_all(generator, prompt, params) for prompt in PROMPTS]
        *replies, start = await asyncio.gather(*tasks, read_some(generator, "Once upon a time", params, characters=20))
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            print(f"{prompt}{reply}\n")
        print(f"Once upon a time{start} ... (cancelled)")
        print(f"slots in use now: {generator.stats.slots_in_use}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub id, folder, .gguf file, or tiny (shipped)")
    asyncio.run(run(parser.parse_args(argv).model))


if __name__ == "__main__":
    main()
