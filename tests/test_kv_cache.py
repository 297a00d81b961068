"""StaticKVCache: sizes, buckets and refusals."""

import pytest
import torch

import qwen3fast.kv_cache
from qwen3fast.config import ModelConfig
from qwen3fast.kv_cache import StaticKVCache

CONFIG = ModelConfig(100, 32, 64, 3, 4, 2, 16)
CPU = torch.device("cpu")


def test_cache_num_bytes_is_what_it_allocates():
    cache = StaticKVCache(CONFIG, 2, 300, torch.bfloat16, CPU)
    assert cache.num_bytes == sum(t.numel() * t.element_size() for t in cache.keys + cache.values)


def test_cache_starts_finite():
    cache = StaticKVCache(CONFIG, 1, 10, torch.float32, CPU)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in cache.keys + cache.values)


@pytest.mark.parametrize(("used", "bucket"), [(1, 128), (128, 128), (129, 256), (300, 384), (384, 384)])
def test_bucket_covers_the_used_length(used, bucket):
    assert StaticKVCache(CONFIG, 1, 300, torch.float32, CPU).bucket(used) == bucket


@pytest.mark.parametrize("used", [0, 385])
def test_bucket_refuses_what_does_not_fit(used):
    with pytest.raises(ValueError, match=f"{used} positions do not fit"):
        StaticKVCache(CONFIG, 1, 300, torch.float32, CPU).bucket(used)


def test_cache_refuses_more_than_the_memory_with_the_arithmetic():
    with pytest.raises(MemoryError, match=r"2 \(keys, values\) x 3 layers x 1000000 rows .* = .* GB, but cpu has"):
        StaticKVCache(CONFIG, 1_000_000, 1_000_000, torch.float32, CPU)


def test_cache_is_not_refused_where_free_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(qwen3fast.kv_cache, "free_bytes", lambda device: None)
    assert StaticKVCache(CONFIG, 1, 10, torch.float32, CPU).allocated_len == 128


@pytest.mark.parametrize("field", ["max_batch_size", "max_seq_len"])
def test_cache_refuses_sizes_below_one(field):
    sizes = {"max_batch_size": 1, "max_seq_len": 1} | {field: 0}
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        StaticKVCache(CONFIG, dtype=torch.float32, device=CPU, **sizes)
