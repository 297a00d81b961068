"""vLLM, which needs a GPU. NOT RUN so far; written after its documentation.

One request at a time through the engine's own steps, prompts as ids, no prefix cache, its defaults otherwise (CUDA
graphs, its choice of attention). The time of a step ends when the engine returns the token.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

from peers.protocol import CHECKPOINT, Peer, Variant, link_checkpoint, run_adapter

PEER = Peer(
    name="vllm",
    module="vllm",
    requirements=("vllm==0.33.0",),
    packages=("vllm", "torch"),
    variants=(
        Variant("bf16", "bf16", {"weights": "bf16", "activations": "bf16", "kv_cache": "bf16, in pages"}, CHECKPOINT),
    ),
    devices=("cuda",),
)


class VllmEngine:
    """An LLM whose engine is stepped one token at a time."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import vllm

        self._vllm, self._numbers = vllm, count()
        self._engine = vllm.LLM(
            str(model), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max_seq_len, max_num_seqs=1,
            enable_prefix_caching=False,
        ).llm_engine  # fmt: skip
        self.facts: dict[str, Any] = {}

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`."""
        params = self._vllm.SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)
        times, ids, started = [], [], time.perf_counter()
        self._engine.add_request(str(next(self._numbers)), {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                ids = list(output.outputs[0].token_ids)
                times.append(time.perf_counter())
        return times[0] - started, times[-1] - times[0], ids


if __name__ == "__main__":
    run_adapter(PEER.packages, VllmEngine, link_checkpoint)
