"""SGLang, which needs a GPU. NOT RUN so far; written after its documentation.

One request at a time through its offline engine's stream, prompts as ids, no prefix cache, its defaults otherwise.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peers.protocol import CHECKPOINT, Peer, Variant, link_checkpoint, run_adapter

PEER = Peer(
    name="sglang",
    module="sglang",
    requirements=("sglang[all]==0.5.23",),
    packages=("sglang", "torch"),
    variants=(
        Variant("bf16", "bf16", {"weights": "bf16", "activations": "bf16", "kv_cache": "bf16, in pages"}, CHECKPOINT),
    ),
    devices=("cuda",),
)


class SglangEngine:
    """An offline Engine."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import sglang

        self._engine = sglang.Engine(
            model_path=str(model), skip_tokenizer_init=True, dtype="bfloat16", context_length=max_seq_len,
            max_running_requests=1, disable_radix_cache=True,
        )  # fmt: skip
        self.facts: dict[str, Any] = {}

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`."""
        exactly = {"temperature": 0, "max_new_tokens": steps + 1, "ignore_eos": True}
        times, ids, started = [], [], time.perf_counter()
        for chunk in self._engine.generate(input_ids=prompt, sampling_params=exactly, stream=True):
            times.append(time.perf_counter())
            ids = list(chunk["output_ids"])
        return times[0] - started, times[-1] - times[0], ids


if __name__ == "__main__":
    run_adapter(PEER.packages, SglangEngine, link_checkpoint)
