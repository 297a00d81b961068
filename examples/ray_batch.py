"""Offline batch inference over many machines with Ray Data: prompts in, replies out, one JSON object per line.

    pip install -e '.[ray]'
    python examples/ray_batch.py prompts.jsonl replies.jsonl --model Qwen/Qwen3-0.6B --workers 2

Each worker is a process with its own Generator, placed by Ray: on this machine, or with --address (or RAY_ADDRESS) on
a cluster, every node of which needs qwen3fast and access to the model.

A line of input has "prompt", a text, or "messages", a conversation, and may have "id"; the default is its line number,
from 1. A line of output has "id", "text", "finish_reason", "prompt_tokens" and "new_tokens"; or "id" and "error" if the
prompt could not be run. Replies are written in the order of the prompts, as they come. A run that was interrupted goes
on where it stopped: prompts whose ids are already in the output are skipped. To run a failed prompt again, delete its
line first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen3fast import Generator, RequestHandle, SamplingParams
from qwen3fast.cli import COMPILE_MODES


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Return the lines of the input, each with an id.

    Raises: FileNotFoundError; ValueError naming the line if it is not a prompt or its id is a duplicate.
    """
    prompts: dict[int | str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise ValueError(f"{file}, line {number}: not JSON ({err})") from err
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
            raise ValueError(f'{file}, line {number}: expected an object with either "prompt" or "messages"')
        row = {"id": number, **row}
        if not isinstance(row["id"], int | str) or row["id"] in prompts:
            raise ValueError(f"{file}, line {number}: id {row['id']!r} must be a number or a text, and not come twice")
        prompts[row["id"]] = row
    return list(prompts.values())


def finished_ids(file: Path) -> set[int | str]:
    """Return the ids in an existing output, and remove a last line that was cut off while it was written.

    Raises: ValueError for a file that this program did not write.
    """
    if not file.is_file():
        return set()
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        ids = {json.loads(line)["id"] for line in whole.splitlines()}
    except (json.JSONDecodeError, KeyError, TypeError) as err:
        raise ValueError(f"{file} is not an output of this program ({err!r}); choose another file") from err
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return ids


class Worker:
    """The Generator of one process. Ray calls it with batches of rows, here a single column of JSON texts."""

    def __init__(self, model: str, options: dict[str, Any], params: dict[str, Any], thinks: bool) -> None:
        """Load the model. options: of `Generator.from_pretrained`. params: of `SamplingParams`. thinks: reason."""
        self.generator = Generator.from_pretrained(model, **options)
        self.params, self.thinks = SamplingParams(**params), thinks

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Return the replies to a batch of prompts, which run together as far as there are slots."""
        rows = [json.loads(text) for text in batch["json"]]
        started = [self._start(row) for row in rows]
        return {"json": [json.dumps(self._finish(*pair)) for pair in zip(rows, started, strict=True)]}

    def _start(self, row: dict[str, Any]) -> RequestHandle | ValueError:
        try:
            prompt = row.get("prompt")
            if "messages" in row:
                prompt = self.generator.render(row["messages"], self.params, self.thinks)
            return self.generator.submit(prompt, self.params)
        except ValueError as err:
            return err

    def _finish(self, row: dict[str, Any], started: RequestHandle | ValueError) -> dict[str, Any]:
        if isinstance(started, ValueError):
            return {"id": row["id"], "error": str(started)}
        try:
            result = started.result()
        except FloatingPointError as err:
            return {"id": row["id"], "error": str(err)}
        return {
            "id": row["id"],
            "text": result.text,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.metrics.prompt_tokens,
            "new_tokens": result.metrics.new_tokens,
        }


def run(prompts: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """Yield the replies as JSON texts in the order of the prompts, while Ray computes more.

    Raises: ImportError without Ray.
    """
    try:
        import ray
    except ImportError as err:
        raise ImportError("this program needs Ray: pip install -e '.[ray]'") from err
    ray.init(address=args.address, log_to_driver=args.verbose, ignore_reinit_error=True)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = sys.stderr.isatty()
    options = {"max_seq_len": args.max_seq_len, "max_batch_size": args.rows, "quantization": args.quantization}
    options |= {"compile": COMPILE_MODES[args.compile], "threads": max(1, int(args.cpus))}
    params = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    batch_size = args.rows * 4  # a slot that is free early finds another prompt
    texts = [{"json": json.dumps(row)} for row in prompts]
    replies = ray.data.from_items(texts, override_num_blocks=-(-len(texts) // batch_size)).map_batches(
        Worker,
        fn_constructor_kwargs={"model": args.model, "options": options, "params": params, "thinks": args.think},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    for row in replies.iter_rows():
        yield row["json"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description="Replies to many prompts, on many machines, through Ray Data.")
    parser.add_argument("prompts", type=Path, help='JSON lines with "prompt" or "messages"')
    parser.add_argument("replies", type=Path, help="output; an interrupted run goes on where it stopped")
    parser.add_argument("--model", default="tiny", help="as for qwen3fast generate [%(default)s]")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the whole model [%(default)s]")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of each worker, and its threads [%(default)s]")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each worker [%(default)s]")
    parser.add_argument("--rows", type=int, default=8, help="requests that a worker runs at once [%(default)s]")
    parser.add_argument("--max-seq-len", type=int, default=4096, help="prompt and reply, tokens [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=256, help="new tokens per reply, at most [%(default)s]")
    parser.add_argument("--quantization", help="int8 or int4, on GPUs also fp8")
    parser.add_argument("--compile", choices=list(COMPILE_MODES), default="auto", help="see qwen3fast generate")
    parser.add_argument("--temperature", type=float, help="0 is greedy [the checkpoint's preset]")
    parser.add_argument("--seed", type=int, help="same seed, same replies")
    parser.add_argument("--think", action="store_true", help='let the model reason before it answers "messages"')
    parser.add_argument("--address", help="of a Ray cluster [RAY_ADDRESS, or a local one that is started]")
    parser.add_argument("--verbose", action="store_true", help="show what workers log")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit status: 0; 1 if some prompts could not be run; 2 for bad input or options."""
    args = build_parser().parse_args(argv)
    try:
        prompts, done = read_prompts(args.prompts), finished_ids(args.replies)
        for name in ("workers", "rows"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    except (ValueError, OSError) as err:
        print(f"ray_batch: error: {err}", file=sys.stderr)
        return 2
    todo = [row for row in prompts if row["id"] not in done]
    failed = 0
    try:
        with args.replies.open("a", encoding="utf-8") as output:
            for text in run(todo, args) if todo else ():
                output.write(text + "\n")
                output.flush()
                failed += "error" in json.loads(text)
    except ImportError as err:
        print(f"ray_batch: error: {err}", file=sys.stderr)
        return 2
    print(f"{len(todo)} replies, {failed} of them errors; {len(prompts) - len(todo)} were there already")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
