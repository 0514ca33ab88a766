"""Where the kept rows of a whole sequence wait for the backward sweep: host memory, or an HDF5 file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import h5py
import torch

from longnet_hpc.carry import Carry
from longnet_hpc.chunk import Chunk, kept_rows
from longnet_hpc.files import replace_file
from longnet_hpc.pattern import Pattern

__all__ = ["RowStore"]

_Key = tuple[int, int]
"""A layer, and the number of a branch."""


class RowStore:
    """The rows that every chunk of a sequence left, of all layers; a background thread copies them meanwhile.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    seq_len : int
        Length of the whole sequence in tokens.
    device : torch.device or str
        Where the carries lie.
    scratch : Path, optional
        HDF5 file to keep the rows in, instead of host memory. What it has is gone on with.
    """

    def __init__(
        self, pattern: Pattern, seq_len: int, *, device: torch.device | str = "cpu", scratch: Path | None = None
    ) -> None:
        self._pattern = pattern
        self._seq_len = seq_len
        self._device = torch.device(device)
        self._place: _Place = _Memory() if scratch is None else _File(scratch)
        self._held: dict[int, int] = {}
        """The segment of each branch whose rows the carries hold."""
        self._writing: list[Future[None]] = []
        self._fetched: dict[int, tuple[int, Future[list[torch.Tensor]]]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="row-store")
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows of all chunks so far."""
        return self._place.num_bytes

    def keep(self, carries: Sequence[Carry], chunk: Chunk) -> None:
        """Keep the rows that a chunk left, once all layers have computed it and rows of other ranks have arrived.

        Those of the chunk before are waited for; `check` says whether they could be written.
        """
        wait(self._writing)  # so that copies of one chunk, not of many, lie on the device
        rows = []
        for index, branch in enumerate(self._pattern):
            if chunk.is_left_open(branch):
                segment, stop = divmod(chunk.partition.stop, branch.segment_length)
                first = chunk.tokens_before(branch) // branch.dilation_rate if chunk.is_inside(branch) else 0
                its = slice(first, -(-stop // branch.dilation_rate))
                number = segment * kept_rows(branch, self._seq_len) + first
                # A copy, since the next chunk goes on writing there.
                rows += [
                    ((layer, index), number, carry.rows[index][its].clone()) for layer, carry in enumerate(carries)
                ]
                self._held[index] = segment
        self._writing.append(self._worker.submit(self._write, rows, self._now()))

    def check(self) -> None:
        """Raise OSError if rows could not be written, of all that is done by now; on this rank alone."""
        for writing in [writing for writing in self._writing if writing.done()]:
            self._writing.remove(writing)
            writing.result()

    def fetch(self, layers: int, chunk: Chunk) -> None:
        """Start to fetch the rows of ``layers`` layers that `bring_back` will need for a chunk."""
        for index, segment in chunk.open_segments(self._pattern):
            if segment not in (self._held.get(index), self._fetched.get(index, (None,))[0]):
                branch = self._pattern.branches[index]
                first = segment * kept_rows(branch, self._seq_len)
                its = slice(first, first + -(-chunk.tokens_before(branch) // branch.dilation_rate))
                self._fetched[index] = segment, self._worker.submit(self._read, layers, index, its)

    def bring_back(self, carries: Sequence[Carry], chunk: Chunk) -> None:
        """Make the carries hold the rows that were there before a chunk; chunks come in reverse.

        Raises
        ------
        OSError
            If rows could not be written or cannot be read, on this rank alone.
        """
        self._finish_writing()
        self.fetch(len(carries), chunk)
        for index, segment in chunk.open_segments(self._pattern):
            if self._held.get(index) != segment:
                count = kept_rows(self._pattern.branches[index], self._seq_len)
                for carry, rows in zip(carries, self._fetched.pop(index)[1].result(), strict=True):
                    if rows.is_cuda:
                        rows.record_stream(torch.cuda.current_stream(self._device))
                    if index not in carry.rows:
                        carry.rows[index] = rows.new_zeros(count, *rows.shape[1:])
                    carry.rows[index][: len(rows)].copy_(rows)
                self._held[index] = segment

    def load(self, path: Path) -> None:
        """Take up what `save` wrote."""
        self._place.load(path)

    def save(self, path: Path) -> None:
        """Make sure that everything is in a file, with which a new store can go on: ``path``, or the scratch file."""
        self._finish_writing()
        self._place.save(path)

    def close(self) -> None:
        """End the background thread, and close the file."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._place.close()

    def _finish_writing(self) -> None:
        wait(self._writing)
        self.check()

    def _now(self) -> torch.cuda.Event | None:
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _write(self, rows: list[tuple[_Key, int, torch.Tensor]], ready: torch.cuda.Event | None) -> None:
        with self._beside():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            for key, first, block in rows:
                count = -(-self._seq_len // self._pattern.branches[key[1]].segment_length)
                total = count * kept_rows(self._pattern.branches[key[1]], self._seq_len)
                self._place.write(key, total, first, block.cpu())

    def _read(self, layers: int, index: int, its: slice) -> list[torch.Tensor]:
        with self._beside():
            return [self._place.read((layer, index), its).to(self._device) for layer in range(layers)]


class _Place(Protocol):
    """Rows by layer and branch, on the host."""

    @property
    def num_bytes(self) -> int: ...

    def write(self, key: _Key, total: int, first: int, rows: torch.Tensor) -> None: ...

    def read(self, key: _Key, its: slice) -> torch.Tensor: ...

    def load(self, path: Path) -> None: ...

    def save(self, path: Path) -> None: ...

    def close(self) -> None: ...


class _Memory:
    def __init__(self) -> None:
        self._rows: dict[_Key, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def write(self, key: _Key, total: int, first: int, rows: torch.Tensor) -> None:
        if key not in self._rows:
            self._rows[key] = rows.new_empty(total, *rows.shape[1:])
        self._rows[key][first : first + len(rows)] = rows

    def read(self, key: _Key, its: slice) -> torch.Tensor:
        return self._rows[key][its]

    def load(self, path: Path) -> None:
        file = _File(path, "r")
        self._rows = {key: file.read(key, slice(None)) for key in file.keys}
        file.close()

    def save(self, path: Path) -> None:
        def write(partial: Path) -> None:
            file = _File(partial, "w")
            for key, rows in self._rows.items():
                file.write(key, len(rows), 0, rows)
            file.close()

        replace_file(path, write)

    def close(self) -> None:
        self._rows.clear()


class _File:
    def __init__(self, path: Path, mode: str = "a") -> None:
        self._file = h5py.File(path, mode)

    @property
    def num_bytes(self) -> int:
        return sum(int(dataset.nbytes) for dataset in self._file.values())

    def write(self, key: _Key, total: int, first: int, rows: torch.Tensor) -> None:
        name = "{}-{}".format(*key)
        as_bytes = rows.flatten(1).view(torch.uint8).numpy()  # HDF5 knows no bfloat16
        if name not in self._file:
            dataset = self._file.create_dataset(name, (total, as_bytes.shape[1]), "u1")
            dataset.attrs["shape"], dataset.attrs["dtype"] = rows.shape[1:], str(rows.dtype).removeprefix("torch.")
        self._file[name][first : first + len(rows)] = as_bytes

    def read(self, key: _Key, its: slice) -> torch.Tensor:
        dataset = self._file["{}-{}".format(*key)]
        rows = torch.from_numpy(dataset[its]).view(getattr(torch, dataset.attrs["dtype"]))
        shaped: torch.Tensor = rows.unflatten(1, tuple(dataset.attrs["shape"].tolist()))
        return shaped

    @property
    def keys(self) -> list[_Key]:
        layers_and_branches = (name.split("-") for name in self._file)
        return [(int(layer), int(index)) for layer, index in layers_and_branches]

    def load(self, path: Path) -> None:
        name = self._file.filename
        if not path.samefile(name):
            self._file.close()
            shutil.copyfile(path, name)
            self._file = h5py.File(name, "a")

    def save(self, path: Path) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
