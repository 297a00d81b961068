"""`batch --ray`: the same file of requests over a Ray cluster, a whole model in each worker (extra `ray`).

Each worker is a process that Ray places. Ray Data starts a failed one again and gives its jobs to the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from typing import Any

from qwen3fast.server.app import create_app
from qwen3fast.server.jobs import BatchJob, Room, answered
from qwen3fast.server.loading import load_models
from qwen3fast.server.options import ServerOptions

Note = Callable[[dict[str, Any]], None]  # takes an output line


class Worker:
    """The models of one process. Ray calls it with blocks of jobs: a single column of JSON texts."""

    def __init__(self, args: argparse.Namespace, options: ServerOptions) -> None:
        """Load the models that the options of `batch` name."""
        self._app, self._places = create_app(load_models(args), options), args.max_queue

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """Return the output lines of a block of jobs, which run together as far as there are slots."""
        jobs = [BatchJob(**json.loads(text)) for text in block["json"]]
        return {"json": asyncio.run(self._answer(jobs))}

    async def _answer(self, jobs: list[BatchJob]) -> list[str]:
        room = Room(self._places)

        async def one(job: BatchJob) -> str:
            return json.dumps(await answered(self._app, job, room))

        return list(await asyncio.gather(*(one(job) for job in jobs)))


def run_on_ray(jobs: list[BatchJob], args: argparse.Namespace, options: ServerOptions, note: Note) -> None:
    """Answer the jobs on a cluster, and pass each output line on as it comes. Raises: ImportError without Ray."""
    try:
        import ray
    except ImportError as err:
        raise ImportError("--ray needs Ray; run: pip install 'qwen3fast[ray]'") from err
    ray.init(address=args.ray_address, ignore_reinit_error=True, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    block_size = max(1, min(2 * args.max_batch_size, args.max_queue))
    texts = [{"json": json.dumps(vars(job))} for job in jobs]
    replies = ray.data.from_items(texts, override_num_blocks=-(-len(texts) // block_size)).map_batches(
        Worker,
        fn_constructor_kwargs={"args": args, "options": options},
        batch_size=block_size,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.worker_cpus,
        num_gpus=args.worker_gpus,
    )
    for row in replies.iter_rows():
        note(json.loads(row["json"]))


def add_ray_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch --ray` to a parser."""
    add = parser.add_argument_group("Ray").add_argument
    add("--ray", action="store_true", help="run on a Ray cluster, or on local workers (extra 'ray')")
    add("--ray-address", metavar="ADDRESS", help="address of the cluster [RAY_ADDRESS, else a local one is started]")
    add("--workers", type=int, default=1, metavar="N", help="processes, each with the whole model [%(default)s]")
    add("--worker-cpus", type=float, default=1, metavar="N", help="CPUs per worker [%(default)s]")
    add("--worker-gpus", type=float, default=0, metavar="N", help="GPUs per worker [%(default)s]")
