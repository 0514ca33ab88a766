"""Training on sequences that are walked through in time: exact gradients, whose making can be left between chunks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longnet_hpc.carry import Carry
from longnet_hpc.carry_store import RowStore
from longnet_hpc.chunk import carried_bytes, chunk_bounds
from longnet_hpc.comm import agreed, all_reduce_sum, allgather_objects
from longnet_hpc.data.chunk_reader import ChunkReader
from longnet_hpc.errors import CheckpointError, StoppedError
from longnet_hpc.files import naming_errors, replace_file
from longnet_hpc.host_memory import free_host_memory
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import append_record
from longnet_hpc.stopping import StopRequest
from longnet_hpc.sweep import GradientSweep
from longnet_hpc.trace import span
from longnet_hpc.trainer import Trainer

__all__ = ["StreamTrainer"]

CHUNKS_NAME, STATE_NAME, ROWS_NAME = "chunks.jsonl", "sweep.safetensors", "rows.h5"
"""Files in the folder of a run: a line a chunk; and, where a step was left, its state and the rows of its sequence."""
_MEMORY_SHARE = 0.6
"""Share of the free memory of a node that rows may take, before they go to a file."""


class StreamTrainer(Trainer):
    """A `Trainer` whose steps are sweeps over one long sequence each; parameters as there."""

    folder: Path
    """Folder of the run."""
    stop: StopRequest
    """Of all steps of a call: what comes while weights are updated counts, too."""

    def open(self, folder: Path, stop: StopRequest) -> None:
        """Take the folder of the run for the steps of a call, and say what one will need. Collective."""
        self.folder, self.stop = folder, stop
        config, model = self.config, self.config.model
        self.chunk_len = config.chunk_len or self.compute.longest_chunk(
            config.seq_len, "train", half_residual=config.half_residual,
            activation_checkpointing=config.activation_checkpointing, keep_attention=config.keep_attention,
            shard_optimizer=config.shard_optimizer,
        )  # fmt: skip
        self.rows_bytes = carried_bytes(
            model.pattern, self.chunk_len, config.seq_len,
            layers=model.layers, batch=1, heads=model.heads, head_dim=model.head_dim,
            itemsize=self.compute.dtype.itemsize,
        )  # fmt: skip
        free = free_host_memory() / self.launch.node_size
        self.in_file = any(allgather_objects(self.launch.comm, self.rows_bytes > _MEMORY_SHARE * free))
        if self.launch.rank == 0:
            logging.getLogger("longnet_hpc").info(
                "a step walks through %s tokens in %s chunks of %s, there and back; what waits for the way back takes "
                "%s GB a rank, in %s",
                f"{config.seq_len:,}",
                f"{len(chunk_bounds(config.seq_len, self.chunk_len)) - 1:,}",
                f"{self.chunk_len:,}",
                f"{self.rows_bytes / 1e9:.2f}",
                "a file" if self.in_file else "host memory",
            )

    def accumulate(self) -> tuple[torch.Tensor, int]:
        """Sweep over one sequence; see `Trainer.accumulate`. Collective.

        Raises
        ------
        StoppedError
            If the time was over; what was done is kept in the folder of the run.
        """
        comm, compute, rank = self.launch.comm, self.compute, self.launch.rank
        stream = compute.stream(self.config.seq_len)
        rows_path = self.folder / (ROWS_NAME if rank == 0 else f"{ROWS_NAME}.{rank}")
        scratch = rows_path if self.in_file else None
        with agreed(comm), self._naming_errors():
            if self.in_file and not self._has_rows():
                rows_path.unlink(missing_ok=True)  # of a job that was killed, or of another step
            store = RowStore(stream.pattern, stream.seq_len, device=compute.device, scratch=scratch)
        sweep = GradientSweep(
            *(self.model, stream, store, chunk_bounds(stream.seq_len, self.chunk_len)),
            rank=rank,
            size=self.launch.size,
            autocast=compute.autocast,
            dropout_seed=self.config.seed + self.reader.batch_index,
        )
        with agreed(comm), self._naming_errors():
            received_before = self._load(sweep)
        (sequence,) = self.reader.sequences(self.reader.batch_index)

        def read(its: range) -> tuple[torch.Tensor, torch.Tensor]:
            with agreed(comm):
                tokens, targets = reader(its)
            return tokens, targets

        with (
            closing(store),
            ChunkReader(self.corpus, sweep.slices_left(), compute.device, sequence * stream.seq_len) as reader,
            steps_bar(rank, f"step {self.steps_done + 1}", sweep.total, sweep.done, unit="chunk") as update,
        ):
            begin, tokens = time.perf_counter(), 0
            while sweep.done < sweep.total:
                chunk, there = sweep.order[sweep.done], sweep.is_forward
                with compute.eagerly(len(chunk) < self.chunk_len):
                    sweep.advance(read)
                tokens, seconds = tokens + len(chunk), time.perf_counter() - begin
                line = {
                    "step": self.steps_done + 1, "sweep": "forward" if there else "backward",
                    "first_token": chunk.start, "tokens": len(chunk), "seconds": self.seconds_before + seconds,
                }  # fmt: skip
                with agreed(comm), self._naming_errors():
                    store.check()
                    if rank == 0:
                        append_record(self.folder / CHUNKS_NAME, line)
                update(f"{'there' if there else 'and back'}, {tokens / seconds:,.0f} tokens/s")
                self.between_chunks()
                if sweep.done < sweep.total and self.stop.asked(comm):
                    with span("checkpoint", "step that is left"):
                        self._save(sweep, self.seconds_before + seconds, received_before + stream.bytes_received)
                    raise StoppedError(
                        f"left in step {self.steps_done + 1} after {sweep.done:,} of {sweep.total:,} chunks; "
                        f"train --resume {self.folder} goes on"
                    )
        with agreed(comm), self._naming_errors():
            if rank == 0:  # those of more ranks, on which the step was begun, too
                for path in (self.folder / STATE_NAME, *self.folder.glob(f"{ROWS_NAME}*")):
                    path.unlink(missing_ok=True)
        self.reader.batch_index += 1
        return sweep.loss, received_before + stream.bytes_received

    def check_data(self) -> None:
        """Read the beginning of the next sequence, to find damage before anything is written; see `Trainer`."""
        (sequence,) = self.reader.sequences(self.reader.batch_index)
        first = sequence * self.config.seq_len
        self.corpus.read(first, first + min(self.config.seq_len, 1 << 20))

    def _naming_errors(self) -> AbstractContextManager[None]:
        return naming_errors(f"cannot write run folder {self.folder}")

    def _facts(self) -> dict[str, object]:
        return {
            "step": self.steps_done, "seq_len": self.config.seq_len, "chunk_len": self.chunk_len,
            "chunks": len(chunk_bounds(self.config.seq_len, self.chunk_len)) - 1,
            "dtype": str(self.compute.dtype).removeprefix("torch."),
        }  # fmt: skip

    def _open_state(self) -> AbstractContextManager[Any]:
        return safe_open(self.folder / STATE_NAME, "pt", str(self.compute.device))

    def _naming_damage(self) -> AbstractContextManager[None]:
        kinds = (OSError, SafetensorError, json.JSONDecodeError)
        return naming_errors(f"cannot read {self.folder / STATE_NAME}", kinds, CheckpointError)

    def _has_rows(self) -> bool:
        """Return whether the file of rows that this rank has is that of the step that was left."""
        if not (self.folder / STATE_NAME).is_file():
            return False
        with self._naming_damage(), self._open_state() as file:
            in_files = _about(file).get("in_files", [])
        return self.launch.rank < len(in_files) and bool(in_files[self.launch.rank])

    def _save(self, sweep: GradientSweep, seconds: float, received: int) -> None:
        """Keep what is needed to go on within a step: what ranks have added up is kept as its sum. Collective.

        The seconds that the step took so far, and the most bytes that a rank received, are kept, too.
        """
        comm = self.launch.comm
        tensors = {f"rows.{layer}.{index}": carry.rows[index] for layer, index, carry in _carried(sweep)}
        sums = {"loss": sweep.loss}
        for name, parameter in self.model.named_parameters():
            sums[f"gradient.{name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for layer, index, carry in _carried(sweep):
            if not sweep.is_forward:  # on ranks that have seen none of these rows so far, too
                for part, gradient in zip("kv", carry.sums_of(index), strict=True):
                    sums[f"carried.{layer}.{index}.{part}"] = gradient.total
        tensors |= {name: all_reduce_sum(comm, tensor) for name, tensor in sums.items()}
        in_files = allgather_objects(comm, self.in_file or self.launch.rank == 0)
        most = max(allgather_objects(comm, received))
        about = {"done": sweep.done, "in_files": in_files, "seconds": seconds, "bytes_received": most}
        metadata = {"longnet_hpc": json.dumps(self._facts() | about)}
        with agreed(comm), self._naming_errors():
            if self.launch.rank == 0 or self.in_file:
                sweep.store.save(self.folder / ROWS_NAME)
        # Only now, since it says that all ranks have their rows; a full disk is a SafetensorError.
        path = self.folder / STATE_NAME
        with agreed(comm), naming_errors(f"cannot write {path}", (OSError, SafetensorError)):
            if self.launch.rank == 0:
                replace_file(path, lambda partial: save_file(tensors, partial, metadata))

    def _load(self, sweep: GradientSweep) -> int:
        """Take up what `_save` kept, if anything, and return the bytes received before; on each rank for itself."""
        path = self.folder / STATE_NAME
        self.seconds_before = 0.0
        if not path.is_file():
            return 0
        with self._naming_damage(), self._open_state() as file:
            about = _about(file)
            for name, value in self._facts().items():
                if about.get(name) != value:
                    raise CheckpointError(f"step left in {path} has {name} {about.get(name)}, not {value}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        sweep.done, self.seconds_before = about["done"], about["seconds"]
        sweep.stream.position = sweep.order[sweep.done].start
        for name, rows in tensors.items():
            kind, *place = name.split(".")
            if kind == "rows":
                sweep.stream.carries[int(place[0])].rows[int(place[1])] = rows
        for layer, index, carry in _carried(sweep):
            if f"carried.{layer}.{index}.k" in tensors:
                for part, gradient in zip("kv", carry.sums_of(index), strict=True):
                    if self.launch.rank == 0:  # sums are over ranks
                        gradient.total.copy_(tensors[f"carried.{layer}.{index}.{part}"])
        if self.launch.rank == 0:
            sweep.loss.copy_(tensors["loss"])
            for name, parameter in self.model.named_parameters():
                parameter.grad = tensors[f"gradient.{name}"]
        if not (self.in_file and self._has_rows()):
            sweep.store.load(self.folder / ROWS_NAME)
        received: int = about["bytes_received"]
        return received


def _about(file: Any) -> dict[str, Any]:
    """Return the facts that an open file of `StreamTrainer` tells."""
    about: dict[str, Any] = json.loads((file.metadata() or {}).get("longnet_hpc", "{}"))
    return about


def _carried(sweep: GradientSweep) -> Iterator[tuple[int, int, Carry]]:
    """Yield each layer and branch of which something is carried."""
    for layer, carry in enumerate(sweep.stream.carries):
        for index in carry.rows:
            yield layer, index, carry
