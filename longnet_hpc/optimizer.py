"""AdamW in float32 with warm-up, cosine decay and clipping; and its state by name, for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.adamw import adamw

from longnet_hpc.checkpoint_shards import WEIGHT
from longnet_hpc.comm import all_reduce_sum, allgather_objects, gather_parts, rank_and_size, reduce_scatter_sum
from longnet_hpc.config import OptimizerConfig
from longnet_hpc.errors import CheckpointError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Optimizer", "learning_rate", "shard_bounds"]

_BLOCKS = 1024
"""Blocks, at most, of which the shards of ranks are made, and whose norms make that of the gradient."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_EPS = 1e-8
"""What AdamW adds to the root of the second moment: torch's default."""


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to its final value.

    Parameters
    ----------
    step : int
        Which step, 0 to ``steps - 1``.
    steps : int
        Length of the training, in steps.
    config : OptimizerConfig
        Its limits.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Optimizer:
    """AdamW over the parameters of a model, its gradients as one flat vector.

    Every rank makes the same update from the same summed gradient. With a communicator each keeps the moments of a
    shard of that vector only, updates the weights of its shard, and gets the others' from them: the same bits as
    without, in a fraction of the memory (ZeRO-1, arXiv 1910.02054).

    Parameters
    ----------
    model : nn.Module
        Its float32 parameters are trained.
    config : OptimizerConfig
        Its settings.
    comm : mpi4py.MPI.Comm, optional
        Ranks that share the moments.

    Attributes
    ----------
    bounds : list of int
        Which part of the flat vector is whose: rank r has ``bounds[r]`` to ``bounds[r + 1]``, in numbers.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, comm: MPI.Comm | None = None) -> None:
        self.config = config
        self._comm = comm
        self._parameters = dict(model.named_parameters())
        rank, size = rank_and_size(comm)
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        self._starts = dict(zip(self._parameters, accumulate(sizes, initial=0), strict=False))
        self.bounds = shard_bounds(sum(sizes), size)
        self._own = range(self.bounds[rank], self.bounds[rank + 1])
        # Where the shard has but a part of a parameter, that part is one of AdamW's: its numbers are on their own.
        self._parts = dict(self._within(self._own))
        self._trained = {name: self._part_of(name, its) for name, its in self._parts.items()}
        self._state = {
            name: {
                "step": torch.zeros((), device=part.device),
                **{moment: torch.zeros_like(part) for moment in _MOMENTS},
            }
            for name, part in self._trained.items()
        }

    def _within(self, its: range) -> Iterator[tuple[str, range]]:
        """Yield the parameters that a part of the flat vector touches, and which of their numbers."""
        for name, parameter in self._parameters.items():
            start = self._starts[name]
            first, stop = max(its.start, start), min(its.stop, start + parameter.numel())
            if first < stop:
                yield name, range(first - start, stop - start)

    def _part_of(self, name: str, its: range) -> torch.Tensor:
        """Return some numbers of a parameter, flat, in its own memory."""
        return self._parameters[name].detach().view(-1)[its.start : its.stop]

    def flat_gradient(self) -> torch.Tensor:
        """Return this rank's gradient, float32, ``(parameter_count,)``, and forget it in the parameters."""
        parts = []
        for parameter in self._parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.reshape(-1).float())
            parameter.grad = None
        return torch.cat(parts)

    def named(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parts of a flat gradient by the names of their parameters."""
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        yield from zip(self._parameters, flat.split(sizes), strict=True)

    def skip(self) -> None:
        """Let a step pass without an update; the moments age by it as they do in `load_state`."""
        for held in self._state.values():
            held["step"] += 1

    def sum(self, comm: MPI.Comm | None, gradient: torch.Tensor) -> torch.Tensor:
        """Return what `step` takes: the sum of a flat gradient over ranks, as far as it is this rank's. Collective."""
        if self._comm is None:
            return all_reduce_sum(comm, gradient)
        return reduce_scatter_sum(self._comm, gradient, self.bounds)

    def step(self, gradient: torch.Tensor, rate: float) -> float:
        """Update the parameters by a flat gradient, which is scaled in place if its norm is above the limit.

        Parameters
        ----------
        gradient : torch.Tensor
            Summed over ranks, float32, ``(parameter_count,)``, or this rank's part of that.
        rate : float
            Learning rate of this step.

        Returns
        -------
        float
            Norm of the whole gradient before clipping. If it is not finite, nothing is updated. Collective over the
            ranks that share the moments.
        """
        norm = self._norm(gradient)
        if not math.isfinite(norm):
            return norm
        if norm > self.config.clip_norm:
            gradient *= self.config.clip_norm / norm
        gradients = dict(zip(self._trained, self._split(gradient), strict=True))
        matrices = [name for name in self._trained if self._parameters[name].dim() >= 2]
        vectors = [name for name in self._trained if self._parameters[name].dim() < 2]
        self._update(matrices, gradients, rate, self.config.weight_decay)
        self._update(vectors, gradients, rate, 0.0)
        if self._comm is not None:
            self._gather_weights(self._comm)
        return norm

    @torch.no_grad()
    def _update(self, names: list[str], gradients: Mapping[str, torch.Tensor], rate: float, decay: float) -> None:
        """Update some parameters, by torch's function: its class loads the compiler, which takes seconds."""
        parts, held = [self._trained[name] for name in names], [self._state[name] for name in names]
        adamw(
            params=parts,
            grads=[gradients[name] for name in names],
            exp_avgs=[its["exp_avg"] for its in held],
            exp_avg_sqs=[its["exp_avg_sq"] for its in held],
            max_exp_avg_sqs=[],
            state_steps=[its["step"] for its in held],
            fused=any(part.is_cuda for part in parts) or None,  # one pass; None leaves the choice to torch
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=rate,
            weight_decay=decay,
            eps=_EPS,
            maximize=False,
        )

    def _split(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield this rank's part of a flat vector by the parameters it touches."""
        yield from flat.split([len(its) for its in self._parts.values()]) if self._parts else ()

    def _norm(self, gradient: torch.Tensor) -> float:
        """Return the norm of the whole gradient from the norms of its blocks, which are the same whoever has them."""
        blocks = gradient.split(_block_len(self.bounds[-1])) if len(gradient) else ()
        norms = torch.stack(torch._foreach_norm(blocks)).tolist() if blocks else []
        squares = [norm**2 for its in allgather_objects(self._comm, norms) for norm in its]
        return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.nan

    def _gather_weights(self, comm: MPI.Comm) -> None:
        """Take over the weights of the other ranks' shards. Collective."""
        nothing = next(iter(self._parameters.values())).new_empty(0)  # which a shard may be
        own = torch.cat([nothing, *self._trained.values()])
        for its, weights in gather_parts(comm, own, self.bounds):
            done = 0
            for name, part in self._within(its):
                self._part_of(name, part).copy_(weights[done : done + len(part)])
                done += len(part)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights by name, ``weight.`` before each."""
        return {WEIGHT + name: parameter.detach() for name, parameter in self._parameters.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return the moments by name, ``exp_avg.`` or ``exp_avg_sq.`` before each: of a shard as flat parts."""
        tensors = {}
        for name, held in self._state.items():
            for moment in _MOMENTS:
                its = held[moment]
                tensors[f"{moment}.{name}"] = its.view(self._parameters[name].shape) if self._comm is None else its
        return tensors

    def state(self) -> dict[str, torch.Tensor]:
        """Return `weights` and `moments`."""
        return self.weights() | self.moments()

    def load_state(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Take over what `state` returned after ``step`` steps, where nothing was in shards.

        Raises
        ------
        CheckpointError
            If names or shapes are those of another model.
        """
        kinds = (WEIGHT, *(f"{moment}." for moment in _MOMENTS))
        check_shapes({kind + name: its.shape for name, its in self._parameters.items() for kind in kinds}, tensors)
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[WEIGHT + name])
        for name, held in self._state.items():
            its = slice(self._parts[name].start, self._parts[name].stop)
            held["step"].fill_(step)
            for moment in _MOMENTS:
                held[moment].copy_(tensors[f"{moment}.{name}"].reshape(-1)[its])


def shard_bounds(parameter_count: int, shards: int) -> list[int]:
    """Return where the shards of a flat vector of all parameters begin, and its end: each is a run of whole blocks."""
    block = _block_len(parameter_count)
    blocks = -(-parameter_count // block)
    return [min(parameter_count, block * (blocks * shard // shards)) for shard in range(shards + 1)]


def _block_len(parameter_count: int) -> int:
    """Return the length of the blocks whose norms make that of the gradient; the memory of each begins on a line."""
    return max(1, -(-parameter_count // (_BLOCKS * 64))) * 64


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take over the weights of a checkpoint, leaving its optimizer state.

    Raises
    ------
    CheckpointError
        If names or shapes are those of another model.
    """
    parameters = {WEIGHT + name: parameter for name, parameter in model.named_parameters()}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(WEIGHT)}
    check_shapes({name: parameter.shape for name, parameter in parameters.items()}, weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_shapes(expected: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError, naming the first tensor that differs, unless names and shapes are as expected."""
    for name in sorted(expected.keys() | tensors.keys()):
        theirs = tuple(tensors[name].shape) if name in tensors else "missing"
        ours = tuple(expected[name]) if name in expected else "missing"
        if theirs != ours:
            raise CheckpointError(f"checkpoint is of another model: {name} is {theirs} there, {ours} here")
