"""Training on four ranks that are killed at random moments: each time all end, and what was trained is not lost.

By turns their optimizer state is in shards and whole, so that each goes on from checkpoints of the other kind, too.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from launching import MODEL, MPIRUN, environment, run_command

from longnet_hpc.data import prepare

KILLS = int(os.environ.get("LONGNET_HPC_KILLS", "3"))
"""Kills of one training; 100 by hand."""
RANKS, SAVE_EVERY = 4, 3
SECONDS_TO_START, SECONDS_TO_TRAIN, SECONDS_TO_END = 120, 120, 30
LINES_BETWEEN = 4
"""Most steps that a training does before it is killed."""


def words(folder, corpus, *, resume, sharded=False):
    start = ("--resume", folder) if resume else ("--folder", folder, "--corpus", corpus)
    steps = ("--seq-len", "1024", "--steps", str(10 + KILLS * LINES_BETWEEN), "--save-every", str(SAVE_EVERY))
    shards = "--shard-optimizer" if sharded else "--no-shard-optimizer"
    return ("train", *start, shards, *(() if resume else (*MODEL, *steps)))


def steps_in(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = []
    for line in lines:
        try:
            done.append(json.loads(line))
        except json.JSONDecodeError:  # cut off
            break
    return done


def processes_of(folder):
    """Return the ranks of a training that run, by their command lines; not the launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if command and b"python" in Path(os.fsdecode(command[0])).name.encode() and os.fsencode(folder) in command:
            found.append(int(path.parent.name))
    return sorted(found)


def wait_for(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def kill_some(folder, chance):
    """Kill one rank, or all."""
    ranks = processes_of(folder)
    for rank in ranks if chance.random() < 0.3 else chance.sample(ranks, min(1, len(ranks))):
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)


def launch_and_kill(folder, corpus, chance, *, sharded):
    """Go on with a training, or begin it, and kill it at some moment; return its exit code."""
    done = len(steps_in(folder))
    command = map(str, words(folder, corpus, resume=(folder / "config.toml").exists(), sharded=sharded))
    launched = subprocess.Popen(
        [MPIRUN, "-n", str(RANKS), sys.executable, "-m", "longnet_hpc.run", *command],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def has_ended():
        return launched.poll() is not None

    assert wait_for(lambda: len(processes_of(folder)) >= RANKS or has_ended(), SECONDS_TO_START)
    if chance.random() < 0.75:  # while it trains, else while it starts
        wanted = done - done % SAVE_EVERY + chance.randint(1, LINES_BETWEEN)
        assert wait_for(lambda: len(steps_in(folder)) >= wanted or has_ended(), SECONDS_TO_TRAIN)
    time.sleep(chance.random() * 0.3)
    kill_some(folder, chance)
    assert wait_for(has_ended, SECONDS_TO_END), "mpirun goes on"
    assert wait_for(lambda: not processes_of(folder), SECONDS_TO_END), "ranks go on"
    return launched.returncode


@pytest.mark.timeout(300 + 90 * KILLS)
def test_training_that_is_killed_again_and_again_ends_as_if_it_never_was(tmp_path):
    if MPIRUN is None:
        pytest.skip("needs an mpirun")
    text, corpus, chance = tmp_path / "text.txt", tmp_path / "corpus.h5", random.Random(0)
    text.write_text("".join(f"def f{n}(x):\n    return x - {n}\n" for n in range(2000)))
    prepare([text], corpus)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    done = run_command(*words(whole, corpus, resume=False), ranks=RANKS)
    assert done.returncode == 0, done.stderr
    repeated, codes = [], []
    for kill in range(KILLS):
        codes.append(launch_and_kill(folder, corpus, chance, sharded=kill % 2 == 0))
        checkpoints = sorted((folder / "checkpoints").glob(f"step-{'?' * 8}.safetensors"))  # not their shards
        saved = int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0
        repeated.append(len(steps_in(folder)) - saved)
        if folder.exists() and not (folder / "config.toml").exists():
            folder.rmdir()  # it was killed before it had begun
    assert 0 not in codes
    assert max(repeated) <= SAVE_EVERY
    done = run_command(*words(folder, corpus, resume=(folder / "config.toml").exists()), ranks=RANKS)
    assert done.returncode == 0, done.stderr
    assert [line["loss"] for line in steps_in(folder)] == [line["loss"] for line in steps_in(whole)]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
