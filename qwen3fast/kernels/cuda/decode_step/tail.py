"""The ends of a decode step: the token's embedding before the blocks; the vocabulary and the greedy choice after them.

The product with the vocabulary keeps each program's largest logit: a greedy step writes no logits at all. One more
kernel takes the largest of these and writes the step's state.

    R rows   V vocabulary   E hidden_size   C programs of the product
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.launch import launch, start_next, wait_for_previous
from qwen3fast.kernels.cuda.decode_step.linear import (
    _product,
    inverse_rms,
    normalized,
    plain_norm,
    rounded,
)
from qwen3fast.kernels.cuda.decode_step.weights import (
    Weight,
    after_wait,
    channels_of,
    channels_of_tile,
    columns_of,
    load_channels,
    load_weights,
    multiply,
    num_groups,
    record_bytes,
    record_scales,
    unpack,
)
from qwen3fast.kernels.cuda.split_attention import num_stages

ROWS_OF_PROGRAM = 64  # of the vocabulary, in a tile
EMBEDDING_BLOCK = 256  # words of an embedding that a program takes


class Best(NamedTuple):
    """Workspace: the largest logit of each program, (R, C) float32, and its token, (R, C) int32."""

    logit: Tensor
    token: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab_size: int, device: torch.device) -> Best:
        """Return the workspace for steps of `rows` rows."""
        shape = (rows, triton.cdiv(vocab_size, ROWS_OF_PROGRAM))
        return cls(*(torch.empty(shape, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)))


def embed(token_R: Tensor, weight: Weight, x_RE: Tensor) -> None:
    """Write the embeddings of token_R (int64) to x_RE; weight: (V, E)."""
    R, E = x_RE.shape
    P = channels_of(weight.kind)
    words = E // P
    launch(
        embed_kernel,
        (R, triton.cdiv(words, EMBEDDING_BLOCK)),
        *(token_R, weight.tensor, weight.scale, x_RE),
        device=x_RE.device,
        E=E,
        J=words,
        KIND=weight.kind,
        P=P,
        BLOCK=min(EMBEDDING_BLOCK, triton.next_power_of_2(words)),
    )


def plain_embed(token_R: Tensor, weight_VE: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the embeddings that `embed` writes; weight_VE: dequantized."""
    return weight_VE[token_R].to(dtype)


def vocabulary(
    x_RE: Tensor, norm_E: Tensor, eps: float, weight: Weight, best: Best, logits_RV: Tensor | None = None
) -> None:
    """Write the largest logits of RMSNorm(x) @ weight.T to `best` and, if asked for, all of them in float32.

    Logits are rounded to x's dtype, as the plain output projection gives them. In `best`, NaN counts as infinity.
    """
    (R, E), V = x_RE.shape, weight.shape[0]
    BN, BK = tile_shape(E, weight.kind, x_RE.dtype)
    logits = best.logit if logits_RV is None else logits_RV
    arguments = (x_RE, norm_E, weight.tensor, weight.scale, *best, logits, eps)
    sizes = {"R": R, "ROWS": columns_of(R), "N": V, "K": E, "BN": BN, "BK": BK}
    sizes |= {"KIND": weight.kind, "P": channels_of(weight.kind), "HAS_LOGITS": logits_RV is not None}
    grid, stages = (best.logit.shape[1],), num_stages(x_RE.dtype)
    launch(vocabulary_kernel, grid, *arguments, device=x_RE.device, **sizes, num_stages=stages)


def tile_shape(hidden_size: int, kind: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return (BN, BK) of `vocabulary`, whose programs are many: the larger their tiles, the less often x is read."""
    return ROWS_OF_PROGRAM, channels_of_tile(hidden_size, kind, dtype, ROWS_OF_PROGRAM)


def plain_vocabulary(x_RE: Tensor, norm_E: Tensor, eps: float, weight_VE: Tensor) -> Tensor:
    """Return the logits that `vocabulary` writes, (R, V) float32."""
    return _product(plain_norm(x_RE, norm_E, eps), weight_VE).float()


def choose(
    best: Best, advance_R: Tensor, input_R: Tensor, output_R: Tensor, position_R: Tensor, step_R: Tensor
) -> None:
    """Write the token of the largest logit, and move rows on by advance_R; all int64, the fields of `DecodeState`.

    output_R: -1 for logits that hold NaN or +inf, or only -inf; input_R then gets 0, which is an id.
    """
    C = best.logit.shape[1]
    launch(
        choose_kernel,
        (len(best.logit),),
        *(*best, advance_R, input_R, output_R, position_R, step_R),
        device=input_R.device,
        C=C,
        BLOCK=min(4096, triton.next_power_of_2(C)),
        num_warps=8,
    )


def plain_choose(logits_RV: Tensor) -> Tensor:
    """Return the tokens that `choose` writes to output_R, (R,) int64; among equal logits the first."""
    largest = logits_RV.amax(-1)
    return torch.where(largest.isfinite(), (logits_RV == largest[:, None]).int().argmax(-1), -1)


@triton.jit
def embed_kernel(
    token,
    w,
    scale,
    x,
    E: tl.constexpr,
    J: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program (r, c): BLOCK words of row r."""
    r = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = j < J
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    row = tl.load(token + r)
    dtype: tl.constexpr = x.dtype.element_ty
    if P == 1:
        tl.store(x + r * E + j, tl.load(w + row * E + j, mask=is_real, other=0.0).to(dtype), mask=is_real)
    else:
        block, lane, p = row // 16, row % 16, tl.arange(0, P)
        at = (block * (J * 16) + j * 16 + lane)[:, None] * 4 + tl.arange(0, 4)[None, :]
        raw = tl.load(w.to(tl.pointer_type(tl.uint8)) + at, mask=is_real[:, None], other=0)
        channels = tl.reshape(unpack(raw[None, :, None, :], KIND, tl.float32, DEPENDENT), BLOCK, P)
        if KIND == 3:
            word_scale = tl.load(scale + block * ((E + 127) // 128) + j // 32, mask=is_real, other=0.0)
            channels *= word_scale[:, None]
        elif KIND == 4:
            word_scale = tl.load(scale + block * (E // 32 * 16) + j // 4 * 16 + lane, mask=is_real, other=0.0)
            channels *= word_scale.to(tl.float32)[:, None]
        elif KIND > 4:
            WORDS: tl.constexpr = KIND // 64
            RECORD: tl.constexpr = record_bytes(KIND)
            record = scale + block * (J // WORDS * RECORD) + j // WORDS * RECORD
            word_scale, minimum = record_scales(record, j % WORDS // 4, lane, is_real, KIND)
            channels = channels * word_scale[:, None] - minimum[:, None]
        else:
            channels *= tl.load(scale + row)
        tl.store(x + r * E + j[:, None] * P + p[None, :], channels.to(dtype), mask=is_real[:, None])


@triton.jit
def vocabulary_kernel(
    x,
    norm,
    w,
    scale,
    best_logit,
    best_token,
    logits,
    eps,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program c: rows c*BN.. of the vocabulary."""
    c = tl.program_id(0)
    n0 = c * BN
    G: tl.constexpr = num_groups(KIND, BK)
    raw = load_weights(w, n0, 0, N, K, BN, BK, KIND, P)  # while the previous kernel ends
    norm_x = load_channels(norm, 0, 1, 1, K, BK, G)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    part = load_channels(x, 0, R, ROWS, K, BK, G)
    inverse = inverse_rms(x, part, eps, R, ROWS, K, BK, G)
    part = normalized(part, inverse, after_wait(norm_x, DEPENDENT))
    zeros = tl.zeros([G, BN, ROWS], tl.float32)
    sums = multiply(after_wait(raw, DEPENDENT), part, zeros, scale, n0, 0, N, K, BN, BK, KIND, DEPENDENT)
    if BK < K:
        for k0 in tl.range(BK, K, BK):
            part = load_channels(x, k0, R, ROWS, K, BK, G)
            part = normalized(part, inverse, load_channels(norm, k0, 1, 1, K, BK, G))
            raw = load_weights(w, n0, k0, N, K, BN, BK, KIND, P)
            sums = multiply(raw, part, sums, scale, n0, k0, N, K, BN, BK, KIND, DEPENDENT)
    r, n = tl.arange(0, ROWS), n0 + tl.arange(0, BN)
    logit = rounded(sums, scale, n, N, x.dtype.element_ty, KIND)
    if HAS_LOGITS:
        at = n[:, None] + r.to(tl.int64)[None, :] * N
        tl.store(logits + at, logit, mask=(n < N)[:, None] & (r < R)[None, :])
    logit = tl.where(logit == logit, logit, float("inf"))
    logit = tl.where((n < N)[:, None], logit, float("-inf"))
    most = tl.max(logit, 0)
    token = tl.min(tl.where(logit == most[None, :], n[:, None], N), 0)
    at = r * tl.num_programs(0) + c
    tl.store(best_logit + at, most, mask=r < R)
    tl.store(best_token + at, token, mask=r < R)


@triton.jit
def choose_kernel(
    best_logit,
    best_token,
    advance,
    input,
    output,
    position,
    step,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Program r: row r."""
    r = tl.program_id(0)
    start_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.zeros([BLOCK], tl.int32)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        logit = tl.load(best_logit + r * C + c, mask=c < C, other=float("-inf"))
        candidate = tl.load(best_token + r * C + c, mask=c < C, other=0)
        token = tl.where(logit > most, candidate, token)
        most = tl.maximum(most, logit)
    largest = tl.max(most, 0)
    chosen = tl.min(tl.where(most == largest, token, 2147483647), 0)
    is_valid = (largest > float("-inf")) & (largest < float("inf"))
    moved = tl.load(advance + r)
    tl.store(output + r, tl.where(is_valid, chosen, -1).to(tl.int64))
    tl.store(input + r, tl.where(is_valid, chosen, 0).to(tl.int64))
    tl.store(position + r, tl.load(position + r) + moved)
    tl.store(step + r, tl.load(step + r) + moved)
