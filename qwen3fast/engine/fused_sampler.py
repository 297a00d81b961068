"""The end of a step in Triton kernels: choose each row's token from logits and write what the next step reads.

Two kernels for greedy steps, 19 for others (kernels/cuda/decode_step/sample.py), for any number of rows. No number is
read by the host, and all memory was allocated once, so a CUDA graph holds them.

    B rows of a step   R rows of the cache   V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.kernels.cuda.decode_step.sample import Draw
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows


class FusedSampler:
    """The samplers and the update of a step's state; `sample` and `run_advance` are the plain forms."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        """Allocate memory for steps of up to `rows` rows."""
        self._memory = [
            torch.zeros(tensor.numel(), dtype=tensor.dtype, device=device)
            for tensor in Draw.allocate(rows, vocab_size, torch.device("meta"))
        ]
        self._works: dict[int, Draw] = {}
        self._vocab_size = vocab_size
        # Each at a multiple of 16 bytes, as the fields of `DecodeState`: Triton compiles a kernel for each alignment.
        self._scratch = torch.zeros(5, -(-rows // 2) * 2, dtype=torch.int64, device=device)

    def advance(
        self,
        logits_BV: Tensor,
        rows: SamplerRows,
        kind: SamplerKind,
        advance_B: Tensor,
        input_B: Tensor,
        output_B: Tensor,
        position_B: Tensor,
        step_B: Tensor,
    ) -> None:
        """Write each row's token to output_B (-1 for invalid logits) and input_B, and move rows on by advance_B.

        logits_BV: float32. The last five: fields of `DecodeState`.
        """
        work = self._work(len(logits_BV))
        logits_BV = logits_BV.contiguous()
        if kind is SamplerKind.GREEDY:
            torch.ops.qwen3fast.step_best(logits_BV, *work)
        else:
            torch.ops.qwen3fast.step_draw(logits_BV, *rows, *work)
        torch.ops.qwen3fast.step_choose(*work.best, advance_B, input_B, output_B, position_B, step_B)

    def choose(self, logits_BV: Tensor, rows: SamplerRows, kind: SamplerKind) -> Tensor:
        """Return a token for each row, (B,) int64, as `sample` does, in memory that the next call overwrites."""
        token: Tensor
        advance, given, token, position, step = self._scratch[:, : len(logits_BV)]
        self.advance(logits_BV, rows, kind, advance, given, token, position, step)
        return token

    def _work(self, rows: int) -> Draw:
        """Return the workspace for so many rows, the same memory for all."""
        if rows not in self._works:
            shapes = Draw.allocate(rows, self._vocab_size, torch.device("meta"))
            own = (m[: t.numel()].view(t.shape) for m, t in zip(self._memory, shapes, strict=True))
            self._works[rows] = Draw(*own)
        return self._works[rows]
