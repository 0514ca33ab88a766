"""Launching, as its own processes: who notices what, and how fast a failing job ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import environment, run_python, slowness

from longnet_hpc.comm import transport
from longnet_hpc.errors import LaunchError

MPIRUN = Path(sys.executable).with_name("mpirun")

needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpirun of an MPI wheel beside this Python")


def run(code, *command, **variables):
    started = time.monotonic()
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return done, time.monotonic() - started


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_launcher_and_library_that_do_not_fit_are_noticed(variables):
    code = "from longnet_hpc.comm.launch import start\ntry: start()\nexcept ValueError as e: print(type(e).__name__, e)"
    done, _ = run(code, **variables)
    assert "LaunchError" in done.stdout, done.stderr
    assert "started 4 ranks, but this MPI library" in done.stdout
    assert "use the mpirun beside this Python" in done.stdout


def test_one_process_needs_no_mpi():
    code = (
        "import sys; from longnet_hpc.comm.launch import start; launch = start(device='cpu');"
        "assert launch.comm is None and launch.size == 1 and 'mpi4py.MPI' not in sys.modules"
    )
    assert run(code)[0].returncode == 0


@needs_mpirun
def test_exception_on_one_rank_ends_all_ranks_with_its_traceback():
    code = (
        "from longnet_hpc.comm.launch import start; import time; launch = start(device='cpu')\n"
        "if launch.rank == 2: raise RuntimeError('a defect')\n"
        "launch.comm.Barrier()"
    )
    done, seconds = run(code, str(MPIRUN), "-n", "4")
    assert done.returncode != 0
    assert "rank 2 of 4 failed and ends the job" in done.stderr
    assert "RuntimeError: a defect" in done.stderr
    assert seconds < 30 * slowness()  # the start of four interpreters included; test_bad_input times the end alone


@needs_mpirun
def test_device_that_one_rank_lacks_is_an_error_on_all_ranks():
    code = (
        "from longnet_hpc.comm import launch; from longnet_hpc.launcher import environment_rank\n"
        "from longnet_hpc.errors import LaunchError\n"
        "try: launch.start(device='cuda' if environment_rank() == 1 else 'cpu')\n"
        "except LaunchError as error: print(error, flush=True)"
    )
    done, _ = run(code, str(MPIRUN), "-n", "3", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device cuda was asked for") == 3


@needs_mpirun
def test_job_of_another_size_than_the_launcher_said_is_noticed():
    code = (
        "import os; os.environ['PMI_SIZE'] = os.environ['OMPI_COMM_WORLD_SIZE'] = '2'\n"
        "os.environ.setdefault('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', '0'))\n"
        "from mpi4py import MPI\n"
        "os.environ['PMI_SIZE'] = os.environ['OMPI_COMM_WORLD_SIZE'] = '4'\n"
        "from longnet_hpc.comm.launch import start\n"
        "try: start(device='cpu')\n"
        "except ValueError as error: print(error, flush=True)"
    )
    done, _ = run(code, str(MPIRUN), "-n", "2")
    assert done.stdout.count("started 4 ranks, but this MPI library") == 2, done.stderr


@needs_mpirun
def test_ranks_learn_their_place_from_the_launcher():
    code = (
        "from longnet_hpc.comm.launch import start\n"
        "from longnet_hpc.launcher import environment_rank, environment_size\n"
        "seen = environment_rank(), environment_size(); launch = start(device='cpu')\n"
        "assert seen == (launch.rank, launch.size) == (launch.node_rank, 3) and launch.node_size == 3"
    )
    done, _ = run(code, str(MPIRUN), "-n", "3")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("code", "reason"), [
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of signal 11"),
    ("import time; time.sleep(60)", "did not end within 1 s"),
    ("raise SystemExit('no such device')", "no such device"),
])  # fmt: skip
def test_trial_exchange_that_crashes_or_hangs_means_staged(monkeypatch, code, reason):
    monkeypatch.setattr(transport, "_CHILD", code)
    works, why = transport.device_pointers_work(seconds=1.0)
    assert not works
    assert reason in why or "did not end" in why
    if "sleep" not in code:
        assert transport.device_pointers_work(seconds=30.0)[1].endswith(reason)


def test_transport_can_be_forced_and_nonsense_is_refused(monkeypatch):
    monkeypatch.setattr(transport, "_decided", None)
    monkeypatch.setenv(transport.VARIABLE, "direct")
    assert transport.decide_transport(None) is transport.Transport.DIRECT
    assert transport.decide_transport(None, "staged") is transport.Transport.STAGED
    with pytest.raises(LaunchError, match="got 'magic'"):
        transport.decide_transport(None, "magic")


@pytest.mark.parametrize("end", ["", "MPI.Finalize()"])
def test_process_that_only_sends_does_not_end_before_others_have_its_rows(end, tmp_path):
    script = tmp_path / "late.py"
    script.write_text(f"""if True:
        import sys, time, torch
        from mpi4py import MPI
        from longnet_hpc.comm.buffers import start_alltoallv
        comm, rows = MPI.COMM_WORLD, 1 << 20
        sends = comm.rank == 0
        time.sleep(0 if sends else 2)
        counts = [0, rows] if sends else [0, 0]
        send = torch.ones(rows if sends else 0, 8)
        received = start_alltoallv(comm, send, counts, [0, 0], [0 if sends else rows, 0]).finish()
        print("received" if received.sum() == received.numel() else "WRONG", received.numel(), flush=True)
        {end}
    """)
    done = run_python(script, ranks=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(["received", "0", "received", str(8 << 20)])
