"""Steps of a model at some lengths of sequence on some numbers of ranks: what strong, weak and step sweeps time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from longnet_hpc.comm import all_reduce_sum, allgather_objects, barrier
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.config import OPTIMIZERS, LongNetConfig
from longnet_hpc.exchange import SpanExchange
from longnet_hpc.model import LongNet
from longnet_hpc.optimizer import Optimizer
from longnet_hpc.partition import Partition
from longnet_hpc.pattern import Pattern
from longnet_hpc.scaling.config import BenchConfig
from longnet_hpc.scaling.rounds import Rounds
from longnet_hpc.scaling.work import attention_work
from longnet_hpc.sequence_plan import SequencePlan
from longnet_hpc.sweep import chunk_bounds, slice_of_chunk
from longnet_hpc.trace import span

__all__ = ["ExchangeCount", "Steps", "StepsPoint", "needed_bytes", "point_model", "tolerance"]

_BLOCK = 1 << 16
"""Tokens drawn at once."""
_ALONE_REPEATS = 9
"""Repetitions of the exchanges of a layer by themselves, of which the median counts."""


def tolerance(dtype: torch.dtype) -> float:
    """Return how far, relatively, losses may be apart that differ in the order of sums alone."""
    return 1e-5 if dtype == torch.float32 else 2e-3


def point_model(config: BenchConfig, tokens: int) -> LongNetConfig:
    """Return the model of a point: a geometric pattern reaches over its sequence."""
    if config.geometric is None:
        return config.model
    pattern = Pattern.geometric(tokens, *config.geometric)
    return replace(config.model, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates)


def needed_bytes(
    model: LongNetConfig, partition: Partition, rank: int, row_bytes: int, *, layers: int, training: bool
) -> int:
    """Return the fewest bytes that a rank must receive in a step, counted from geometry.

    Keys and values of other ranks that its queries see, once a layer; in training, the gradients of its own as each of
    the ranks that saw them makes them.

    Parameters
    ----------
    model, partition, rank
        What is computed, and where.
    row_bytes : int
        Keys and values of one token and head, of all sequences of a batch.
    layers : int
        How many times attention is computed.
    training : bool
        Whether there is a backward pass.
    """
    work = attention_work(model.pattern, partition, rank, model.heads, model.kv_heads or model.heads)
    return layers * row_bytes * (work.received + (work.sent if training else 0))


class ExchangeCount:
    """What the exchanges of a plan were in its rounds, beside what they take alone.

    Parameters
    ----------
    plan : SequencePlan
        Whose exchanges.
    model : LongNetConfig
        Numbers of heads.
    """

    def __init__(self, plan: SequencePlan, model: LongNetConfig) -> None:
        self._plan, self._model = plan, model
        self._rounds: list[tuple[float, float, int]] = []
        self._before = (0.0, 0.0, 0)

    def begin(self) -> None:
        """Begin a round."""
        self._before = self._now()

    def end(self) -> None:
        """End a round."""
        now, before = self._now(), self._before
        self._rounds.append((now[0] - before[0], now[1] - before[1], now[2] - before[2]))

    def forget(self) -> None:
        """Leave out the rounds so far."""
        self._rounds.clear()

    def _now(self) -> tuple[float, float, int]:
        return self._plan.seconds_tested, self._plan.seconds_waited, self._plan.bytes_received

    def results(self, launch: Launch, x: torch.Tensor, *, layers: int, training: bool, least: int) -> dict[str, Any]:
        """Return what records say of exchanges, the same on all ranks. Collective over the ranks of the point.

        Parameters
        ----------
        launch : Launch
            The ranks of the point.
        x : torch.Tensor
            Shaped and typed as the keys of this rank.
        layers : int
            How many times attention is computed in a round.
        training : bool
            Whether there is a backward pass.
        least : int
            Fewest bytes that this rank must receive.
        """
        middle = [statistics.median(column) for column in zip(*self._rounds, strict=True)]
        alone = layers * self._alone(launch, x, training=training)
        answers = allgather_objects(launch.comm, (*middle, alone, least))
        tested, waited, received, alone, least = (max(column) for column in zip(*answers, strict=True))
        results = {"bytes_received": int(received), "bytes_received_minimum": least}
        if received:
            inside = max(its[0] + its[1] for its in answers)
            results |= {
                "exchange_alone_seconds": alone,
                "exchange_driven_seconds": tested,
                "exchange_waited_seconds": waited,
                "hidden_fraction": 1 - inside / alone,
            }
        return results

    def _alone(self, launch: Launch, x: torch.Tensor, *, training: bool) -> float:
        """Return the time in MPI of the exchanges of one layer, with nothing to compute. Collective."""
        heads, kv_heads = self._model.heads, x.shape[2]
        exchanges: list[SpanExchange] = [e for _, e in self._plan.exchanges(heads, kv_heads, causal=True)]
        times = []
        for _ in range(_ALONE_REPEATS if launch.comm is not None else 0):
            barrier(launch.comm)
            flights = [exchange.start(x, x) for exchange in exchanges]
            received = [exchange.finish(its, x) for exchange, its in zip(exchanges, flights, strict=True)]
            if training:
                barrier(launch.comm)
                rows = [exchange.unpack(its) for exchange, its in zip(exchanges, received, strict=True)]
                back = [exchange.start_adjoint(its, x) for exchange, its in zip(exchanges, rows, strict=True)]
                for its in back:
                    its.finish()
                flights += back
            times.append(sum(its.seconds_tested + its.seconds_waited for its in flights))
        return statistics.median(times) if times else 0.0


class Steps:
    """One model for all points of a sweep, which its steps leave as it is: their learning rate is 0.

    Parameters
    ----------
    config : BenchConfig
        What to compute.
    device : torch.device
        Where.
    """

    def __init__(self, config: BenchConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self._models: dict[Pattern, LongNet] = {}

    @cached_property
    def _first(self) -> LongNet:
        torch.manual_seed(0)
        return self._prepared(LongNet(self.config.model).to(self.device))

    @cached_property
    def optimizer(self) -> Optimizer:
        """Updates the parameters that all models share."""
        return Optimizer(self._first, OPTIMIZERS[self.config.preset])

    def model(self, its: LongNetConfig, *, compiled: bool) -> LongNet:
        """Return the model of a pattern."""
        if its.pattern not in self._models:
            model = self._first
            if its != self.config.model:
                with torch.device("meta"):
                    model = LongNet(its)
                model.load_state_dict(self._first.state_dict(keep_vars=True), assign=True)
                self._prepared(model)
            if compiled:
                model.compile_blocks()
            self._models[its.pattern] = model
        return self._models[its.pattern]

    def _prepared(self, model: LongNet) -> LongNet:
        model.activation_checkpointing = self.config.activation_checkpointing
        model.keep_attention = self.config.keep_attention
        model.half_residual = self.config.half_residual
        return model


class StepsPoint:
    """The steps of one point on one of its ranks; making it is collective over them.

    Parameters
    ----------
    steps : Steps
        The model.
    launch : Launch
        The ranks of the point.
    tokens : int
        Length of the sequence over all ranks.

    Attributes
    ----------
    rounds : Rounds
        Its rounds.
    """

    def __init__(self, steps: Steps, launch: Launch, tokens: int) -> None:
        self.rounds = Rounds(launch)
        self._steps, self._launch, self._config, self._tokens = steps, launch, steps.config, tokens
        self._model_config = point_model(steps.config, tokens)
        self._compute = Compute(steps.config, launch, self._model_config, tokens)
        self._model = steps.model(self._model_config, compiled=self._compute.compiles)
        self._plan = self._compute.plan()
        self._exchanges = ExchangeCount(self._plan, self._model_config)
        self._inputs, self._targets = self._draw(self._compute.slice_of)
        self._loss = 0.0

    @property
    def model_config(self) -> LongNetConfig:
        """The model of this point."""
        return self._model_config

    def take(self, *, timed: bool) -> None:
        """Do a round. Collective over the ranks of the point."""
        work: Callable[[], None] = self._train if self._config.task == "train" else self._evaluate
        self._exchanges.begin()
        self.rounds.take(work, timed=timed)
        if timed:
            self._exchanges.end()

    def results(self) -> dict[str, Any]:
        """Return what the record says of all rounds. Collective over the ranks of the point."""
        config, model, training = self._config, self._model_config, self._config.task == "train"
        results = self.rounds.results()
        tokens = self._tokens * config.batch_size
        flop = self._model.flop(config.batch_size, self._tokens, training=training)
        kv_heads, itemsize = model.kv_heads or model.heads, self._compute.dtype.itemsize
        least = needed_bytes(
            model, self._compute.partition, self._launch.rank, 2 * config.batch_size * model.head_dim * itemsize,
            layers=model.layers, training=training,
        )  # fmt: skip
        x = torch.zeros(
            (config.batch_size, len(self._compute.slice_of), kv_heads, model.head_dim),
            dtype=self._compute.dtype, device=self._compute.device,
        )  # fmt: skip
        return {
            **results,
            "tokens": tokens,
            "tokens_per_second": tokens / results["seconds"],
            "loss_nats_per_token": self._loss,
            "model_flop": flop,
            "model_flop_per_second": flop / results["seconds"],
            **self._exchanges.results(self._launch, x, layers=model.layers, training=training, least=least),
        }

    def check(self) -> tuple[str, bool]:
        """Compare the loss with that of the same sequence walked through in chunks. Collective, as `results`."""
        bound, other = tolerance(self._compute.dtype), self._loss_in_chunks()
        passed = abs(self._loss - other) <= bound * abs(other)
        return f"loss is that of the sequence in chunks, to {bound:.0e}", all(
            allgather_objects(self._launch.comm, passed)
        )

    def _train(self) -> None:
        optimizer, comm = self._steps.optimizer, self._launch.comm
        with self._compute.autocast(), span("compute", "forward"):
            summed = self._model.loss(self._inputs, self._targets, self._plan)
        with span("compute", "backward"):
            (summed / self._all_tokens).backward()
        with span("compute", "update"):
            flat = optimizer.flat_gradient()
        self._loss = float(all_reduce_sum(comm, summed.detach().double())) / self._all_tokens
        gradient = all_reduce_sum(comm, flat)
        with span("compute", "update"):
            optimizer.step(gradient, 0.0)

    def _evaluate(self) -> None:
        with torch.no_grad(), self._compute.autocast(), span("compute", "forward"):
            summed = self._model.token_losses(self._inputs, self._targets, self._plan).sum(dtype=torch.float64)
        self._loss = float(all_reduce_sum(self._launch.comm, summed)) / self._all_tokens

    def _loss_in_chunks(self) -> float:
        launch, compute = self._launch, self._compute
        stream = compute.stream(self._tokens)
        total = torch.zeros((), dtype=torch.float64, device=compute.device)
        # Chunks that fit neither segments nor slices: what is on this side of a bound in one is beyond it in the other.
        bounds = chunk_bounds(self._tokens, max(1, self._tokens * 2 // 5))
        for ends in pairwise(bounds):
            its = slice_of_chunk(range(*ends), launch.rank, launch.size)
            inputs, targets = self._draw(its)
            with (
                torch.no_grad(),
                stream.next_chunk(len(its)) as plan,
                compute.eagerly(compute.compiles),
                compute.autocast(),
            ):
                total += self._model.token_losses(inputs, targets, plan).sum(dtype=torch.float64)
        stream.settle()
        return float(all_reduce_sum(launch.comm, total)) / self._all_tokens

    @property
    def _all_tokens(self) -> int:
        return self._tokens * self._config.batch_size

    def _draw(self, its: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return random tokens and targets of positions of the sequences, the same whoever has them."""
        blocks = []
        for block in range(its.start // _BLOCK, its.stop // _BLOCK + 1):
            generator = torch.Generator().manual_seed(block)
            size = (_BLOCK, self._config.batch_size)
            blocks.append(torch.randint(self._config.model.vocab_size, size, generator=generator))
        first = its.start - its.start // _BLOCK * _BLOCK
        tokens = torch.cat(blocks)[first : first + len(its) + 1].T.contiguous().to(self._compute.device)
        return tokens[:, :-1], tokens[:, 1:]
