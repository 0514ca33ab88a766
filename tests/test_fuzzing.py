"""Damaged files: a clear error or a correct read, never a crash, a hang, or a gigabyte of memory.

``LONGNET_HPC_FUZZ=10000`` reads that many damaged files instead of a few hundred. What was found has a case of its
own in ``test_hostile_files.py``.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import mutations
import pytest
import torch
from data_files import random_bytes
from launching import ROOT, environment
from tokenizer_files import trained_on_bytes

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.checkpoint import Checkpoint, DataOrder, save_checkpoint
from longnet_hpc.config import OptimizerConfig, TrainConfig
from longnet_hpc.config_file import to_table, write_toml
from longnet_hpc.data import prepare
from longnet_hpc.optimizer import Optimizer
from longnet_hpc.record import append_record, make_record, where

FILES = int(os.environ.get("LONGNET_HPC_FUZZ", "700"))
"""Damaged files of all formats together."""
BATCH = 500
"""Files that one child reads."""
MACHINES = ROOT / "longnet_hpc" / "scaling" / "machines"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with one good file of each format, named for it."""
    folder = tmp_path_factory.mktemp("fuzzing")
    (folder / "text").write_bytes(random_bytes(3000, seed=1))
    (folder / "more").write_bytes(random_bytes(500, seed=2))
    corpus = prepare([folder / "text", folder / "more"], folder / "corpus", chunk_tokens=700)
    (folder / "corpus.ranges").write_text(json.dumps(mutations.sealed_ranges(corpus.read_bytes())))
    _checkpoint(folder).rename(folder / "checkpoint")
    write_toml(folder / "config", TrainConfig(corpus=Path("a.h5"), geometric=(16, 4), chunk_len=100, stream=True), "x")
    (folder / "machine").write_bytes(next(MACHINES.glob("*.toml")).read_bytes())
    record = make_record("x", config={"a": 1}, results={"seconds": 1.5}, place=where(), check=("it ran", True))
    for step in range(1, 21):
        append_record(folder / "records", record)
        append_record(folder / "metrics", {"step": step, "loss": 5.5 / step, "tokens_per_second": 1e5, "skipped": None})
    (folder / "report").write_bytes((folder / "records").read_bytes())
    trained_on_bytes("a few words, and a few more words" * 9, 280).save(str(folder / "tokenizer"))
    return folder


MODEL = LongNetConfig(layers=1, embed_dim=8, heads=2, segment_lengths=(4,), dilation_rates=(1,))
ORDER = DataOrder(corpus_tokens=1000, corpus_hash="0123", seq_len=16, batch_size=2, seed=3, shuffle=True)


def _checkpoint(folder, **changes):
    torch.manual_seed(0)
    state = Optimizer(LongNet(MODEL), OptimizerConfig()).state()
    return save_checkpoint(folder, Checkpoint(2, 7, ORDER, to_table(MODEL), state | changes))


def read_in_child(name, folder, first, count):
    """Return what a child says of damaged files, a failure for the one at which it died, and where to go on."""
    words = [sys.executable, fuzzing.__file__, name, str(folder), str(first), str(count)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    told = [line for line in lines if "outcome" in line]
    if done.returncode == 0:
        return told, first + count
    assert lines, f"exit code {done.returncode} before the first file\n{done.stderr}"
    index, code = lines[-1]["index"], done.returncode
    if "outcome" not in lines[-1]:
        told.append({"index": index, "outcome": f"FAILED: child ended with {code} (-14: too slow, -11: crash)"})
    return told, index + 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory that hold")
@pytest.mark.timeout(120 + FILES)
@pytest.mark.parametrize("name", list(fuzzing.FORMATS))
def test_damaged_file_is_refused_or_read_correctly(originals, name):
    if not (originals / name).exists():
        pytest.skip("needs the tokenizers package")
    count = -(-FILES // len(fuzzing.FORMATS))
    told, first = [], 0
    while first < count:
        more, first = read_in_child(name, originals, first, min(BATCH, count - first))
        told += more
    outcomes = collections.Counter(line["outcome"].partition(":")[0] for line in told)
    most = {key: max((line.get(key, 0) for line in told), default=0) for key in ("seconds", "peak_bytes")}
    print(f"{name}: {len(told)} files, {dict(outcomes)}, at most {most['seconds']:.2f} s", end=", ")
    print(f"{most['peak_bytes'] / 1e6:.0f} MB more than at the start")
    failures = [f"number {line['index']}: {line['outcome']}" for line in told if line["outcome"].startswith("FAILED")]
    assert not failures, f"{len(failures)} of {len(told)}\n" + "\n".join(failures[:20])
    assert len(told) == count
    assert name in ("records", "report") or outcomes["refused"] > count // 20  # these two pass over lines
