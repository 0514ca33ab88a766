"""Ranks that stop, hang or die: the job ends soon, and says which it was."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from launching import MODEL, MPIRUN, environment, patience, slowness

from longnet_hpc.comm.process import Process
from longnet_hpc.comm.watchdog import _Watchdog, beat_interval
from longnet_hpc.config import TrainConfig
from longnet_hpc.data import prepare
from longnet_hpc.errors import ConfigError
from longnet_hpc.life import Life, life

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="needs an mpirun")

LIMIT = 3
SECONDS_TO_END = 60
SECONDS_TO_START = 180

# Each rank notes its process and, as it does the mischief, when that was.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from longnet_hpc.comm.launch import start
from longnet_hpc.comm.watchdog import watched

launch = start(device="cpu")
rank, comm = launch.rank, launch.comm
apart = comm.Dup()
Path(f"pid-{{rank}}").write_text(str(os.getpid()))

def mischief():
    Path("begun").touch()
    {mischief}

import torch
from longnet_hpc.comm import all_reduce_sum, barrier
from longnet_hpc.life import life

with watched(comm, {limit}):
    for step in range({steps}):
        life.at = f"step {{step + 1}}"
        all_reduce_sum(comm, torch.ones(8))
        time.sleep(0.3)
        if step == 4 and rank == {culprit}:
            mischief()
"""


class Ended:
    def __init__(self, folder, code, output, error, ended):
        self.code, self.output, self.error = code, output, error
        self.seconds = ended - (folder / "begun").stat().st_mtime if (folder / "begun").exists() else None
        self.pids = {int(path.name[4:]): int(path.read_text()) for path in folder.glob("pid-*")}


def is_there(pid):
    """Whether a process is still there, and not only as an entry that nobody has asked about."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")


@pytest.fixture
def run(tmp_path):
    """Run words of Python on some ranks in the folder of the test; none may be left when they end, nor is any."""

    def run_in_folder(*words, ranks=4):
        with (tmp_path / "stderr").open("w+") as error, (tmp_path / "stdout").open("w+") as output:
            command = [MPIRUN, "-n", str(ranks), sys.executable, *map(str, words)]
            job = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=output, stderr=error)
            code, deadline = None, time.time() + SECONDS_TO_START
            while code is None and time.time() < deadline:
                begun = tmp_path / "begun"
                if begun.exists():
                    deadline = min(deadline, begun.stat().st_mtime + SECONDS_TO_END)
                time.sleep(0.1)
                code = job.poll()
            ended = time.time()
            if code is None:
                job.terminate()
        done = Ended(tmp_path, code, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text(), ended)
        time.sleep(0.5)  # what was killed at the end needs a moment
        left = [rank for rank, pid in done.pids.items() if is_there(pid)]
        for rank in left:
            os.kill(done.pids[rank], 9)
        assert code is not None, f"the job did not end\n{done.error}"
        assert len(done.pids) == ranks, done.error
        assert not left, f"ranks {left} are left\n{done.error}"
        return done

    return run_in_folder


def script(mischief="", culprit=-1, limit=LIMIT, steps=10):
    return SCRIPT.format(mischief=mischief, culprit=culprit, limit=limit, steps=steps)


@pytest.mark.parametrize("culprit", [0, 2])
def test_rank_that_is_stopped_is_named_and_ends_the_job(run, culprit):
    done = run("-c", script("os.kill(os.getpid(), signal.SIGSTOP)", culprit))
    assert done.code != 0
    assert done.seconds > LIMIT - 1
    named = (
        f"rank {culprit} of 4 \\(.*, pid {done.pids[culprit]}\\) has been silent for [3-9] s, last seen: step [45], "
    )
    assert re.search(named, done.error), done.error
    assert not re.search(f"rank [^{culprit}] of 4", done.error)
    assert "waiting in exchange of parts of a sum" in done.error  # of those who tell


@pytest.mark.parametrize("culprit", [0, 3])
def test_rank_that_hangs_is_named_and_shows_its_stack(run, culprit):
    done = run("-c", script("while True: time.sleep(0.05)", culprit))
    assert done.code == 1
    assert done.seconds > LIMIT - 1
    named = f"rank {culprit} of 4 \\(.*, pid {done.pids[culprit]}\\) has not advanced for [3-9] s, last seen: step 5, "
    assert re.search(named + r"computing in mischief \(<string>:\d+\)", done.error), done.error
    assert not re.search(f"rank [^{culprit}] of 4", done.error)
    stack = done.error.partition(f"rank {culprit} is at\nMainThread:\n")[2]
    assert "in mischief" in stack, done.error


def test_exchanges_that_a_stuck_rank_has_under_way_are_named(run):
    counts = "[1] * comm.size, [0] * comm.size, [1] * comm.size"
    begin = f"pending = start_alltoallv(apart, torch.ones(1, 1), {counts}, what='keys and values')"
    start = f"from longnet_hpc.comm.buffers import start_alltoallv; {begin}; "
    done = run("-c", script(start + "\n    while True: time.sleep(0.05)", 1), ranks=3)
    assert done.code == 1
    named = r"last seen: step 5, computing in mischief \(<string>:\d+\), exchange of keys and values under way"
    assert re.search(f"rank 1 of 3 .*{named}", done.error), done.error
    assert "waiting in exchange of parts of a sum" in done.error


def test_rank_that_is_killed_ends_the_job(run):
    done = run("-c", script("os.kill(os.getpid(), signal.SIGKILL)", 1))
    assert done.code != 0


def test_ranks_that_wait_for_each_other_are_all_named(run):
    done = run("-c", script("barrier(comm)", 1), ranks=3)  # the others are in a sum
    assert done.code == 1
    assert "all 3 ranks have waited for each other for 3 s; rank 0: step 6, waiting in exchange of" in done.error
    assert "; rank 1: step 5, waiting in barrier; rank 2: step 6, " in done.error


def test_slow_ranks_that_advance_are_left_alone(run):
    slow = "for _ in range(8): life.progress += 1; time.sleep(0.7)"
    done = run("-c", script(slow, 2))
    assert done.code == 0, done.error
    assert done.seconds > LIMIT + 2
    assert done.error == ""


def test_job_that_is_suspended_as_a_whole_goes_on(run):
    # Rank 2 stops the others, then itself; a child of it wakes all up after more than the limit.
    suspend = (
        "pids = [int(path.read_text()) for path in Path().glob('pid-*')]; wake = "
        "f'import os, time; time.sleep({LIMIT} + 3); [os.kill(pid, 18) for pid in {pids}]'; import subprocess; "
        "subprocess.Popen([sys.executable, '-c', wake]); "
        "[os.kill(pid, signal.SIGSTOP) for pid in sorted(pids, key=os.getpid().__eq__)]"
    ).replace("{LIMIT}", str(LIMIT))
    done = run("-c", script(suspend, 2))
    assert done.code == 0, done.error
    assert done.seconds > LIMIT + 2
    assert done.error == ""


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {n} of the text\n" for n in range(1000)))
    return prepare([tmp_path / "text.txt"], tmp_path / "corpus.h5")


TRAINING = """
import os, signal, sys, time
from pathlib import Path
from longnet_hpc.launcher import environment_rank
from longnet_hpc.run import main
from longnet_hpc.trainer import Trainer

Path(f"pid-{environment_rank()}").write_text(str(os.getpid()))
whole_step = Trainer.step

def step(self):
    if environment_rank() == 2 and self.steps_done == 3 and STOPS:
        time.sleep(self.config.watchdog_seconds / 2)  # until this step has been told of
        Path("begun").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return whole_step(self)

Trainer.step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("stops", [True, False])
def test_training_is_watched(run, corpus, stops):
    words = ("train", *MODEL, "--seq-len", "512", "--steps", "5", "--device", "cpu", "--corpus", corpus)
    limit = patience(4 if stops else 30)
    done = run("-c", TRAINING.replace("STOPS", str(stops)), *words, "--folder", "run", "--watchdog-seconds", limit)
    if stops:
        assert done.code != 0
        named = f"rank 2 of 4 \\(.*, pid {done.pids[2]}\\) has been silent for (\\d+) s, last seen: train, step 4, "
        silent = re.search(named, done.error)
        assert silent, done.error
        assert limit <= int(silent[1]) <= 2 * limit
    else:
        assert done.code == 0, done.error
        assert "rank" not in done.error.replace("ranks (cpu", "")


def test_stopped_process_is_killed_but_not_another_with_its_pid():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        os.kill(child.pid, signal.SIGSTOP)
        born = Process.of(child.pid)
        replace(born, birth="1").kill()
        replace(born, host="elsewhere").kill()
        time.sleep(0.2)
        assert child.poll() is None
        born.kill()
        assert child.wait(5) == -signal.SIGKILL
        born.kill()  # it is gone
    finally:
        child.kill()


def test_silence_must_be_a_time():
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"watchdog_seconds must be at least 0 and finite, got {seconds}"):
            TrainConfig(watchdog_seconds=seconds)


def test_signs_of_life_cost_next_to_nothing():
    life = Life()
    begin = time.perf_counter()
    for _ in range(100_000):
        life.progress += 1
    bumps = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(10_000):
        with life.waiting_for("barrier"):
            pass
    waits = time.perf_counter() - begin
    assert max(bumps, waits) < 0.05 * slowness()


def seconds_of_a_beat(size, beats=6):
    """Return the CPU time that rank 0's watchdog takes from one beat to the next, hearing and answering all ranks."""
    interval = 0.25
    with socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(type=socket.SOCK_DGRAM) as others:
        for its in (udp, others):
            its.bind(("127.0.0.1", 0))
        sign = (True, 0.5, "train, step 1,000, waiting in exchange of gradients of keys and values", None)
        answers = [(Process.of(os.getpid()), udp.getsockname()[1], b"of a job")] * size
        watchdog = _Watchdog(0, 4 * interval, udp, answers)
        clock = time.pthread_getcpuclockid(watchdog._thread.ident)
        begin, first = time.clock_gettime(clock), watchdog._beats
        while watchdog._beats < first + beats:
            for rank in range(1, size):
                others.sendto(b"of a job" + json.dumps((rank, *sign)).encode(), udp.getsockname())
                if rank % 16 == 0:
                    time.sleep(0.001)
            life.progress += 1
            time.sleep(interval)
        seconds = (time.clock_gettime(clock) - begin) / (watchdog._beats - first)
        assert len(watchdog._heard) == size
        watchdog.stop()
    return seconds


@pytest.mark.parametrize("size", [2, 16, 64, 512])
def test_heartbeats_take_less_than_a_thousandth_of_the_time(size):
    limit = TrainConfig().watchdog_seconds
    shares = []
    for _ in range(3):  # whoever shares the core makes it slower, never faster
        shares.append(seconds_of_a_beat(size) / slowness() / beat_interval(limit, size))
        if shares[-1] < 0.001:
            return
    pytest.fail(f"the watchdog takes {min(shares):.2%} of the time of rank 0")


def test_beats_come_often_enough_to_be_missed():
    for limit in (3.0, 600.0):
        for size in (2, 64, 4096, 100_000):
            assert beat_interval(limit, size) <= limit / 4
    assert beat_interval(600.0, 2) == 1.0
