"""Counts of work and traffic against the exchange's own layouts, and against brute force."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_hpc.partition import Partition, SpanLayout
from longnet_hpc.pattern import Branch, Pattern
from longnet_hpc.scaling.work import attention_work, ranks_to_look_at


@st.composite
def situations(draw):
    seq_len = draw(st.integers(1, 60))
    size = draw(st.integers(1, min(seq_len, 7)))
    branches = draw(st.lists(st.builds(Branch, st.integers(1, 70), st.integers(1, 9)), min_size=1, max_size=3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1)]))
    return Pattern(tuple(branches)), Partition.even(seq_len, size), kv_heads * group, kv_heads


@settings(max_examples=300, deadline=None)
@given(situations())
def test_pairs_are_the_keys_that_queries_see(situation):
    pattern, partition, heads, kv_heads = situation
    for rank in range(partition.size):
        pairs = sum(
            1
            for branch in pattern
            for head in range(heads)
            for p in partition.slice_of(rank)
            for m in range(p - p % branch.segment_length, p + 1)
            if all(x % branch.segment_length % branch.dilation_rate == head % branch.dilation_rate for x in (p, m))
        )
        work = attention_work(pattern, partition, rank, heads, kv_heads)
        assert work.pairs == pairs
        assert work.queries == sum(
            p % branch.segment_length % branch.dilation_rate == head % branch.dilation_rate
            for branch in pattern
            for head in range(heads)
            for p in partition.slice_of(rank)
        )
    everything = sum(attention_work(pattern, partition, r, heads, kv_heads).pairs for r in range(partition.size))
    assert 4 * everything == pattern.flop(partition.stop, heads, 1, causal=True)


@settings(max_examples=300, deadline=None)
@given(situations(), st.integers(1, 3))
def test_rows_are_those_of_the_exchange(situation, ranks_per_node):
    pattern, partition, heads, kv_heads = situation
    for rank in range(partition.size):
        layouts = [
            SpanLayout(branch, span, rank, heads, kv_heads, causal=True)
            for branch in pattern
            for span in partition.spans(branch, rank)
        ]
        node = rank // ranks_per_node
        work = attention_work(pattern, partition, rank, heads, kv_heads, ranks_per_node=ranks_per_node)
        assert work.received == sum(sum(layout.recv_counts) for layout in layouts)
        assert work.sent == sum(sum(layout.send_counts) for layout in layouts)
        assert work.messages == sum(len(layout.sources) for layout in layouts)
        assert work.messages_within == sum(
            source // ranks_per_node == node for layout in layouts for source in layout.sources
        )
        assert work.received_within == sum(
            count
            for layout in layouts
            for source, count in zip(layout.span.ranks, layout.recv_counts, strict=True)
            if source // ranks_per_node == node
        )


@settings(max_examples=200, deadline=None)
@given(situations(), st.integers(0, 40), st.integers(0, 40))
def test_rows_of_chunks_are_those_left_by_other_ranks(situation, before, after):
    pattern, whole, heads, kv_heads = situation
    partition = Partition(tuple(bound + before for bound in whole.bounds))
    seq_len = partition.stop + after
    for rank in range(partition.size):
        rows = [
            p
            for branch in pattern
            if after and partition.stop % branch.segment_length
            for head in range(heads)
            for p in range(partition.start, partition.stop)
            if p // branch.segment_length == partition.stop // branch.segment_length
            and p % branch.segment_length % branch.dilation_rate == head % branch.dilation_rate
        ]
        own = sum(p in partition.slice_of(rank) for p in rows)
        work = attention_work(pattern, partition, rank, heads, kv_heads, seq_len=seq_len)
        assert work.carried == len(rows) - own
        assert work.left == own * (partition.size - 1)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(65, 8), (4096, 8), (4096, 1), (100, 100)])
def test_some_of_many_ranks_are_looked_at(size, ranks_per_node):
    ranks = ranks_to_look_at(size, ranks_per_node)
    assert {0, size - 1} <= set(ranks) <= set(range(size))
    assert len(ranks) < 20
