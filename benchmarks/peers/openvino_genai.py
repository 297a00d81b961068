"""OpenVINO GenAI: its LLMPipeline on models that Optimum Intel exports, with the pipeline's defaults.

The pipeline gets token ids, so no tokenizer is needed. Times are the pipeline's own figures: to the first token, and
from the first to the last.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from peers.protocol import Peer, Variant, run_adapter

# Precisions on CPUs with bfloat16 instructions; `facts` in the record has the plugin's choice on the machine.
_DEFAULTS = {
    "activations": "the plugin's default, see INFERENCE_PRECISION_HINT in facts; int8 in groups for quantized weights",
    "kv_cache": "the plugin's default, see KV_CACHE_PRECISION in facts",
}
PEER = Peer(
    name="openvino-genai",
    module="openvino_genai",
    requirements=(
        "openvino-genai==2026.4.1.0",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "torch==2.13.0",
        "transformers==5.5.4",
    ),
    packages=("openvino", "openvino-genai", "optimum-intel", "nncf"),
    variants=(
        Variant("bf16", "bf16", {"weights": "fp16 on disk, computed in bf16 where the plugin does", **_DEFAULTS}),
        Variant("int8", "int8", {"weights": "int8, a scale and a zero point per row, all matrices", **_DEFAULTS}),
        Variant(
            "int4", "int4", {"weights": "int4, an fp16 scale per 32 weights (4.5 bits), all matrices", **_DEFAULTS}
        ),
    ),
    # A dependency that is not needed: built for another torch than the CPU's, it makes the import of transformers fail.
    pip_remove=("torchvision",),
)
EXPORT = {
    "bf16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0", "--all-layers"],
}
PROPERTIES = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


def convert(variant: str, checkpoint: Path, target: Path) -> None:
    """Export into `target`."""
    program = Path(sys.executable).with_name("optimum-cli")
    options = ["--task", "text-generation-with-past", "--disable-convert-tokenizer", *EXPORT[variant]]
    subprocess.run([program, "export", "openvino", "--model", checkpoint, *options, target], check=True)


class OpenVinoEngine:
    """An LLMPipeline on the CPU."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self._np, self._openvino, self._genai = np, openvino, openvino_genai
        options = {"INFERENCE_NUM_THREADS": threads}
        # The pipeline does not tell; the same model compiled alone does.
        compiled = openvino.Core().compile_model(model / "openvino_model.xml", "CPU", options)
        self.facts: dict[str, Any] = {name: str(compiled.get_property(name)) for name in PROPERTIES}
        del compiled
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", **options)

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`. The pipeline may reuse the keys and values of an earlier prompt."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = steps + 1, True, False
        ids = self._np.array([prompt], dtype=self._np.int64)
        tensors = [self._openvino.Tensor(array) for array in (ids, self._np.ones_like(ids))]
        result = self._pipeline.generate(self._genai.TokenizedInputs(*tensors), config)
        times_ms = result.perf_metrics.raw_metrics.m_new_token_times
        return result.perf_metrics.get_ttft().mean / 1e3, (times_ms[-1] - times_ms[0]) / 1e3, list(result.tokens[0])


if __name__ == "__main__":
    run_adapter(PEER.packages, OpenVinoEngine, convert)
