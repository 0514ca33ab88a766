import builtins
import json
import sys

import h5py
import numpy as np
import pytest
import xxhash
from data_files import prepare_on_threads
from tokenizer_files import trained_on_bytes

from longnet_hpc.data import Corpus, load_tokenizer, prepare
from longnet_hpc.data import tokenizer as tokenizer_module
from longnet_hpc.errors import ConfigError, CorpusError

tokenizers = pytest.importorskip("tokenizers")

TEXT = "def naïve(größe):\n    return '日本語 🙂' * größe\n\n\nprint(naïve(3))\n" * 40


@pytest.fixture
def tokenizer_file(tmp_path):
    """A byte-level BPE with special tokens, truncation and padding, all of which must not reach a corpus."""
    tokenizer = trained_on_bytes(TEXT, 400, ["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.enable_truncation(10)
    tokenizer.enable_padding(length=50_000)
    path = tmp_path / "bpe.json"
    tokenizer.save(str(path))
    return path


def plain_ids(path, text):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def corpus_path(tmp_path, tokenizer_file):
    (tmp_path / "a").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b").write_text(TEXT[::-1], encoding="utf-8")
    return prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "corpus.h5", tokenizer=tokenizer_file, chunk_tokens=100)


def test_tokens_equal_those_of_the_tokenizers_package(corpus_path, tokenizer_file):
    expected = plain_ids(tokenizer_file, TEXT) + plain_ids(tokenizer_file, TEXT[::-1])
    with Corpus(corpus_path) as corpus:
        assert corpus.read(0, corpus.num_tokens).tolist() == expected
        assert corpus.document_offsets.tolist() == [0, len(plain_ids(tokenizer_file, TEXT)), len(expected)]
        assert corpus.dtype == np.uint16
        assert corpus.num_bytes == 2 * len(TEXT.encode())


def test_tokenizer_travels_with_the_corpus(corpus_path, tokenizer_file):
    content = tokenizer_file.read_text(encoding="utf-8")
    tokenizer_file.unlink()
    with Corpus(corpus_path) as corpus:
        assert corpus.tokenizer.name == "bpe.json"
        assert corpus.tokenizer.json == content
        assert corpus.vocab_size == corpus.tokenizer.vocab_size == len(json.loads(content)["model"]["vocab"])
        assert corpus.tokenizer.dtype == corpus.dtype


def test_tokens_do_not_depend_on_the_number_of_ranks(corpus_path, tokenizer_file, tmp_path):
    sources = [tmp_path / "a", tmp_path / "b"]
    path = prepare_on_threads(2, sources, tmp_path / "two" / "corpus.h5", tokenizer=tokenizer_file)
    with Corpus(path) as two, Corpus(corpus_path) as one:
        assert len(two.shards) == 2
        assert np.array_equal(two.read(0, two.num_tokens), one.read(0, one.num_tokens))
        assert two.tokenizer == one.tokenizer


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000, 10**6])
def test_tokens_do_not_depend_on_how_bytes_arrive(tokenizer_file, size, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TEXT_BLOCK_CHARACTERS", 64)
    tokenizer, content = load_tokenizer(tokenizer_file), TEXT.encode()
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    tokens = np.concatenate(list(tokenizer.encode("text", blocks))).tolist()
    assert tokens == np.concatenate(list(tokenizer.encode("text", [content]))).tolist()
    assert tokenizers.Tokenizer.from_file(str(tokenizer_file)).decode(tokens) == TEXT


def test_blocks_end_with_lines_and_are_bounded(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TEXT_BLOCK_CHARACTERS", 20)
    text = "short\nlines\nof text\n" + "x" * 50 + "\nend"
    blocks = list(tokenizer_module._lines_together([text[:7], text[7:30], text[30:]]))
    assert "".join(blocks) == text
    assert blocks == ["short\nlines\nof text\n", "x" * 20, "x" * 20, "x" * 10 + "\nend"]


def test_bytes_that_are_not_text_are_replaced_with_a_warning(tmp_path, tokenizer_file):
    (tmp_path / "c").write_bytes("gut ü".encode() + b"\xff\xfe schlecht \xe2\x82")
    with pytest.warns(UserWarning, match=r"c: bytes that are not UTF-8 become U\+FFFD"):
        path = prepare([tmp_path / "c"], tmp_path / "c.h5", tokenizer=tokenizer_file)
    with Corpus(path) as corpus:
        expected = plain_ids(tokenizer_file, "gut ü\ufffd\ufffd schlecht \ufffd")
        assert corpus.read(0, corpus.num_tokens).tolist() == expected


def test_token_outside_the_vocabulary_is_one_line(corpus_path):
    with h5py.File(corpus_path, "r+") as file:
        vocab_size = int(file.attrs["vocab_size"])
        file["tokens"][150] = vocab_size
        file["chunk_checksums"][1] = xxhash.xxh3_64_intdigest(file["tokens"][100:200])
    with Corpus(corpus_path) as corpus:
        corpus.read(0, 100)
        with pytest.raises(CorpusError, match=rf"token {vocab_size} at 150 is outside the vocabulary of {vocab_size}"):
            corpus.read(199, 201)


@pytest.mark.parametrize(("tokens", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_type_is_the_smallest_that_holds_the_vocabulary(tokens, dtype):
    assert tokenizer_module.JsonTokenizer("name", tokens, "{}").dtype == np.dtype(dtype)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer must be 'bytes' or a JSON file, got .*No such file"),
        (b"\xff\xfe", "tokenizer must be 'bytes' or a JSON file"),
        (b"{}", "is not a tokenizer of the tokenizers package"),
        (b"", "is not a tokenizer of the tokenizers package"),
    ],
)
def test_bad_tokenizer_is_one_line_and_leaves_nothing(tmp_path, content, message):
    (tmp_path / "a").write_text("text")
    if content is not None:
        (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare([tmp_path / "a"], tmp_path / "corpus.h5", tokenizer=tmp_path / "bad.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus.h5").exists()


def test_missing_package_says_what_to_install(tokenizer_file, monkeypatch):
    find = builtins.__import__

    def refuse(name, *rest):
        if name == "tokenizers":
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.delitem(sys.modules, "tokenizers")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        load_tokenizer(tokenizer_file)
    assert load_tokenizer("bytes").vocab_size == 256
