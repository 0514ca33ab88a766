"""The performance model: time, traffic and memory of a step on a number of ranks of a machine.

Arithmetic at the rates of the machine, exchanges by latency and rate (alpha-beta model) within and between nodes, of
which computing hides a share; the slowest rank decides. What the model leaves out: contention in the network between
nodes (`simulate` has it), noise, the file system.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from longnet_hpc.chunk import chunk_bounds
from longnet_hpc.errors import ConfigError
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.partition import Partition
from longnet_hpc.pattern import Pattern
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import Link, Machine
from longnet_hpc.scaling.memory import SHORTEST_CHUNK, Memory, chunk_that_fits, memory_of_rank
from longnet_hpc.scaling.work import AttentionWork, attention_work, ranks_to_look_at

__all__ = ["NEXT_MESSAGE", "Forecast", "LayerSeconds", "forecast", "head_seconds", "layer_seconds"]

_BUCKET_BYTES = 1 << 26
"""Largest part of a sum over ranks that is exchanged at once; see `comm.collectives`."""
NEXT_MESSAGE = 0.2
"""What each further message of an exchange costs, as a part of the latency of a link, which is that of a whole exchange
of one message: others are posted while that is under way. MPI posts a million messages a second or so."""
_PLACES_COUNTED = 1 << 15
"""About how many chunks of a stream, times heads and ranks squared, are counted one by one; beyond, evenly spaced ones
stand for all."""


@dataclass(frozen=True)
class LayerSeconds:
    """Time of one layer on one rank, of all its sequences, one pass forward and one backward."""

    blocks: float
    """Everything but attention, forward."""
    attention: float
    """Attention, forward."""
    blocks_backward: float
    """The same, backward."""
    attention_backward: float
    """The same, backward."""
    exchange: float
    """From start to end of the exchanges, forward; as long backward."""


@dataclass(frozen=True)
class Forecast:
    """What a step takes on a number of ranks; of the slowest rank, where ranks differ."""

    ranks: int
    """Number of ranks."""
    nodes: int
    """Number of nodes."""
    tokens: int
    """Of a step, over all ranks."""
    chunk_len: int | None
    """Of a stream, in tokens over all ranks."""
    seconds: float
    """Of a step."""
    compute_seconds: float
    """Arithmetic of the slowest rank."""
    attention_seconds: float
    """Of that, attention."""
    exchange_seconds: float
    """From start to end of the exchanges of attention."""
    wait_seconds: float
    """Of that, what computing does not hide."""
    gradient_seconds: float
    """Sum of the gradients over ranks."""
    input_seconds: float
    """Reading of tokens, which goes on beside."""
    efficiency: float
    """Arithmetic of all ranks, were it even and alone, over the time that they are held."""
    bytes_received: int
    """Most that a rank receives in exchanges of attention."""
    gradient_bytes: int
    """What a rank receives for the sum of the gradients."""
    memory: Memory
    """Of the rank that needs most."""
    capacity_bytes: int
    """What a rank has."""
    model_flop: int
    """Arithmetic of a step as `LongNet.flop` counts it, over all ranks."""

    @property
    def fits(self) -> bool:
        """Whether memory is enough."""
        return self.memory.total <= self.capacity_bytes

    def results(self, steps: int) -> dict[str, Any]:
        """Return the figures of a record, for a run of some steps."""
        names = (
            *("seconds", "compute_seconds", "attention_seconds", "exchange_seconds", "wait_seconds"),
            *("gradient_seconds", "input_seconds", "efficiency", "tokens", "bytes_received", "gradient_bytes"),
            *("capacity_bytes", "fits", "model_flop"),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "tokens_per_second": self.tokens / self.seconds,
            "model_flop_per_second": self.model_flop / self.seconds,
            "memory_bytes": self.memory.table(),
            "nodes": self.nodes,
            "run_seconds": self.seconds * steps,
            "node_hours": self.nodes * self.seconds * steps / 3600,
            **({} if self.chunk_len is None else {"chunk_len": self.chunk_len}),
        }


def forecast(config: PlanConfig, machine: Machine, ranks: int) -> Forecast:
    """Forecast a step.

    Parameters
    ----------
    config : PlanConfig
        Model and step.
    machine : Machine
        Where it runs.
    ranks : int
        Number of ranks, at most one a token.

    Raises
    ------
    ConfigError
        If a chunk has fewer tokens than there are ranks.
    """
    model, training = config.model, config.task == "train"
    per_node = min(ranks, config.ranks_per_node or machine.devices_per_node)
    share = max(1.0, per_node / machine.devices_per_node)
    capacity = int(machine.memory_bytes / share)
    of_machine = {"itemsize": machine.itemsize, "process_bytes": machine.process_bytes}
    at_once = config.seq_len
    if config.stream:
        of_rank = SHORTEST_CHUNK
        if config.chunk_len is None and machine.device != "cpu":
            of_rank = chunk_that_fits(config, capacity, ranks, **of_machine)
        at_once = min(at_once, config.chunk_len or ranks * of_rank)  # as `Compute.longest_chunk` chooses
        if at_once < ranks:
            raise ConfigError(f"chunk_len must be at least the number of ranks, {ranks}, got {at_once}")
    heads = model.heads, model.kv_heads or model.heads
    looked_at = ranks_to_look_at(ranks, per_node)
    works = [_work(model.pattern, *heads, config.seq_len, at_once, ranks, per_node, rank) for rank in looked_at]
    passes = _Passes.of(config, at_once)
    every = [_seconds(config, machine, work, config.seq_len / ranks, share, passes) for work in works]
    slowest = max(every, key=lambda one: one.compute + one.wait)
    fixed = machine.step_seconds + training * machine.parameter_seconds * model.parameter_count * share
    gradient_bytes = 0
    if training:
        gradient_bytes = 2 * 4 * model.parameter_count * (ranks - 1) // ranks
    gradient = _gradient_sum(machine, model.parameter_count, gradient_bytes, ranks, per_node)
    tokens = config.seq_len * config.batch_size
    reading = passes.sweeps * tokens * _token_bytes(model) / ranks * share / machine.input_bytes_per_second
    seconds = max(slowest.compute + slowest.wait + fixed + gradient, reading)
    received = max(
        _bytes_received(config, machine, work, rank, at_once, ranks)
        for rank, work in zip(looked_at, works, strict=True)
    )
    at_once_received = max(work.received for work in works) * at_once // config.seq_len
    even = math.fsum(one.compute for one in every) / len(every) + fixed
    flop = config.seq_len * (2 * model.embed_dim * model.vocab_size + model.layers * _block_flop(model))
    flop += model.layers * model.pattern.flop(config.seq_len, model.heads, model.head_dim, causal=True)
    return Forecast(
        ranks=ranks,
        nodes=-(-ranks // per_node),
        tokens=tokens,
        chunk_len=at_once if config.stream else None,
        seconds=seconds,
        compute_seconds=slowest.compute + fixed,
        attention_seconds=slowest.attention,
        exchange_seconds=slowest.exchange,
        wait_seconds=slowest.wait,
        gradient_seconds=gradient,
        input_seconds=reading,
        efficiency=even / seconds,
        bytes_received=received,
        gradient_bytes=gradient_bytes,
        memory=memory_of_rank(
            config,
            -(-at_once // ranks),
            at_once_received,
            at_once,
            ranks=ranks,
            on_cpu=machine.device == "cpu",
            **of_machine,
        ),
        capacity_bytes=capacity,
        model_flop=flop * config.batch_size * (3 if training else 1),
    )


@dataclass(frozen=True)
class _Passes:
    """How often a step computes what."""

    sweeps: float
    """Ways through the whole sequence, each with its reading; on its way there, a stream omits the last chunk."""
    forward: float
    """Forward passes of attention, with their exchanges."""
    blocks: float
    """Forward passes of everything else."""
    backward: int
    """Backward passes."""
    chunks: int
    """Into which a pass is cut; each has exchanges of its own."""

    @classmethod
    def of(cls, config: PlanConfig, at_once: int) -> _Passes:
        bounds = chunk_bounds(config.seq_len, at_once)
        chunks = len(bounds) - 1
        if config.task == "eval":
            return cls(1, 1, 1, 0, chunks)
        omitted = bounds[-2]  # start of the chunk that a stream omits on its way there
        sweeps, again = 1 + omitted / config.seq_len, int(config.activation_checkpointing)
        return cls(sweeps, sweeps + (again and not config.keep_attention), sweeps + again, 1, chunks)


@lru_cache(1 << 14)
def _work(
    pattern: Pattern, heads: int, kv_heads: int, seq_len: int, at_once: int, ranks: int, per_node: int, rank: int
) -> AttentionWork:
    """Return what a rank does in attention, over all chunks of a sequence."""
    chunks = [range(*ends) for ends in pairwise(chunk_bounds(seq_len, at_once))]
    most = max(8, _PLACES_COUNTED // (ranks * ranks * heads))
    counted = chunks[:: -(-len(chunks) // most) | 1]  # odd, so that segments, often of powers of two, take turns
    total = AttentionWork(0, 0, 0, 0, 0, 0, 0, 0, 0)
    for chunk in counted:
        slices = _slices(chunk.start, len(chunk), ranks)
        total += attention_work(pattern, slices, rank, heads, kv_heads, ranks_per_node=per_node, seq_len=seq_len)
    return total if len(counted) == len(chunks) else total.times(len(chunks), len(counted))


@lru_cache(1 << 8)
def _slices(start: int, length: int, ranks: int) -> Partition:
    """Return the slices of a chunk."""
    return Partition(tuple(start + length * rank // ranks for rank in range(ranks + 1)))


def _bytes_received(
    config: PlanConfig, machine: Machine, work: AttentionWork, rank: int, at_once: int, ranks: int
) -> int:
    """Return what a rank receives in exchanges of attention, all layers and passes."""
    model, training = config.model, config.task == "train"
    rows = work.received + work.carried
    if training:
        again = config.activation_checkpointing and not config.keep_attention
        rows += work.sent + again * work.received
        rows += work.left * 4 // machine.itemsize  # gradients summed over ranks and chunks, in float32
        if config.stream:  # the last chunk is not computed on the way there
            start = chunk_bounds(config.seq_len, at_once)[-2]
            last = _slices(start, config.seq_len - start, ranks)
            heads = model.heads, model.kv_heads or model.heads
            rows += work.received - attention_work(model.pattern, last, rank, *heads).received
    return rows * 2 * model.head_dim * machine.itemsize * config.batch_size * model.layers


@dataclass(frozen=True)
class _RankSeconds:
    """Time of all layers on one rank."""

    compute: float
    attention: float
    exchange: float
    wait: float


def _seconds(
    config: PlanConfig, machine: Machine, work: AttentionWork, tokens: float, share: float, passes: _Passes
) -> _RankSeconds:
    layers, layer = config.model.layers, layer_seconds(config, machine, work, tokens, share, passes.chunks)
    attention = passes.forward * layer.attention + passes.backward * layer.attention_backward
    blocks = passes.blocks * layer.blocks + passes.backward * layer.blocks_backward
    exchange = (passes.forward + passes.backward) * layer.exchange
    hidden = machine.overlap * (
        passes.forward * min(layer.exchange, layer.attention)
        + passes.backward * min(layer.exchange, layer.attention_backward)
    )
    head = head_seconds(config, machine, tokens, share)
    return _RankSeconds(
        layers * (attention + blocks) + head, layers * attention, layers * exchange, layers * (exchange - hidden)
    )


def layer_seconds(
    config: PlanConfig, machine: Machine, work: AttentionWork, tokens: float, share: float = 1.0, chunks: int = 1
) -> LayerSeconds:
    """Return the time of one layer on one rank.

    Parameters
    ----------
    config : PlanConfig
        Model and step.
    machine : Machine
        Where it runs.
    work : AttentionWork
        What the rank does in attention.
    tokens : float
        Tokens of the rank, of one sequence.
    share : float
        Ranks that share a device.
    chunks : int
        Chunks of a stream that this is the work of, one after the other.
    """
    model, blocks, attention = config.model, machine.blocks, machine.attention
    flop = _block_flop(model) * tokens * config.batch_size * share
    keys = work.pairs + attention.wasted_keys * work.queries
    attention_flop = 4 * keys * model.head_dim * config.batch_size * share
    row_bytes = 2 * model.head_dim * machine.itemsize * config.batch_size
    beyond = work.received + work.carried - work.received_within
    exchange = (
        _latency(machine.within, work.messages_within, chunks)
        + _latency(machine.between, work.messages - work.messages_within, chunks)
        + work.received_within * row_bytes * share / machine.within.bytes_per_second
        + beyond * row_bytes * share / machine.between.bytes_per_second
    )
    return LayerSeconds(
        blocks=flop / _at(blocks.embed_dims, blocks.forward_flop_per_second, model.embed_dim),
        blocks_backward=2 * flop / _at(blocks.embed_dims, blocks.backward_flop_per_second, model.embed_dim),
        attention=attention_flop / _at(attention.head_dims, attention.forward_flop_per_second, model.head_dim),
        attention_backward=2
        * attention_flop
        / _at(attention.head_dims, attention.backward_flop_per_second, model.head_dim),
        exchange=exchange,
    )  # fmt: skip


def head_seconds(config: PlanConfig, machine: Machine, tokens: float, share: float) -> float:
    """Return the time of the product with the vocabulary, and of the loss; a stream has them on its way back only."""
    model, blocks, training = config.model, machine.blocks, config.task == "train"
    logits = tokens * config.batch_size * model.vocab_size * share
    seconds = logits * 2 * model.embed_dim / _at(blocks.embed_dims, blocks.forward_flop_per_second, model.embed_dim)
    backward = logits * 4 * model.embed_dim / _at(blocks.embed_dims, blocks.backward_flop_per_second, model.embed_dim)
    return seconds + training * backward + logits * machine.logit_seconds * (1.0 if training else 0.5)


def _gradient_sum(machine: Machine, parameters: int, received: int, ranks: int, per_node: int) -> float:
    """Return the time of the sum over ranks: parts to their owners, and the sums back, a bucket after the other."""
    if ranks == 1 or received == 0:
        return 0.0
    smallest_node = ranks % per_node or per_node  # whose ranks have most of the others in other nodes
    beyond = received * (ranks - smallest_node) // (ranks - 1)
    link = machine.within if ranks <= per_node else machine.between
    buckets = -(-4 * parameters // _BUCKET_BYTES)
    share = max(1.0, per_node / machine.devices_per_node)
    return (
        2 * buckets * _latency(link, ranks - 1)
        + (received - beyond) * share / machine.within.bytes_per_second
        + beyond * share / machine.between.bytes_per_second
    )


def _latency(link: Link, messages: int, exchanges: int = 1) -> float:
    """Return the latency of messages, in flight together in each exchange: that of one, and of each other some more."""
    first = min(messages, exchanges)
    return link.latency_seconds * (first + NEXT_MESSAGE * (messages - first))


def _token_bytes(model: LongNetConfig) -> int:
    """Return the bytes of a token in a corpus: the narrowest of 1, 2 and 4 that has room for the vocabulary."""
    return 1 if model.vocab_size <= 1 << 8 else 2 if model.vocab_size <= 1 << 16 else 4


def _block_flop(model: LongNetConfig) -> int:
    """Return the FLOP of the matrix products of a block, for a token, forward."""
    kv_width = model.head_dim * (model.kv_heads or model.heads)
    return 2 * model.embed_dim * (2 * model.embed_dim + 2 * kv_width + 2 * model.ffn_ratio * model.embed_dim)


def _at(sizes: Sequence[int], rates: Sequence[float], size: int) -> float:
    """Return the rate at a size: between those that are known by powers, beyond them that of the nearest."""
    if size <= sizes[0]:
        return rates[0]
    for (low, at_low), (high, at_high) in pairwise(zip(sizes, rates, strict=True)):
        if size <= high:
            return math.exp(math.log(at_low) + math.log(at_high / at_low) * math.log(size / low) / math.log(high / low))
    return rates[-1]
