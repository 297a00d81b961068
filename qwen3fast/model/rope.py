"""RoPE: positions enter attention by rotating pairs of channels of every query and key.

T tokens   D head_dim   S positions   N heads
"""

import torch
from torch import Tensor


def rope_tables(head_dim: int, rope_theta: float, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all rotation angles, (S, D) in float32; angle [p, i] = p / rope_theta^(2i/D).

    Channel i and channel i + D/2 turn together, so the second half of each row repeats the first. Angles are computed
    in float32: bfloat16 cannot tell neighbouring positions apart beyond 256.
    Source: RoFormer, arXiv:2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / rope_theta**exponents  # rounded like the reference implementation's
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    angles_SD = torch.cat([angles, angles], dim=-1)
    return angles_SD.cos(), angles_SD.sin()


def apply_rope(x_BTND: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Rotate every head vector by the angle of its position (half-split pairing, as the weights were trained).

    cos_BTD, sin_BTD: float32 rows of `rope_tables` at the tokens' positions. The rotation runs in float32.
    Returns: same shape and dtype as x_BTND.
    """
    first, second = x_BTND.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x_BTND.float() * cos_BTD.unsqueeze(2) + rotated * sin_BTD.unsqueeze(2)).to(x_BTND.dtype)
