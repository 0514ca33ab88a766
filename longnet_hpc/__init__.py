"""LongNet on supercomputers and laptops: dilated attention over sequences that span MPI ranks.

Public names are loaded when first used, so that importing the package starts neither torch nor MPI.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
"""Version of the library."""

_HOMES = {
    "DilatedAttention": "longnet_hpc.multihead",
    "EncoderConfig": "longnet_hpc.encoder_config",
    "LongNet": "longnet_hpc.model",
    "LongNetConfig": "longnet_hpc.model_config",
    "LongNetEncoder": "longnet_hpc.encoder",
    "LongNetError": "longnet_hpc.errors",
    "Partition": "longnet_hpc.partition",
    "Pattern": "longnet_hpc.pattern",
    "SequencePlan": "longnet_hpc.sequence_plan",
    "dilated_attention": "longnet_hpc.parallel",
    "load_model": "longnet_hpc.load",
    "scaled_dot_product_attention": "longnet_hpc.functional",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
