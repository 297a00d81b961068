"""What Embedder and Reranker share: texts as token ids -> the state of each text's last token, many texts at a time.

B batch rows   T tokens of the longest row   E hidden_size   N texts
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from qwen3fast.checkpoint import load_model, read_tokenizer, resolve_source
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.text.tokenizer import Tokenizer

MAX_LENGTH = 8192  # tokens of one text, as in the published usage of both models


def load_model_and_tokenizer(
    source: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantization: str | None,
    revision: str | None,
    output_projection: bool,
    check_weights: bool = False,
) -> tuple[Qwen3, Tokenizer]:
    """A model as `load_model` gives it, and its tokenizer, which is looked for first.

    Raises: FileNotFoundError or ValueError, also for random weights, which have no tokenizer.
    """
    if str(source).startswith("random:"):
        raise ValueError(f"{source!r} has random weights and no tokenizer; name a checkpoint that has one")
    folder = resolve_source(source, revision)
    tokenizer = read_tokenizer(folder)
    model = load_model(
        folder,
        device,
        dtype,
        quantization=quantization,
        output_projection=output_projection,
        check_weights=check_weights,
    )
    return model, tokenizer


def checked_max_length(max_length: int | None, config: ModelConfig) -> int:
    """The tokens that one text may have; None takes the published 8192, or as many as the model has positions for.

    Raises: ValueError for a number that the model cannot have.
    """
    if max_length is None:
        return min(MAX_LENGTH, config.max_position_embeddings)
    if not 1 <= max_length <= config.max_position_embeddings:
        raise ValueError(
            f"max_length must be from 1 to the model's max_position_embeddings {config.max_position_embeddings}, "
            f"got {max_length}"
        )
    return max_length


def check_texts(texts: object, name: str) -> None:
    """Raises: ValueError unless `texts` is a list (or tuple) of strings."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a list of strings, got {texts!r:.200}")


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist.

    Raises: ValueError if it does not.
    """
    found = tokenizer.base.token_to_id(token)
    if found is None:
        raise ValueError(f"this checkpoint's tokenizer has no token {token!r}; is it that of a Qwen3?")
    return found


@torch.no_grad()
def last_states(model: Qwen3, rows: list[list[int]], batch_size: int, progress: bool = False) -> Tensor:
    """The final norm's output at the last token of each row of ids, (N, E) float32, in the order of the rows.

    Rows of like lengths share a batch, the longest first, and are padded on the right: attention is causal, so no
    token sees the padding after it, and positions start at 0 in every row.
    Raises: ValueError for a batch_size below 1, or an id outside the model's vocabulary.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    largest = max((max(row) for row in rows), default=0)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gave the id {largest}, but the model's vocab_size is {model.config.vocab_size}; "
            "they are not of the same checkpoint"
        )
    device = model.model.norm.weight.device
    states_NE = torch.empty(len(rows), model.config.hidden_size, device=device)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with tqdm(total=len(rows), desc="reading", unit="text", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            last_B = torch.tensor([len(rows[i]) - 1 for i in chosen], device=device)
            token_BT = torch.zeros(len(chosen), len(rows[chosen[0]]), dtype=torch.int64)
            for b, i in enumerate(chosen):
                token_BT[b, : len(rows[i])] = torch.tensor(rows[i])
            x_BTE = model.hidden(token_BT.to(device))
            x_BE = x_BTE[torch.arange(len(chosen), device=device), last_B]
            states_NE[chosen] = model.model.norm(x_BE).float()
            bar.update(len(chosen))
    return states_NE
