"""Training on a sequence that is walked through in time: the steps of one piece, left and gone on with."""

import pytest
import torch
from launching import run_python
from stream_runs import CHUNK_LEN, SEQ_LEN, STREAM, corpus, eval_words, results, train_words, trained  # noqa: F401

from longnet_hpc import train_stream
from longnet_hpc.checkpoint import load_checkpoint
from longnet_hpc.record import read_records
from longnet_hpc.run import main
from longnet_hpc.stopping import StopRequest

# ruff: noqa: F811 - the fixtures that tests take


@pytest.fixture
def left_after(monkeypatch):
    """Make streams in this process stop after some chunks, counted over all steps."""

    def leave(chunks):
        answers = iter([False] * (chunks - 1) + [True])
        monkeypatch.setattr(StopRequest, "asked", lambda self, comm: next(answers, False))

    return leave


def weights(folder):
    return load_checkpoint(folder / "checkpoints" / "step-00000002.safetensors").tensors


def assert_same_training(folder, expected):
    metrics = ("step", "loss", "grad_norm", "learning_rate")
    ours, right = (
        [[line[name] for name in metrics] for line in read_records(path / "metrics.jsonl")]
        for path in (folder, expected)
    )
    assert len(ours) == 2
    for line, its in zip(ours, right, strict=True):
        assert line == pytest.approx(its, rel=1e-5)
        assert line[1] == pytest.approx(its[1], rel=1e-6)
    torch.testing.assert_close(weights(folder), weights(expected), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {path.name for path in expected.iterdir()} | {"chunks.jsonl"}
    )


def assert_left(done):
    assert done.returncode == 75, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_streamed_training_equals_that_of_one_piece(corpus, trained, tmp_path):
    assert main(train_words(corpus, tmp_path / "run", *STREAM)) == 0
    assert_same_training(tmp_path / "run", trained)
    starts, steps = list(range(0, SEQ_LEN, CHUNK_LEN)), [1, 2]
    expected = [(step, "forward", start) for step in steps for start in starts[:-1]]
    expected += [(step, "backward", start) for step in steps for start in starts]
    lines = read_records(tmp_path / "run" / "chunks.jsonl")
    assert sorted((line["step"], line["sweep"], line["first_token"]) for line in lines) == sorted(expected)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(("step", "done"), [(1, 3), (1, 8), (1, 11), (2, 4), (2, 9)])
def test_training_that_was_left_within_a_step_is_gone_on_with(
    corpus, trained, tmp_path, monkeypatch, capsys, left_after, step, done, in_file
):
    if in_file:
        monkeypatch.setattr(train_stream, "_MEMORY_SHARE", 0)
    left_after((step - 1) * 15 + done)  # in place of its last chunk the step itself is asked about
    assert main(train_words(corpus, tmp_path / "run", *STREAM)) == 75
    assert f"left in step {step} after {done} of 15 chunks" in capsys.readouterr().out
    assert (tmp_path / "run" / "sweep.safetensors").is_file()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_training(tmp_path / "run", trained)
    chunks = read_records(tmp_path / "run" / "chunks.jsonl")
    assert len(chunks) == 2 * 15
    left_at = (step - 1) * 15 + done
    assert chunks[left_at - 1]["seconds"] < chunks[left_at]["seconds"]  # of the step, over both calls
    line = read_records(tmp_path / "run" / "metrics.jsonl")[step - 1]
    assert line["seconds"] > chunks[step * 15 - 1]["seconds"]


@pytest.fixture
def script(tmp_path):
    """Program that leaves a stream as its first argument says, a digit a question; the second is the share of rows."""
    path = tmp_path / "leave.py"
    path.write_text(
        "import sys\n"
        "from longnet_hpc import train_stream\n"
        "from longnet_hpc.run import main\n"
        "answers = iter(map(int, sys.argv[1]))\n"
        "train_stream.StopRequest.asked = lambda self, comm: bool(next(answers, 0))\n"
        "train_stream._MEMORY_SHARE = float(sys.argv[2])\n"
        "sys.exit(main(sys.argv[3:]))\n"
    )
    return path


def test_step_left_on_three_ranks_is_gone_on_with_on_one(corpus, trained, tmp_path, script):
    # The last chunk begins with 12 tokens of a segment that only the first rank sees, and is the first on the way back.
    chunks = [*range(0, SEQ_LEN, 60)]
    words = train_words(corpus, tmp_path / "run", "--stream", "--chunk-len", 60)
    assert_left(run_python(script, len(chunks[1:]) * "0" + "1", 0.5, *words, ranks=3))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_training(tmp_path / "run", trained)
    first, second = read_records(tmp_path / "run" / "metrics.jsonl")
    assert first["bytes_received"] > 0
    assert second["bytes_received"] == 0


@pytest.mark.parametrize("share_before", [0.0, 0.5])
def test_step_left_on_one_rank_is_gone_on_with_on_two_with_rows_in_files(
    corpus, trained, tmp_path, script, left_after, monkeypatch, share_before
):
    monkeypatch.setattr(train_stream, "_MEMORY_SHARE", share_before)
    left_after(9)
    assert main(train_words(corpus, tmp_path / "run", *STREAM)) == 75
    (tmp_path / "run" / "rows.h5.1").write_bytes(b"of a step before, on more ranks")
    done = run_python(script, "0", 0.0, "train", "--resume", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", trained)


def test_files_of_rows_of_all_ranks_are_gone_in_the_end(corpus, trained, tmp_path, left_after, monkeypatch):
    monkeypatch.setattr(train_stream, "_MEMORY_SHARE", 0)
    left_after(9)
    assert main(train_words(corpus, tmp_path / "run", *STREAM)) == 75
    (tmp_path / "run" / "rows.h5.1").write_bytes(b"left on two ranks")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_training(tmp_path / "run", trained)


def test_time_of_a_job_is_not_that_of_each_step(corpus, tmp_path, monkeypatch, capsys):
    from longnet_hpc import stopping

    clock = iter(range(1000))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    # Asked 14 times a step: the time is over in the second.
    assert main(train_words(corpus, tmp_path / "run", *STREAM, "--stop-after", "20")) == 75
    assert "left in step 2" in capsys.readouterr().out


@pytest.mark.parametrize(("free", "place"), [(10**9, "in host memory"), (0, "in a file")])
def test_rows_lie_in_host_memory_if_there_is_enough(corpus, tmp_path, monkeypatch, caplog, free, place):
    monkeypatch.setattr(train_stream, "free_host_memory", lambda: free)
    assert main(train_words(corpus, tmp_path / "run", *STREAM, "--steps", "1")) == 0
    assert place in caplog.text


def test_rows_in_a_file_of_a_killed_job_are_not_used(corpus, trained, tmp_path, monkeypatch):
    assert main(train_words(corpus, tmp_path / "run", *STREAM, "--stop-at", "1")) == 0
    (tmp_path / "run" / "rows.h5").write_bytes(b"half a file")
    monkeypatch.setattr(train_stream, "_MEMORY_SHARE", 0)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_training(tmp_path / "run", trained)


@pytest.mark.parametrize("name", ["sweep.safetensors", "rows.h5"])
def test_damaged_state_of_a_step_is_one_line(corpus, tmp_path, left_after, monkeypatch, capsys, name):
    monkeypatch.setattr(train_stream, "_MEMORY_SHARE", 0)
    left_after(9)
    assert main(train_words(corpus, tmp_path / "run", *STREAM)) == 75
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).write_bytes(b"no such thing")
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert str(tmp_path / "run") in lines[0]


def test_step_is_not_gone_on_with_in_other_chunks(corpus, tmp_path, left_after, capsys):
    left_after(3)
    assert main(train_words(corpus, tmp_path / "run", *STREAM)) == 75
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run"), "--chunk-len", "350"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: step left in {tmp_path / 'run' / 'sweep.safetensors'} has chunk_len 97, not 350"]


def test_main_job_evaluates_as_it_trains(corpus, tmp_path):
    assert main(train_words(corpus, tmp_path / "run", *STREAM, "--steps", "1", "--half-residual")[1:]) == 0
    ours = results(tmp_path / "run" / "eval-corpus-step-1")
    assert (ours["tokens"], ours["chunk_len"]) == (SEQ_LEN, CHUNK_LEN)
    assert "half_residual = true" in (tmp_path / "run" / "eval-corpus-step-1" / "config.toml").read_text()


def test_run_starts_from_the_weights_of_another(corpus, trained, tmp_path):
    words = train_words(corpus, tmp_path / "run", *STREAM, "--start-from", trained, "--stop-at", "1")
    assert main(words) == 0
    (line,) = read_records(tmp_path / "run" / "metrics.jsonl")
    first, second = read_records(trained / "metrics.jsonl")
    assert line["step"] == 1
    assert line["loss"] < min(first["loss"], second["loss"])  # which were taken before these steps' updates
    assert main(eval_words(corpus, trained, tmp_path / "eval", "--max-batches", "1")) == 0
    assert line["loss"] == pytest.approx(results(tmp_path / "eval")["loss"], abs=1e-6)


def test_step_that_started_from_other_weights_is_gone_on_with_from_them(corpus, trained, tmp_path, left_after):
    words = train_words(corpus, tmp_path / "whole", *STREAM, "--start-from", trained, "--stop-at", "1")
    assert main(words) == 0
    left_after(4)
    words = train_words(corpus, tmp_path / "left", *STREAM, "--start-from", trained, "--stop-at", "1")
    assert main(words) == 75
    assert main(["train", "--resume", str(tmp_path / "left"), "--stop-at", "1"]) == 0
    (whole,), (left,) = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "left"))
    assert left["loss"] == pytest.approx(whole["loss"], abs=1e-6)
