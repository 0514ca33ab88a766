"""One training on 1 to 16 ranks that share two cores: the same loss on all, the same bits twice; on 64 by hand."""

import json
import os

import pytest
from launching import MODEL, MPIRUN, run_command, run_python

from longnet_hpc.checkpoint import find_checkpoint, load_checkpoint
from longnet_hpc.data import prepare

RANKS = int(os.environ.get("LONGNET_HPC_RANKS", "16"))
"""Ranks of the launch; 64 by hand."""
SECONDS_A_RANK = 25
STEPS, SEQ_LEN = 10, 1021

pytestmark = [
    pytest.mark.skipif(MPIRUN is None, reason="needs an mpirun"),
    pytest.mark.timeout(60 + SECONDS_A_RANK * RANKS),
]

# Starting is what takes time: the same ranks train as 1, 2, 3, 4, 8, ... of them, and all of them twice.
SCRIPT = """
import json, os, sys
from dataclasses import replace
from longnet_hpc.comm.launch import start
from longnet_hpc.config import OptimizerConfig, TrainConfig
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.data import Corpus
from longnet_hpc.trainer import Trainer

path, sizes, steps, seq_len = json.loads(sys.argv[1])
launch = start(device="cpu")
model = LongNetConfig(layers=2, embed_dim=32, heads=4, segment_lengths=(48, 256, 1024), dilation_rates=(1, 4, 6))
config = TrainConfig(
    model=model, seq_len=seq_len, steps=steps, deterministic=True, optimizer=OptimizerConfig(learning_rate=0.01)
)
with Corpus(path) as corpus:
    for size in sizes:
        part = launch.comm.Split(launch.rank >= size, key=launch.rank)
        if launch.rank < size:
            trainer = Trainer(config, replace(launch, comm=part, size=size), corpus)
            lines = [trainer.step() for _ in range(steps)]
            trainer.check_same()
            trainer.close()
            if launch.rank == 0:
                print("TRAINED", json.dumps([(line["loss"], line["grad_norm"]) for line in lines]), flush=True)
        part.Free()
from mpi4py import MPI
MPI.Finalize()
os._exit(0)  # taking so many interpreters apart takes seconds, too
"""


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x):\n    return x - {n}\n" for n in range(2000)))
    return prepare([tmp_path / "text.txt"], tmp_path / "corpus.h5")


def test_loss_is_the_same_on_any_number_of_ranks_and_the_same_bits_twice(corpus):
    sizes = [size for size in (1, 2, 3, 4, 8, 16, 32, 64, 128) if size < RANKS] + [RANKS, RANKS]
    words = json.dumps([str(corpus), sizes, STEPS, SEQ_LEN])
    done = run_python("-c", SCRIPT, words, ranks=RANKS, timeout=SECONDS_A_RANK * RANKS)
    assert done.returncode == 0, done.stderr
    trained = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("TRAINED ")]
    assert len(trained) == len(sizes), done.stdout
    one = trained[0]
    for size, many in zip(sizes, trained, strict=True):
        differences = [abs(a - b) / b for (a, _), (b, _) in zip(many, one, strict=True)]
        assert max(differences) < 1e-6, f"{size} ranks: {differences}"
    assert trained[-1] == trained[-2]
    assert one[-1][0] < one[0][0] - 0.5  # it is a training


def test_deterministic_training_has_the_same_bits_twice(corpus, tmp_path):
    runs = [tmp_path / "first", tmp_path / "second"]
    for folder in runs:
        words = ("train", *MODEL, "--seq-len", "512", "--steps", "3", "--deterministic", "--corpus", corpus)
        done = run_command(*words, "--folder", folder, ranks=2)
        assert done.returncode == 0, done.stderr
    first, second = (load_checkpoint(find_checkpoint(folder)) for folder in runs)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(first.tensors[name].equal(second.tensors[name]) for name in first.tensors)
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()] for folder in runs]
    assert losses[0] == losses[1]
