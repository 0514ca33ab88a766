"""Evaluation of a whole corpus as one causal sequence, that can be left and gone on with between chunks."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longnet_hpc.chunk import chunk_bounds
from longnet_hpc.comm import agreed, all_reduce_sum, allgather_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.config import EvalConfig
from longnet_hpc.data.chunk_reader import ChunkReader
from longnet_hpc.errors import CheckpointError, StoppedError
from longnet_hpc.evaluate import Subject
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import append_record, read_records
from longnet_hpc.stopping import StopRequest
from longnet_hpc.sweep import slice_of_chunk
from longnet_hpc.trace import span

__all__ = ["CHUNKS_NAME", "STATE_NAME", "Streamed", "sum_stream"]

CHUNKS_NAME, STATE_NAME = "chunks.jsonl", "stream.safetensors"
"""Files in the folder of an evaluation: a line a chunk; and, where it was left, the state to go on with."""


@dataclass(frozen=True)
class Streamed:
    """What came out of a stream."""

    by_position: torch.Tensor
    """Tokens, summed losses and summed squares, by the binary logarithm of the position from 1 on."""
    by_context: torch.Tensor
    """The same by the tokens since the start of the widest segment, which is the context that was available."""
    chunk_len: int
    """Tokens of a chunk over all ranks."""
    seconds: float
    """Time of all calls."""
    seconds_stalled: float
    """Most time of this call that any rank waited for tokens."""
    flop: int
    """Arithmetic of all tokens, over all ranks; see `LongNet.flop`."""
    peak_memory_bytes: int
    """Most memory of any rank: of its GPU by tensors, or of its process."""
    bytes_received: int
    """Most bytes that any rank received in this call."""

    def results(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "chunk_len": self.chunk_len,
            "seconds": self.seconds,
            "seconds_stalled": self.seconds_stalled,
            "model_flop": self.flop,
            "model_flop_per_second": self.flop / self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "bytes_received": self.bytes_received,
        }


class _Totals:
    """Sums over tokens, by the binary logarithm of something that grows by one from token to token."""

    def __init__(self, largest: int, device: torch.device) -> None:
        self.sums = torch.zeros((3, largest.bit_length() + 1), dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, first: int) -> None:
        """Add losses of tokens that are number ``first`` and so on, from 1."""
        start = 0
        while start < len(losses):
            place = (first + start - 1).bit_length()  # of numbers above 2 ** (place - 1) and up to 2 ** place
            stop = min(len(losses), 2**place - first + 1)
            some = losses[start:stop].double()
            self.sums[0, place] += stop - start
            self.sums[1, place] += some.sum()
            self.sums[2, place] += some.square().sum()
            start = stop


def sum_stream(config: EvalConfig, launch: Launch, subject: Subject) -> Streamed:
    """Evaluate one sequence, leaving a line a chunk in the folder of the results. Collective.

    Raises
    ------
    StoppedError
        If the time was over; what was done is kept.
    LongNetError or OSError
        If something cannot be read or written; the same on all ranks.
    """
    with StopRequest(config.stop_after) as stop:
        return _Evaluation(config, launch, subject).run(stop)


class _Evaluation:
    """A sequence that is walked through, and its sums so far."""

    def __init__(self, config: EvalConfig, launch: Launch, subject: Subject) -> None:
        self.launch, self.subject, self.model = launch, subject, subject.model
        compute, self.seq_len = subject.compute, subject.seq_len
        if compute.compiles:
            self.model.compile_blocks()
        self.chunk_len = config.chunk_len or compute.longest_chunk(
            self.seq_len, "eval", half_residual=config.half_residual
        )
        self.stream = compute.stream(self.seq_len)
        self.by_position, self.by_context = (_Totals(self.seq_len, compute.device) for _ in range(2))
        self.widest = max(self.model.config.segment_lengths)
        self.seconds_before, self.received_before = 0.0, 0
        self.facts = {
            "weights": subject.checkpoint.digest, "chunk_len": self.chunk_len, **subject.order.facts(),
            "dtype": str(compute.dtype).removeprefix("torch."), "half_residual": config.half_residual,
        }  # fmt: skip
        with agreed(launch.comm), self._naming_errors():
            self._load()
        with agreed(launch.comm), self._naming_errors():
            if launch.rank == 0:
                subject.folder.mkdir(parents=True, exist_ok=True)
                self._keep_lines()

    def run(self, stop: StopRequest) -> Streamed:
        """Do all chunks that are left."""
        launch, compute, first_token = self.launch, self.subject.compute, self.stream.position
        bounds = chunk_bounds(self.seq_len, self.chunk_len)
        done, total = bounds.index(first_token), len(bounds) - 1
        slices = [slice_of_chunk(range(*ends), launch.rank, launch.size) for ends in pairwise(bounds)][done:]
        if launch.rank == 0:
            logging.getLogger("longnet_hpc").info(
                "one sequence of %s tokens in %s chunks of %s, from chunk %s",
                *(f"{number:,}" for number in (self.seq_len, total, self.chunk_len, done + 1)),
            )
        begin = time.perf_counter()
        untold: deque[tuple[range, torch.Tensor]] = deque()

        def tell() -> None:
            chunk, loss = untold.popleft()
            mean = math.fsum(allgather_objects(launch.comm, float(loss))) / len(chunk)
            seconds = time.perf_counter() - begin
            line = {"first_token": chunk.start, "tokens": len(chunk), "loss": mean}
            with agreed(launch.comm), self._naming_errors():
                if launch.rank == 0:
                    line["seconds"] = self.seconds_before + seconds
                    append_record(self.subject.folder / CHUNKS_NAME, line)
            update(f"loss {mean:.3f}, {(chunk.stop - first_token) / seconds:,.0f} tokens/s")

        with (
            ChunkReader(self.subject.corpus, slices, compute.device) as reader,
            steps_bar(launch.rank, "eval", total, done, unit="chunk") as update,
        ):
            for its, ends in zip(slices, [*pairwise(bounds)][done:], strict=True):
                with agreed(launch.comm):
                    tokens, targets = reader(its)
                chunk = range(*ends)
                usual = len(chunk) == self.chunk_len
                untold.append((chunk, self._chunk(its, tokens, targets, compiled=usual)))
                if len(untold) > 1:  # a GPU has the next chunk to do while the host looks at the one before
                    tell()
                if stop.asked(launch.comm):
                    break
            tell()
        seconds = self.seconds_before + time.perf_counter() - begin
        if self.stream.position < self.seq_len:
            self._save(seconds)
            raise StoppedError(
                f"left at token {self.stream.position:,} of {self.seq_len:,} after {seconds:,.0f} s; "
                "the same command goes on"
            )
        with agreed(launch.comm), self._naming_errors():
            if launch.rank == 0:
                (self.subject.folder / STATE_NAME).unlink(missing_ok=True)
        self.stream.settle()
        answers = allgather_objects(
            launch.comm, (reader.seconds_stalled, compute.peak_memory_bytes(), self.stream.bytes_received)
        )
        stalled, memory, received = (max(values) for values in zip(*answers, strict=True))
        return Streamed(
            by_position=all_reduce_sum(launch.comm, self.by_position.sums).cpu(),
            by_context=all_reduce_sum(launch.comm, self.by_context.sums).cpu(),
            chunk_len=self.chunk_len,
            seconds=seconds,
            seconds_stalled=stalled,
            flop=self.model.flop(1, self.seq_len, training=False),
            peak_memory_bytes=memory,
            bytes_received=self.received_before + received,
        )

    def _chunk(self, its: range, tokens: torch.Tensor, targets: torch.Tensor, *, compiled: bool) -> torch.Tensor:
        """Compute this rank's slice of a chunk, add up its losses, and return their sum, on the device."""
        compute = self.subject.compute
        with (
            self.stream.next_chunk(len(its)) as plan,
            compute.eagerly(not compiled),
            compute.autocast(),
            span("compute", "forward"),
        ):
            losses = self.model.token_losses(tokens, targets, plan)[0]
        self.by_position.add(losses, its.start + 1)
        start = its.start
        while start < its.stop:  # up to the next segment of the widest branch, where all context ends
            stop = min(its.stop, start - start % self.widest + self.widest)
            self.by_context.add(losses[start - its.start : stop - its.start], start % self.widest + 1)
            start = stop
        return losses.sum(dtype=torch.float64)

    def _naming_errors(self) -> AbstractContextManager[None]:
        return naming_errors(f"cannot write results to {self.subject.folder}")

    def _save(self, seconds: float) -> None:
        """Keep what is needed to go on. Collective."""
        self.stream.settle()
        tensors = {f"rows.{layer}.{index}": rows.contiguous() for layer, index, rows in self._rows()}
        for name, totals in self._totals().items():
            tensors[name] = all_reduce_sum(self.launch.comm, totals.sums)
        most = self.received_before + max(allgather_objects(self.launch.comm, self.stream.bytes_received))
        about = {**self.facts, "position": self.stream.position, "seconds": seconds, "bytes_received": most}
        metadata = {"longnet_hpc": json.dumps(about)}
        path = self.subject.folder / STATE_NAME
        kinds = (OSError, SafetensorError)  # a full disk is either
        with agreed(self.launch.comm), naming_errors(f"cannot write {path}", kinds):
            if self.launch.rank == 0:
                replace_file(path, lambda partial: save_file(tensors, partial, metadata))

    def _keep_lines(self) -> None:
        """Keep the lines of chunks that are done; a job that was killed may have written more."""
        path = self.subject.folder / CHUNKS_NAME
        if not path.is_file():
            return
        lines = [line for line in read_records(path) if line["first_token"] < self.stream.position]
        replace_file(path, lambda partial: partial.write_text("".join(json.dumps(line) + "\n" for line in lines)))

    def _load(self) -> None:
        """Take up what `_save` kept, if it is of this evaluation; on each rank for itself."""
        path, device = self.subject.folder / STATE_NAME, self.subject.compute.device
        if not path.is_file():
            return
        kinds = (OSError, SafetensorError, json.JSONDecodeError)
        with naming_errors(f"cannot read {path}", kinds, CheckpointError), safe_open(path, "pt", str(device)) as file:
            about = json.loads((file.metadata() or {}).get("longnet_hpc", "{}"))
            others = {name: about.get(name) for name, value in self.facts.items() if about.get(name) != value}
            if others:
                if self.launch.rank == 0:
                    differences = "; ".join(f"{name} {its}, not {self.facts[name]}" for name, its in others.items())
                    logging.getLogger("longnet_hpc").warning(
                        "warning: %s is of another evaluation (%s): this one starts anew", path, differences
                    )
                return
            for name in file.keys():  # noqa: SIM118 - not a mapping
                kind, *place = name.split(".")
                if kind == "rows":
                    self.stream.carries[int(place[0])].rows[int(place[1])] = file.get_tensor(name)
            if self.launch.rank == 0:  # sums are over ranks
                for name, totals in self._totals().items():
                    totals.sums.copy_(file.get_tensor(name))
        self.stream.position, self.seconds_before = about["position"], about["seconds"]
        self.received_before = about["bytes_received"]

    def _rows(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        for layer, carry in enumerate(self.stream.carries):
            for index, rows in carry.rows.items():
                yield layer, index, rows

    def _totals(self) -> dict[str, _Totals]:
        return {"by_position": self.by_position, "by_context": self.by_context}
