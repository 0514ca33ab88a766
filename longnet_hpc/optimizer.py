"""AdamW in float32 with warm-up, cosine decay and clipping; and its state by name, for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from longnet_hpc.config import OptimizerConfig
from longnet_hpc.errors import CheckpointError

__all__ = ["Optimizer", "learning_rate"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to its final value.

    Parameters
    ----------
    step : int
        Which step, 0 to ``steps - 1``.
    steps : int
        Length of the training, in steps.
    config : OptimizerConfig
        Its limits.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Optimizer:
    """AdamW over the parameters of a model, its gradients as one flat vector.

    Every rank makes the same update from the same summed gradient, so nothing is exchanged here.

    Parameters
    ----------
    model : nn.Module
        Its float32 parameters are trained.
    config : OptimizerConfig
        Its settings.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        self._parameters = dict(model.named_parameters())
        matrices = [parameter for parameter in self._parameters.values() if parameter.dim() >= 2]
        vectors = [parameter for parameter in self._parameters.values() if parameter.dim() < 2]
        on_gpu = any(parameter.is_cuda for parameter in self._parameters.values())
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=on_gpu or None,  # one pass; None leaves the choice to torch
        )

    def flat_gradient(self) -> torch.Tensor:
        """Return this rank's gradient, float32, ``(parameter_count,)``, and forget it in the parameters."""
        parts = []
        for parameter in self._parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(gradient.reshape(-1).float())
            parameter.grad = None
        return torch.cat(parts)

    def named(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parts of a flat gradient by the names of their parameters."""
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        yield from zip(self._parameters, flat.split(sizes), strict=True)

    def skip(self) -> None:
        """Let a step pass without an update; the moments age by it as they do in `load_state`."""
        for parameter in self._parameters.values():
            held = self._adamw.state[parameter]
            if not held:
                held["step"] = torch.tensor(0.0, device=parameter.device if parameter.is_cuda else None)
                held.update({moment: torch.zeros_like(parameter) for moment in _MOMENTS})
            held["step"] += 1

    def step(self, gradient: torch.Tensor, rate: float) -> float:
        """Update the parameters by a flat gradient, which is scaled in place if its norm is above the limit.

        Parameters
        ----------
        gradient : torch.Tensor
            Summed over ranks, float32, ``(parameter_count,)``.
        rate : float
            Learning rate of this step.

        Returns
        -------
        float
            Norm of the gradient before clipping. If it is not finite, nothing is updated.
        """
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            return norm
        if norm > self.config.clip_norm:
            gradient *= self.config.clip_norm / norm
        for group in self._adamw.param_groups:
            group["lr"] = rate
        for name, part in self.named(gradient):
            self._parameters[name].grad = part.view_as(self._parameters[name])
        self._adamw.step()
        self._adamw.zero_grad()
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Return weights and optimizer state by name: ``weight.``, ``exp_avg.`` and ``exp_avg_sq.`` before each."""
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            held = self._adamw.state.get(parameter, {})
            for moment in _MOMENTS:
                tensors[f"{moment}.{name}"] = held.get(moment, torch.zeros_like(parameter)).detach()
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Take over what `state` returned after ``step`` steps.

        Raises
        ------
        CheckpointError
            If names or shapes are those of another model.
        """
        check_shapes({name: tensor.shape for name, tensor in self.state().items()}, tensors)
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight.{name}"])
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{m: tensors[f"{m}.{name}"].to(parameter.device, copy=True) for m in _MOMENTS},
            }


def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take over the weights of a checkpoint, leaving its optimizer state.

    Raises
    ------
    CheckpointError
        If names or shapes are those of another model.
    """
    parameters = {f"weight.{name}": parameter for name, parameter in model.named_parameters()}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}
    check_shapes({name: parameter.shape for name, parameter in parameters.items()}, weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_shapes(expected: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError, naming the first tensor that differs, unless names and shapes are as expected."""
    for name in sorted(expected.keys() | tensors.keys()):
        theirs = tuple(tensors[name].shape) if name in tensors else "missing"
        ours = tuple(expected[name]) if name in expected else "missing"
        if theirs != ours:
            raise CheckpointError(f"checkpoint is of another model: {name} is {theirs} there, {ours} here")
