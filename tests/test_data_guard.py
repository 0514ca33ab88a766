"""Corpora on a file system that fails for a while, and files that change or vanish while they are read."""

import errno
import logging
import os
import shutil

import faults
import h5py
import pytest
from data_files import prepare_sharded, random_bytes

from longnet_hpc.config import EvalConfig, TrainConfig
from longnet_hpc.data import Corpus, prepare, token_files
from longnet_hpc.errors import ConfigError, CorpusError

CHUNK = 512
CONTENT = random_bytes(5 * CHUNK + 100, seed=2)
LONG_AGO = 1_000_000_000


@pytest.fixture
def path(tmp_path):
    (tmp_path / "text").write_bytes(CONTENT)
    path = prepare([tmp_path / "text"], tmp_path / "single" / "corpus.h5", chunk_tokens=CHUNK)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def clock(monkeypatch):
    """A clock that only waiting advances; holds the waits."""
    waits = []
    monkeypatch.setattr(token_files.time, "sleep", waits.append)
    monkeypatch.setattr(token_files.time, "monotonic", lambda: 1000.0 + sum(waits))
    return waits


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.WARNING, "longnet_hpc")
    return lambda: [record.getMessage() for record in caplog.records]


def break_handle(corpus):
    (tokens,) = corpus._files._open.values()
    faults.break_handle(tokens)


def failing(monkeypatch, times, number):
    """Let the system refuse to open a corpus a number of times."""
    real, left = h5py.File, [times]

    def opened(*words, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, f"Unable to open file (errno = {number}, error message = 'x', buf = 0x7ff)")
        return real(*words, **options)

    monkeypatch.setattr(h5py, "File", opened)


def test_read_that_the_disk_fails_is_read_from_a_file_opened_anew(path, clock, told):
    with Corpus(path) as corpus:
        assert corpus.read(0, 10).tobytes() == CONTENT[:10]
        for count, span in enumerate(((0, 10), (600, 2000)), start=1):  # verified before, and not
            break_handle(corpus)
            assert corpus.read(*span).tobytes() == CONTENT[slice(*span)]
            assert len(told()) == len(clock) == count
    assert all(f"cannot read {path}: Input/output error, on " in line for line in told())
    assert "failure 1, tried again in 0.1 s and for 60 s in all" in told()[0]


@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ETIMEDOUT", "EAGAIN"])
def test_open_that_fails_for_a_while_is_tried_again(path, clock, told, monkeypatch, name):
    failing(monkeypatch, 3, getattr(errno, name))
    with Corpus(path) as corpus:
        assert corpus.read(5, 99).tobytes() == CONTENT[5:99]
    assert clock == [0.1, 0.2, 0.4]
    assert [line.partition("failure ")[2][:1] for line in told()] == ["1", "2", "3"]


def test_read_that_fails_for_good_ends_at_its_limit(path, clock, told, monkeypatch):
    corpus = Corpus(path, retry_seconds=20.0)
    failing(monkeypatch, 1000, errno.EIO)
    with pytest.raises(CorpusError) as caught:
        corpus.read(0, 10)
    assert str(caught.value) == f"cannot read {path}: Input/output error; it was tried 9 times in 20 s"
    assert sum(clock) == pytest.approx(20.0)
    assert clock[:7] == pytest.approx([0.1 * 2**n for n in range(7)])
    assert len(told()) == 8


@pytest.mark.parametrize(("number", "seconds"), [(errno.EACCES, 60.0), (errno.ENOENT, 60.0), (errno.EIO, 0.0)])
def test_error_that_does_not_pass_or_is_not_waited_for_is_told_at_once(path, clock, monkeypatch, number, seconds):
    failing(monkeypatch, 1, number)
    with pytest.raises(CorpusError) as caught:
        Corpus(path, seconds)
    assert str(caught.value) == f"cannot read {path}: {os.strerror(number)}"
    assert clock == []


def test_dataset_on_a_disk_that_fails_is_not_called_missing(path, monkeypatch):
    """h5py raises a KeyError there, as for a dataset that does not exist."""

    real = h5py.File.__getitem__

    def absent(file, name):
        if name != "tokens":
            return real(file, name)
        raise KeyError("Unable to open object (file read failed: errno = 5, error message = 'x', buf = 0x55)")

    with monkeypatch.context() as patched:
        patched.setattr(h5py.File, "__getitem__", absent)
        with pytest.raises(CorpusError, match=r"corpus\.h5: Input/output error$"):
            Corpus(path, 0.0)


def test_retry_seconds_must_be_a_time():
    for make in (TrainConfig, EvalConfig):
        for seconds in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=f"read_retry_seconds must be at least 0 and finite, got {seconds}"):
                make(read_retry_seconds=seconds)


def rewrite(path):
    stored = path.read_bytes()
    with path.open("rb+") as stream:
        stream.seek(stored.index(CONTENT[700:720]))
        stream.write(bytes([CONTENT[700] ^ 1]))


def rewrite_whole(path):
    other = path.with_name("other.h5")
    (path.parent / "text").write_bytes(CONTENT[::-1])
    prepare([path.parent / "text"], other, chunk_tokens=CHUNK)
    path.write_bytes(other.read_bytes())


def replace(path):
    copy = path.with_name("copy.h5")
    shutil.copy2(path, copy)
    copy.replace(path)


def replace_by_nothing(path):
    path.unlink()
    path.touch()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rewrite, r"chunk 1, tokens \[512, 1024\), is damaged: .*; .*corpus\.h5 was changed while it was read: it was"),
        (rewrite_whole, r"is damaged: .*corpus\.h5 was changed while it was read: it was modified at 20"),
        (replace, "was changed while it was read: it is another file now$"),
        (replace_by_nothing, "it is another file now, it has 0 bytes, not [0-9,]+, it was modified at"),
        (lambda path: os.truncate(path, 3000), "was changed while it was read: it has 3,000 bytes, not"),
        (lambda path: path.open("ab").write(b"more"), "was changed while it was read: it has [0-9,]+ bytes, not"),
    ],
)
@pytest.mark.parametrize("stale", [False, True])
def test_file_that_changes_while_it_is_read_is_refused(path, clock, change, said, stale):
    with Corpus(path) as corpus:
        assert corpus.read(0, corpus.num_tokens).tobytes() == CONTENT  # so that all was verified
        change(path)
        if stale and change is not rewrite_whole:
            break_handle(corpus)
        for _ in range(2):
            with pytest.raises(CorpusError, match=said):
                corpus.read(600, 800)


def test_file_that_is_only_touched_is_verified_again(path, told):
    with Corpus(path) as corpus:
        corpus.read(0, corpus.num_tokens)
        path.touch()
        for _ in range(2):
            assert corpus.read(0, corpus.num_tokens).tobytes() == CONTENT
    (line,) = told()
    assert f"{path} was modified while " in line
    assert line.endswith("its tokens are compared with their checksums anew")


def test_file_that_is_modified_without_end_is_refused(path, monkeypatch):
    real = token_files.TokenFiles.read

    def read(files, start, stop):
        tokens = real(files, start, stop)
        path.touch()
        return tokens

    monkeypatch.setattr(token_files.TokenFiles, "read", read)
    with Corpus(path) as corpus, pytest.raises(CorpusError, match="is modified again and again while it is read"):
        corpus.read(0, 10)


def test_file_that_vanishes_is_read_as_long_as_it_is_open(path, told, clock):
    with Corpus(path) as corpus:
        corpus.read(0, 10)
        path.unlink()
        for _ in range(2):
            assert corpus.read(0, corpus.num_tokens).tobytes() == CONTENT
        assert len(told()) == 1
        assert f"{path} was removed or renamed while " in told()[0]
        break_handle(corpus)
        with pytest.raises(CorpusError, match=r"corpus\.h5 was removed or renamed while it was read$"):
            corpus.read(0, 10)


def test_damage_that_only_this_host_sees_is_read_again(path, told, monkeypatch):
    real, dropped = token_files.TokenFiles.read, []

    def read(files, start, stop):
        tokens = real(files, start, stop)
        if not dropped:
            tokens[0] ^= 1
        return tokens

    monkeypatch.setattr(token_files.TokenFiles, "read", read)
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: dropped.append(words[-1]))
    with Corpus(path) as corpus:
        assert corpus.read(0, 10).tobytes() == CONTENT[:10]
    assert dropped == [os.POSIX_FADV_DONTNEED]
    assert told() == [f"warning: {path}: the checksum of chunk 0, tokens [0, 512) does not fit; it is read once more"]


@pytest.mark.parametrize("opened", [True, False])
def test_shard_that_is_replaced_is_named(tmp_path, opened):
    with Corpus(prepare_sharded(tmp_path, CONTENT, CHUNK)) as corpus:
        _, second = corpus.shards
        corpus.read(0, corpus.num_tokens if opened else 10)
        replace(second)
        assert corpus.read(0, 1000).tobytes() == CONTENT[:1000]
        with pytest.raises(CorpusError, match=f"{second.name} was changed while it was read: it is another file now"):
            corpus.read(990, 1010)
