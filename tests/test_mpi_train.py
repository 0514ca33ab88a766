"""Training steps under mpirun: the same losses as one process, whatever the number of ranks."""

import pytest
import torch

from longnet_hpc import LongNetConfig
from longnet_hpc.comm.launch import Launch
from longnet_hpc.config import EvalConfig, OptimizerConfig, TrainConfig
from longnet_hpc.data import Corpus, prepare
from longnet_hpc.errors import CorpusError, PartitionError, ShapeError
from longnet_hpc.evaluate import evaluate
from longnet_hpc.train import train
from longnet_hpc.trainer import Trainer

pytestmark = pytest.mark.mpi(min_size=2)

MODEL = LongNetConfig(
    layers=2, embed_dim=32, heads=4, kv_heads=2, segment_lengths=(48, 200, 512), dilation_rates=(1, 3, 4)
)


def launch_of(comm):
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    cpu = torch.device("cpu")
    return Launch(
        comm=comm,
        rank=rank,
        size=size,
        node_rank=rank,
        node_size=size,
        device=cpu,
        transport=None,
        mpi_library="a test",
    )


def config(**changes):
    settings = {"model": MODEL, "seq_len": 509, "steps": 20, "optimizer": OptimizerConfig(learning_rate=0.01)}
    return TrainConfig(**settings | changes)


@pytest.fixture
def corpus(comm, shared_tmp_path):
    if comm.rank == 0:
        text = shared_tmp_path / "text.txt"
        text.write_text("".join(f"def f{n}(x):\n    return x - {n}\n" for n in range(1000)))
        prepare([text], shared_tmp_path / "corpus.h5")
    comm.Barrier()
    with Corpus(shared_tmp_path / "corpus.h5") as corpus:
        yield corpus


def run(comm, corpus, steps, **changes):
    trainer = Trainer(config(**changes), launch_of(comm), corpus)
    lines = [trainer.step() for _ in range(steps)]
    trainer.check_same()
    trainer.close()
    return lines


BATCHES = {"accumulation": 2, "batch_size": 2, "activation_checkpointing": True}


@pytest.mark.parametrize(("steps", "changes"), [(20, {}), (6, BATCHES)])
def test_losses_are_those_of_one_process(comm, corpus, steps, changes):
    many = run(comm, corpus, steps, **changes)
    one = run(None, corpus, steps, **changes)
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["grad_norm"] for line in many] == pytest.approx([line["grad_norm"] for line in one], rel=1e-2)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5


def test_lines_are_the_same_on_all_ranks(comm, corpus):
    lines = run(comm, corpus, 2)
    assert comm.allgather(lines) == [lines] * comm.size


def test_bytes_received_are_those_of_the_rows_on_the_grid(comm, corpus):
    """Count, position by position, the keys of other ranks that the grids of this rank's queries need."""
    lines = run(comm, corpus, 2)
    trainer = Trainer(config(), launch_of(comm), corpus)
    bounds = trainer.compute.partition.bounds
    trainer.close()
    owner = [sum(position >= bound for bound in bounds[1:-1]) for position in range(509)]

    def received(rank, towards_owner):
        rows = 0
        for w, r in zip(MODEL.segment_lengths, MODEL.dilation_rates, strict=True):
            for position in range(509):
                offset = position % w % r
                # A key goes to every later rank with a query on its grid; its gradient comes back from each of them.
                grid = range(position - position % w + offset, min(position - position % w + w, 509), r)
                takers = {owner[query] for query in grid if owner[query] > owner[position]}
                kv_heads = {head // 2 for head in range(4) if head % r == offset}
                if towards_owner and owner[position] == rank:
                    rows += len(takers) * len(kv_heads)
                if not towards_owner and rank in takers:
                    rows += len(kv_heads)
        return rows * 2 * 8 * 4  # key and value, head_dim, float32

    most = max(received(rank, False) + received(rank, True) for rank in range(comm.size))
    assert {line["bytes_received_per_layer"] for line in lines} == {most}
    assert {line["bytes_received"] for line in lines} == {2 * most}


def test_reader_that_fails_on_one_rank_fails_on_all(comm, corpus, monkeypatch):
    trainer = Trainer(config(), launch_of(comm), corpus)
    trainer.step()

    class Broken:
        batch_index = 1

        def __next__(self):
            raise CorpusError("damaged on the last rank")

    reader = trainer.reader
    if comm.rank == comm.size - 1:
        trainer.reader = Broken()
    with pytest.raises(CorpusError, match="damaged on the last rank"):
        trainer.step()
    reader.close()


def test_more_ranks_than_tokens_are_refused(comm, corpus):
    with pytest.raises(PartitionError, match=f"1 tokens cannot be cut over {comm.size} ranks"):
        Trainer(config(seq_len=1), launch_of(comm), corpus)


def test_ranks_that_would_train_differently_are_refused_before_anything_is_written(comm, corpus, shared_tmp_path):
    own = shared_tmp_path / f"corpus-{comm.rank}.h5"
    text = shared_tmp_path / f"text-{comm.rank}.txt"
    text.write_text(f"rank {comm.rank} has a text of its own. " * 200)
    prepare([text], own)
    folder = shared_tmp_path / "run"
    for changes, path, words in (
        ({"seed": comm.rank}, corpus.path, "disagrees with rank 0: seed 1 is not 0"),
        ({"steps": 20 + comm.rank}, corpus.path, "disagrees with rank 0: steps 21 is not 20"),
        ({"stop_at": 3 if comm.rank == 1 else None}, corpus.path, "disagrees with rank 0: last step 3 is not 20"),
        ({}, own, "disagrees with rank 0: corpus_hash of the batches"),
    ):
        with pytest.raises(ShapeError, match=words):
            train(config(folder=folder, **changes), launch_of(comm), path)
        assert not folder.exists()


def test_ranks_that_would_evaluate_differently_are_refused(comm, corpus, shared_tmp_path):
    folder = shared_tmp_path / "run"
    train(config(folder=folder, steps=1), launch_of(comm), corpus.path)
    with pytest.raises(ShapeError, match="disagrees with rank 0: max_batches 2 is not 1"):
        evaluate(EvalConfig(max_batches=1 + (comm.rank == 1)), launch_of(comm), folder, corpus.path)
