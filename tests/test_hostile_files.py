"""Hostile files made on purpose, of what was found or could be: each is refused in one line, or read correctly."""

import ast
import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import fuzzing
import h5py
import mutations
import numpy as np
import pytest
import torch
import xxhash
from data_files import read_all
from launching import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from test_fuzzing import ORDER, originals  # noqa: F401 - with a fixture

from longnet_hpc.checkpoint import load_checkpoint
from longnet_hpc.command_line import parse
from longnet_hpc.data import Corpus, load_tokenizer, prepare
from longnet_hpc.data.tokenizer import JsonTokenizer
from longnet_hpc.errors import CheckpointError, ConfigError, CorpusError
from longnet_hpc.record import read_metrics, read_records
from longnet_hpc.scaling.machine import load_machine

# ruff: noqa: F811 - the fixture that tests take


@pytest.fixture
def corpus(originals, tmp_path):
    return shutil.copy(originals / "corpus", tmp_path / "corpus.h5")


def refused(read, path, error):
    """Return the message, of one line that is not long, with which a file is refused."""
    with pytest.raises(error) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < fuzzing.LONGEST_MESSAGE
    return message


def reseal(path, signature, offset, new):
    """Overwrite bytes of each piece of HDF5 metadata of one kind, giving it the checksum that fits."""
    content = bytearray(path.read_bytes())
    for start, stop in mutations.sealed_ranges(bytes(content)):
        if content[start : start + 4] == signature:
            content[start + offset : start + offset + len(new)] = new
            content[stop : stop + 4] = struct.pack("<I", mutations.lookup3(bytes(content[start:stop])))
    path.write_bytes(content)


def test_checksum_of_hdf5_metadata_is_known(corpus):
    content = corpus.read_bytes()
    found = [content[start : start + 4] for start, _ in mutations.sealed_ranges(content)]
    assert found.count(b"OHDR") == 8
    assert found.count(b"EAHD") == 6
    before = read_all(corpus)
    reseal(corpus, b"EAHD", 4, bytes(1))  # which it is
    assert corpus.read_bytes() == content
    assert read_all(corpus) == before


def test_corpus_that_states_endless_chunks_is_read(corpus):
    before = read_all(corpus)
    reseal(corpus, b"EAHD", 44, struct.pack("<Q", 1 << 62))
    assert read_all(corpus) == before


@pytest.mark.parametrize("place", [7, 8, 9, 10, 11])
def test_corpus_whose_index_would_make_hdf5_divide_by_zero_is_refused(corpus, place):
    reseal(corpus, b"EAHD", place, b"\0")
    assert "has an index of its chunks that no corpus has" in refused(Corpus, corpus, CorpusError)


def test_corpus_whose_layout_would_make_hdf5_divide_by_zero_is_refused(corpus):
    content = bytearray(corpus.read_bytes())
    usual = bytes([4, 32, 4, 4, 16, 10])
    starts = [start for start, stop in mutations.sealed_ranges(bytes(content)) if usual in content[start:stop]]
    assert len(starts) >= 6
    for start, stop in mutations.sealed_ranges(bytes(content)):
        if content[start : start + 4] == b"OHDR" and usual in content[start:stop]:
            content[start:stop] = content[start:stop].replace(usual, bytes([4, 32, 4, 4, 0, 10]))
            content[stop : stop + 4] = struct.pack("<I", mutations.lookup3(bytes(content[start:stop])))
    corpus.write_bytes(content)
    refused(Corpus, corpus, CorpusError)  # by HDF5 itself


def external_link(file, folder):
    del file["tokens"]
    file["tokens"] = h5py.ExternalLink("other.h5", "tokens")


def soft_loop(file, folder):
    del file["tokens"]
    file["tokens"] = h5py.SoftLink("/tokens")


def external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(5000))
    del file["document_names"]
    file.create_dataset("document_names", (34,), "u1", external=[(str(folder / "secret"), 0, 34)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((3500,), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "tokens", (3500,))
    del file["tokens"]
    file.create_virtual_dataset("tokens", layout)


def bomb(file, folder):
    del file["tokenizer_json"]
    file.create_dataset("tokenizer_json", (1 << 30,), "u1", chunks=(1 << 26,), compression="gzip", fillvalue=32)


def text_of_any_length(file, folder):
    file.attrs["tokenizer"] = "bytes"


def many_numbers(file, folder):
    file.attrs["vocab_size"] = np.full(1000, 256)


def wide_numbers(file, folder):
    del file["chunk_checksums"]
    file.create_dataset("chunk_checksums", (5,), h5py.string_dtype())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external_link, "dataset tokens is missing"),
        (soft_loop, "dataset tokens is missing"),
        (external_storage, "has a filter, or lies in another file"),
        (virtual, "has a filter, or lies in another file"),
        (bomb, "has a filter, or lies in another file"),
        (text_of_any_length, "attribute tokenizer must be a string of fixed length"),
        (many_numbers, "attribute vocab_size must be an integer"),
        (wide_numbers, "dataset chunk_checksums has type object"),
    ],
)
def test_corpus_with_what_no_corpus_has_is_refused(corpus, tmp_path, change, message):
    shutil.copy(corpus, tmp_path / "other.h5")
    with h5py.File(corpus, "r+") as file:
        change(file, tmp_path)
    assert message in refused(Corpus, corpus, CorpusError)


def test_corpus_with_a_type_that_numpy_lacks_is_refused(originals, tmp_path):
    kind = fuzzing.Corpora(originals / "corpus")
    content = bytearray(kind.content)
    done = 0
    for start, stop in kind.ranges:
        at = content.find(bytes([0x10, 0x08, 0, 0, 8, 0, 0, 0]), start, stop)  # an integer of 8 bytes
        if content[start : start + 4] == b"OHDR" and at >= 0:
            content[at + 4 : at + 8] = struct.pack("<I", (1 << 32) - 1)
            content[stop : stop + 4] = struct.pack("<I", mutations.lookup3(bytes(content[start:stop])))
            done += 1
    assert done
    (tmp_path / "a.h5").write_bytes(content)
    refused(Corpus, tmp_path / "a.h5", CorpusError)


def test_name_of_a_tokenizer_cannot_steer_a_terminal(corpus):
    with h5py.File(corpus, "r+") as file:
        file.attrs["tokenizer"] = np.bytes_(b"\x1b[2J\nfine")
    assert r"tokenizer \x1b[2J fine of 256" in refused(Corpus, corpus, CorpusError)


def test_tokenizer_of_a_corpus_that_is_none_is_refused_when_used():
    with pytest.raises(ConfigError, match="name is not a tokenizer of the tokenizers package"):
        list(JsonTokenizer("name", 256, "{").decode([1]))


def sealed_checkpoint(path, about, tensors):
    text = json.dumps(about)
    save_file(tensors, path, {"longnet_hpc": text, "checksum": xxhash.xxh3_64_hexdigest(text.encode())})


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in (None, -1, 1.5, "1", True, [], 1 << 63)),
        *({"batch_index": value} for value in (None, -1, {})),
        *({"order": value} for value in (None, [], {}, {"seq_len": 5}, vars(ORDER) | {"seq_len": "16"})),
        *({"order": vars(ORDER) | {"more": 1}}, {"model": []}, {"model": None}, {"checksums": []}, {"kinds": 3}),
        *({"checksums": {}}, {"checksums": {"a": "0", "\x1b": 1}}, {"kinds": {"a": "float32 [4, 1]"}}),
    ],
)
def test_checkpoint_whose_description_cannot_be_is_refused(originals, tmp_path, changes):
    with safe_open(originals / "checkpoint", "pt") as file:
        about = json.loads(file.metadata()["longnet_hpc"])
    tensor = torch.zeros(2, 2)
    about |= {"checksums": {"a": xxhash.xxh3_64_hexdigest(tensor.numpy().tobytes())}, "kinds": {"a": "float32 [2, 2]"}}
    sealed_checkpoint(tmp_path / "a", about, {"a": tensor})
    assert torch.equal(load_checkpoint(tmp_path / "a").tensors["a"], tensor)
    sealed_checkpoint(tmp_path / "a", about | changes, {"a": tensor})
    refused(load_checkpoint, tmp_path / "a", CheckpointError)


@pytest.mark.parametrize(("old", "new"), [('"F32"', '"I32"'), ('"shape":[8,32]', '"shape":[32,8]')])
def test_checkpoint_whose_tensors_changed_type_or_shape_is_refused(originals, tmp_path, old, new):
    content = (originals / "checkpoint").read_bytes()
    assert old.encode() in content
    (tmp_path / "a").write_bytes(content.replace(old.encode(), new.encode(), 1))
    assert "is damaged: the checksum of" in refused(load_checkpoint, tmp_path / "a", CheckpointError)


def test_checkpoint_of_before_types_and_shapes_were_kept_is_read(originals, tmp_path):
    with safe_open(originals / "checkpoint", "pt") as file:
        about = json.loads(file.metadata()["longnet_hpc"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    del about["kinds"]
    sealed_checkpoint(tmp_path / "a", about, tensors)
    assert load_checkpoint(tmp_path / "a").tensors.keys() == tensors.keys()


@pytest.mark.parametrize("size", [(1 << 24) + 1, 1 << 40, (1 << 64) - 1])
def test_checkpoint_that_states_a_long_header_is_refused(tmp_path, size):
    (tmp_path / "a").write_bytes(size.to_bytes(8, "little") + b"{}" * 100)
    assert f"its header states {size} bytes" in refused(load_checkpoint, tmp_path / "a", CheckpointError)


def test_checkpoint_with_a_deep_description_is_refused(tmp_path):
    for text in ("[" * 100_000, "9" * 5000, '{"a":' * 100_000):
        save_file({"a": torch.zeros(1)}, tmp_path / "a", {"longnet_hpc": text})
        refused(load_checkpoint, tmp_path / "a", CheckpointError)


HOSTILE_TOML = [
    ("steps = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ("steps = 0x" + "f" * 6000, "must be -2**63 to 2**63 - 1, got a number too long to show"),
    ("seq_len = 9223372036854775808", "must be -2**63 to 2**63 - 1, got 9223372036854775808"),
    ("[model]\nrotary_base = " + "9" * 400, "model.rotary_base must be -2**63 to 2**63 - 1"),
    ("steps = " + "9" * 5000, "is not TOML"),
    ("steps = [0x" + "f" * 6000 + "]", "must be an integer, got a number too long to show"),
    ("steps." + "a." * 3000 + "b = 1", "must be an integer, got"),
    ('"a\\nb" = 1', "config key a b does not exist"),
    ('"\\u001b[2J" = 1', r"config key \x1b[2J does not exist"),
    ("k" * 5000 + " = 1", "does not exist"),
    ("device = '" + "x" * 20_000 + "'", "device must be one of auto, cpu, cuda, got 'xxx"),
    ("# " + "x" * (1 << 20), "is longer than 1048576 bytes"),
    ("steps = 1\x00", "is not TOML"),
    ("\udc80", "is not TOML"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE_TOML)
def test_hostile_config_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert message in refused(lambda path: parse(["train", "--config", str(path)], console=False), path, ConfigError)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name = ", 'name = "a\\u001b[2J" #', "name must be one line of up to 500 letters"),
        ("name = ", 'name = "' + "x" * 501 + '" #', "name must be one line of up to 500 letters"),
        ("memory_bytes = ", "memory_bytes = 0x" + "f" * 6000 + " #", "memory_bytes must be -2**63 to 2**63 - 1"),
        ("logit_seconds = ", "logit_seconds = " + "9" * 400 + " #", "logit_seconds must be -2**63 to 2**63 - 1"),
        ("embed_dims = ", "embed_dims = [" + "3, " * 9000 + "3] #", "sizes of blocks must ascend from 1, got [3, 3"),
        ("name = ", "name = " + "[" * 9000 + "#", "nested too deeply"),
    ],
)
def test_hostile_machine_is_refused_in_one_line(originals, tmp_path, old, new, message):
    text = (originals / "machine").read_text()
    assert old in text
    (tmp_path / "a.toml").write_text(text.replace(old, new, 1))
    assert message in refused(lambda path: load_machine(str(path)), tmp_path / "a.toml", ConfigError)


HOSTILE_LINES = [
    "[" * 100_000,
    '{"step": ' + "[" * 60 + "]" * 60 + "}",
    '{"step": 1, "loss": NaN}',
    '{"step": 1, "loss": -Infinity}',
    '{"step": 1, "loss": 1e999}',
    '{"step": ' + "9" * 301 + "}",
    '{"step": ' + "9" * 5000 + "}",
    '{"step": "' + "x" * (1 << 23) + '"}',
    "3",
    "[1, 2]",
    '"text"',
]


@pytest.mark.parametrize("line", HOSTILE_LINES)
def test_hostile_line_is_passed_over_or_refused(tmp_path, line, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n\n' + line + '\n{"step": 2}\n')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: line 3 is no record and passed over"]
    assert ": line 3 " in refused(lambda path: read_metrics(path, 5), path, CheckpointError)


def test_many_lines_that_are_no_records_give_one_warning(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("x\n" * 100_000)
    assert read_records(path) == []
    told = f"{path}: line 1 is no record and passed over, and 99999 more"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_tokenizer_that_is_none_is_refused_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    path = tmp_path / "a.json"
    for text in ('"' + "x" * 20_000 + '"', "{\n" * 100_000, '"\\u001b[2J"', '{"model": 3}'):
        path.write_text(text)
        assert "is not a tokenizer of the tokenizers package" in refused(load_tokenizer, path, ConfigError)
    monkeypatch.setattr("longnet_hpc.data.tokenizer.MAX_TOKENIZER_BYTES", 3)
    assert "is longer than 3 bytes" in refused(load_tokenizer, path, ConfigError)


def test_archive_is_only_read(tmp_path, monkeypatch):
    """Names that lead out of a folder, links and devices make no file: members are streams, and links left out."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = ("../up", "/tmp/longnet_hpc-absolute", str(tmp_path / "absolute"), "../../up", "a/../../up", "\x1b[2J")
    with tarfile.open("a.tar.gz", "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"hello"))
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            link = tarfile.TarInfo(f"link{number}")
            link.type, link.linkname = kind, "../secret"
            archive.addfile(link)
        inside = tarfile.TarInfo("link0/through")  # the symbolic link as a folder
        inside.size = 5
        archive.addfile(inside, io.BytesIO(b"hello"))
    (tmp_path / "secret").write_text("not to be read")
    path = prepare(["a.tar.gz"], tmp_path / "here" / "corpus.h5")
    assert read_all(path) == b"hello" * (len(names) + 1)
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert there == {"here", "here/a.tar.gz", "here/corpus.h5", "secret"}
    assert (tmp_path / "secret").read_text() == "not to be read"
    assert not Path("/tmp/longnet_hpc-absolute").exists()


EXECUTING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "jsonpickle"}


def test_nothing_in_a_file_is_ever_executed():
    """The package opens no file with what can run code: no pickle, numpy.load or eval; torch.load of weights only."""
    found = []
    for path in sorted((ROOT / "longnet_hpc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").partition(".")[0]]
            if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["PickleError"]:
                names = []  # what reading weights raises
            bad = set(names) & EXECUTING
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                last = called.rpartition(".")[2]
                if called in ("eval", "exec", "compile", "__import__", "np.load", "numpy.load"):
                    bad.add(called)
                if called == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords):
                    bad.add(called)
                if last in ("load_module", "literal_eval") or any(word.arg == "allow_pickle" for word in node.keywords):
                    bad.add(called)
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in bad]
    assert found == []
