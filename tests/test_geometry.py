"""Pattern and partition against brute force over positions."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_hpc.errors import PartitionError, PatternError
from longnet_hpc.partition import Partition, SpanLayout, communicator_rounds, rank_groups
from longnet_hpc.pattern import Branch, Pattern

branches = st.builds(Branch, st.integers(1, 60), st.integers(1, 15))
partitions = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(Partition.from_lengths)
many = settings(max_examples=200, deadline=None, derandomize=True)


@many
@given(branch=branches, partition=partitions)
def test_runs_cover_each_position_once_with_its_segment_phase(branch, partition):
    for rank in range(partition.size):
        seen = []
        for run in partition.runs(branch, rank):
            for piece in range(run.count):
                for i in range(run.length):
                    position = partition.bounds[rank] + run.start + piece * run.length + i
                    assert position % branch.segment_length == run.phase + i
                    seen.append(position)
        assert seen == list(partition.slice_of(rank))


@many
@given(branch=branches, partition=partitions, heads=st.integers(1, 8))
def test_rows_of_runs_are_the_positions_on_the_grid(branch, partition, heads):
    for rank in range(partition.size):
        for h in range(heads):
            offset = h % branch.dilation_rate
            expected = [
                p for p in partition.slice_of(rank) if (p % branch.segment_length) % branch.dilation_rate == offset
            ]
            found = [
                partition.bounds[rank]
                + run.start
                + piece * run.length
                + run.first_row(branch, offset)
                + row * branch.dilation_rate
                for run in partition.runs(branch, rank)
                for piece in range(run.count)
                for row in range(run.rows(branch, offset))
            ]
            assert found == expected
            if expected:
                assert offset in branch.offsets(heads)


@many
@given(branch=branches, partition=partitions)
def test_spans_are_the_segments_that_several_ranks_share_and_at_most_two(branch, partition):
    owner = [rank for rank in range(partition.size) for _ in partition.slice_of(rank)]
    touched = {}
    for position, rank in enumerate(owner):
        touched.setdefault(position // branch.segment_length, set()).add(rank)
    for rank in range(partition.size):
        expected = [tuple(sorted(ranks)) for ranks in touched.values() if rank in ranks and len(ranks) > 1]
        spans = partition.spans(branch, rank)
        assert [span.ranks for span in spans] == expected
        assert len(spans) <= 2
        for span in spans:
            assert span.piece_of(rank) in partition.runs(branch, rank)


@many
@given(branch=branches, partition=partitions, kv_heads=st.integers(1, 3), group=st.integers(1, 3), causal=st.booleans())
def test_what_one_rank_sends_is_what_the_other_expects(branch, partition, kv_heads, group, causal):
    layouts = {}
    for rank in range(partition.size):
        for span in partition.spans(branch, rank):
            layouts[span, rank] = SpanLayout(branch, span, rank, kv_heads * group, kv_heads, causal=causal)
    for (span, rank), layout in layouts.items():
        for i, other in enumerate(span.ranks):
            assert layout.send_counts[i] == layouts[span, other].recv_counts[span.ranks.index(rank)]
            if layout.send_counts[i]:
                assert other != rank
                assert other > rank or not causal


@many
@given(groups=st.lists(st.sets(st.integers(0, 9), min_size=2).map(lambda s: tuple(sorted(s))), unique=True))
def test_each_group_is_made_in_one_round_of_disjoint_groups(groups):
    rounds = communicator_rounds(groups)
    assert sorted(group for members in rounds for group in members) == sorted(groups)
    for members in rounds:
        assert max(Counter(rank for group in members for rank in group).values()) == 1


@many
@given(branch=branches, partition=partitions)
def test_all_spans_are_those_of_every_rank(branch, partition):
    expected = {span for rank in range(partition.size) for span in partition.spans(branch, rank)}
    assert set(partition.all_spans(branch)) == expected


def test_rank_groups_of_a_chain_need_two_rounds():
    groups = rank_groups(Pattern.from_lists([10], [1]), Partition.from_lengths([15] * 8))
    assert groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    chain = rank_groups(Pattern.from_lists([10], [1]), Partition.from_lengths([14] * 4))
    assert len(communicator_rounds(chain)) == 2


@many
@given(seq_len=st.integers(1, 10**10), size=st.integers(1, 64))
def test_even_slices_differ_by_at_most_one_token(seq_len, size):
    if seq_len < size:
        with pytest.raises(PartitionError, match="cannot be cut"):
            Partition.even(seq_len, size)
        return
    partition = Partition.even(seq_len, size)
    lengths = {len(partition.slice_of(rank)) for rank in range(size)}
    assert partition.stop == seq_len
    assert max(lengths) - min(lengths) <= 1


def test_geometric_pattern_reaches_a_billion_tokens():
    pattern = Pattern.geometric(10**9, base=2048, ratio=4)
    assert pattern.segment_lengths[-1] >= 10**9 > pattern.segment_lengths[-2]
    assert all(w == 2048 * r for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(branch=branches, seq=st.integers(1, 90), heads=st.integers(1, 6), causal=st.booleans())
def test_flop_counts_every_visible_pair(branch, seq, heads, causal):
    w, r = branch.segment_length, branch.dilation_rate
    pairs = 0
    for h in range(heads):
        grid = [p for p in range(seq) if (p % w) % r == h % r]
        pairs += sum(1 for n in grid for m in grid if n // w == m // w and (m <= n or not causal))
    assert Pattern((branch,)).flop(seq, heads, 8, causal=causal) == 4 * 8 * pairs


@pytest.mark.parametrize("bounds", [(), (0,), (-1, 2), (0, 5, 3)])
def test_bounds_that_are_no_partition_raise(bounds):
    with pytest.raises(PartitionError, match="must be at least 0 and never fall"):
        Partition(bounds)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1, 2), "seq_len of a geometric pattern must be at least 1, got 0"),
        ((1, 0, 2), "base of a geometric pattern must be at least 1, got 0"),
        ((1, 1, 1), "ratio of a geometric pattern must be at least 2, got 1"),
        ((10.5, 1, 2), "must be an integer, got 10.5"),
        (("10", 1, 2), "must be an integer, got '10'"),
    ],
)
def test_impossible_geometric_pattern_raises(arguments, words):
    with pytest.raises(PatternError, match=words):
        Pattern.geometric(*arguments)


def test_pattern_of_anything_but_branches_raises():
    with pytest.raises(PatternError, match="made of branches, got 1"):
        Pattern((1, 2))


@pytest.mark.parametrize("lengths", [(3, -1), (2.5, 3)])
def test_slices_of_impossible_lengths_raise(lengths):
    with pytest.raises(PartitionError, match="integers of at least 0 tokens"):
        Partition.from_lengths(lengths)


def test_geometry_needs_neither_torch_nor_mpi():
    import subprocess
    import sys

    code = (
        "import sys, longnet_hpc.partition, longnet_hpc.config;"
        "assert not {'torch', 'mpi4py', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
