"""Pattern and partition against brute force over positions."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import run_python

from longnet_hpc.chunk import Chunk, chunk_bounds, kept_rows, wide_branches
from longnet_hpc.errors import PartitionError, PatternError
from longnet_hpc.grids import earlier_grids, kept_grids
from longnet_hpc.partition import Partition, Run, SpanLayout, communicator_rounds, rank_groups
from longnet_hpc.pattern import Branch, Pattern

branches = st.builds(Branch, st.integers(1, 60), st.integers(1, 15))


@st.composite
def partitions(draw):
    """Slices of one sequence, or of a sequence of packed documents."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    inner = draw(st.none() | st.lists(st.integers(0, sum(lengths)), max_size=6))
    return Partition.from_lengths(lengths, documents=() if inner is None else (0, *sorted(inner), sum(lengths)))


def in_document(partition, position):
    """Return the first position of the document of a token, and how far into it the token is."""
    first = max(start for start in (0, *partition.documents) if start <= position)
    return first, position - first


many = settings(max_examples=200, deadline=None, derandomize=True)


@many
@given(branch=branches, partition=partitions())
def test_runs_cover_each_position_once_with_its_segment_phase(branch, partition):
    for rank in range(partition.size):
        seen = []
        for run in partition.runs(branch, rank):
            for piece in range(run.count):
                for i in range(run.length):
                    position = partition.bounds[rank] + run.start + piece * run.length + i
                    assert in_document(partition, position)[1] % branch.segment_length == run.phase + i
                    seen.append(position)
        assert seen == list(partition.slice_of(rank))


@many
@given(branch=branches, partition=partitions(), heads=st.integers(1, 8))
def test_rows_of_runs_are_the_positions_on_the_grid(branch, partition, heads):
    for rank in range(partition.size):
        for h in range(heads):
            offset = h % branch.dilation_rate
            expected = [
                p
                for p in partition.slice_of(rank)
                if (in_document(partition, p)[1] % branch.segment_length) % branch.dilation_rate == offset
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
@given(branch=branches, partition=partitions())
def test_spans_are_the_segments_that_several_ranks_share_and_at_most_two(branch, partition):
    owner = [rank for rank in range(partition.size) for _ in partition.slice_of(rank)]
    touched = {}
    for position, rank in enumerate(owner):
        document, place = in_document(partition, position)
        touched.setdefault((document, place // branch.segment_length), set()).add(rank)
    for rank in range(partition.size):
        expected = [tuple(sorted(ranks)) for ranks in touched.values() if rank in ranks and len(ranks) > 1]
        spans = partition.spans(branch, rank)
        assert [span.ranks for span in spans] == expected
        assert len(spans) <= 2
        for span in spans:
            assert span.piece_of(rank) in partition.runs(branch, rank)


@many
@given(
    branch=branches, partition=partitions(), kv_heads=st.integers(1, 3), group=st.integers(1, 3), causal=st.booleans()
)
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
@given(branch=branches, partition=partitions())
def test_all_spans_are_those_of_every_rank(branch, partition):
    expected = {span for rank in range(partition.size) for span in partition.spans(branch, rank)}
    assert set(partition.all_spans(branch)) == expected


@st.composite
def chunks(draw):
    lengths, before = draw(st.lists(st.integers(0, 25), min_size=1, max_size=6)), draw(st.integers(0, 150))
    partition = Partition.from_lengths(lengths, before)
    return Chunk(partition, partition.stop + draw(st.sampled_from([0, 1, 40])))


def piece_of(chunk, rank, positions):
    """Return the one piece of positions side by side in the slice of a rank; None if there are none."""
    return None if not positions else (positions[0] - chunk.partition.bounds[rank], len(positions), 1)


def fields(run):
    return None if run is None else (run.start, run.length, run.count)


@many
@given(branch=branches, chunk=chunks())
def test_open_segments_of_a_chunk_are_those_cut_by_its_ends(branch, chunk):
    w, start, stop = branch.segment_length, chunk.partition.start, chunk.partition.stop
    before = [p for p in range(start) if p // w == start // w]
    after = [p for p in range(stop, chunk.seq_len) if p // w == stop // w]
    is_open = bool(before)
    goes_on = bool(after) and stop % w > 0
    assert chunk.tokens_before(branch) == len(before)
    assert chunk.is_left_open(branch) == goes_on
    assert chunk.is_inside(branch) == (is_open and goes_on and start // w == stop // w)
    assert list(chunk.open_segments(Pattern((branch,)))) == ([(0, start // w)] if is_open else [])
    for rank in range(chunk.partition.size):
        its = chunk.partition.slice_of(rank)
        seeing = [p for p in its if is_open and p // w == start // w]
        leaving = [p for p in its if goes_on and p // w == stop // w]
        assert fields(chunk.seeing_piece(branch, rank)) == piece_of(chunk, rank, seeing)
        assert fields(chunk.leaving_piece(branch, rank)) == piece_of(chunk, rank, leaving)
        for piece, positions in (
            (chunk.seeing_piece(branch, rank), seeing),
            (chunk.leaving_piece(branch, rank), leaving),
        ):
            assert piece is None or piece.phase == positions[0] % w


def members(grid):
    """Return the rows of each head of a grid of one piece, in the order of its heads: pairs of head and tokens."""
    assert grid.count == 1
    return [
        (
            grid.first_head + j * grid.head_step,
            [grid.start + grid.first_row + j * grid.row_step + i * grid.rate for i in range(grid.rows)],
        )
        for j in range(grid.heads)
    ]


@st.composite
def pieces(draw):
    """A branch, a piece of one of its segments, query heads and key/value heads."""
    branch = draw(branches)
    phase = draw(st.integers(0, branch.segment_length - 1))
    length = draw(st.integers(1, branch.segment_length - phase))
    kv_heads = draw(st.integers(1, 4))
    return branch, Run(draw(st.integers(0, 9)), length, 1, phase), kv_heads * draw(st.integers(1, 4)), kv_heads


def grid_rows(branch, head, first, stop):
    """Return the places within a segment, from one up to another, that are on the grid of a head."""
    return [p for p in range(first, stop) if p % branch.dilation_rate == head % branch.dilation_rate]


@many
@given(drawn=pieces(), data=st.data())
def test_each_query_sees_all_earlier_rows_of_its_head_once(drawn, data):
    branch, run, heads, _ = drawn
    tokens = data.draw(st.integers(0, run.phase))
    seen = {}
    for queries, kept in earlier_grids(branch, run, tokens, heads):
        for (head, its), (column, rows) in zip(members(queries), members(kept), strict=True):
            assert column == head
            assert head not in seen
            seen[head] = its, rows
    expected = {}
    for head in range(heads):
        before = grid_rows(branch, head, 0, tokens)
        its = [run.start + p - run.phase for p in grid_rows(branch, head, run.phase, run.phase + run.length)]
        if before and its:
            expected[head] = its, list(range(len(before)))
    assert seen == expected


@many
@given(drawn=pieces())
def test_rows_of_a_piece_are_kept_behind_those_of_the_segment_before_it(drawn):
    branch, run, heads, kv_heads = drawn
    seen = {}
    for keys, kept in kept_grids(branch, run, heads, kv_heads):
        for (kv_head, its), (head, rows) in zip(members(keys), members(kept), strict=True):
            assert kv_head == head // (heads // kv_heads)
            assert head not in seen
            seen[head] = its, rows
    expected = {}
    for head in range(heads):
        before = len(grid_rows(branch, head, 0, run.phase))
        its = [run.start + p - run.phase for p in grid_rows(branch, head, run.phase, run.phase + run.length)]
        if its:
            expected[head] = its, list(range(before, before + len(its)))
    assert seen == expected


@many
@given(seq_len=st.integers(1, 300), chunk_len=st.integers(1, 320), branch=branches, other=branches)
def test_wide_branches_have_a_segment_open_at_the_end_of_some_chunk(seq_len, chunk_len, branch, other):
    ends = chunk_bounds(seq_len, chunk_len)[1:-1]
    expected = [n for n, b in enumerate((branch, other)) if any(stop % b.segment_length for stop in ends)]
    assert list(wide_branches(Pattern((branch, other)), chunk_len, seq_len)) == expected
    for b in (branch, other):
        segments = [
            range(start, min(start + b.segment_length, seq_len)) for start in range(0, seq_len, b.segment_length)
        ]
        most = max(len(grid_rows(b, 0, 0, len(segment))) for segment in segments)
        assert kept_rows(b, seq_len) == most


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


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ((0, 3, 8), "must lie from 0 to 9, the tokens there are, got 0 to 8"),
        ((0, 5, 3, 9), "must begin one after another, got 3 after 5"),
    ],
)
def test_documents_that_do_not_fit_raise(documents, words):
    with pytest.raises(PartitionError, match=words):
        Partition((0, 4, 9), documents)


def test_partitions_of_the_same_documents_are_equal():
    assert Partition((0, 9), (0, 0, 4, 4, 9)) == Partition((0, 9), (0, 4, 9))
    assert Partition((0, 9), (0, 9, 9)) == Partition((0, 9))


def test_geometry_needs_neither_torch_nor_mpi():
    code = (
        "import sys, longnet_hpc.partition, longnet_hpc.config;"
        "assert not {'torch', 'mpi4py', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = run_python("-c", code, timeout=180)
    assert done.returncode == 0, done.stderr
