"""What a user can choose of forecasts, scaling runs and reports, validated once, where the values enter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, PositionalMetavarFromFieldName

from longnet_hpc.config import THIS_CALL_ONLY, ComputeConfig
from longnet_hpc.errors import ConfigError
from longnet_hpc.model_config import PRESETS, LongNetConfig, PresetName, at_least
from longnet_hpc.pattern import Pattern

__all__ = ["BenchConfig", "CalibrateConfig", "PlanConfig", "ReportConfig", "SimulateConfig"]


@dataclass(frozen=True, kw_only=True)
class _StepConfig:
    """A model and how its steps are computed."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    preset: PresetName = "tiny"
    """Model the fields below start from; replaces a config file's model."""
    model: LongNetConfig = PRESETS["tiny"]
    """Sizes, attention pattern and positions of the model."""
    geometric: tuple[int, int] | None = None
    """First w (tokens), and the ratio by which w and r grow until w reaches the sequence; replaces the pattern."""
    task: Literal["train", "eval"] = "train"
    """Steps of training, or forward passes alone."""
    batch_size: int = 1
    """Sequences in one forward and backward pass."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    keep_attention: bool = True
    """Under activation_checkpointing, keep the output of attention nevertheless."""
    half_residual: bool = False
    """Keep the residual stream in the number format of matrix products, too."""

    def _take_geometric(self, seq_len: int) -> None:
        if self.geometric is not None:
            pattern = Pattern.geometric(seq_len, *self.geometric)
            model = replace(self.model, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates)
            object.__setattr__(self, "model", model)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(_StepConfig):
    """Forecast a run before any node is asked for: does it fit, how long, how many bytes; needs neither GPU nor MPI."""

    machine: str = "h100"
    """Machine by name (plan --machine list shows them), or a TOML file that calibrate wrote."""
    ranks: tuple[int, ...] = (1,)
    """Numbers of ranks to forecast, one GPU (or core) a rank."""
    ranks_per_node: int | None = None
    """Ranks on each node; more than it has GPUs (or cores) share them. None means one each."""
    seq_len: int = 1 << 20
    """Length of a sequence over all ranks, in tokens."""
    stream: bool = False
    """Walk through every sequence chunk by chunk."""
    chunk_len: int | None = None
    """Length of a chunk of a stream over all ranks, in tokens. None means as long as memory allows."""
    shard_optimizer: bool = False
    """Keep the optimizer state in shards, one a rank."""
    steps: int = 1000
    """Length of the run, in steps; decides the node hours."""
    output: Path | None = None
    """JSON file to write, one record a number of ranks; - for standard output instead of the table."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "ranks_per_node", "seq_len", "chunk_len", "steps")
        if not self.ranks or min(self.ranks) < 1:
            raise ConfigError(f"ranks must be at least 1, got {' '.join(map(str, self.ranks)) or 'none'}")
        if max(self.ranks) > self.seq_len:
            raise ConfigError(f"ranks must be at most seq_len, {self.seq_len}, got {max(self.ranks)}")
        if self.chunk_len is not None and not self.stream:
            raise ConfigError("chunk_len belongs to a stream: give --stream, too")
        if self.stream and self.batch_size != 1:
            raise ConfigError(f"a step of a stream is one sequence: batch_size must be 1, got {self.batch_size}")
        self._take_geometric(self.seq_len)


@dataclass(frozen=True, kw_only=True)
class SimulateConfig(PlanConfig):
    """Replay a step on a simulated cluster by SimGrid's smpirun, beside the forecast of plan."""

    topology: Literal["auto", "fat-tree", "dragonfly"] = "auto"
    """Network between the nodes; auto is that of the machine."""
    keep_files: Path | None = None
    """Folder in which the platform, traces and output of smpirun are left."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(ComputeConfig):
    """Measure this machine, and write the TOML file that plan and simulate read."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    output: Path = Path("runs/machine.toml")
    """Machine file to write."""
    name: str = "measured"
    """Name of the machine in tables and reports."""
    overwrite: bool = False
    """Replace an existing machine file."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(ComputeConfig, _StepConfig):
    """Measure how runs scale over ranks, what exchanges cost, and the speed of attention and of steps."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    sweep: Literal["strong", "weak", "exchange", "attention", "step"] = "weak"
    """strong: one sequence on more and more ranks. weak: as many tokens on each. exchange: messages of growing size.
    attention, step: sequences of growing length."""
    tokens: int = 65536
    """Length of the sequence (strong), of each rank's slice (weak), or of the longest sequence (others), in tokens."""
    ranks: tuple[int, ...] | None = None
    """Numbers of ranks of the points, none above those that run. None means powers of two, and all."""
    warmup: int = 1
    """Untimed rounds of each point."""
    repeats: int = 7
    """Timed rounds of each point, of which the median counts; from 6 on its interval is one of 95% confidence."""
    interleave: bool = True
    """strong and weak take the rounds of all points in turn, so that all meet the same machine, and write at the end;
    else one point after the other, each written when it is done."""
    max_bytes: int = 1 << 26
    """Largest message of the exchange sweep, in bytes a rank."""
    output: Path = Path("runs/bench")
    """Folder of the records; points that it has of this config and machine are not measured again."""
    trace: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """File for a trace of all ranks, to be seen in Perfetto or Chrome."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size", "tokens", "repeats", "max_bytes")
        at_least(self, 0, "warmup")
        if self.ranks is not None and (not self.ranks or min(self.ranks) < 1):
            raise ConfigError(f"ranks must be at least 1, got {' '.join(map(str, self.ranks)) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make one HTML file, pictures and tables of records; measured and modelled are told apart at a glance."""

    config: Path | None = field(default=None, metadata=THIS_CALL_ONLY)
    """TOML file with any of these fields; the command line overrides it."""
    sources: Positional[PositionalMetavarFromFieldName[tuple[str, ...]]] = ()
    """Files of records (.jsonl), or folders that hold them."""
    output: Path = Path("runs/report")
    """Folder of the report: index.html, and PNG and CSV of each picture."""
    title: str = "longnet_hpc: measured and modelled"
    """Heading of the report."""
