"""Numbers that went wrong, found and named: what is not finite, and weights that differ between ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash

from longnet_hpc.comm import allgather_objects

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["differing_weights", "nonfinite_parts"]


def nonfinite_parts(comm: MPI.Comm | None, loss: float, gradients: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Say on which ranks loss or gradient are not finite, and in which tensor first. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        The ranks.
    loss : float
        This rank's share of the loss, in nats.
    gradients : iterable of (str, torch.Tensor)
        This rank's share of the gradient by the names of the parameters.

    Returns
    -------
    str
        The same on all ranks, for example ``rank 2: gradient of head.weight``.
    """
    first = next((name for name, gradient in gradients if not bool(gradient.isfinite().all())), None)
    is_finite = bool(torch.tensor(loss).isfinite())
    said = []
    for rank, (loss_is_finite, name) in enumerate(allgather_objects(comm, (is_finite, first))):
        parts = [] if loss_is_finite else ["loss"]
        parts += [] if name is None else [f"gradient of {name}"]
        if parts:
            said.append(f"rank {rank}: {', '.join(parts)}")
    return "; ".join(said) or "finite on each rank, but not their sum"


def differing_weights(comm: MPI.Comm | None, weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Say which ranks hold other weights than most, and in which tensor first; None if all are the same. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm or None
        The ranks.
    weights : iterable of (str, torch.Tensor)
        By name, in the same order on all ranks.

    Returns
    -------
    str or None
        The same on all ranks, for example ``rank 2 in head.weight``.
    """
    digests = {name: xxhash.xxh3_64_intdigest(_bytes_of(weight)) for name, weight in weights}
    whole = hash(tuple(digests.values()))
    if len(set(allgather_objects(comm, whole))) == 1:
        return None
    answers = allgather_objects(comm, digests)
    usual = {name: _most_common([its[name] for its in answers]) for name in digests}
    said = []
    for rank, its in enumerate(answers):
        name = next((name for name in its if its[name] != usual[name]), None)
        if name is not None:
            said.append(f"rank {rank} in {name}")
    return ", ".join(said)


def _most_common(values: Sequence[int]) -> int:
    """Return the value that most ranks have; of two that are as common, that of the lowest rank."""
    return Counter(values).most_common(1)[0][0]


def _bytes_of(weight: torch.Tensor) -> memoryview:
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
