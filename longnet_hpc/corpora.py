"""The prepare command, and the embedded corpus that every machine with Python has."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from longnet_hpc.comm import agreed, broadcast_object
from longnet_hpc.comm.launch import Launch
from longnet_hpc.config import PrepareConfig
from longnet_hpc.config_file import to_table
from longnet_hpc.data import Corpus, default_sources, prepare
from longnet_hpc.data.sources import STANDARD_INPUT, find_units
from longnet_hpc.errors import CorpusError
from longnet_hpc.files import naming_errors
from longnet_hpc.progress import bytes_bar
from longnet_hpc.record import append_record, make_record, where

__all__ = ["embedded_corpus", "embedded_path", "prepare_corpus"]

_HELD_OUT = 20
"""One file in so many of the standard library is left out of the training."""


def prepare_corpus(config: PrepareConfig, launch: Launch) -> Path:
    """Write a corpus file, with a bar, and a record beside it. Collective.

    Raises
    ------
    ConfigError or CorpusError
        As `longnet_hpc.data.prepare`; the same on all ranks.
    """
    begin = time.perf_counter()
    with agreed(launch.comm):
        sources = config.sources or default_sources()
        total = _source_bytes(sources) if launch.rank == 0 else None
    # The bar shows rank 0's share scaled to the whole: all ranks have about as many bytes to read.
    with bytes_bar(launch.rank, f"prepare {config.output.name}", total) as update:
        path = prepare(
            sources,
            config.output,
            tokenizer=config.tokenizer,
            comm=launch.comm,
            chunk_tokens=config.chunk_tokens,
            overwrite=config.overwrite,
            progress=lambda count: update(count * launch.size),
        )
    seconds = time.perf_counter() - begin
    record = path.with_name(path.name + ".record.jsonl")
    with agreed(launch.comm), naming_errors(f"{path} is whole, but cannot write its record {record}"):
        if launch.rank == 0:
            _write_record(record, path, config, launch, seconds)
    return path


def embedded_corpus(launch: Launch, part: str, folder: Path) -> Path:
    """Return the corpus of Python's standard library, preparing it if it is not there. Collective.

    Parameters
    ----------
    launch : Launch
        This rank.
    part : str
        ``train``, or ``valid``: the files that the training leaves out.
    folder : Path
        Where the corpus files are.
    """
    path = embedded_path(part, folder)
    if broadcast_object(launch.comm, path.exists()):
        return path
    sources = default_sources()
    chosen = [name for number, name in enumerate(sources) if (number % _HELD_OUT == 0) == (part == "valid")]
    try:
        return prepare_corpus(PrepareConfig(sources=tuple(chosen), output=path), launch)
    except CorpusError:
        # Another job may have made it meanwhile; a corpus file that exists is whole.
        if broadcast_object(launch.comm, path.exists()):
            return path
        raise


def embedded_path(part: str, folder: Path) -> Path:
    """Return where `embedded_corpus` keeps that part in that folder; it need not exist."""
    return folder / f"python-{sys.version_info.major}.{sys.version_info.minor}-{part}.h5"


def _source_bytes(sources: Sequence[str]) -> int | None:
    """Return the size of the sources as they are stored, or None for standard input."""
    return None if STANDARD_INPUT in sources else sum(unit.size for unit in find_units(sources))


def _write_record(record_path: Path, path: Path, config: PrepareConfig, launch: Launch, seconds: float) -> None:
    with Corpus(path) as corpus:
        size, tokens, documents = corpus.num_bytes, corpus.num_tokens, corpus.num_documents
    record = make_record(
        "prepare",
        config=to_table(config),
        place=where(launch),
        results={
            "bytes": size,
            "tokens": tokens,
            "documents": documents,
            "seconds": seconds,
            "bytes_per_second": size / seconds,
        },
        check=("the corpus file opens and its parts fit together", True),
    )
    append_record(record_path, record)
