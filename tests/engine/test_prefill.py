"""Splitting prompts into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.engine.parts import CHUNK_SIZES, CPU_CHUNK_SIZES
from qwen3fast.engine.prefill import split_into_chunks


@pytest.mark.parametrize("sizes", [CHUNK_SIZES, CPU_CHUNK_SIZES])
@given(blocks=st.integers(1, 40), data=st.data())
def test_chunks_cover_the_prompt_and_fit_the_cache(sizes, blocks, data):
    room = 128 * blocks
    num_tokens = data.draw(st.integers(1, room))
    chunks = split_into_chunks(num_tokens, room, sizes)
    assert set(chunks) <= set(sizes)
    assert sum(chunks[:-1]) < num_tokens <= sum(chunks) <= room


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [(1, [32]), (33, [64]), (70, [64, 32]), (512, [512]), (600, [512, 128]), (300, [256, 64]), (256, [256])],
)
def test_chunks_are_padded_where_that_is_cheaper_than_one_more(num_tokens, chunks):
    assert split_into_chunks(num_tokens, 4096) == chunks


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [(1, [8]), (9, [16]), (33, [48]), (70, [96]), (130, [128, 8]), (300, [256, 48]), (390, [384, 8]), (512, [512])],
)
def test_chunks_on_cpus_have_less_padding(num_tokens, chunks):
    assert split_into_chunks(num_tokens, 4096, CPU_CHUNK_SIZES) == chunks


def test_chunks_stay_narrow_where_room_is_short():
    assert sum(split_into_chunks(300, 384)) <= 384
