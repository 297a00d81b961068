"""RoPE: positions enter attention by rotating pairs of channels of every query and key.

B batch rows   T tokens   N heads   D head_dim   S positions
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.model.yarn import Yarn


def rope_tables(
    head_dim: int, rope_theta: float, num_positions: int, device: torch.device, yarn: Yarn | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of all rotation angles, (S, D) float32 each; angle [p, i] = p / rope_theta^(2i/D).

    Channel i and channel i + D/2 turn together, and the second half of each row repeats the first. Angles are computed
    in float32: bfloat16 cannot tell neighboring positions apart beyond 256.

    yarn: lowers the frequencies of slowly rotating pairs, and multiplies all cosines and sines by its table_factor.
    Source: RoFormer, arXiv:2104.09864, section 3.2.2; YaRN, arXiv:2309.00071, sections 3.2 and 3.4.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    periods = rope_theta**exponents
    frequencies = 1.0 / periods  # in this order, which rounds as Hugging Face's does
    if yarn is not None:
        low, high = yarn.blend_range(head_dim, rope_theta)
        pair = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        kept = 1 - ((pair - low) / (high - low)).clamp(0, 1)
        frequencies = 1.0 / (yarn.factor * periods) * (1 - kept) + frequencies * kept
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    angles_SD = torch.cat([angles, angles], dim=-1)
    factor = 1.0 if yarn is None else yarn.table_factor
    return angles_SD.cos() * factor, angles_SD.sin() * factor


def apply_rope(x_BTND: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotate every head's vector by the angles of its position (half-split pairing, as the weights were trained).

    cos_BTD, sin_BTD: float32, rows of `rope_tables` at the tokens' positions. The rotation is computed in float32.
    Returns: same shape and dtype as x_BTND.
    """
    first, second = x_BTND.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BTND.float() * cos_BTD.unsqueeze(2) + rotated * sin_BTD.unsqueeze(2)).to(x_BTND.dtype)
