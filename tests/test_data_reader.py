import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import overwrite_tokens, prepare_on_threads, random_bytes
from launching import slowness

from longnet_hpc.data import Corpus, SequenceReader, prepare, sequence_count
from longnet_hpc.data.reader import Permutation
from longnet_hpc.errors import ConfigError, CorpusError, PartitionError
from longnet_hpc.partition import Partition

SEQ_LEN, BATCH_SIZE, SEQUENCES = 50, 3, 20
BATCHES = SEQUENCES // BATCH_SIZE
CONTENT = random_bytes(SEQUENCES * SEQ_LEN + 7, seed=5)


@pytest.fixture(params=[1, 3])
def corpus(request, tmp_path):
    (tmp_path / "text").write_bytes(CONTENT[:400])
    (tmp_path / "more").write_bytes(CONTENT[400:])
    sources = [tmp_path / "text", tmp_path / "more"]
    path = prepare_on_threads(request.param, sources, tmp_path / "corpus.h5", chunk_tokens=64)
    with Corpus(path) as opened:
        yield opened


def open_reader(corpus, **changes):
    options = {"seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "slice_of": range(SEQ_LEN), "seed": 1, "shuffle": True}
    return SequenceReader(corpus, **(options | changes))


def take(reader, count):
    with reader:
        return list(itertools.islice(reader, count))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        for tensor, same in zip(batch, other, strict=True):
            assert tensor.dtype == same.dtype == torch.uint8
            assert torch.equal(tensor, same)


def text_of(rows):
    return [bytes(row.tolist()) for row in rows]


def test_sequential_batches_equal_the_text_in_order(corpus):
    batches = take(open_reader(corpus, shuffle=False), 2 * BATCHES)
    starts = [sequence * SEQ_LEN for sequence in range(BATCHES * BATCH_SIZE)] * 2
    inputs = [row for batch, _ in batches for row in text_of(batch)]
    targets = [row for _, batch in batches for row in text_of(batch)]
    assert inputs == [CONTENT[start : start + SEQ_LEN] for start in starts]
    assert targets == [CONTENT[start + 1 : start + SEQ_LEN + 1] for start in starts]


def test_shuffled_epochs_deliver_each_sequence_at_most_once_in_new_orders(corpus):
    all_sequences = [CONTENT[start : start + SEQ_LEN] for start in range(0, SEQUENCES * SEQ_LEN, SEQ_LEN)]
    batches = take(open_reader(corpus), 4 * BATCHES)
    orders = []
    for epoch in range(4):
        rows = [row for inputs, _ in batches[epoch * BATCHES : (epoch + 1) * BATCHES] for row in text_of(inputs)]
        orders.append([all_sequences.index(row) for row in rows])
        assert len(set(orders[-1])) == len(orders[-1]) == BATCHES * BATCH_SIZE
        assert orders[-1] != sorted(orders[-1])
    assert len({tuple(order) for order in orders}) == 4
    assert {sequence for order in orders for sequence in order} == set(range(SEQUENCES))


def test_seed_alone_chooses_the_order(corpus):
    first, again, other = (take(open_reader(corpus, seed=seed), BATCHES) for seed in (1, 1, 2))
    assert_same(first, again)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("lengths", [[50], [25, 25], [17, 17, 16], [1, 0, 40, 9], [0, 0, 50, 0]])
def test_slices_of_ranks_joined_equal_the_whole(corpus, lengths):
    partition = Partition.from_lengths(lengths)
    whole = take(open_reader(corpus), BATCHES + 2)
    slices = [take(open_reader(corpus, slice_of=partition.slice_of(rank)), BATCHES + 2) for rank in range(len(lengths))]
    joined = [
        tuple(torch.cat(parts, dim=1) for parts in zip(*batch, strict=True)) for batch in zip(*slices, strict=True)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("start_batch", [0, 1, BATCHES - 1, BATCHES, BATCHES + 1, 3 * BATCHES + 2])
def test_resumed_reader_goes_on_with_the_same_batches(corpus, start_batch):
    whole = take(open_reader(corpus), 5 * BATCHES)
    reader = open_reader(corpus, start_batch=start_batch)
    assert reader.batch_index == start_batch
    assert_same(take(reader, BATCHES), whole[start_batch : start_batch + BATCHES])
    assert reader.batch_index == start_batch + BATCHES


@pytest.mark.parametrize("shuffle", [False, True])
def test_prefetched_batches_equal_those_read_at_once(corpus, shuffle):
    prefetched = take(open_reader(corpus, shuffle=shuffle, prefetch=True), 3 * BATCHES)
    assert_same(prefetched, take(open_reader(corpus, shuffle=shuffle, prefetch=False), 3 * BATCHES))


def test_next_batch_is_read_before_it_is_asked_for(corpus, monkeypatch):
    done = threading.Event()
    with open_reader(corpus) as reader:
        next(reader)
        load = reader.window

        def watched(batch_index):
            window = load(batch_index)
            if batch_index == 2:
                done.set()
            return window

        monkeypatch.setattr(reader, "window", watched)
        next(reader)
        assert reader.batch_index == 2
        assert done.wait(10)


def test_window_is_the_batch_as_stored(corpus):
    with open_reader(corpus, slice_of=range(10, 30)) as reader:
        inputs, targets = next(reader)
        window = reader.window(0)
    assert window.dtype == np.uint8
    assert window[:, :-1].tolist() == inputs.tolist()
    assert window[:, 1:].tolist() == targets.tolist()


def test_damage_surfaces_in_next_and_the_thread_ends(tmp_path):
    (tmp_path / "text").write_bytes(CONTENT)
    path = prepare([tmp_path / "text"], tmp_path / "corpus.h5", chunk_tokens=SEQ_LEN)
    overwrite_tokens(path, 6 * SEQ_LEN + 5, bytes([CONTENT[6 * SEQ_LEN + 5] ^ 1]))
    with Corpus(path) as corpus:
        with open_reader(corpus, shuffle=False) as reader:
            next(reader)  # sequences 0 to 2, and the first token of chunk 3
            for _ in range(2):
                with pytest.raises(CorpusError, match=r"chunk 6, tokens \[300, 350\), is damaged"):
                    next(reader)
            assert reader.batch_index == 1
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("sequence-reader")]


def test_close_ends_the_thread_and_may_be_repeated(corpus):
    for taken in (0, 1):
        reader = open_reader(corpus)
        for _ in range(taken):
            next(reader)
        assert [thread for thread in threading.enumerate() if thread.name.startswith("sequence-reader")]
        reader.close()
        reader.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("sequence-reader")]


def test_corpus_shorter_than_a_batch_is_one_line(tmp_path):
    (tmp_path / "text").write_bytes(CONTENT[: BATCH_SIZE * SEQ_LEN])
    with (
        Corpus(prepare([tmp_path / "text"], tmp_path / "corpus.h5")) as corpus,
        pytest.raises(CorpusError) as caught,
    ):
        open_reader(corpus)
    assert str(caught.value) == (
        "corpus has 150 tokens; needs at least 151 for batch_size 3 of seq_len 50; lower --seq-len or prepare more text"
    )
    (tmp_path / "text").write_bytes(CONTENT[: BATCH_SIZE * SEQ_LEN + 1])
    with Corpus(prepare([tmp_path / "text"], tmp_path / "corpus.h5", overwrite=True)) as corpus:
        (inputs, targets), again = take(open_reader(corpus, shuffle=False), 2)
        assert b"".join(text_of(inputs)) == CONTENT[:150]
        assert targets[-1, -1] == CONTENT[150]
        assert_same([again], [(inputs, targets)])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seq_len": 0, "slice_of": range(0)}, ConfigError, "seq_len must be at least 1, got 0"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
        ({"start_batch": -1}, ConfigError, "start_batch must be at least 0, got -1"),
        ({"seed": -1}, ConfigError, "seed must be 0 to 18446744073709551615, got -1"),
        ({"slice_of": range(1, 51)}, PartitionError, r"within range\(50\), got range\(1, 51\)"),
        ({"slice_of": range(0, 50, 2)}, PartitionError, r"within range\(50\), got range\(0, 50, 2\)"),
    ],
)
def test_bad_option_is_one_line(corpus, changes, error, message):
    with pytest.raises(error, match=message):
        open_reader(corpus, **changes)


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 0), (10, 0), (11, 1), (20, 1), (21, 2)])
def test_sequence_count_leaves_room_for_the_last_target(tokens, count):
    assert sequence_count(tokens, 10) == count


@pytest.mark.parametrize("count", [*range(1, 40), 255, 256, 257, 1000])
def test_permutation_is_one(count):
    order = Permutation(count, seed=3, epoch=1)
    assert sorted(order[position] for position in range(count)) == list(range(count))
    with pytest.raises(IndexError):
        order[count]


def test_permutation_is_the_same_in_every_version():
    """A run that is resumed elsewhere goes on with the same order: these numbers must never change."""
    assert [Permutation(10, seed=0, epoch=0)[position] for position in range(10)] == [3, 5, 7, 8, 2, 9, 6, 0, 4, 1]
    assert Permutation(10**12, seed=2**64 - 1, epoch=5)[123] == 270963476872


def test_permutation_is_uniform():
    """Where a position lands, and how far apart two neighbours land, is even over many epochs."""
    count, epochs = 37, 3000
    orders = [Permutation(count, seed=9, epoch=epoch) for epoch in range(epochs)]
    for values in (
        [order[0] for order in orders],
        [order[36] for order in orders],
        [(order[1] - order[0]) % count for order in orders],
    ):
        seen = np.bincount(values, minlength=count)
        cells = seen[seen > 0] if seen[0] == 0 else seen
        expected = epochs / len(cells)
        chi_squared = ((cells - expected) ** 2 / expected).sum()
        assert chi_squared < 80  # 36 degrees of freedom: exceeded by chance once in 30,000


def test_reader_is_not_many_times_slower_than_it_was(tmp_path):
    """One core delivers more than 1 GB/s of verified tensors; a fifth of that, at best, is no slow day but a defect."""
    size, tries = 1 << 25, []
    (tmp_path / "text").write_bytes(bytes(size))
    path = prepare([tmp_path / "text"], tmp_path / "corpus.h5")
    for _ in range(5):
        with (
            Corpus(path) as corpus,
            open_reader(corpus, seq_len=1 << 16, batch_size=8, slice_of=range(1 << 16)) as reader,
        ):
            begin = time.perf_counter()
            for _ in range(reader.batches_per_epoch):
                next(reader)
            tries.append(reader.batches_per_epoch * 8 * (1 << 16) / (time.perf_counter() - begin))
    assert max(tries) > 200e6 / slowness()


@pytest.mark.parametrize(("stored", "computed"), [("<u1", torch.uint8), ("<u2", torch.int32), ("<u4", torch.int64)])
def test_batches_have_the_narrowest_dtype_that_torch_computes_with(stored, computed):
    tokens = np.arange(33, dtype=stored)
    tokens[7] = np.iinfo(stored).max
    corpus = SimpleNamespace(num_tokens=33, dtype=tokens.dtype, read=lambda start, stop: tokens[start:stop])
    ((inputs, targets),) = take(open_reader(corpus, seq_len=16, batch_size=2, slice_of=range(4, 16), shuffle=False), 1)
    assert inputs.dtype == targets.dtype == computed
    assert inputs.tolist() == [tokens[first : first + 12].tolist() for first in (4, 20)]
    assert targets.tolist() == [tokens[first : first + 12].tolist() for first in (5, 21)]
