"""int4 with error correction: equal to its definition, better on the calibration text, and saved as any int4 is."""

import pytest
import torch
from conftest import random_ids, random_tensor, randomized, small_config
from tiny_text import tiny_text

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main
from qwen3fast.model import MoE
from qwen3fast.quantization import formats_of, quantize_model
from qwen3fast.quantization.calibrate import quantize_calibrated, second_moments
from qwen3fast.quantization.formats import FORMATS, GROUP, int4_scales, pack_int4, quantize_int4
from qwen3fast.quantization.gptq import BLOCK, quantize_int4_with
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qwen3fast.text.tokenizer import Tokenizer

INT4 = FORMATS["int4"]


def correlated_moment(K, seed=0):
    """The second moment of inputs whose channels depend on each other."""
    x = random_tensor(4 * K, K, seed=seed) + 2 * random_tensor(4 * K, 4, seed=seed + 1) @ random_tensor(4, K, seed=2)
    return x.T @ x / len(x)


def reference_int4_with(weight, hessian, damping):
    """Optimal brain surgeon, column by column, with the inverse of the remaining columns' Hessian; float64."""
    weight, N, K = weight.double().clone(), *weight.shape
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(K, dtype=torch.float64)
    levels, scales = torch.empty(N, K, dtype=torch.uint8), torch.empty(N, K // GROUP)
    for k in range(K):
        if k % GROUP == 0:
            scales[:, k // GROUP] = int4_scales(weight[:, k : k + GROUP].float())
        scale = scales[:, k // GROUP].double()
        level = torch.round(weight[:, k] / scale).clamp(-8, 7)
        levels[:, k] = (level + 8).to(torch.uint8)
        inverse = torch.linalg.inv(damped[k:, k:])
        weight[:, k:] -= torch.outer((weight[:, k] - level * scale) / inverse[0, 0], inverse[0])
    return INT4.dequantize(pack_int4(levels, scales))


def test_int4_scales_are_those_of_int4():
    weight = random_tensor(16, GROUP)
    assert (int4_scales(weight) == quantize_int4(weight).scale[0, 0].float()).all()


@pytest.mark.parametrize("K", [GROUP, BLOCK + GROUP])
def test_error_correction_is_as_defined(K):
    weight, hessian = random_tensor(16, K), correlated_moment(K)
    ours = INT4.dequantize(quantize_int4_with(weight, hessian, 0.01))
    expected = reference_int4_with(weight, hessian, 0.01)
    is_equal = (ours - expected).abs() <= 1e-5
    assert is_equal.float().mean() > 0.98  # a number next to the middle of two levels may go either way
    assert (ours - quantized_plainly(weight)).abs().gt(1e-5).float().mean() > 0.1


def quantized_plainly(weight):
    return INT4.dequantize(quantize_int4(weight))


def test_without_correlation_it_is_plain_int4():
    weight = random_tensor(32, 2 * BLOCK)
    corrected, plain = quantize_int4_with(weight, torch.eye(2 * BLOCK), 0.0), quantize_int4(weight)
    assert (corrected.weight == plain.weight).all() and (corrected.scale == plain.scale).all()


def test_outputs_are_closer_on_correlated_inputs():
    weight, hessian = random_tensor(64, 256), correlated_moment(256)

    def output_error(quantized):
        return float((((quantized - weight) @ hessian) * (quantized - weight)).sum())

    corrected = INT4.dequantize(quantize_int4_with(weight, hessian, 0.01))
    assert output_error(corrected) < 0.5 * output_error(quantized_plainly(weight))


def test_channels_that_are_never_used_and_zero_weights_stay_finite():
    weight, hessian = random_tensor(16, 64), correlated_moment(64)
    hessian[5], hessian[:, 5], weight[:, 32:] = 0, 0, 0
    assert INT4.dequantize(quantize_int4_with(weight, hessian, 0.01)).isfinite().all()
    assert INT4.dequantize(quantize_int4_with(weight, torch.zeros(64, 64), 0.01)).isfinite().all()


def test_groups_with_nan_become_nan():
    weight = random_tensor(16, 64)
    weight[3, 40], weight[7, 2] = torch.nan, torch.inf
    is_nan = INT4.dequantize(quantize_int4_with(weight, correlated_moment(64), 0.01)).isnan()
    expected = torch.zeros(16, 64, dtype=torch.bool)
    expected[3, 32:], expected[7, :32] = True, True
    assert (is_nan == expected).all()


def test_second_moments_are_means_over_all_tokens():
    layer = torch.nn.Linear(8, 4)
    inputs = [random_tensor(1, 3, 8), random_tensor(1, 5, 8, seed=1)]
    x = torch.cat([window[0] for window in inputs])
    moments = second_moments({"layer": layer}, layer, inputs)
    torch.testing.assert_close(moments["layer"], sum(torch.outer(row, row) for row in x) / 8)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("tied", [True, False])
def test_models_have_the_layers_of_int4(tied):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": tied}
    plain, corrected = (randomized(small_config(**sizes)) for _ in range(2))
    quantize_model(plain, "int4", torch.float32)
    quantize_calibrated(corrected, random_ids(4, 16, vocab_size=96))
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (plain, corrected)]
    assert kinds[0] == kinds[1] and QuantizedEmbedding in kinds[0].values()
    assert (corrected.lm_head.weight_packed is corrected.model.embed_tokens.weight_packed) == tied
    assert not torch.equal(
        *(model.get_submodule("model.layers.1.mlp.down_proj").weight_packed for model in (plain, corrected))
    )


def test_experts_are_quantized_plainly_and_routers_stay():
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    plain, corrected = (randomized(small_config(**sizes, **experts)) for _ in range(2))
    quantize_model(plain, "int4", torch.float32)
    quantize_calibrated(corrected, random_ids(4, 16, vocab_size=96))
    for ours, theirs in zip(corrected.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, MoE):
            assert not isinstance(ours.gate, QuantizedLinear)
            for a, b in zip(ours.experts.parameters(), theirs.experts.parameters(), strict=True):
                assert torch.equal(a, b)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A text of the kind that tiny was trained on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_text(rounds=8, seed=77), encoding="utf-8")
    return file


@torch.no_grad()
def test_the_command_writes_a_checkpoint_that_diverges_less(calibration, tmp_path, capsys):
    """On held-out text, KL divergence from the unquantized model falls by more than a third."""
    assert main(["quantize", "--model", "tiny", "--calibrate", str(calibration), "--output", str(tmp_path / "q")]) == 0
    assert f"wrote {tmp_path / 'q'}: int4" in capsys.readouterr().out
    exact, plain, corrected = (
        load_model(source, "cpu", "float32", quantization=name)
        for source, name in (("tiny", None), ("tiny", "int4"), (str(tmp_path / "q"), None))
    )
    assert formats_of(corrected) == ["int4"] and corrected.num_bytes() == plain.num_bytes()
    ids = Tokenizer.from_folder(TINY_FOLDER).encode(tiny_text(rounds=6, seed=5))[: 6 * 256]
    token_BT = torch.tensor(ids).view(-1, 256)
    p = exact(token_BT).log_softmax(-1)
    kl = [float((p.exp() * (p - model(token_BT).log_softmax(-1))).sum(-1).mean()) for model in (plain, corrected)]
    assert 0 < kl[1] < kl[0] * 2 / 3
    with Generator.from_pretrained(tmp_path / "q", compile=False) as generator:
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        assert generator.chat(messages, SamplingParams(temperature=0), enable_thinking=False).text == "42"


def test_the_command_without_text_quantizes_as_loading_does(tmp_path):
    assert main(["quantize", "--model", "tiny", "--quantization", "int8", "--output", str(tmp_path / "q")]) == 0
    ours, theirs = load_model(str(tmp_path / "q"), "cpu"), load_model("tiny", "cpu", quantization="int8")
    assert formats_of(ours) == ["int8"]
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization", "int8", "--calibrate", "text.txt"], "--calibrate is for int4, not for int8"),
        (["--calibrate", "no/such.txt"], "No such file"),
        (["--calibrate", "short.txt"], "calibration needs at least 512"),
    ],
)
def test_the_command_refuses(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("What is 17 + 25?", encoding="utf-8")
    assert main(["quantize", "--model", "tiny", "--output", "q", *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "q").exists()


def test_the_command_refuses_quantized_checkpoints(tmp_path, capsys):
    assert main(["quantize", "--model", "tiny", "--output", str(tmp_path / "q")]) == 0
    assert main(["quantize", "--model", str(tmp_path / "q"), "--output", str(tmp_path / "again")]) == 2
    assert "is quantized already (int4)" in capsys.readouterr().err
