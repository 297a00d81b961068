"""4 bits with error correction: equal to its definition, better on the calibration text, and saved as any int4 is."""

import pytest
import torch
from conftest import random_ids, random_tensor, randomized, small_config
from tiny_text import tiny_text

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.checkpoint.source import TINY_FOLDER
from qwen3fast.cli import main
from qwen3fast.engine.own_text import beginning_of_chat, own_text, write_texts
from qwen3fast.kernels import cpu
from qwen3fast.model import MoE, rope_tables
from qwen3fast.model.attention import Attention
from qwen3fast.quantization.calibrate import (
    CALIBRATED,
    SIDE,
    SecondMoment,
    fast_dtype,
    quantize_calibrated,
    second_moments,
)
from qwen3fast.quantization.convert import formats_of, quantize_model
from qwen3fast.quantization.formats import FORMATS, GROUP, quantize
from qwen3fast.quantization.gptq import BLOCK, ROWS, feedback, quantize_with
from qwen3fast.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qwen3fast.text.tokenizer import Tokenizer

FORMATS_4 = pytest.mark.parametrize("format", [FORMATS[name] for name in CALIBRATED], ids=CALIBRATED)


def correlated_moment(K, seed=0):
    """The second moment of inputs whose channels depend on each other."""
    x = random_tensor(4 * K, K, seed=seed) + 2 * random_tensor(4 * K, 4, seed=seed + 1) @ random_tensor(4, K, seed=2)
    return x.T @ x / len(x)


def corrected(weight, format, hessian, damping=0.01):
    """The dequantized weight."""
    return format.dequantize(quantize_with(weight, format, feedback(hessian, damping)))


def plain(weight, format):
    """The same without correction."""
    return format.dequantize(quantize(weight, format))


def reference(weight, format, hessian, damping):
    """Optimal brain surgeon, column by column, with the inverse of the remaining columns' Hessian; float64."""
    K = weight.shape[1]
    step, minimum = (x.double().repeat_interleave(GROUP, 1) for x in format.steps(quantize(weight, format)))
    weight = weight.double().clone()
    result = torch.empty_like(weight)
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(K, dtype=torch.float64)
    for k in range(K):
        level = torch.round((weight[:, k] + minimum[:, k]) / step[:, k]).clamp(0, 15)
        result[:, k] = level * step[:, k] - minimum[:, k]
        inverse = torch.linalg.inv(damped[k:, k:])
        weight[:, k:] -= torch.outer((weight[:, k] - result[:, k]) / inverse[0, 0], inverse[0])
    return result.float()


@FORMATS_4
@pytest.mark.parametrize("K", [GROUP, BLOCK + GROUP])
def test_error_correction_is_as_defined(K, format):
    weight, hessian = random_tensor(16, K), correlated_moment(K)
    ours, expected = corrected(weight, format, hessian), reference(weight, format, hessian, 0.01)
    is_equal = (ours - expected).abs() <= 1e-5
    assert is_equal.float().mean() > 0.98  # a number next to the middle of two levels may go either way
    assert (ours - plain(weight, format)).abs().gt(1e-5).float().mean() > 0.03


@FORMATS_4
def test_without_correlation_it_is_the_plain_format(format):
    weight = random_tensor(32, 2 * BLOCK)
    step, _ = format.steps(quantize(weight, format))
    difference = corrected(weight, format, torch.eye(2 * BLOCK), 0.0) - plain(weight, format)
    assert (difference.abs() <= 1e-5).float().mean() > 0.999
    assert (difference.abs() <= step.abs().repeat_interleave(GROUP, 1) * 1.01).all()


def test_scales_stay():
    weight, format = random_tensor(32, BLOCK), FORMATS["uint4"]
    packed = quantize_with(weight, format, feedback(correlated_moment(BLOCK), 0.01))
    assert torch.equal(packed.scale, quantize(weight, format).scale)


def test_rows_are_independent(monkeypatch):
    weight, hessian = random_tensor(48, 64), correlated_moment(64)
    whole = corrected(weight, FORMATS["int4"], hessian)
    monkeypatch.setattr("qwen3fast.quantization.gptq.ROWS", 32)
    assert ROWS % 16 == 0
    torch.testing.assert_close(corrected(weight, FORMATS["int4"], hessian), whole)


@FORMATS_4
def test_outputs_are_closer_on_correlated_inputs(format):
    weight, hessian = random_tensor(64, 256), correlated_moment(256)

    def output_error(quantized):
        return float((((quantized - weight) @ hessian) * (quantized - weight)).sum())

    assert output_error(corrected(weight, format, hessian)) < 0.5 * output_error(plain(weight, format))


def test_feedback_factorizes_the_damped_hessian():
    hessian = correlated_moment(64)
    upper = feedback(hessian, 0.01)
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() == 1).all()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    scaled = torch.linalg.solve_triangular(upper, damped, upper=True)  # D @ U.T
    diagonal = scaled.diagonal()
    torch.testing.assert_close(upper @ diagonal.diag() @ upper.T, damped, rtol=1e-4, atol=1e-4)
    assert torch.equal(feedback(hessian.triu(), 0.01), upper)  # no other half is needed


def test_a_factorization_that_fails_in_float32_is_repeated_in_float64(monkeypatch):
    hessian, real = correlated_moment(64), torch.linalg.cholesky_ex
    expected = feedback(hessian, 0.01)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda x: (real(x)[0] * torch.nan, torch.tensor(3)))
    torch.testing.assert_close(feedback(hessian, 0.01), expected, rtol=1e-3, atol=1e-4)


@FORMATS_4
def test_channels_that_are_never_used_and_zero_weights_stay_finite(format):
    weight, hessian = random_tensor(16, 64), correlated_moment(64)
    hessian[5], hessian[:, 5], weight[:, 32:] = 0, 0, 0
    assert corrected(weight, format, hessian).isfinite().all()
    assert corrected(weight, format, torch.zeros(64, 64)).isfinite().all()


@FORMATS_4
def test_what_is_nan_in_the_format_stays_nan(format):
    weight = random_tensor(16, 512)
    weight[3, 300], weight[7, 2] = torch.nan, torch.inf
    is_nan = corrected(weight, format, correlated_moment(512)).isnan()
    assert torch.equal(is_nan, plain(weight, format).isnan()) and 0 < is_nan.sum() < is_nan.numel() / 2


def test_second_moments_are_means_over_all_tokens():
    layer = torch.nn.Linear(8, 4)
    inputs = [random_tensor(1, 3, 8), random_tensor(1, 5, 8, seed=1)]
    x = torch.cat([window[0] for window in inputs])
    moments = second_moments({"layer": layer}, layer, inputs)
    torch.testing.assert_close(moments["layer"].upper(), sum(torch.outer(row, row) for row in x) / 8)
    assert not layer._forward_pre_hooks


def test_second_moments_hold_the_half_above_the_diagonal_beyond_a_block():
    x_MK, moment = random_tensor(6, SIDE + 40), SecondMoment()
    moment.add(x_MK)
    torch.testing.assert_close(moment.upper().triu(), (x_MK.T @ x_MK / 6).triu())


def test_layers_with_the_same_input_share_their_moment():
    block, seen = randomized(small_config(vocab_size=96, hidden_size=64, intermediate_size=96)).model.layers[0], []
    layers = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}

    def run(x_BTE):
        seen.append(len(x_BTE))
        return block(x_BTE, *(table[None] for table in rope_tables(block.self_attn.head_dim, 1e6, 5, x_BTE.device)))

    moments = second_moments(layers, run, [random_tensor(2, 5, 64), random_tensor(1, 5, 64, seed=1)])
    assert seen == [2, 1] and len(set(moments.values())) == 4
    assert moments["self_attn.q_proj"] is moments["self_attn.v_proj"]
    assert moments["mlp.gate_proj"] is moments["mlp.up_proj"]


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("tied", [True, False])
def test_models_have_the_layers_of_the_format(tied, name):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": tied}
    plain, corrected = (randomized(small_config(**sizes)) for _ in range(2))
    quantize_model(plain, name, torch.float32)
    quantize_calibrated(corrected, random_ids(4, 16, vocab_size=96), name)
    assert formats_of(corrected) == [name]
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
def divergences(token_BT, *models):
    """KL divergence of each model from tiny on a text."""
    p = load_model("tiny", "cpu", "float32")(token_BT).log_softmax(-1)
    return [float((p.exp() * (p - model(token_BT).log_softmax(-1))).sum(-1).mean()) for model in models]


def test_the_command_writes_a_checkpoint_that_diverges_less(calibration, tmp_path, capsys):
    """On held-out text, KL divergence from the unquantized model falls by more than a third."""
    text = ["--calibrate", str(calibration), "--calibration-tokens", "8192"]
    with torch.device("meta"):  # an application's default device
        assert main(["quantize", "--model", "tiny", *text, "--output", str(tmp_path / "q")]) == 0
    assert f"wrote {tmp_path / 'q'}: int4" in capsys.readouterr().out
    plain, corrected = (
        load_model(source, "cpu", "float32", quantization=name)
        for source, name in (("tiny", "int4"), (str(tmp_path / "q"), None))
    )
    assert formats_of(corrected) == ["int4"] and corrected.num_bytes() == plain.num_bytes()
    ids = Tokenizer.from_folder(TINY_FOLDER).encode(tiny_text(rounds=6, seed=5))[: 6 * 256]
    kl = divergences(torch.tensor(ids).view(-1, 256), plain, corrected)
    assert 0 < kl[1] < kl[0] * 2 / 3
    with Generator.from_pretrained(tmp_path / "q", compile=False) as generator:
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        assert generator.chat(messages, SamplingParams(temperature=0), enable_thinking=False).text == "42"


@pytest.fixture(scope="module")
def written_by_tiny():
    """Text of the unquantized model: from tokens, and from the beginning of a conversation."""
    chat = [[1016, 473, 266, 198]] * 4
    assert beginning_of_chat(Tokenizer.from_folder(TINY_FOLDER)) == chat[0]
    return write_texts(load_model("tiny", "cpu", "float32"), [[5], [70], [200], [431], *chat], 128, seed=9)


@pytest.mark.parametrize("name", CALIBRATED)
def test_without_a_text_the_command_calibrates_on_what_the_model_writes(name, written_by_tiny, tmp_path):
    """On other text that the model writes, KL divergence falls by more than a tenth.

    The text that is written depends on the processor's rounding. With a quarter of the tokens, 1 text of 6 gained
    nothing.
    """
    options = ["--quantization", name, "--calibration-tokens", "8192"]
    with torch.device("meta"):  # an application's default device
        assert main(["quantize", "--model", "tiny", *options, "--output", str(tmp_path / "q")]) == 0
    plain, corrected = (
        load_model(source, "cpu", "float32", quantization=format)
        for source, format in (("tiny", name), (str(tmp_path / "q"), None))
    )
    kl = divergences(written_by_tiny, plain, corrected)
    assert 0 < kl[1] < kl[0] * 9 / 10


@pytest.mark.parametrize("options", [["--quantization", "int8"], ["--no-calibrate"]], ids=["int8", "no calibration"])
def test_the_command_quantizes_as_loading_does(options, tmp_path):
    assert main(["quantize", "--model", "tiny", *options, "--output", str(tmp_path / "q")]) == 0
    name = "int8" if "int8" in options else "int4"
    ours, theirs = load_model(str(tmp_path / "q"), "cpu"), load_model("tiny", "cpu", quantization=name)
    assert formats_of(ours) == [name]
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("place", ["quantize_calibrated", "save_model"])
def test_an_interrupted_command_writes_nothing(place, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    where = "qwen3fast.cli.quantize." + place if place != "save_model" else "qwen3fast.checkpoint.save.save_file"
    monkeypatch.setattr(where, interrupted)
    options = ["--calibration-tokens", "256", "--output", str(tmp_path / "folder" / "q")]
    assert main(["quantize", "--model", "tiny", *options]) == 130
    assert not any((tmp_path / "folder").rglob("*"))


def test_own_text_begins_as_a_conversation_or_with_a_random_token():
    model, tokenizer = load_model("tiny", "cpu"), Tokenizer.from_folder(TINY_FOLDER)
    text_BT = own_text(model, tokenizer, 34 * 128 + 5)
    assert text_BT.shape == (34, 128) and torch.equal(text_BT, own_text(model, tokenizer, 34 * 128))
    assert all(tokenizer.decode(text.tolist()).startswith("<|im_start|>user\n") for text in text_BT[1::2])
    assert len({int(text[0]) for text in text_BT[::2]}) > 12 and (own_text(model, None, 256)[:, 0] != 1016).all()
    with torch.no_grad():
        logp = model(text_BT)[:, 4:-1].float().log_softmax(-1)
    chosen, others = (logp.gather(2, ids[:, 5:, None]).mean() for ids in (text_BT, text_BT.roll(1, 0)))
    assert chosen > others + 1  # what the model writes is likely to it


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[0].content }}", ""),
        ("{{ 'a' * 300 + messages[0].content }}", ""),
        ("{{ raise_exception('no') }}", ""),
        ("{{ 'no content' }}", ""),
        ("{{ 'User: ' + messages[0].content }}", "User: "),
    ],
)
def test_beginnings_of_chats(template, expected):
    base = Tokenizer.from_folder(TINY_FOLDER).base
    assert beginning_of_chat(Tokenizer(base, template)) == Tokenizer(base).encode(expected)


def test_own_texts_have_the_frequencies_of_the_model():
    """Second tokens after one first token: their shares are the model's probabilities."""
    model = load_model("tiny", "cpu", "float32")
    second_B = write_texts(model, [[5]] * 1000, 2)[:, 1]
    with torch.no_grad():
        expected_V = model(torch.tensor([[5]]))[0, 0].softmax(-1)
    found_V = torch.bincount(second_B, minlength=len(expected_V)) / 1000
    uniform_V = torch.full_like(expected_V, 1 / len(expected_V))
    distance = (found_V - expected_V).abs().sum()
    assert distance < 0.4 and distance < 0.4 * (uniform_V - expected_V).abs().sum()


def test_own_texts_keep_their_starts_and_do_not_depend_on_the_form(monkeypatch):
    """In C++, and block by block in PyTorch; bfloat16, so a draw next to a boundary may fall to either side."""
    model, starts = load_model("tiny", "cpu"), [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14]]
    assert cpu.load()
    fused = write_texts(model, starts, 12)
    with monkeypatch.context() as without:
        without.setattr(cpu, "is_loaded", lambda: False)
        plain = write_texts(model, starts, 12)
    assert all(text.tolist()[: len(start)] == start for text, start in zip(plain, starts, strict=True))
    assert (fused == plain).float().mean() > 0.7
    assert write_texts(model, starts, 2).tolist()[2] == [9, 10]


def test_a_model_with_nan_writes_no_text():
    model = randomized(small_config(vocab_size=96, hidden_size=64, intermediate_size=96))
    model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        write_texts(model, [[1], [2]], 4)


@pytest.fixture(scope="module")
def levels_of_float32():
    """Bytes of a layer of tiny that is calibrated in float32, and of the same layer without correction."""
    calibrated = load_model("tiny", "cpu", "float32")
    quantize_calibrated(calibrated, random_ids(4, 64, vocab_size=1024))
    return [levels(model) for model in (calibrated, load_model("tiny", "cpu", quantization="int4"))]


def levels(model):
    return model.model.layers[2].mlp.down_proj.weight_packed.view(torch.uint8)


@pytest.mark.parametrize("features", ["avx2 avx512f", "avx512_bf16"])
def test_blocks_are_computed_in_the_dtype_that_the_processor_has_instructions_for(
    features, levels_of_float32, monkeypatch
):
    """In float32 and in bfloat16, weights are nearly the same, and plain layers keep their dtype."""
    monkeypatch.setattr("qwen3fast.quantization.calibrate.processor_features", lambda: features)
    expected = torch.bfloat16 if "bf16" in features else torch.float32
    assert fast_dtype(torch.bfloat16, torch.device("cpu")) == expected
    model, seen = load_model("tiny", "cpu"), set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.add(args[0].dtype) if isinstance(module, Attention) else None
    )
    with hook:
        quantize_calibrated(model, random_ids(4, 64, vocab_size=1024))
    assert seen == {expected} and model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    as_float32, as_uncorrected = ((levels(model) == others).float().mean() for others in levels_of_float32)
    assert as_float32 > 0.7 > as_uncorrected


def test_fast_dtypes_of_other_models_and_devices():
    cpu_device, cuda = torch.device("cpu"), torch.device("cuda")
    assert fast_dtype(torch.float16, cuda) == torch.float16 and fast_dtype(torch.bfloat16, cuda) == torch.bfloat16
    assert {fast_dtype(dtype, cpu_device) for dtype in (torch.float16, torch.float32)} == {torch.float32}


@FORMATS_4
def test_products_in_bfloat16_hardly_change_levels(format):
    weight, factor = random_tensor(32, 3 * BLOCK), feedback(correlated_moment(3 * BLOCK), 0.01)
    exact, fast = (format.dequantize(quantize_with(weight, format, factor, t)) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(exact[:, :BLOCK], fast[:, :BLOCK])  # no product yet
    assert 0.85 < (exact == fast).float().mean() < 1


def test_only_4_bits_are_calibrated():
    with pytest.raises(ValueError, match="only int4 and uint4 are calibrated, not int8"):
        quantize_calibrated(randomized(small_config()), random_ids(1, 4), "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization", "int8", "--calibrate", "text.txt"], "--calibrate is for int4 and uint4, not for int8"),
        (["--calibrate", "short.txt"], "calibration needs at least 512"),
        (["--calibrate", "latin.txt"], "latin.txt is not text in UTF-8"),
        (["--calibrate", "no/such.txt"], "such.txt not found; expected a text file"),
        (["--calibration-tokens", "100"], "--calibration-tokens must be at least 128, got 100"),
    ],
)
def test_the_command_refuses(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("What is 17 + 25?", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("Was ist größer?".encode("latin-1"))
    assert main(["quantize", "--model", "tiny", "--output", "q", *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "q").exists()


def test_the_command_refuses_quantized_checkpoints(tmp_path, capsys):
    assert main(["quantize", "--model", "tiny", "--no-calibrate", "--output", str(tmp_path / "q")]) == 0
    assert main(["quantize", "--model", str(tmp_path / "q"), "--output", str(tmp_path / "again")]) == 2
    assert "is quantized already (int4)" in capsys.readouterr().err
