"""Training: one loss over the global sequence, gradients summed over ranks, the same update on every rank."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import xxhash

from longnet_hpc.checkpoint import (
    Checkpoint,
    DataOrder,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_old,
    save_checkpoint,
)
from longnet_hpc.comm import agreed, all_reduce_sum, allgather_objects, broadcast_object
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.config import TrainConfig
from longnet_hpc.config_file import CONFIG_NAME, to_table, write_toml
from longnet_hpc.data import Corpus, SequenceReader
from longnet_hpc.errors import ConfigError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.model import LongNet
from longnet_hpc.optimizer import Optimizer, learning_rate
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import append_record, make_record, read_metrics, where

__all__ = ["METRICS_NAME", "PICTURE_NAME", "RECORD_NAME", "RUNS", "TrainResult", "Trainer", "train"]

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


class Trainer:
    """Model, optimizer, reader and slices of one rank; `step` is collective, making one is not.

    Parameters
    ----------
    config : TrainConfig
        What to train, and how.
    launch : Launch
        This rank.
    corpus : Corpus
        What to train on.
    checkpoint : Checkpoint, optional
        Where to go on.

    Raises
    ------
    LongNetError
        If config, corpus, checkpoint and number of ranks do not fit together.
    """

    def __init__(
        self, config: TrainConfig, launch: Launch, corpus: Corpus, checkpoint: Checkpoint | None = None
    ) -> None:
        self.config, self.launch = config, launch
        self.compute = Compute(config, launch, config.model, config.seq_len)
        self.compute.check_vocabulary(corpus.vocab_size, f"; use --model.vocab-size {corpus.vocab_size}")
        reading = {key: getattr(config, key) for key in ("seq_len", "batch_size", "seed", "shuffle")}
        self.order = DataOrder.of(corpus, **reading)
        torch.manual_seed(config.seed)
        self.model = LongNet(config.model).to(self.compute.device)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.steps_done = 0
        if checkpoint is not None:
            checkpoint.check_fits(config.model, self.order)
            self.optimizer.load_state(checkpoint.tensors, checkpoint.step)
            self.steps_done = checkpoint.step
        self.reader = SequenceReader(
            corpus,
            slice_of=self.compute.slice_of,
            start_batch=checkpoint.batch_index if checkpoint else 0,
            **reading,
        )

    def check_data(self) -> None:
        """Read this rank's slices of the next step once more than needed, to find damage before anything is written.

        Raises
        ------
        CorpusError
            If one cannot be read, on this rank alone.
        """
        for ahead in range(self.config.accumulation):
            self.reader.window(self.reader.batch_index + ahead)

    @property
    def last_step(self) -> int:
        """The step at which this call ends."""
        return min(self.config.steps, self.config.stop_at or self.config.steps)

    def step(self) -> dict[str, Any]:
        """Do one step and return its line of metrics, the same on all ranks. Collective.

        Raises
        ------
        CorpusError
            If a rank cannot read its slice.
        ConfigError
            If loss or gradient are not finite; nothing is then updated.
        """
        config, comm = self.config, self.launch.comm
        begin = time.perf_counter()
        plan = self.compute.plan()
        received_before = plan.bytes_received
        tokens = config.seq_len * config.batch_size * config.accumulation
        loss = torch.zeros((), dtype=torch.float64, device=self.compute.device)
        for _ in range(config.accumulation):
            dropout_seed = config.seed + self.reader.batch_index
            with agreed(comm):
                inputs, targets = (part.to(self.compute.device) for part in next(self.reader))
            with self.compute.autocast():
                summed = self.model.loss(inputs, targets, plan, dropout_seed=dropout_seed)
            (summed / tokens).backward()
            loss += summed.detach()
        global_loss = float(all_reduce_sum(comm, loss)) / tokens
        gradient = all_reduce_sum(comm, self.optimizer.flat_gradient())
        rate = learning_rate(self.steps_done, config.steps, config.optimizer)
        norm = self.optimizer.step(gradient, rate) if math.isfinite(global_loss) else math.nan
        if not math.isfinite(norm):
            raise ConfigError(
                f"training diverged in step {self.steps_done + 1}: loss {global_loss:.4g}, gradient norm {norm:.4g}; "
                f"lower optimizer.learning_rate ({config.optimizer.learning_rate})"
            )
        self.steps_done += 1
        seconds = time.perf_counter() - begin
        answers = allgather_objects(
            comm, (plan.bytes_received - received_before, self.compute.peak_memory_bytes(), seconds)
        )
        received, memory, slowest = (max(values) for values in zip(*answers, strict=True))
        return {
            "step": self.steps_done,
            "loss": global_loss,
            "bits_per_token": global_loss / math.log(2),
            "grad_norm": norm,
            "learning_rate": rate,
            "seconds": slowest,
            "tokens_per_second": tokens / slowest,
            "bytes_received": received,
            "bytes_received_per_layer": received // (config.model.layers * config.accumulation),
            "peak_memory_bytes": memory,
        }

    def checkpoint(self) -> Checkpoint:
        """Return the state to go on from; the same on all ranks."""
        return Checkpoint(
            self.steps_done,
            self.reader.batch_index,
            self.order,
            to_table(self.config.model),
            self.optimizer.state(),
        )

    def same_on_all_ranks(self) -> bool:
        """Return whether all ranks hold the same weights, bit for bit. Collective."""
        digest = xxhash.xxh3_64()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return len(set(allgather_objects(self.launch.comm, digest.hexdigest()))) == 1

    def close(self) -> None:
        """End the reader's background thread."""
        self.reader.close()


def train(config: TrainConfig, launch: Launch, corpus_path: Path) -> TrainResult:
    """Train, leaving everything in the folder of the run: config, metrics, checkpoints, record, picture. Collective.

    Nothing is written before all ranks have agreed that config, corpus, checkpoint and ranks fit together, and have
    read the first step's tokens. The saved config names the corpus by its absolute path.

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
    LongNetError or OSError
        The same on all ranks; `Trainer` and `Trainer.step` say when.
    """
    comm = launch.comm
    config = replace(config, corpus=corpus_path.resolve())
    stamp = broadcast_object(comm, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder = config.resume or config.folder or RUNS / stamp
    with _trainer(config, launch, corpus_path, folder) as trainer:
        lines: list[dict[str, Any]] = []
        with agreed(comm), naming_errors(f"cannot write run folder {folder}"):
            if launch.rank == 0:
                lines = _open_folder(folder, config, trainer.steps_done)
        _announce(trainer, corpus_path, folder)
        begin = time.perf_counter()
        new_lines = _steps(trainer, folder)
        seconds = time.perf_counter() - begin
        result = _result(trainer, folder, new_lines, seconds)
        same = trainer.same_on_all_ranks()
    with agreed(comm), naming_errors(f"cannot write run folder {folder}"):
        if launch.rank == 0:
            _finish(config, launch, result, lines, new_lines, same)
    return result


@contextmanager
def _trainer(config: TrainConfig, launch: Launch, corpus_path: Path, folder: Path) -> Iterator[Trainer]:
    """Open the corpus and make the trainer on every rank, or on none."""
    corpus: Corpus | None = None
    trainer: Trainer | None = None
    try:
        with agreed(launch.comm):
            if config.resume is None and folder.exists():
                raise ConfigError(f"folder {folder} exists; go on with --resume {folder}, or choose another --folder")
            checkpoint = _checkpoint_to_resume(folder) if config.resume else None
            corpus = Corpus(corpus_path)
            trainer = Trainer(config, launch, corpus, checkpoint)
            if trainer.steps_done >= config.steps:
                raise ConfigError(f"training has done {trainer.steps_done} of {config.steps} steps; raise --steps")
            if config.stop_at is not None and trainer.steps_done >= config.stop_at:
                raise ConfigError(
                    f"training has done {trainer.steps_done} steps, stop_at must be above that, got {config.stop_at}"
                )
            trainer.check_data()
        assert trainer is not None
        yield trainer
    finally:
        if trainer is not None:
            trainer.close()
        if corpus is not None:
            corpus.close()


def _checkpoint_to_resume(folder: Path) -> Checkpoint | None:
    """Return the latest checkpoint of a run; None if it ended before its first, but did begin."""
    if latest_checkpoint(folder) is None and (folder / CONFIG_NAME).is_file():
        return None
    return load_checkpoint(find_checkpoint(folder))


def _announce(trainer: Trainer, corpus_path: Path, folder: Path) -> None:
    config, compute, ranks = trainer.config, trainer.compute, trainer.launch.size
    log = logging.getLogger("longnet_hpc")
    if config.resume is not None and trainer.steps_done == 0:
        log.info("%s has no checkpoint yet: the training starts at step 0", folder)
    if config.optimizer.warmup_steps >= config.steps:
        log.info("the warm-up of %s steps outlasts all %s steps", f"{config.optimizer.warmup_steps:,}", config.steps)
    compute.warn_of_reach()
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
    metrics = folder / METRICS_NAME
    lines = read_metrics(metrics, steps_done)
    # Steps after the checkpoint will be done again.
    replace_file(metrics, lambda partial: partial.write_text("".join(json.dumps(line) + "\n" for line in lines)))
    heading = "Resolved config of this run; python -m longnet_hpc.run train --config reads it."
    replace_file(folder / CONFIG_NAME, lambda partial: write_toml(partial, config, heading))
    return lines


def _steps(trainer: Trainer, folder: Path) -> list[dict[str, Any]]:
    """Do the steps of this call, writing metrics and checkpoints on rank 0."""
    config, comm, rank = trainer.config, trainer.launch.comm, trainer.launch.rank
    last = trainer.last_step
    lines = []
    with steps_bar(rank, "train", last, trainer.steps_done) as update:
        while trainer.steps_done < last:
            line = trainer.step()
            lines.append(line)
            due = trainer.steps_done % config.save_every == 0 or trainer.steps_done == last
            with agreed(comm), naming_errors(f"cannot write run folder {folder}"):
                if rank == 0:
                    append_record(folder / METRICS_NAME, line)
                    if due:
                        save_checkpoint(folder, trainer.checkpoint())
                        remove_old(folder, config.keep)
            update(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s")
    return lines


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
    same: bool,
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
        check=("all ranks hold the same weights, bit for bit", same),
    )
    append_record(result.folder / RECORD_NAME, record)
    title = (
        f"LongNet {config.preset}, {result.parameter_count / 1e6:,.1f} M parameters, "
        f"{config.seq_len:,} tokens a sequence over {launch.size} rank{'s' if launch.size > 1 else ''}"
    )
    draw_loss_curve(lines_before + lines, title, result.folder / PICTURE_NAME)
