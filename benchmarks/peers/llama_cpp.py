"""llama.cpp: built from llama-cpp-python's sources for this machine, driven through the C interface that it wraps.

The GGUF file is written from the checkpoint; llama.cpp's own quantizer makes the other formats of it. A step is
`llama_decode` of one token, as llama-bench times it, and an argmax.
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peers.protocol import GGUF, Peer, Variant, run_adapter

BATCH = 2048  # llama.cpp's default: tokens of a prompt per call; it computes 512 at a time, also its default
FILE = "model.gguf"

_INT8 = {"activations": "fp32; int8 in groups of 32 for products", "kv_cache": "fp16"}
_BF16 = {"weights": "bf16", "activations": "fp32; bf16 for products", "kv_cache": "fp16"}
_F16 = {"weights": "fp16", "activations": "fp32; fp16 for products", "kv_cache": "fp16"}
_Q8_0 = {"weights": "int8, an fp16 scale per 32 weights (8.5 bits per weight), all matrices", **_INT8}
_Q4_0 = {"weights": "int4, an fp16 scale per 32 weights (4.5 bits per weight), all matrices (--pure)", **_INT8}
_Q4_0_Q6_K = {"weights": "as Q4_0, with embedding and output projection in 6.6 bits, the default", **_INT8}
_AS_IN_FILE = {"weights": "the file's", **_INT8}
# Flash attention, "auto" by default, is on for this shape. Neither setting is always faster: both are measured.
NO_FLASH = "-no-flash"
PEER = Peer(
    name="llama-cpp",
    module="llama_cpp",
    requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    packages=("llama-cpp-python",),
    variants=(
        Variant("bf16", "BF16", _BF16),
        Variant("bf16", "BF16-no-flash", _BF16, weights="BF16"),
        Variant("bf16", "F16", _F16),
        Variant("int8", "Q8_0", _Q8_0),
        Variant("int8", "Q8_0-no-flash", _Q8_0, weights="Q8_0"),
        Variant("int4", "Q4_0", _Q4_0),
        Variant("int4", "Q4_0-no-flash", _Q4_0, weights="Q4_0"),
        Variant("int4", "Q4_0-Q6_K", _Q4_0_Q6_K),
        Variant(GGUF, GGUF, _AS_IN_FILE),
        Variant(GGUF, GGUF + NO_FLASH, _AS_IN_FILE),
    ),
    pip_environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
    # A wheel in the cache may have been built with other options.
    pip_options=("--no-cache-dir", "--no-binary", "llama-cpp-python"),
    source="BF16",
)

AVX2_FLAGS = ("AVX", "AVX2", "FMA", "F16C", "BMI2")
AVX512_FLAGS = ("AVX512", "AVX512_VNNI", "AVX512_VBMI", "AVX512_BF16")


def built_for(name: str, flags: tuple[str, ...], cpu_flag: str = "", cpu_level: str = "") -> Peer:
    """Return llama.cpp built with these instructions alone, with fewer variants. cpu_flag, cpu_level: as of `Peer`."""
    options = ["-DGGML_NATIVE=OFF", "-DLLAVA_BUILD=OFF", *(f"-DGGML_{flag}=ON" for flag in flags)]
    variants = tuple(v for v in PEER.variants if v.name in ("BF16", "Q8_0", "Q4_0"))
    environment = {"CMAKE_ARGS": " ".join(options)}
    return replace(
        PEER, name=name, variants=variants, pip_environment=environment, cpu_flag=cpu_flag, cpu_level=cpu_level
    )


# On processors with AMX, llama.cpp's AMX kernels have crashed: without them it is a peer of its own there.
PEER_WITHOUT_AMX = built_for("llama-cpp-no-amx", AVX2_FLAGS + AVX512_FLAGS, cpu_flag="amx_tile")
# Beside our form for processors without AVX-512, which an environment variable pins on any.
PEER_OF_AVX2 = built_for("llama-cpp-avx2", AVX2_FLAGS, cpu_level="avx2")

# transformers' names, without "model." and ".weight", to GGUF's.
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(variant: str, checkpoint: Path, target: Path) -> None:
    """Write `target`/model.gguf in the variant's format; all but BF16 are made of the file in BF16 beside it."""
    import llama_cpp

    if variant == PEER.source:
        write_gguf(checkpoint, target / FILE)
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant.removesuffix('-Q6_K')}")
    # Otherwise the embedding, which is also the output projection, is kept in 6 bits.
    params.pure = variant == "Q4_0"
    source = target.with_name(PEER.source) / FILE
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target / FILE), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {variant}")


def write_gguf(checkpoint: Path, path: Path, words: list[str] | None = None) -> None:
    """Write the bfloat16 checkpoint as GGUF: matrices in bfloat16, norm weights in fp32.

    words: of its tokens, in the byte-level alphabet, each a token of its own in a prompt; None writes no tokenizer.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if words is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")  # looks up whole words before it merges anything
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
        writer.add_token_merges([f"{words[0][:1]} {words[0][1:2]}"])  # required, and without effect on these words
        writer.add_add_bos_token(False)
    for file in sorted(checkpoint.glob("*.safetensors")):
        add_tensors(writer, file)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensors(writer: Any, path: Path) -> None:
    """Add a safetensors file's tensors to a gguf.GGUFWriter: matrices in bfloat16, norm weights in fp32."""
    import gguf
    import numpy as np

    # NumPy has no bfloat16, so safetensors' NumPy reader cannot be used: the file is a length, a JSON header, and data.
    file = np.memmap(path, dtype=np.uint8, mode="r")
    begin = 8 + int(file[:8].view(np.uint64)[0])
    header = json.loads(bytes(file[8:begin]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is in {entry['dtype']}, not BF16"
        first, last = entry["data_offsets"]
        data = file[begin + first : begin + last]
        if len(entry["shape"]) == 1:
            numbers = (np.array(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_name(name), numbers)
        else:
            rows = data.reshape(entry["shape"][0], -1)
            writer.add_tensor(gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)


def gguf_name(name: str) -> str:
    """Return GGUF's name of a tensor of transformers' Qwen3."""
    short = name.removeprefix("model.").removesuffix(".weight")
    if not short.startswith("layers."):
        return f"{OUTSIDE[short]}.weight"
    _, layer, part = short.split(".", 2)
    return f"blk.{layer}.{IN_LAYER[part]}.weight"


class LlamaCppEngine:
    """A llama.cpp context with its defaults; a variant may switch flash attention off."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        import llama_cpp
        import numpy as np

        self._lib, self._np = llama_cpp, np
        llama_cpp.llama_backend_init()
        path = model if model.is_file() else model / FILE
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = math.ceil(max_seq_len / 256) * 256
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = threads
        if variant.endswith(NO_FLASH):
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.facts: dict[str, Any] = {
            "system": llama_cpp.llama_print_system_info().decode(),
            "flash_attention": llama_cpp.llama_flash_attn_type_name(params.flash_attn_type).decode(),
        }

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        started = time.perf_counter()
        for first in range(0, len(prompt), BATCH):
            token = self._decode(prompt[first : first + BATCH])
        prefilled = time.perf_counter()
        ids = [token]
        for _ in range(steps):
            ids.append(self._decode(ids[-1:]))
        return prefilled - started, time.perf_counter() - prefilled, ids

    def _decode(self, tokens: list[int]) -> int:
        array = (self._lib.llama_token * len(tokens))(*tokens)
        if code := self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode failed with code {code}")
        logits_V = self._lib.llama_get_logits_ith(self._context, -1)
        return int(self._np.ctypeslib.as_array(logits_V, (self._vocab_size,)).argmax())


if __name__ == "__main__":
    run_adapter(PEER.packages, LlamaCppEngine, convert)
