"""Lets a Python that is to run longnet_hpc have it run by a fork of one that has imported everything; see server.py."""

import json
import os
import socket
import sys

if "LONGNET_HPC_TEST_FORKS" in os.environ and "longnet_hpc.run" in sys.orig_argv:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ["LONGNET_HPC_TEST_FORKS"])
        its = {"words": sys.orig_argv[sys.orig_argv.index("longnet_hpc.run") + 1 :], "environment": dict(os.environ)}
        # The launcher speaks with a rank through a descriptor that the rank inherits.
        descriptors = [0, 1, 2, int(os.environ["PMI_FD"])]
        socket.send_fds(server, [json.dumps(its | {"folder": os.getcwd()}).encode()], descriptors)  # noqa: PTH109
        os._exit(int(server.recv(3) or b"1"))
