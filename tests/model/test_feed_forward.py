"""The feed-forward part against loops over plain numbers."""

import math

import torch
from conftest import assert_near, assert_same, fill_randomly, random_tensor

from qwen3fast.model import FeedForward


def random_feed_forward() -> FeedForward:
    """A feed-forward part with random weights."""
    feed_forward = FeedForward(6, 10)
    fill_randomly(feed_forward)
    return feed_forward


def reference_feed_forward(feed_forward: FeedForward, x: list[float]) -> list[float]:
    """down(silu(gate(x)) * up(x)) of one vector, in Python's floats."""

    def product(weight: torch.Tensor, vector: list[float]) -> list[float]:
        return [sum(w * v for w, v in zip(row, vector, strict=True)) for row in weight.tolist()]

    gate = product(feed_forward.gate_proj.weight, x)
    up = product(feed_forward.up_proj.weight, x)
    hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    return product(feed_forward.down_proj.weight, hidden)


def test_feed_forward_equals_loops():
    feed_forward, x_BTE = random_feed_forward(), random_tensor(2, 3, 6)
    expected = [[reference_feed_forward(feed_forward, token) for token in row] for row in x_BTE.tolist()]
    assert_near(feed_forward(x_BTE), torch.tensor(expected))


def test_feed_forward_looks_at_one_position_at_a_time():
    feed_forward, x_BTE = random_feed_forward(), random_tensor(1, 4, 6)
    changed = x_BTE.clone()
    changed[:, 2] += 1.0
    assert_same(feed_forward(changed)[:, [0, 1, 3]], feed_forward(x_BTE)[:, [0, 1, 3]])


def test_feed_forward_has_no_biases():
    names = {name for name, _ in random_feed_forward().named_parameters()}
    assert names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
