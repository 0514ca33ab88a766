"""Checkpoints of a training on several ranks: written in the background, and in shards."""

import errno
import re
import threading
from concurrent.futures import wait

import pytest
import torch
from test_mpi_train import config, corpus, launch_of  # noqa: F401 - with a fixture

from longnet_hpc import LongNet, LongNetConfig, checkpoint, checkpoint_shards, checkpoint_writer
from longnet_hpc.checkpoint import find_checkpoint, latest_checkpoint, load_checkpoint
from longnet_hpc.checkpoint_writer import CheckpointWriter
from longnet_hpc.comm import all_reduce_sum, gather_parts, reduce_scatter_sum
from longnet_hpc.config import OptimizerConfig
from longnet_hpc.errors import StoppedError
from longnet_hpc.optimizer import Optimizer
from longnet_hpc.train import train
from longnet_hpc.trainer import Trainer

# ruff: noqa: F811 - the fixture that tests take

pytestmark = pytest.mark.mpi(min_size=2)

SECONDS = 20
"""Patience with what would be a hang."""


def ranks_of(comm, size):
    """Return a communicator of the first ranks, None on the others."""
    part = comm.Split(0 if comm.rank < size else 1, comm.rank)
    return part if comm.rank < size else None


def train_on(comm, size, corpus, **changes):
    """Train on the first ranks while the others wait."""
    part = ranks_of(comm, size)
    if part is not None:
        train(config(**changes), launch_of(part if size > 1 else None), corpus.path)
    comm.Barrier()


def files(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parts_of_a_sum_are_those_of_the_whole_sum_and_make_it_again(comm, dtype, monkeypatch):
    monkeypatch.setattr("longnet_hpc.comm.collectives.BUCKET_BYTES", 64)
    mine = torch.randn(103, generator=torch.Generator().manual_seed(comm.rank)).to(dtype)
    whole = all_reduce_sum(comm, mine)
    bounds = [0, *sorted(torch.randint(0, 104, (comm.size - 1,), generator=torch.Generator().manual_seed(5))), 103]
    bounds = [int(bound) for bound in bounds]
    own = reduce_scatter_sum(comm, mine, bounds)
    assert torch.equal(own, whole[bounds[comm.rank] : bounds[comm.rank + 1]])
    again = torch.full_like(whole, torch.nan)
    for its, piece in gather_parts(comm, own, bounds):
        again[its.start : its.stop] = piece
    assert torch.equal(again, whole)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("width", [24, 2])  # of 2 features, the model is one block: most shards are empty
def test_update_in_shards_has_the_bits_of_the_whole_one(comm, device, width):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    few = {"vocab_size": 2, "layers": 1, "ffn_ratio": 1, "segment_lengths": (8,), "dilation_rates": (1,)}
    model = LongNetConfig(embed_dim=width, heads=1, **few)
    settings = OptimizerConfig(clip_norm=0.5, weight_decay=0.3)
    models = []
    for its_comm in (None, comm):
        torch.manual_seed(0)
        models.append(LongNet(model).to(device))
        optimizer = Optimizer(models[-1], settings, its_comm)
        for step in range(4):
            gradient = torch.randn(models[-1].parameter_count, generator=torch.Generator().manual_seed(step))
            gradient = (gradient * 10.0 ** (step - 3)).to(device)  # clipped, and not
            if step == 2:
                optimizer.skip()
            first, stop = optimizer.bounds[comm.rank :][:2] if its_comm else (0, None)
            models[-1].norms = [*getattr(models[-1], "norms", []), optimizer.step(gradient[first:stop], 0.01)]
        held = sum(tensor.numel() for tensor in optimizer.moments().values())
        assert held == 2 * (models[-1].parameter_count if its_comm is None else stop - first)
    assert models[0].norms == models[1].norms
    for name, weight in models[0].named_parameters():
        assert torch.equal(weight, dict(models[1].named_parameters())[name]), name


def test_training_in_shards_goes_on_with_the_same_bits_on_any_number_of_ranks(comm, corpus, shared_tmp_path):
    """Two trainings over the same numbers of ranks: the bits of one depend on these, but not on shards."""
    whole, parts = shared_tmp_path / "whole", shared_tmp_path / "parts"
    for stop_at, (size, sharded) in enumerate(
        ((comm.size, True), (2, True), (1, True), (comm.size - 1, True), (comm.size, False), (comm.size, True)), 1
    ):
        for folder, its_sharded in ((whole, False), (parts, sharded)):
            where = {"resume" if stop_at > 1 else "folder": folder}
            train_on(comm, size, corpus, **where, steps=6, stop_at=stop_at, shard_optimizer=its_sharded)
        if comm.rank == 0:
            shards = size if sharded and size > 1 else 0
            names = [name for name in files(parts) if name.startswith(f"step-{stop_at:08d}.shard")]
            assert names == [
                f"step-{stop_at:08d}.shard-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)
            ]
            one, other = (load_checkpoint(find_checkpoint(folder)) for folder in (whole, parts))
            assert one.step == other.step == stop_at
            assert one.digest == other.digest
            weights = load_checkpoint(find_checkpoint(parts), weights_only=True).tensors
            assert all(torch.equal(tensor, one.tensors[name]) for name, tensor in weights.items())
        comm.Barrier()
    if comm.rank == 0:
        assert len(files(parts)) == 1 + 1 + comm.size  # two are kept, one of them in shards


def slow(monkeypatch, written):
    """Let a checkpoint be written only when training has come so far."""
    real = checkpoint_writer.save_checkpoint, checkpoint_writer.write_checkpoint
    for its in real:

        def write(*words, its=its):
            if not written.wait(SECONDS):
                raise AssertionError("training waits for the checkpoint")
            return its(*words)

        monkeypatch.setattr(checkpoint_writer, its.__name__, write)


@pytest.mark.parametrize("sharded", [False, True])
def test_next_step_computes_while_a_checkpoint_is_written_but_does_not_count_before(
    comm, corpus, shared_tmp_path, monkeypatch, sharded
):
    folder, written, told = shared_tmp_path / "run", threading.Event(), []
    slow(monkeypatch, written)
    accumulate, update = Trainer.accumulate, Trainer.update

    def computed(trainer):
        done = accumulate(trainer)
        if trainer.steps_done == 2:
            comm.Barrier()
            told.append(find_latest(folder))
            comm.Barrier()
            written.set()
        return done

    def counted(trainer, *words):
        if trainer.steps_done == 2:
            told.append(find_latest(folder))
        return update(trainer, *words)

    monkeypatch.setattr(Trainer, "accumulate", computed)
    monkeypatch.setattr(Trainer, "update", counted)
    train(config(folder=folder, steps=3, save_every=2, shard_optimizer=sharded), launch_of(comm), corpus.path)
    assert told == [None, "step-00000002.safetensors"]


def find_latest(folder):
    latest = latest_checkpoint(folder)
    return latest and latest.name


@pytest.mark.parametrize("failing", ["replace_file", "make_partial", "put_in_place"])
def test_shard_that_cannot_be_written_ends_all_ranks_with_one_error_and_leaves_the_checkpoint_before(
    comm, corpus, shared_tmp_path, monkeypatch, failing
):
    folder, rank = shared_tmp_path / "run", comm.size - 1 if failing == "replace_file" else 0
    where = checkpoint_shards if failing == "replace_file" else checkpoint
    real = getattr(where, failing)

    def fail(path, *more):
        if "step-00000004" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *more)

    if comm.rank == rank:
        monkeypatch.setattr(where, failing, fail)
    with pytest.raises(OSError, match="cannot write checkpoint .*step-00000004.*: No space left on device"):
        train(config(folder=folder, steps=8, save_every=2, shard_optimizer=True), launch_of(comm), corpus.path)
    comm.Barrier()
    monkeypatch.undo()
    if comm.rank == 0:
        assert {name[:13] for name in files(folder)} == {"step-00000002"}
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    comm.Barrier()
    again = train(config(resume=folder, steps=4, save_every=2), launch_of(comm), corpus.path)
    assert again.steps == 4


@pytest.mark.parametrize("damage", ["lost", "empty", "cut", "flipped", "of another attempt", "of the weights, empty"])
def test_damaged_shard_is_passed_over_for_the_checkpoint_before(comm, corpus, shared_tmp_path, caplog, damage):
    """A file that is empty or cut is what a crash leaves of one that was renamed before its bytes were on the disk."""
    folder, other = shared_tmp_path / "run", shared_tmp_path / "other"
    options = {"steps": 4, "save_every": 2, "shard_optimizer": True}
    train(config(folder=folder, **options), launch_of(comm), corpus.path)
    if damage == "of another attempt":
        train(config(folder=other, **options), launch_of(comm), corpus.path)
    right = load_checkpoint(find_checkpoint(folder)).digest
    comm.Barrier()
    if comm.rank == 0:
        name = f"step-00000004.shard-00002-of-{comm.size:05d}.safetensors"
        path = folder / "checkpoints" / (name if "weights" not in damage else "step-00000004.safetensors")
        content = path.read_bytes()
        if damage == "lost":
            path.unlink()
        elif damage == "of another attempt":
            path.write_bytes((other / "checkpoints" / name).read_bytes())
        else:
            flipped = content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
            path.write_bytes({"cut": content[: len(content) // 2], "flipped": flipped}.get(damage, b""))
    comm.Barrier()
    with caplog.at_level("DEBUG", "longnet_hpc"):
        train(config(resume=folder, **options), launch_of(comm), corpus.path)
    assert re.search(r"warning: .*step-00000004.*; the training goes on from step 2", caplog.text)
    assert load_checkpoint(find_checkpoint(folder)).digest == right


def test_what_a_killed_writer_left_goes_at_the_next_start(comm, corpus, shared_tmp_path):
    folder = shared_tmp_path / "run"
    train(config(folder=folder, steps=8, stop_at=2, shard_optimizer=True), launch_of(comm), corpus.path)
    if comm.rank == 0:
        before, checkpoints = files(folder), folder / "checkpoints"
        for name in ("step-00000003.shard-00001-of-00064.safetensors", ".step-00000003.safetensors.partial"):
            (checkpoints / name).touch()
        (checkpoints / ".step-00000003.shard-00002-of-00064.safetensors.partial").touch()
        (checkpoints / "notes.txt").touch()
    comm.Barrier()
    train(config(resume=folder, steps=8, stop_at=3, shard_optimizer=True), launch_of(comm), corpus.path)
    if comm.rank == 0:
        after = [name.replace("step-00000002", "step-00000003") for name in before]
        assert files(folder) == sorted([*before, *after, "notes.txt"])


def test_long_step_of_a_stream_lets_a_checkpoint_count_between_its_chunks(comm, corpus, shared_tmp_path, monkeypatch):
    folder, settle, told = shared_tmp_path / "run", CheckpointWriter.settle_if_written, []

    def settle_if_written(writer):
        wait(writer._tasks)
        settle(writer)
        told.append(find_latest(folder))

    monkeypatch.setattr(CheckpointWriter, "settle_if_written", settle_if_written)
    options = {"steps": 2, "save_every": 1, "shard_optimizer": True, "stream": True, "chunk_len": 128}
    train(config(folder=folder, **options), launch_of(comm), corpus.path)
    chunks = len(told) // 2
    assert chunks >= 4
    assert told == [None] * chunks + ["step-00000001.safetensors"] * chunks


def test_stream_that_is_left_in_its_first_step_and_again_does_not_write_its_checkpoint_anew(
    comm, corpus, shared_tmp_path
):
    """A second save of the same step would replace its shards one by one, and could leave none that is whole."""
    folder, whole = shared_tmp_path / "run", shared_tmp_path / "whole"
    options = {"steps": 1, "shard_optimizer": True, "stream": True, "chunk_len": 128}
    written = []
    for words in ({"folder": folder}, {"resume": folder}):
        with pytest.raises(StoppedError, match="left in step 1 after"):
            train(config(**words, **options, stop_after=0), launch_of(comm), corpus.path)
        comm.Barrier()
        written.append({path.name: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()})
        comm.Barrier()
    assert written[0] == written[1]
    train(config(resume=folder, **options), launch_of(comm), corpus.path)
    train(config(folder=whole, **options), launch_of(comm), corpus.path)
    if comm.rank == 0:
        digests = {load_checkpoint(find_checkpoint(its)).digest for its in (folder, whole)}
        assert len(digests) == 1
