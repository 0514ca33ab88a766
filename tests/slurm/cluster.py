"""A real Slurm of several virtual nodes on this host, all in one folder: munge, slurmctld and a slurmd each."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 240
"""How long a test waits for anything that it waits for."""
NODES, CPUS, GPUS = 4, 64, 8
"""What each of the nodes has, whatever this host has: programs share its cores, and GPUs are only counted."""
_MARK = "LONGNET_HPC_TEST_CLUSTER"
"""Variable by which all processes of a cluster are found in the end."""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "setpriv")

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
EnforcePartLimits=ALL
MinJobAge=3600
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def why_not():
    """Return why no cluster can be started here, or None."""
    missing = [program for program in _PROGRAMS if find(program) is None]
    return f"needs a Slurm (Debian: slurm-wlm and munge): {', '.join(missing)} not found" if missing else None


def find(program):
    """Return where a program is, or None; daemons are in folders that a user's path may lack."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def until(holds, otherwise):
    """Wait until ``holds()`` is true, and return what it is; fail with what ``otherwise()`` says if it takes long."""
    end = time.monotonic() + SECONDS
    while not (held := holds()):
        if time.monotonic() > end:
            raise AssertionError(otherwise())
        time.sleep(0.1)
    return held


class Cluster:
    """The daemons, children of this process, and the commands that talk to them.

    Parameters
    ----------
    folder : Path
        For all they write; a short path, as sockets need.
    """

    def __init__(self, folder):
        self.folder = folder
        self._daemons = []
        here = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "PMI"))}
        self.environment = here | {"SLURM_CONF": f"{folder}/slurm.conf", _MARK: str(folder)}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error):
        self.stop()

    def run(self, *words, check=True, timeout=60, cwd=None, **variables):
        """Run a command of Slurm and return what it did."""
        done = subprocess.run(
            [*map(str, words)],
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def start(self, program, *options):
        """Start a process that ends with this cluster; with this process, too, even if that is killed."""
        with (self.folder / f"{program}-{len(self._daemons)}.log").open("wb") as log:
            daemon = subprocess.Popen(
                [find("setpriv"), "--pdeathsig", "KILL", find(program), *map(str, options)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._daemons.append(daemon)

    def logs(self):
        """Return the end of what each daemon wrote."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log"))}
        return "\n".join(f"--- {name}\n{text[-2000:]}" for name, text in texts.items())

    def stop(self):
        """End all jobs and daemons, whatever state they are in."""
        for daemon in self._daemons:
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait()
        while left := self.processes():
            self._signal(left, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self, *words):
        """Return the processes of this cluster that have all these words in their command lines."""
        mark, found = f"{_MARK}={self.folder}".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile, or another user's
                command = (path / "cmdline").read_bytes().split(b"\0")
                ours = mark in (path / "environ").read_bytes().split(b"\0")
                if ours and all(word.encode() in command for word in words):
                    found.append(int(path.name))
        return found

    @contextmanager
    def held(self, *words):
        """Stop the ranks that have these words in their command lines: they get no further than a test acts."""
        ranks = set(self.processes("longnet_hpc.run", *words)) - set(self.processes("srun"))
        self._signal(ranks, signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(ranks, signal.SIGCONT)

    @staticmethod
    def _signal(pids, number):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _start(self):
        self.folder.chmod(0o755)
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (self.folder / "ctld").mkdir()
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + NODES)
        # Numbers of its own: MPICH names shared memory after the job, and would take what a killed one left for it.
        first_job = 1 + int(time.time()) % 50_000_000
        text = _CONF.format(folder=self.folder, user=getpass.getuser(), host=host, port=ports[0], first_job=first_job)
        for number, port in enumerate(ports[1:], start=1):
            (self.folder / f"spool-node{number}").mkdir()
            text += f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            text += f"CPUs={CPUS} Gres=gpu:{GPUS}\n"
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        self.start(
            *("munged", "--foreground", f"--key-file={key}", f"--socket={munge}/socket"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        until((munge / "socket").exists, lambda: f"munged made no socket\n{self.logs()}")
        self.start("slurmctld", "-D")
        for number in range(1, NODES + 1):
            self.start("slurmd", "-D", "-N", f"node{number}")
        until(self._all_idle, lambda: f"the nodes did not become idle\n{self.logs()}")

    def _all_idle(self):
        done = self.run("sinfo", "-h", "-p", "main", "-N", "-t", "idle", "-o", "%N", check=False)
        return len(done.stdout.split()) == NODES


class Job:
    """A job, or one of an array."""

    def __init__(self, cluster, number):
        self.cluster, self.number = cluster, number

    def __getitem__(self, name):
        """Return a field of ``scontrol show job``."""
        text = self.cluster.run("scontrol", "show", "job", "-o", self.number).stdout
        return re.search(rf"\b{name}=(\S*)", text)[1]

    @property
    def log(self):
        """What the job wrote so far."""
        path = Path(self["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, state):
        """Wait until the job is in a state; fail if it ends in another."""
        self.until(lambda: self["JobState"] == state)

    def until(self, holds):
        """Wait until ``holds()`` is true; fail if the job ends before. One that is put back begins at once again."""

        def held():
            if held := holds():
                return held
            state = self["JobState"]
            if state == "PENDING" and self["Reason"] == "BeginTime":  # Slurm would wait for two minutes
                time.sleep(3)  # nodes do not take a job that they ended within the same second
                self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)
            assert state in ("PENDING", "RUNNING", "COMPLETING") or holds(), self._said()
            return False

        until(held, self._said)

    def _said(self):
        return f"job {self.number} is {self['JobState']}\n{self.log}\n{self.cluster.logs()}"


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
