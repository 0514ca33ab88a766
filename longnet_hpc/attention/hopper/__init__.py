"""Attention of all pieces of a slice in few launches, by kernels written for Hopper GPUs.

The copy engine reads the rows of every grid where they lie, so nothing is gathered. The dense branch is computed last
and starts its softmax from what the others left, so nothing is merged afterwards. What these kernels do not take (rows
that came from other ranks, for instance) goes to cuDNN.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from longnet_hpc.attention.backend import AllPieces, Backend
from longnet_hpc.attention.cudnn import CUDNN
from longnet_hpc.attention.hopper.launch import missing
from longnet_hpc.attention.hopper.pieces import backward, forward, takes
from longnet_hpc.attention.sums import FEW_PIECES
from longnet_hpc.compiler_mark import assume_constant_result

__all__ = ["HOPPER"]


def _supports(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return head_dim in (64, 128) and CUDNN.supports(device, dtype, head_dim) and _can_launch(device)


@cache
@assume_constant_result  # torch.compile does not look inside
def _can_launch(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    reason = missing()
    if reason:
        logging.getLogger("longnet_hpc").info("kernels for Hopper are not used: %s", reason)
    return reason is None


HOPPER = Backend(
    *("hopper", _supports, CUDNN.forward, CUDNN.backward),
    AllPieces(takes=takes, forward=forward, backward=backward),
    most_packed_pieces=FEW_PIECES,
)
