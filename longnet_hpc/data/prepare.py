"""From sources to a corpus file, each rank writing its own shard."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_hpc.comm import agreed, allgather_objects, broadcast_object, rank_and_size
from longnet_hpc.data.corpus import MAX_CHUNK_TOKENS, shard_names
from longnet_hpc.data.failures import HDF5_ERRORS, corpus_errors
from longnet_hpc.data.sources import STANDARD_INPUT, Unit, find_units
from longnet_hpc.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from longnet_hpc.data.writer import Shard, ShardWriter, join_shards
from longnet_hpc.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["prepare", "share_out"]


@dataclass(frozen=True)
class _Job:
    """What rank 0 found and decided, the same on all ranks."""

    path: Path
    overwrite: bool
    tokenizer: Tokenizer
    chunk_tokens: int
    blocks: list[list[Unit]]
    """What each shard holds, in order."""
    writers: list[int]
    """The shard that each rank writes."""
    label: str
    """Tells the shards of this run from those of any other."""

    def shard_name(self, shard: int) -> str:
        return f"{self.path.name}.{self.label}.shard-{shard:05d}.h5"

    def partial_path(self, name: str) -> Path:
        return self.path.parent / f".{name}.{self.label}.partial"


def prepare(
    sources: Iterable[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = BYTES,
    comm: MPI.Comm | None = None,
    chunk_tokens: int = 1 << 20,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a corpus file. Collective; what counts is what rank 0 passes.

    Each rank reads a contiguous part of the sources and writes one shard; the file at ``path`` joins them. Tokens and
    documents do not depend on the number of ranks. Everything is written under temporary names and gets its own when
    all ranks are done; if any fails, nothing remains and an existing corpus stays as it was. Memory does not grow with
    the size of a document.

    Several jobs may prepare the same file at once: without ``overwrite`` one of them makes it, by a hard link, and the
    others raise the error of a file that exists, after which it does exist and is whole.

    Parameters
    ----------
    sources : iterable of str or path
        Files, folders, globs, or ``-`` for standard input (of rank 0), as `find_units` describes them.
    path : str or path
        File to write, in a folder that all ranks share; its folder is made if need be. Shards are written beside it.
    tokenizer : str or path
        ``bytes``, or a JSON file of the Hugging Face ``tokenizers`` package.
    comm : mpi4py.MPI.Comm or None
        Ranks that take part.
    chunk_tokens : int
        Tokens under one checksum, 1 to `MAX_CHUNK_TOKENS`.
    overwrite : bool
        Replace an existing file, and remove the shards that it names.
    progress : callable, optional
        Called on each rank with the size, in bytes, of every further piece of a source that it has read. Compressed
        files count as stored: in all, the ranks report the sizes of the files, whatever text these hold.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConfigError
        If the tokenizer or ``chunk_tokens`` cannot be.
    CorpusError
        If a source is missing, unreadable or damaged, there is no text at all, the file exists, or it cannot be
        written. The same on all ranks.
    """
    rank, size = rank_and_size(comm)
    job: _Job | None = None
    with agreed(comm):
        if rank == 0:
            job = _plan(sources, Path(path), tokenizer, chunk_tokens, overwrite, size)
    job = broadcast_object(comm, job)
    assert job is not None
    own: list[Path] = []  # what this rank removes if any rank fails
    try:
        replaced = _write(job, comm, own, progress)
    except BaseException:
        for written in own:
            written.unlink(missing_ok=True)
        raise
    _remove_leftovers(job, comm, replaced)
    return job.path


def share_out(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    """Cut the units into ``size`` contiguous blocks of about equal bytes; some may be empty.

    A unit goes to the block in which its middle lies.
    """
    total = sum(unit.size for unit in units)
    blocks: list[list[Unit]] = [[] for _ in range(size)]
    for unit, stop in zip(units, accumulate(unit.size for unit in units), strict=True):
        blocks[min((2 * stop - unit.size) * size // max(2 * total, 1), size - 1)].append(unit)
    return blocks


def _plan(
    sources: Iterable[str | os.PathLike[str]],
    path: Path,
    tokenizer: str | os.PathLike[str],
    chunk_tokens: int,
    overwrite: bool,
    size: int,
) -> _Job:
    if not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise ConfigError(f"chunk_tokens must be 1 to {MAX_CHUNK_TOKENS}, got {chunk_tokens}")
    with corpus_errors(f"cannot write {path}"):
        if path.is_dir():
            raise CorpusError(f"cannot write {path}: it is a folder")
        if path.exists() and not overwrite:
            raise _exists(path)
        units = find_units(sources)
        if path.exists() and any(path.samefile(unit.path) for unit in units if unit.path != STANDARD_INPUT):
            raise CorpusError(f"{path} is one of its own sources")
        path.parent.mkdir(parents=True, exist_ok=True)
    blocks = share_out(units, size)
    writers = list(range(size))
    for shard, block in enumerate(blocks):
        if any(unit.path == STANDARD_INPUT for unit in block):  # only rank 0 has the standard input
            writers[0], writers[shard] = shard, 0
    return _Job(path, overwrite, load_tokenizer(tokenizer), chunk_tokens, blocks, writers, secrets.token_hex(4))


def _exists(path: Path) -> CorpusError:
    return CorpusError(f"{path} exists and is not overwritten without --overwrite")


def _write(job: _Job, comm: MPI.Comm | None, own: list[Path], progress: Callable[[int], object] | None) -> list[Path]:
    """Write and join the shards, and return what `_publish` does; ``own`` lists what this rank has made."""
    rank, _ = rank_and_size(comm)
    block = job.writers[rank]
    failing = f"cannot write {job.path}"
    shard: Shard | None = None
    with agreed(comm), corpus_errors(failing, HDF5_ERRORS):
        if job.blocks[block]:
            own.append(job.partial_path(job.shard_name(block)))
            shard = _write_shard(job, block, progress)
    written = allgather_objects(comm, shard)
    in_order = [written[job.writers.index(number)] for number in range(len(written))]
    shards = [found for found in in_order if found is not None and found.num_documents]
    if not any(found.num_tokens for found in shards):
        raise CorpusError("the sources have no text; needs at least 1 byte")
    alone = len(shards) == 1  # one shard is a corpus by itself
    corpus = job.partial_path(shards[0].name if alone else job.path.name)
    with agreed(comm), corpus_errors(failing, HDF5_ERRORS):
        if rank == 0 and not alone:
            own.append(corpus)
            join_shards(corpus, shards, [job.partial_path(found.name) for found in shards], job.tokenizer)
    with agreed(comm), corpus_errors(failing):
        if shard is not None and shard.num_tokens and not alone:
            own.append(job.path.parent / shard.name)
            job.partial_path(shard.name).replace(own[-1])
    replaced: list[Path] = []
    with agreed(comm), corpus_errors(failing):
        if rank == 0:
            replaced = _publish(job, corpus)
    return replaced


def _write_shard(job: _Job, block: int, progress: Callable[[int], object] | None) -> Shard:
    name = job.shard_name(block)
    with ShardWriter(job.partial_path(name), job.tokenizer, job.chunk_tokens) as writer:

        def counted(blocks: Iterator[bytes]) -> Iterator[bytes]:
            for text in blocks:
                writer.num_bytes += len(text)
                yield text

        for unit in job.blocks[block]:
            for document in unit.documents(progress):
                writer.add_document(document.name, job.tokenizer.encode(document.name, counted(document.blocks)))
        writer.close()
    return Shard(name, writer.num_tokens, writer.num_bytes, writer.num_documents)


def _publish(job: _Job, corpus: Path) -> list[Path]:
    """Give the finished file its name; return the shards of the corpus that it replaced."""
    if job.overwrite:
        replaced = _shards_of(job.path)
        corpus.replace(job.path)
        return replaced
    try:
        job.path.hardlink_to(corpus)  # unlike a rename, it fails if another job has made the file meanwhile
    except FileExistsError as error:
        raise _exists(job.path) from error
    except OSError:  # a file system without hard links: claim the name, then rename
        try:
            os.close(os.open(job.path, os.O_CREAT | os.O_EXCL))
        except FileExistsError as error:
            raise _exists(job.path) from error
        try:
            corpus.replace(job.path)
        except OSError:
            job.path.unlink()
            raise
    return []


def _shards_of(path: Path) -> list[Path]:
    """Return the shards that are the corpus's own: a copy under another name shares those of its original."""
    try:
        names = shard_names(path)
    except CorpusError:  # nothing is there, or a file that is no corpus and so has no shards
        return []
    return [path.parent / name for name in names if name.startswith(f"{path.name}.")]


def _remove_leftovers(job: _Job, comm: MPI.Comm | None, replaced: list[Path]) -> None:
    """Remove the temporary files of this rank, and on rank 0 the shards of the corpus that was replaced."""
    rank, _ = rank_and_size(comm)
    leftovers = [job.partial_path(job.shard_name(job.writers[rank])), *replaced]
    if rank == 0:
        leftovers.append(job.partial_path(job.path.name))
    with agreed(comm), corpus_errors(f"cannot remove what {job.path} no longer needs"):
        for path in leftovers:
            path.unlink(missing_ok=True)
