"""Helpers of the tests that run on several ranks: cut tensors, and judge on all ranks together."""

import itertools

import torch


def cut(total, size, seed):
    """Return `size` slice lengths that add up to `total`, uneven, some perhaps empty; the same on every rank."""
    points = torch.randint(0, total + 1, (size - 1,), generator=torch.Generator().manual_seed(seed)).sort().values
    bounds = [0, *points.tolist(), total]
    return [b - a for a, b in itertools.pairwise(bounds)]


def own_slice(x, lengths, rank):
    start = sum(lengths[:rank])
    return x[:, start : start + lengths[rank]].clone()


def assert_all_close(comm, pairs, tolerance):
    """Fail on every rank if a pair of tensors differs by more than `tolerance` (absolute and relative) on any rank."""
    worst = 0.0
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        if actual.numel():
            both_minus_infinity = (actual == expected) & ~torch.isfinite(expected)
            difference = (actual.double() - expected.double()).abs() / (1 + expected.double().abs())
            difference = difference.masked_fill(both_minus_infinity, 0.0).nan_to_num(nan=torch.inf)
            worst = max(worst, difference.max().item())
    worst = comm.allreduce(worst, op=_max())
    assert worst <= tolerance, f"worst difference on any rank: {worst}"


def _max():
    from mpi4py import MPI

    return MPI.MAX
