"""The commands as a user runs them, and training that does not depend on the number of ranks."""

import io
import json
import math
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
from launching import MODEL, run_command

import longnet_hpc
from longnet_hpc import corpora, progress
from longnet_hpc.comm import launch
from longnet_hpc.comm.launch import start
from longnet_hpc.data import Corpus, default_sources, prepare
from longnet_hpc.errors import CorpusError, ShapeError
from longnet_hpc.record import append_record, check_record, make_record, read_records, where
from longnet_hpc.run import main

SMALL = (*MODEL, "--seq-len", "512", "--device", "cpu", "--optimizer.learning-rate", "0.01")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(f"def f{n}(x):\n    return x * {n}\n" for n in range(2000)))
    return prepare([folder / "text.txt"], folder / "corpus.h5")


def documents(path):
    with Corpus(path) as corpus:
        return [corpus.document_name(index) for index in range(corpus.num_documents)]


def loss_curve(folder):
    return [(line["step"], line["loss"]) for line in read_records(folder / "metrics.jsonl")]


def test_main_job_prepares_trains_evaluates_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--steps", "4", "--folder", "runs/first"]) == 0
    shown = capsys.readouterr()
    for expected in ("4 steps", "bits a byte", "runs/first/: loss.png", "runs/first/eval-", "result.json"):
        assert expected in shown.out
    for name in ("config.toml", "metrics.jsonl", "record.jsonl", "loss.png", "checkpoints/step-00000004.safetensors"):
        assert (tmp_path / "runs/first" / name).stat().st_size > 0
    (held_out,) = (tmp_path / "runs/first").glob("eval-python-*-valid-step-4")
    results = json.loads((held_out / "result.json").read_text())
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert results["bits_per_byte"] == pytest.approx(results["loss"] / math.log(2))
    bins = results["loss_by_context"]
    assert [b["first_context"] for b in bins] == [1, *(2**n + 1 for n in range(9))]
    assert (bins[-1]["last_context"], sum(b["tokens"] for b in bins)) == (512, results["tokens"])
    assert sum(b["tokens"] * b["loss"] for b in bins) / results["tokens"] == pytest.approx(results["loss"])
    for path in (tmp_path / "runs/first/record.jsonl", held_out / "record.jsonl"):
        check_record(read_records(path)[-1])
    assert 4.0 < results["loss"] < 6.0  # four steps from log(256) = 5.5
    assert results["tokens"] == 40 * 512
    assert results["corpus_seen_in_training"] is False
    assert "training corpus" not in shown.out
    assert re.search("eval.*(batch/s|s/batch)", shown.err)
    assert not any(line.startswith("{") for line in shown.out.splitlines())

    (train_file,), (valid_file,) = (
        (tmp_path / "runs/corpus").glob(f"python-*-{part}.h5") for part in ("train", "valid")
    )
    trained_on, evaluated_on = documents(train_file), documents(valid_file)
    assert not set(trained_on) & set(evaluated_on)
    assert sorted(trained_on + evaluated_on) == sorted(map(str, default_sources()))
    for saved, corpus in ((tmp_path / "runs/first", train_file), (held_out, valid_file)):
        assert tomllib.loads((saved / "config.toml").read_text())["corpus"] == str(corpus)

    stored = sorted((tmp_path / "runs/corpus").iterdir())
    assert main([*SMALL, "--steps", "1", "--folder", "runs/second"]) == 0
    assert sorted((tmp_path / "runs/corpus").iterdir()) == stored
    assert main(["--resume", "runs/second", "--steps", "2"]) == 0
    assert list((tmp_path / "runs/second").glob("eval-python-*-valid-step-2"))


def test_main_job_on_a_corpus_of_ones_own_says_that_it_was_trained_on(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--steps", "1", "--corpus", str(corpus), "--folder", "run"]) == 0
    assert f"tokens of {corpus}, on the training corpus" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/eval-corpus-step-1/result.json").read_text())
    assert results["corpus_seen_in_training"] is True


@pytest.mark.parametrize(("terminal", "refreshed"), [(True, 7), (False, 2)])
def test_bar_is_refreshed_often_only_on_a_terminal(monkeypatch, terminal, refreshed):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS_ON_A_TERMINAL", 0.001)
    with progress.steps_bar(0, "train", 5) as update:
        for _ in range(5):
            time.sleep(0.02)
            update("a word")
    assert stream.getvalue().count("%|") == refreshed
    assert "5/5" in stream.getvalue()


def test_bar_of_bytes_begins_with_the_first_and_ends_full(capsys):
    with progress.bytes_bar(0, "prepare", 10) as update:
        assert capsys.readouterr().err == ""
        update(4)
        update(4)
    shown = capsys.readouterr().err
    assert shown.count("  0%|") == 1
    assert "10.0/10.0" in shown


def test_prepare_writes_a_corpus_with_a_record(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text")
    assert main(["prepare", str(tmp_path / "text.txt"), "--output", str(tmp_path / "c.h5")]) == 0
    assert "9 tokens of 1 document" in capsys.readouterr().out
    (record,) = read_records(tmp_path / "c.h5.record.jsonl")
    check_record(record)
    assert record["results"]["bytes"] == 9


def test_metrics_have_a_line_a_step_with_units(corpus, tmp_path):
    folder = tmp_path / "run"
    assert main(["train", *SMALL, "--steps", "2", "--corpus", str(corpus), "--folder", str(folder)]) == 0
    first, second = read_records(folder / "metrics.jsonl")
    assert (first["step"], second["step"]) == (1, 2)
    assert first["tokens_per_second"] == pytest.approx(512 / first["seconds"])
    assert first.keys() >= {"loss", "bits_per_token", "grad_norm", "learning_rate", "bytes_received_per_layer"}
    assert first["peak_memory_bytes"] > 1 << 20
    saved = tomllib.loads((folder / "config.toml").read_text())
    assert saved["model"]["layers"] == 2
    assert saved["steps"] == 2


@pytest.mark.timeout(480)
def test_losses_are_those_of_one_rank_when_stopped_on_four_ranks_and_resumed_on_two(corpus, tmp_path):
    words = ("train", *SMALL, "--steps", "20", "--accumulation", "2", "--corpus", corpus)
    assert main([*map(str, words), "--folder", str(tmp_path / "one")]) == 0
    stopped = run_command(*words, "--stop-at", "10", "--folder", tmp_path / "many", ranks=4)
    assert stopped.returncode == 0, stopped.stderr
    assert len(loss_curve(tmp_path / "many")) == 10
    resumed = run_command("train", "--resume", tmp_path / "many", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    one, many = loss_curve(tmp_path / "one"), loss_curve(tmp_path / "many")
    assert [step for step, _ in many] == list(range(1, 21))
    assert [loss for _, loss in many] == pytest.approx([loss for _, loss in one], rel=1e-4)
    assert one[-1][1] < one[0][1] - 0.5  # it learned something, so the losses had reason to differ
    assert [record["where"]["ranks"] for record in read_records(tmp_path / "many" / "record.jsonl")] == [4, 2]

    alone = ["eval", "--checkpoint", str(tmp_path / "many"), "--corpus", str(corpus), "--max-batches", "8"]
    assert main([*alone, "--output", str(tmp_path / "eval-one")]) == 0
    done = run_command(*alone, "--output", tmp_path / "eval-three", ranks=3)
    assert done.returncode == 0, done.stderr
    expected, found = (json.loads((tmp_path / f"eval-{name}" / "result.json").read_text()) for name in ("one", "three"))
    assert expected["tokens"] == found["tokens"] == 8 * 512
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for ours, theirs in zip(found["loss_by_context"], expected["loss_by_context"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("file", "folder"),
    [("run/checkpoints/any.safetensors", "run"), ("a/b/model.safetensors", "a/b")],
)
def test_results_lie_in_the_run_or_beside_a_checkpoint_without_one(corpus, tmp_path, file, folder):
    assert main(["train", *SMALL, "--steps", "1", "--corpus", str(corpus), "--folder", str(tmp_path / "run")]) == 0
    checkpoint = tmp_path / file
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run/checkpoints/step-00000001.safetensors").rename(checkpoint)
    words = ("--checkpoint", str(checkpoint), "--corpus", str(corpus), "--max-batches", "1", "--device", "cpu")
    assert main(["eval", *words]) == 0
    assert (tmp_path / folder / "eval-corpus-step-1" / "result.json").is_file()


def test_figures_are_shown_even_if_the_results_can_no_longer_be_written(corpus, tmp_path, monkeypatch, capsys):
    assert main(["train", *SMALL, "--steps", "1", "--corpus", str(corpus), "--folder", str(tmp_path / "run")]) == 0

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longnet_hpc.evaluate.replace_file", full)
    words = ("--checkpoint", str(tmp_path / "run"), "--corpus", str(corpus), "--max-batches", "1", "--device", "cpu")
    assert main(["eval", *words]) == 2
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert f"error: cannot write results to {tmp_path / 'run/eval-corpus-step-1'}: No space left" in shown.err


def test_embedded_corpus_that_another_job_makes_meanwhile_is_used(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the other job's text")
    made = []

    def overtaken(config, launch):
        made.append(prepare([tmp_path / "text.txt"], config.output))
        raise CorpusError(f"{config.output} exists and is not overwritten without --overwrite")

    monkeypatch.setattr(corpora, "prepare_corpus", overtaken)
    assert corpora.embedded_corpus(start(device="cpu"), "train", tmp_path) == made[0]

    def fails(config, launch):
        raise CorpusError("cannot write")

    monkeypatch.setattr(corpora, "prepare_corpus", fails)
    with pytest.raises(CorpusError, match="cannot write"):
        corpora.embedded_corpus(start(device="cpu"), "valid", tmp_path)


def test_record_after_a_line_that_was_cut_off_is_a_line_of_its_own(tmp_path, caplog):
    path = tmp_path / "record.jsonl"
    append_record(path, {"a": 1})
    with path.open("a") as stream:
        stream.write('{"a": 2, "b')
    append_record(path, {"a": 3})
    append_record(path, {"a": 4})
    assert read_records(path) == [{"a": 1}, {"a": 3}, {"a": 4}]
    assert "line 2 is no record" in caplog.text


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (Path(longnet_hpc.__file__).with_name("__main__.py"), "python -m longnet_hpc eval 'a b'"),
        (Path(longnet_hpc.__file__).with_name("run.py"), "python -m longnet_hpc.run eval 'a b'"),
        (Path("/elsewhere/step.py"), "/elsewhere/step.py eval 'a b'"),
    ],
)
def test_command_of_a_record_is_what_was_typed_wherever_the_library_lies(monkeypatch, program, said):
    monkeypatch.setattr(sys, "argv", [str(program), "eval", "a b"])
    place = where(start(device="cpu"))
    record = make_record("x", config={}, results={"seconds": 1.0}, place=place, check=("none", True))
    assert record["what"]["command"] == said


def test_ranks_that_disagree_at_the_start_are_told_in_one_line(monkeypatch, capsys):
    def disagree(**options):
        raise ShapeError("rank 1 disagrees with rank 0: device cuda is not cpu")

    monkeypatch.setattr(launch, "start", disagree)
    assert main(["eval", "--checkpoint", "x"]) == 2
    assert capsys.readouterr().err == "error: rank 1 disagrees with rank 0: device cuda is not cpu\n"
