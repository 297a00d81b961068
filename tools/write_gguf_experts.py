"""Write a GGUF file in the shape of Qwen3-Coder-30B-A3B and the mixture Q4_K_M, with random levels.

python tools/write_gguf_experts.py coder.gguf              # 48 layers, about 18 GB
python tools/write_gguf_experts.py coder.gguf --layers 4

It shows how such a file loads and how fast it decodes without its weights, which mean nothing here; nor do its tokens.
Types are chosen as llama-quantize chooses them: Q6_K for the output projection, and for the values and the down
projections of half of the layers; Q4_K for all other matrices. Tensors are written one after another, in parts.

Source: llama_tensor_get_type of llama-quant.cpp, and ggml-common.h, in github.com/ggml-org/llama.cpp; config.json of
Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf_metadata import add_config, add_tokenizer
from tqdm import tqdm

from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.model.config import ModelConfig

PART_BYTES = 2**24  # random bytes drawn at a time
Kind = gguf.GGMLQuantizationType
# Bytes of the float16 scales in a block, each with the number of steps that a weight is from zero, on average.
SCALES = {Kind.Q4_K: ((0, 258.0), (2, 258.0 / 7.5)), Kind.Q6_K: ((208, 1365.0),)}


class Planned(NamedTuple):
    """A tensor of the file; shape: in PyTorch's order."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


def coder_config(layers: int = 48) -> ModelConfig:
    """Return the shape of Qwen3-Coder-30B-A3B."""
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=262_144,
        rope_theta=1e7,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def has_more_bits(layer: int, layers: int) -> bool:
    """Return whether a layer's values and down projections are in Q6_K. Source: use_more_bits of llama-quant.cpp."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def plan(config: ModelConfig) -> list[Planned]:
    """Return the tensors in the order of the file."""
    E, V, D, X, inner = (
        config.hidden_size, config.vocab_size, config.head_dim, config.num_experts, config.moe_intermediate_size,
    )  # fmt: skip
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    tensors = [
        Planned("token_embd.weight", (V, E), Kind.Q4_K),
        Planned("output_norm.weight", (E,), Kind.F32),
        Planned("output.weight", (V, E), Kind.Q6_K),
    ]
    for layer in range(config.num_hidden_layers):
        more = Kind.Q6_K if has_more_bits(layer, config.num_hidden_layers) else Kind.Q4_K
        tensors += [
            Planned(f"blk.{layer}.{name}.weight", shape, kind)
            for name, shape, kind in (
                ("attn_norm", (E,), Kind.F32),
                ("attn_q", (queries, E), Kind.Q4_K),
                ("attn_k", (keys, E), Kind.Q4_K),
                ("attn_v", (keys, E), more),
                ("attn_q_norm", (D,), Kind.F32),
                ("attn_k_norm", (D,), Kind.F32),
                ("attn_output", (E, queries), Kind.Q4_K),
                ("ffn_norm", (E,), Kind.F32),
                ("ffn_gate_inp", (X, E), Kind.F32),
                ("ffn_gate_exps", (X, inner, E), Kind.Q4_K),
                ("ffn_up_exps", (X, inner, E), Kind.Q4_K),
                ("ffn_down_exps", (X, E, inner), more),
            )
        ]
    return tensors


def num_bytes(tensor: Planned) -> int:
    """Return the bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    return math.prod(tensor.shape) // block * size


def parts(tensor: Planned, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor: ones in norms, random numbers in routers, random levels in others.

    Weights have the usual size, about 1/sqrt(K).
    """
    K = tensor.shape[-1]
    if tensor.kind == Kind.F32:
        numbers = np.ones(tensor.shape) if len(tensor.shape) == 1 else rng.normal(size=tensor.shape) * K**-0.5
        yield numbers.astype("<f4").reshape(-1).view(np.uint8)
        return
    size = gguf.GGML_QUANT_SIZES[tensor.kind][1]
    left = num_bytes(tensor) // size
    while left:
        count = min(left, PART_BYTES // size)
        block = np.frombuffer(rng.bytes(count * size), np.uint8).reshape(count, size).copy()
        for first, steps in SCALES[tensor.kind]:
            scale = np.full((count, 1), K**-0.5 / steps, "<f2")
            block[:, first : first + 2] = scale.view(np.uint8)
        yield block.reshape(-1)
        left -= count


def write(file: Path, config: ModelConfig, seed: int = 0) -> int:
    """Write the file, with a progress bar. Returns: its tensors' bytes."""
    tensors, rng = plan(config), np.random.default_rng(seed)
    total = sum(map(num_bytes, tensors))
    writer = gguf.GGUFWriter(file, "qwen3moe")
    add_config(writer, config)
    add_tokenizer(writer, TINY_FOLDER, config.vocab_size, "qwen2")
    for name, shape, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        is_float = kind == Kind.F32
        stored = shape if is_float else (*shape[:-1], shape[-1] // block * size)
        dtype = np.dtype(np.float32 if is_float else np.uint8)
        count = math.prod(shape) // block * size
        writer.add_tensor_info(name, stored, dtype, count, raw_dtype=None if is_float else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "it was opened for the header"
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True) as bar:
        for tensor in tensors:
            for part in parts(tensor, rng):
                out.write(part.data)
                bar.update(part.nbytes)
            writer.write_padding(out, num_bytes(tensor))
    writer.close()
    return total


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=48, help="of the model [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the levels [%(default)s]")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error("--layers must be at least 1")
    written = write(args.file, coder_config(args.layers), args.seed)
    print(f"wrote {args.file}: {args.layers} layers, {written / 1e9:.2f} GB of tensors")


if __name__ == "__main__":
    main()
