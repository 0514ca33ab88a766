"""What each rank passes to a model of `transformers` where ranks share a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longnet_hpc.comm import rank_and_size
from longnet_hpc.errors import ShapeError
from longnet_hpc.partition import Partition
from longnet_hpc.pattern import Pattern
from longnet_hpc.sequence_plan import SequencePlan

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["own_slice"]

_IGNORED = -100
"""Label of a token that is not predicted."""


def own_slice(
    input_ids: torch.Tensor,
    comm: MPI.Comm | None,
    *,
    labels: torch.Tensor | None = None,
    pattern: Pattern | None = None,
) -> dict[str, torch.Tensor | int | bool | SequencePlan]:
    """Return this rank's part of a batch, as arguments of a causal language model of `transformers`.

    Parameters
    ----------
    input_ids : torch.Tensor
        Tokens of the whole sequences, ``(batch, seq)``, the same on all ranks.
    comm : mpi4py.MPI.Comm or None
        Ranks that share each sequence, as passed to `register`; slices differ by at most one token.
    labels : torch.Tensor, optional
        Shaped as the tokens, label i for token i as everywhere in `transformers`, which predicts it from the tokens
        before it; -100 is left out.
    pattern : Pattern, optional
        For `LongNetForCausalLM`, which knows of the ranks by a plan alone: ``model.longnet.config.pattern``. Collective
        then.

    Returns
    -------
    dict
        ``input_ids``, ``position_ids`` and ``use_cache``; with labels also ``labels``, ``shift_labels`` and
        ``num_items_in_batch``; with a pattern also ``plan``. The loss is then this rank's share: the sum over ranks is
        the loss of the whole batch, and the sum of their gradients its gradient.

    Raises
    ------
    ShapeError
        If shapes do not fit, or no label is left.
    PartitionError
        If there are more ranks than tokens.
    """
    if input_ids.dim() != 2:
        raise ShapeError(f"input_ids must be (batch, seq), got {tuple(input_ids.shape)}")
    rank, size = rank_and_size(comm)
    owned = Partition.even(input_ids.shape[1], size).slice_of(rank)
    own = slice(owned.start, owned.stop)
    position_ids = torch.arange(owned.start, owned.stop, device=input_ids.device).unsqueeze(0)
    result: dict[str, torch.Tensor | int | bool | SequencePlan] = {
        "input_ids": input_ids[:, own],
        "position_ids": position_ids,
        "use_cache": False,
    }
    if labels is not None:
        if labels.shape != input_ids.shape:
            raise ShapeError(f"labels must be shaped {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        count = int((following != _IGNORED).sum())
        if count == 0:
            raise ShapeError("labels must have at least one token to predict after the first")
        result |= {
            "labels": labels[:, own],
            "shift_labels": following[:, own].contiguous(),
            "num_items_in_batch": count,
        }
    if pattern is not None:
        result["plan"] = SequencePlan.build(pattern, len(owned), comm=comm, device=input_ids.device)
    return result
