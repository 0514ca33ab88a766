"""Checkpoints that are written in the background: a thread of each rank that has something to write.

Steps up to a checkpoint are safe when its files are on the disk. So the gradient of the next step is computed while
they are written, but that step does not change the weights, and does not count, before they are: a run that is killed
at any moment repeats at most the steps of one interval, as if it had waited for the disk, and what it had begun of one
more.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from longnet_hpc.checkpoint import (
    commit_checkpoint,
    discard_checkpoint,
    remove_old,
    save_checkpoint,
    write_checkpoint,
    written_so_far,
)
from longnet_hpc.checkpoint_shards import Shard
from longnet_hpc.comm import agreed, allgather_objects, broadcast_object
from longnet_hpc.comm.launch import Launch
from longnet_hpc.comm.meeting import Meeting
from longnet_hpc.errors import LongNetError
from longnet_hpc.life import life
from longnet_hpc.trace import span
from longnet_hpc.trainer import Trainer

__all__ = ["CheckpointWriter"]

_LOOKS_SECONDS = 0.2
"""Between two looks at how far a file has grown; less than the beat of any watchdog that leaves time to write."""


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; its end waits for the last one. All methods are collective.

    So does an end by an error that all ranks have: what was begun then still counts.

    Parameters
    ----------
    folder : Path
        Of the run.
    launch : Launch
        This rank.
    keep : int
        Checkpoints that are kept, the latest ones.
    saved : int or None
        Step of the checkpoint that the run goes on from, which need not be written again.
    """

    def __init__(self, folder: Path, launch: Launch, keep: int, saved: int | None) -> None:
        self._folder, self._comm, self._rank, self._keep = folder, launch.comm, launch.rank, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint writer")
        self._meeting = Meeting(launch.comm)
        self._tasks: list[Future[object]] = []
        self._saved = saved
        self._step: int | None = None
        """Of the checkpoint that is being written."""
        self._in_shards = False
        self._written: Callable[[], int] = lambda: 0
        """How much of it is written, in bytes."""
        self._has_warned = False

    def begin(self, trainer: Trainer) -> None:
        """Copy the state of a trainer, and begin to write it when the checkpoint before is on the disk.

        Raises
        ------
        OSError
            As `settle`.
        """
        self.settle()
        step = trainer.steps_done
        if step == self._saved:
            return
        with span("checkpoint", "copy for a checkpoint"):
            checkpoint = trainer.checkpoint()
        self._step, self._in_shards = step, trainer.shards > 1
        if self._in_shards:
            save = broadcast_object(self._comm, secrets.token_hex(8))
            shard = Shard(self._rank, trainer.shards, save)
            self._written = partial(written_so_far, self._folder, step, shard)
            self._do(write_checkpoint, self._folder, checkpoint, shard)
        elif self._rank == 0:
            self._written = partial(written_so_far, self._folder, step)
            self._do(save_checkpoint, self._folder, checkpoint)

    def settle(self) -> None:
        """Wait until what is being written is on the disks of all ranks, if anything is.

        Raises
        ------
        OSError
            If a rank could not write its part. All ranks then raise it, and the last checkpoint is the one before.
        """
        if self._step is None:
            return
        step, self._step = self._step, None
        try:
            with span("checkpoint", "wait for a checkpoint"):
                with agreed(self._comm):
                    self._wait()
                if self._in_shards:
                    with agreed(self._comm):
                        if self._rank == 0:
                            commit_checkpoint(self._folder, step)
        except OSError:
            if self._rank == 0 and self._in_shards:
                discard_checkpoint(self._folder, step)
            raise
        self._saved = step
        if self._rank == 0:
            self._do(self._remove_old, step)

    def settle_if_written(self) -> None:
        """Do as `settle` if that need not wait: for what lasts longer than writing does."""
        if self._step is not None and all(allgather_objects(self._comm, all(its.done() for its in self._tasks))):
            self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.settle()
                with agreed(self._comm):
                    self._wait()
                self._meeting.close()
            elif self._step is not None and isinstance(error, LongNetError | OSError) and self._meeting.all_arrive():
                self._settle_after_error()
        finally:
            self._thread.shutdown()
            for task in self._tasks:  # of a job that ends with an error of another kind
                if task.exception() is not None:
                    logging.getLogger("longnet_hpc").warning("warning: %s", task.exception())

    def _settle_after_error(self) -> None:
        """Do as `settle`, but only warn of what goes wrong: the error before is the one to tell."""
        try:
            self.settle()
        except OSError as error:
            if self._rank == 0:
                logging.getLogger("longnet_hpc").warning("warning: %s", error)

    def _remove_old(self, step: int) -> None:
        """Remove the checkpoints that are not kept; the new one counts even where they cannot be removed."""
        try:
            remove_old(self._folder, self._keep, step)
        except OSError as error:
            if not self._has_warned:  # it is tried again after each checkpoint
                logging.getLogger("longnet_hpc").warning("warning: %s", error)
            self._has_warned = True

    def _do(self, work: Callable[..., object], *words: object) -> None:
        """Do something in the thread, after what it was given before."""
        self._tasks.append(self._thread.submit(work, *words))

    def _wait(self) -> None:
        """Wait for what this rank writes, and raise what went wrong first; it lives for as long as its files grow."""
        tasks, self._tasks = self._tasks, []
        written = 0
        while wait(tasks, _LOOKS_SECONDS).not_done:
            before, written = written, self._written()
            life.progress += written != before
        for task in tasks:
            task.result()
