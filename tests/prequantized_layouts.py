"""Writes prequantized checkpoints from the definitions of their formats, word by word.

Levels, zero points and scales are drawn at random; what they stand for is computed here, in float64, one number at a
time or one word's rows at a time, by nothing of the package.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from conftest import randomized
from safetensors.torch import save_file
from test_checkpoint import write_index
from test_expert_checkpoints import tensors_by_expert
from torch import Tensor, nn

from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.moe import Experts

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_EXPERTS = {
    **FP8,
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}


def compressed(layout: str, strategy: str, bits: int = 8, **weights) -> dict:
    """The `quantization_config` of compressed-tensors with one scheme."""
    kind = "float" if layout == "float-quantized" else "int"
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **weights}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight rows each half byte of a word holds, from the lowest on


def fp8_layer(rng: np.random.Generator, N: int, K: int, scale_dtype=torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer, and its weight in float64."""
    number = torch.from_numpy(rng.normal(size=(N, K)) * 100).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (-(-N // 128), -(-K // 128))) * K**-0.5 / 100).to(scale_dtype)
    weight = number.double()
    for n in range(N):
        for k in range(0, K, 128):
            weight[n, k : k + 128] *= scale[n // 128, k // 128].double()
    return {"weight": number, "weight_scale_inv": scale}, weight


def awq_layer(rng: np.random.Generator, N: int, K: int, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer, and its weight in float64."""
    level_KN, zero_GN, scale_GN, group_K = drawn(rng, N, K, 4, group_size, is_symmetric=False)
    tensors = {"qweight": awq_words(level_KN), "qzeros": awq_words(zero_GN), "scales": torch.from_numpy(scale_GN)}
    return tensors, stood_for(level_KN, zero_GN, scale_GN, group_K)


def awq_words(level_XN: np.ndarray) -> Tensor:
    """Eight neighboring columns in a word, in AWQ's order."""
    word = np.zeros((level_XN.shape[0], level_XN.shape[1] // 8), dtype=np.uint32)
    for column in range(word.shape[1]):
        for place, which in enumerate(AWQ_ORDER):
            word[:, column] |= level_XN[:, 8 * column + which].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(word.view(np.int32))


def gptq_layer(
    rng: np.random.Generator, N: int, K: int, config: dict, with_g_idx: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer, and its weight in float64."""
    bits, is_v1 = config["bits"], config["checkpoint_format"] == "gptq"
    level_KN, zero_GN, scale_GN, group_K = drawn(rng, N, K, bits, config["group_size"], config["sym"])
    if config["desc_act"]:
        group_K = rng.permutation(group_K)
    tensors = {
        "qweight": row_words(level_KN, bits),
        "qzeros": row_words((zero_GN - is_v1).T, bits).T.contiguous(),
        "scales": torch.from_numpy(scale_GN),
    }
    if with_g_idx:
        tensors["g_idx"] = torch.from_numpy(group_K.astype(np.int32))
    return tensors, stood_for(level_KN, zero_GN, scale_GN, group_K)


def compressed_layer(rng: np.random.Generator, N: int, K: int, config: dict) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer of compressed-tensors, and its weight in float64."""
    weights, layout = config["config_groups"]["group_0"]["weights"], config["format"]
    if layout == "float-quantized":
        number = torch.from_numpy(rng.normal(size=(N, K)) * 100).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        shape = {"tensor": (1,), "channel": (N, 1), "block": (-(-N // 128), -(-K // 128))}[weights["strategy"]]
        scale = torch.from_numpy(rng.uniform(0.5, 1.5, shape) * K**-0.5 / 100).bfloat16()
        place = {"tensor": lambda n, k: 0, "channel": lambda n, k: (n, 0), "block": lambda n, k: (n // 128, k // 128)}
        weight = number.double()
        for n in range(N):
            for k in range(0, K, 128):
                weight[n, k : k + 128] *= scale[place[weights["strategy"]](n, k)].double()
        return {"weight": number, "weight_scale": scale}, weight
    bits, group_size = weights["num_bits"], weights.get("group_size") or -1
    level_KN, zero_GN, scale_GN, group_K = drawn(rng, N, K, bits, group_size, weights["symmetric"])
    if weights["strategy"] == "tensor":
        zero_GN[:], scale_GN[:] = zero_GN[0, 0], scale_GN[0, 0]
    if weights.get("actorder") == "group":
        group_K = rng.permutation(group_K)
    expected, scale = stood_for(level_KN, zero_GN, scale_GN, group_K), torch.from_numpy(scale_GN.T.copy())
    if layout == "int-quantized":  # numbers and zero points around 0
        tensors = {"weight": torch.from_numpy((level_KN.T - 128).astype(np.int8)), "weight_scale": scale}
        zeros = torch.from_numpy((zero_GN.T - 128).astype(np.int8))
        if weights["strategy"] == "tensor":
            tensors["weight_scale"], zeros = scale[0], zeros[0]
        return tensors | ({} if weights["symmetric"] else {"weight_zero_point": zeros}), expected
    tensors = {"weight_packed": row_words(level_KN, bits).T.contiguous(), "weight_scale": scale}
    tensors["weight_shape"] = torch.tensor([N, K])
    if not weights["symmetric"]:
        tensors["weight_zero_point"] = row_words(zero_GN.T, bits)
    if weights.get("actorder") == "group":
        tensors["weight_g_idx"] = torch.from_numpy(group_K.astype(np.int32))
    return tensors, expected


def row_words(level_XN: np.ndarray, bits: int) -> Tensor:
    """Neighboring rows in a word, in their order."""
    in_word = 32 // bits
    word = np.zeros((level_XN.shape[0] // in_word, level_XN.shape[1]), dtype=np.uint32)
    for row in range(level_XN.shape[0]):
        word[row // in_word] |= level_XN[row].astype(np.uint32) << np.uint32(bits * (row % in_word))
    return torch.from_numpy(word.view(np.int32))


def drawn(
    rng: np.random.Generator, N: int, K: int, bits: int, group_size: int, is_symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Levels (K, N), zero points and float16 scales (G, N), and the group of each channel (K,)."""
    group = K if group_size == -1 else group_size
    G = -(-K // group)
    level_KN = rng.integers(0, 2**bits, (K, N))
    middle = 2 ** (bits - 1)
    zero_GN = np.full((G, N), middle) if is_symmetric else rng.integers(middle // 2, middle + middle // 2, (G, N))
    scale_GN = (rng.uniform(0.5, 1.5, (G, N)) * K**-0.5 / 2 ** (bits - 2)).astype(np.float16)
    return level_KN, zero_GN, scale_GN, np.arange(K) // group


def stood_for(level_KN: np.ndarray, zero_GN: np.ndarray, scale_GN: np.ndarray, group_K: np.ndarray) -> Tensor:
    """(level - zero) * scale of the channel's group, transposed to (N, K)."""
    rows = [(level_KN[k] - zero_GN[g]) * scale_GN[g].astype(np.float64) for k, g in enumerate(group_K)]
    return torch.from_numpy(np.stack(rows, axis=1))


def drawn_layer(rng: np.random.Generator, N: int, K: int, config: dict, **options) -> tuple[dict[str, Tensor], Tensor]:
    """A layer in the layout that `quantization_config` says."""
    if config["quant_method"] == "fp8":
        return fp8_layer(rng, N, K, **options)
    if config["quant_method"] == "compressed-tensors":
        return compressed_layer(rng, N, K, config)
    if config["quant_method"] == "awq":
        return awq_layer(rng, N, K, config["group_size"])
    return gptq_layer(rng, N, K, config, **options)


def write_prequantized(
    folder: Path,
    config: ModelConfig,
    quantization_config: dict,
    *,
    files: int = 1,
    kept: tuple[str, ...] = ("lm_head",),
    prefix: str = "model.",
    tokenizer_folder: Path | None = None,
    **options,
) -> Qwen3:
    """Write a checkpoint whose linear layers and experts, except `kept` (ends of names), are stored in another layout.

    prefix: of names, in place of "model.". Tensors are dealt out to the files in turn: a layer's lie in several.
    Returns: the model that the tensors stand for, in float32.
    """
    model, rng = randomized(config).to(config.dtype).float(), np.random.default_rng(0)
    tensors = tensors_by_expert(model)
    for name, own_NK in matrices_of(model).items():
        if not name.endswith(kept):
            del tensors[f"{name}.weight"]
            parts, weight = drawn_layer(rng, *own_NK.shape, quantization_config, **options)
            tensors |= {f"{name}.{end}": part for end, part in parts.items()}
            own_NK.copy_(weight)
    tensors = {n: t if is_of_layer(n, t) else t.to(config.dtype) for n, t in tensors.items()}
    for name in [n for n in tensors if n.startswith("model.")]:
        tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
    write_tensors(folder, config, quantization_config, tensors, files)
    if tokenizer_folder is not None:
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return model


def matrices_of(model: Qwen3) -> dict[str, Tensor]:
    """The weights of linear layers and of each expert, by their names in a checkpoint, as views of the parameters."""
    found = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, experts in model.named_modules():
        if isinstance(experts, Experts):
            for i, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
                parts = zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True)
                found |= {f"{name}.{i}.{part}": weight for part, weight in parts}
    return found


def in_hidden_order(model: Qwen3, name: str, weight_NK: Tensor) -> Tensor:
    """A checkpoint's weight of the layer `name`, its hidden units in the order that loading gave them."""
    order_F = getattr(model.get_submodule(name.rpartition(".")[0]), "hidden_order", None)
    if order_F is None:
        return weight_NK
    return weight_NK[:, order_F] if name.endswith("down_proj") else weight_NK[order_F]


def write_fp8_experts(folder: Path, config: ModelConfig, files: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a checkpoint with experts, each with tensors of its own, as Qwen's FP8; routers are plain.

    Returns: its tensors, and what they stand for, in bfloat16, by the names of an unquantized checkpoint.
    """
    rng = np.random.default_rng(0)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_by_expert(randomized(config)).items()}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer, weight = fp8_layer(rng, *tensors[name].shape, scale_dtype=torch.bfloat16)
        tensors |= {name: layer["weight"], f"{name}_scale_inv": layer["weight_scale_inv"]}
        expected[name] = weight.float().bfloat16()
    write_tensors(folder, config, FP8_EXPERTS, tensors, files)
    return tensors, expected


def is_of_layer(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor belongs to a prequantized layer, whose dtype is the layout's."""
    ends = ("qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "_packed", "_scale", "_zero_point", "_shape")
    return name.endswith(ends) or tensor.dtype in (torch.float8_e4m3fn, torch.int8)


def write_tensors(
    folder: Path, config: ModelConfig, quantization_config: dict, tensors: dict[str, Tensor], files: int = 1
) -> None:
    """config.json and the tensors, dealt out to the files in turn."""
    folder.mkdir(exist_ok=True)
    raw = {**CheckpointConfig(config).to_dict(), "quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    names = names if files > 1 else ["model.safetensors"]
    place = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: t.contiguous() for name, t in tensors.items() if place[name] == file}, folder / file)
    if files > 1:
        write_index(folder, place)
