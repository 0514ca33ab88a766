"""A command in which something goes wrong on one rank: ``python faults.py FAULT RANK STEP words...``.

Runs ``longnet_hpc.run`` with the words, after arranging that on this rank the fault happens before this step of a
training. The library knows nothing of it: what is patched here are functions of the child. A new fault is a function
that takes the trainer, and a line in `FAULTS`.
"""

import os
import signal
import stat
import sys
import time

import h5py
import safetensors.torch

from longnet_hpc import tensor_file
from longnet_hpc.data import token_files
from longnet_hpc.launcher import environment_rank
from longnet_hpc.picture import draw_loss_curve  # noqa: F401 - so that no import counts as silence under the watch
from longnet_hpc.run import main
from longnet_hpc.train import train  # noqa: F401 - the same
from longnet_hpc.trainer import Trainer

REPLACEMENT = "replacement.h5"
"""Corpus beside the one in use, for the fault that replaces it."""
FILLER = "filler"
"""File with which a disk is filled, in the folder above that of the run."""


def nothing(trainer):
    pass


def signalled(trainer):
    signal.raise_signal(signal.SIGTERM)


def nan_loss(trainer):
    real = trainer.model.loss
    trainer.model.loss = lambda *words, **options: real(*words, **options) * float("nan")


def slow(trainer):
    """From here on each step takes a quarter of the limit of the watch; the rank advances nevertheless."""
    real = trainer.accumulate

    def accumulate():
        time.sleep(trainer.config.watchdog_seconds / 4)
        return real()

    trainer.accumulate = accumulate


def break_handle(tokens):
    """Let HDF5's reads of an open dataset fail as those of a sick disk do: with EIO, until it is opened anew."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)  # nothing lies at the addresses that are offsets in a file
    os.dup2(memory, tokens.file.id.get_vfd_handle())
    os.close(memory)


def failing_reads(trainer, times=3):
    """Let the next reads of the corpus fail, each after the file was opened anew."""
    real = token_files.TokenFiles.read

    def read(files, start, stop):
        nonlocal times
        if times > 0:
            times -= 1
            real(files, start, stop)  # so that it is open
            for tokens in files._open.values():
                break_handle(tokens)
        return real(files, start, stop)

    token_files.TokenFiles.read = read


def failing_disk(trainer):
    """From here on the corpus can neither be read nor opened."""
    failing_reads(trainer, times=1)

    def refuse(*words, **options):
        raise OSError(5, "Unable to open file (errno = 5, error message = 'Input/output error', buf = 0x7ffe)")

    h5py.File = refuse


def corpus_removed(trainer):
    trainer.corpus.path.unlink()


def corpus_replaced(trainer):
    trainer.corpus.path.with_name(REPLACEMENT).replace(trainer.corpus.path)


def disk_full(trainer):
    fill(trainer.config.folder.parent / FILLER)


def fill(path):
    with path.open("wb", buffering=0) as stream:
        for size in (1 << 16, 1):  # to the last byte
            try:
                while stream.write(b"\0" * size):
                    pass
            except OSError:
                continue


def slow_disk(trainer, pieces=24):
    """Let the next checkpoint take longer to be written than the watch waits, while it grows all the time."""
    real, seconds = tensor_file.save_file, 1.5 * trainer.config.watchdog_seconds

    def save_slowly(tensors, path, metadata):
        tensor_file.save_file = real
        whole = safetensors.torch.save(tensors, metadata)
        with path.open("wb", buffering=0) as stream:
            for piece in range(pieces):
                time.sleep(seconds / pieces)
                stream.write(whole[piece * len(whole) // pieces : (piece + 1) * len(whole) // pieces])

    tensor_file.save_file = save_slowly


def hung_disk(trainer):
    """From here on no checkpoint comes to its end."""
    tensor_file.save_file = lambda *words: time.sleep(30 * trainer.config.watchdog_seconds)


def killed_between_rename_and_sync(trainer):
    """Kill this rank when it next hands a folder to the disk, which it does after a file got its name."""
    real = os.fsync

    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            os.kill(os.getpid(), signal.SIGKILL)
        real(number)

    os.fsync = fsync


FAULTS = {
    fault.__name__: fault
    for fault in (
        *(nothing, signalled, nan_loss, slow, failing_reads, failing_disk, corpus_removed, corpus_replaced),
        *(disk_full, slow_disk, hung_disk, killed_between_rename_and_sync),
    )
}


def arrange(fault, step):
    """Let a fault happen before a step of the training on this rank."""
    real = Trainer.step

    def faulty(trainer):
        if trainer.steps_done + 1 == step:
            fault(trainer)
        return real(trainer)

    Trainer.step = faulty


if __name__ == "__main__":
    name, rank, step, *words = sys.argv[1:]
    if environment_rank() == int(rank):
        arrange(FAULTS[name], int(step))
    sys.exit(main(words))
