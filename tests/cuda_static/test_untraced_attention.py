"""Compiled code for CUDA devices does not trace PyTorch's attention, which would choose its kernels by sizes."""

import pytest
import torch
from conftest import random_tensor
from cuda_static.fake_cuda import fake_cuda
from cuda_static.test_fake_cuda import SIZES, make_engine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3fast.engine.parts import run_block_uncached
from qwen3fast.kernels import attention, cuda

FLASH = "aten::_scaled_dot_product_flash_attention"
MAX_ELEMENTS = 2**31 - 1  # Inductor's kernels for CUDA count in 32 bits, and it refuses ranges of sizes that exceed it


@pytest.fixture
def compiling(monkeypatch):
    monkeypatch.setattr(attention, "is_compiling", lambda: True)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, and the operations' names."""

    def __init__(self):
        super().__init__()
        self.elements, self.names = 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.names.add(operation.name())
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_sequences_of_the_largest_compiled_size_are_counted_in_32_bits(size, dtype, compiling):
    """Without a cache; with traced attention, a matrix of the sequence's length by itself."""
    with fake_cuda() as device:
        engine = make_engine(device, size, num_hidden_layers=1, dtype=dtype)
        [tokens] = engine.parts.block_uncached.dynamic[0][1]
        config, block = engine.model.config, engine.model.model.layers[0]
        x_1TE = torch.zeros(1, tokens.max, config.hidden_size, dtype=config.dtype, device=device)
        cos_1TD, sin_1TD = (torch.zeros(1, tokens.max, config.head_dim, device=device) for _ in range(2))
        with Largest() as found:
            assert run_block_uncached(block, x_1TE, cos_1TD, sin_1TD).shape == x_1TE.shape
        # 40,960 is the context of published models; the products of 14B and 32B are the widest, stacked.
        assert tokens.max >= (2048 if config.num_experts else 40_960)
        assert found.elements <= MAX_ELEMENTS
        attentions = {name for name in found.names if "scaled_dot" in name or "sdpa" in name}
        assert attentions == {FLASH if dtype == torch.bfloat16 else "qwen3fast::sdpa"}


@pytest.mark.parametrize(("tokens", "length", "has_mask"), [(1, 40, True), (7, 40, True), (9, 9, False)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_operation_equals_pytorchs_attention(tokens, length, has_mask, kv_heads, compiling, monkeypatch):
    q_BTHD, k, v = random_tensor(2, tokens, 4, 16), *(random_tensor(2, kv_heads, length, 16, seed=s) for s in (1, 2))
    mask_BTL = (torch.arange(length) <= torch.arange(length - tokens, length)[:, None]).expand(2, -1, -1)

    def run():
        return attention.attend(q_BTHD, k, v, mask_BTL) if has_mask else attention.sdpa(q_BTHD.transpose(1, 2), k, v)

    plain = run()
    monkeypatch.setattr(cuda, "DEVICE_TYPE", "cpu")
    with Largest() as found:
        untraced = run()
    assert "qwen3fast::sdpa" in found.names
    torch.testing.assert_close(untraced, plain, rtol=0, atol=0)
    mask = mask_BTL[:, None] if has_mask else None
    torch.library.opcheck(torch.ops.qwen3fast.sdpa, (q_BTHD.transpose(1, 2), k, v, mask))
