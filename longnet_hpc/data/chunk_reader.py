"""Delivers this rank's slices of one long sequence, chunk after chunk, each read while the one before is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch

from longnet_hpc.data.corpus import Corpus
from longnet_hpc.data.reader import as_tensor
from longnet_hpc.trace import span

__all__ = ["ChunkReader"]


class ChunkReader:
    """Tokens and targets of slices of a corpus that is one sequence, in an order that is known before.

    Parameters
    ----------
    corpus : Corpus
        Where the tokens are. It stays open when the reader is closed.
    slices : sequence of range
        The slices in the order in which they will be asked for, in tokens; some may be empty.
    device : torch.device
        Where they go.
    first : int
        Position in the corpus of the first token of the sequence.

    Attributes
    ----------
    seconds_stalled : float
        Seconds that were spent waiting for tokens.
    """

    def __init__(self, corpus: Corpus, slices: Sequence[range], device: torch.device, first: int = 0) -> None:
        self.seconds_stalled = 0.0
        self._corpus = corpus
        self._slices = list(slices)
        self._device = device
        self._first = first
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="chunk-reader")
        self._next = 0
        self._pending: Future[torch.Tensor] | None = None
        self._prefetch()

    def __call__(self, its: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and targets of the next slice, ``(1, len(its))`` each, on the device.

        Raises
        ------
        CorpusError
            If they cannot be read, on this rank alone.
        """
        assert self._slices[self._next] == its, "slices are asked for in order"
        assert self._pending is not None
        started = time.perf_counter()
        with span("input", "tokens"):
            window = self._pending.result()
        self.seconds_stalled += time.perf_counter() - started
        self._next += 1
        self._prefetch()
        window = window.to(self._device, non_blocking=True)
        return window[None, :-1], window[None, 1:]

    def close(self) -> None:
        """End the background thread. May be called more than once."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _prefetch(self) -> None:
        self._pending = None
        if self._next < len(self._slices):
            self._pending = self._worker.submit(self._load, self._slices[self._next])

    def _load(self, its: range) -> torch.Tensor:
        """Read a slice and one token more, for the last target."""
        if not its:
            return torch.zeros(1, dtype=torch.uint8)
        window = as_tensor(self._corpus.read(self._first + its.start, self._first + its.stop + 1))
        return window.pin_memory() if self._device.type == "cuda" else window
