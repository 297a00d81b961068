"""The fused step's kernels as Triton compiles them, run by tools/compile_for_gpu/emulator, and their plain forms."""

from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from conftest import random_tensor
from cuda_static.kernel_checks import EPS, attention_case, make_weight, norm_weight
from filelock import FileLock

from compile_for_gpu.emulator import device  # isort: skip  needs Triton
from compile_for_gpu.emulator.program import EmulatorError  # isort: skip

from qwen3fast.kernels.cuda import split_attention
from qwen3fast.kernels.cuda.decode_step import attention, linear, sample, tail, weights
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows
from qwen3fast.sampling.samplers import sample as plain_sample

pytestmark = pytest.mark.triton

BF16 = torch.bfloat16
A100, H100 = (8, 0), (9, 0)
SMALLEST = torch.iinfo(torch.int32).min  # as NaN: what a kernel leaves out


class Product(NamedTuple):
    """A product of the fused step: its use, the weight's format and the number of rows.

    damage: added to a byte of the weight, to see that a wrong one is noticed.
    """

    use: str
    format: str
    rows: int
    capability: tuple[int, int] = H100
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, damage=0):
        """Return pairs: what the kernel computes, and what it should."""
        # (out_features, in_features), and a number of programs that gives the tiles of large weights.
        N, K, programs = {"norm": (64, 1024, 2), "add": (48, 768, 3), "gate": (64, 1024, 2), "logits": (112, 1024, 2)}[
            self.use
        ]
        x, norm = random_tensor(self.rows, K).to(self.dtype), norm_weight(K, self.dtype)
        weight, plain = make_weight(self.format, 2 * N if self.use == "gate" else N, K, self.dtype)
        weight.tensor.view(-1).view(torch.uint8)[101] += damage
        y = torch.full((self.rows, N), torch.nan, dtype=self.dtype)
        with patch.object(weights, "PROGRAMS", programs):
            if self.use == "norm":
                linear.norm_linear(x, norm, EPS, weight, y)
                return [(y, linear.plain_norm_linear(x, norm, EPS, plain))]
            if self.use == "gate":
                linear.norm_gated_linear(x, norm, EPS, weight, y)
                return [(y, linear.plain_norm_gated_linear(x, norm, EPS, plain))]
            if self.use == "add":
                before = random_tensor(self.rows, N, seed=3).to(self.dtype)
                y = before.clone()
                linear.linear_add(x, weight, y)
                return [(y, linear.plain_linear_add(x, plain, before))]
        C = -(-N // tail.ROWS_OF_PROGRAM)
        best = tail.Best(torch.full((self.rows, C), torch.nan), torch.full((self.rows, C), SMALLEST, dtype=torch.int32))
        logits = y.float()
        tail.vocabulary(x, norm, EPS, weight, best, logits)
        parts = logits.split(tail.ROWS_OF_PROGRAM, dim=1)
        tokens = [part.argmax(1) + tail.ROWS_OF_PROGRAM * i for i, part in enumerate(parts)]
        return [
            (logits.to(self.dtype), tail.plain_vocabulary(x, norm, EPS, plain).to(self.dtype)),
            (best.logit, torch.stack([part.amax(1) for part in parts], dim=1)),
            (best.token, torch.stack(tokens, dim=1).int()),
        ]


FORMATS = ("plain", "int8", "fp8", "int4")
LAYOUTS = ("uint4", "uint4 with zero points", "uint4 of Q4_K", "fp8-block")
PRODUCTS = [
    *(Product(use, format, rows) for format in FORMATS for use, rows in (("norm", 1), ("add", 3), ("gate", 8))),
    *(Product("logits", format, rows) for format, rows in (("plain", 1), ("int8", 8), ("fp8", 1), ("int4", 8))),
    *(Product(use, format, rows) for format in LAYOUTS for use, rows in (("norm", 8), ("add", 1))),
    *(Product("gate", format, 1, A100) for format in FORMATS),
    *(Product("norm", format, 8, A100) for format in ("plain", "fp8")),
    *(Product("logits", format, 8, A100) for format in ("int8", "int4")),
    Product("norm", "plain", 1, A100, torch.float32),
    Product("gate", "int4", 3, H100, torch.float32),
    Product("norm", "int8", 3, H100, torch.float16),
]


class Attention(NamedTuple):
    """The attention of a step, with new keys and values. programs: to split the positions over, at least."""

    is_quantized: bool
    positions: tuple[int, ...]
    allocated: int
    capability: tuple[int, int] = H100
    programs: int = 100

    def __call__(self):
        """Return pairs: output, keys, values and scales, and what they should be."""
        arguments = attention_case(BF16, 4, 2, 128, list(self.positions), self.allocated, self.is_quantized)
        given = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        B, D, (_, K, S, _) = len(given[0]), len(given[1]), given[7].shape
        with patch.object(split_attention, "PROGRAMS", self.programs):
            splits = attention.Splits.allocate([B], 4, K, S, D, torch.device("cpu"))[B]
        for t in splits:
            t.fill_(torch.nan)
        y = torch.full((B, 4 * D), torch.nan, dtype=BF16)
        attention.attend(*given, splits, y)
        expected = attention.plain_attend(*arguments)
        pairs = [(y, expected), *zip(given[7:], arguments[7:], strict=True)]
        return [(a, b) if a.dtype == torch.int8 else (a.to(BF16), b.to(BF16)) for a, b in pairs if a is not None]


class Embedding(NamedTuple):
    """The embeddings of three tokens."""

    format: str
    capability: tuple[int, int] = H100

    def __call__(self):
        """Return a pair: the embeddings, and what they should be."""
        weight, plain = make_weight(self.format, 48, 512, BF16)
        token, x = torch.tensor([47, 0, 17]), torch.full((3, 512), torch.nan, dtype=BF16)
        tail.embed(token, weight, x)
        return [(x, tail.plain_embed(token, plain, BF16))]


class Draws(NamedTuple):
    """The samplers' kernels and the choice after them, for rows of several kinds."""

    capability: tuple[int, int] = H100

    def __call__(self):
        """Return pairs: the step's inputs, tokens, positions and numbers, and what they should be."""
        B, V = 4, 300
        logits = 3 * random_tensor(B, V)
        rows = SamplerRows(
            temperature_B=torch.tensor([0.0, 1.0, 0.7, 1.5]),
            top_k_B=torch.tensor([0, 0, 20, 5]),
            top_p_B=torch.tensor([1.0, 0.9, 0.8, 1.0]),
            min_p_B=torch.tensor([0.0, 0.0, 0.01, 0.0]),
            seed_B=torch.tensor([1, 2**40 + 3, 5, 7]),
            step_B=torch.tensor([0, 1, 2, 3]),
        )
        with patch.object(sample, "TOKENS_OF_PROGRAM", 128):
            work = sample.Draw.allocate(B, V, torch.device("cpu"))
            sample.draw(logits, *rows, work)
        state = [torch.full((B,), number) for number in (50, 60, 70, 80)]
        tail.choose(work.best, torch.tensor([1, 1, 0, 1]), *state)
        tokens = plain_sample(logits, rows, SamplerKind.FULL)
        moved = [torch.tensor([n + 1, n + 1, n, n + 1]) for n in (70, 80)]
        return list(zip(state, [tokens, tokens, *moved], strict=True))


ATTENTIONS = [Attention(q, (5, 129, -1), 130, c) for q, c in ((False, H100), (True, H100), (False, A100))]
ATTENTIONS += [Attention(is_quantized, (200,), 260, programs=1) for is_quantized in (False, True)]  # blocks in a loop
EMBEDDINGS = [Embedding(format) for format in ("plain", "int8", "fp8", "int4", "uint4 of Q4_K")]
CASES = [*PRODUCTS, *ATTENTIONS, *EMBEDDINGS, Draws()]


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The compiled kernels of all cases, by name. The second worker of pytest finds them in Triton's cache."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "emulator.lock"):
        return compiled()


def compiled():
    """Compile the kernels of all cases."""
    found = {}
    for capability in (A100, H100):
        with device.noted_launches(capability) as kernels:
            for case in CASES:
                if case.capability == capability:
                    case()
        found |= device.compile_elsewhere(kernels, capability)
    return found


def assert_near(pairs, share=0.002):
    """Few numbers in 16 bits are rounded the other way, and levels of int8. share: of the largest number."""
    for actual, expected in pairs:
        atol, rtol = float(actual.dtype == torch.int8), 0.0
        if actual.is_floating_point():
            largest = expected.nan_to_num(0).abs().max().item()
            atol, rtol = (1e-5 * largest, 0.0) if actual.dtype == torch.float32 else (share * largest, 2**-7)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_kernels_equal_their_plain_forms(case, code):
    share = 0.01 if isinstance(case, Attention) else 0.002  # attention weights are bfloat16, values of both signs
    with device.emulated_launches(case.capability, code):
        assert_near(case(), share)


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_weight_is_noticed(format, code):
    case = Product("norm", format, 1)
    with device.emulated_launches(H100, code), pytest.raises(AssertionError, match="not close"):
        assert_near(case(damage=64))


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        (Product("norm", "int4", 1), "0xC308C308", "0xC300C300"),  # the level of a weight of zero
        (Product("norm", "int8", 1), "0x43804380", "0x43004300"),  # subtracted from bytes above 127
        (Product("gate", "plain", 8), "ex2.approx.f32", "mov.b32"),
    ],
)
def test_a_wrong_instruction_is_noticed(case, before, after, code):
    with (
        device.emulated_launches(H100, code, lambda ptx: ptx.replace(before, after)),
        pytest.raises(AssertionError, match="not close"),
    ):
        assert_near(case())


@pytest.mark.parametrize(
    ("case", "missing", "error"),
    [
        (Product("norm", "plain", 1), "bar.sync", "without a barrier"),
        (Attention(False, (5, 129, -1), 130), "cp.async.wait_group", "nothing wrote"),
        (Product("norm", "plain", 1), "griddepcontrol.wait", "before waiting for the previous kernel"),
    ],
)
def test_a_missing_wait_is_noticed(case, missing, error, code):
    def change(ptx):
        return "\n".join(line for line in ptx.splitlines() if missing not in line)

    with device.emulated_launches(H100, code, change), pytest.raises(EmulatorError, match=error):
        case()
