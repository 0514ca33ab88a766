"""What a user can choose of a run, validated once, where the values enter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, PositionalMetavarFromFieldName

from longnet_hpc.errors import ConfigError
from longnet_hpc.model_config import PRESETS, LongNetConfig, PresetName, at_least
from longnet_hpc.pattern import Pattern

__all__ = [
    "OPTIMIZERS",
    "ComputeConfig",
    "EvalConfig",
    "GenerateConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "TrainConfig",
]

THIS_CALL_ONLY = {"this_call_only": True}
"""Metadata of a field that belongs to one call of the command line: not part of a config file, and not saved."""


def _finite_time(config: object, name: str) -> None:
    if not 0.0 <= getattr(config, name) < math.inf:
        raise ConfigError(f"{name} must be at least 0 and finite, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 3e-3
    """Learning rate after the warm-up, per step. Each preset has its own."""
    final_learning_rate: float = 0.1
    """Learning rate at the last step over learning_rate, 0 to 1."""
    warmup_steps: int = 10
    """Steps in which the learning rate grows linearly from 0, in steps. Each preset has its own."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients, per step, 0 to below 1."""
    beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients, per step, 0 to below 1."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices over the learning rate, per step; vectors do not decay."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient, in nats a token over parameter units; longer ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0.0 <= self.final_learning_rate <= 1.0:
            raise ConfigError(f"final_learning_rate must be 0 to 1, got {self.final_learning_rate}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        at_least(self, 0, "warmup_steps")


OPTIMIZERS: dict[str, OptimizerConfig] = {
    "tiny": OptimizerConfig(),
    "125m": OptimizerConfig(learning_rate=6e-4, warmup_steps=750),
    "350m": OptimizerConfig(learning_rate=3e-4, warmup_steps=750),
    "760m": OptimizerConfig(learning_rate=2.5e-4, warmup_steps=750),
    "2.7b": OptimizerConfig(learning_rate=1.6e-4, warmup_steps=750),
}
"""What the optimizer of each preset starts from: the larger the model, the smaller its steps."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and in what numbers a model computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of every rank: auto is the GPU of its place within the node, or the CPU where there is none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of matrix products; weights stay float32. auto is bfloat16 on CUDA, float32 on the CPU."""
    backend: str = "auto"
    """Attention backend by name; auto is the fastest that can do it."""
    transport: Literal["auto", "direct", "staged"] = "auto"
    """How GPU memory travels between ranks: by a CUDA-aware MPI (direct) or through host memory (staged)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse what lies between products and attention by torch.compile. auto: on CUDA with Triton, without dropout."""
    deterministic: bool = False
    """Give the same bits in every run on the same ranks and devices, on a GPU too, which is then slower."""
    watchdog_seconds: float = field(default=600.0, metadata=THIS_CALL_ONLY)
    """Silence of a rank after which the job is ended, in seconds; 0 means never."""

    def __post_init__(self) -> None:
        _finite_time(self, "watchdog_seconds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ComputeConfig):
    """Train a model on a corpus; every rank owns a slice of every sequence."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    resume: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """Folder of a run to go on with, from its last checkpoint, or step 0 without one; any number of ranks."""
    folder: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """Folder of this run, must not exist. None means runs/ and the time."""
    trace: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """File for a trace of all ranks, to be seen in Perfetto or Chrome; on a GPU it costs a little time."""
    stop_at: int | None = field(default=None, metadata=THIS_CALL_ONLY)
    """Step after which to save and stop early, for a job with a time limit, in steps; above those done before."""
    corpus: Path | None = None
    """Corpus file made by prepare. None means Python's standard library, less one file in twenty for evaluation."""
    read_retry_seconds: float = field(default=60.0, metadata=THIS_CALL_ONLY)
    """Time for which a read of the corpus that a shared file system refuses is tried again, in seconds; 0 is never."""
    preset: PresetName = "tiny"
    """Model and optimizer the fields below start from; replaces a config file's model, not its optimizer."""
    model: LongNetConfig = PRESETS["tiny"]
    """Sizes, attention pattern and positions of the model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    geometric: tuple[int, int] | None = None
    """First w (tokens), and the ratio by which w and r grow until w reaches seq_len; replaces the model's pattern."""
    seq_len: int = 8192
    """Length of a sequence over all ranks, in tokens."""
    batch_size: int = 1
    """Sequences in one forward and backward pass."""
    accumulation: int = 1
    """Forward and backward passes whose gradients make one step."""
    steps: int = 200
    """Length of the training, in steps."""
    seed: int = 0
    """Chooses the initial weights, the order of the sequences, and dropout; 0 to below 2**63."""
    shuffle: bool = True
    """Take the sequences in random order, anew in each epoch."""
    stream: bool = False
    """Compute a sequence chunk by chunk, there and back; all that grows with it are rows on the host of each rank."""
    chunk_len: int | None = None
    """Length of a chunk of a stream over all ranks, in tokens. None means as long as memory allows."""
    stop_after: float | None = field(default=None, metadata=THIS_CALL_ONLY)
    """Time after which a stream is left within its step, with all kept that resume needs, in seconds."""
    start_from: Path | None = None
    """Checkpoint, or folder of a run, whose weights a run without a checkpoint of its own starts from."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    keep_attention: bool = True
    """Under activation_checkpointing, keep the output of attention and its rows from other ranks nevertheless."""
    half_residual: bool = False
    """Keep the residual stream in the number format of matrix products, too: half its memory under bfloat16."""
    shard_optimizer: bool = False
    """Keep the optimizer state in shards, one a rank, in checkpoints too: the same results in less memory."""
    save_every: int = 100
    """Steps between checkpoints; there is always one at the end. They are written while the next step computes."""
    keep: int = 2
    """Number of checkpoints kept, the latest ones."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a step whose loss or gradient is not finite: stop, or leave it out and go on."""
    compare_every: int = 100
    """Steps after which all ranks compare their weights, as before each checkpoint, in steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seq_len", "batch_size", "accumulation", "steps", "save_every", "keep", "stop_at")
        at_least(self, 1, "compare_every")
        at_least(self, 1, "chunk_len")
        at_least(self, 0, "stop_after")
        _finite_time(self, "read_retry_seconds")
        if self.stream and (self.batch_size != 1 or self.accumulation != 1):
            raise ConfigError("a step of a stream is one sequence: batch_size and accumulation must be 1")
        if not self.stream and (self.chunk_len is not None or self.stop_after is not None):
            raise ConfigError("chunk_len and stop_after belong to a stream: give --stream, too")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be 0 to {2**63 - 1}, got {self.seed}")
        if self.compile == "on" and self.model.dropout > 0.0:
            raise ConfigError(f"compile must be auto or off with dropout, got on with dropout {self.model.dropout}")
        if self.geometric is not None:
            pattern = Pattern.geometric(self.seq_len, *self.geometric)
            model = replace(self.model, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates)
            object.__setattr__(self, "model", model)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into a corpus file (HDF5); every rank reads its share."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    sources: Positional[PositionalMetavarFromFieldName[tuple[str, ...]]] = ()
    """Files, folders, globs, .gz, .xz and .tar archives, - for standard input. None: Python's standard library."""
    output: Path = Path("runs/corpus/corpus.h5")
    """Corpus file to write."""
    tokenizer: str = "bytes"
    """bytes (256 token values), or a JSON file of the Hugging Face tokenizers package."""
    chunk_tokens: int = 1 << 20
    """Tokens under one checksum."""
    overwrite: bool = False
    """Replace an existing corpus file."""

    def __post_init__(self) -> None:
        at_least(self, 1, "chunk_tokens")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ComputeConfig):
    """Measure loss, perplexity and bits per byte of a corpus, and the loss by how much context was available."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    checkpoint: Path | None = None
    """Checkpoint file, or the folder of a run for its latest one."""
    corpus: Path | None = None
    """Corpus file (HDF5, made by prepare). None means the part of the standard library that train leaves out."""
    read_retry_seconds: float = field(default=60.0, metadata=THIS_CALL_ONLY)
    """Time for which a read of the corpus that a shared file system refuses is tried again, in seconds; 0 is never."""
    seq_len: int | None = None
    """Length of a sequence over all ranks, in tokens. None means that of training; of a stream, the whole corpus."""
    stream: bool = False
    """Take the corpus as one sequence, computed chunk by chunk: memory does not grow with its length."""
    chunk_len: int | None = None
    """Length of a chunk of a stream over all ranks, in tokens. None means as long as memory allows."""
    stop_after: float | None = field(default=None, metadata=THIS_CALL_ONLY)
    """Time after which a stream is left with its state kept; the same command goes on. In seconds."""
    half_residual: bool = False
    """Keep the residual stream in the number format of matrix products, too: half its memory under bfloat16."""
    batch_size: int = 1
    """Sequences in one forward pass."""
    max_batches: int | None = None
    """Number of batches that are evaluated, from the start of the corpus. None means all."""
    trace: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """File for a trace of all ranks, to be seen in Perfetto or Chrome; on a GPU it costs a little time."""
    output: Path | None = None
    """Folder of the results, replaced if it has any. None means one near the checkpoint, after corpus and step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seq_len", "chunk_len", "batch_size", "max_batches")
        at_least(self, 0, "stop_after")
        _finite_time(self, "read_retry_seconds")
        if self.stream and (self.batch_size != 1 or self.max_batches is not None):
            raise ConfigError("a stream is one sequence: batch_size and max_batches have no say, give seq_len")
        if not self.stream and (self.chunk_len is not None or self.stop_after is not None):
            raise ConfigError("chunk_len and stop_after belong to a stream: give --stream, too")
        if not self.stream and self.compile == "on":
            raise ConfigError("compile cannot be on, only a stream is compiled: give --stream, too")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ComputeConfig):
    """Go on with a text by a trained model; the text that is made goes to standard output."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    checkpoint: Path | None = None
    """Checkpoint file, or the folder of a run for its latest one."""
    prompt: str | None = None
    """Text to go on with; this or prompt_file."""
    prompt_file: Path | None = None
    """File to go on with, of any length (also .gz, .xz); - for standard input."""
    tokenizer: str | None = None
    """bytes, a JSON file of the tokenizers package, or a corpus (.h5) made by it. None: bytes, for 256 token values."""
    max_new_tokens: int = 256
    """Length of the text that is made, in tokens."""
    samples: int = 1
    """Number of texts that are made side by side, and shown one after the other."""
    temperature: float = 0.0
    """Divisor of the logits before a token is drawn. 0 takes the most probable token."""
    top_k: int | None = None
    """Number of tokens to draw from, the most probable ones. None means all."""
    top_p: float | None = None
    """Probability to draw from: of the fewest tokens that together have it, above 0 to 1. None means all."""
    seed: int = 0
    """Chooses what is drawn; 0 to below 2**63."""
    chunk_len: int = 8192
    """Length of the pieces in which the prompt is read, in tokens: longer ones take more memory, shorter more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens", "samples", "top_k", "chunk_len")
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("top_k and top_p choose what is drawn: give a temperature above 0, too")
        if self.compile == "on":
            raise ConfigError("compile must be auto or off: tokens one by one are not compiled")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be 0 to {2**63 - 1}, got {self.seed}")
