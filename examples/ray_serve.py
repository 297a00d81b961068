"""The HTTP server under Ray Serve: several replicas behind one address.

    pip install 'qwen3fast[server]' 'ray[serve]'
    python examples/ray_serve.py --model Qwen/Qwen3-0.6B --replicas 2

Each replica is a process with the whole model; Ray Serve sends a request to the one with the fewer requests. Responses
of `/v1/responses` are stored in the replica that made them: send whole conversations instead of previous_response_id.
"""

from __future__ import annotations

import argparse
import time

from qwen3fast import Generator
from qwen3fast.server.app import create_app


def make_app(model: str, max_batch_size: int):
    """Return the ASGI application of a replica; called in its process."""
    generator = Generator.from_pretrained(model, max_batch_size=max_batch_size)
    return create_app({model: generator})


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="[%(default)s]")
    parser.add_argument("--replicas", type=int, default=2, help="processes, each with the whole model [%(default)s]")
    parser.add_argument("--max-batch-size", type=int, default=8, help="requests decoded together [%(default)s]")
    parser.add_argument("--port", type=int, default=8000, help="[%(default)s]")
    args = parser.parse_args(argv)

    from ray import serve

    @serve.deployment(num_replicas=args.replicas, max_ongoing_requests=4 * args.max_batch_size)
    @serve.ingress(lambda: make_app(args.model, args.max_batch_size))
    class Server:
        """A replica."""

    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(Server.bind())
    print(f"serving {args.model} on http://127.0.0.1:{args.port}", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
