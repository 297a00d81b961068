"""ONNX Runtime GenAI: its Generator on models that its own model builder writes, on the CPU.

The generator gets token ids and needs no tokenizer, but the builder does: it gets an empty one. There is no
bf16 variant, as the builder offers bfloat16 for GPUs only; on CPUs its models have fp32 activations and cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from peers.protocol import Peer, Variant, run_adapter

_COMPUTES = {"activations": "fp32; int8 in groups of 32 for products (accuracy_level 4)", "kv_cache": "fp32"}
PEER = Peer(
    name="onnxruntime-genai",
    module="onnxruntime_genai",
    requirements=(
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "torch==2.13.0",
        "transformers==5.5.4",
    ),
    packages=("onnxruntime-genai", "onnxruntime"),
    variants=(
        Variant(
            "int8",
            "int8",
            {"weights": "int8, an fp32 scale per 32 weights (9 bits), all matrices; fp32 for lookups", **_COMPUTES},
        ),
        Variant("int4", "int4", {"weights": "int4, an fp32 scale per 32 weights (5 bits), all matrices", **_COMPUTES}),
    ),
)
BUILD = {
    "int8": [],
    # The embedding is looked up in the output projection's int4 weights; there is no such lookup of int8.
    "int4": ["op_types_to_quantize=MatMul/Gather", "shared_embeddings=true"],
}
# By default the builder's models compute every prompt token's logits. The other values are its defaults.
ALWAYS = ["prune_lm_head=true", "block_size=32", "is_symmetric=true", "accuracy_level=4"]


def convert(variant: str, checkpoint: Path, target: Path) -> None:
    """Build the model into `target`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "checkpoint")
        source.mkdir()
        for file in checkpoint.iterdir():
            (source / file.name).symlink_to(file.resolve())
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(source)
        program = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", variant, "-e", "cpu"]
        paths = ["-i", source, "-o", target, "-c", Path(folder, "cache")]
        subprocess.run([*program, *paths, "--extra_options", *ALWAYS, *BUILD[variant]], check=True)
    # Without end tokens all replies have full length. An overlay at run time cannot empty the list.
    path = target / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["eos_token_id"] = []
    path.write_text(json.dumps(config, indent=4))


def matrix_products(model: Path) -> dict[str, int]:
    """Count the graph's products by kind and by the settings that decide their arithmetic."""
    import onnx

    kinds: Counter[str] = Counter()
    for node in onnx.load(model / "model.onnx", load_external_data=False).graph.node:
        if node.op_type.startswith("MatMul"):
            values = {attribute.name: attribute.i for attribute in node.attribute}
            settings = [f"{name} {values[name]}" for name in ("bits", "block_size", "accuracy_level") if name in values]
            kinds[", ".join([node.op_type, *settings])] += 1
    return dict(kinds)


class OnnxRuntimeEngine:
    """A model on the CPU provider."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)
        self.facts: dict[str, Any] = {
            "provider": self._model.device_type,
            "intra_op_num_threads": threads,
            "matrix_products": matrix_products(model),
        }

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`. Making the generator, which reserves the cache, is not timed."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + steps + 1)
        generator = self._genai.Generator(self._model, params)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        finished = time.perf_counter()
        ids = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        return prefilled - started, finished - prefilled, ids


if __name__ == "__main__":
    run_adapter(PEER.packages, OnnxRuntimeEngine, convert)
