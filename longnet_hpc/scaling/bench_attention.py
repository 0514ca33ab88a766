"""Attention of one layer at growing lengths: forward, or forward and backward, some rows compared with float64."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from longnet_hpc.comm import allgather_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.pattern import Pattern
from longnet_hpc.scaling.bench_steps import point_model
from longnet_hpc.scaling.config import BenchConfig
from longnet_hpc.scaling.overlap import Overlap
from longnet_hpc.scaling.rounds import Rounds
from longnet_hpc.trace import span

__all__ = ["AttentionPoint"]

_BACKWARD = 2.5
"""Arithmetic of the backward pass over that of the forward pass: five products instead of two."""
_BLOCK_TOKENS = 4096
"""Tokens whose numbers are made at once."""
_CHECKED_ROWS = 12
_QUERIES, _KEYS, _VALUES, _GRADIENT = range(4)


class AttentionPoint:
    """The attention of one layer on one of the ranks of a point; making it is collective over them.

    Parameters
    ----------
    config : BenchConfig
        What to compute.
    launch : Launch
        The ranks of the point.
    tokens : int
        Length of the sequence over all ranks.
    """

    def __init__(self, config: BenchConfig, launch: Launch, tokens: int) -> None:
        self.rounds = Rounds(launch)
        self._launch, self._config, self._tokens = launch, config, tokens
        self._model = point_model(config, tokens)
        self._compute = Compute(config, launch, self._model, tokens)
        self._plan = self._compute.plan()
        self._overlap = Overlap(self.rounds, self._plan)
        self._training = config.task == "train"
        heads, kv_heads = self._model.heads, self._model.kv_heads or self._model.heads
        its = self._compute.slice_of
        self._leaves = [
            self._numbers(its, count, which).requires_grad_(self._training)
            for which, count in ((_QUERIES, heads), (_KEYS, kv_heads), (_VALUES, kv_heads))
        ]
        self._dout = self._numbers(its, heads, _GRADIENT)
        self._out = self._dout

    def take(self, *, timed: bool) -> None:
        """Do a round. Collective over the ranks of the point."""
        self._overlap.take(self._work, timed=timed)

    def _work(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        q, k, v = self._leaves
        with torch.set_grad_enabled(self._training), span("compute", "forward"):
            self._out = self._plan.attention(q, k, v, causal=True)
        if self._training:
            with span("compute", "backward"):
                self._out.backward(self._dout)

    def results(self) -> dict[str, Any]:
        """Return what the record says of all rounds. Collective over the ranks of the point."""
        config, model = self._config, self._model
        results, tokens = self.rounds.results(), self._tokens * config.batch_size
        forward = model.pattern.flop(self._tokens, model.heads, model.head_dim, causal=True)
        flop = round(config.batch_size * forward * (1 + (_BACKWARD if self._training else 0)))
        return {
            **results,
            "tokens": tokens,
            "tokens_per_second": tokens / results["seconds"],
            "model_flop": flop,
            "model_flop_per_second": flop / results["seconds"],
            **self._overlap.results(
                model, self._leaves[_KEYS], layers=1, training=self._training, slowest_rank=results["slowest_rank"]
            ),
        }

    def check(self) -> tuple[str, bool]:
        """Compare some rows with float64, computed from their definition alone. Collective, as `results`."""
        bound = 1e-4 if self._compute.dtype == torch.float32 else 2e-2
        worst = max((self._error(*row) for row in self._rows()), default=0.0)
        what = f"{_CHECKED_ROWS} rows a rank of output"
        if self._training:
            what += " and gradient of queries against float64, and those of keys and values against products with them"
            worst = max(worst, self._mismatch())
        else:
            what += " against float64"
        return f"{what}, to {bound:.0e}", all(allgather_objects(self._launch.comm, worst <= bound))

    def _mismatch(self) -> float:
        """Return how far gradients of keys and values are, all together, from the two equations that they obey.

        The output is linear in values, and the scores are so in queries and in keys alike: the products of values with
        their gradient have the sum of those of the output with its own, and those of keys that of those of queries.
        """
        q, k, v = self._leaves
        worst = 0.0
        for one, other in (((self._out, self._dout), (v, v.grad)), ((q, q.grad), (k, k.grad))):
            terms = [_products(x, gradient) for x, gradient in (one, other) if gradient is not None]
            (left, left_squares), (right, right_squares) = (
                [sum(column) for column in zip(*allgather_objects(self._launch.comm, its), strict=True)]
                for its in terms
            )
            # Their signs are random, and so are rounding errors: both sums are about the root of the sum of squares.
            difference = abs(left - right) / math.sqrt(max(left_squares, right_squares) or 1.0)
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
        return worst

    def _rows(self) -> list[tuple[int, int]]:
        """Return positions of this rank with a head, the last ones, which see the most, among them."""
        its, choose = self._compute.slice_of, random.Random(self._launch.rank)
        heads = self._model.heads
        positions = [its.stop - 1 - head for head in range(min(heads, len(its), _CHECKED_ROWS // 2))]
        positions += [choose.randrange(its.start, its.stop) for _ in range(_CHECKED_ROWS - len(positions))]
        return [(position, position % heads) for position in positions]

    def _error(self, position: int, head: int) -> float:
        """Return how far a row is from float64, relatively."""
        seen = _seen(self._model.pattern, position, head)
        here, index = torch.tensor([position]), position - self._compute.slice_of.start
        kv_head = head * self._leaves[_KEYS].shape[2] // self._model.heads
        q, dout = (self._exact(here, head, which)[0] for which in (_QUERIES, _GRADIENT))
        k, v = (self._exact(seen, kv_head, which) for which in (_KEYS, _VALUES))
        scale = self._model.head_dim**-0.5
        p = torch.softmax(k @ q * scale, dim=0)  # of nothing, it is nothing
        out = p @ v
        error = _difference(self._out[-1, index, head], out)
        if self._training:
            grad = self._leaves[_QUERIES].grad
            assert grad is not None
            dq = (p * (v @ dout - dout @ out)) @ k * scale
            error = max(error, _difference(grad[-1, index, head], dq))
        return error

    def _exact(self, positions: torch.Tensor, head: int, which: int) -> torch.Tensor:
        """Return rows of the last sequence as they are computed with, in float64."""
        rows = _numbers(positions, torch.tensor([head]), self._model.head_dim, which)[:, 0]
        return rows.to(self._compute.dtype).double()

    def _numbers(self, its: range, heads: int, which: int) -> torch.Tensor:
        """Return the rows of a slice, the same for all sequences of the batch."""
        out = torch.empty(
            (1, len(its), heads, self._model.head_dim), dtype=self._compute.dtype, device=self._compute.device
        )
        all_heads = torch.arange(heads, device=out.device)
        for start in range(0, len(its), _BLOCK_TOKENS):
            positions = torch.arange(its.start + start, min(its.stop, its.start + start + _BLOCK_TOKENS))
            out[0, start : start + len(positions)] = _numbers(
                positions.to(out.device), all_heads, self._model.head_dim, which
            )
        return out.repeat(self._config.batch_size, 1, 1, 1)


def _numbers(positions: torch.Tensor, heads: torch.Tensor, head_dim: int, which: int) -> torch.Tensor:
    """Return numbers of mean 0 and variance 1 that follow from their place alone: any rank can make any of them.

    Parameters
    ----------
    positions, heads : torch.Tensor
        Places, one-dimensional.
    head_dim : int
        Features.
    which : int
        Queries, keys, values or gradient.
    """
    features = torch.arange(head_dim, device=positions.device) + which * 8191
    x = positions[:, None, None] * 40503 + heads[None, :, None] * 9973 + features
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):  # mixes the bits of 32-bit numbers
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x.double() / 2**32 - 0.5) * math.sqrt(12)).float()


def _seen(pattern: Pattern, position: int, head: int) -> torch.Tensor:
    """Return the positions of the keys that a query sees, once for each branch that offers them."""
    seen = []
    for branch in pattern:
        w, r = branch.segment_length, branch.dilation_rate
        if (position % w) % r == head % r:
            seen.append(torch.arange(position - position % w + head % r, position + 1, r))
    return torch.cat(seen) if seen else torch.zeros(0, dtype=torch.long)


def _products(x: torch.Tensor, gradient: torch.Tensor) -> tuple[float, float]:
    """Return the sum of the products of two tensors, number by number, and of their squares."""
    products = x.detach().float() * gradient.float()
    return float(products.sum(dtype=torch.float64)), float(products.square().sum(dtype=torch.float64))


def _difference(computed: torch.Tensor, exact: torch.Tensor) -> float:
    difference = (computed.detach().cpu().double() - exact).norm() / max(1e-3, float(exact.norm()))
    return float(difference.nan_to_num(nan=torch.inf))
