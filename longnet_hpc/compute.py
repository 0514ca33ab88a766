"""Where and in what numbers a model computes: settled and checked before anything is written."""

from __future__ import annotations

import logging
import os
import resource
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Literal

import torch

from longnet_hpc.attention import choose_backend
from longnet_hpc.comm import allgather_objects
from longnet_hpc.comm.launch import Launch
from longnet_hpc.config import ComputeConfig
from longnet_hpc.errors import ConfigError, CorpusError
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.partition import Partition
from longnet_hpc.positions import POSITIONS
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.memory import SHORTEST_CHUNK, chunk_that_fits
from longnet_hpc.sequence_plan import SequencePlan
from longnet_hpc.stream import SequenceStream

__all__ = ["Compute", "memory_there"]


class Compute:
    """The device, number format and slices of this rank.

    Parameters
    ----------
    config : ComputeConfig
        What was asked for.
    launch : Launch
        This rank.
    model : LongNetConfig
        The model that will compute.
    seq_len : int
        Length of its sequences over all ranks, in tokens.

    Attributes
    ----------
    device : torch.device
        This rank's device.
    dtype : torch.dtype
        Dtype of matrix products.
    partition : Partition
        The slices of all ranks, even.
    slice_of : range
        This rank's slice, in tokens.
    compiles : bool
        Whether `torch.compile` is to make the code of the blocks.

    Raises
    ------
    PartitionError
        If there are more ranks than tokens.
    BackendError
        If the attention backend that was asked for cannot do it.
    ConfigError
        If the positions of the model do not reach this far, or its weights exceed all memory.

    Notes
    -----
    With ``config.deterministic``, torch's deterministic algorithms are on from here to the end of the process.
    """

    def __init__(self, config: ComputeConfig, launch: Launch, model: LongNetConfig, seq_len: int) -> None:
        self._launch, self._model, self._backend = launch, model, config.backend
        self.compiles = _compiles(config, model, launch.device)
        self.device = launch.device
        if config.deterministic:
            _fix_the_order_of_sums()
        self.check_memory(4)  # the weights; before anything is made in their size
        wants_half = config.dtype == "bfloat16" or (config.dtype == "auto" and self.device.type == "cuda")
        self.dtype = torch.bfloat16 if wants_half else torch.float32
        self.partition = Partition.even(seq_len, launch.size)
        self.slice_of = self.partition.slice_of(launch.rank)
        choose_backend(config.backend, self.device, self.dtype, model.head_dim)
        # No positions at all: only the length of the sequence is judged.
        POSITIONS[model.positions](0, 0, seq_len, model.head_dim, model.rotary_base, self.dtype, self.device)

    def check_vocabulary(self, corpus_vocab_size: int, remedy: str = "") -> None:
        """Raise CorpusError, ending with a remedy, if a corpus may have tokens that the model does not know."""
        if corpus_vocab_size > self._model.vocab_size:
            raise CorpusError(
                f"corpus has {corpus_vocab_size} token values, outside the vocabulary of the model "
                f"(vocab_size {self._model.vocab_size}){remedy}"
            )

    def warn_of_reach(self) -> None:
        """Say on rank 0 if the pattern is too short for any token to see the whole sequence before it."""
        seq_len, reach = self.partition.bounds[-1], max(self._model.segment_lengths)
        if self._launch.rank == 0 and seq_len > reach:
            logging.getLogger("longnet_hpc").warning(
                "warning: sequences of %s tokens are longer than the longest attention segment of the model, %s: "
                "nothing is seen from further away",
                f"{seq_len:,}",
                f"{reach:,}",
            )

    def check_memory(self, bytes_per_parameter: int) -> None:
        """Raise ConfigError if the parameters alone, with what belongs to each, exceed all memory of the device."""
        needed = self._model.parameter_count * bytes_per_parameter
        there = memory_there(self.device)
        if needed > there:
            raise ConfigError(
                f"model of {self._model.parameter_count:,} parameters needs {needed / 1e9:,.0f} GB for these alone, "
                f"{self.device.type} has {there / 1e9:,.0f} GB"
            )

    def plan(self) -> SequencePlan:
        """Agree on the slices with the other ranks. Collective."""
        return SequencePlan.build(
            self._model.pattern, len(self.slice_of), comm=self._launch.comm, backend=self._backend, device=self.device
        )

    def stream(self, seq_len: int) -> SequenceStream:
        """Return a sequence that is walked through in time."""
        return SequenceStream(
            self._model.pattern, seq_len, layers=self._model.layers,
            comm=self._launch.comm, backend=self._backend, device=self.device,
        )  # fmt: skip

    def longest_chunk(
        self,
        seq_len: int,
        task: Literal["train", "eval"],
        *,
        half_residual: bool,
        activation_checkpointing: bool = False,
        keep_attention: bool = True,
        shard_optimizer: bool = False,
    ) -> int:
        """Return how long a chunk may be over all ranks, in tokens: a power of two times the ranks, if not all.

        As `plan` chooses it, for the memory that is there. Collective: the rank with the least memory decides.
        """
        at_once, size = SHORTEST_CHUNK, self._launch.size
        if self.device.type == "cuda":
            ranks_of_it = -(-self._launch.node_size // torch.cuda.device_count())
            share = torch.cuda.get_device_properties(self.device).total_memory / ranks_of_it
            step = PlanConfig(
                model=self._model, seq_len=seq_len, ranks=(size,), stream=True, task=task, half_residual=half_residual,
                activation_checkpointing=activation_checkpointing, keep_attention=keep_attention,
                shard_optimizer=shard_optimizer,
            )  # fmt: skip
            if self.dtype != torch.float32 and not self.compiles:
                share /= 2  # without torch.compile a token needs nearly twice the memory
            at_once = chunk_that_fits(step, share, size, itemsize=self.dtype.itemsize)
        return min(seq_len, min(allgather_objects(self._launch.comm, at_once)) * size)

    def eagerly(self, wanted: bool) -> AbstractContextManager[object]:
        """Compute without `torch.compile` if ``wanted``: a graph is made for one length, and takes time to make."""
        return torch.compiler.set_stance("force_eager") if wanted and self.compiles else nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """Compute products in `dtype`; weights and sums stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def peak_memory_bytes(self) -> int:
        """Return the most memory this rank has held so far: of its GPU by tensors, or of the process, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_there(device: torch.device) -> int:
    """Return the memory of a device, in bytes: all of it, whoever uses it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fix_the_order_of_sums() -> None:
    """Let this process use deterministic algorithms alone; before its first product on a GPU."""
    # cuBLAS reads it once, for each new handle; other values of it may give other bits from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _compiles(config: ComputeConfig, model: LongNetConfig, device: torch.device) -> bool:
    if config.compile == "auto":
        return device.type == "cuda" and model.dropout == 0.0 and find_spec("triton") is not None
    return config.compile == "on"
