"""Commands on a sequence that is walked through in time: the results of one piece, left and gone on with."""

import json
import math
import signal

import pytest
import torch
from launching import MODEL, run_command, run_python

from longnet_hpc import train_stream
from longnet_hpc.checkpoint import load_checkpoint
from longnet_hpc.data import Corpus, prepare
from longnet_hpc.evaluate_stream import _Totals
from longnet_hpc.record import append_record, read_records
from longnet_hpc.run import main
from longnet_hpc.stopping import StopRequest

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


@pytest.fixture
def left_after(monkeypatch):
    """Make streams in this process stop after some chunks, counted over all steps."""

    def leave(chunks):
        answers = iter([False] * (chunks - 1) + [True])
        monkeypatch.setattr(StopRequest, "asked", lambda self, comm: next(answers, False))

    return leave


def train_words(corpus, folder, *more):
    words = ("train", *SMALL, "--seq-len", SEQ_LEN, "--steps", 2, "--corpus", corpus, "--folder", folder, *more)
    return [str(word) for word in words]


def eval_words(corpus, trained, output, *more):
    words = ("eval", "--checkpoint", trained, "--corpus", corpus, "--device", "cpu", "--output", output)
    return [str(word) for word in (*words, "--seq-len", SEQ_LEN, *more)]


def results(folder):
    return json.loads((folder / "result.json").read_text())


def without_times(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_records(folder)]


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


@pytest.fixture(scope="module")
def in_one_piece(corpus, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evals") / "plain"
    assert main(eval_words(corpus, trained, folder, "--max-batches", "1")) == 0
    return results(folder)


@pytest.mark.parametrize("ranks", [1, 3])
def test_streamed_evaluation_equals_that_of_one_piece(corpus, trained, in_one_piece, tmp_path, ranks):
    words = eval_words(corpus, trained, tmp_path / "eval", *STREAM)
    if ranks == 1:
        assert main(words) == 0
    else:
        done = run_command(*words, ranks=ranks)
        assert done.returncode == 0, done.stderr
    ours = results(tmp_path / "eval")
    assert ours["loss"] == pytest.approx(in_one_piece["loss"], abs=1e-6)
    assert (ours["tokens"], ours["chunk_len"]) == (SEQ_LEN, CHUNK_LEN)
    for bins, right in zip(ours["loss_by_position"], in_one_piece["loss_by_context"], strict=True):
        assert bins["first_position"] == right["first_context"]
        assert (bins["last_position"], bins["tokens"]) == (right["last_context"], right["tokens"])
        assert bins["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert bins["standard_error"] == pytest.approx(right["standard_error"], abs=1e-5)
    contexts = [position % 256 + 1 for position in range(SEQ_LEN)]
    for bins in ours["loss_by_context"]:
        assert bins["tokens"] == sum(bins["first_context"] <= n <= bins["last_context"] for n in contexts)
    for name in ("loss_by_position", "loss_by_context"):
        assert sum(bins["tokens"] for bins in ours[name]) == SEQ_LEN
        assert sum(bins["tokens"] * bins["loss"] for bins in ours[name]) / SEQ_LEN == pytest.approx(ours["loss"])
    lines = read_records(tmp_path / "eval" / "chunks.jsonl")
    assert [line["first_token"] for line in lines] == list(range(0, SEQ_LEN, CHUNK_LEN))
    assert sum(line["tokens"] for line in lines) == SEQ_LEN
    assert sum(line["tokens"] * line["loss"] for line in lines) / SEQ_LEN == pytest.approx(ours["loss"])
    assert (tmp_path / "eval" / "loss_by_position.png").stat().st_size > 0


def test_evaluation_that_was_left_is_gone_on_with_on_other_ranks(corpus, trained, in_one_piece, tmp_path):
    words = eval_words(corpus, trained, tmp_path / "eval", *STREAM)
    for done, ranks in ((1, 2), (2, 1)):
        left = run_command(*words, "--stop-after", "0", ranks=ranks)
        assert left.returncode == 75
        assert f"left at token {done * CHUNK_LEN:,} of {SEQ_LEN:,}" in left.stdout
    assert not (tmp_path / "eval" / "result.json").exists()
    assert (tmp_path / "eval" / "stream.safetensors").is_file()
    done = run_command(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "from chunk 3" in done.stderr
    assert main(eval_words(corpus, trained, tmp_path / "whole", *STREAM)) == 0
    ours, right = results(tmp_path / "eval"), results(tmp_path / "whole")
    assert ours["loss"] == pytest.approx(right["loss"], abs=1e-6)
    for name in ("loss_by_position", "loss_by_context"):
        for bins, its in zip(ours[name], right[name], strict=True):
            assert bins == pytest.approx(its, rel=1e-5)
    lines, its = (without_times(tmp_path / name / "chunks.jsonl") for name in ("eval", "whole"))
    for line, other in zip(lines, its, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    assert not (tmp_path / "eval" / "stream.safetensors").exists()
    assert ours["seconds"] > read_records(tmp_path / "eval" / "chunks.jsonl")[1]["seconds"]
    done = run_command(*eval_words(corpus, trained, tmp_path / "two", *STREAM), ranks=2)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "two")["bytes_received"] > ours["bytes_received"] > 0  # but for the second chunk


def test_no_context_is_longer_than_the_widest_segment(corpus, tmp_path):
    folder, pattern = tmp_path / "run", ("--model.segment-lengths", "48", "200", "--steps", "1")
    assert main(train_words(corpus, folder, *pattern)) == 0
    assert main(eval_words(corpus, folder, tmp_path / "eval", *STREAM)) == 0
    ours = results(tmp_path / "eval")
    assert ours["loss_by_context"][-1]["last_context"] == 200
    assert ours["loss_by_position"][-1]["last_position"] == SEQ_LEN


def test_lines_of_chunks_that_a_killed_job_did_after_its_state_do_not_come_twice(corpus, trained, tmp_path):
    words = eval_words(corpus, trained, tmp_path / "eval", *STREAM)
    assert main([*words, "--stop-after", "0"]) == 75
    for first in (CHUNK_LEN, 2 * CHUNK_LEN):
        append_record(tmp_path / "eval" / "chunks.jsonl", {"first_token": first, "tokens": CHUNK_LEN, "loss": 99.0})
    assert main(words) == 0
    lines = read_records(tmp_path / "eval" / "chunks.jsonl")
    assert [line["first_token"] for line in lines] == list(range(0, SEQ_LEN, CHUNK_LEN))
    assert max(line["loss"] for line in lines) < 99.0


def test_state_of_another_evaluation_is_not_gone_on_with(corpus, trained, tmp_path, caplog):
    words = eval_words(corpus, trained, tmp_path / "eval", *STREAM)
    assert main([*words, "--stop-after", "0"]) == 75
    assert main([*words, "--chunk-len", "350"]) == 0
    assert "stream.safetensors is of another evaluation (chunk_len 97, not 350): this one starts anew" in caplog.text
    assert [line["tokens"] for line in read_records(tmp_path / "eval" / "chunks.jsonl")] == [350, 350]
    assert results(tmp_path / "eval")["tokens"] == SEQ_LEN
    assert not (tmp_path / "eval" / "stream.safetensors").exists()


@pytest.mark.parametrize("command", ["eval", "train"])
def test_signal_ends_a_stream_after_its_chunk(corpus, trained, tmp_path, monkeypatch, capsys, command):
    def signalled(path, line):
        append_record(path, line)
        signal.raise_signal(signal.SIGTERM)

    if command == "eval":  # in which a chunk is told while the next one is computed
        monkeypatch.setattr("longnet_hpc.evaluate_stream.append_record", signalled)
        words, left = eval_words(corpus, trained, tmp_path / "eval", *STREAM), f"left at token {2 * CHUNK_LEN}"
    else:
        monkeypatch.setattr("longnet_hpc.train_stream.append_record", signalled)
        words, left = train_words(corpus, tmp_path / "run", *STREAM), "left in step 1 after 1 of 15 chunks"
    assert main(words) == 75
    assert left in capsys.readouterr().out


def test_damaged_state_of_an_evaluation_is_one_line(corpus, trained, tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "stream.safetensors").write_bytes(b"no such thing")
    assert main(eval_words(corpus, trained, tmp_path / "eval", *STREAM)) == 2
    assert f"error: cannot read {tmp_path / 'eval' / 'stream.safetensors'}" in capsys.readouterr().err


def test_stream_of_no_given_length_is_the_whole_corpus(corpus, trained, tmp_path):
    words = ("--checkpoint", str(trained), "--corpus", str(corpus), "--output", str(tmp_path / "eval"))
    assert main(["eval", *words, "--device", "cpu", "--stream"]) == 0
    with Corpus(corpus) as opened:
        assert results(tmp_path / "eval")["tokens"] == opened.num_tokens - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_kept_until_the_job_asks(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.asked(None)
        signal.raise_signal(number)
        assert stop.asked(None)
    assert signal.getsignal(number) is before
    with stop:
        assert stop.asked(None)


@pytest.mark.parametrize(("seconds", "asked"), [(0.0, True), (1000.0, False), (None, False)])
def test_job_is_to_stop_once_its_time_is_over(seconds, asked):
    assert StopRequest(seconds).asked(None) is asked


@pytest.mark.parametrize("first", [1, 2, 3, 7, 8, 9])
def test_totals_are_by_the_logarithm_of_the_number(first):
    totals, losses = _Totals(30, torch.device("cpu")), torch.arange(1.0, 22.0)
    totals.add(losses, first)
    for place in range(totals.sums.shape[1]):
        its = [float(loss) for n, loss in enumerate(losses, first) if math.ceil(math.log2(n)) == place]
        assert totals.sums[:, place].tolist() == [len(its), sum(its), sum(loss**2 for loss in its)]


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


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("train", ("--chunk-len", "97"), "chunk_len and stop_after belong to a stream: give --stream, too"),
        ("train", ("--stop-after", "1"), "chunk_len and stop_after belong to a stream"),
        ("train", ("--stream", "--batch-size", "2"), "batch_size and accumulation must be 1"),
        ("train", ("--stream", "--accumulation", "2"), "batch_size and accumulation must be 1"),
        ("train", ("--stream", "--chunk-len", "0"), "chunk_len must be at least 1, got 0"),
        ("train", ("--stream", "--seq-len", "100000"), "corpus has 1780 tokens; needs at least 100001"),
        ("eval", ("--chunk-len", "97"), "chunk_len and stop_after belong to a stream: give --stream, too"),
        ("train", ("--stream", "--stop-after", "-1"), "stop_after must be at least 0, got -1.0"),
        ("eval", ("--stream", "--stop-after", "nan"), "stop_after must be at least 0, got nan"),
        ("eval", ("--compile", "on"), "only a stream is compiled: give --stream, too"),
        ("eval", ("--stream", "--batch-size", "2"), "a stream is one sequence"),
        ("eval", ("--stream", "--max-batches", "2"), "a stream is one sequence"),
        ("eval", ("--stream", "--seq-len", "100000"), "too few for one sequence of 100000"),
    ],
)
def test_impossible_stream_is_one_line(corpus, trained, tmp_path, capsys, command, options, words):
    start = {"train": train_words(corpus, tmp_path / "run"), "eval": eval_words(corpus, trained, tmp_path / "run")}
    capsys.readouterr()
    assert main([*start[command], *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "run").exists()


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
