"""A bidirectional LongNet over embeddings: of documents, of slides, of whatever has a sequence of vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from longnet_hpc.block import Block, agreed_plan, enter_blocks, recomputed_if
from longnet_hpc.encoder_config import EncoderConfig
from longnet_hpc.errors import ShapeError
from longnet_hpc.sequence_plan import Plan

__all__ = ["LongNetEncoder"]


class LongNetEncoder(nn.Module):
    """Blocks of dilated attention in which every token sees both ways.

    Parameters
    ----------
    config : EncoderConfig
        Sizes, pattern, where the norms are.

    Attributes
    ----------
    activation_checkpointing : bool
        Recompute each block in the backward pass instead of keeping its activations.
    keep_attention : bool
        Keep the output of attention nevertheless.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.keep_attention = True
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = nn.LayerNorm(config.embed_dim, config.norm_eps) if config.output_norm else nn.Identity()

    def forward(self, x: torch.Tensor, plan: Plan | None = None, *, dropout_seed: int = 0) -> torch.Tensor:
        """Return what the last block gives, normalised if the config says so. Collective over the ranks of the plan.

        Parameters
        ----------
        x : torch.Tensor
            Embeddings of this rank's slice, ``(batch, local_len, embed_dim)``, with positions in them if the config has
            none; in the dtype of the weights, or any under autocast.
        plan : Plan, optional
            A `SequencePlan`, or what takes its place: who owns which tokens. By default one process owns them all.
        dropout_seed : int
            Chooses the dropout masks while training; change it every step.

        Returns
        -------
        torch.Tensor
            Shaped as ``x``.

        Raises
        ------
        ShapeError
            If the embeddings do not fit the model or the plan, or ranks are about to do different things. All ranks
            raise it.
        ConfigError
            If xPos cannot reach this far.
        """
        for state in self._states(x, plan, dropout_seed):
            last = state
        normed: torch.Tensor = self.norm(last)
        return normed

    def states(self, x: torch.Tensor, plan: Plan | None = None, *, dropout_seed: int = 0) -> list[torch.Tensor]:
        """Return the embeddings and what each block gives, ``layers + 1`` tensors shaped as ``x``, none normalised.

        Parameters
        ----------
        x, plan, dropout_seed
            As for `forward`; the same is raised.
        """
        return list(self._states(x, plan, dropout_seed))

    def _states(self, x: torch.Tensor, plan: Plan | None, dropout_seed: int) -> Iterator[torch.Tensor]:
        plan = self._agreed_plan(x, plan, dropout_seed)
        config, computed_in = self.config, self._computed_in(x)
        probability = config.dropout if self.training else 0.0
        x, rotation = enter_blocks(x, plan, config, computed_in, dropout=probability, dropout_seed=dropout_seed)
        recomputed = recomputed_if(self.activation_checkpointing, self.keep_attention)
        yield x
        for index, block in enumerate(self.blocks):
            x = block(x, plan.of_layer(index), rotation, dropout_seed, recomputed)
            yield x

    def _agreed_plan(self, x: torch.Tensor, plan: Plan | None, dropout_seed: int) -> Plan:
        """Check what the caller passed, agree with the other ranks on it, and return the plan."""

        def facts() -> dict[str, object]:
            wants_grad = torch.is_grad_enabled()
            return {
                "encoder": self.config,
                "batch": x.shape[0],
                "dtype": self._computed_in(x),
                "dropout_seed": dropout_seed,
                "training": self.training,
                "activation checkpointing": self.activation_checkpointing,
                "keep attention": self.keep_attention,
                "gradient of the embeddings": wants_grad and x.requires_grad,
                "parameters that need a gradient": wants_grad and sum(p.requires_grad for p in self.parameters()),
            }

        return agreed_plan(plan, self.config.pattern, x, lambda: self._check(x), facts)

    def _check(self, x: torch.Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.config.embed_dim:
            raise ShapeError(f"embeddings must be (batch, seq, {self.config.embed_dim}), got {tuple(x.shape)}")
        weight = next(self.parameters())
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ShapeError(f"embeddings must be {weight.dtype} as the weights are, got {x.dtype}")
        if x.device != weight.device:
            raise ShapeError(f"embeddings must be on {weight.device} as the weights are, got {x.device}")

    def _computed_in(self, x: torch.Tensor) -> torch.dtype:
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
