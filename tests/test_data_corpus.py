import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from data_files import (
    names_in,
    overwrite_tokens,
    prepare_on_threads,
    prepare_sharded,
    random_bytes,
    read_all,
    write_sources,
)

from longnet_hpc.data import Corpus, prepare, token_files
from longnet_hpc.data.failures import HDF5_ERRORS, corpus_errors
from longnet_hpc.errors import CorpusError

CHUNK = 512


@pytest.fixture
def content():
    return random_bytes(5 * CHUNK + 100, seed=1)


@pytest.fixture
def single(tmp_path, content):
    """A corpus in one file."""
    (tmp_path / "text").write_bytes(content)
    return prepare([tmp_path / "text"], tmp_path / "single" / "corpus.h5", chunk_tokens=CHUNK)


@pytest.fixture
def sharded(tmp_path, content):
    return prepare_sharded(tmp_path, content, CHUNK)


@pytest.fixture(params=["single", "sharded"])
def any_corpus(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 20])
def test_tokens_and_documents_do_not_depend_on_the_number_of_ranks(tmp_path, size):
    sources, documents = write_sources(tmp_path)
    path = prepare_on_threads(size, sources, tmp_path / "out" / "corpus.h5", chunk_tokens=1000)
    with Corpus(path) as corpus:
        assert [corpus.document_name(i) for i in range(corpus.num_documents)] == [name for name, _ in documents]
        assert np.diff(corpus.document_offsets).tolist() == [len(content) for _, content in documents]
        assert corpus.read(0, corpus.num_tokens).tobytes() == b"".join(content for _, content in documents)
        assert corpus.num_bytes == corpus.num_tokens
        assert names_in(path.parent) == sorted({path.name, *(shard.name for shard in corpus.shards)})
        assert size == 1 or len(corpus.shards) > 1


def test_file_records_what_other_programs_need(any_corpus, content):
    with h5py.File(any_corpus) as file:
        assert file["tokens"][()].tobytes() == content  # through HDF5's virtual dataset
        assert file["tokens"].dtype == np.uint8
        attributes = {name: file.attrs[name] for name in file.attrs}
        assert attributes["format"] == b"longnet_hpc corpus"
        assert attributes["tokenizer"] == b"bytes"
        numbers = {name: attributes[name] for name in ("format_version", "vocab_size", "num_tokens", "num_bytes")}
        assert numbers == {
            "format_version": 1,
            "vocab_size": 256,
            "num_tokens": len(content),
            "num_bytes": len(content),
        }
        starts, checksums = file["chunk_starts"][()], file["chunk_checksums"][()]
        expected = [xxhash.xxh3_64_intdigest(content[start:stop]) for start, stop in pairwise(starts)]
        assert checksums.tolist() == expected
        assert np.diff(starts).max() == CHUNK
        assert (starts[0], starts[-1]) == (0, len(content))


def test_any_range_equals_the_text(any_corpus, content):
    with Corpus(any_corpus) as corpus:
        for start, stop in ((0, 0), (999, 1001), (511, 513), (1, len(content)), (1500, 1536), (len(content),) * 2):
            assert corpus.read(start, stop).tobytes() == content[start:stop]
        for start, stop in ((-1, 5), (5, 4), (0, len(content) + 1)):
            with pytest.raises(CorpusError, match=r"are outside \[0, 2660\)"):
                corpus.read(start, stop)
        with pytest.raises(CorpusError, match=r"document 3 is outside|document 1 is outside"):
            corpus.document_name(corpus.num_documents)


def test_folder_can_move_and_be_read_from_anywhere(sharded, content, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(sharded.parent, moved)
    shutil.rmtree(sharded.parent)
    assert read_all(moved / "corpus.h5") == content
    monkeypatch.chdir(moved)
    assert read_all("corpus.h5") == content
    with h5py.File("corpus.h5") as file:
        assert file["tokens"][()].tobytes() == content


def test_each_shard_is_a_corpus(sharded, content):
    with Corpus(sharded) as corpus:
        first, second = corpus.shards
    assert read_all(first) + read_all(second) == content


def test_few_open_shards_give_the_same_tokens(sharded, content, monkeypatch):
    monkeypatch.setattr(token_files, "MAX_OPEN_FILES", 1)
    with Corpus(sharded) as corpus:
        for start, stop in ((0, 2000), (500, 1500), (0, 10), (2000, 2010)):
            assert corpus.read(start, stop).tobytes() == content[start:stop]
            opened = [link.readlink().name for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
            assert len([name for name in opened if "shard" in name]) == 1


def test_reads_from_threads_equal_the_text(any_corpus, content):
    with Corpus(any_corpus) as corpus, ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda start: corpus.read(start, start + 300).tobytes(), range(0, 2300, 7))
        assert list(parts) == [content[start : start + 300] for start in range(0, 2300, 7)]


@pytest.mark.parametrize("position", [0, 700, 2 * CHUNK, 5 * CHUNK + 99])
def test_flipped_byte_is_noticed_in_its_chunk_alone(single, content, position):
    overwrite_tokens(single, position, bytes([content[position] ^ 16]))
    chunk = position // CHUNK
    start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, len(content))
    with Corpus(single) as corpus:
        for _ in range(2):
            with pytest.raises(CorpusError, match=rf"chunk {chunk}, tokens \[{start}, {stop}\), is damaged"):
                corpus.read(start + 3, start + 4)
        assert corpus.read(0, start).tobytes() == content[:start]
        assert corpus.read(stop, len(content)).tobytes() == content[stop:]


def test_flipped_byte_of_a_shard_is_noticed(sharded, content):
    with Corpus(sharded) as corpus:
        shard = corpus.shards[1]
    overwrite_tokens(shard, 1200, bytes([content[2200] ^ 1]))
    with Corpus(sharded) as corpus:
        assert corpus.read(0, 1000 + 2 * CHUNK).tobytes() == content[: 1000 + 2 * CHUNK]
        with pytest.raises(CorpusError, match=r"chunk 4, tokens \[2024, 2536\), is damaged"):
            corpus.read(2100, 2101)


def test_any_flipped_byte_is_noticed_or_harmless(single, content, tmp_path):
    """Damage anywhere in the file gives one line or the right tokens, never wrong tokens or another exception."""
    good = single.read_bytes()
    positions = np.flatnonzero(np.frombuffer(good, np.uint8))
    damaged = tmp_path / "damaged.h5"
    errors = []
    for position in np.random.default_rng(0).choice(positions, 150, replace=False):
        changed = bytearray(good)
        changed[position] ^= 4
        damaged.write_bytes(changed)
        try:
            assert read_all(damaged) == content
        except CorpusError as error:
            errors.append(str(error))
    assert len(errors) > 100
    assert not any("\n" in error for error in errors)


def set_attribute(name, value):
    def change(path):
        with h5py.File(path, "r+") as file:
            file.attrs[name] = value

    return change


def replace_dataset(name, values):
    def change(path):
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = values

    return change


def sparse_tokens(path):
    with h5py.File(path, "r+") as file:
        file["tokens"].resize((1 << 50,))
        file.attrs["num_tokens"] = 1 << 50


def foreign(path):
    with h5py.File(path, "w") as file:
        file["tokens"] = np.zeros(10, np.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b"some text" * 1000), "signature not found"),
        (foreign, "not a corpus: it has no attribute format"),
        (set_attribute("format", "another"), "not a corpus"),
        (set_attribute("format_version", 7), "has format version 7; this program reads 1"),
        (set_attribute("format_version", "1"), "format_version must be an integer"),
        (set_attribute("num_tokens", 2661), "tokens has 2660 values, must have 2661"),
        (set_attribute("num_tokens", 0), "num_tokens is 0, must be 1 to"),
        (set_attribute("vocab_size", 300), "tokenizer bytes of 300 tokens has no tokenizer_json"),
        (sparse_tokens, "tokens states 1125899906842624 bytes in chunks of 512, the file has [0-9]+"),
        (replace_dataset("chunk_checksums", np.zeros(5, np.uint64)), "chunk_starts has 7 values, must have 6"),
        (replace_dataset("chunk_starts", np.array([0, 5, 4, 3, 2, 1, 2660])), "do not rise from 0 to 2660"),
        (replace_dataset("chunk_starts", np.array([0, 5, 5, 30, 40, 50, 2660])), "chunks have 0 to 2610 tokens"),
        (replace_dataset("document_name_offsets", np.zeros(5, np.int64)), "has 5 values, must have 2"),
        (replace_dataset("document_offsets", np.zeros((2, 2), np.int64)), "document_offsets is missing"),
        (replace_dataset("tokens", np.zeros(2660, np.float32)), "type float32, not unsignedinteger"),
    ],
)
def test_damaged_file_is_one_line(single, damage, message):
    damage(single)
    with pytest.raises(CorpusError, match=message) as caught:
        Corpus(single)
    assert str(single) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_is_not_a_corpus(tmp_path):
    with pytest.raises(CorpusError) as caught:
        Corpus(tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder, not a corpus file"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Can't decrement id ref count (unable to extend file, errno = 28, error message = '')"),
            "No space left on device",
        ),
        (OSError(28, "Can't write\n, errno = 28, error message = 'x', buf = 0x7ffe1, offset = 0"), os.strerror(28)),
        (OSError(13, os.strerror(13)), "Permission denied"),
        (OSError("bad\nheader, buf = 0x7ffe1, offset = 0"), "bad header, offset = 0"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_reason_of_a_failure_is_what_the_system_says(error, reason):
    with pytest.raises(CorpusError) as caught, corpus_errors("cannot write a", HDF5_ERRORS):
        raise error
    assert str(caught.value) == f"cannot write a: {reason}"


def other_shard(path):
    shutil.copy(path.parent / names_in(path.parent)[1], path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (foreign, "not a corpus"),
        (other_shard, "tokens has 1000 values, must have 1660"),
    ],
)
def test_damaged_shard_is_one_line_that_names_it(sharded, damage, message):
    with Corpus(sharded) as corpus:
        shard = corpus.shards[1]
    damage(shard)
    with pytest.raises(CorpusError, match=message) as caught:
        Corpus(sharded)
    assert shard.name in str(caught.value)


@pytest.mark.parametrize("name", ["../single/corpus.h5", "/etc/passwd"])
def test_shard_outside_the_folder_is_refused(sharded, single, name):
    with h5py.File(sharded, "r+") as file:
        names = file["shard_names"][()].astype("S99")
        del file["shard_names"]
        file["shard_names"] = np.array([names[0], name.encode()], dtype="S99")
    with pytest.raises(CorpusError, match="not the name of a file in the same folder"):
        Corpus(sharded)
