"""Numbers that go wrong in a training on several ranks: what is not finite, and bits that flip."""

import json
from contextlib import suppress

import pytest
import torch
from test_mpi_train import config, corpus, launch_of  # noqa: F401 - with a fixture

from longnet_hpc.checkpoint import find_checkpoint, load_checkpoint
from longnet_hpc.errors import NonFiniteError, RanksDifferError, StoppedError
from longnet_hpc.train import train
from longnet_hpc.trainer import Trainer

# ruff: noqa: F811 - the fixture that tests take

pytestmark = pytest.mark.mpi(min_size=2)


def after(step, change):
    """Return a step of training that changes something on this rank after the real one of this number."""
    real = Trainer.update

    def update(trainer, *words):
        line = real(trainer, *words)
        if trainer.steps_done == step:
            change(trainer)
        return line

    return update


def flip_bit(trainer):
    with torch.no_grad():
        weight = next(weight for weight in trainer.model.parameters() if weight.dim() == 2)
        weight.view(torch.int32).view(-1)[7] ^= 1 << 3


def test_bit_that_flips_on_one_rank_ends_the_run_at_a_good_checkpoint(comm, corpus, shared_tmp_path, monkeypatch):
    rank, folder = comm.size - 1, shared_tmp_path / "run"
    if comm.rank == rank:
        monkeypatch.setattr(Trainer, "update", after(3, flip_bit))
    said = f"after step 4: rank {rank if comm.size > 2 else '[01]'} in .*; .*the last checkpoint .*step-00000002"
    with pytest.raises(RanksDifferError, match=said):
        train(config(folder=folder, steps=6, save_every=2), launch_of(comm), corpus.path)
    comm.Barrier()
    monkeypatch.undo()
    resumed = train(config(resume=folder, steps=6, save_every=2), launch_of(comm), corpus.path)
    whole = train(config(folder=shared_tmp_path / "whole", steps=6, save_every=2), launch_of(comm), corpus.path)
    assert resumed.loss == pytest.approx(whole.loss, rel=0.2)
    if comm.rank == 0:
        last, right = (load_checkpoint(find_checkpoint(its)) for its in (folder, shared_tmp_path / "whole"))
        assert last.digest == right.digest


def poison(trainer, step, name, rank):
    """Let a step find a gradient that is not finite."""
    real = trainer.optimizer.flat_gradient

    def flat_gradient():
        if trainer.steps_done + 1 in step and trainer.launch.rank == rank:
            dict(trainer.model.named_parameters())[name].grad.view(-1)[0] = float("nan")
        return real()

    trainer.optimizer.flat_gradient = flat_gradient


def poisoned(monkeypatch, steps, name, rank):
    made = Trainer.__init__

    def init(trainer, *words, **options):
        made(trainer, *words, **options)
        poison(trainer, steps, name, rank)

    monkeypatch.setattr(Trainer, "__init__", init)


def test_gradient_that_is_not_finite_is_named_with_rank_and_tensor(comm, corpus, shared_tmp_path, monkeypatch):
    poisoned(monkeypatch, {3}, "norm.weight", comm.size - 1)
    said = rf"diverged in step 3: .*; rank {comm.size - 1}: gradient of norm.weight; .*the last checkpoint .*02"
    with pytest.raises(NonFiniteError, match=said):
        train(config(folder=shared_tmp_path / "run", steps=4, save_every=2), launch_of(comm), corpus.path)


def test_steps_that_are_not_finite_can_be_left_out_and_resumed_across(comm, corpus, shared_tmp_path, monkeypatch):
    poisoned(monkeypatch, {1, 4}, "norm.weight", 0)
    options = {"steps": 6, "save_every": 2, "on_nonfinite": "skip"}
    whole, parts = shared_tmp_path / "whole", shared_tmp_path / "parts"
    train(config(folder=whole, **options), launch_of(comm), corpus.path)
    with suppress(StoppedError):
        train(config(folder=parts, stop_at=4, **options), launch_of(comm), corpus.path)
    train(config(resume=parts, **options), launch_of(comm), corpus.path)
    if comm.rank == 0:
        assert load_checkpoint(find_checkpoint(whole)).digest == load_checkpoint(find_checkpoint(parts)).digest
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "left_out" in line] == [1, 4]


def test_steps_are_not_left_out_for_ever(comm, corpus, shared_tmp_path, monkeypatch):
    poisoned(monkeypatch, range(100), "norm.weight", 0)
    with pytest.raises(NonFiniteError, match="diverged in 11 steps in a row, step 11"):
        train(config(folder=shared_tmp_path / "run", steps=40, on_nonfinite="skip"), launch_of(comm), corpus.path)
