"""All blocks of a model over whole texts in one C++ operation, for models that read texts and generate nothing.

B texts   T tokens of the longest one   E hidden_size
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwen3fast.engine.decode_layers import DecodeLayers
from qwen3fast.engine.fast_layers import use_fast_layers
from qwen3fast.engine.forms import Forms
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu.prefill import tile_length
from qwen3fast.kernels.cpu.structures import MANY_ROWS
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache


class WholeTexts:
    """The blocks of a model (kernels/cpu/prefill_layers.cpp). The reference is `Qwen3.hidden`.

    Keys and values of a block are read only while it runs: all blocks share the memory of one.

    num_rows, num_positions: the texts, and the tokens of each, that there is memory for.
    """

    def __init__(self, model: Qwen3, num_rows: int, num_positions: int) -> None:
        """Allocate. Raises: MemoryError if the memory is not there."""
        config, device = model.config, model.model.norm.weight.device
        cache = StaticKVCache(replace(config, num_hidden_layers=1), num_rows, num_positions, torch.bfloat16, device)
        cache.keys *= config.num_hidden_layers
        cache.values *= config.num_hidden_layers
        self.num_rows, self.num_positions = num_rows, cache.allocated_len
        self._embed = model.embed
        self._weights = addresses(model)
        self._layers = DecodeLayers(model, cache)
        self._forms = Forms(model, cache)
        self._forms.decide(may_measure=False)
        self._tables = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn)

    @staticmethod
    def may_serve(model: Qwen3) -> bool:
        """Return whether the operation may serve a model; it is not built for this."""
        weight = model.model.norm.weight
        is_possible = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu.load(may_build=False)
        if is_possible:
            use_fast_layers(model)
        return is_possible

    def fits(self, model: Qwen3, num_rows: int, num_positions: int) -> bool:
        """Return whether there is memory for so many texts and tokens, and the weights are where they were."""
        has_room = num_rows <= self.num_rows and num_positions <= self.num_positions
        return has_room and self._weights == addresses(model)

    def hidden(self, token_BT: Tensor, last_B: Tensor | None) -> Tensor | None:
        """Return the output of the last block, (B, T, E) bfloat16, T at least MANY_ROWS; None if it does not serve.

        last_B: int64, the only token of each text whose output is needed; None for all.
        """
        B, T = token_BT.shape
        if T < MANY_ROWS:
            token_BT, T = torch.nn.functional.pad(token_BT, (0, MANY_ROWS - T)), MANY_ROWS
        tiles = self._forms.of_chunks(B * T, T, T) if self._layers.serves_chunks(B * T) else None
        if tiles is None:
            return None
        position_BT, row_B = torch.arange(T, device="cpu").expand(B, T), torch.arange(B, device="cpu")
        from_length = tile_length(self._forms.tiles_from, T)
        x_BTE = self._embed(token_BT)
        return self._layers.prefill(x_BTE, *self._tables, position_BT, row_B, tiles, last_B, from_length)


def addresses(model: Qwen3) -> tuple[int, ...]:
    """Return where a model's weights are; the operation reads them there."""
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
