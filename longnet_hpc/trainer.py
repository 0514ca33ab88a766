"""Training steps: one loss over the global sequence, gradients summed over ranks, the same update on every rank."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from longnet_hpc.checkpoint import Checkpoint, DataOrder
from longnet_hpc.comm import agreed, all_reduce_sum, allgather_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.config import TrainConfig
from longnet_hpc.config_file import flat_table, to_table
from longnet_hpc.data import Corpus, SequenceReader
from longnet_hpc.errors import ConfigError, NonFiniteError, RanksDifferError
from longnet_hpc.guard import differing_weights, nonfinite_parts
from longnet_hpc.model import LongNet
from longnet_hpc.optimizer import Optimizer, learning_rate
from longnet_hpc.trace import span

__all__ = ["MOST_LEFT_OUT", "Trainer"]

MOST_LEFT_OUT = 10
"""Steps in a row that are left out because they are not finite; one more ends the run."""


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

    Attributes
    ----------
    compiled : bool
        Whether `torch.compile` makes the code of the blocks, in the first step.
    seconds_before : float
        Seconds of earlier calls on the step under way, which they left.
    resumed_at : int or None
        Step of the checkpoint.
    shards : int
        Shards of the optimizer state, one a rank; 1 where every rank has all of it.
    before_update : callable
        Called in each step when its gradient is there and nothing has changed yet; may be collective.
    between_chunks : callable
        Called between the chunks of a stream; may be collective.
    """

    def __init__(
        self, config: TrainConfig, launch: Launch, corpus: Corpus, checkpoint: Checkpoint | None = None
    ) -> None:
        self.config, self.launch = config, launch
        self.compute = Compute(config, launch, config.model, config.seq_len)
        self.compute.check_vocabulary(corpus.vocab_size, f"; use --model.vocab-size {corpus.vocab_size}")
        reading = {key: getattr(config, key) for key in ("seq_len", "batch_size", "seed", "shuffle")}
        self.order = DataOrder.of(corpus, **reading)
        self.shards = launch.size if config.shard_optimizer else 1
        self.before_update: Callable[[], object] = lambda: None
        self.between_chunks: Callable[[], object] = lambda: None
        self.compute.check_memory(8 + -(-8 // self.shards))  # float32 weights and gradient, and two moments
        torch.manual_seed(config.seed)
        self.model = LongNet(config.model).to(self.compute.device)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.model.keep_attention = config.keep_attention
        self.model.half_residual = config.half_residual
        self.compiled = self.compute.compiles
        if self.compiled:
            self.model.compile_blocks()
        self.optimizer = Optimizer(self.model, config.optimizer, launch.comm if self.shards > 1 else None)
        self.resumed_at = None if checkpoint is None else checkpoint.step
        self.steps_done = self.resumed_at or 0
        self.seconds_before = 0.0
        self._left_out = 0
        if checkpoint is not None:
            checkpoint.check_fits(config.model, self.order)
            self.optimizer.load_state(checkpoint.tensors, checkpoint.step)
        self.corpus = corpus
        self.reader = SequenceReader(
            corpus,
            slice_of=self.compute.slice_of,
            start_batch=checkpoint.batch_index if checkpoint else 0,
            prefetch=not config.stream,  # which reads chunks, not sequences
            **reading,
        )

    def check_steps(self) -> None:
        """Raise ConfigError unless there is a step to do."""
        done, stop_at = self.steps_done, self.config.stop_at
        if done >= self.config.steps:
            raise ConfigError(f"training has done {done} of {self.config.steps} steps; raise --steps")
        if stop_at is not None and done >= stop_at:
            raise ConfigError(f"training has done {done} steps, stop_at must be above that, got {stop_at}")

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
        NonFiniteError
            If loss or gradient are not finite, and were not to be left out; nothing is then updated.
        """
        begin = time.perf_counter()
        loss, received = self.accumulate()
        seconds = self.seconds_before + time.perf_counter() - begin
        self.before_update()
        return self.update(loss, received, seconds)

    def accumulate(self) -> tuple[torch.Tensor, int]:
        """Add up the gradient of one step in the parameters, of the mean loss as far as it is this rank's. Collective.

        Returns
        -------
        loss, received : torch.Tensor, int
            Summed loss of this rank in nats, and the bytes that it received.
        """
        config, comm = self.config, self.launch.comm
        plan = self.compute.plan()
        received_before = plan.bytes_received
        loss = torch.zeros((), dtype=torch.float64, device=self.compute.device)
        for _ in range(config.accumulation):
            dropout_seed = config.seed + self.reader.batch_index
            with agreed(comm), span("input", "tokens"):
                inputs, targets = (part.to(self.compute.device) for part in next(self.reader))
            with self.compute.autocast(), span("compute", "forward"):
                summed = self.model.loss(inputs, targets, plan, dropout_seed=dropout_seed)
            with span("compute", "backward"):
                (summed / self.tokens).backward()
            loss += summed.detach()
        return loss, plan.bytes_received - received_before

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.config.seq_len * self.config.batch_size * self.config.accumulation

    def update(self, loss: torch.Tensor, received: int, seconds: float) -> dict[str, Any]:
        """Update the weights by the gradient of all ranks, and return the line of the step. Collective.

        Parameters
        ----------
        loss, received
            As from `accumulate`.
        seconds : float
            What that took.

        Raises
        ------
        NonFiniteError
            If loss or gradient are not finite, and were not to be left out; nothing is then updated.
        """
        config, comm, tokens = self.config, self.launch.comm, self.tokens
        begin = time.perf_counter()
        global_loss = float(all_reduce_sum(comm, loss)) / tokens
        own = self.optimizer.flat_gradient()
        gradient = self.optimizer.sum(comm, own)
        rate = learning_rate(self.steps_done, config.steps, config.optimizer)
        with span("compute", "update"):
            norm = self.optimizer.step(gradient, rate) if math.isfinite(global_loss) else math.nan
        where = None if math.isfinite(norm) else nonfinite_parts(comm, float(loss), self.optimizer.named(own))
        self.steps_done += 1
        if where is not None:
            return self._not_finite(f"loss {global_loss:.4g}, gradient norm {norm:.4g}; {where}")
        self._left_out = 0
        seconds += time.perf_counter() - begin
        answers = allgather_objects(comm, (received, self.compute.peak_memory_bytes(), seconds))
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

    def _not_finite(self, what: str) -> dict[str, Any]:
        """Leave a step out and return its line, which has no loss; or raise NonFiniteError."""
        self._left_out += 1
        rate = f"lower optimizer.learning_rate ({self.config.optimizer.learning_rate})"
        if self.config.on_nonfinite == "stop" or self._left_out > MOST_LEFT_OUT:
            often = f"{self._left_out} steps in a row, " if self._left_out > 1 else ""
            raise NonFiniteError(f"training diverged in {often}step {self.steps_done}: {what}; {rate}")
        self.optimizer.skip()
        if self.launch.rank == 0:
            logging.getLogger("longnet_hpc").warning("warning: step %s is left out: %s", self.steps_done, what)
        return {"step": self.steps_done, "left_out": what}

    def facts(self) -> dict[str, object]:
        """Return what must be the same on all ranks, by name; the corpus may lie elsewhere on each."""
        config = {key: value for key, value in flat_table(self.config).items() if key != "corpus"}
        return {**config, **self.order.facts(), "steps done": self.steps_done, "last step": self.last_step}

    def checkpoint(self) -> Checkpoint:
        """Return a copy, in host memory, of what this rank has to write of the state to go on from.

        That is all on rank 0, since it is the same on all ranks; of moments in shards, what is this rank's.
        """
        tensors = self.optimizer.weights() if self.launch.rank == 0 else {}
        if self.shards > 1 or self.launch.rank == 0:
            tensors |= self.optimizer.moments()
        return Checkpoint(
            self.steps_done,
            self.reader.batch_index,
            self.order,
            to_table(self.config.model),
            {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()},
        )

    def check_same(self) -> None:
        """Raise RanksDifferError unless all ranks hold the same weights, bit for bit. Collective."""
        where = differing_weights(self.launch.comm, self.model.named_parameters())
        if where is not None:
            raise RanksDifferError(
                f"ranks hold different weights after step {self.steps_done}: {where}; memory or a device is faulty"
            )

    def close(self) -> None:
        """End the reader's background thread."""
        self.reader.close()
