"""The cluster that these tests run on, and the folder that jobs are submitted from, as a user would."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, Job, why_not

from longnet_hpc.record import read_records


@pytest.fixture(scope="session")
def cluster():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Cluster(Path(folder)) as its:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        its.environment |= {"PATH": path, "PYTHONPATH": str(ROOT)}
        yield its


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with nothing but the job scripts, in which all results lie where they are by default."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    return folder


@pytest.fixture(scope="session")
def submit(cluster, project):
    def submit(script, *words, nodes=1, ranks_per_node=1, options=(), **variables):
        size = (f"--nodes={nodes}", f"--ntasks-per-node={ranks_per_node}", "--cpus-per-task=1")
        done = cluster.run(
            *("sbatch", "--parsable", *size, *options, f"jobs/{script}.sbatch", *words), cwd=project, **variables
        )
        return Job(cluster, done.stdout.strip())

    return submit


@pytest.fixture(scope="session")
def losses(project):
    def losses(run):
        path = project / run / "metrics.jsonl"
        return [line["loss"] for line in read_records(path)] if path.exists() else []

    return losses
