"""Every script of jobs/ on a real Slurm: what it is by itself, and what its ranks do on several nodes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import NODES, ROOT, SECONDS, Job, until

from longnet_hpc.data import Corpus
from longnet_hpc.record import read_records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2 * SECONDS)]

FILES = sorted((ROOT / "jobs").iterdir())
FORKS = Path(__file__).parent / "forks"
SCRIPTS = [path.stem for path in FILES if path.suffix == ".sbatch"]
MODEL = (
    *("--device", "cpu", "--preset", "tiny", "--geometric", "256", "4"),
    *("--model.layers", "2", "--model.embed-dim", "32", "--model.heads", "4"),
)
TOKENS = 2048
STEPS = 30
TRAINING = (*MODEL, "--steps", STEPS, "--save-every", 1000)


@pytest.fixture(scope="session")
def corpus(submit, project):
    """Prepared by 2 nodes with 2 ranks each."""
    texts = project / "texts"
    texts.mkdir()
    for path in sorted((ROOT / "longnet_hpc").glob("*.py"))[:12]:
        shutil.copy(path, texts)
    submit("prepare", "texts", nodes=2, ranks_per_node=2).wait("COMPLETED")
    return project / "runs" / "corpus" / "corpus.h5"


@pytest.fixture(scope="session")
def whole(corpus, submit, losses):
    """Losses of a training that nothing interrupts, on one rank."""
    variables = {"LONGNET_TOKENS": str(TOKENS), "LONGNET_RUN": "runs/whole"}
    submit("train", *TRAINING, **variables).wait("COMPLETED")
    return losses("runs/whole")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_script_is_short_and_sound(path):
    assert len(path.read_text().splitlines()) <= 60
    subprocess.run(["bash", "-n", path], check=True)


def test_scripts_please_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", "-x", *FILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_would_take_script(cluster, project, script):
    done = cluster.run("sbatch", "--test-only", f"--nodes={NODES}", f"jobs/{script}.sbatch", cwd=project)
    ranks = 8 if script != "prepare" else 32
    assert f"using {NODES * ranks * (8 if script != 'prepare' else 1)} processors" in done.stderr


def test_ranks_on_two_nodes_prepare_all_of_the_text(corpus, project):
    with Corpus(corpus) as its:
        assert its.num_tokens == sum(path.stat().st_size for path in (project / "texts").iterdir())
    assert read_records(Path(f"{corpus}.record.jsonl"))[-1]["where"]["ranks_per_node"] == 2


def test_training_that_is_preempted_and_signalled_has_the_losses_of_one_that_is_not(cluster, submit, losses, whole):
    """A job of a partition that comes first takes all nodes; later the time limit is near."""
    job = submit("train", *TRAINING, nodes=2, LONGNET_TOKENS=str(TOKENS))
    job.until(lambda: len(losses("runs/train")) >= 3)
    urgent = ["sbatch", "--parsable", "--partition=urgent", f"--nodes={NODES}", "--exclusive", "--wrap=sleep 0.1"]
    with cluster.held("runs/train"):  # or all steps may be done before Slurm comes to it
        first = Job(cluster, cluster.run(*urgent, "--output=/dev/null").stdout.strip())
        job.until(lambda: job["JobState"] != "RUNNING")
    first.wait("COMPLETED")
    job.wait("RUNNING")
    assert job["Restarts"] == "1"
    done = len(losses("runs/train"))
    assert 3 <= done < STEPS
    assert f"left after step {done} of {STEPS}; train --resume runs/train goes on" in job.log
    job.until(lambda: len(losses("runs/train")) >= done + 3)
    with cluster.held("runs/train"):
        cluster.run("scancel", "--signal=USR1", job.number)  # as --signal=USR1 does, when the time has come
    job.until(lambda: job["Restarts"] == "2")
    job.wait("COMPLETED")
    begun = [int(step) for step in re.findall(rf": steps (\d+) to {STEPS} of", job.log)]
    assert begun[:2] == [1, done + 1]
    assert begun[2] > done + 3
    assert losses("runs/train") == pytest.approx(whole, rel=1e-4)
    assert whole[-1] < whole[0] - 0.3


def test_64_ranks_train_as_one_does(cluster, submit, losses, whole):
    socket = cluster.folder / "forks"
    cluster.start(sys.executable, FORKS / "server.py", socket)
    until(socket.exists, cluster.logs)
    path = os.pathsep.join([str(FORKS), cluster.environment["PYTHONPATH"]])
    variables = {"LONGNET_HPC_TEST_FORKS": str(socket), "PYTHONPATH": path}
    job = submit(
        *("train", *TRAINING, "--stop-at", 3), nodes=NODES, ranks_per_node=16, options=["--gpus-per-node=0"],
        LONGNET_TOKENS=str(TOKENS), LONGNET_RUN="runs/64", **variables,
    )  # fmt: skip
    job.wait("COMPLETED")
    assert "on 64 ranks" in job.log
    assert losses("runs/64") == pytest.approx(whole[:3], rel=1e-4)


def test_job_that_cannot_succeed_is_not_put_back(cluster, submit):
    job = submit("train", *TRAINING, LONGNET_CORPUS="missing.h5", LONGNET_RUN="runs/none")
    job.wait("FAILED")
    assert "error: cannot read missing.h5" in job.log
    assert (job["Restarts"], job["ExitCode"]) == ("0", "2:0")


def test_cancelled_step_over_a_long_sequence_is_gone_on_with_by_another_job(cluster, submit, project, corpus):
    words = (*MODEL, "--chunk-len", 256, "--steps", 1)
    variables = {"LONGNET_TOKENS": "32768", "LONGNET_RUN": "runs/long"}
    chunks = project / "runs" / "long" / "chunks.jsonl"
    job = submit("billion_tokens", *words, nodes=2, **variables)
    job.until(lambda: chunks.exists() and len(read_records(chunks)) > 10)
    with cluster.held("runs/long"):
        cluster.run("scancel", job.number)
    job.wait("CANCELLED")
    until(lambda: not cluster.processes("longnet_hpc.run"), lambda: job.log)
    assert job["Restarts"] == "0"
    done = len(read_records(chunks))
    assert f"left in step 1 after {done} of 255 chunks; train --resume runs/long goes on" in job.log
    submit("billion_tokens", nodes=2, **variables).wait("COMPLETED")
    assert len(read_records(chunks)) == 255


@pytest.mark.parametrize("sweep", ["strong", "weak"])
def test_sweep_is_an_array_of_one_job_a_number_of_ranks(cluster, submit, project, sweep):
    words = (*MODEL, "--repeats", 2, "--warmup", 0)
    array = submit(
        f"{sweep}_scaling", *words, nodes=2, ranks_per_node=2, options=["--array=2,4"], LONGNET_TOKENS="1024"
    )
    for ranks in (2, 4):
        Job(cluster, f"{array.number}_{ranks}").wait("COMPLETED")
        (record,) = read_records(project / "runs" / sweep / str(ranks) / f"{sweep}.jsonl")
        tokens = 1024 * (ranks if sweep == "weak" else 1)
        assert record["what"]["config"]["point"] == {"ranks": ranks, "tokens": tokens}
        assert record["where"]["ranks_per_node"] == 2
        assert record["check"]["passed"]
