"""The HTTP server under Ray Serve: several replicas behind one address, chosen by the prefix of the prompt.

    pip install 'qwen3fast[server]' 'ray[serve]'
    python examples/ray_serve.py --model Qwen/Qwen3-0.6B --replicas 2

Each replica is a process with the whole model. A request whose prompt begins like an earlier one goes to the replica
that answered that one, where the prefix is in the KV cache, unless that replica is much busier than the others; any
other request goes to the least busy replica. `--no-prefix-routing` leaves the choice to Ray Serve. Responses of
`/v1/responses` are stored in the replica that made them: send whole conversations instead of previous_response_id.
"""

from __future__ import annotations

import argparse
import time
from contextlib import aclosing

from asgi_messages import messages
from prefix_table import PrefixTable, blocks_of
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import RequestRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from qwen3fast import Generator
from qwen3fast.server.app import create_app
from qwen3fast.server.options import ServerOptions


class PrefixRouter(RequestRouter):
    """Ray Serve's choice of a replica, by prefix. Its requests are calls of `Replica.answer`."""

    def initialize_state(self) -> None:
        """Begin with an empty table."""
        self._table = PrefixTable()
        self._running: dict[str, str] = {}  # request -> replica

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        """Return the replicas in groups, best first."""
        if not candidate_replicas:
            return []
        running = {replica.replica_id.to_full_id_str(): 0 for replica in candidate_replicas}
        self._table.keep(running)
        for name in self._running.values():
            if name in running:
                running[name] += 1
        blocks = blocks_of(pending_request.args[2]) if pending_request is not None else []
        best = self._table.choose(blocks, running)
        first = [replica for replica in candidate_replicas if replica.replica_id.to_full_id_str() == best]
        return [first, [replica for replica in candidate_replicas if replica not in first]]

    def on_request_routed(self, pending_request, replica_id, result) -> None:
        """Note where a request went."""
        name = replica_id.to_full_id_str()
        self._running[pending_request.metadata.internal_request_id] = name
        self._table.add(blocks_of(pending_request.args[2]), name)

    def on_request_completed(self, replica_id, internal_request_id) -> None:
        """Note that a request has ended."""
        self._running.pop(internal_request_id, None)


class Replica:
    """A process with the model."""

    def __init__(self, model: str, max_batch_size: int) -> None:
        self._app = create_app({model: Generator.from_pretrained(model, max_batch_size=max_batch_size, compile="auto")})

    async def answer(self, method: str, path: str, body: bytes, headers: list[tuple[bytes, bytes]]):
        """Yield the messages of a response, see asgi_messages.py."""
        async with aclosing(messages(self._app, method, path, body, headers)) as response:
            async for message in response:
                yield message


class Ingress:
    """Takes HTTP requests, and sends them to a replica with their body, by which the router chooses."""

    def __init__(self, replicas) -> None:
        self._replicas = replicas.options(method_name="answer", stream=True)

    async def __call__(self, request: Request):
        """Return the response of a replica, streamed."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > ServerOptions.max_body_bytes:
                return JSONResponse({"error": {"message": "the body is too large"}}, 413)
        response = self._replicas.remote(request.method, request.url.path, body, request.headers.raw)
        start = await anext(response)
        streamed = StreamingResponse((message.get("body", b"") async for message in response), start["status"])
        streamed.raw_headers = start["headers"]
        return streamed


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="[%(default)s]")
    parser.add_argument("--replicas", type=int, default=2, help="processes, each with the whole model [%(default)s]")
    parser.add_argument("--max-batch-size", type=int, default=8, help="requests decoded together [%(default)s]")
    parser.add_argument("--no-prefix-routing", action="store_true", help="let Ray Serve choose replicas")
    parser.add_argument("--port", type=int, default=8000, help="[%(default)s]")
    args = parser.parse_args(argv)

    at_once = 4 * args.max_batch_size
    router = {"request_router_config": RequestRouterConfig(request_router_class=PrefixRouter)}
    if args.no_prefix_routing:
        router = {}
    replicas = serve.deployment(Replica, num_replicas=args.replicas, max_ongoing_requests=at_once, **router)
    light = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": at_once * args.replicas}
    ingress = serve.deployment(Ingress, **light)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(ingress.bind(replicas.bind(args.model, args.max_batch_size)))
    print(f"serving {args.model} on http://127.0.0.1:{args.port}", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
