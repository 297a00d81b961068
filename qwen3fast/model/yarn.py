"""YaRN: the numbers that stretch RoPE beyond the length that a model was trained on, under transformers' names.

`model/rope.py` makes the tables. Source: YaRN, arXiv:2309.00071; defaults: transformers 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_FACTOR = 1e6  # the limit of each field except the length: far beyond any Qwen3


@dataclass(frozen=True)
class Yarn:
    """The scaling of RoPE's frequencies (section 3.2 of the paper), and of attention with them (section 3.4).

    Attributes:
        factor: how many times longer than original_max_position_embeddings a context may be.
        original_max_position_embeddings: the length, in positions, that the model was trained on.
        attention_factor: cosines and sines are multiplied by it; None computes it from the other fields.
        beta_fast, beta_slow: pairs of channels that turn more than beta_fast times in the original length keep their
            frequency, pairs that turn less than beta_slow times are slowed by `factor`, and pairs between are blended.
        mscale, mscale_all_dim: change the computed attention_factor, where both are given.
        truncate: round the bounds of the blended range to whole pairs.
        attn_factor: multiplies the computed attention_factor, as in vLLM (DeepSeek-R1-0528-Qwen3-8B sets it to make
            the product 1).
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attn_factor: float = 1.0

    def __post_init__(self) -> None:
        """Check all fields.

        Raises: ValueError naming the field, its value and what was expected.
        """
        original = self.original_max_position_embeddings
        if type(original) is not int or not 1 <= original <= 10**9:
            raise ValueError(
                f"YaRN: original_max_position_embeddings must be a positive integer, got {original!r:.100}"
            )
        for name in ("factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is None and name in ("attention_factor", "mscale", "mscale_all_dim"):
                continue
            if type(value) not in (int, float) or not 0 < value <= MAX_FACTOR:
                raise ValueError(f"YaRN: {name} must be a positive number up to {MAX_FACTOR:g}, got {value!r:.100}")
        if self.factor < 1:
            raise ValueError(f"YaRN: factor must be at least 1, got {self.factor!r}")
        if self.attention_factor is not None and self.attn_factor != 1:
            raise ValueError(
                f"YaRN: attention_factor ({self.attention_factor}) takes the place of the computed factor, and "
                f"attn_factor ({self.attn_factor}) multiplies it; only one of them can be given"
            )
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"YaRN: beta_fast ({self.beta_fast}) must not be below beta_slow ({self.beta_slow})")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"YaRN: truncate must be true or false, got {self.truncate!r}")

    @property
    def table_factor(self) -> float:
        """Return the factor of cosines and sines; attention scores grow by its square."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self.attn_factor * self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self.attn_factor * self._magnitude(1.0)

    @property
    def longest_context(self) -> int:
        """Return the number of positions that the stretched model reaches."""
        return int(self.factor * self.original_max_position_embeddings)

    def blend_range(self, head_dim: int, rope_theta: float) -> tuple[float, float]:
        """Return two indices of pairs: frequencies up to the first are kept, and slowed from the second on.

        Between the two, kept and slowed frequencies are blended.
        """

        def pair_of(turns: float) -> float:
            # Pair i turns original_max_position_embeddings / (2 pi theta^(2i/D)) times in the original length.
            length = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(length) / (2 * math.log(rope_theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high if high != low else high + 0.001

    def _magnitude(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0
