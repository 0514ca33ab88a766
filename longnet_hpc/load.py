"""A model from a checkpoint, in one call."""

from __future__ import annotations

from pathlib import Path

from longnet_hpc.checkpoint import find_checkpoint, load_checkpoint
from longnet_hpc.model import LongNet
from longnet_hpc.optimizer import load_weights

__all__ = ["load_model"]


def load_model(path: Path | str) -> LongNet:
    """Return the model of a checkpoint, on the CPU and in evaluation mode. Each rank reads for itself.

    Optimizer state is not read, so that shards of it may be missing.

    Parameters
    ----------
    path : Path or str
        Checkpoint file, or the folder of a run for its latest one.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or no checkpoint of this version.
    """
    checkpoint = load_checkpoint(find_checkpoint(Path(path)), weights_only=True)
    model = LongNet(checkpoint.model_config)
    load_weights(model, checkpoint.tensors)
    return model.eval()
