"""``calibrate``: measure what the performance model has to know of a machine, and write it as a TOML file.

Parts of a step are measured by themselves, on shapes of their own: a block without attention, attention without a
block, the loss, the update, messages between ranks. Ranks measure at once, as they compute at once in a run; of those
that share a device the first measures, and the others rest, since what a share of it is worth depends on the moment.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from longnet_hpc.block import Block
from longnet_hpc.comm import agreed, allgather_objects, barrier
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute, memory_there
from longnet_hpc.config import OptimizerConfig
from longnet_hpc.config_file import write_toml
from longnet_hpc.cross_entropy import cross_entropy
from longnet_hpc.data import Corpus, prepare
from longnet_hpc.errors import ConfigError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.model import LongNet
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.optimizer import Optimizer
from longnet_hpc.partition import Partition
from longnet_hpc.pattern import Pattern
from longnet_hpc.positions import POSITIONS
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import where
from longnet_hpc.scaling.config import CalibrateConfig
from longnet_hpc.scaling.links import measure_links
from longnet_hpc.scaling.machine import Attention, Blocks, Machine
from longnet_hpc.scaling.rounds import rest_until_all
from longnet_hpc.scaling.work import attention_work
from longnet_hpc.sequence_plan import SequencePlan

if TYPE_CHECKING:
    from mpi4py import MPI

    from longnet_hpc.positions import Rotation

__all__ = ["calibrate"]

_LONG, _SHORT = (Pattern.from_lists([w, 4 * w], [1, 4]) for w in (2048, 128))
"""Segments over which attention has its usual speed, and such short ones that what queries cost besides counts."""
_VOCAB_SIZE = 256
_QUIET = 0.25
"""How far times of the same work may differ, relatively, on a machine that does nothing else."""


@dataclass(frozen=True)
class Sizes:
    """Shapes that are measured: such as fill a device, and take a minute or two in all."""

    embed_dims: tuple[int, ...]
    head_dims: tuple[int, ...]
    block_tokens: int
    attention_tokens: int
    attention_heads: int
    logit_tokens: int
    repeats: int


SIZES = {
    "cuda": Sizes((256, 512, 768, 1024, 2048), (64, 128), 1 << 18, 1 << 20, 8, 1 << 19, 7),
    "cpu": Sizes((64, 128, 256, 512, 1024), (16, 32, 64, 128), 1 << 12, 1 << 13, 4, 1 << 13, 5),
}
"""By the kind of device."""
_MEMORY_OF_SIZES = 70e9
"""Bytes of a GPU that those are made for; with less, there are fewer tokens."""


def _sizes_for(device: torch.device) -> Sizes:
    """Return the shapes for a device: fewer tokens where a GPU has less memory than those are made for."""
    sizes = SIZES[device.type]
    share = min(1.0, memory_there(device) / _MEMORY_OF_SIZES)
    if device.type != "cuda" or share == 1.0:
        return sizes
    return replace(
        sizes,
        block_tokens=max(1 << 15, int(sizes.block_tokens * share)),
        attention_tokens=max(1 << 15, int(sizes.attention_tokens * share)),
        logit_tokens=max(1 << 15, int(sizes.logit_tokens * share)),
    )


def calibrate(config: CalibrateConfig, launch: Launch) -> Machine:
    """Measure this machine, and write what came out to ``config.output``. Collective.

    Raises
    ------
    ConfigError
        If the file exists and is not to be replaced.
    OSError
        If it cannot be written.
    """
    with agreed(launch.comm):
        if config.output.exists() and not config.overwrite:
            raise ConfigError(f"machine file {config.output} exists; give --overwrite, or another --output")
    on_gpu = launch.device.type == "cuda"
    count = torch.cuda.device_count() if on_gpu else os.cpu_count() or 1
    process_bytes = _bytes_taken(launch)
    with _measuring(launch, launch.node_rank < count) as comm:
        bench = _Bench(config, launch, comm, measures=launch.node_rank < count)
        embed_dims, head_dims = bench.sizes.embed_dims, bench.sizes.head_dims
        rates: list[tuple[float, float]] = []
        with steps_bar(launch.rank, "calibrate", len(embed_dims) + len(head_dims) + 3, unit="measurement") as update:
            for embed_dim in embed_dims:
                rates.append(bench.block_rates(embed_dim))
                update(f"blocks of width {embed_dim}: {rates[-1][0] / 1e9:,.1f} GFLOP/s")
            seconds = []
            for head_dim in head_dims:
                seconds.append(bench.attention_seconds(head_dim))
                update(f"attention of head_dim {head_dim}: {seconds[-1].long_forward * 1e3:,.1f} ms")
            attention = bench.attention(head_dims, seconds)
            blocks = Blocks(embed_dims, tuple(r[0] for r in rates), tuple(r[1] for r in rates))
            logit_seconds = bench.logit_seconds(blocks)
            parameter_seconds, step_seconds = bench.update_seconds()
            update(f"an update: {parameter_seconds * 1e9:.3g} ns a parameter")
            links = measure_links(launch)
            update(f"messages: {links.within.bytes_per_second / 1e9:.3g} GB/s")
            reading = bench.reading_rate()
            update(f"reading: {reading / 1e9:.3g} GB/s")
    place = where(launch)
    memory = (
        torch.cuda.get_device_properties(launch.device).total_memory
        if on_gpu
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    )
    machine = Machine(
        name=config.name,
        source=f"calibrate on {place['gpu'] or place['cpu']}, {launch.size} ranks at once, {place['mpi_library']}, "
        f"torch {torch.__version__}{links.remark}",
        numbers="estimated" if links.remark else "measured",
        device="cuda" if on_gpu else "cpu",
        devices_per_node=count,
        memory_bytes=memory,
        process_bytes=process_bytes,
        blocks=blocks,
        attention=attention,
        logit_seconds=logit_seconds,
        parameter_seconds=parameter_seconds,
        step_seconds=step_seconds,
        within=links.within,
        between=links.between,
        overlap=links.overlap,
        input_bytes_per_second=reading,
    )
    if launch.node_size > count:
        machine = _unshared(machine, launch.node_size / count)
    with agreed(launch.comm), naming_errors(f"cannot write machine file {config.output}"):
        if launch.rank == 0:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            heading = "A machine as calibrate found it; plan --machine reads it."
            replace_file(config.output, lambda partial: write_toml(partial, machine, heading))
    if launch.rank == 0:
        if bench.spread > _QUIET:
            logging.getLogger("longnet_hpc").warning(
                "warning: times of the same work differed by up to %s%%: if other programs run here, calibrate again",
                round(100 * bench.spread),
            )
        logging.getLogger("longnet_hpc").info("%s: plan --machine %s forecasts runs here", config.output, config.output)
    return machine


def _unshared(machine: Machine, share: float) -> Machine:
    """Return a machine as one rank alone would find it where some share a device: memory, messages and reading."""
    return replace(
        machine,
        process_bytes=int(machine.process_bytes / share) if machine.device == "cuda" else machine.process_bytes,
        within=replace(machine.within, bytes_per_second=share * machine.within.bytes_per_second),
        between=replace(machine.between, bytes_per_second=share * machine.between.bytes_per_second),
        input_bytes_per_second=share * machine.input_bytes_per_second,
    )


@contextmanager
def _measuring(launch: Launch, measures: bool) -> Iterator[MPI.Comm | None]:
    """Yield a communicator of the ranks that measure; None on the others, and without MPI. Collective."""
    if launch.comm is None:
        yield None
        return
    from mpi4py import MPI

    comm = launch.comm.Split(0 if measures else MPI.UNDEFINED, key=launch.rank)
    try:
        yield comm if measures else None
    finally:
        if measures:
            comm.Free()


def _bytes_taken(launch: Launch) -> int:
    """Return the memory that is taken before there are tensors: by this process, or on a GPU by all that share it."""
    if launch.device.type == "cuda":
        torch.zeros(1, device=launch.device)
        barrier(launch.comm)
        free, total = torch.cuda.mem_get_info(launch.device)
        return total - free
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class _AttentionSeconds(NamedTuple):
    """Times of attention over long and over short segments; ``both`` ways is with the gradient."""

    long_forward: float
    long_both: float
    short_forward: float
    short_both: float


class _NoAttention:
    """Takes the place of a plan, so that a block is timed without its attention."""

    start = 0

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softmax_scale: float | None = None
    ) -> torch.Tensor:
        """Return something that depends on all three."""
        return q + k + v


class _Bench:
    """Measures parts of a step; every figure is of the slowest rank."""

    def __init__(self, config: CalibrateConfig, launch: Launch, comm: MPI.Comm | None, *, measures: bool) -> None:
        self.launch, self.device, self.comm, self.measures = launch, launch.device, comm, measures
        self.on_gpu = self.device.type == "cuda"
        self.compute = Compute(config, launch, LongNetConfig(embed_dim=64, heads=1, layers=1), 1 << 15)
        self.sizes = _sizes_for(self.device)
        self.spread = 0.0

    def seconds(self, *functions: Callable[[], object]) -> list[float]:
        """Return the median time of each function, on the rank where that is longest; they take turns. Collective."""
        times: list[list[float]] = [[] for _ in functions]
        rest_until_all(self.launch)  # what a rank that rests has begun on its device is done
        for repeat in range(self.sizes.repeats + 2 if self.measures else 0):
            for function, its in zip(functions, times, strict=True):
                barrier(self.comm)
                self._wait()
                begin = time.perf_counter()
                function()
                self._wait()
                if repeat >= 2:
                    its.append(time.perf_counter() - begin)
        rest_until_all(self.launch)
        answers = [its for its in allgather_objects(self.launch.comm, times) if its[0]]
        for its in (its for of_rank in answers for its in of_rank):
            self.spread = max(self.spread, (max(its) - min(its)) / statistics.median(its))
        return [max(map(statistics.median, of_function)) for of_function in zip(*answers, strict=True)]

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def block_rates(self, embed_dim: int) -> tuple[float, float]:
        """Return the rates of a block without attention, forward and backward, in FLOP/s."""
        head_dim = min(64, embed_dim // 2)
        tokens = self.sizes.block_tokens
        config = LongNetConfig(layers=1, embed_dim=embed_dim, heads=embed_dim // head_dim)
        block = Block(config, 0).to(self.device)
        if self.compute.compiles:
            torch.compiler.reset()  # torch keeps so many graphs of one code, and each width has its own
            block.compile(fullgraph=True, dynamic=False)
        rotation = self._rotation(tokens, head_dim)
        plan = _NoAttention()
        x = torch.randn(1, tokens, embed_dim, device=self.device, dtype=self.compute.dtype)
        forward, both = self._both_ways(lambda x: block(x, plan, rotation, 0), x)
        flop = 2 * tokens * sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
        return flop / forward, 2 * flop / (both - forward)

    def attention_seconds(self, head_dim: int) -> _AttentionSeconds:
        """Return the times of attention over long and over short segments."""
        return _AttentionSeconds(
            *self._both_ways(*self._attention(_LONG, head_dim)), *self._both_ways(*self._attention(_SHORT, head_dim))
        )

    def attention(self, head_dims: Sequence[int], seconds: Sequence[_AttentionSeconds]) -> Attention:
        """Return rates, and what queries cost besides, that explain the times of long and of short segments."""
        (long_pairs, long_queries), (short_pairs, short_queries) = self._work(_LONG), self._work(_SHORT)
        wasted = []
        for one in seconds:
            ratio = one.long_forward / one.short_forward  # (long_pairs + x long_queries) / (short_pairs + x short...)
            wasted.append((ratio * short_pairs - long_pairs) / (long_queries - ratio * short_queries))
        waste = max(0.0, statistics.median(wasted))
        keys = long_pairs + waste * long_queries
        return Attention(
            tuple(head_dims),
            tuple(4 * keys * d / one.long_forward for d, one in zip(head_dims, seconds, strict=True)),
            tuple(8 * keys * d / (one.long_both - one.long_forward) for d, one in zip(head_dims, seconds, strict=True)),
            waste,
        )

    def _work(self, pattern: Pattern) -> tuple[int, int]:
        tokens, heads = self.sizes.attention_tokens, self.sizes.attention_heads
        work = attention_work(pattern, Partition.even(tokens, 1), 0, heads, heads)
        return work.pairs, work.queries

    def _attention(
        self, pattern: Pattern, head_dim: int
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        tokens, heads = self.sizes.attention_tokens, self.sizes.attention_heads
        plan = SequencePlan.build(pattern, tokens, device=self.device)
        x = torch.randn(1, tokens, heads, 3 * head_dim, device=self.device, dtype=self.compute.dtype)

        def attend(x: torch.Tensor) -> torch.Tensor:
            return plan.attention(*x.split(head_dim, dim=3), causal=True)

        return attend, x

    def _both_ways(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[float, float]:
        """Return the time of a function, and of it with its gradient."""
        x.requires_grad_()
        if self.measures:  # the memory of a device that ranks share is for the one that measures
            with self.compute.autocast():
                dout = torch.ones_like(function(x))

        def forward() -> None:
            with torch.no_grad(), self.compute.autocast():
                function(x)

        def both() -> None:
            with self.compute.autocast():
                out = function(x)
            out.backward(dout)

        forward_seconds, both_seconds = self.seconds(forward, both)
        return forward_seconds, max(both_seconds, 1.1 * forward_seconds)  # a noisy machine must not give nonsense

    def logit_seconds(self, blocks: Blocks) -> float:
        """Return the time of the loss and its gradient, for a logit, besides the products at the rate of blocks."""
        index = len(blocks.embed_dims) // 2
        embed_dim, tokens = blocks.embed_dims[index], self.sizes.logit_tokens
        model = LongNet(LongNetConfig(layers=1, embed_dim=embed_dim, heads=2, vocab_size=_VOCAB_SIZE)).to(self.device)
        hidden = torch.randn(1, tokens, embed_dim, device=self.device, dtype=self.compute.dtype, requires_grad=True)
        targets = torch.randint(0, _VOCAB_SIZE, (1, tokens), device=self.device)

        def both() -> None:
            with self.compute.autocast():
                loss = cross_entropy(hidden, model.head.weight, targets)
            loss.backward()

        logits = tokens * _VOCAB_SIZE
        rates = blocks.forward_flop_per_second[index], blocks.backward_flop_per_second[index]
        products = logits * embed_dim * (2 / rates[0] + 4 / rates[1])
        return max(0.0, self.seconds(both)[0] - products) / logits

    def update_seconds(self) -> tuple[float, float]:
        """Return the time of an update for a parameter, and what a step takes however small."""
        updates, counts = [], []
        for layers in (1, 4):
            config = LongNetConfig(layers=layers, embed_dim=512, heads=8)
            model = LongNet(config).to(self.device)
            optimizer = Optimizer(model, OptimizerConfig())
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in model.parameters()]

            def update(
                model: LongNet = model,
                optimizer: Optimizer = optimizer,
                gradients: list[torch.Tensor | None] = gradients,
            ) -> None:
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step(optimizer.flat_gradient(), 1e-3)

            updates.append(update)
            counts.append(model.parameter_count)
        seconds = self.seconds(*updates)
        per_parameter = max(0.0, (seconds[1] - seconds[0]) / (counts[1] - counts[0]))
        return per_parameter, max(0.0, seconds[0] - per_parameter * counts[0])

    def reading_rate(self) -> float:
        """Return the rate at which a rank reads a file of tokens that the system has in memory, in bytes a second."""
        count = 1 << 24
        seconds = math.nan
        with agreed(self.launch.comm), tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            text.write_bytes(bytes(range(32, 96)) * (count // 64))
            with Corpus(prepare([text], Path(folder) / "corpus.h5")) as corpus:
                begin = time.perf_counter()
                corpus.read(0, count)
                seconds = time.perf_counter() - begin
        return count / max(allgather_objects(self.launch.comm, seconds))

    def _rotation(self, tokens: int, head_dim: int) -> Rotation:
        return POSITIONS["rotary"](0, tokens, tokens, head_dim, 10000.0, self.compute.dtype, self.device)
