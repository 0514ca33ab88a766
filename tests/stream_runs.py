"""A corpus and a run of plain steps for tests of streams, and the words of the commands that walk through it."""

import json

import pytest
from launching import MODEL

from longnet_hpc.data import prepare
from longnet_hpc.run import main

SEQ_LEN, CHUNK_LEN = 700, 97  # neither divides the other, nor a segment
SMALL = (*MODEL, "--device", "cpu", "--optimizer.learning-rate", "0.01", "--no-shuffle")
STREAM = ("--stream", "--chunk-len", str(CHUNK_LEN))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(f"def f{n}(x):\n    return x * {n}\n" for n in range(60)))
    return prepare([folder / "text.txt"], folder / "corpus.h5")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Folder of a run of two plain steps."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    assert main(train_words(corpus, folder)) == 0
    return folder


def train_words(corpus, folder, *more):
    words = ("train", *SMALL, "--seq-len", SEQ_LEN, "--steps", 2, "--corpus", corpus, "--folder", folder, *more)
    return [str(word) for word in words]


def eval_words(corpus, trained, output, *more):
    words = ("eval", "--checkpoint", trained, "--corpus", corpus, "--device", "cpu", "--output", output)
    return [str(word) for word in (*words, "--seq-len", SEQ_LEN, *more)]


def results(folder):
    return json.loads((folder / "result.json").read_text())
