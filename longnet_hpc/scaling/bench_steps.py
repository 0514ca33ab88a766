"""Steps of a model at some lengths of sequence on some numbers of ranks: what strong, weak and step sweeps time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from longnet_hpc.chunk import chunk_bounds
from longnet_hpc.comm import all_reduce_sum, allgather_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.config import OPTIMIZERS
from longnet_hpc.model import LongNet
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.optimizer import Optimizer
from longnet_hpc.pattern import Pattern
from longnet_hpc.scaling.config import BenchConfig
from longnet_hpc.scaling.overlap import Overlap
from longnet_hpc.scaling.rounds import Rounds
from longnet_hpc.sweep import slice_of_chunk
from longnet_hpc.trace import span

__all__ = ["Steps", "StepsPoint", "point_model", "tolerance"]

_BLOCK = 1 << 16
"""Tokens drawn at once."""


def tolerance(dtype: torch.dtype) -> float:
    """Return how far, relatively, losses may be apart that differ in the order of sums alone."""
    return 1e-5 if dtype == torch.float32 else 2e-3


def point_model(config: BenchConfig, tokens: int) -> LongNetConfig:
    """Return the model of a point: a geometric pattern reaches over its sequence."""
    if config.geometric is None:
        return config.model
    pattern = Pattern.geometric(tokens, *config.geometric)
    return replace(config.model, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates)


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
        self._overlap = Overlap(self.rounds, self._plan)
        self._inputs, self._targets = self._draw(self._compute.slice_of)
        self._loss = 0.0

    def take(self, *, timed: bool) -> None:
        """Do a round. Collective over the ranks of the point."""
        work: Callable[[], None] = self._train if self._config.task == "train" else self._evaluate
        self._overlap.take(work, timed=timed)

    def results(self) -> dict[str, Any]:
        """Return what the record says of all rounds. Collective over the ranks of the point."""
        config, model, training = self._config, self._model_config, self._config.task == "train"
        results = self.rounds.results()
        tokens = self._tokens * config.batch_size
        flop = self._model.flop(config.batch_size, self._tokens, training=training)
        x = torch.zeros(
            (config.batch_size, len(self._compute.slice_of), model.kv_heads or model.heads, model.head_dim),
            dtype=self._compute.dtype, device=self._compute.device,
        )  # fmt: skip
        return {
            **results,
            "tokens": tokens,
            "tokens_per_second": tokens / results["seconds"],
            "loss_nats_per_token": self._loss,
            "model_flop": flop,
            "model_flop_per_second": flop / results["seconds"],
            **self._overlap.results(
                model, x, layers=model.layers, training=training, slowest_rank=results["slowest_rank"]
            ),
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
        self._overlap.computed()
        self._loss = float(all_reduce_sum(comm, summed.detach().double())) / self._all_tokens
        gradient = all_reduce_sum(comm, flat)
        with span("compute", "update"):
            optimizer.step(gradient, 0.0)

    def _evaluate(self) -> None:
        with torch.no_grad(), self._compute.autocast(), span("compute", "forward"):
            summed = self._model.token_losses(self._inputs, self._targets, self._plan).sum(dtype=torch.float64)
        self._overlap.computed()
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
                compute.eagerly(True),
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
