"""Text for calibration that the model itself writes, where there is no other.

Source: Liu et al., LLM-QAT, arXiv:2305.17888, section 3.1.

B texts   T tokens of a text   S cache positions   V vocabulary   E hidden_size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels.cpu.decode_layers import MAX_DECODE_ROWS
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.text.tokenizer import Tokenizer

OWN_WINDOW = 128  # tokens of a text for calibration


def own_text(model: Qwen3, tokenizer: Tokenizer | None, tokens: int, progress: bool = False) -> Tensor:
    """Return about as many tokens that the model writes, (B, T) int64, in windows of OWN_WINDOW.

    Half of the windows begin as a conversation does, where there is a chat template, the others with a random token.
    Raises: ValueError if the model's logits are not finite.
    """
    rng = torch.Generator().manual_seed(0)
    first_B = torch.randint(model.config.vocab_size, (tokens // OWN_WINDOW,), generator=rng, device="cpu")
    starts = [[token] for token in first_B.tolist()]
    if chat := beginning_of_chat(tokenizer):
        starts[1::2] = [chat] * len(starts[1::2])
    batches = [starts[i : i + MAX_DECODE_ROWS] for i in range(0, len(starts), MAX_DECODE_ROWS)]
    return torch.cat([write_texts(model, batch, OWN_WINDOW, seed, progress) for seed, batch in enumerate(batches)])


def beginning_of_chat(tokenizer: Tokenizer | None) -> list[int]:
    """Return the tokens before the first user's message; none without a chat template that has such a beginning."""
    if tokenizer is None or tokenizer.chat_template is None:
        return []
    message = "A message."
    try:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": message}]))
    except ValueError:  # the template wants other messages
        return []
    before, found, _ = text.partition(message)
    ids = tokenizer.encode(before)
    return ids if found and len(ids) < OWN_WINDOW // 2 else []


@torch.no_grad()
def write_texts(
    model: Qwen3, starts: Sequence[Sequence[int]], length: int, seed: int = 0, progress: bool = False
) -> Tensor:
    """Return texts that a model writes at temperature 1, (B, T) int64 ids.

    starts: the first tokens of each text, at least one. length: T. progress: show a bar.
    Raises: ValueError if the logits are not finite; MemoryError if the texts' KV cache does not fit.
    """
    config, weight, count = model.config, model.model.norm.weight, len(starts)
    rng = torch.Generator(weight.device).manual_seed(seed)
    cache = StaticKVCache(config, count, length, weight.dtype, weight.device)
    tables = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, weight.device, config.yarn)
    run_blocks = _run_blocks(model, cache, *tables)
    padded = [[*start[:length], *[-1] * (length - len(start))] for start in starts]
    token_BT = torch.tensor(padded, device=weight.device)  # -1: to be written
    for t in tqdm(range(length - 1), desc="writing text", unit="token", disable=not progress):
        x_B1E = run_blocks(model.embed(token_BT[:, t, None]), torch.full((count, 1), t, device=weight.device))
        sum_BV = model.logits(x_B1E)[:, 0].softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
        if not sum_BV[:, -1].isfinite().all():
            raise ValueError("the model's logits are not finite: it cannot write a text to be calibrated on")
        drawn_B1 = torch.rand(count, 1, generator=rng, device=weight.device) * sum_BV[:, -1:]
        written_B = torch.searchsorted(sum_BV, drawn_B1, right=True)[:, 0].clamp(max=config.vocab_size - 1)
        token_BT[:, t + 1] = torch.where(token_BT[:, t + 1] < 0, written_B, token_BT[:, t + 1])
    return token_BT


def _run_blocks(
    model: Qwen3, cache: StaticKVCache, cos_SD: Tensor, sin_SD: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that runs all blocks for embeddings (B, 1, E) at positions (B, 1): in C++, or one by one."""
    count = cache.max_batch_size
    if cache.keys[0].device.type == "cpu" and (fused := DecodeLayers(model, cache)).serves(count):
        return lambda x_B1E, position_B1: fused(x_B1E, cos_SD, sin_SD, position_B1)

    def one_by_one(x_B1E: Tensor, position_B1: Tensor) -> Tensor:
        t = int(position_B1[0])
        mask_B1L = torch.arange(cache.bucket(t + 1), device=x_B1E.device) <= position_B1[..., None]
        for block, layer in zip(model.model.layers, cache.layers(), strict=True):
            x_B1E = block(x_B1E, cos_SD[None, t, None], sin_SD[None, t, None], position_B1, mask_B1L, layer)
        return x_B1E

    return one_by_one
