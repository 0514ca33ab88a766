"""The benchmark of a billion tokens, on a CPU and small: its branches, its arithmetic, its check and its records."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longnet_hpc.pattern import Pattern
from longnet_hpc.record import check_record, read_records

BENCH = Path(__file__).parents[1] / "bench"
TINY = ["--total-tokens", "16384", "--heads", "3", "--head-dim", "8", "--repeats", "2", "--device", "cpu"]
CALL = 4096
STREAMED = [*TINY, "--shortest", "2048", "--tokens-per-call", str(CALL), "--dense-limit", "0"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import billion
    import billion_measure
    import billion_picture

    return SimpleNamespace(main=billion, measure=billion_measure, picture=billion_picture)


def results_of(path):
    return {
        (record["what"]["config"]["attention"], record["what"]["config"]["seq_len"]): record["results"]
        for record in read_records(path)
    }


def test_records_table_and_picture_with_dense_attention_extrapolated(tmp_path):
    path, picture = tmp_path / "new" / "billion.jsonl", tmp_path / "pictures" / "billion.png"
    words = [*TINY, "--shortest", "2048", "--longest", "8192", "--dense-limit", "0"]
    command = [sys.executable, str(BENCH / "billion.py"), *words, "--out", str(path), "--picture", str(picture)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("~") == 3  # the legend, and two lengths
    assert picture.read_bytes().startswith(b"\x89PNG")
    records = read_records(path)
    assert [(r["what"]["config"]["attention"], r["kind"]) for r in records] == [
        *(("dilated", "measured"), ("dense", "measured")),
        *(("dilated", "measured"), ("dense", "modelled")) * 2,
    ]
    for record in records:
        check_record(record)
        assert record["check"]["passed"]
        results = record["results"]
        assert results["relative_error"] < 1e-5
        assert results["tokens"] == 16384
        assert results["seconds_per_token"] == pytest.approx(results["seconds"] / 16384)
    results = results_of(path)
    assert results["dense", 8192]["seconds"] == pytest.approx(4 * results["dense", 2048]["seconds"])
    assert results["dense", 8192]["extrapolated_from_seq_len"] == 2048
    dilated = results["dilated", 8192]
    pairs = 8 * 2048 * 2049 // 2 + 2 * 2048 * 2049 // 2  # of one head and one branch after the other
    assert dilated["flop"] == 4 * 8 * 3 * pairs
    assert dilated["flop_per_second"] == pytest.approx(dilated["flop"] / dilated["seconds"])
    assert dilated["lowest_seconds"] <= dilated["median_seconds"] <= dilated["highest_seconds"]


def test_branches_are_the_papers_without_those_that_coincide(bench):
    def branches(seq_len):
        pattern = bench.measure.pattern_of(seq_len, 1 << 24)
        return list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))

    assert branches(2048) == [(2048, 1)]
    assert branches(8192) == [(2048, 1), (8192, 4)]
    assert branches(1 << 24) == [(2048, 1), (1 << 24, 1 << 13)]
    assert branches(1 << 30) == [(2048, 1), (1 << 24, 1 << 13), (1 << 30, 1 << 19)]


def test_defaults_are_a_billion_tokens_and_fewer_rounds_for_the_longest(bench):
    options = bench.main.arguments(["--device", "cpu"])
    lengths = bench.main.lengths(options)
    assert (lengths[0], lengths[-1], len(lengths)) == (8192, 1 << 30, 18)
    assert [bench.measure.repeats_of(seq_len, options) for seq_len in (8192, 1 << 26, 1 << 27)] == [10, 10, 3]


@pytest.mark.parametrize("whole", [False, True])
def test_one_call_is_multiplied_or_all_of_them_are_timed(bench, monkeypatch, tmp_path, whole):
    path = tmp_path / "billion.jsonl"
    monkeypatch.setattr(bench.measure, "interleaved_seconds", lambda functions, *_: [[1.0, 3.0] for _ in functions])
    words = [*STREAMED, "--longest", str(CALL), "--out", str(path)]
    bench.main.main(words + ["--whole"] * whole)
    results = results_of(path)
    for seq_len, sequences in ((2048, 2), (4096, 1)):
        dilated = results["dilated", seq_len]
        assert (dilated["sequences_per_call"], dilated["calls"]) == (sequences, 4)
        assert dilated["seconds"] == (2.0 if whole else 8.0)
        assert dilated["timed_tokens"] == (16384 if whole else CALL)
    assert results["dense", 2048]["seconds"] == 2.0 * 16384 / (2 * 2048)


def test_longer_sequences_are_streamed_and_their_rows_checked(bench, tmp_path):
    path, picture = tmp_path / "billion.jsonl", tmp_path / "billion.png"
    bench.main.main([*STREAMED, "--out", str(path), "--picture", str(picture)])
    results = results_of(path)
    for seq_len, sequences in ((8192, 2), (16384, 1)):
        dilated = results["dilated", seq_len]
        assert dilated["relative_error"] < 1e-5
        assert (dilated["chunks_per_sequence"], dilated["calls"]) == (seq_len // CALL, sequences)
        assert dilated["timed_tokens"] == seq_len
        assert "extrapolated_from_seq_len" in results["dense", seq_len]
    assert picture.exists()


def test_chunk_that_is_mistaken_for_another_is_noticed(bench, monkeypatch, capsys):
    right = bench.measure.Tensors.chunk
    monkeypatch.setattr(bench.measure.Tensors, "chunk", lambda tensors, number: right(tensors, max(0, number - 1)))
    with pytest.raises(SystemExit, match="attention was wrong"):
        bench.main.main(STREAMED)
    assert capsys.readouterr().out.count("WRONG") == 2


def test_wrong_output_ends_in_an_error(bench, monkeypatch, tmp_path):
    right = bench.measure.ours

    def wrong(pattern, causal, backend):
        return right(Pattern(pattern.branches[:1]), causal, backend)

    monkeypatch.setattr(bench.measure, "ours", wrong)
    path = tmp_path / "billion.jsonl"
    with pytest.raises(SystemExit, match="attention was wrong"):
        bench.main.main([*STREAMED, "--longest", str(CALL), "--out", str(path)])
    passed = [record["check"]["passed"] for record in read_records(path)]
    assert passed == [True, True, False, True]  # the shortest has but one branch; dense attention is right


def test_length_that_is_out_of_memory_is_skipped(bench, monkeypatch, capsys):
    right = bench.main.measure

    def measure(seq_len, *arguments, **options):
        if seq_len == 2048:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB\nmore")
        return right(seq_len, *arguments, **options)

    monkeypatch.setattr(bench.main, "measure", measure)
    bench.main.main([*STREAMED, "--longest", str(CALL)])
    printed = capsys.readouterr().out
    assert "2,048  out of memory: CUDA out of memory. Tried to allocate 99 GiB\n" in printed
    assert "        4,096 " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--total-tokens", "1000"], "--total-tokens must be a power of two, got 1000"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--total-tokens", "4096"], "must be cut from --total-tokens 4096"),
        (["--tokens-per-call", "4096"], "a call of --tokens-per-call 4096 must hold a sequence of --shortest"),
        (["--no-causal"], "without causal masks, --longest is at most --tokens-per-call 16777216"),
        (["--picture", "billion.png"], "give both"),
        (["--backend", "cudnn", *TINY, "--longest", "8192"], "error: backend cudnn cannot compute"),
    ],
)
def test_what_makes_no_sense_is_refused(bench, capsys, words, message):
    with pytest.raises(SystemExit) as refusal:
        bench.main.main(["--device", "cpu", *words])
    assert message in capsys.readouterr().err + str(refusal.value)


def test_times_are_said_in_words(bench):
    times = [0.0123, 1.26, 90.0, 600.0, 7 * 3600.0, 691200.0, 1e9]
    words = ["12 ms", "1.3 s", "90 s", "10 min", "7.0 h", "8.0 days", "32 years"]
    assert [bench.picture._duration(seconds) for seconds in times] == words
