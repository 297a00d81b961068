"""transformers in this process on the same tensors as our model, for programs without worker processes."""

from __future__ import annotations

import time

import torch
import transformers

from qwen3fast.bench.measure import Sample
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import Qwen3


def share_weights(model: Qwen3) -> transformers.Qwen3ForCausalLM:
    """Return transformers' model on the same tensors as ours: no second copy, no difference in values."""
    config = transformers.Qwen3Config(**CheckpointConfig(model.config).to_dict())
    with torch.device("meta"):
        reference = transformers.Qwen3ForCausalLM(config)
    reference.load_state_dict(model.state_dict(), strict=False, assign=True)
    reference.tie_weights()
    # The rotary frequencies are a buffer that no checkpoint has: build that module again, not on meta.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config).to(model.lm_head.weight.device)
    return reference.eval()


@torch.no_grad()
def run_transformers(reference: transformers.Qwen3ForCausalLM, prompt: list[int], new_tokens: int) -> Sample:
    """Decode greedily with `DynamicCache`, token by token through the model, without the overhead of `generate`."""
    cache = transformers.DynamicCache(config=reference.config)
    ids, times, output = torch.tensor([prompt], device=reference.device), [], []
    for _ in range(new_tokens):
        started = time.perf_counter()
        logits = reference(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        output.append(int(ids))
        times.append(time.perf_counter() - started)
    return Sample(times[0], times[1:], [output])
