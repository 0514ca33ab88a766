"""Checkpoints of a training on one process: what it keeps of them, and what it says of old ones."""

import gc
import weakref

import pytest
from test_train import config, corpus_path  # noqa: F401 - with a fixture

from longnet_hpc import train as module
from longnet_hpc.checkpoint import load_latest
from longnet_hpc.comm.launch import start
from longnet_hpc.train import train
from longnet_hpc.trainer import Trainer

# ruff: noqa: F811 - the fixture that tests take


def test_old_checkpoint_that_cannot_be_removed_is_warned_of_once_and_the_new_ones_stay(corpus_path, tmp_path, caplog):
    folder, launch = tmp_path / "run", start(device="cpu")
    train(config(folder=folder, steps=2, save_every=2), launch, corpus_path)
    (folder / "checkpoints" / "step-00000001.safetensors").mkdir()  # which is no file
    train(config(resume=folder, steps=8, save_every=2), launch, corpus_path)
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(names) == [f"step-0000000{step}.safetensors" for step in (1, 6, 8)]
    assert load_latest(folder, pytest.fail).step == 8
    said = [record.getMessage() for record in caplog.records if "cannot remove old" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("warning: cannot remove old checkpoint ")
    assert "step-00000001.safetensors: " in said[0]


def test_checkpoint_that_a_training_goes_on_from_is_not_kept_in_memory(corpus_path, tmp_path, monkeypatch):
    folder, launch = tmp_path / "run", start(device="cpu")
    train(config(folder=folder, steps=2), launch, corpus_path)
    read, kept = [], []
    real_load, real_step = module.load_latest, Trainer.step

    def load(*words):
        checkpoint = real_load(*words)
        read.extend(weakref.ref(its) for its in (checkpoint, *checkpoint.tensors.values()))
        return checkpoint

    def step(trainer):
        gc.collect()
        kept.append(sum(reference() is not None for reference in read))
        return real_step(trainer)

    monkeypatch.setattr(module, "load_latest", load)
    monkeypatch.setattr(Trainer, "step", step)
    train(config(resume=folder, steps=3), launch, corpus_path)
    assert len(read) > 10
    assert kept == [0]
