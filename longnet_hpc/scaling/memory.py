"""Memory of one rank, by what it is for: weights, optimizer, gradients, activations, rows of others, buffers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from longnet_hpc.chunk import carried_bytes, kept_rows, wide_branches
from longnet_hpc.scaling.config import PlanConfig

__all__ = ["IN_HOST_MEMORY", "SHORTEST_CHUNK", "Memory", "chunk_that_fits", "memory_of_rank"]

SHORTEST_CHUNK, _LONGEST_CHUNK = 1 << 15, 1 << 22
"""Tokens of a rank, where nobody chooses: shorter chunks do not fill a GPU, longer ones gain nothing."""
IN_HOST_MEMORY = ("host", "host_checkpoint")
"""Parts of `Memory` that are not on the device."""
_CHUNK_SHARE = 0.85
"""Of the memory of a rank that its part of a chunk may take with all else, where nobody chooses."""

_FLAT_BYTES = 4
"""Per parameter, while weights are updated: of the flat gradient of this rank, and as many of the sum over ranks, or of
this rank's shard of it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank on its device at the worst moment of a step."""

    process: int
    """What it takes before it has any tensor."""
    weights: int
    """float32 weights, and their copies in half precision."""
    optimizer: int
    """Two moments, or this rank's shard of them."""
    gradients: int
    """Gradients of the weights."""
    activations: int
    """What is kept for the backward pass, and what one block needs besides."""
    rows: int
    """Rows of other ranks and of earlier chunks."""
    buffers: int
    """Of exchanges, and of the update of the weights where that is more than all activations."""
    checkpoint: int
    """Copy of a checkpoint while it is written, on rank 0, which has most of it; where the device is the CPU."""
    host: int
    """In host memory (or a file), rows of a stream that wait for the way back; not part of the total."""
    host_checkpoint: int
    """In host memory, `checkpoint` where the device is a GPU; not part of the total."""

    @property
    def total(self) -> int:
        """All but `IN_HOST_MEMORY`."""
        everything: dict[str, int] = asdict(self)
        return sum(size for name, size in everything.items() if name not in IN_HOST_MEMORY)

    def table(self) -> dict[str, int]:
        """Return the bytes by name, with the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class _PerFeature:
    """Bytes for each token and feature of the width, as measured (docs/LOG.md, 2026-11-26 and 27)."""

    block: float
    """A block keeps for its backward pass, besides the feed-forward layer."""
    inner: float
    """The same of the feed-forward layer, for each multiple of the width."""
    wide_residual: float
    """More of that where the residual stream is float32 and products are not."""
    backward: float
    """What the backward pass needs besides."""
    attention: float
    """What attention needs besides where it is computed again in the backward pass."""
    forward: float
    """What a forward pass alone needs, besides the feed-forward layer."""
    forward_inner: float
    """The same of the feed-forward layer, for each multiple of the width."""


_COMPILED_HALF = _PerFeature(
    block=17.5, inner=4.0, wide_residual=2.6, backward=16.0, attention=8.0, forward=4.7, forward_inner=4.0
)
_EAGER_SINGLE = _PerFeature(
    block=36.9, inner=12.0, wide_residual=0.0, backward=40.0, attention=0.0, forward=20.0, forward_inner=8.0
)


def memory_of_rank(
    config: PlanConfig,
    tokens: int,
    received: int,
    at_once: int,
    *,
    ranks: int,
    itemsize: int,
    process_bytes: int,
    on_cpu: bool = False,
) -> Memory:
    """Return what a rank needs.

    Parameters
    ----------
    config : PlanConfig
        Model and step.
    tokens : int
        Tokens that the rank computes at once, of one sequence: of its slice, or its part of a chunk.
    received : int
        Rows that it receives from other ranks, a layer and sequence; see `work.AttentionWork`.
    at_once : int
        Tokens that all ranks compute at once, of one sequence: all of it, or those of a chunk.
    ranks : int
        Number of ranks, which may share the optimizer state.
    itemsize : int
        Bytes of a number of matrix products.
    process_bytes : int
        What a process takes before it has any tensor.
    on_cpu : bool
        Whether the memory of the device is that of the host.
    """
    model, training = config.model, config.task == "train"
    parameters = model.parameter_count
    row_bytes = 2 * model.head_dim * itemsize * config.batch_size
    activations = int(tokens * config.batch_size * model.embed_dim * _bytes_per_feature(config, itemsize))
    keeps_rows = training and not (config.activation_checkpointing and not config.keep_attention)
    rows = received * row_bytes * (model.layers if keeps_rows else 1)
    host = 0
    if config.stream:
        wide = wide_branches(model.pattern, at_once, config.seq_len)
        carried = sum(kept_rows(model.pattern.branches[index], config.seq_len) for index in wide)
        width = model.heads * model.head_dim
        rows += carried * width * 2 * (itemsize + (4 if training else 0)) * model.layers
        if training:
            host = carried_bytes(
                model.pattern, at_once, config.seq_len,
                layers=model.layers, batch=1, heads=model.heads, head_dim=model.head_dim, itemsize=itemsize,
            )  # fmt: skip
    buffers = 2 * received * row_bytes
    shards = ranks if config.shard_optimizer else 1
    if training:
        buffers += max(0, _FLAT_BYTES * parameters + _FLAT_BYTES * parameters // shards - activations)
    copied = 4 * parameters + 8 * parameters // shards if training else 0
    return Memory(
        process=process_bytes,
        weights=(4 + (itemsize if itemsize < 4 else 0)) * parameters,
        optimizer=8 * parameters // shards if training else 0,
        gradients=4 * parameters if training else 0,
        activations=activations,
        rows=rows,
        buffers=buffers,
        checkpoint=copied if on_cpu else 0,
        host=host,
        host_checkpoint=0 if on_cpu else copied,
    )


def _bytes_per_feature(config: PlanConfig, itemsize: int) -> float:
    """Return the bytes of activations for each token and feature."""
    model, half = config.model, itemsize < 4
    per = _COMPILED_HALF if half else _EAGER_SINGLE
    wide = per.wide_residual if half and not config.half_residual else 0.0
    if config.task == "eval":
        return per.forward + per.forward_inner * model.ffn_ratio + wide / 2
    block = per.block + per.inner * model.ffn_ratio + wide
    if not config.activation_checkpointing:
        return block * model.layers + per.backward
    residual = 2.0 if half and config.half_residual else 4.0
    if config.keep_attention:
        residual += itemsize + 4 / model.head_dim
    again = 0.0 if config.keep_attention else per.attention
    return residual * model.layers + block + again + (0.0 if half else per.backward)


def chunk_that_fits(
    config: PlanConfig, memory_bytes: float, ranks: int, *, itemsize: int = 2, process_bytes: int = 1_000_000_000
) -> int:
    """Return how many tokens of a chunk a rank on a GPU is given where nobody chooses: a power of two.

    Parameters
    ----------
    config : PlanConfig
        Model and step.
    memory_bytes : float
        What a rank has.
    ranks : int
        Ranks that share a chunk.
    itemsize, process_bytes
        As for `memory_of_rank`.
    """
    chunk = SHORTEST_CHUNK
    while chunk < _LONGEST_CHUNK:
        its = memory_of_rank(
            *(config, 2 * chunk, 0, 2 * chunk * ranks), ranks=ranks, itemsize=itemsize, process_bytes=process_bytes
        )
        if its.total >= _CHUNK_SHARE * memory_bytes:
            break
        chunk *= 2
    return chunk
