"""What a user can get wrong: one clear line on rank 0, exit code 2, nothing half-written."""

import time

import h5py
import pytest
from launching import MODEL, error_lines, run_command, run_python

from longnet_hpc.data import Corpus, prepare
from longnet_hpc.run import main

SMALL = (*MODEL, "--seq-len", "512", "--steps", "3", "--device", "cpu", "--no-shuffle")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n} of the text\n" for n in range(1000)))
    return path


@pytest.fixture
def corpus(text, tmp_path):
    return prepare([text], tmp_path / "corpus.h5", chunk_tokens=64)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command in this process; return its only line of error, after making sure that it changed no file."""
    monkeypatch.chdir(tmp_path)

    def contents():
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    def run(*words):
        before = contents()
        capsys.readouterr()
        code = main([str(word) for word in words])
        shown = capsys.readouterr().err
        lines = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert code == 2
        assert len(lines) == 1
        assert contents() == before
        assert "%|" not in shown  # no bar before the work has begun
        return lines[0]

    return run


def change_byte(path, needle):
    content = path.read_bytes()
    assert content.count(needle) == 1
    path.write_bytes(content.replace(needle, needle[:-1] + b"?"))


def test_missing_corpus(refused, tmp_path):
    assert "absent.h5" in refused("train", *SMALL, "--corpus", tmp_path / "absent.h5")


@pytest.mark.parametrize("content", [b"", b"plain text, not HDF5\n" * 20])
def test_empty_or_foreign_corpus(refused, tmp_path, content):
    path = tmp_path / "foreign.h5"
    path.write_bytes(content)
    assert "foreign.h5" in refused("train", *SMALL, "--corpus", path)


def test_hdf5_of_something_else(refused, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["tokens"] = [1, 2, 3]
    assert "not a corpus" in refused("train", *SMALL, "--corpus", tmp_path / "other.h5")


def test_truncated_corpus(refused, corpus):
    content = corpus.read_bytes()
    corpus.write_bytes(content[: len(content) // 2])
    assert "corpus.h5" in refused("train", *SMALL, "--corpus", corpus)


def test_corpus_of_another_version(refused, corpus):
    with h5py.File(corpus, "r+") as file:
        file.attrs["format_version"] = 99
    assert "format version 99" in refused("train", *SMALL, "--corpus", corpus)


def test_corpus_shorter_than_a_sequence(refused, corpus):
    assert "1000001" in refused("train", *SMALL, "--corpus", corpus, "--seq-len", 1_000_000)


def test_token_outside_the_vocabulary(refused, corpus):
    line = refused("train", *SMALL, "--corpus", corpus, "--model.vocab-size", 100)
    assert line.endswith("(vocab_size 100); use --model.vocab-size 256")


def test_unwritable_run_folder(refused, corpus, tmp_path):
    (tmp_path / "file").touch()
    line = refused("train", *SMALL, "--corpus", corpus, "--folder", tmp_path / "file" / "run")
    assert line == f"error: cannot write run folder {tmp_path / 'file' / 'run'}: Not a directory"


@pytest.mark.parametrize("size", [("--model.embed-dim", "100000000000"), ("--model.vocab-size", "99999999999999")])
def test_model_larger_than_memory(refused, corpus, tmp_path, size):
    line = refused("train", "--corpus", corpus, "--folder", tmp_path / "run", *size)
    assert "GB for these alone, cpu has" in line


def test_unwritable_corpus(refused, text, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in refused("prepare", text, "--output", tmp_path / "file" / "corpus.h5")


def test_run_folder_that_exists(refused, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    assert "--resume" in refused("train", *SMALL, "--corpus", corpus, "--folder", tmp_path / "run")


def test_corpus_that_exists_or_source_that_does_not(refused, corpus, text, tmp_path):
    assert "exists" in refused("prepare", text, "--output", corpus)
    assert "absent" in refused("prepare", tmp_path / "absent", "--output", tmp_path / "new.h5")


def test_eval_without_a_checkpoint_or_of_none(refused, corpus, tmp_path):
    assert "--checkpoint" in refused("eval", "--corpus", corpus)
    assert "neither a checkpoint" in refused("eval", "--corpus", corpus, "--checkpoint", tmp_path)


def test_unknown_backend_and_missing_device(refused, corpus, monkeypatch):
    assert "backend must be one of" in refused("train", *SMALL, "--corpus", corpus, "--backend", "magic")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "torch sees no CUDA device" in refused("train", *SMALL, "--corpus", corpus, "--device", "cuda")


def test_checkpoint_of_another_model_and_training_that_is_over(refused, corpus, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--corpus", str(corpus), "--folder", str(run)]) == 0
    line = refused("train", "--resume", run, "--steps", "9", "--model.layers", "3")
    assert "another model: its layers is 2, not 3" in line
    assert "3 of 3 steps" in refused("train", "--resume", run)
    for stop_at in (2, 3):
        line = refused("train", "--resume", run, "--steps", 9, "--stop-at", stop_at)
        assert line == f"error: training has done 3 steps, stop_at must be above that, got {stop_at}"


def test_resumption_on_other_batches(refused, corpus, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--corpus", str(corpus), "--folder", str(run)]) == 0
    (tmp_path / "other.txt").write_text("another text\n" * 500)
    other = prepare([tmp_path / "other.txt"], tmp_path / "other.h5")
    onward = ("train", "--resume", run, "--steps", 9)
    assert "its corpus_tokens is" in refused(*onward, "--corpus", other)
    with Corpus(corpus) as held:
        (tmp_path / "alike.txt").write_text("x" * held.num_tokens)
    alike = prepare([tmp_path / "alike.txt"], tmp_path / "alike.h5", chunk_tokens=64)
    assert "its corpus_hash is" in refused(*onward, "--corpus", alike)
    for name, option in (("batch_size", 2), ("seq_len", 256), ("seed", 5)):
        line = refused(*onward, f"--{name.replace('_', '-')}", option)
        assert f"its {name} is " in line
        assert f"not {option} as configured" in line
    assert "its shuffle is False, not True as configured" in refused(*onward, "--shuffle")


def test_run_whose_metrics_are_not_its_own(refused, corpus, tmp_path):
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--corpus", str(corpus), "--folder", str(run)]) == 0
    good = (run / "metrics.jsonl").read_text().splitlines()
    for bad, message in (("{half", "line 2 is not JSON"), ("[3]", "line 2 is not the line of a step")):
        (run / "metrics.jsonl").write_text("\n".join((good[0], bad, good[2])) + "\n")
        assert message in refused("train", "--resume", run, "--steps", 9)


def test_unwritable_folder_of_an_evaluation_before_it_begins(refused, corpus, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert main(["train", *SMALL, "--corpus", str(corpus), "--folder", str(run)]) == 0
    (tmp_path / "file").touch()
    monkeypatch.setattr("longnet_hpc.evaluate._sum_by_context", None)  # not called
    output = tmp_path / "file" / "results"
    line = refused("eval", "--checkpoint", run, "--corpus", corpus, "--output", output)
    assert line == f"error: cannot write results to {output}: Not a directory"


def test_damaged_chunk_on_the_second_rank_alone(corpus, tmp_path):
    # Sequence 2 is tokens 1024 to 1535; only rank 1 reads what lies after 1280.
    needle = corpus.read_bytes()
    start = needle.index(b"line 0 of the text")
    piece = needle[start + 1400 : start + 1420]
    change_byte(corpus, piece)
    done = run_command("train", *SMALL, "--corpus", corpus, "--folder", tmp_path / "run", ranks=2)
    (line,) = error_lines(done)
    assert "damaged" in line
    assert "checksum" in line
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_damaged_chunk_in_the_first_step_on_the_second_rank_alone(corpus, tmp_path):
    # The second batch of the first step is tokens 512 to 1023; only rank 1 reads what lies after 768.
    start = corpus.read_bytes().index(b"line 0 of the text")
    change_byte(corpus, corpus.read_bytes()[start + 900 : start + 920])
    words = ("train", *SMALL, "--accumulation", "2", "--corpus", corpus, "--folder", tmp_path / "run")
    (line,) = error_lines(run_command(*words, ranks=2))
    assert "checksum" in line
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_tokens(corpus, tmp_path):
    done = run_command("train", *SMALL, "--seq-len", "2", "--corpus", corpus, "--folder", tmp_path / "run", ranks=3)
    assert error_lines(done) == ["error: a sequence of 2 tokens cannot be cut over 3 ranks: at least 1 token each"]
    assert not (tmp_path / "run").exists()


def test_wrong_word_is_told_once_by_two_ranks(tmp_path):
    done = run_command("train", "--model.heads", "3", ranks=2, cwd=tmp_path)
    (line,) = error_lines(done)
    assert "heads must divide embed_dim, got 3" in line
    assert list(tmp_path.iterdir()) == []


FAILING = """
import sys
from longnet_hpc.launcher import environment_rank
from longnet_hpc.run import main
from longnet_hpc.trainer import Trainer

whole_step = Trainer.step

def step(self):
    if environment_rank() == 1 and self.steps_done == 1:
        raise {error}
    return whole_step(self)

Trainer.step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("error", ["RuntimeError('a defect')", "OSError('a disk that only this rank has')"])
def test_failure_of_one_rank_alone_ends_all_with_its_traceback(corpus, tmp_path, error):
    folder = tmp_path / "run"
    words = ("train", *SMALL, "--corpus", corpus, "--folder", folder)
    done = run_python("-c", FAILING.format(error=error), *words, ranks=2)
    ended = time.time()
    assert done.returncode == 1
    assert "rank 1 of 2 failed and ends the job" in done.stderr
    assert error.partition("(")[0] in done.stderr
    assert ended - (folder / "metrics.jsonl").stat().st_mtime < 10  # written at the end of the step before
