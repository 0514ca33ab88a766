"""Evaluation of a sequence that is walked through in time, left and gone on with; signals, and what is refused."""

import math
import signal

import pytest
import torch
from launching import run_command
from stream_runs import CHUNK_LEN, SEQ_LEN, STREAM, corpus, eval_words, results, train_words, trained  # noqa: F401

from longnet_hpc.data import Corpus
from longnet_hpc.evaluate_stream import _Totals
from longnet_hpc.record import append_record, read_records
from longnet_hpc.run import main
from longnet_hpc.stopping import StopRequest

# ruff: noqa: F811 - the fixtures that tests take


def without_times(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_records(folder)]


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
