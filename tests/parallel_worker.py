"""The program of each process in test_parallel.py: `parallel_worker.py OUTPUT CASE=FOLDER...`, started as by torchrun.

Rank 0 runs a case's program on the Generator that it gets and writes what came of it; the others follow.
With `--fork` before these, one process becomes all ranks: it imports for all of them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwen3fast import Generator, SamplingParams
from qwen3fast.engine import Engine
from qwen3fast.model.config import ModelConfig
from qwen3fast.parallel import Ranks, Split
from qwen3fast.parallel.shard import SPLIT_DIM, split_dim

GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = [(7 * i) % 1000 for i in range(70)]  # three chunks
PROMPTS = [LONG, "hello", [5, 6, 7], "the dog", [*LONG[:40], 1, 2], "zebra"]
OPEN: list[Generator] = []  # not closed before the program ends


def everything(generator: Generator) -> dict[str, Any]:
    """Replies of all kinds, in more requests than rows."""

    def ids(*arguments: Any, **options: Any) -> list[list[int]]:
        return [result.token_ids for result in generator.generate(*arguments, **options)]

    def sampled(**options: Any) -> SamplingParams:
        return SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_tokens=6, **options)

    def halved(logits_V: torch.Tensor, output_T: torch.Tensor) -> torch.Tensor:
        return logits_V * 0.5 - 3.0 * (torch.arange(len(logits_V)) % 2)

    four = generator.generate("hello", sampled(n=4, logprobs=2)).samples
    stop = generator.generate("hello", GREEDY).text[2:4]
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda prompt: generator.submit(prompt, GREEDY), PROMPTS))
    generator.submit(LONG, SamplingParams(max_tokens=100)).cancel()
    return {
        "greedy": ids(PROMPTS, GREEDY),
        "sampled": ids(PROMPTS, sampled()),
        "top_k": ids(PROMPTS, sampled(top_k=5)),
        "penalties": ids(PROMPTS, sampled(repetition_penalty=1.3, presence_penalty=0.5, logit_bias={11: 2.0})),
        "mixed": ids(PROMPTS, [GREEDY, sampled(frequency_penalty=1.0)] * 3),
        "processor": ids(PROMPTS, [SamplingParams(temperature=0, max_tokens=6, logits_processor=halved), GREEDY] * 3),
        "regex": [r.text for r in generator.generate(PROMPTS, SamplingParams(temperature=0, regex="[0-9]{3}"))],
        "four": [sample.token_ids for sample in four],
        "logprobs": [at.logprob for sample in four for at in sample.logprobs],
        "prompt_logprobs": [
            *(at.logprob for at in generator.generate(LONG, replace(GREEDY, prompt_logprobs=0)).prompt_logprobs[1:]),
            *(score.logprob for score in generator.score(LONG, ["zebra", "the dog"])),
        ],
        "stop": generator.generate("hello", SamplingParams(temperature=0, max_tokens=6, stop=stop)).text,
        "threads": [handle.result(timeout=60).token_ids for handle in handles],
        "stream": "".join(chunk.text for chunk in generator.stream("the dog", GREEDY)),
        "uncached": ids(PROMPTS[:2], GREEDY, use_cache=False),
        "logits": logits(generator),
    }


def logits(generator: Generator) -> list[list[float]]:
    """Return the logits after a prompt of three chunks."""
    generator.generate("hello", GREEDY)
    scheduler = generator.debug.scheduler
    scheduler.prefixes.forget_all()  # the engine is used directly
    return generator.debug.worker.call(scheduler.engine.prefill_whole, 0, LONG).tolist()


def greedy(generator: Generator) -> dict[str, Any]:
    """Greedy replies to the first prompts, logits, and bytes of weights."""
    replies = [result.token_ids for result in generator.generate(PROMPTS[:4], GREEDY)]
    return {"greedy": replies, "logits": logits(generator), "bytes": generator.stats.weight_bytes}


def compiled(generator: Generator) -> dict[str, Any]:
    """The same, and how many graphs were compiled for it."""
    return {**greedy(generator), "compilations": generator.stats.compilations}


def dying(generator: Generator) -> dict[str, Any]:
    """Return the error on rank 0 when another rank ends."""
    errors = []
    for _ in range(2):
        try:
            generator.generate(PROMPTS, GREEDY)
        except RuntimeError as err:
            errors.append(str(err))
    return {"errors": errors}


def die(self: Engine, *arguments: Any) -> None:
    """Takes the place of a method that fails."""
    raise RuntimeError("this rank's device has failed")


# A program, and what its Generator is built with.
CASES: dict[str, tuple[Callable[[Generator], dict[str, Any]], dict[str, Any]]] = {
    "everything": (everything, {"compile": False, "max_batch_size": 3}),
    "greedy": (greedy, {"compile": False, "max_batch_size": 3}),
    "experts": (greedy, {"compile": False, "max_batch_size": 3}),
    "compiled": (compiled, {"compile": "auto"}),
    "int8": (greedy, {"compile": False, "quantization": "int8", "kv_cache_dtype": "int8"}),
    "open": (greedy, {"compile": False, "max_batch_size": 3}),
    "dying": (dying, {"compile": False}),
    "cuda": (greedy, {"device": "cuda", "max_batch_size": 3}),
}


def run(case: str, folder: str, tensor_parallel: bool) -> dict[str, Any]:
    """A case in this process, or in all of them."""
    program, options = CASES[case]
    options = {"device": "cpu", "max_seq_len": 200, **options}
    generator = Generator.from_pretrained(folder, tensor_parallel=tensor_parallel, **options)
    try:
        return program(generator)
    finally:
        if case == "open":
            OPEN.append(generator)
        else:
            generator.close()


def check_dtensor() -> dict[str, Any]:
    """Raises: AssertionError unless this rank's parts are those that DTensor gives it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = Ranks.start("cpu")
    mesh = init_device_mesh("cpu", (ranks.size,))
    whole_OI = torch.arange(7.0 * 8).view(7, 8)
    for name in (f"{module}.weight" for module in (*SPLIT_DIM, "norm")):
        dim = split_dim(name)
        theirs = distribute_tensor(whole_OI, mesh, [Replicate() if dim is None else Shard(dim)]).to_local()
        assert Split(ModelConfig.named("0.6b"), ranks.rank, ranks.size).take(name, whole_OI).equal(theirs), name
    return {}


def run_command(*command: str) -> dict[str, Any]:
    """Exit status and output of a command line."""
    from qwen3fast import cli  # brings matplotlib along, which other cases need not wait for

    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = cli.main(command)
    return {"status": status, "text": text.getvalue()}


def main(output: str, *cases: str) -> None:
    """Run cases, one after the other: CASE=FOLDER, or a command line. Rank 0 writes their results as JSON."""
    rank, results = os.environ["RANK"], {}
    for text in cases:
        case, is_case, folder = text.partition("=")
        if case == "dying" and rank == "1":
            Engine.prefill_step = die  # type: ignore[method-assign, assignment]
        try:
            if case == "dtensor":
                results[case] = check_dtensor()
            else:
                results[case] = run(case, folder, tensor_parallel=True) if is_case else run_command(*text.split())
        except SystemExit:  # a rank that follows: rank 0 has closed its Generator
            assert rank != "0", "rank 0 does not follow"
    if rank == "0":
        Path(output).write_text(json.dumps(results), encoding="utf-8")


def become_ranks() -> None:
    """Return in each of WORLD_SIZE processes; this one waits for them and ends, with status 1 if one of them failed."""
    import torch.distributed.tensor  # noqa: F401  for `check_dtensor`

    gc.freeze()  # collecting older objects would write to all of their memory, and so copy it
    processes = []
    for rank in map(str, range(int(os.environ["WORLD_SIZE"]))):
        process = os.fork()
        if not process:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            return
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    sys.exit(1 if any(statuses) else 0)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == "--fork":
        become_ranks()
        del arguments[0]
    main(*arguments)
