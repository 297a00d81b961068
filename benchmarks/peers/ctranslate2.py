"""CTranslate2 in int8, on a model that its own converter for transformers writes.

The converter needs a tokenizer; it gets one whose tokens are the ids as text: ids go in and out. There is no bf16
variant: on a CPU it computes in fp32 or with int8 weights only (`ctranslate2.get_supported_compute_types("cpu")`), and
4-bit weights (AWQ) are for GPUs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from peers.protocol import Peer, Variant, run_adapter

PEER = Peer(
    name="ctranslate2",
    module="ctranslate2",
    requirements=("ctranslate2==4.8.5", "torch==2.13.0", "transformers==5.5.4"),
    packages=("ctranslate2",),
    variants=(
        Variant(
            "int8",
            "int8",
            {
                "weights": "int8, an fp32 scale per row, all matrices",
                "activations": "fp32; int8 with a scale per row for products",
                "kv_cache": "fp32",
            },
        ),
    ),
)


class IdsAsTokens:
    """A tokenizer for the converter: each token is the text of its id."""

    def __init__(self, vocab_size: int, eos_token_id: int) -> None:
        self._vocab_size = vocab_size
        self.bos_token = self.eos_token = self.pad_token = self.unk_token = str(eos_token_id)

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""
        return {str(i): i for i in range(self._vocab_size)}


def convert(variant: str, checkpoint: Path, target: Path) -> None:
    """Convert the checkpoint into `target`."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, name: str, **kwargs: Any) -> IdsAsTokens:
            config = json.loads((checkpoint / "config.json").read_text())
            return IdsAsTokens(config["vocab_size"], config["eos_token_id"])

    Converter(str(checkpoint)).convert(str(target), quantization=variant, force=True)


class CTranslate2Engine:
    """A Generator on the CPU."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import ctranslate2

        self._generator = ctranslate2.Generator(str(model), device=device, compute_type=variant, intra_threads=threads)
        self.facts: dict[str, Any] = {"compute_type": self._generator.compute_type}

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`. `min_length` keeps the end token from ending a reply."""
        times, ids, started = [], [], time.perf_counter()
        exactly = {"max_length": steps + 1, "min_length": steps + 1}
        for token in self._generator.generate_tokens([str(i) for i in prompt], sampling_topk=1, **exactly):
            times.append(time.perf_counter())
            ids.append(token.token_id)
        return times[0] - started, times[-1] - times[0], ids


if __name__ == "__main__":
    run_adapter(PEER.packages, CTranslate2Engine, convert)
