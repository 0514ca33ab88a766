"""Training on one process: its arithmetic against other ways to get it, and its records."""

import copy
import json
import logging
import math
import os
import re
import signal
from functools import partialmethod
from importlib import metadata

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.checkpoint import find_checkpoint, load_checkpoint
from longnet_hpc.comm.launch import start
from longnet_hpc.config import OptimizerConfig, TrainConfig
from longnet_hpc.data import Corpus, prepare
from longnet_hpc.errors import CheckpointError, ConfigError, CorpusError, NonFiniteError, StoppedError
from longnet_hpc.evaluate import _bins, _results
from longnet_hpc.record import append_record, check_record, make_record, read_records, where
from longnet_hpc.train import train
from longnet_hpc.trainer import Trainer

MODEL = LongNetConfig(layers=2, embed_dim=16, heads=2, segment_lengths=(16, 64), dilation_rates=(1, 2))


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(2000)))
    return prepare([folder / "text.txt"], folder / "corpus.h5")


def config(**changes):
    return TrainConfig(**{"model": MODEL, "seq_len": 64, "steps": 6, "device": "cpu"} | changes)


def losses(corpus_path, count, **changes):
    with Corpus(corpus_path) as corpus:
        trainer = Trainer(config(**changes), start(device="cpu"), corpus)
        lines = [trainer.step() for _ in range(count)]
        trainer.close()
    return [line["loss"] for line in lines], trainer


def test_step_reports_the_mean_loss_of_the_untouched_model(corpus_path):
    with Corpus(corpus_path) as corpus:
        trainer = Trainer(config(batch_size=3, shuffle=False), start(device="cpu"), corpus)
        model = copy.deepcopy(trainer.model)
        line = trainer.step()
        trainer.close()
        tokens = torch.from_numpy(corpus.read(0, 3 * 64 + 1).astype("int64"))
    logits = model(tokens[:-1].view(3, 64))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:])
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert line["bits_per_token"] == pytest.approx(expected.item() / math.log(2), rel=1e-6)
    assert line["bytes_received"] == 0


def test_accumulated_batches_are_one_large_batch(corpus_path):
    one, _ = losses(corpus_path, 4, batch_size=4)
    four, _ = losses(corpus_path, 4, accumulation=4)
    assert four == pytest.approx(one, rel=1e-5)


def test_activation_checkpointing_changes_memory_not_losses(corpus_path):
    dropped = LongNetConfig(**vars(MODEL) | {"dropout": 0.1})
    plain, _ = losses(corpus_path, 3, model=dropped)
    for keep_attention in (True, False):
        recomputed, trainer = losses(
            corpus_path, 3, model=dropped, activation_checkpointing=True, keep_attention=keep_attention
        )
        assert recomputed == pytest.approx(plain, rel=1e-6)
        assert (trainer.model.activation_checkpointing, trainer.model.keep_attention) == (True, keep_attention)


def test_compiled_training_has_the_same_losses(corpus_path, monkeypatch):
    plain, trainer = losses(corpus_path, 3)
    assert not trainer.compiled  # on a CPU that is not the default
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(LongNet, "compile_blocks", partialmethod(LongNet.compile_blocks, counter))
    compiled, trainer = losses(corpus_path, 3, compile="on", activation_checkpointing=True)
    assert trainer.compiled
    assert counter.frame_count == 2  # one for all blocks, one for the last norm, in all steps
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_half_residual_keeps_about_the_same_loss(corpus_path):
    wide, _ = losses(corpus_path, 3, dtype="bfloat16")
    half, _ = losses(corpus_path, 3, dtype="bfloat16", half_residual=True)
    assert half == pytest.approx(wide, rel=0.02)
    assert half != wide


def test_training_lowers_the_loss_and_the_seed_decides_all(corpus_path):
    first, trainer = losses(corpus_path, 60, steps=60, optimizer=OptimizerConfig(learning_rate=0.01))
    assert first[0] > 4.5
    assert sum(first[-5:]) / 5 < 2.5
    trainer.check_same()
    assert losses(corpus_path, 3)[0] == losses(corpus_path, 3)[0]
    assert losses(corpus_path, 3)[0] != losses(corpus_path, 3, seed=1)[0]


def test_bfloat16_products_keep_float32_weights_and_about_the_same_loss(corpus_path):
    wide, _ = losses(corpus_path, 3)
    half, trainer = losses(corpus_path, 3, dtype="bfloat16")
    assert half == pytest.approx(wide, rel=0.02)
    assert half != wide
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_divergence_is_told_with_the_knob_and_updates_nothing(corpus_path):
    with Corpus(corpus_path) as corpus:
        trainer = Trainer(config(), start(device="cpu"), corpus)
        with torch.no_grad():
            trainer.model.norm.weight.fill_(torch.nan)
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(NonFiniteError, match=r"in step 1: .*; rank 0: loss, gradient .* lower .*rate \(0\.003\)"):
            trainer.step()
        trainer.close()
    assert all(torch.equal(before[k].nan_to_num(), v.nan_to_num()) for k, v in trainer.model.state_dict().items())


def test_corpus_with_more_token_values_than_the_model_is_refused(corpus_path):
    small = LongNetConfig(**vars(MODEL) | {"vocab_size": 200})
    with (
        Corpus(corpus_path) as corpus,
        pytest.raises(CorpusError, match="256 token values.*vocab_size 200.; use --model.vocab-size 256$"),
    ):
        Trainer(config(model=small), start(device="cpu"), corpus)


def test_xpos_beyond_its_limit_is_refused_before_the_folder_exists(corpus_path, tmp_path):
    model = LongNetConfig(**vars(MODEL) | {"positions": "xpos"})
    with pytest.raises(ConfigError, match="xPos in float32 overflows beyond"):
        train(config(model=model, seq_len=10_000_000, folder=tmp_path / "run"), start(device="cpu"), corpus_path)
    assert not (tmp_path / "run").exists()


def test_run_that_stopped_between_checkpoints_does_those_steps_again(corpus_path, tmp_path):
    launch = start(device="cpu")
    whole = train(config(steps=8, folder=tmp_path / "whole"), launch, corpus_path)
    train(config(steps=8, stop_at=5, save_every=3, folder=tmp_path / "run"), launch, corpus_path)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name[:13] for path in checkpoints] == ["step-00000003", "step-00000005"]
    checkpoints[-1].unlink()
    again = train(config(steps=8, save_every=3, resume=tmp_path / "run"), launch, corpus_path)
    assert (whole.steps, again.steps) == (8, 8)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000006.safetensors", "step-00000008.safetensors"]
    expected, found = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert [line["step"] for line in found] == list(range(1, 9))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    record = read_records(tmp_path / "run" / "record.jsonl")[-1]
    check_record(record)
    # Five steps of this call from step 3 on, of which three do not count as its speed.
    assert (record["results"]["steps"], record["results"]["steps_of_this_call"]) == (8, 5)
    assert record["how"] == {"warmup": 3, "repeats": 2, "statistic": "median"}
    speeds = [line["tokens_per_second"] for line in found[-2:]]
    assert record["results"]["tokens_per_second"] == pytest.approx(sum(speeds) / 2)
    assert record["check"] == {"name": "all ranks hold the same weights, bit for bit", "passed": True}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_that_is_signalled_stops_after_that_step_and_goes_on(corpus_path, tmp_path, monkeypatch, number):
    launch, run, step = start(device="cpu"), tmp_path / "run", Trainer.step

    def signalled(trainer):
        if trainer.steps_done == 2:
            signal.raise_signal(number)
        return step(trainer)

    whole = train(config(folder=tmp_path / "whole"), launch, corpus_path)
    monkeypatch.setattr(Trainer, "step", signalled)
    with pytest.raises(StoppedError, match=f"left after step 3 of 6; train --resume {run} goes on"):
        train(config(folder=run), launch, corpus_path)
    assert load_checkpoint(find_checkpoint(run)).step == 3
    assert read_records(run / "record.jsonl")[-1]["results"]["steps_of_this_call"] == 3
    again = train(config(resume=run), launch, corpus_path)
    assert (again.steps, again.loss) == (6, whole.loss)
    expected, found = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]


def test_signal_in_the_last_step_does_not_stop_a_run_that_is_done(corpus_path, tmp_path, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda trainer: (signal.raise_signal(signal.SIGUSR1), step(trainer))[1])
    assert train(config(steps=1, folder=tmp_path / "run"), start(device="cpu"), corpus_path).steps == 1


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "\0\0\0", "\xff"])
def test_run_that_was_killed_within_a_line_of_metrics_goes_on(corpus_path, tmp_path, rest):
    launch, run = start(device="cpu"), tmp_path / "run"
    train(config(stop_at=2, folder=run), launch, corpus_path)
    with (run / "metrics.jsonl").open("a", encoding="latin-1") as stream:
        stream.write(rest)
    train(config(stop_at=3, resume=run), launch, corpus_path)
    assert [line["step"] for line in read_records(run / "metrics.jsonl")] == [1, 2, 3]


def test_run_that_ended_before_its_first_checkpoint_starts_again(corpus_path, tmp_path, caplog):
    launch, run = start(device="cpu"), tmp_path / "run"
    train(config(stop_at=2, folder=run), launch, corpus_path)
    first = read_records(run / "metrics.jsonl")
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    with caplog.at_level(logging.INFO, "longnet_hpc"):
        train(config(stop_at=1, resume=run), launch, corpus_path)
    assert f"{run} has no checkpoint yet: the training starts at step 0" in caplog.messages
    again = read_records(run / "metrics.jsonl")
    assert [line["loss"] for line in again] == [first[0]["loss"]]
    (run / "config.toml").unlink()
    (run / "checkpoints" / "step-00000001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor the folder of a run"):
        train(config(resume=run), launch, corpus_path)


@pytest.mark.parametrize(("seq_len", "warned"), [(64, False), (65, True)])
def test_sequence_beyond_the_longest_segment_is_warned_of_once(corpus_path, tmp_path, caplog, seq_len, warned):
    train(config(seq_len=seq_len, steps=1, folder=tmp_path / "run"), start(device="cpu"), corpus_path)
    told = [m for m in caplog.messages if m.startswith(f"warning: sequences of {seq_len} tokens") and ", 64:" in m]
    assert len(told) == warned


def test_checkpoint_holds_the_lists_of_a_geometric_pattern(corpus_path, tmp_path):
    train(config(geometric=(8, 2), steps=1, folder=tmp_path / "run"), start(device="cpu"), corpus_path)
    model = load_checkpoint(find_checkpoint(tmp_path / "run")).model_config
    assert model.segment_lengths == (8, 16, 32, 64)
    assert model.dilation_rates == (1, 2, 4, 8)


def test_evaluation_sums_become_loss_perplexity_and_bits():
    log2 = math.log(2)  # contexts 1, 2, and 3 twice, with losses of 3, 1, 0 and 2 bits
    totals = torch.tensor([[1, 1, 2, 0], [3 * log2, log2, 2 * log2, 0], [9 * log2**2, log2**2, 4 * log2**2, 0]])
    results = _results(totals.double(), 0.25)
    bins = _bins(totals.double(), 3)
    assert results["loss"] == pytest.approx(6 * log2 / 4)
    assert results["perplexity"] == pytest.approx(2**1.5)
    assert results["bits_per_byte"] == pytest.approx(1.5 / 4)
    assert bins[2]["standard_error"] == pytest.approx(log2 / math.sqrt(2))
    assert [(b["first_context"], b["last_context"], b["tokens"]) for b in bins] == [
        (1, 1, 1),
        (2, 2, 1),
        (3, 3, 2),
    ]


def a_record(**changes):
    return make_record(
        "a run", config={"a": 1}, results={"seconds": 1.0}, place=where(), check=("it adds up", True), **changes
    )


def test_record_survives_its_file_and_says_what_where_and_how(tmp_path):
    record = a_record(warmup=1, repeats=5, statistic="median")
    append_record(tmp_path / "r.jsonl", record)
    append_record(tmp_path / "r.jsonl", record)
    assert read_records(tmp_path / "r.jsonl") == [record, record]
    assert record["where"]["ranks"] == 1
    assert record["where"]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert record["where"]["versions"]["numpy"] == metadata.version("numpy")
    assert record["how"] == {"warmup": 1, "repeats": 5, "statistic": "median"}


def test_record_with_a_number_that_json_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_record(tmp_path / "r.jsonl", {"loss": math.nan})
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("part", "key"), [("what", "config"), ("where", "ranks"), ("how", "repeats"), ("check", "passed")]
)
def test_record_without_a_key_of_the_schema_is_refused(part, key):
    record = json.loads(json.dumps(a_record()))
    del record[part][key]
    with pytest.raises(ConfigError, match=f"{part}.{key} is missing"):
        check_record(record)


def test_record_that_is_neither_measured_nor_modelled_or_empty_is_refused():
    with pytest.raises(ConfigError, match="measured or modelled, got 'guessed'"):
        check_record(a_record() | {"kind": "guessed"})
    with pytest.raises(ConfigError, match="no results"):
        check_record(a_record() | {"results": {}})


def test_damaged_checkpoint_is_passed_over_for_the_one_before(corpus_path, tmp_path, caplog):
    launch, folder = start(device="cpu"), tmp_path / "run"
    train(config(folder=folder, steps=4, save_every=2), launch, corpus_path)
    right, digest = find_checkpoint(folder).read_bytes(), load_checkpoint(find_checkpoint(folder)).digest
    for damage in (right[: len(right) // 2], right[:-9] + bytes([right[-9] ^ 4]) + right[-8:], b""):
        find_checkpoint(folder).write_bytes(damage)
        caplog.clear()
        train(config(resume=folder, steps=4, save_every=2), launch, corpus_path)
        assert re.search(r"step-00000004.*; the training goes on from step 2", caplog.text)
        assert load_checkpoint(find_checkpoint(folder)).digest == digest


def test_run_without_a_whole_checkpoint_says_what_is_wrong_with_the_latest(corpus_path, tmp_path):
    launch, folder = start(device="cpu"), tmp_path / "run"
    train(config(folder=folder, steps=4, save_every=2), launch, corpus_path)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read checkpoint .*step-00000004"):
        train(config(resume=folder, steps=4, save_every=2), launch, corpus_path)


def test_deterministic_training_asks_torch_for_deterministic_algorithms(corpus_path):
    variable = "CUBLAS_WORKSPACE_CONFIG"
    before = os.environ.pop(variable, None)
    try:
        losses(corpus_path, 1)
        assert not torch.are_deterministic_algorithms_enabled()
        assert variable not in os.environ
        losses(corpus_path, 1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[variable] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before
