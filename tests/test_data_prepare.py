import importlib
import resource
import shutil
from pathlib import Path

import pytest
from data_files import (
    names_in,
    on_threads,
    prepare_on_threads,
    prepare_sharded,
    random_bytes,
    read_all,
)

from longnet_hpc.data import Corpus, prepare
from longnet_hpc.errors import ConfigError, CorpusError

CHUNK = 512
CONTENT = random_bytes(5 * CHUNK + 100, seed=1)
prepare_module = importlib.import_module("longnet_hpc.data.prepare")  # the package's attribute is the function


@pytest.fixture
def sharded(tmp_path):
    return prepare_sharded(tmp_path, CONTENT, CHUNK)


def test_existing_file_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "old").write_bytes(b"old text")
    (tmp_path / "new").write_bytes(b"new text")
    single = prepare([tmp_path / "old"], tmp_path / "corpus.h5")
    with pytest.raises(CorpusError, match=r"corpus\.h5 exists and is not overwritten without --overwrite$"):
        prepare([tmp_path / "new"], single)
    assert read_all(single) == b"old text"
    prepare([tmp_path / "new"], single, overwrite=True)
    assert read_all(single) == b"new text"


def test_shards_of_a_replaced_corpus_are_removed(sharded, tmp_path):
    keep = sharded.parent / "corpus.h5.other"
    keep.write_bytes(b"")
    prepare_on_threads(2, [tmp_path / "c", tmp_path / "c"], sharded, overwrite=True)
    with Corpus(sharded) as corpus:
        names = {shard.name for shard in corpus.shards}
    assert len(names) == 2
    assert set(names_in(sharded.parent)) == names | {"corpus.h5", keep.name}


def test_shards_of_a_damaged_corpus_are_removed_with_it(sharded, tmp_path):
    next(sharded.parent.glob("*.shard-*")).unlink()
    prepare([tmp_path / "a"], sharded, overwrite=True)
    assert names_in(sharded.parent) == ["corpus.h5"]


def test_overwriting_a_copy_leaves_the_shards_of_its_original(sharded, tmp_path):
    copy = shutil.copy(sharded, sharded.with_name("copy.h5"))
    prepare([tmp_path / "a"], copy, overwrite=True)
    assert read_all(copy) == CONTENT[:1000]
    assert read_all(sharded) == CONTENT


@pytest.mark.parametrize("old", [b"", b"not a corpus"])
def test_any_file_is_replaced_when_asked(tmp_path, old):
    (tmp_path / "text").write_bytes(b"text")
    (tmp_path / "out.h5").write_bytes(old)
    prepare([tmp_path / "text"], tmp_path / "out.h5", overwrite=True)
    assert read_all(tmp_path / "out.h5") == b"text"
    assert names_in(tmp_path) == ["out.h5", "text"]


@pytest.fixture
def meanwhile(monkeypatch):
    """Let another job run from beginning to end before the next one gives its finished file its name."""
    publish = prepare_module._publish

    def start(other):
        def late(*arguments):
            monkeypatch.setattr(prepare_module, "_publish", publish)
            other()
            return publish(*arguments)

        monkeypatch.setattr(prepare_module, "_publish", late)

    return start


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("other_size", [1, 2])
def test_second_of_two_jobs_at_once_is_refused_and_removes_only_its_own(tmp_path, meanwhile, size, other_size):
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode() * 1000)
    path = tmp_path / "out" / "corpus.h5"
    meanwhile(lambda: prepare_on_threads(other_size, [tmp_path / "a", tmp_path / "b"], path))
    results = on_threads(size, lambda comm: prepare([tmp_path / "c", tmp_path / "d"], path, comm=comm))
    assert [type(result) for result in results] == [CorpusError] * size
    assert {str(result) for result in results} == {f"{path} exists and is not overwritten without --overwrite"}
    assert read_all(path) == b"a" * 1000 + b"b" * 1000
    assert len(names_in(path.parent)) == (1 if other_size == 1 else 3)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("other_size", [1, 2])
def test_two_jobs_at_once_that_overwrite_leave_the_later_corpus_whole(tmp_path, sharded, meanwhile, size, other_size):
    options = {"overwrite": True, "chunk_tokens": CHUNK}
    meanwhile(lambda: prepare_on_threads(other_size, [tmp_path / "c", tmp_path / "a"], sharded, **options))
    prepare_on_threads(size, [tmp_path / "a", tmp_path / "a"], sharded, **options)
    assert read_all(sharded) == (tmp_path / "a").read_bytes() * 2
    assert len(names_in(sharded.parent)) == (1 if size == 1 else 3)


@pytest.mark.parametrize("size", [1, 3])
def test_failure_leaves_an_existing_corpus_as_it_was(tmp_path, sharded, size):
    before = names_in(sharded.parent)
    (tmp_path / "d.gz").write_bytes(b"not compressed")
    sources = [tmp_path / name for name in ("a", "c", "d.gz")]
    results = on_threads(size, lambda comm: prepare(sources, sharded, comm=comm, overwrite=True))
    assert {str(result) for result in results} == {f"cannot read {tmp_path / 'd.gz'}: Not a gzipped file (b'no')"}
    assert names_in(sharded.parent) == before
    assert read_all(sharded) == CONTENT


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_while_publishing_leaves_nothing(tmp_path, monkeypatch, size, overwrite):
    (tmp_path / "text").write_bytes(b"x" * 5000)
    target = tmp_path / "out" / "corpus.h5"
    rename = Path.replace

    def refuse(self, to):
        if Path(to) == target:
            raise PermissionError(13, "Permission denied")
        return rename(self, to)

    def refuse_link(self, to):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "hardlink_to", refuse_link)
    sources = [tmp_path / "text"] * 2
    results = on_threads(size, lambda comm: prepare(sources, target, comm=comm, overwrite=overwrite))
    assert [str(result) for result in results] == [f"cannot write {target}: Permission denied"] * size
    assert names_in(target.parent) == []


@pytest.mark.parametrize("size", [1, 2])
def test_file_system_without_hard_links_is_no_obstacle(tmp_path, monkeypatch, size):
    def refuse_link(self, to):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse_link)
    (tmp_path / "text").write_bytes(b"x" * 5000)
    target = tmp_path / "out" / "corpus.h5"
    sources = [tmp_path / "text"] * 2
    assert on_threads(size, lambda comm: prepare(sources, target, comm=comm)) == [target] * size
    with Corpus(target) as corpus:
        assert corpus.read(0, corpus.num_tokens).tobytes() == b"x" * 10000
    results = on_threads(size, lambda comm: prepare(sources, target, comm=comm))
    assert {str(result) for result in results} == {f"{target} exists and is not overwritten without --overwrite"}


def test_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "text").write_bytes(random_bytes(3_000_000, 1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(CorpusError) as caught:
            prepare([tmp_path / "text"], tmp_path / "out" / "corpus.h5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"cannot write {tmp_path / 'out' / 'corpus.h5'}: File too large"
    assert names_in(tmp_path / "out") == []


def test_impossible_output_is_one_line(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"cannot write .*: it is a folder"):
        prepare([text], tmp_path)
    with pytest.raises(CorpusError, match=r"cannot write .*text/corpus\.h5: (Not a directory|File exists)"):
        prepare([text], text / "corpus.h5")
    with pytest.raises(CorpusError, match="is one of its own sources"):
        prepare([tmp_path], text, overwrite=True)
    with pytest.raises(ConfigError, match="chunk_tokens must be 1 to 268435456, got 0"):
        prepare([text], tmp_path / "corpus.h5", chunk_tokens=0)


def test_progress_counts_every_byte_in_pieces(tmp_path):
    (tmp_path / "text").write_bytes(bytes(3_000_000))
    seen = []
    prepare([tmp_path / "text"], tmp_path / "corpus.h5", progress=seen.append)
    assert sum(seen) == 3_000_000
    assert len(seen) >= 3
