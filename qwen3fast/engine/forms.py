"""The forms that an engine's parts use on this machine: decided before its first step, shown by `Generator.stats`.

An engine's choices change in `warmup()` only: replies must not differ from one request to the next because something
was measured in between.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cases import (
    BFLOAT16,
    CPP,
    DEQUANTIZED,
    INT8_TILES,
    LINEAR,
    LONG,
    ROWS,
    SDPA,
    TILES,
    Calls,
    experts_case,
    linear_case,
    prefill_attention_case,
)
from qwen3fast.kernels.compiling import operations
from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.decode_layers import MAX_DECODE_ROWS
from qwen3fast.kernels.cpu.prefill import CHUNKS, chunk_class
from qwen3fast.kernels.cpu.structures import LANES, NEVER, RowLimits, Tiles
from qwen3fast.kernels.forms import PART_S, FormCase, choose, machine_key, measure_and_keep, used_from
from qwen3fast.kernels.forms_file import Choice, kept
from qwen3fast.kernels.linear import Linear
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.quantization.experts import QuantizedExperts
from qwen3fast.quantization.layers import QuantizedLinear

LINEAR_WORK = "linear "  # and the format of its weights
BLOCKS = "block by block"  # instead of all in one operation in C++
DECODE_BYTES = 2**27  # weights of the blocks that are measured: more than caches hold
DECODE_POSITION = 100
FIELDS = {INT8_TILES: "int8_tiles", TILES: "tiles", DEQUANTIZED: "dequantized", LINEAR: "dequantized"}  # of RowLimits
MIN_TILE_ROWS = 8  # of decode steps, from which tiles are the first form
WAITING = "until the next warmup() or process; measured meanwhile"


class Forms:
    """The forms that the parts of one engine use.

    sdpa_from, tiles_from: see kernels/cpu/prefill.py. block_rows: rows of decode steps that run block by block, not in
    the C++ operation for all blocks. tile_rows: those that it multiplies by tiles. choices: the reasons, by computation
    and sizes. Linear layers and experts hold their own choice (`limits`), which engines with the same model share.
    """

    def __init__(self, model: Qwen3 | None, cache: StaticKVCache, is_first: bool = False) -> None:
        """Choose nothing yet.

        model: None for an engine that runs the plain forms. is_first: use the first form of each part, whatever is
        faster.
        """
        self._is_first = is_first
        self._layers = {} if model is None else layers_by_work(model)
        self._model, self._cache = model, cache
        self._cases: list[FormCase] = []
        self.sdpa_from: tuple[int, ...] = ()
        self.tiles_from: tuple[int, ...] = ()
        self.block_rows: frozenset[int] = frozenset()
        self.tile_rows: frozenset[int] = frozenset()
        self.choices: dict[str, Choice] = {}

    def decide(self, may_measure: bool) -> bool:
        """Choose a form for each part; measure forms without a measurement if that is allowed.

        Returns: whether a choice has changed; code that was compiled with the earlier one must be compiled again.
        Raises: ValueError as `kernels.forms.is_pinned`.
        """
        before = self._used()
        # Again each time: when the C++ operations are loaded, tiles may turn out to be refused.
        self._cases = [] if self._model is None else cases_of(self._model, self._cache)
        for case, is_in_time in self._timed_cases():
            self.choices[_label(case)] = choose(case, may_measure and is_in_time, self._is_first)
        self._use()
        return before != self._used()

    def measure_ahead(self, threads: int, quiet: AbstractContextManager[Any]) -> None:
        """Measure forms without a measurement, and keep the results without using them.

        threads: of the engine; each thread has a number of its own. quiet: entered for each case; no step runs inside.
        """
        if self._is_first or not cpu.is_loaded():
            return
        torch.set_num_threads(threads)
        for case, is_in_time in self._timed_cases():
            used = self.choices[_label(case)]
            if used.seconds or kept(machine_key(case)) is not None or not is_in_time:
                continue
            with quiet:
                choice = measure_and_keep(case)
            if choice.seconds:
                choice = replace(choice, name=used.name, reason=WAITING)
            self.choices[_label(case)] = choice

    def _timed_cases(self) -> Iterator[tuple[FormCase, bool]]:
        """Yield each case, and whether it may be measured now: the cases of a computation share PART_S."""
        for _, cases in groupby(self._cases, lambda case: case.what):
            ends = time.perf_counter() + PART_S
            for case in cases:
                yield case, cpu.is_loaded() and time.perf_counter() < ends

    def max_rows_as(self, rows: int) -> int:
        """Return the largest number of rows whose products have the same form as products of `rows` rows."""
        every = [limit for limits in self._limits().values() for limit in limits]
        return min((limit for limit in every if limit > rows), default=NEVER) - 1

    def of_steps(self, rows: int) -> Tiles:
        """Return the tiles of products with weights in bfloat16 in decode steps of so many rows."""
        return _usable_tiles() if rows in self.tile_rows else Tiles.NONE

    def of_chunks(self, num_tokens: int, size: int, used_length: int) -> Tiles | None:
        """Return the tiles of all products of chunks, if one operation may run all blocks.

        None: a part is faster in a form that this operation does not have: PyTorch's, and of experts any but the C++.
        num_tokens: of all chunks, of `size` tokens each. used_length: of the longest prompt, after its chunk.
        """
        if self.sdpa_from and used_length >= self.sdpa_from[chunk_class(size)]:
            return None
        limits = self._limits()
        linears = {what: limit for what, limit in limits.items() if what.startswith(LINEAR_WORK)}
        if any(limits[what].form_at(num_tokens) for what in limits.keys() - linears.keys()):
            return None
        if any(limit.form_at(num_tokens) == "dequantized" for limit in linears.values()):
            return None
        kinds = {
            what: limit.tiles_at(num_tokens) if tiles.are_usable() else Tiles.NONE for what, limit in linears.items()
        }
        if Tiles.INT8 in kinds.values():  # weights that have no tiles of int8 are then multiplied by tiles of bfloat16
            has_int8 = {case.what for case in self._cases if INT8_TILES in case.names}
            kinds = {what: kind for what, kind in kinds.items() if kind != Tiles.BFLOAT16 or what in has_int8}
        return next(iter(kinds.values())) if len(set(kinds.values())) == 1 else None

    def serve_chunks(self, sizes: Sequence[int], cache: StaticKVCache) -> bool:
        """Return whether `of_chunks` returns a form for chunks of these sizes, at any length that fits the cache."""
        return all(self.of_chunks(size, size, cache.allocated_len) is not None for size in sizes)

    def _use(self) -> None:
        names = {case: self.choices[_label(case)].name for case in self._cases}
        by_what: dict[str, dict[tuple[int, ...], str]] = {}
        for case, name in names.items():
            by_what.setdefault(case.what, {})[case.sizes] = name
        attention = by_what.get("prefill attention", {})
        self.sdpa_from = _lengths(attention, SDPA)
        self.tiles_from = _lengths(attention, TILES, SDPA)
        steps = by_what.get("decode", {})
        self.block_rows, self.tile_rows = (
            frozenset(rows for (rows,), name in steps.items() if name == form) for form in (BLOCKS, TILES)
        )
        for what, layers in self._layers.items():
            limits = row_limits([(case.sizes[0], name) for case, name in names.items() if case.what == what])
            for layer in layers:
                if layer.limits != limits:
                    layer.limits = limits

    def _used(self) -> tuple[Any, ...]:
        return self.sdpa_from, self.tiles_from, self._limits()

    def _limits(self) -> dict[str, RowLimits]:
        return {what: layers[0].limits for what, layers in self._layers.items()}


def row_limits(choices: Sequence[tuple[int, str]]) -> RowLimits:
    """Return the limits of the forms that were chosen for products.

    choices: measured numbers of rows, ascending, and the form that was chosen there. A form serves one range of rows:
    where it was chosen again below another one, the other one serves.
    """
    limits: dict[str, int] = {}
    field = ""
    for rows, name in reversed(choices):
        if name == CPP:
            break
        field = field if FIELDS[name] in limits else FIELDS[name]
        limits[field] = rows
    return RowLimits(**limits)


def cases_of(model: Qwen3, cache: StaticKVCache) -> list[FormCase]:
    """Return the work of an engine's steps that several forms can do, part by part; nothing for devices but CPUs."""
    weight, config = model.model.norm.weight, model.config
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return []
    cases = []
    if config.head_dim % (2 * LANES) == 0:
        cases = prefill_cases(config, cache.keys[0].dtype, cache.allocated_len)
    return cases + product_cases(model, ROWS) + decode_cases(model, cache.keys[0].dtype, cache.max_batch_size)


def prefill_cases(config: ModelConfig, dtype: torch.dtype, allocated_len: int) -> list[FormCase]:
    """Return attention of each class of chunks, alone and after earlier ones; the largest, which cost most, first."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    chunks = [chunk for chunk in reversed(CHUNKS) if chunk <= allocated_len]
    return [
        prefill_attention_case(chunk, length, heads, dtype)
        for chunk in chunks
        for length in dict.fromkeys((chunk, min(LONG, allocated_len)))
    ]


def product_cases(model: Qwen3, all_rows: Sequence[int]) -> list[FormCase]:
    """Return products of each kind of weight, for each number of rows: of the largest one, and of the first experts."""
    cases: list[FormCase] = []
    for what, layers in layers_by_work(model).items():
        if isinstance(layers[0], QuantizedExperts):
            weights, chosen = layers[0].operands(), model.config.num_experts_per_tok
            cases += [experts_case(what, rows, chosen, *weights) for rows in all_rows]
        else:
            largest = largest_weight(layers[: 7 * 4])
            cases += [linear_case(rows, largest, what.removeprefix(LINEAR_WORK)) for rows in all_rows]
    return cases


def decode_cases(model: Qwen3, dtype: torch.dtype, max_batch_size: int) -> list[FormCase]:
    """Return some blocks of a decode step, for each number of rows that steps have; nothing without an operation."""
    config, blocks = model.config, len(model.model.layers)
    block_bytes = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    blocks = min(blocks, -(-DECODE_BYTES // block_bytes))
    small = StaticKVCache(replace(config, num_hidden_layers=blocks), 1, 1, dtype, torch.device("cpu"))
    if not DecodeLayers(model, small).is_possible:
        return []
    all_rows = {min(1 << (n - 1).bit_length(), max_batch_size) for n in range(1, max_batch_size + 1)}
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}"
    sizes = f"{config.hidden_size} hidden, {config.intermediate_size} intermediate, {heads}"
    formats = ", ".join(what.removeprefix(LINEAR_WORK) for what in layers_by_work(model))
    kind = str(dtype).removeprefix("torch.")
    has_tiles = tiles.are_announced() and LINEAR_WORK + BFLOAT16 in layers_by_work(model)
    few, many = ((CPP, TILES, BLOCKS), (TILES, CPP, BLOCKS)) if has_tiles else ((CPP, BLOCKS),) * 2
    return [
        FormCase(
            "decode",
            f"{rows} row{'s' * (rows > 1)}, {blocks} blocks, {sizes}, {formats}, {kind} cache",
            names,
            partial(_decode_calls, names, model, blocks, dtype, rows),
            (rows,),
        )
        for rows in sorted(all_rows)
        for names in [few if rows < MIN_TILE_ROWS else many]
        if rows <= MAX_DECODE_ROWS
    ]


@torch.no_grad()
def _decode_calls(names: Sequence[str], model: Qwen3, blocks: int, dtype: torch.dtype, rows: int) -> Calls:
    config, device = model.config, torch.device("cpu")
    cache = StaticKVCache(replace(config, num_hidden_layers=blocks), rows, DECODE_POSITION + 1, dtype, device)
    cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn)
    position_B1 = torch.full((rows, 1), DECODE_POSITION)
    x_B1E = torch.full((rows, 1, config.hidden_size), 0.1, dtype=torch.bfloat16)
    mask_B1L = torch.arange(cache.allocated_len) <= position_B1[..., None]
    cos_B1D, sin_B1D = cos_SD[position_B1], sin_SD[position_B1]
    layers = DecodeLayers(model, cache)

    @torch.no_grad()
    def all_blocks(kind: Tiles) -> None:
        layers(x_B1E, cos_SD, sin_SD, position_B1, kind)

    @torch.no_grad()
    def block_by_block() -> None:
        x = x_B1E
        with operations():
            for block, layer in zip(model.model.layers, cache.layers(), strict=False):
                x = block(x, cos_B1D, sin_B1D, position_B1, mask_B1L, layer)

    calls: Calls = {
        TILES: partial(all_blocks, _usable_tiles()),
        CPP: partial(all_blocks, Tiles.NONE),
        BLOCKS: block_by_block,
    }
    return {name: calls[name] for name in names}


def _usable_tiles() -> Tiles:
    return Tiles.BFLOAT16 if tiles.are_usable() else Tiles.NONE


def layers_by_work(model: Qwen3) -> Mapping[str, list[Any]]:
    """Return the blocks' linear layers and experts with C++ operations, of each format, in the order of the model."""
    found: dict[str, list[Linear | QuantizedLinear | QuantizedExperts]] = {}
    inside: set[nn.Module] = set()  # of experts
    for layer in model.model.layers.modules():
        if isinstance(layer, QuantizedExperts):
            inside.update(layer.children())
            formats = [part.format for part in (layer.gate_up_proj, layer.down_proj)]
            if all("cpu" in format.devices for format in formats):
                found.setdefault("experts " + "/".join(format.name for format in formats), []).append(layer)
        elif isinstance(layer, QuantizedLinear) and "cpu" in layer.format.devices and layer not in inside:
            found.setdefault(LINEAR_WORK + layer.format.name, []).append(layer)
        elif isinstance(layer, Linear) and layer.weight.dtype == torch.bfloat16:
            found.setdefault(LINEAR_WORK + BFLOAT16, []).append(layer)
    return found


def largest_weight(layers: Iterable[Linear | QuantizedLinear]) -> tuple[Tensor, ...]:
    """Return the weight of the largest layer, for `linear_case`."""
    weights = [
        layer.format.operands(layer.packed) if isinstance(layer, QuantizedLinear) else (layer.weight,)
        for layer in layers
    ]
    return max(weights, key=lambda weight: weight[0].numel())


def _lengths(names: Mapping[tuple[int, ...], str], *forms: str) -> tuple[int, ...]:
    """Return the used length from which one of these forms serves each class of chunks, 0 for all; () if none does."""
    lengths = []
    for chunk in CHUNKS:
        at = [(length, name) for (tokens, length), name in names.items() if tokens == chunk]
        limit = used_from(at, *forms)
        lengths.append(0 if at and limit == at[0][0] else limit)
    return tuple(lengths) if min(lengths) != NEVER else ()


def _label(case: FormCase) -> str:
    return f"{case.what}, {case.key}"
