"""Delivers this rank's slice of one batch of sequences after another."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from longnet_hpc.data.corpus import Corpus
from longnet_hpc.errors import ConfigError, CorpusError, PartitionError

__all__ = ["Permutation", "SequenceReader", "as_tensor", "sequence_count"]

Batch = tuple[torch.Tensor, torch.Tensor]

_COMPUTED_AS = {2: np.int32, 4: np.int64}
"""Torch has hardly any operations for the wider unsigned integers, by bytes a token."""


def sequence_count(num_tokens: int, seq_len: int) -> int:
    """Return how many sequences of ``seq_len`` tokens, each followed by one target more, a corpus has."""
    return max(num_tokens - 1, 0) // seq_len


class Permutation:
    """A pseudo-random order of ``range(count)`` that is computed where it is asked for and never stored.

    A Feistel network on the smallest even number of bits that holds ``count``, keyed by XXH3, walked until it lands
    below ``count``. The order depends on the arguments alone: not on the number of ranks, the machine or a library's
    version.

    Parameters
    ----------
    count : int
        How many values are permuted, at least 1.
    seed, epoch : int
        Choose the order, 0 to below 2**64.
    """

    _ROUNDS = 6

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self._half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._keys = [
            xxhash.xxh3_64_intdigest(b"".join(word.to_bytes(8, "little") for word in (seed, epoch, number)))
            for number in range(self._ROUNDS)
        ]

    def __getitem__(self, position: int) -> int:
        """Return the value at ``position``, 0 to below ``count``."""
        if not 0 <= position < self.count:
            raise IndexError(position)
        index = self._shuffle(position)
        while index >= self.count:
            index = self._shuffle(index)
        return index

    def _shuffle(self, index: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = index >> self._half_bits, index & mask
        for key in self._keys:
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(right.to_bytes(8, "little"), seed=key) & mask)
        return left << self._half_bits | right


class SequenceReader:
    """An endless iterator over batches of sequences, of which this rank reads only its slice.

    Sequence i is tokens ``[i * seq_len, (i + 1) * seq_len)``; its targets are the tokens one further, so that a
    slice's last target may be the next slice's first token. An epoch delivers each sequence at most once; those that do
    not fill a batch are left out. Not collective: an error can appear on one rank alone.

    Parameters
    ----------
    corpus : Corpus
        Where the tokens are. It stays open when the reader is closed.
    seq_len : int
        Length of a sequence, in tokens.
    batch_size : int
        Sequences per batch.
    slice_of : range
        This rank's part of every sequence, in tokens, within ``range(seq_len)``; may be empty.
    seed : int
        Chooses the order of the sequences together with the epoch, 0 to below 2**64; the same on all ranks.
    shuffle : bool
        Permute the sequences anew in each epoch; else they come as they lie in the corpus.
    start_batch : int
        How many batches to pass over: a reader that starts at another's `batch_index` goes on as that one would have.
    prefetch : bool
        Read the next batch in a background thread.

    Attributes
    ----------
    batch_index : int
        Number of batches delivered, those passed over included.
    num_sequences : int
        Sequences in the corpus.
    batches_per_epoch : int
        Batches in one epoch.

    Raises
    ------
    CorpusError
        If the corpus is shorter than one batch; while iterating, if it is damaged.
    ConfigError
        If a number is outside its limits.
    PartitionError
        If the slice is not within a sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        batch_size: int,
        slice_of: range,
        seed: int,
        shuffle: bool,
        start_batch: int = 0,
        prefetch: bool = True,
    ) -> None:
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if start_batch < 0:
            raise ConfigError(f"start_batch must be at least 0, got {start_batch}")
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed must be 0 to {(1 << 64) - 1}, got {seed}")
        if slice_of.step != 1 or not 0 <= slice_of.start <= slice_of.stop <= seq_len:
            raise PartitionError(f"slice must lie within range({seq_len}), got {slice_of}")
        self.num_sequences = sequence_count(corpus.num_tokens, seq_len)
        self.batches_per_epoch = self.num_sequences // batch_size
        if self.batches_per_epoch == 0:
            raise CorpusError(
                f"corpus has {corpus.num_tokens} tokens; needs at least {batch_size * seq_len + 1} for batch_size "
                f"{batch_size} of seq_len {seq_len}; lower --seq-len or prepare more text"
            )
        self.batch_index = start_batch
        self._corpus = corpus
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._slice = slice_of
        self._seed = seed
        self._shuffle = shuffle
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="sequence-reader") if prefetch else None
        self._pending: Future[Batch] | None = None
        self._start_prefetch()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch: inputs and targets on the CPU, ``(batch_size, len(slice_of))`` each.

        They overlap in memory. Their dtype is the narrowest that torch computes with: uint8 for bytes, int32 where the
        corpus stores 2 bytes a token, int64 where it stores 4.
        """
        pending, self._pending = self._pending, None
        batch = self._load(self.batch_index) if pending is None else pending.result()
        self.batch_index += 1
        self._start_prefetch()
        return batch

    def window(self, batch_index: int) -> NDArray[Any]:
        """Return any batch as stored: this rank's slice of its sequences, and one token more for the last target.

        Parameters
        ----------
        batch_index : int
            Which batch, counted over all epochs. `batch_index` of the reader does not change.

        Returns
        -------
        ndarray
            Shape ``(batch_size, len(slice_of) + 1)``, of the corpus's type. For an empty slice nothing is read and it
            holds zeros.
        """
        starts = [sequence * self._seq_len + self._slice.start for sequence in self.sequences(batch_index)]
        window = np.zeros((self._batch_size, len(self._slice) + 1), dtype=self._corpus.dtype)
        for row, start in zip(window, starts, strict=True):
            if self._slice:
                row[:] = self._corpus.read(start, start + len(row))
        return window

    def close(self) -> None:
        """Wait for the background thread and end it. May be called more than once."""
        self._pending = None
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start_prefetch(self) -> None:
        if self._worker is not None:
            self._pending = self._worker.submit(self._load, self.batch_index)

    def sequences(self, batch_index: int) -> list[int]:
        """Return the numbers of the sequences of a batch, counted over all epochs."""
        epoch, batch = divmod(batch_index, self.batches_per_epoch)
        positions = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        if not self._shuffle:
            return list(positions)
        order = Permutation(self.num_sequences, self._seed, epoch)
        return [order[position] for position in positions]

    def _load(self, batch_index: int) -> Batch:
        tokens = as_tensor(self.window(batch_index))
        return tokens[:, :-1], tokens[:, 1:]


def as_tensor(tokens: NDArray[Any]) -> torch.Tensor:
    """Return tokens as stored in the narrowest dtype that torch computes with."""
    return torch.from_numpy(tokens.astype(_COMPUTED_AS.get(tokens.itemsize, tokens.dtype), copy=False))
