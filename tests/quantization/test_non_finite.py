"""No format hides NaN and infinity: whatever a weight goes through, they are not ordinary numbers afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_tensor, randomized, small_config
from prequantized_layouts import AWQ, FP8, GPTQ, write_prequantized
from safetensors.torch import load_file, save_file
from test_checkpoint import tensors_of, write_checkpoint

from qwen3fast import load_model
from qwen3fast.checkpoint.save import save_model
from qwen3fast.kernels import cpu
from qwen3fast.model.moe import Experts
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear

UP = "model.layers.0.mlp.up_proj"
SIZES = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256, "vocab_size": 128}
on_cpu = pytest.mark.parametrize("name", ["int8", "int4"])
bad_numbers = pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])


def rows_that_are_finite(weight: torch.Tensor) -> list[int]:
    return weight.isfinite().all(dim=1).nonzero().flatten().tolist()


def dequantized(model, name: str = UP) -> torch.Tensor:
    layer = model.get_submodule(name)
    return layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight


@bad_numbers
@on_cpu
@pytest.mark.parametrize("is_fast", [True, False])
def test_products_and_looked_up_rows_are_no_numbers(monkeypatch, name, number, is_fast):
    if not is_fast:
        monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    elif not cpu.is_loaded():
        cpu.load()
    weight = random_tensor(64, 64).bfloat16()
    weight[3, 5] = number
    linear = QuantizedLinear(quantize(weight, FORMATS[name]), FORMATS[name])
    others = [i for i in range(64) if i != 3]
    for tokens in (1, 9, 70):  # one for each form of the product
        y = linear(random_tensor(tokens, 64).bfloat16())
        assert not y[:, 3].isfinite().any() and y[:, others].isfinite().all()
    rows = QuantizedEmbedding(linear, torch.bfloat16)(torch.arange(64)[None])[0]
    assert rows_that_are_finite(rows) == others


@bad_numbers
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_keep_them(name, dtype, number):
    experts = Experts(2, 64, 32)
    with torch.no_grad():
        experts.down_proj[1, 7, 9] = number
    packed = QuantizedExperts.of(experts.to(dtype), FORMATS[name])
    stack = packed.dequantize(packed.down_proj)
    assert not stack[1, 7].isfinite().all()
    assert stack[0].isfinite().all() and rows_that_are_finite(stack[1]) == [i for i in range(64) if i != 7]


@bad_numbers
@on_cpu
def test_saving_and_loading_keep_them(tmp_path, name, number):
    model = randomized(small_config(**SIZES, dtype=torch.bfloat16)).to(torch.bfloat16)
    tensors = tensors_of(model)
    tensors[f"{UP}.weight"][3, 5] = number
    (tmp_path / "plain").mkdir()
    write_checkpoint(tmp_path / "plain", model.config, tensors)
    quantized = load_model(tmp_path / "plain", device="cpu", quantization=name)
    save_model(quantized, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", device="cpu")
    assert formats_of(loaded) == [name]
    for weight in (dequantized(quantized), dequantized(loaded)):
        assert 3 not in rows_that_are_finite(weight) and len(rows_that_are_finite(weight)) == 255
    with pytest.raises(ValueError, match=r"are not all finite in bfloat16[^$]*up_proj\.weight_scale.*NaN"):
        load_model(tmp_path / "saved", device="cpu", check_weights=True)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens", "model.layers.0.mlp.experts.down_proj"])
def test_check_weights_finds_nan_in_packed_fp8(tmp_path, name, byte):
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64} if "experts" in name else {}
    model = randomized(small_config(**SIZES, **experts))
    quantize_model(model, "fp8", torch.float32)
    save_model(model, tmp_path)
    load_model(tmp_path, device="cpu", check_weights=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{name}.weight_packed"][0, 1, 2, 3] = byte
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name}\.weight_packed in model\.safetensors: 1 NaN and 0 infinite of"):
        load_model(tmp_path, device="cpu", check_weights=True)


@pytest.mark.parametrize(
    ("layout", "end", "number"),
    [
        (FP8, "weight", torch.nan),  # float8_e4m3fn has no infinity
        (FP8, "weight_scale_inv", torch.inf),
        (AWQ, "scales", torch.nan),
        (AWQ, "scales", torch.inf),
        (GPTQ, "scales", torch.nan),
        (GPTQ, "scales", -torch.inf),
    ],
    ids=["fp8", "fp8 scale", "awq", "awq inf", "gptq", "gptq inf"],
)
@pytest.mark.parametrize("quantization", [None, "dequantize", "int8", "int4"])
def test_prequantized_layers_keep_them(tmp_path, layout, end, number, quantization):
    write_prequantized(tmp_path, small_config(**SIZES, dtype=torch.bfloat16), layout)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = tensors[f"{UP}.{end}"]
    row = 3
    stored.view(torch.uint8).view(*stored.shape, -1)[0, row if end == "scales" else 0] = (
        torch.tensor([number]).to(stored.dtype).view(torch.uint8)
    )
    save_file(tensors, tmp_path / "model.safetensors")
    weight = dequantized(load_model(tmp_path, device="cpu", quantization=quantization))
    expected = {"weight": [0], "weight_scale_inv": list(range(128)), "scales": [row]}[end]
    assert rows_that_are_finite(weight) == [i for i in range(256) if i not in expected]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\S* ?\w*: [\d,]+ NaN and [\d,]+ infinite") as error:
        load_model(tmp_path, device="cpu", quantization=quantization, check_weights=True)
    assert str(error.value).count("infinite") == 1


@pytest.mark.parametrize(
    ("kind", "number", "quantization"),
    [
        ("Q4_0", np.nan, None),
        ("Q4_0", np.inf, "int4"),
        ("Q4_0", np.nan, "dequantize"),
        ("Q8_0", np.inf, None),
        ("Q8_0", np.nan, "int4"),
        ("Q4_K", np.nan, "int8"),
        ("Q4_K", np.inf, "dequantize"),
        ("F16", np.nan, "int4"),
        ("F16", np.inf, "int8"),
    ],
)
def test_gguf_files_keep_them(tmp_path, kind, number, quantization):
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    model = randomized(small_config(**SIZES | {"hidden_size": 256}))
    if kind == "F16":
        model.get_submodule(UP).weight[3, 5] = float(number)
    file = tmp_path / "model.gguf"
    data, _ = write_gguf(file, model, kind)["blk.0.ffn_up.weight"]
    if kind != "F16":  # the scale of a block is a number in float16
        stored = file.read_bytes()
        start = stored.index(data.tobytes()) + 3 * data.shape[1]
        file.write_bytes(stored[:start] + np.float16(number).tobytes() + stored[start + 2 :])
    weight = dequantized(load_model(file, device="cpu", quantization=quantization))
    assert rows_that_are_finite(weight) == [i for i in range(256) if i != 3]
