"""The parts of a forward pass as plain functions, compiled by `StepCompiler` or not, and faster forms of several parts.

`decode_layers` (C++) and `fused_step` (Triton) take the place of the compiled functions where they serve.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen3fast.checks import checked_variable
from qwen3fast.engine import memory_nodes
from qwen3fast.engine.compile import Function, StepCompiler, StepPart
from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.dynamic_sizes import Dynamic, Sizes
from qwen3fast.engine.fast_layers import use_fast_layers
from qwen3fast.engine.forms import Forms
from qwen3fast.engine.memory_nodes import interleave
from qwen3fast.kernels import cpu, cuda
from qwen3fast.kernels.attention import finds_used_length
from qwen3fast.kernels.cpu import huge_pages, sampler
from qwen3fast.kernels.cpu.huge_pages import use_huge_pages
from qwen3fast.kernels.cpu.structures import Tiles
from qwen3fast.model import Block, Qwen3
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import CacheLayer, StaticKVCache
from qwen3fast.model.memory import free_bytes
from qwen3fast.model.stacking import stack_layers
from qwen3fast.quantization.layers import fit_scales, load_operations
from qwen3fast.sampling.processors import ProcessorRows, count_token, log_probabilities, process_logits
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

# Tokens of a prompt that are computed together. On CUDA devices each size is captured; on CPUs one compiled form serves
# all sizes, and padding takes time.
CHUNK_SIZES = (32, 64, 128, 256, 512)
CPU_CHUNK_SIZES = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MAX_PROMPTS = CHUNK_SIZES[-1] // CHUNK_SIZES[0]  # that are computed together, with as many tokens as the largest chunk
MIN_UNCACHED_TOKENS = 16  # shorter sequences without a cache are padded
MOVE_AFTER_S = 1.0  # from building an engine until weights move to huge pages
# torch.compile generates different code to sort fewer pairs of token and expert than this, and to sort more.
MAX_SORTED_PAIRS = 2**14

# Sizes that vary between calls. Parts without the KV cache among their arguments have the same ranges in every engine,
# which then finds what was compiled for others in Inductor's cache.
MAX_ROWS = 4096
MAX_TOKENS = 2**17  # without a cache; each longer sequence is compiled for its own length
MAX_ELEMENTS = 2**31 - 1  # of a tensor whose size varies: for CUDA devices, compiled code counts them in 32 bits
CHUNK = Dynamic(example=101, min=CPU_CHUNK_SIZES[0], max=CHUNK_SIZES[-1])
TOKENS = Dynamic(example=101, min=MIN_UNCACHED_TOKENS)
POSITIONS = Dynamic(example=67, min=CPU_CHUNK_SIZES[0])


def chunk_sizes(device: torch.device) -> tuple[int, ...]:
    """Return the sizes of chunks on a device, in ascending order."""
    return CPU_CHUNK_SIZES if device.type == "cpu" else CHUNK_SIZES


def row_ranges(config: ModelConfig, device: torch.device, max_rows: int) -> tuple[Dynamic, ...]:
    """Return ranges of the number of rows, from 2 to max_rows, with one form each; one row has a form of its own."""
    # The largest numbers of rows for which products stream their weight.
    ends = {cuda.MAX_ROWS} if device.type == cuda.DEVICE_TYPE else {4}
    if device.type != cuda.DEVICE_TYPE and config.num_experts:
        ends.add(config.num_experts // config.num_experts_per_tok)  # see MoE.forward
    ranges, first = [], 2
    for last in sorted({*(end for end in ends if 2 <= end < max_rows), max_rows}):
        if first < last:  # a range of one size is static
            ranges.append(Dynamic(first + 1, first, last))
        first = last + 1
    return tuple(ranges)


def max_gathered_rows(config: ModelConfig) -> int:
    """Return how many rows of a step have MAX_ELEMENTS weights in their active experts: see `Experts.gathered`."""
    per_row = config.num_experts_per_tok * 2 * config.moe_intermediate_size * config.hidden_size
    return MAX_ELEMENTS // per_row if config.num_experts else MAX_ROWS


def run_prefill_block(
    forms: Forms,
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    position_BT: Tensor,
    mask_BTL: Tensor,
    *cache: Any,
) -> Tensor:
    """Run one block over a chunk of a prompt, with the forms of attention that were chosen."""
    layer = CacheLayer(*cache)._replace(sdpa_from=forms.sdpa_from, tiles_from=forms.tiles_from)
    y_BTE: Tensor = block(x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, layer)
    return y_BTE


def run_block(
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    position_BT: Tensor,
    mask_BTL: Tensor | None,
    *cache: Any,
) -> Tensor:
    """Run one block over the KV cache; see `Attention.forward`. cache: the fields of `CacheLayer`."""
    x_BTE = block(x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, CacheLayer(*cache))
    return x_BTE


def run_block_uncached(block: Block, x_BTE: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Run one block over the tokens of the call alone."""
    x_BTE = block(x_BTE, cos_BTD, sin_BTD)
    return x_BTE


def run_embed(
    embedding: nn.Module, token_B: Tensor, position_B: Tensor, cos_SD: Tensor, sin_SD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs of a step's first block: embeddings (B, 1, E), and cosines and sines (B, 1, D).

    position_B: int64; -1, of an empty row, counts as 0.
    """
    read_B1 = position_B[:, None].clamp(min=0)
    return embedding(token_B[:, None]), cos_SD[read_B1], sin_SD[read_B1]


def run_advance(
    _: None, token_B: Tensor, output_B: Tensor, input_B: Tensor, position_B: Tensor, step_B: Tensor, advance_B: Tensor
) -> None:
    """Write the sampled tokens and the next step's inputs to the fields of `DecodeState`, in place."""
    output_B.copy_(token_B)
    # The host checks for invalid tokens (-1); the next input must be a valid id.
    input_B.copy_(token_B.clamp(min=0))
    position_B.add_(advance_B)
    step_B.add_(advance_B)


def run_count(_: None, count_BV: Tensor, token_B: Tensor, advance_B: Tensor) -> None:
    """Count the chosen tokens for processors: see `count_token`."""
    count_token(count_BV, token_B, advance_B)


def run_logprobs(
    _: None, logits_BV: Tensor, token_B: Tensor, chosen_B: Tensor, id_BN: Tensor, value_BN: Tensor
) -> None:
    """Write log-probabilities to the fields of `LogprobState`: see `log_probabilities`."""
    found = log_probabilities(logits_BV, token_B, id_BN.shape[1])
    for buffer, numbers in zip((chosen_B, id_BN, value_BN), found, strict=True):
        buffer.copy_(numbers)


def run_logits(head: nn.Sequential, x_BTE: Tensor) -> Tensor:
    """Return final norm and output projection, (B, 1, E) -> (B, 1, V) float32."""
    logits_BTV: Tensor = head(x_BTE)
    return logits_BTV.float()


def run_processors(_: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
    """Return the logits to sample from; rows: the fields of `ProcessorRows`."""
    return process_logits(logits_BV, ProcessorRows(*rows))


def run_sampler(kind: SamplerKind, _: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
    """Return a token for each row, (B,); rows: the fields of `SamplerRows`."""
    return sample(logits_BV, SamplerRows(*rows), kind)


@dataclass(frozen=True)
class Parts:
    """The functions above, compiled or not, and one sampler per kind.

    Each is called with the module that it runs, or None if it runs none, and tensors (see `StepPart`).
    embed, advance, count and logprobs are compiled only for CUDA devices, where each of their operations would be a
    launch; logits not for CPUs in bfloat16, where C++ does their work. The full sampler is not for CUDA: with
    Triton 3.6, kernels of Inductor for its histograms do not wait for the ones that they depend on (triton.enable_pdl;
    found by tools/compile_for_gpu.py).

    Attributes:
        decode_layers: a decode step, or all of its blocks, in one C++ operation, where available.
        fused_step: on CUDA devices, a `FusedDecodeStep`: a whole step of 1 to 8 rows of a dense model in Triton
            kernels, which uses none of the compiled functions, except for logits processors.
        fused_sampler: a `FusedSampler`, which replaces `samplers` and `advance` there.
        forms: which forms of attention, products and blocks are used.
        head: the module that `logits` runs.
        needs_mask: False if attention in decode steps finds the used length on its own, without a mask or a bucket.
    """

    forms: Forms
    decode_layers: DecodeLayers | None
    fused_step: Any
    fused_sampler: Any
    decode_block: StepPart
    prefill_block: StepPart
    block_uncached: StepPart
    embed: StepPart
    logits: StepPart
    head: nn.Sequential
    processors: Function
    samplers: dict[SamplerKind, Function]
    count: StepPart
    logprobs: StepPart
    advance: StepPart
    needs_mask: bool

    @classmethod
    def build(cls, compiler: StepCompiler, model: Qwen3, cache: StaticKVCache, is_first: bool = False) -> Parts:
        """Wrap each part with the compiler; nothing is compiled before its first call. is_first: see `Forms`."""
        use_fast_layers(model)
        if not compiler.mode:  # otherwise the compiler loads them, and warns
            load_operations(model)
        config, device = model.config, cache.keys[0].device
        is_cuda = device.type == cuda.DEVICE_TYPE
        is_cpu = device.type == "cpu" and not is_cuda
        is_bfloat16 = model.model.norm.weight.dtype == torch.bfloat16
        if is_cuda:
            cuda.load(device)  # before anything is traced: it decides which forms exist
            # Now, since another engine's fused step would do it later: weights move, and captured graphs would read
            # memory that is no longer theirs.
            stack_layers(model)
        fit_scales(model)
        positions = (POSITIONS._replace(max=cache.allocated_len),)
        most = min(cache.max_batch_size, max_gathered_rows(config) if is_cuda else MAX_ROWS)
        rows: Sizes = {0: row_ranges(config, device, most)}  # of the cache; more have a form for their own number
        any_rows: Sizes = {0: row_ranges(config, device, MAX_ROWS)}
        together = min(MAX_PROMPTS, cache.max_batch_size)
        prompts: Sizes = {0: (Dynamic(3, 2, together),)} if together > 2 else {}  # several; one has a form of its own
        chunk: Sizes = prompts | {1: (CHUNK,)}
        tokens: Sizes = {1: (TOKENS._replace(max=_max_uncached(config)),)}
        all_rows = (any_rows,) * len(ProcessorRows._fields)
        decode_layers = DecodeLayers(model, cache) if compiler.uses_operations else None
        forms = Forms(model if compiler.uses_operations else None, cache, is_first)
        if decode_layers is not None:
            is_auto = compiler.thread is not None
            forms.decide(may_measure=not is_auto)
            if is_auto:
                measure = partial(forms.measure_ahead, torch.get_num_threads(), compiler.quiet)
                fit = partial(fit_weights, model, decode_layers)
                compiler.when_loaded = partial(_after_loading, model, cache, compiler, fit, measure)
            else:
                checked_variable(huge_pages.VARIABLE)
                checked_variable(memory_nodes.VARIABLE)
                _move_later(model, cache)
        fused_step, fused_sampler = _fused_parts(model, cache) if compiler.enabled else (None, None)
        return cls(
            forms=forms,
            decode_layers=decode_layers,
            fused_step=fused_step,
            fused_sampler=fused_sampler,
            decode_block=compiler.part(
                run_block, dynamic=(rows, rows, rows, rows, rows | {2: positions}), tunes_one_row=True
            ),
            prefill_block=compiler.part(
                partial(run_prefill_block, forms),
                dynamic=(chunk, chunk, chunk, chunk, chunk | {2: positions}, {}, {}, prompts),
            ),
            block_uncached=compiler.part(run_block_uncached, dynamic=(tokens,) * 3),
            embed=compiler.part(run_embed, dynamic=(any_rows, any_rows), is_compiled=is_cuda),
            logits=compiler.part(run_logits, dynamic=(any_rows,), is_compiled=not is_cpu or not is_bfloat16),
            head=nn.Sequential(model.model.norm, model.lm_head),
            processors=_processors(compiler, is_cpu, (any_rows, *all_rows)),
            samplers=_samplers(compiler, is_cpu, is_cuda, (any_rows, *all_rows[: len(SamplerRows._fields)])),
            count=compiler.part(run_count, dynamic=(any_rows,) * 3, is_compiled=is_cuda),
            logprobs=compiler.part(run_logprobs, dynamic=(any_rows,) * 5, is_compiled=is_cuda),
            advance=compiler.part(run_advance, dynamic=(any_rows,) * 6, is_compiled=is_cuda),
            needs_mask=not finds_used_length(device, config.head_dim),
        )

    def multiplies_chunks_in_cpp(self) -> bool:
        """Return whether one C++ operation computes chunks of all sizes, without tiles."""
        layers, sizes = self.decode_layers, (CPU_CHUNK_SIZES[0], CPU_CHUNK_SIZES[-1])
        return layers is not None and all(
            layers.serves_chunks(size) and self.forms.of_chunks(size, size, size) is Tiles.NONE for size in sizes
        )

    def decide_forms(self) -> None:
        """Measure which forms are the fastest, where that is not known yet, and use them from now on."""
        if self.decode_layers is not None and self.forms.decide(may_measure=True):
            parts = (self.decode_block, self.prefill_block, self.block_uncached, self.embed, self.logits)
            for part in parts:
                part.forget()


class Forward(NamedTuple):
    """The arguments that all forward passes of an engine share.

    cos_SD, sin_SD: `rope_tables` for all positions of the cache.
    """

    model: Qwen3
    parts: Parts
    cache: StaticKVCache
    cos_SD: Tensor
    sin_SD: Tensor


def fit_weights(model: Qwen3, layers: DecodeLayers | None) -> None:
    """Store weights as the C++ operations read them fastest, if these are loaded. No step may run."""
    if fit_scales(model) and layers is not None:
        layers.read_weights(model)


def move_to_huge_pages(model: Qwen3, cache: StaticKVCache, is_wanted: Callable[[], bool] = lambda: True) -> None:
    """Have the system move weights and cache into huge pages, over all memory nodes. Steps may run meanwhile.

    is_wanted: whether to go on, while files are copied and memory is spread.
    """

    def free() -> int | None:
        return free_bytes(torch.device("cpu")) if is_wanted() else 0

    tensors = (*model.parameters(), *model.buffers(), *cache.tensors())
    use_huge_pages(tensors, free)
    interleave(tensors, is_wanted)


def _move_later(model: Qwen3, cache: StaticKVCache) -> None:
    """Call `move_to_huge_pages` in a thread, after the first token, unless model or cache are gone by then."""
    references = weakref.ref(model), weakref.ref(cache)

    def move() -> None:
        model, cache = references[0](), references[1]()
        if model is not None and cache is not None:
            move_to_huge_pages(model, cache)

    timer = threading.Timer(MOVE_AFTER_S, move)
    timer.name, timer.daemon = "qwen3fast-huge-pages", True  # it ends with the program
    timer.start()


def _after_loading(
    model: Qwen3,
    cache: StaticKVCache,
    compiler: StepCompiler,
    fit: Callable[[], None],
    measure: Callable[[], None],
) -> None:
    with compiler.quiet:  # between two steps
        fit()
    move_to_huge_pages(model, cache, lambda: compiler.thread is not None)
    measure()


def in_cpp(run: Callable[[Tensor, Sequence[Tensor]], Tensor], plain: Function) -> Function:
    """Return `run_sampler` or `run_processors`, in C++ once that is loaded.

    run: the function of kernels/cpu/sampler.py. plain: the part, compiled or not, which serves until then.
    """

    def run_part(_: None, logits_BV: Tensor, *rows: Tensor) -> Tensor:
        result: Tensor = run(logits_BV.float(), rows) if cpu.is_loaded() else plain(None, logits_BV, *rows)
        return result

    return run_part


def _samplers(
    compiler: StepCompiler, is_cpu: bool, is_cuda: bool, dynamic: tuple[Sizes, ...]
) -> dict[SamplerKind, Function]:
    plain = {
        kind: compiler.part(
            partial(run_sampler, kind), dynamic, is_compiled=kind is not SamplerKind.FULL or not is_cuda
        )
        for kind in SamplerKind
    }
    if not is_cpu or not compiler.uses_operations:
        return {**plain}
    greedy = in_cpp(lambda logits_BV, _: sampler.sample(logits_BV, None), plain[SamplerKind.GREEDY])
    return {kind: in_cpp(sampler.sample, part) for kind, part in plain.items()} | {SamplerKind.GREEDY: greedy}


def _processors(compiler: StepCompiler, is_cpu: bool, dynamic: tuple[Sizes, ...]) -> Function:
    plain = compiler.part(run_processors, dynamic)
    return in_cpp(sampler.process_logits, plain) if is_cpu and compiler.uses_operations else plain


def _max_uncached(config: ModelConfig) -> int:
    if config.num_experts:
        return MAX_SORTED_PAIRS // config.num_experts_per_tok
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    widest = max(2 * config.intermediate_size, heads * config.head_dim)  # of stacked layers' products
    return min(MAX_TOKENS, MAX_ELEMENTS // widest)


def _fused_parts(model: Qwen3, cache: StaticKVCache) -> tuple[Any, Any]:
    """Return the fused step, which stacks weights, and the fused sampler, where they support the model and device."""
    if cache.keys[0].device.type != cuda.DEVICE_TYPE or not cuda.use_fused_step() or not cuda.load():
        return None, None
    from qwen3fast.engine.fused_sampler import FusedSampler  # both need Triton
    from qwen3fast.engine.fused_step import FusedDecodeStep

    sampler = FusedSampler(cache.max_batch_size, model.config.vocab_size, cache.keys[0].device)
    return FusedDecodeStep(model, cache), sampler
