"""A run of training: its folder, metrics, checkpoints, record and picture."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from longnet_hpc.checkpoint import (
    Checkpoint,
    clean_up,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
)
from longnet_hpc.checkpoint_writer import CheckpointWriter
from longnet_hpc.comm import agreed, broadcast_object
from longnet_hpc.comm.launch import Launch
from longnet_hpc.config import TrainConfig
from longnet_hpc.config_file import CONFIG_NAME, to_table, write_toml
from longnet_hpc.data import Corpus
from longnet_hpc.errors import ConfigError, NonFiniteError, RanksDifferError, StoppedError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.optimizer import load_weights
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import append_record, make_record, read_metrics, where
from longnet_hpc.stopping import StopRequest
from longnet_hpc.train_stream import StreamTrainer
from longnet_hpc.trainer import Trainer

__all__ = ["METRICS_NAME", "PICTURE_NAME", "RECORD_NAME", "RUNS", "TrainResult", "train"]

RUNS = Path("runs")
"""Folder of runs without a folder of their own choice."""

METRICS_NAME, RECORD_NAME, PICTURE_NAME = "metrics.jsonl", "record.jsonl", "loss.png"
"""Files in the folder of a run: a line a step, a line a call, the loss curve."""

_STEADY_AFTER = 3
"""First steps of a call that do not count as its speed: they allocate, compile and fill caches."""


@dataclass(frozen=True)
class TrainResult:
    """What came out of a training."""

    folder: Path
    """Folder of the run."""
    steps: int
    """Steps done, those before a resumption included."""
    loss: float
    """Mean loss of the last tenth of this call's steps, in nats a token."""
    tokens_per_second: float
    """Median over the steps of this call, all ranks together."""
    seconds: float
    """Time of this call, in seconds."""
    bytes_received_per_layer: int
    """Most bytes that any rank received for one layer, forward and backward of one batch."""
    parameter_count: int
    """Parameters of the model."""


def train(config: TrainConfig, launch: Launch, corpus_path: Path) -> TrainResult:
    """Train, leaving everything in the folder of the run: config, metrics, checkpoints, record, picture. Collective.

    Nothing is written before all ranks have agreed that config, corpus, checkpoint and ranks fit together, and have
    read the first step's tokens. The saved config names files by their absolute paths.

    Parameters
    ----------
    config : TrainConfig
        What to train, and how; with ``resume``, goes on in that folder.
    launch : Launch
        This rank.
    corpus_path : Path
        Corpus file.

    Returns
    -------
    TrainResult
        The same on all ranks.

    Raises
    ------
    StoppedError
        If SIGTERM or SIGUSR1 came, or the time of a stream was over: what was done is kept for ``resume``.
    LongNetError or OSError
        The same on all ranks; `Trainer` and `Trainer.step` say when.
    """
    comm = launch.comm
    start_from = None if config.start_from is None else config.start_from.resolve()
    config = replace(config, corpus=corpus_path.resolve(), start_from=start_from)
    stamp = broadcast_object(comm, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder = config.resume or config.folder or RUNS / stamp
    with _trainer(config, launch, corpus_path, folder) as trainer:
        lines: list[dict[str, Any]] = []
        with agreed(comm), naming_errors(f"cannot write run folder {folder}"):
            if launch.rank == 0:
                lines = _open_folder(folder, config, trainer.steps_done)
        _announce(trainer, corpus_path, folder)
        begin = time.perf_counter()
        with StopRequest(config.stop_after) as stop:
            if isinstance(trainer, StreamTrainer):
                trainer.open(folder, stop)
            new_lines = _steps(trainer, folder, stop)
        seconds = time.perf_counter() - begin
        result = _result(trainer, folder, new_lines, seconds)
    with agreed(comm), naming_errors(f"cannot write run folder {folder}"):
        if launch.rank == 0:
            _finish(config, launch, result, lines, new_lines)
    if result.steps < trainer.last_step:
        raise StoppedError(
            f"left after step {result.steps:,} of {trainer.last_step:,}; train --resume {folder} goes on"
        )
    return result


@contextmanager
def _trainer(config: TrainConfig, launch: Launch, corpus_path: Path, folder: Path) -> Iterator[Trainer]:
    """Open the corpus and make the trainer on every rank, or on none."""
    corpus: Corpus | None = None
    trainer: Trainer | None = None
    facts: dict[str, object] = {}
    try:
        with agreed(launch.comm, facts=facts):
            if config.resume is None and folder.exists():
                raise ConfigError(f"folder {folder} exists; go on with --resume {folder}, or choose another --folder")
            checkpoint = _checkpoint_to_resume(folder, launch) if config.resume else None
            corpus = Corpus(corpus_path, config.read_retry_seconds)
            kind = StreamTrainer if config.stream else Trainer
            trainer = kind(config, launch, corpus, checkpoint)
            if config.start_from is not None and checkpoint is None:
                load_weights(
                    trainer.model, load_checkpoint(find_checkpoint(config.start_from), weights_only=True).tensors
                )
            del checkpoint  # in host memory, 12 bytes a parameter: this frame lasts as long as the training
            trainer.check_steps()
            trainer.check_data()
            facts.update(trainer.facts())
        assert trainer is not None
        yield trainer
    finally:
        if trainer is not None:
            trainer.close()
        if corpus is not None:
            corpus.close()


def _checkpoint_to_resume(folder: Path, launch: Launch) -> Checkpoint | None:
    """Return the latest checkpoint of a run that is whole; None if it ended before its first, but did begin."""
    if latest_checkpoint(folder) is None and (folder / CONFIG_NAME).is_file():
        return None
    log = logging.getLogger("longnet_hpc")
    return load_latest(folder, log.warning if launch.rank == 0 else log.debug)


def _announce(trainer: Trainer, corpus_path: Path, folder: Path) -> None:
    config, compute, ranks = trainer.config, trainer.compute, trainer.launch.size
    log = logging.getLogger("longnet_hpc")
    if config.resume is not None and latest_checkpoint(folder) is None:
        log.info("%s has no checkpoint yet: the training starts at step 0", folder)
    if config.optimizer.warmup_steps >= config.steps:
        log.info("the warm-up of %s steps outlasts all %s steps", f"{config.optimizer.warmup_steps:,}", config.steps)
    compute.warn_of_reach()
    if trainer.compiled:
        log.info("the blocks are compiled in the first step, which takes longer than the others")
    log.info(
        "training %s, %s parameters, on %s rank%s (%s, %s): steps %s to %s of %s tokens from %s, into %s",
        config.preset,
        f"{trainer.model.parameter_count:,}",
        ranks,
        "s" if ranks > 1 else "",
        compute.device.type,
        str(compute.dtype).removeprefix("torch."),
        trainer.steps_done + 1,
        trainer.last_step,
        f"{config.seq_len * config.batch_size * config.accumulation:,}",
        corpus_path,
        folder,
    )


def _open_folder(folder: Path, config: TrainConfig, steps_done: int) -> list[dict[str, Any]]:
    """Make the folder of the run, or take it up; return the metrics up to the checkpoint."""
    folder.mkdir(parents=True, exist_ok=config.resume is not None)
    clean_up(folder)
    metrics = folder / METRICS_NAME
    lines = read_metrics(metrics, steps_done)
    # Steps after the checkpoint will be done again.
    replace_file(metrics, lambda partial: partial.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    heading = "Resolved config of this run; python -m longnet_hpc.run train --config reads it."
    replace_file(folder / CONFIG_NAME, lambda partial: write_toml(partial, config, heading))
    return lines


def _steps(trainer: Trainer, folder: Path, stop: StopRequest) -> list[dict[str, Any]]:
    """Do the steps of this call, or those up to a request to stop, writing metrics and checkpoints."""
    config, comm, rank = trainer.config, trainer.launch.comm, trainer.launch.rank
    last = trainer.last_step
    lines: list[dict[str, Any]] = []
    asked = False
    with (
        steps_bar(rank, "train", last, trainer.steps_done) as update,
        CheckpointWriter(folder, trainer.launch, config.keep, trainer.resumed_at) as writer,
    ):
        trainer.before_update, trainer.between_chunks = writer.settle, writer.settle_if_written
        while trainer.steps_done < last and not asked:
            try:
                line = trainer.step()
                asked = stop.asked(comm)
                due = asked or _is_due(trainer, config.save_every)
                if due or _is_due(trainer, config.compare_every):
                    trainer.check_same()
            except (NonFiniteError, RanksDifferError) as error:
                raise type(error)(f"{error}; {_where_to_go_on(folder)}") from error
            except StoppedError:
                # A step that was left is gone on with from the weights at its start, whatever these came from.
                writer.begin(trainer)
                writer.settle()
                raise
            with agreed(comm), naming_errors(f"cannot write run folder {folder}"):
                if rank == 0:
                    append_record(folder / METRICS_NAME, line)
            if due:
                writer.begin(trainer)
            if "loss" not in line:
                update("left out")
                continue
            lines.append(line)
            update(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s")
    if not lines:
        raise NonFiniteError(f"none of the steps up to {trainer.steps_done} was finite; {_where_to_go_on(folder)}")
    return lines


def _is_due(trainer: Trainer, every: int) -> bool:
    return trainer.steps_done % every == 0 or trainer.steps_done == trainer.last_step


def _where_to_go_on(folder: Path) -> str:
    latest = latest_checkpoint(folder)
    if latest is None:
        return "there is no checkpoint before it"
    return f"the last checkpoint before it is {latest}, from which train --resume {folder} goes on"


def _result(trainer: Trainer, folder: Path, lines: list[dict[str, Any]], seconds: float) -> TrainResult:
    steady = lines[_warmup(lines) :]
    return TrainResult(
        folder=folder,
        steps=trainer.steps_done,
        loss=statistics.fmean(line["loss"] for line in lines[-max(1, len(lines) // 10) :]),
        tokens_per_second=statistics.median(line["tokens_per_second"] for line in steady),
        seconds=seconds,
        bytes_received_per_layer=max(line["bytes_received_per_layer"] for line in lines),
        parameter_count=trainer.model.parameter_count,
    )


def _warmup(lines: list[dict[str, Any]]) -> int:
    """Return how many of a call's steps do not count as its speed: none if there are no others."""
    return _STEADY_AFTER if len(lines) > _STEADY_AFTER else 0


def _finish(
    config: TrainConfig,
    launch: Launch,
    result: TrainResult,
    lines_before: list[dict[str, Any]],
    lines: list[dict[str, Any]],
) -> None:
    """Write the record of this call, and the picture of the whole run."""
    from longnet_hpc.picture import draw_loss_curve

    record = make_record(
        "train",
        config=to_table(config),
        place=where(launch),
        results={
            "steps": result.steps,
            "steps_of_this_call": len(lines),
            "loss_nats_per_token": result.loss,
            "tokens_per_second": result.tokens_per_second,
            "seconds": result.seconds,
            "bytes_received_per_layer": result.bytes_received_per_layer,
            "peak_memory_bytes": lines[-1]["peak_memory_bytes"],
            "parameter_count": result.parameter_count,
        },
        warmup=_warmup(lines),
        repeats=len(lines) - _warmup(lines),
        statistic="median",
        check=("all ranks hold the same weights, bit for bit", True),
    )
    append_record(result.folder / RECORD_NAME, record)
    title = (
        f"LongNet {config.preset}, {result.parameter_count / 1e6:,.1f} M parameters, "
        f"{config.seq_len:,} tokens a sequence over {launch.size} rank{'s' if launch.size > 1 else ''}"
    )
    draw_loss_curve([line for line in lines_before if "loss" in line] + lines, title, result.folder / PICTURE_NAME)
