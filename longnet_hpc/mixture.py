"""The mixture of all branches as one differentiable function of this rank's queries, keys and values.

Forward: start the exchanges of spanning segments, compute every piece against the keys of its own slice meanwhile, then
let the queries of spanning pieces see the rows that arrived. Backward: the same in reverse, with the merged statistics.
Both are operators of torch's library, so that `torch.compile` takes them into its graphs as they are.
"""

from __future__ import annotations

import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from longnet_hpc import __version__
from longnet_hpc.attention import choose_backend
from longnet_hpc.attention.backend import Joined, Output
from longnet_hpc.attention.branch import attend, attend_backward, attend_pieces, attend_pieces_backward
from longnet_hpc.attention.sums import HeldGradients, gradient_sum, wide_dtype
from longnet_hpc.comm.buffers import Pending
from longnet_hpc.exchange import Rows
from longnet_hpc.grids import row_grids
from longnet_hpc.trace import span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longnet_hpc.carry import Carry, Crossing
    from longnet_hpc.exchange import SpanExchange
    from longnet_hpc.pattern import Branch
    from longnet_hpc.sequence_plan import SequencePlan

__all__ = ["fake_backward", "handle_of", "mix", "mix_backward", "mixture", "refuse", "register"]


def mixture(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SequencePlan, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix all branches of a plan by their softmax denominators (LongNet, Eq. 9-10).

    Parameters
    ----------
    q, k, v : torch.Tensor
        This rank's slice, ``(batch, local_len, heads or kv_heads, head_dim)``, shapes checked by the caller.
    plan : SequencePlan
        Who owns which tokens.
    causal : bool
        Whether a query sees only keys at or before its own position.
    scale : float
        Factor on the scores.

    Returns
    -------
    out, lse : torch.Tensor
        ``(batch, local_len, heads, head_dim)``, differentiable once, and ``(batch, local_len, heads)``, which is not.
        Collective over the ranks of the plan, forward and backward.
    """
    out, lse, _ = torch.ops.longnet_hpc.mixture.default(q, k, v, plan.handle, causal, scale)
    return out, lse.detach()


def mix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: SequencePlan,
    causal: bool,
    scale: float,
    carry: Carry | None = None,
    crossing: Crossing | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return output, log-sum-exp, and what came from other ranks, exchange by exchange; see `mixture`.

    Where the plan is of a chunk, queries also see the rows that ``carry`` has of earlier chunks, as ``crossing`` says.
    """
    # Autocast would lower the reference's products: statistics and sums are float32 at least, whoever calls.
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False), span("compute", "attention"):
        backend = choose_backend(plan.backend, q.device, q.dtype, q.shape[-1], plan.packed_pieces)
        q, k, v = (_laid_out(x) for x in (q, k, v))
        heads, kv_heads = q.shape[2], k.shape[2]
        exchanges = plan.exchanges(heads, kv_heads, causal=causal)
        flights = [exchange.start(k, v) for _, exchange in exchanges]
        plan.bytes_received += sum(flight.bytes_received for flight in flights)
        progress = _driving(flights)

        total = attend_pieces(
            *(backend, q, k, v, plan.pieces),
            causal=causal, scale=scale, joined=_joined(exchanges, crossing), progress=progress,
        )  # fmt: skip
        if carry is not None and crossing is not None:
            carry.attend(backend, q, crossing, total, scale=scale, progress=progress)
        received = []
        for (branch, exchange), flight in zip(exchanges, flights, strict=True):
            received.append(exchange.finish(flight, k))
            for columns, rows in exchange.unpack(received[-1]).items():
                pairs = row_grids(branch, exchange.layout.piece, columns, heads, kv_heads, rows[0].shape[1])
                attend(backend, q, *rows, pairs, total, causal=False, scale=scale, first=False, progress=progress)
        plan.count_seconds(exchanges, flights, back=False)
        return *total.result(), received


def mix_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    received: list[torch.Tensor],
    plan: SequencePlan,
    causal: bool,
    scale: float,
    carry: Carry | None = None,
    crossing: Crossing | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of queries, keys and values (adjoint of `mix`, with merged statistics)."""
    with (
        torch.cuda.device_of(q),
        torch.autocast(q.device.type, enabled=False),
        span("compute", "gradient of attention"),
    ):
        backend = choose_backend(plan.backend, q.device, q.dtype, q.shape[-1], plan.packed_pieces)
        q, k, v = (_laid_out(x) for x in (q, k, v))
        heads, kv_heads = q.shape[2], k.shape[2]
        output = Output(_laid_out(dout), out, lse)
        exchanges = plan.exchanges(heads, kv_heads, causal=causal)
        flights: list[Pending] = []
        progress = _driving(flights)
        add_given_back = carry.start_giving_back(crossing) if carry is not None and crossing is not None else None
        of_received = HeldGradients()
        for (branch, exchange), its_received in zip(exchanges, received, strict=True):
            row_grads: Rows = {}
            for columns, rows in exchange.unpack(its_received).items():
                pairs = row_grids(branch, exchange.layout.piece, columns, heads, kv_heads, rows[0].shape[1])
                sums = gradient_sum(rows[0]), gradient_sum(rows[1])
                attend_backward(
                    *(backend, q, *rows, pairs, output, of_received, *sums),
                    causal=False, scale=scale, progress=progress,
                )  # fmt: skip
                row_grads[columns] = sums[0].result(), sums[1].result()
            flights.append(exchange.start_adjoint(row_grads, k))
        plan.bytes_received += sum(flight.bytes_received for flight in flights)

        dq, dk, dv = attend_pieces_backward(
            *(backend, q, k, v, plan.pieces, output),
            causal=causal, scale=scale, joined=_joined(exchanges, crossing), progress=progress,
        )  # fmt: skip
        of_received.add_to(dq)
        if carry is not None and crossing is not None:
            carry.attend_backward(backend, q, crossing, output, dq, scale=scale, progress=progress)
        for (_, exchange), flight in zip(exchanges, flights, strict=True):
            exchange.finish_adjoint(flight, k, dk, dv)
        if add_given_back is not None:
            add_given_back(dk, dv)
        plan.count_seconds(exchanges, flights, back=True)
        grads = dk.result(), dv.result()  # first, since the memory of their parts serves the next
        return dq.result(), *grads


def _joined(exchanges: Sequence[tuple[Branch, SpanExchange]], crossing: Crossing | None) -> Joined:
    """Return the pieces that see, or are seen from, beyond this rank's chunk."""
    pieces = {(branch, exchange.layout.piece) for branch, exchange in exchanges}
    return pieces if crossing is None else pieces | crossing.pieces


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    return mix(q, k, v, plan_of(plan), causal, scale)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    received: list[torch.Tensor],
    plan: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mix_backward(dout, q, k, v, out, lse, received, plan_of(plan), causal, scale)


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    # Numbers of heads are part of the geometry, so a graph of any shape is made for these.
    exchanges = plan_of(plan).exchanges(int(q.shape[2]), int(k.shape[2]), causal=causal)
    received = [k.new_empty(exchange.received_shape(k)) for _, exchange in exchanges]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype)), received


def fake_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of the right shapes."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Save what the backward pass needs: nothing per branch but the rows that came from other ranks."""
    q, k, v, ctx.handle, ctx.causal, ctx.scale = inputs
    out, lse, received = output
    ctx.plan = plan_of(ctx.handle)  # which keeps it, and its communicators, until then
    ctx.save_for_backward(q, k, v, out, lse, *received)


def _differentiate(ctx: Any, dout: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, *received = ctx.saved_tensors
    grads = torch.ops.longnet_hpc.mixture_backward.default(
        dout, q, k, v, out, lse, received, ctx.handle, ctx.causal, ctx.scale
    )
    return (*grads, None, None, None)


def refuse(ctx: Any, *grads: torch.Tensor) -> None:
    """Say that there is no second derivative."""
    raise RuntimeError("dilated attention is differentiable once")


# `torch.library.custom_op` says this in one line, but its checks of each call take as long as a small kernel.
def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make a function an operator of torch's library; ``fake`` tells the shapes of its results."""
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"longnet_hpc::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"longnet_hpc::{name}", "CompositeExplicitAutograd", function)
    torch.library.register_fake(f"longnet_hpc::{name}", fake)


register("mixture", _forward, _fake_forward)
register("mixture_backward", _backward, fake_backward)
torch.library.register_autograd("longnet_hpc::mixture", _differentiate, setup_context=_keep)
torch.library.register_autograd("longnet_hpc::mixture_backward", refuse)


_plans: weakref.WeakValueDictionary[int, SequencePlan] = weakref.WeakValueDictionary()
_handles = count()


def handle_of(plan: SequencePlan) -> int:
    """Return a number for a new plan: operators take numbers and tensors, so that graphs can hold them.

    Caches on disk know a graph by what is in it, and the shapes that an operator returns follow from the plan. So plans
    of other content get other numbers in other processes, too.
    """
    content = repr((__version__, plan.pattern, plan.partition, plan.rank)).encode()
    handle = (xxhash.xxh3_64_intdigest(content) >> 24 << 20) + next(_handles)
    _plans[handle] = plan
    return handle


def plan_of(handle: int) -> SequencePlan:
    """Return the plan of a handle; it must still be in use."""
    return _plans[handle]


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with a dense last dim and, on a GPU, aligned to the 16 bytes that kernels load at once."""
    elements = 16 // x.element_size()
    if not x.is_cuda or x.shape[-1] % elements:
        elements = 1  # no kernel loads so much at once
    aligned = x.data_ptr() % (elements * x.element_size()) == 0 and all(
        stride % elements == 0 for stride in x.stride()[:-1]
    )
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _driving(flights: list[Pending]) -> Callable[[], None]:
    """Return a function that moves exchanges on: those of a list that may still grow, and earlier ones."""

    def progress() -> None:
        Pending.start_ready()
        for flight in flights:
            flight.test()

    return progress
