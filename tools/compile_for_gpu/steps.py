"""A decode step and a chunk of a prompt on tensors without memory: the parts as the engine calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from compile_for_gpu.inspector import Inspector
from compile_for_gpu.kernels import described
from qwen3fast.engine.decode import decode_step
from qwen3fast.engine.parts import Forward, Parts
from qwen3fast.engine.prefill import Prefill, prefill_together
from qwen3fast.engine.state import DecodeState, LogprobState, ProcessorState
from qwen3fast.kernels import cuda
from qwen3fast.model import Qwen3, build_on_meta, rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.sampling.samplers import SamplerKind

CHUNK = 512  # tokens of the prompt that is inspected
PROMPTS = 4  # that are inspected together, with as many tokens


def config_of(size: str) -> ModelConfig:
    """Return the config of a published size, or ("30b-a3b/4") of so many of its layers."""
    name, _, layers = size.partition("/")
    config = ModelConfig.named(name)
    return replace(config, num_hidden_layers=int(layers)) if layers else config


def model_without_memory(config: ModelConfig, device: torch.device, quantization: str | None) -> Qwen3:
    """Return a model of fake tensors, in the config's dtype or a quantized format; inside of a FakeTensorMode."""
    with unset_fake_temporarily():
        model = build_on_meta(config)
        if quantization is not None:
            format = FORMATS[quantization.removesuffix("-block")]
            quantize_model(model, format if format.name == quantization else format.with_blocks(), config.dtype)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module._parameters[name] = made.setdefault(parameter, nn.Parameter(empty, requires_grad=False))
    return model


@torch.no_grad()
def inspect(size: str, batch_size: int, context: int, quantization: str | None) -> list[dict[str, Any]]:
    """Return what decode steps and chunks of a prompt, or of several, launch; or an `error`.

    Steps are greedy, sampled, or greedy with processors and log-probabilities ("processed"). For one row also a
    sequence without a cache.
    To be called inside of `pretended`. context: positions of the KV cache.
    """
    config, device = config_of(size), torch.device("cuda", 0)
    with patch.object(torch.cuda, "is_available", lambda: True):  # not in a FakeTensorMode, which would ask the device
        cuda.load(device)
    with FakeTensorMode():
        model = model_without_memory(config, device, quantization)
        cache = StaticKVCache(config, batch_size, context, config.dtype, device)
        inspector = Inspector(device)
        parts, state = Parts.build(inspector, model, cache), DecodeState.allocate(batch_size, device)
        cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn)
        forward = Forward(model, parts, cache, cos_SD, sin_SD)

        extras = (
            ProcessorState(batch_size, config.vocab_size, device),
            LogprobState.allocate(batch_size, config.vocab_size, device),
        )

        def decode(sampler: SamplerKind = SamplerKind.GREEDY, *extras: Any) -> None:
            decode_step(forward, state, batch_size, cache.bucket(context), sampler, *extras)

        def prefill() -> None:
            prompt = Prefill.begin(0, [0] * min(CHUNK, context), 0, cache.allocated_len)
            prefill_together(forward, [prompt])

        def prompts() -> None:
            rows = range(min(PROMPTS, batch_size))
            size = min(CHUNK // PROMPTS, context)
            prefill_together(forward, [Prefill.begin(row, [0] * size, 0, cache.allocated_len) for row in rows])

        def uncached() -> None:
            tables = (t[None, :CHUNK].clone(memory_format=torch.contiguous_format) for t in (cos_SD, sin_SD))
            x_1TE, rotation = model.embed(torch.zeros(1, CHUNK, dtype=torch.int64, device=device)), tuple(tables)
            for block in model.model.layers:
                x_1TE = parts.block_uncached(block, x_1TE, *rotation)

        steps = [("decode", decode), ("sampled", lambda: decode(SamplerKind.FULL))]
        steps.append(("processed", lambda: decode(SamplerKind.GREEDY, *extras)))
        steps += [("prefill", prefill), ("uncached", uncached)] if batch_size == 1 else [("prompts", prompts)]
        labels = {"model": size, "weights": quantization or "bf16", "batch_size": batch_size, "context": context}
        return [{"step": name, **labels, **_found(inspector, run)} for name, run in steps]


def _found(inspector: Inspector, run: Callable[[], None]) -> dict[str, Any]:
    try:
        return _counted(inspector, run)
    except Exception as err:  # of any compiler: a reason in the record, and the other steps are worth having
        return {"error": f"{type(err).__name__}: {str(err)[:500]}"}


def _counted(inspector: Inspector, run: Callable[[], None]) -> dict[str, Any]:
    """Run a step twice: parts are compiled in the first run, what it launches is counted in the second."""
    run()
    inspector.clear()
    with inspector.eager:
        run()
    launches, library = sum(inspector.eager.own.values()), Counter[str]()
    for name, times in inspector.calls.items():
        launches += inspector.parts[name].launches * times
        for call, count in inspector.parts[name].calls.items():
            library[call] += count * times
    used = {name: asdict(inspector.parts[name]) | {"runs": times} for name, times in inspector.calls.items()}
    target = triton.runtime.driver.active.get_current_target()
    own = [described(case, target) for case in inspector.eager.kernels]
    counts = {
        "own_kernels": own,
        "triton_launches": launches,
        "library_calls": dict(library),
        "own_launches": dict(inspector.eager.own),
    }
    return counts | {"eager_calls": dict(inspector.eager.calls), "parts": used}
