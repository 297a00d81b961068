"""`qwen3fast_decode_layers` and `qwen3fast_prefill_layers` of ops.h: all blocks of a decode step, or for chunks of
prompts, in one call; weights and cache must stay in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.structures import (
    GROUP,
    LANES,
    MANY_ROWS,
    NEVER,
    Adapters,
    Layer,
    LinearPointers,
    LowRank,
    NotServedError,
    Sizes,
    Tiles,
    address,
    cache,
    is_array,
    packed_linear,
    require,
)

MAX_DECODE_ROWS = 32


class LayerWeight(NamedTuple):
    """A weight in bfloat16, or packed, with its scales.

    order: (K,) int32, the input's channel that each column of a packed weight is for; None for the same. Of gate and
    up of X experts, (2X, K).
    """

    weight: Tensor
    scale: Tensor | None = None
    order: Tensor | None = None


class ExpertWeights(NamedTuple):
    """The experts of a block: a router in bfloat16, (X, E), and packed weights as in `quantized_experts`.

    num_chosen: experts per token. is_renormalized: their shares are made to sum to one.
    """

    router: Tensor
    gate_up: LayerWeight
    down: LayerWeight
    num_chosen: int
    is_renormalized: bool


class LayerTensors(NamedTuple):
    """The tensors of one block.

    norms: input_norm, q_norm, k_norm, post_norm. attention: q, k, v, o. feed_forward: gate, up, down, or experts.
    cache: keys and values, and for int8 their scales, see `Cache` in ops.h.
    """

    norms: Sequence[Tensor]
    attention: Sequence[LayerWeight]
    feed_forward: Sequence[LayerWeight] | ExpertWeights
    cache: Sequence[Tensor]


class DecodeLayersCall:
    """A call that runs all blocks; it checks weights and cache, and stores their addresses, once.

    sizes: of all calls. lost: the largest share of the last step's time for which a thread was off its processor.
    """

    lost = 0.0

    def __init__(self, layers: Sequence[LayerTensors], eps: float) -> None:
        """Check and keep the tensors of all blocks. eps: of the norms.

        Raises: NotServedError for devices, dtypes and sizes that other forms serve; ValueError for tensors that do not
        fit.
        """
        require(len(layers) > 0, "decode_layers: there must be layers")
        self._tensors = [tensor for layer in layers for tensor in _flat(layer)]  # kept, even if parameters are replaced
        is_here = all(tensor.device.type == "cpu" for tensor in self._tensors)
        require(is_here, "decode_layers: weights and cache must be on the CPU", NotServedError)
        self._layers = (Layer * len(layers))()
        keys = layers[0].cache[0]
        self.R, K, S, D = keys.shape
        for layer, tensors in zip(self._layers, layers, strict=True):
            k, v, *scales = tensors.cache
            is_equal = k.shape == keys.shape and k.dtype == keys.dtype
            require(is_equal, "decode_layers: all caches must have one shape and dtype")
            k_scale, v_scale = scales if scales else (None, None)
            layer.cache = cache(k, v, k_scale, v_scale)
            _set_weights(layer, tensors)
        first = self._layers[0]
        self.sizes = Sizes(0, first.q.K, first.q.N // D, K, D, S, eps)
        for layer, tensors in zip(self._layers, layers, strict=True):
            _require_sizes(layer, self.sizes)
            for norm, name in zip(tensors.norms, ("input_norm", "q_norm", "k_norm", "post_norm"), strict=True):
                setattr(layer, name, norm_pointer(norm, D if name in ("q_norm", "k_norm") else first.q.K))

        attention = (w for x in self._layers for w in (x.q, x.k, x.v, x.o))
        dense = (w for x in self._layers if not x.router.weight for w in (x.gate, x.up, x.down))
        self.can_prefill = not any(w.order for w in (*attention, *dense))

    def adapters(self, matrices: Sequence[tuple[Tensor, Tensor]], slot_R: Tensor) -> AdaptersOfLayers:
        """Check and keep the matrices of adapters, seven pairs per layer in the order of `Layer`.

        matrices: A (slots, rank, K) and the transpose of B, (slots, rank, N), bfloat16. slot_R: int64, the slot of each
        row of the cache; 0 for none.
        Raises: ValueError for other tensors.
        """
        require(not any(x.router.weight for x in self._layers), "decode_layers: there are no adapters of experts")
        weights = [w for x in self._layers for w in (x.q, x.k, x.v, x.o, x.gate, x.up, x.down)]
        require(len(matrices) == len(weights), "decode_layers: there must be seven pairs of matrices per layer")
        slots, rank, _ = matrices[0][0].shape
        for (a_SRK, b_SRN), w in zip(matrices, weights, strict=True):
            for matrix, size in ((a_SRK, w.K), (b_SRN, w.N)):
                address("decode_layers: matrices of adapters", matrix, torch.bfloat16, slots, rank, size)
        address("decode_layers: slots", slot_R, torch.int64, self.R)
        return AdaptersOfLayers(matrices, slot_R)

    def __call__(
        self,
        x_B1E: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        position_B1: Tensor,
        adapters: AdaptersOfLayers | None = None,
        tiles: Tiles = Tiles.NONE,
    ) -> Tensor:
        """Run the blocks for rows 0..B-1 of the cache, writing keys and values at position_B1 (int64; -1: nowhere).

        x_B1E: bfloat16, B up to MAX_DECODE_ROWS. cos_SD, sin_SD: float32, tables of all positions.
        adapters: of `adapters`, to add the products of each row's slot. tiles: of products with weights in bfloat16.
        Returns: (B, 1, E).
        Raises: ValueError for tensors that it does not serve, or a position outside of the cache.
        """
        B = len(x_B1E)
        require(
            x_B1E.shape[1] == 1 and 1 <= B <= min(MAX_DECODE_ROWS, self.R),
            f"decode_layers: x must be (1 to {MAX_DECODE_ROWS}, 1, E)",
        )
        position, y_B1E = self._checked(x_B1E, cos_SD, sin_SD, position_B1, first=-1)
        self.lost = functions().qwen3fast_decode_layers(
            *self.fixed(B),
            *(tensor.data_ptr() for tensor in (cos_SD, sin_SD, position, y_B1E)),
            None if adapters is None else byref(adapters.structure),
            tiles,
            torch.get_num_threads(),
        )
        return y_B1E

    def prefill(
        self,
        x_BTE: Tensor,
        cos_SD: Tensor,
        sin_SD: Tensor,
        position_BT: Tensor,
        row_B: Tensor,
        tiles: Tiles = Tiles.NONE,
        last_B: Tensor | None = None,
        tiles_from: int = NEVER,
    ) -> Tensor:
        """Run the blocks for a chunk of a prompt per batch row, in rows row_B (int64) of the cache.

        Arguments as of a step; B * T at least MANY_ROWS. tiles: of products, see tiles.cpp. last_B: int64, the
        only token of each batch row whose result is needed; None for all. tiles_from: the used length from which
        attention is made by tiles.
        Returns: (B, T, E). Raises: ValueError as a step, and where other weights than experts' have orders of channels.
        """
        B, T, _ = x_BTE.shape
        rows = row_B.contiguous()
        require(self.can_prefill, "prefill_layers: only experts may have orders of channels")
        require(B * T >= MANY_ROWS, f"prefill_layers: there must be at least {MANY_ROWS} tokens")
        require(
            rows.dtype == torch.int64 and rows.shape == (B,) and all(0 <= row < self.R for row in rows.tolist()),
            "prefill_layers: a row of the cache for each batch row, int64",
        )
        last = None if last_B is None else last_B.contiguous()
        require(
            last is None
            or (last.dtype == torch.int64 and last.shape == (B,) and all(0 <= token < T for token in last.tolist())),
            "prefill_layers: a token for each batch row, int64",
        )
        position, y_BTE = self._checked(x_BTE, cos_SD, sin_SD, position_BT, first=0)
        functions().qwen3fast_prefill_layers(
            *self.fixed(B * T),
            *(tensor.data_ptr() for tensor in (cos_SD, sin_SD, position, rows)),
            T,
            None if last is None else last.data_ptr(),
            y_BTE.data_ptr(),
            tiles,
            tiles_from,
            torch.get_num_threads(),
        )
        return y_BTE

    def fixed(self, rows: int) -> tuple[object, ...]:
        """Return the first arguments of all calls."""
        sizes = Sizes.from_buffer_copy(self.sizes)
        sizes.M = rows
        return self._layers, len(self._layers), byref(sizes)

    def _checked(
        self, x_BTE: Tensor, cos_SD: Tensor, sin_SD: Tensor, position_BT: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Return positions, and a copy of x for the result. first: the least position."""
        sizes, name = self.sizes, "decode_layers" if first < 0 else "prefill_layers"
        require(
            x_BTE.dtype == torch.bfloat16 and x_BTE.dim() == 3 and x_BTE.shape[2] == sizes.E,
            f"{name}: x must be (B, T, E) bfloat16",
        )
        table_pointers(name, sizes.D, cos_SD, sin_SD)
        position = position_BT.contiguous()
        require(
            position.dtype == torch.int64 and position.shape == x_BTE.shape[:2],
            f"{name}: positions must be (B, T) int64",
        )
        end = min(sizes.S, len(cos_SD), len(sin_SD))
        for place in (int(position.min()), int(position.max())):
            require(first <= place < end, f"{name}: position {place} is not in the cache or the tables")
        return position, x_BTE.clone(memory_format=torch.contiguous_format)


class AdaptersOfLayers:
    """The addresses of adapters' matrices, which must stay in place. structure: `Adapters` of ops.h."""

    def __init__(self, matrices: Sequence[tuple[Tensor, Tensor]], slot_R: Tensor) -> None:
        pairs = (LowRank * len(matrices))(*(LowRank(a.data_ptr(), b.data_ptr()) for a, b in matrices))
        self._kept = pairs, [tensor.detach() for pair in matrices for tensor in pair], slot_R  # alive
        self.structure = Adapters(addressof(pairs), slot_R.data_ptr(), matrices[0][0].shape[1])


def table_pointers(name: str, D: int, *tables: Tensor) -> list[int]:
    """Return the addresses of checked tables of all positions, cos and sin."""
    return [address(f"{name}: cos and sin", table, torch.float32, len(table), D) for table in tables]


def _flat(layer: LayerTensors) -> list[Tensor]:
    mlp = layer.feed_forward
    weights = (mlp.router, *mlp.gate_up, *mlp.down) if isinstance(mlp, ExpertWeights) else [x for w in mlp for x in w]
    attention = [x for weight in layer.attention for x in weight]
    return [x.detach() for x in (*layer.norms, *attention, *weights, *layer.cache) if x is not None]


def _set_weights(layer: Structure, tensors: LayerTensors) -> None:
    for name, weight in zip("qkvo", tensors.attention, strict=True):
        setattr(layer, name, weight_pointers(*weight))
    mlp = tensors.feed_forward
    if isinstance(mlp, ExpertWeights):
        require(mlp.gate_up.scale is not None and mlp.down.scale is not None, "decode_layers: experts must be packed")
        require(mlp.down.order is None, "decode_layers: down of experts has no order of channels")
        layer.gate, layer.down = (
            weight_pointers(*mlp.gate_up, orders=(2 * len(mlp.router),)),
            weight_pointers(*mlp.down),
        )
        layer.router = weight_pointers(mlp.router)
        layer.chosen, layer.renormalizes = mlp.num_chosen, mlp.is_renormalized
    else:
        for name, weight in zip(("gate", "up", "down"), mlp, strict=True):
            setattr(layer, name, weight_pointers(*weight))


def weight_pointers(
    weight: Tensor, scale: Tensor | None = None, order: Tensor | None = None, orders: tuple[int, ...] = ()
) -> Structure:
    """Return a checked weight as ops.h describes it. orders: the number of orders, of experts."""
    if scale is not None:
        linear = packed_linear(weight, scale)
        linear.order = None if order is None else _order(order, (*orders, linear.K))
        return linear
    require(
        weight.dim() == 2 and is_array(weight, torch.bfloat16, *weight.shape),
        "decode_layers: weights must be (N, K) bfloat16, contiguous, or packed",
        NotServedError,
    )
    return LinearPointers(weight.data_ptr(), None, *weight.shape, 16)


def _order(order_K: Tensor, shape: tuple[int, ...]) -> int:
    expected_K = torch.arange(shape[-1], dtype=torch.int32, device="cpu").expand(shape)
    require(
        is_array(order_K, torch.int32, *shape) and order_K.sort().values.equal(expected_K),
        "decode_layers: an order must be a permutation of 0 to K - 1, int32, contiguous",
    )
    return order_K.data_ptr()


def norm_pointer(norm: Tensor, size: int) -> int:
    return address("decode_layers: norms", norm, torch.bfloat16, size, error=NotServedError)


def has_whole_lanes(w: Structure) -> bool:
    is_whole: bool = w.N % LANES == 0 and w.K % (LANES if w.bits == 16 else GROUP) == 0
    return is_whole


def _require_sizes(layer: Structure, s: Structure) -> None:
    """Check that weights fit each other; with the same input, all must be quantized, or none."""
    q, o, gate, down, router = layer.q, layer.o, layer.gate, layer.down, layer.router
    I, X = down.K, max(1, router.N)  # noqa: E741
    expected = [
        *((w, n * s.D, s.E, q) for w, n in ((q, s.H), (layer.k, s.K), (layer.v, s.K))),
        (o, s.E, s.H * s.D, o),
        *([(gate, X * 2 * I, s.E, gate), (router, X, s.E, router)] if router.weight else []),
        *([] if router.weight else [(w, I, s.E, gate) for w in (gate, layer.up)]),
        (down, X * s.E, I, down),
    ]
    fits = all(
        (w.N, w.K, w.bits == 16) == (N, K, first.bits == 16) and has_whole_lanes(w) for w, N, K, first in expected
    )
    require(
        fits and s.H % s.K == 0 and s.D % (2 * LANES) == 0 and 0 <= layer.chosen <= X,
        "decode_layers: weights of equal layers, sizes multiples of 16 (packed: of 32), D of 32",
        NotServedError,
    )
