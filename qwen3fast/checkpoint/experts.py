"""Published checkpoints hold each expert's matrices as tensors of their own; the model holds those of a layer stacked.

`....mlp.experts.7.gate_proj.weight`, `up_proj` and `down_proj` -> `....mlp.experts.gate_up_proj` and `down_proj` (see
model/moe.py). Checkpoints that hold the stacked tensors need nothing of this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Where a tensor of one expert goes: rows of one matrix of a stacked parameter."""

    target: str
    expert: int
    first_row: int
    shape: Shape


class ExpertStacks:
    """Stacked parameters that are filled piece by piece; `pieces` are by the name that a checkpoint gives them."""

    def __init__(self, parameters: dict[str, Shape], device: torch.device, dtype: torch.dtype) -> None:
        self._parameters, self._device, self._dtype = parameters, device, dtype
        self._stacks: dict[str, Tensor] = {}
        self._missing: dict[str, set[str]] = {}
        self._names: dict[str, list[str]] = {}  # of a stack's pieces
        self.pieces: dict[str, Piece] = {}
        for target, shape in parameters.items():
            prefix, _, name = target.rpartition(".")
            if not prefix.endswith(".mlp.experts"):
                continue
            num_experts, rows, columns = shape
            projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[name]
            rows //= len(projections)
            for expert in range(num_experts):
                for i, projection in enumerate(projections):
                    name = f"{prefix}.{expert}.{projection}.weight"
                    self.pieces[name] = Piece(target, expert, i * rows, (rows, columns))
                    self._names.setdefault(target, []).append(name)

    def put(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Copy a piece to its place. Returns: a parameter's name and the whole tensor with the last of its pieces."""
        piece = self.pieces[name]
        if piece.target not in self._stacks:
            shape = self._parameters[piece.target]
            self._stacks[piece.target] = torch.empty(shape, dtype=self._dtype, device=self._device)
            self._missing[piece.target] = set(self._names[piece.target])
        stack, missing = self._stacks[piece.target], self._missing[piece.target]
        stack[piece.expert, piece.first_row : piece.first_row + piece.shape[0]] = tensor
        missing.discard(name)
        return None if missing else (piece.target, self._stacks.pop(piece.target))

    def unfinished(self) -> dict[str, list[str]]:
        """Parameters of which some pieces have come, and the names of those that have not."""
        return {t: [name for name in self._names[t] if name in self._missing[t]] for t in self._stacks}
