"""The training of tools/train_english.py: the model, its optimizers, the schedule by time, and the checkpoint.

The learning rate depends on the share of the given hours that has passed, so a run ends on time on any machine: a
short warmup, a constant rate, and a linear decay to 0 over the last quarter. Hours are the processor time of a thread:
pauses do not count. A run that was stopped continues from its checkpoint.

B sequences   T tokens of a sequence
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from torch import Tensor

from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)  # widths are multiples of 256: llama.cpp's K-quants need them
LENGTH = 512  # T
ROWS_AT_ONCE = 8  # of LENGTH tokens: bounds the memory of a step
WARMUP_STEPS = 40
DECAY = 0.25  # share of the time


@dataclass
class State:
    """The progress of a run.

    seconds: since it began, pauses included. cpu_seconds: used by all threads.
    curve: points of step, tokens, seconds, training and held-out loss.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


def scale_at(step: int, progress: float) -> float:
    """Return the learning rate's share of its peak. progress: share of the time that has passed."""
    return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, (1 - progress) / DECAY))


def initialize(model: Qwen3) -> None:
    """Draw normal weights of standard deviation 0.02; projections back into the residual stream get less by depth."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            is_deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * CONFIG.num_hidden_layers) if is_deep else 0.02)


def make_optimizers(model: Qwen3, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices (it orthogonalizes each update) and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def loss_of(model: Qwen3, token_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token given those before it, in nats."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(token_BT[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), token_BT[:, 1:].flatten())


def batch_at(ids: np.ndarray, step: int, rows: int, seed: int) -> Tensor:
    """Return the (B, T + 1) tokens of a step: B random places of the text, the same for the same step and seed."""
    starts = np.random.default_rng((seed, step)).integers(0, len(ids) - LENGTH - 1, rows)
    return torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts]).astype(np.int64))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def held_out_loss(model: Qwen3, ids: np.ndarray, tokens: int) -> float:
    """Return the mean loss over the first `tokens` tokens of the held-out text, in windows of LENGTH."""
    rows = torch.from_numpy(ids[: tokens // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    losses = [loss_of(model, part) * len(part) for part in rows.split(ROWS_AT_ONCE)]
    return float(sum(losses)) / len(rows)


def train_step(model: Qwen3, optimizers: list[torch.optim.Optimizer], token_BT: Tensor, scale: float) -> float:
    """Update the weights once. Returns: the mean loss."""
    loss = 0.0
    for part in token_BT.split(ROWS_AT_ONCE):
        part_loss = loss_of(model, part) * (len(part) / len(token_BT))
        part_loss.backward()
        loss += part_loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


class Run:
    """A training run: the model, optimizers and progress, with its checkpoint file."""

    def __init__(self, checkpoint: Path, lr: float, seed: int, resume: bool) -> None:
        torch.manual_seed(seed)
        self.model, self.checkpoint, self.seed, self.state = Qwen3(CONFIG), checkpoint, seed, State()
        initialize(self.model)
        self.optimizers = make_optimizers(self.model, lr)
        if resume and checkpoint.exists():
            self._load()

    def train(self, ids: np.ndarray, held_out: np.ndarray, args: Any, export: Any) -> None:
        """Train until the hours have passed; every args.save_minutes, measure, write the checkpoint and call export."""
        state, rows, threads = self.state, args.batch_tokens // LENGTH, torch.get_num_threads()
        limit_s = args.hours * 3600 * threads
        bar = tqdm(total=round(limit_s), initial=round(state.cpu_seconds), desc="training", unit="s", mininterval=5)
        recent: list[float] = []
        begun, before, saved = time.monotonic(), state.seconds, state.seconds
        cpu_before = state.cpu_seconds - time.process_time()
        while state.cpu_seconds < limit_s:
            batch = batch_at(ids, state.step, rows, self.seed)
            recent.append(
                train_step(self.model, self.optimizers, batch, scale_at(state.step, state.cpu_seconds / limit_s))
            )
            state.step, state.tokens = state.step + 1, state.tokens + rows * LENGTH
            state.seconds = before + time.monotonic() - begun
            state.cpu_seconds = cpu_before + time.process_time()
            bar.set_postfix(step=state.step, loss=f"{recent[-1]:.3f}", refresh=False)
            bar.update(min(round(state.cpu_seconds), bar.total) - bar.n)
            if state.seconds - saved > args.save_minutes * 60 or state.cpu_seconds >= limit_s:
                saved = state.seconds
                self._note(sum(recent) / len(recent), held_out_loss(self.model, held_out, args.eval_tokens))
                bar.write(str(state.curve[-1]))
                recent = []
                self._save()
                export(self)
        bar.close()

    def _note(self, train: float, held_out: float) -> None:
        point = {"step": self.state.step, "tokens": self.state.tokens, "seconds": round(self.state.seconds)}
        self.state.curve.append({**point, "train_loss": round(train, 4), "held_out_loss": round(held_out, 4)})

    def _save(self) -> None:
        new = self.checkpoint.with_suffix(".new")
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": optimizers, "state": asdict(self.state)}, new)
        os.replace(new, self.checkpoint)

    def _load(self) -> None:
        stored = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(stored["model"])
        for optimizer, state in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.state = State(**stored["state"])
