"""LongNet, the decoder of the paper: MAGNETO blocks around dilated attention. Knows a plan, but no ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from longnet_hpc.block import Block, agreed_plan, enter_blocks, recomputed_if
from longnet_hpc.cross_entropy import check_targets, cross_entropy, token_losses
from longnet_hpc.errors import ConfigError, ShapeError
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.sequence_plan import Plan

__all__ = ["LongNet"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _OutputNorm(nn.LayerNorm):
    """The last norm; it may give the dtype of the product that follows, in the same pass."""

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        normed = super().forward(x)
        return normed if dtype is None else normed.to(dtype)


class LongNet(nn.Module):
    """A causal language model with dilated attention (LongNet, Section 4).

    Parameters
    ----------
    config : LongNetConfig
        Sizes, pattern, positions.

    Attributes
    ----------
    activation_checkpointing : bool
        Recompute each block in the backward pass instead of keeping its activations.
    keep_attention : bool
        Keep the output of attention nevertheless.
    half_residual : bool
        Keep the residual stream in the dtype of matrix products, rather than that of the embedding.
    """

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.keep_attention = True
        self.half_residual = False
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        nn.init.normal_(self.embedding.weight, std=config.embed_dim**-0.5)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = _OutputNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tie_head:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=config.embed_dim**-0.5)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let `torch.compile` make the graph of a block, one for all, and of the last norm, when they are first called.

        Each shape, plan and way to checkpoint has its own graph.

        Parameters
        ----------
        backend : str or callable
            Who makes code of the graph, as `torch.compile` takes it.

        Raises
        ------
        ConfigError
            If there is dropout, whose masks no graph can hold.
        """
        if self.config.dropout > 0.0:
            raise ConfigError(f"blocks with dropout cannot be compiled, got {self.config.dropout}")
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_tells_us_something)
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)
        self.norm.compile(backend=backend, fullgraph=True, dynamic=False)

    def flop(self, batch: int, seq_len: int, *, training: bool) -> int:
        """Count the arithmetic of matrix products, ``2 m n k`` each, attention as `Pattern.flop` counts it.

        Parameters
        ----------
        batch, seq_len : int
            Sequences, and tokens of each over all ranks.
        training : bool
            Count a forward and a backward pass (three times the forward; what is recomputed does not count).

        Returns
        -------
        int
            FLOP of all ranks together.
        """
        config = self.config
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        attention = config.pattern.flop(seq_len, config.heads, config.head_dim, causal=True)
        return batch * (2 * seq_len * weights + config.layers * attention) * (3 if training else 1)

    def hidden(self, tokens: torch.Tensor, plan: Plan | None = None, *, dropout_seed: int = 0) -> torch.Tensor:
        """Return the last hidden states, ``(batch, local_len, embed_dim)``. Collective over the ranks of the plan.

        Parameters
        ----------
        tokens : torch.Tensor
            This rank's slice, ``(batch, local_len)``, an integer dtype.
        plan : Plan, optional
            Who owns which tokens; by default one process owns them all. A `SequencePlan`, or a chunk of a longer
            sequence, of which it has to be the next part: see `stream.SequenceStream`, and `continued` for one whose
            keys a cache holds.
        dropout_seed : int
            Chooses the dropout masks while training; change it every step.

        Raises
        ------
        ShapeError
            If the tokens are not two-dimensional integers within the vocabulary, or ranks are about to do different
            things (batch, dtype, dropout, what needs a gradient). All ranks raise it.
        ConfigError
            If xPos cannot reach this far.
        """
        return self._hidden(tokens, self._agreed_plan(plan, tokens, None, dropout_seed), dropout_seed)

    def _agreed_plan(
        self, plan: Plan | None, tokens: torch.Tensor, targets: torch.Tensor | None, dropout_seed: int
    ) -> Plan:
        """Check what the caller passed, agree with the other ranks on it, and return the plan."""

        def check() -> None:
            _check_tokens(tokens, self.config.vocab_size)
            if targets is None:
                return
            if targets.shape != tokens.shape:
                raise ShapeError(f"targets must be shaped {tuple(tokens.shape)}, got {tuple(targets.shape)}")
            if targets.dtype not in _INTEGERS or not _must_fit(targets.dtype, self.config.vocab_size):
                check_targets(targets, self.config.vocab_size)

        def facts() -> dict[str, object]:
            wants_grad = torch.is_grad_enabled()
            return {
                "model": self.config,
                "batch": tokens.shape[0],
                "dtype": self.computed_in(tokens.device),
                "dropout_seed": dropout_seed,
                "training": self.training,
                "activation checkpointing": self.activation_checkpointing,
                "keep attention": self.keep_attention,
                "half residual": self.half_residual,
                "parameters that need a gradient": wants_grad and sum(p.requires_grad for p in self.parameters()),
            }

        return agreed_plan(plan, self.config.pattern, tokens, check, facts)

    def computed_in(self, device: torch.device) -> torch.dtype:
        """Return the dtype that blocks compute in: that of autocast, where it is on, or of the weights."""
        autocast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self.embedding.weight.dtype

    def _hidden(
        self, tokens: torch.Tensor, plan: Plan, dropout_seed: int, *, for_product: bool = False
    ) -> torch.Tensor:
        config = self.config
        computed_in, scale = self.computed_in(tokens.device), math.sqrt(config.embed_dim)
        if self.half_residual and not torch.is_grad_enabled():  # nothing in the size of all tokens but the result
            x = F.embedding(tokens.long(), (self.embedding.weight * scale).to(computed_in))
        else:
            x = self.embedding(tokens.long()) * scale
        probability = config.dropout if self.training else 0.0
        if probability == 0.0:
            dropout_seed = 0  # a graph would be made for every seed
        x, rotation = enter_blocks(x, plan, config, computed_in, dropout=probability, dropout_seed=dropout_seed)
        if self.half_residual:
            x = x.to(computed_in)
        recomputed = recomputed_if(self.activation_checkpointing, self.keep_attention)
        for index, block in enumerate(self.blocks):
            x = block(x, plan.of_layer(index), rotation, dropout_seed, recomputed)
        normed: torch.Tensor = self.norm(x, computed_in if for_product and self.half_residual else None)
        return normed

    def forward(self, tokens: torch.Tensor, plan: Plan | None = None, *, dropout_seed: int = 0) -> torch.Tensor:
        """Return logits ``(batch, local_len, vocab_size)``, float32 or float64; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, plan, dropout_seed=dropout_seed))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits ``(..., vocab_size)``, float32 or float64, of what `hidden` returns or a part of it."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(wide), self.head.weight.to(wide))

    def loss(
        self, tokens: torch.Tensor, targets: torch.Tensor, plan: Plan | None = None, *, dropout_seed: int = 0
    ) -> torch.Tensor:
        """Return the summed negative log-likelihood of this rank's targets in nats; arguments as in `hidden`.

        ``targets`` is shaped as ``tokens``; -100 is left out, and any other value outside the vocabulary is a
        ShapeError on all ranks.
        """
        plan = self._agreed_plan(plan, tokens, targets, dropout_seed)
        hidden = self._hidden(tokens, plan, dropout_seed, for_product=True)
        return cross_entropy(hidden, self.head.weight, targets)

    @torch.no_grad()
    def token_losses(
        self, tokens: torch.Tensor, targets: torch.Tensor, plan: Plan | None = None, *, dropout_seed: int = 0
    ) -> torch.Tensor:
        """Return the negative log-likelihood of each target in nats, ``(batch, local_len)``; arguments as in `loss`.

        Without a gradient. Dropout is off only in evaluation, as everywhere.
        """
        plan = self._agreed_plan(plan, tokens, targets, dropout_seed)
        hidden = self._hidden(tokens, plan, dropout_seed, for_product=True)
        return token_losses(hidden, self.head.weight, targets)


def _tells_us_something(record: logging.LogRecord) -> bool:
    """Leave out that what is checkpointed by choice must change nothing in place, which a block does not."""
    return "context_fn is passed to torch.utils.checkpoint under torch.compile" not in record.getMessage()


def _must_fit(dtype: torch.dtype, vocab_size: int) -> bool:
    """Return whether nothing has to be waited for to see that no number of a dtype is outside a vocabulary."""
    if torch.compiler.is_compiling():
        return True  # a graph cannot look at numbers and raise; the embedding refuses what it does not have
    limits = torch.iinfo(dtype)
    return limits.min >= 0 and limits.max < vocab_size


def _check_tokens(tokens: torch.Tensor, vocab_size: int) -> None:
    if tokens.dim() != 2 or tokens.dtype not in _INTEGERS:
        raise ShapeError(f"tokens must be integers (batch, seq), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.numel() and not _must_fit(tokens.dtype, vocab_size):
        low, high = (int(extreme) for extreme in torch.aminmax(tokens))
        if low < 0 or high >= vocab_size:
            raise ShapeError(f"token {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
