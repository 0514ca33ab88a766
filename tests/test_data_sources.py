import gzip
import io
import lzma
import sys
import sysconfig
import tarfile
import tracemalloc
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_files import names_in, random_bytes, write_sources, write_tar

from longnet_hpc.data import Corpus, default_sources, prepare
from longnet_hpc.data.prepare import share_out
from longnet_hpc.data.sources import BLOCK_BYTES, Unit, find_units
from longnet_hpc.errors import CorpusError


def read_back(path):
    """Return the (name, content) pairs of a corpus of bytes."""
    with Corpus(path) as corpus:
        offsets = corpus.document_offsets
        return [
            (corpus.document_name(i), corpus.read(int(offsets[i]), int(offsets[i + 1])).tobytes())
            for i in range(corpus.num_documents)
        ]


def test_corpus_equals_sources_of_every_kind(tmp_path):
    sources, documents = write_sources(tmp_path)
    path = prepare(sources, tmp_path / "out" / "corpus.h5", chunk_tokens=1000)
    assert read_back(path) == documents
    with Corpus(path) as corpus:
        total = b"".join(content for _, content in documents)
        assert corpus.read(0, corpus.num_tokens).tobytes() == total
        assert corpus.num_tokens == corpus.num_bytes == len(total)
        assert corpus.document_offsets.tolist() == [0, *accumulate(len(content) for _, content in documents)]
    assert names_in(path.parent) == [path.name]


def test_order_depends_on_names_alone(tmp_path):
    for name in ("b", "a/c", "a.x", "A", "a/b/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [str(Path(unit.path).relative_to(tmp_path)) for unit in find_units([tmp_path])]
    assert names == ["A", "a/b/d", "a/c", "a.x", "b"]
    assert [unit.path for unit in find_units([tmp_path / "b", tmp_path / "A"])] == [
        str(tmp_path / "b"),
        str(tmp_path / "A"),
    ]


def test_glob_gives_files_at_any_depth(tmp_path):
    for name in ("a.py", "b.txt", "c.py/d.py", "c.py/e/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "[a].py").write_bytes(b"y")
    names = [str(Path(unit.path).relative_to(tmp_path)) for unit in find_units([f"{tmp_path}/**/*.py"])]
    assert names == ["[a].py", "a.py", "c.py/d.py", "c.py/e/f.py"]
    assert [unit.path for unit in find_units([f"{tmp_path}/[a].py"])] == [f"{tmp_path}/[a].py"]


def write_empty(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def names_of(root, source):
    return [str(Path(unit.path).relative_to(root)) for unit in find_units([source])]


def test_hidden_files_are_taken_only_when_named(tmp_path):
    write_empty(tmp_path, ".git/config", ".env", "a", "b/.c", "b/.d/e", "b/f.g")
    assert names_of(tmp_path, tmp_path) == ["a", "b/f.g"]
    assert names_of(tmp_path, tmp_path / ".git") == [".git/config"]
    assert names_of(tmp_path, tmp_path / ".env") == [".env"]
    assert names_of(tmp_path, f"{tmp_path}/.e*") == [".env"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.zst", "a.7z", "A.RAR"])
def test_unsupported_compression_is_refused_when_named(tmp_path, name):
    write_empty(tmp_path, name)
    suffix = Path(name).suffix
    for source in (tmp_path / name, f"{tmp_path}/*"):
        with pytest.raises(CorpusError) as caught:
            find_units([source])
        message = f"{tmp_path / name}: {suffix} is not supported; unpack it, or use .gz, .xz, .bz2 or .tar"
        assert str(caught.value) == message


def test_unsupported_compression_in_a_folder_is_left_out_with_one_warning(tmp_path):
    write_empty(tmp_path, "a.txt", "b.zip", "c.zipped", "d/e.tar.zst", "d/f.7Z", "d/g.gz")
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert names_of(tmp_path, tmp_path) == ["a.txt", "c.zipped", "d/g.gz"]
    messages = [str(warning.message) for warning in caught]
    assert messages == [f"{tmp_path}: skipped 3 of 6 files, as .zip, .zst, .7z, .rar are not supported"]


def test_binary_file_in_a_folder_is_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"\0\xff" * 100)
    path = prepare([tmp_path / "folder"], tmp_path / "corpus.h5")
    assert read_back(path) == [(str(tmp_path / "folder" / "a"), b"\0\xff" * 100)]


def test_standard_input_is_a_document(tmp_path, monkeypatch):
    content = random_bytes(3 * BLOCK_BYTES // 2, 1)
    (tmp_path / "a").write_bytes(b"before")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    path = prepare([tmp_path / "a", "-"], tmp_path / "corpus.h5")
    assert read_back(path) == [(str(tmp_path / "a"), b"before"), ("-", content)]


def test_default_sources_are_the_standard_library():
    paths = default_sources()
    root = sysconfig.get_path("stdlib")
    assert paths == sorted(paths, key=lambda path: Path(path).parts)
    assert {f"{root}/os.py", f"{root}/json/decoder.py"} <= set(paths)
    assert all(path.endswith(".py") and "site-packages" not in path for path in paths)
    assert sum(Path(path).stat().st_size for path in paths) > 5_000_000


def cut(path, content, keep):
    path.write_bytes(content[:keep])
    return path


def flip(path, content, position):
    damaged = bytearray(content)
    damaged[position] ^= 1
    path.write_bytes(damaged)
    return path


def tar_bytes(tmp_path, mode="w"):
    return write_tar(tmp_path / "good", [("a", random_bytes(2000, 1)), ("b", random_bytes(2000, 2))], mode).read_bytes()


def full_tar_gz_bytes(size):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = size - 8192
        archive.addfile(info, io.BytesIO(random_bytes(info.size, 1)))
    assert len(stream.getvalue()) == size
    return gzip.compress(stream.getvalue())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing", lambda path: path, "missing does not exist"),
        ("x*.none", lambda path: path, "none has no files"),
        ("empty", lambda path: path.mkdir(), "empty has no files"),
        ("nothing", lambda path: path.write_bytes(b""), "no text; needs at least 1 byte"),
        ("a.gz", lambda path: cut(path, gzip.compress(random_bytes(5000, 1)), 3000), r"cannot read .*a\.gz: .*ended"),
        ("b.gz", lambda path: flip(path, gzip.compress(random_bytes(5000, 1)), -7), r"cannot read .*b\.gz: CRC"),
        ("c.gz", lambda path: path.write_bytes(b"plain text"), r"cannot read .*c\.gz: Not a gzipped file"),
        ("a.xz", lambda path: cut(path, lzma.compress(random_bytes(5000, 1)), 3000), r"cannot read .*a\.xz: .*ended"),
        ("b.xz", lambda path: flip(path, lzma.compress(random_bytes(5000, 1)), 2000), r"cannot read .*b\.xz: Corrupt"),
        ("a.tar", lambda path: path.write_bytes(random_bytes(5000, 1)), r"cannot read .*a\.tar: damaged header"),
        ("b.tar", lambda path: cut(path, tar_bytes(path.parent), 1024 + 512 + 100), r"cannot read .*b\.tar"),
        # The next two are those that tarfile takes for the end of the archive.
        ("c.tar", lambda path: cut(path, tar_bytes(path.parent), 512 + 512 + 2048), r"c\.tar: .*without its end mark"),
        ("d.tar", lambda path: flip(path, tar_bytes(path.parent), 512 + 512 + 2048), r"d\.tar: damaged header"),
        ("e.tar.gz", lambda path: flip(path, tar_bytes(path.parent, "w:gz"), -7), r"cannot read .*e\.tar\.gz: CRC"),
        # Reading the end mark does not reach the end of the file when buffers of 64 KiB end there too.
        ("f.tar.gz", lambda path: flip(path, full_tar_gz_bytes(5 << 16), -7), r"cannot read .*f\.tar\.gz: CRC"),
    ],
)
def test_bad_source_is_one_line_and_leaves_nothing(tmp_path, name, make, message):
    (tmp_path / "sources").mkdir()
    make(tmp_path / "sources" / name)
    with pytest.raises(CorpusError, match=message) as caught:
        prepare([tmp_path / "sources" / name], tmp_path / "out" / "corpus.h5")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not names_in(tmp_path / "out")


def test_no_source_or_second_standard_input_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="there are no sources"):
        prepare([], tmp_path / "corpus.h5")
    with pytest.raises(CorpusError, match=r"can be read once, got it 2 times"):
        prepare(["-", "-"], tmp_path / "corpus.h5")


def test_unreadable_source_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop the superuser
    with pytest.raises(CorpusError, match=r"cannot read .*/a: Permission denied"):
        prepare([tmp_path / "a"], tmp_path / "corpus.h5")


@pytest.mark.parametrize("kind", ["a.gz", "a.tar.gz", "a"])
def test_memory_does_not_grow_with_the_document(tmp_path, kind):
    size = 64 << 20
    block = bytes(1 << 20)
    content = tmp_path / "content"
    with content.open("wb") as stream:
        for _ in range(size >> 20):
            stream.write(block)
    source = tmp_path / kind
    if kind == "a.gz":
        with gzip.open(source, "wb", compresslevel=1) as stream:
            for _ in range(size >> 20):
                stream.write(block)
    elif kind == "a.tar.gz":
        with tarfile.open(source, "w:gz", compresslevel=1) as archive:
            archive.add(content)
    else:
        source = content
    tracemalloc.start()
    try:
        path = prepare([source], tmp_path / "corpus.h5")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    with Corpus(path) as corpus:
        assert corpus.num_tokens == size


def test_progress_counts_bytes_as_stored_whatever_the_compression(tmp_path):
    sources, _ = write_sources(tmp_path)
    (tmp_path / "more.gz").write_bytes(gzip.compress(bytes(5_000_000)) + gzip.compress(random_bytes(3_000_000, 1)))
    for source in (*find_units(sources), *find_units([tmp_path / "more.gz"])):
        seen = []
        for document in source.documents(seen.append):
            assert all(len(block) <= BLOCK_BYTES for block in document.blocks)
        assert sum(seen) == source.size == Path(source.path).stat().st_size
    assert len(seen) >= 3


def test_progress_counts_standard_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(bytes(5000))))
    seen = []
    prepare(["-"], tmp_path / "corpus.h5", progress=seen.append)
    assert sum(seen) == 5000


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_blocks_are_contiguous_and_balanced(size):
    units = [Unit(str(number), (number * 7919) % 1000) for number in range(200)]
    blocks = share_out(units, size)
    assert len(blocks) == size
    assert [unit for block in blocks for unit in block] == units
    total = sum(unit.size for unit in units)
    assert max(sum(unit.size for unit in block) for block in blocks) <= total / size + 1000
    assert [unit for block in share_out([Unit("-", 0)], size) for unit in block] == [Unit("-", 0)]
