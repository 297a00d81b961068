"""StaticKVCache: sizes, buckets and refusals. CacheLayer: what is written is read, in int8 up to rounding."""

import math

import pytest
import torch
from conftest import assert_same, random_tensor
from torch import Tensor

import qwen3fast.model.kv_cache
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import CacheLayer, StaticKVCache, parse_cache_dtype, quantize_vectors

CONFIG = ModelConfig(100, 32, 64, 3, 4, 2, 16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_cache_num_bytes_is_what_it_allocates(dtype):
    cache = StaticKVCache(CONFIG, 2, 300, dtype, CPU)
    tensors = cache.keys + cache.values + cache.key_scales + cache.value_scales
    assert cache.num_bytes == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_cache_starts_finite(dtype):
    cache = StaticKVCache(CONFIG, 1, 10, dtype, CPU)
    for layer in cache.layers():
        for x_BKLD in layer.read(1, 10, torch.float32):
            assert_same(x_BKLD, torch.zeros(1, 2, 10, 16))


@pytest.mark.parametrize(("used", "bucket"), [(1, 128), (128, 128), (129, 256), (300, 384), (384, 384)])
def test_bucket_covers_the_used_length(used, bucket):
    assert StaticKVCache(CONFIG, 1, 300, torch.float32, CPU).bucket(used) == bucket


def test_buckets_on_cuda_are_fewer_and_cover_all(monkeypatch):
    # Tensors on "meta" stand for those on CUDA.
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **rest: zeros(*shape, device="meta", **rest))
    monkeypatch.setattr(qwen3fast.model.kv_cache, "free_bytes", lambda device: None)
    cache = StaticKVCache(CONFIG, 1, 2400, torch.float32, torch.device("cuda"))
    assert cache.buckets == [128, 256, 384, 512, 768, 1024, 1536, 2048, 2432]
    assert [cache.bucket(n) for n in (1, 128, 129, 513, 2049, 2432)] == [128, 128, 256, 768, 2432, 2432]


@pytest.mark.parametrize("used", [0, 385])
def test_bucket_refuses_what_does_not_fit(used):
    with pytest.raises(ValueError, match=f"{used} positions do not fit"):
        StaticKVCache(CONFIG, 1, 300, torch.float32, CPU).bucket(used)


def test_cache_refuses_more_than_the_memory_with_the_arithmetic():
    with pytest.raises(MemoryError, match=r"2 \(keys, values\) x 3 layers x 1000000 slots .* = .* GB, but cpu has"):
        StaticKVCache(CONFIG, 1_000_000, 1_000_000, torch.float32, CPU)


def test_cache_is_not_refused_where_free_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(qwen3fast.model.kv_cache, "free_bytes", lambda device: None)
    assert StaticKVCache(CONFIG, 1, 10, torch.float32, CPU).allocated_len == 128


@pytest.mark.parametrize("field", ["max_batch_size", "max_seq_len"])
def test_cache_refuses_sizes_below_one(field):
    sizes = {"max_batch_size": 1, "max_seq_len": 1} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        StaticKVCache(CONFIG, dtype=torch.float32, device=CPU, **sizes)


def write_and_read(cache, k_BTKD, v_BTKD, position_BT, length):
    """Write and read as a cached call does before attention."""
    cache.write(k_BTKD, v_BTKD, position_BT)
    return cache.read(len(k_BTKD), length, k_BTKD.dtype)


def numbered_cache(row_B: Tensor | None) -> CacheLayer:
    """Three rows, two heads, five slots, D = 2; every number is different and below 60."""
    k_RKSD = torch.arange(60.0).view(3, 2, 5, 2)
    return CacheLayer(k_RKSD, k_RKSD + 0.5, row_B)


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_write_and_read_puts_each_token_in_its_slot(rows):
    cache = numbered_cache(None if rows is None else torch.tensor(rows))
    expected_k, expected_v = cache.k_RKSD.clone(), cache.v_RKSD.clone()
    k_BTKD, v_BTKD = 100 + random_tensor(2, 2, 2, 2), 200 + random_tensor(2, 2, 2, 2)
    position_BT = torch.tensor([[3, 1], [0, 4]])
    for b, row in enumerate(rows or [0, 1]):
        for t in range(2):
            expected_k[row, :, position_BT[b, t]] = k_BTKD[b, t]
            expected_v[row, :, position_BT[b, t]] = v_BTKD[b, t]
    write_and_read(cache, k_BTKD, v_BTKD, position_BT, length=5)
    assert_same(torch.stack([cache.k_RKSD, cache.v_RKSD]), torch.stack([expected_k, expected_v]))


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_write_and_read_returns_the_first_positions_of_the_rows_in_use(rows):
    cache = numbered_cache(None if rows is None else torch.tensor(rows))
    new = torch.zeros(2, 1, 2, 2)
    k_BKLD, v_BKLD = write_and_read(cache, new, new, torch.tensor([[0], [1]]), length=3)
    used = rows or [0, 1]
    assert_same(k_BKLD, cache.k_RKSD[used, :, :3])
    assert_same(v_BKLD, cache.v_RKSD[used, :, :3])


def test_write_and_read_without_row_numbers_copies_nothing():
    cache, new = numbered_cache(None), torch.zeros(2, 1, 2, 2)
    k_BKLD, v_BKLD = write_and_read(cache, new, new, torch.zeros(2, 1, dtype=torch.int64), length=3)
    assert (k_BKLD.data_ptr(), v_BKLD.data_ptr()) == (cache.k_RKSD.data_ptr(), cache.v_RKSD.data_ptr())


def test_write_and_read_converts_to_the_dtype_of_the_cache():
    cache = CacheLayer(torch.zeros(1, 2, 3, 2).bfloat16(), torch.zeros(1, 2, 3, 2).bfloat16())
    new = random_tensor(1, 1, 2, 2)
    k_BKLD, _ = write_and_read(cache, new, new, torch.zeros(1, 1, dtype=torch.int64), length=1)
    assert_same(k_BKLD[:, :, 0], new[:, 0].bfloat16().float())  # rounded when stored, read as asked


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_int8_gives_back_what_was_written_up_to_half_a_step(rows):
    row_B = None if rows is None else torch.tensor(rows)
    cache = StaticKVCache(CONFIG, 3, 10, torch.int8, CPU).layers(row_B)[1]
    k_BTKD = random_tensor(2, 4, 2, 16) * 10.0 ** torch.arange(4).view(4, 1, 1)  # tokens of very different sizes
    v_BTKD = random_tensor(2, 4, 2, 16, seed=1)
    position_BT = torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]])
    for x_BKLD, x_BTKD in zip(write_and_read(cache, k_BTKD, v_BTKD, position_BT, 6), (k_BTKD, v_BTKD), strict=True):
        read_BTKD = torch.stack([x_BKLD[b, :, position_BT[b]].transpose(0, 1) for b in range(2)])
        half_step = x_BTKD.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((read_BTKD - x_BTKD).abs() <= half_step * 1.0001).all()
        assert not torch.equal(read_BTKD, x_BTKD)


def test_quantize_vectors_keeps_the_largest_number_zero_and_what_is_not_finite():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0]])
    level, scale = quantize_vectors(x)
    assert level[0].tolist() == [64, -127, 32] and level[1].tolist() == [0, 0, 0]
    assert math.isclose(scale[0], 2 / 127, rel_tol=1e-6) and scale[1] == 0
    assert not scale[2:].isfinite().any()


def test_parse_cache_dtype():
    assert parse_cache_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert parse_cache_dtype("int8", torch.bfloat16) == torch.int8
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, int8, got 'fp8'"):
        parse_cache_dtype("fp8", torch.bfloat16)
