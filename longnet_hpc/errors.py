"""Errors a user can cause, each named for the boundary where it is noticed.

Every class derives from `LongNetError`, which is a `ValueError`; its message is one line that names the value and the
limit. `longnet_hpc.run` prints that line on rank 0 and exits with code 2.
"""

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "LaunchError",
    "LongNetError",
    "NonFiniteError",
    "PartitionError",
    "PatternError",
    "RanksDifferError",
    "ShapeError",
    "StoppedError",
]


class LongNetError(ValueError):
    """Base of all errors that a user's input can cause."""


class PatternError(LongNetError):
    """A pattern of dilated attention that cannot exist: w < 1, r < 1, lists of unequal length."""


class PartitionError(LongNetError):
    """Slices of a sequence that do not fit together, or more ranks than tokens."""


class ShapeError(LongNetError):
    """Tensors whose shapes, dtypes or devices do not fit together, on one rank or between ranks."""


class BackendError(LongNetError):
    """An attention backend that does not exist or cannot compute what was asked of it."""


class ConfigError(LongNetError):
    """A configuration value that is unknown, of the wrong type, or outside its limits."""


class CorpusError(LongNetError):
    """A corpus file that is missing, foreign, damaged, or too small for what was asked of it."""


class CheckpointError(LongNetError):
    """A checkpoint that is missing, damaged, or of another model."""


class NonFiniteError(LongNetError):
    """A training whose loss or gradient is not finite."""


class RanksDifferError(LongNetError):
    """Ranks that hold different weights: something flipped bits."""


class LaunchError(LongNetError):
    """A launcher and an MPI library that do not fit together."""


class StoppedError(LongNetError):
    """No mistake: a job that was to stop has kept what it did, and can be gone on with."""
