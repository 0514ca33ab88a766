"""Sources for the tests of longnet_hpc.data, and ranks that are threads."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import h5py

from longnet_hpc.data import Corpus, prepare


def random_bytes(size, seed):
    return random.Random(seed).randbytes(size)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_tar(path, members, mode):
    """Write an archive of (name, content) with a folder, a symbolic and a hard link among the members."""
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            for kind, suffix in ((tarfile.SYMTYPE, ".symlink"), (tarfile.LNKTYPE, ".hardlink")):
                link = tarfile.TarInfo(name + suffix)
                link.type, link.linkname = kind, name
                archive.addfile(link)
    return path


def write_sources(root):
    """Write one of each kind of source; return them, and the (name, content) pairs that they must give, in order."""
    contents = [random_bytes(size, seed) for seed, size in enumerate((3000, 0, 1, 700, 40, 2100, 513))]
    plain, empty, one, deep, first, second, third = contents
    folder = root / "folder"
    (folder / "b" / "deep").mkdir(parents=True)
    for path, content in (("b.x", plain), ("b/empty", empty), ("b/one", one), ("b/deep/last", deep)):
        (folder / path).write_bytes(content)
    (folder / "a.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    (root / "c.XZ").write_bytes(lzma.compress(second))
    (root / "d.bz2").write_bytes(bz2.compress(third))
    members = [("m/z", third), ("m/a", empty), ("n", plain)]
    archives = [("e.tar", "w"), ("f.tar.gz", "w:gz"), ("g.tgz", "w:gz"), ("h.tar.xz", "w:xz"), ("i.tar.bz2", "w:bz2")]
    for name, mode in archives:
        write_tar(root / name, members, mode)
    sources = [str(root / "[c-d].*"), folder, *(root / name for name, _ in archives), folder / "b" / "one"]
    documents = [
        (root / "c.XZ", second),
        (root / "d.bz2", third),
        (folder / "a.gz", first + second),
        (folder / "b" / "deep" / "last", deep),
        (folder / "b" / "empty", empty),
        (folder / "b" / "one", one),
        (folder / "b.x", plain),
        *((root / name / member, content) for name, _ in archives for member, content in members),
        (folder / "b" / "one", one),
    ]
    return sources, [(str(name), content) for name, content in documents]


def overwrite_tokens(path, position, values):
    """Write bytes over the stored tokens from ``position`` on, behind HDF5's back."""
    with h5py.File(path) as file:
        tokens = file["tokens"]
        chunk, within = divmod(position, tokens.chunks[0])
        offset = tokens.id.get_chunk_info(chunk).byte_offset + within * tokens.dtype.itemsize
    with path.open("rb+") as stream:
        stream.seek(offset)
        stream.write(values)


class ThreadComm:
    """The few methods of a communicator that `prepare` needs, for ranks that are threads of one process."""

    def __init__(self, rank, size, barrier, values):
        self.rank, self.size, self._barrier, self._values = rank, size, barrier, values

    def allgather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(30)
        values = list(self._values)
        self._barrier.wait(30)
        return values

    def bcast(self, value, root=0):
        return self.allgather(value)[root]


def on_threads(size, function):
    """Run ``function(comm)`` on ``size`` ranks; return what each returned or raised."""
    barrier, values = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        comms = [ThreadComm(rank, size, barrier, values) for rank in range(size)]
        futures = [pool.submit(function, comm) for comm in comms]
    return [future.exception() or future.result() for future in futures]


def prepare_on_threads(size, sources, path, **options):
    results = on_threads(size, lambda comm: prepare(sources, path, comm=comm, **options))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return path


def prepare_sharded(root, content, chunk_tokens):
    """Write a corpus in shards of 1000, 0 and the other tokens: four ranks, of which one has nothing to write."""
    sources = [root / name for name in "abc"]
    for source, part in zip(sources, (content[:1000], b"", content[1000:]), strict=True):
        source.write_bytes(part)
    return prepare_on_threads(4, sources, root / "sharded" / "corpus.h5", chunk_tokens=chunk_tokens)


def read_all(path):
    """Return all tokens of a corpus of bytes."""
    with Corpus(path) as corpus:
        return corpus.read(0, corpus.num_tokens).tobytes()
