"""transformers: eager with its default cache, compiled with a static one, and without a cache.

"eager" and "no-cache" call the model itself, token by token, which leaves out what `generate` adds; "static-compiled"
is `generate` with `cache_implementation="static"`, which compiles decode steps (on CPUs on request), timed where it
hands each token to a streamer. All read the common checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peers.protocol import CHECKPOINT, Peer, Variant, link_checkpoint, run_adapter

_BF16 = {"weights": "bf16", "activations": "bf16, sums as in PyTorch's products"}
PEER = Peer(
    name="transformers",
    module="transformers",
    requirements=("torch==2.13.0", "transformers==5.24.0"),
    packages=("torch", "transformers"),
    variants=(
        Variant("bf16", "eager", {**_BF16, "kv_cache": "bf16, grows by concatenation (DynamicCache)"}, CHECKPOINT),
        Variant("bf16", "static-compiled", {**_BF16, "kv_cache": "bf16, static; its whole length is read"}, CHECKPOINT),
        # Each token takes as long as a prompt.
        Variant("bf16", "no-cache", {**_BF16, "kv_cache": "none"}, CHECKPOINT, max_steps=2),
    ),
    devices=("cpu", "cuda"),
)


class Marks:
    """A streamer for `generate` that notes each token and its time. The first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Take the prompt, then one token per call."""
        if self._has_prompt:
            self.ids += value.reshape(-1).tolist()
            self.times.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing."""


class TransformersEngine:
    """Qwen3ForCausalLM in the checkpoint's dtype."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._transformers, self._variant = torch, transformers, variant
        self._model = transformers.Qwen3ForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
        self.facts: dict[str, Any] = {"attention": self._model.config._attn_implementation}
        if variant == "static-compiled":
            self._compile = transformers.CompileConfig()
            self._compile._compile_all_devices = True  # a CPU is left out otherwise
            # The first call decides how long the static cache is, and so what is compiled.
            self.generate([1] * (max_seq_len - 3), 2)
            self.facts["compiled"] = hasattr(self._model, "_compiled_call")

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`."""
        with self._torch.no_grad():
            reply = self._by_generate if self._variant == "static-compiled" else self._by_model
            started, times, ids = reply(prompt, steps)
        return times[0] - started, times[-1] - times[0], ids

    def _by_generate(self, prompt: list[int], steps: int) -> tuple[float, list[float], list[int]]:
        ids = self._torch.tensor([prompt], device=self._model.device)
        exactly = {"min_new_tokens": steps + 1, "max_new_tokens": steps + 1, "pad_token_id": 0, "do_sample": False}
        static = {"cache_implementation": "static", "compile_config": self._compile}
        marks, started = Marks(), time.perf_counter()
        self._model.generate(ids, attention_mask=self._torch.ones_like(ids), streamer=marks, **exactly, **static)
        return started, marks.times, marks.ids

    def _by_model(self, prompt: list[int], steps: int) -> tuple[float, list[float], list[int]]:
        is_cached = self._variant == "eager"
        keywords: dict[str, Any] = {"use_cache": is_cached, "logits_to_keep": 1}
        if is_cached:
            keywords["past_key_values"] = self._transformers.DynamicCache(config=self._model.config)
        sequence = self._torch.tensor([prompt], device=self._model.device)
        new, times, output, started = sequence, [], [], time.perf_counter()
        while len(output) <= steps:
            logits = self._model(input_ids=new if is_cached else sequence, **keywords).logits
            new = logits[:, -1].argmax(-1, keepdim=True)
            output.append(int(new))  # waits for a GPU
            times.append(time.perf_counter())
            if not is_cached:
                sequence = self._torch.cat([sequence, new], dim=1)
        return started, times, output


if __name__ == "__main__":
    run_adapter(PEER.packages, TransformersEngine, link_checkpoint)
