"""Forks a process for each rank that asks, so that 64 of them need not import torch one by one, for minutes.

Its argument is the socket to listen at.
"""

import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 - so that forks have it

import longnet_hpc.comm.launch
import longnet_hpc.run
import longnet_hpc.train


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{sys.argv[1]}.new")
        listener.listen(128)
        Path(f"{sys.argv[1]}.new").rename(sys.argv[1])  # it is there once it listens
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, descriptors, _, _ = socket.recv_fds(client, 1 << 17, 4)
    if rank := os.fork():
        _, status = os.waitpid(rank, 0)
        client.send(b"%d" % (os.waitstatus_to_exitcode(status) % 256))
        os._exit(0)
    client.close()
    its = json.loads(text)
    places = (0, 1, 2, int(its["environment"]["PMI_FD"]))
    out_of_the_way = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1 + max(places)) for descriptor in descriptors]
    for descriptor, place in zip(out_of_the_way, places, strict=True):
        os.dup2(descriptor, place)
    os.environ.clear()
    os.environ.update(its["environment"])
    os.chdir(its["folder"])
    code = longnet_hpc.run.main(its["words"])
    from mpi4py import MPI

    MPI.Finalize()
    sys.stdout.flush()
    os._exit(code)  # at a regular exit each fork would visit, and so copy, all that it shares with the others


main()
