"""In Triton's interpreter, every kernel that a test runs is checked for accesses outside of its arguments."""

from collections.abc import Iterator

import pytest
from cuda_static.program_order import watch_memory
from kernel_device import DEVICE


@pytest.fixture(autouse=True)
def watched_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The accesses outside of arguments so far; one left at the end fails the test."""
    if DEVICE == "cuda" or request.node.get_closest_marker("triton") is None:
        yield []
        return
    outside = watch_memory(monkeypatch)
    yield outside
    assert outside == []
