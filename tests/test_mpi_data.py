import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import names_in, overwrite_tokens, random_bytes, write_sources

from longnet_hpc import Partition
from longnet_hpc.data import Corpus, SequenceReader, prepare
from longnet_hpc.errors import ConfigError, CorpusError

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture
def sources(comm, shared_tmp_path):
    """Sources of every kind, and the documents that they hold; written by rank 0."""
    written = write_sources(shared_tmp_path) if comm.rank == 0 else None
    return comm.bcast(written)


def failure_of(comm, sources, path, **options):
    """What prepare raises on every rank, as (type, message)."""
    error = None
    try:
        prepare(sources, path, comm=comm, **options)
    except (ConfigError, CorpusError) as caught:
        error = (type(caught), str(caught))
    return comm.allgather(error)


def test_tokens_and_documents_equal_the_sources(comm, sources, shared_tmp_path):
    names, documents = sources
    path = prepare(names, shared_tmp_path / "out" / "corpus.h5", comm=comm, chunk_tokens=1000)
    with Corpus(path) as corpus:
        found = (
            corpus.read(0, corpus.num_tokens).tobytes(),
            np.diff(corpus.document_offsets).tolist(),
            [corpus.document_name(i) for i in range(corpus.num_documents)],
            len(corpus.shards),
        )
    expected = (
        b"".join(content for _, content in documents),
        [len(content) for _, content in documents],
        [name for name, _ in documents],
    )
    seen = comm.allgather(found)
    assert all(one[:3] == expected for one in seen)
    assert all(1 < one[3] <= comm.size for one in seen)
    assert len(comm.bcast(names_in(path.parent))) == 1 + seen[0][3]


def test_one_source_is_one_file_whichever_rank_writes_it(comm, shared_tmp_path):
    content = random_bytes(5000, 1)
    if comm.rank == 0:
        (shared_tmp_path / "text").write_bytes(content)
    comm.Barrier()
    path = prepare([shared_tmp_path / "text"], shared_tmp_path / "out" / "corpus.h5", comm=comm)
    with Corpus(path) as corpus:
        found = corpus.read(0, corpus.num_tokens).tobytes(), [shard.name for shard in corpus.shards]
    names = comm.bcast(names_in(path.parent))
    assert comm.allgather((found, names)) == [((content, ["corpus.h5"]), ["corpus.h5"])] * comm.size


def test_standard_input_is_read_by_rank_0_wherever_it_stands(comm, shared_tmp_path, monkeypatch):
    content = random_bytes(3000, comm.rank)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    if comm.rank == 0:
        (shared_tmp_path / "text").write_bytes(b"before " * 1000)
    comm.Barrier()
    path = prepare([shared_tmp_path / "text", "-"], shared_tmp_path / "corpus.h5", comm=comm)
    with Corpus(path) as corpus:
        found = corpus.read(0, corpus.num_tokens).tobytes()
    assert comm.allgather(found) == [b"before " * 1000 + comm.bcast(content)] * comm.size


def test_failure_of_one_rank_is_the_same_line_on_all_and_leaves_nothing(comm, sources, shared_tmp_path):
    if comm.rank == 0:
        (shared_tmp_path / "z.gz").write_bytes(b"not compressed")  # the last source, so the last rank meets it
    comm.Barrier()
    names = [*sources[0], shared_tmp_path / "z.gz"]
    failures = failure_of(comm, names, shared_tmp_path / "out" / "corpus.h5")
    assert failures[0][0] is CorpusError
    assert failures[0][1].startswith(f"cannot read {shared_tmp_path / 'z.gz'}: Not a gzipped file")
    assert failures == [failures[0]] * comm.size
    assert comm.bcast(names_in(shared_tmp_path / "out")) == []


@pytest.mark.parametrize(
    ("names", "options", "kind", "message"),
    [
        (["missing"], {}, CorpusError, "source missing does not exist"),
        ([], {}, CorpusError, "there are no sources"),
        (["text"], {"tokenizer": "none.json"}, ConfigError, "tokenizer must be 'bytes' or a JSON file"),
        (["text"], {"chunk_tokens": -3}, ConfigError, "chunk_tokens must be 1 to 268435456, got -3"),
        (["empty"], {}, CorpusError, "the sources have no text"),
    ],
)
def test_bad_input_is_the_same_line_on_all_ranks(comm, shared_tmp_path, monkeypatch, names, options, kind, message):
    if comm.rank == 0:
        (shared_tmp_path / "text").write_bytes(b"text")
        (shared_tmp_path / "empty").write_bytes(b"")
    comm.Barrier()
    monkeypatch.chdir(shared_tmp_path)
    failures = failure_of(comm, names, shared_tmp_path / "corpus.h5", **options)
    assert failures[0][0] is kind
    assert failures[0][1].startswith(message)
    assert failures == [failures[0]] * comm.size
    comm.Barrier()
    assert names_in(shared_tmp_path) == ["empty", "text"]


def test_existing_corpus_survives_a_refusal_and_a_replacement_leaves_no_old_shards(comm, sources, shared_tmp_path):
    path = prepare(sources[0], shared_tmp_path / "out" / "corpus.h5", comm=comm)
    failures = failure_of(comm, sources[0], path)
    assert failures == [(CorpusError, f"{path} exists and is not overwritten without --overwrite")] * comm.size
    prepare(sources[0][::-1], path, comm=comm, overwrite=True)
    with Corpus(path) as corpus:
        names = {"corpus.h5", *(shard.name for shard in corpus.shards)}
        assert corpus.document_name(0).endswith("one")
    assert comm.allgather(names == set(comm.bcast(names_in(path.parent)))) == [True] * comm.size


def test_job_that_another_one_overtakes_is_refused_on_all_ranks(comm, sources, shared_tmp_path):
    path = shared_tmp_path / "out" / "corpus.h5"
    overtaken = False

    def overtake(_):
        nonlocal overtaken
        if comm.rank == 0 and not overtaken:
            overtaken = True
            prepare(sources[0][:1], path)

    failures = failure_of(comm, sources[0], path, progress=overtake)
    assert failures == [(CorpusError, f"{path} exists and is not overwritten without --overwrite")] * comm.size
    assert comm.bcast(names_in(path.parent)) == ["corpus.h5"]
    with Corpus(path) as corpus:
        assert corpus.document_name(0) == sources[1][0][0]


@pytest.mark.parametrize("shuffle", [False, True])
def test_slices_of_ranks_joined_equal_the_batch_of_one_rank(comm, sources, shared_tmp_path, shuffle):
    path = prepare(sources[0], shared_tmp_path / "corpus.h5", comm=comm, chunk_tokens=300)
    seq_len = 101
    options = {"seq_len": seq_len, "batch_size": 4, "seed": 7, "shuffle": shuffle}
    own = Partition.even(seq_len, comm.size).slice_of(comm.rank)
    with Corpus(path) as corpus, SequenceReader(corpus, slice_of=own, **options) as reader:
        count = 2 * reader.batches_per_epoch + 1
        batches = comm.gather([next(reader) for _ in range(count)])
        equal = None
        if comm.rank == 0:
            with SequenceReader(corpus, slice_of=range(seq_len), prefetch=False, **options) as whole:
                equal = all(
                    torch.equal(torch.cat([part[which] for part in parts], dim=1), expected)
                    for parts in zip(*batches, strict=True)
                    for which, expected in enumerate(next(whole))
                )
        assert comm.bcast(equal)


def test_damage_is_met_only_by_the_rank_that_reads_it(comm, shared_tmp_path):
    """Each rank reads its own slice and no more."""
    content = random_bytes(64 * comm.size * 4 + 1, 3)
    if comm.rank == 0:
        (shared_tmp_path / "text").write_bytes(content)
    comm.Barrier()
    path = prepare([shared_tmp_path / "text"], shared_tmp_path / "corpus.h5", comm=comm, chunk_tokens=16)
    if comm.rank == 0:
        overwrite_tokens(path, 64 + 24, bytes([content[64 + 24] ^ 1]))  # rank 0 reads one token of the slice, not this
    comm.Barrier()
    own = range(64 * comm.rank, 64 * (comm.rank + 1))
    options = {"seq_len": 64 * comm.size, "batch_size": 1, "seed": 0, "shuffle": False}
    damaged = False
    with Corpus(path) as corpus, SequenceReader(corpus, slice_of=own, **options) as reader:
        try:
            next(reader)
        except CorpusError:
            damaged = True
    assert comm.allgather(damaged) == [rank == 1 for rank in range(comm.size)]
