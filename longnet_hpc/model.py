"""LongNet, the decoder of the paper: MAGNETO blocks around dilated attention. Knows a plan, but no ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longnet_hpc.stream  # noqa: F401  registers an operator that is named below
from longnet_hpc.config import LongNetConfig
from longnet_hpc.cross_entropy import check_targets, cross_entropy, token_losses
from longnet_hpc.dropout import position_dropout
from longnet_hpc.encoder_config import EncoderConfig
from longnet_hpc.errors import ConfigError, LongNetError, ShapeError
from longnet_hpc.gelu_norm import gelu_norm
from longnet_hpc.one_process import plan_of_one
from longnet_hpc.pattern import Pattern
from longnet_hpc.positions import POSITIONS, Rotation
from longnet_hpc.sequence_plan import LayerPlan, Plan

__all__ = ["Block", "LongNet", "check_plan"]

Recomputed = Literal["nothing", "all but attention", "all"]
_keeping_attention = partial(
    create_selective_checkpoint_contexts,
    [
        torch.ops.longnet_hpc.mixture.default,
        torch.ops.longnet_hpc.stream_mixture.default,
        torch.ops.longnet_hpc.dilated_attention.default,
    ],
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Block(nn.Module):
    """One block: dilated attention and a feed-forward layer, each added to the residual stream.

    Norms are those of MAGNETO (sub-LayerNorm, Wang et al. 2022, Section 2); an encoder may have others.

    Parameters
    ----------
    config : LongNetConfig or EncoderConfig
        Sizes, and where the norms are.
    index : int
        Which block, for the sites of dropout.
    """

    def __init__(self, config: LongNetConfig | EncoderConfig, index: int) -> None:
        super().__init__()
        width, kv_width = config.embed_dim, config.head_dim * (config.kv_heads or config.heads)
        inner, eps, has_inner_norms = config.ffn_dim, config.norm_eps, config.norms == "sub"
        self.config = config
        self.index = index
        self.attention_norm = nn.LayerNorm(width, eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.inner_attention_norm = nn.LayerNorm(width, eps) if has_inner_norms else nn.Identity()
        self.out_proj = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, inner)
        self.inner_ffn_norm = nn.LayerNorm(inner, eps) if has_inner_norms else nn.Identity()
        self.fc2 = nn.Linear(inner, width)
        for layer in self.children():
            self.draw(layer)

    def draw(self, layer: nn.Module) -> None:
        """Draw the parameters of one of its layers (MAGNETO, Table 2, or DeepNet, Figure 2; no cross-attention)."""
        if isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        elif isinstance(layer, nn.Linear):
            shapes_scores = layer is self.q_proj or layer is self.k_proj
            depth = self.config.layers
            gains = {"sub": math.sqrt(math.log(2 * depth)), "deep": (8 * depth) ** -0.25}
            nn.init.xavier_normal_(layer.weight, gain=1.0 if shapes_scores else gains.get(self.config.norms, 1.0))
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: torch.Tensor,
        plan: LayerPlan,
        rotation: Rotation,
        dropout_seed: int,
        recomputed: Recomputed = "nothing",
    ) -> torch.Tensor:
        """Map ``(batch, local_len, embed_dim)`` to the same shape. Collective over the ranks of the plan.

        What is ``recomputed`` in the backward pass is not kept until then.
        """
        if recomputed == "nothing":
            return self._compute(x, plan, rotation, dropout_seed)
        # Within what `torch.compile` sees, so that it drops what a backward pass does not need. Dropout needs no state.
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if recomputed == "all but attention":
            how["context_fn"] = _keeping_attention
        out: torch.Tensor = checkpoint(lambda x: self._compute(x, plan, rotation, dropout_seed), x, **how)
        return out

    def _compute(self, x: torch.Tensor, plan: LayerPlan, rotation: Rotation, dropout_seed: int) -> torch.Tensor:
        normed = self._before(x, self.attention_norm)
        q, k = rotation.apply(*self._queries_and_keys(normed))
        v = self.v_proj(normed).unflatten(-1, (-1, self.config.head_dim))
        mixed = plan.attention(q, k, v, causal=self.config.causal).flatten(2)
        change = self._drop(self.out_proj(self.inner_attention_norm(mixed)), plan, dropout_seed, 0)
        x = self._add(x, change, self.attention_norm)
        inner = self._activate(self.fc1(self._before(x, self.ffn_norm)))
        return self._add(x, self._drop(self.fc2(inner), plan, dropout_seed, 1), self.ffn_norm)

    def _before(self, x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """Return what a sublayer takes: the residual stream under its norm, unless that comes after it."""
        normed: torch.Tensor = norm(x) if self.config.norms in ("sub", "pre") else x
        return normed

    def _add(self, x: torch.Tensor, change: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """Return the residual stream after a sublayer."""
        if self.config.norms in ("sub", "pre"):
            return x + change
        # DeepNet, Figure 2: encoder- or decoder-only.
        scale = (2 * self.config.layers) ** 0.25 if self.config.norms == "deep" else 1.0
        after: torch.Tensor = norm(scale * x + change)
        return after

    def _activate(self, h: torch.Tensor) -> torch.Tensor:
        norm = self.inner_ffn_norm
        if self.config.activation == "gelu" and isinstance(norm, nn.LayerNorm):
            return gelu_norm(h, norm.weight, norm.bias, norm.eps)
        normed: torch.Tensor = norm(F.gelu(h) if self.config.activation == "gelu" else F.relu(h))
        return normed

    def _queries_and_keys(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (-1, self.config.head_dim)
        if not (_is_plain(self.q_proj) and _is_plain(self.k_proj)):
            return self.q_proj(normed).unflatten(-1, heads), self.k_proj(normed).unflatten(-1, heads)
        # One product for what is rotated, into new memory; the values are attended to as they come.
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight))
        bias = torch.cat((self.q_proj.bias, self.k_proj.bias))
        both = F.linear(normed, weight, bias).unflatten(-1, heads)
        # Split, since the gradients of slices would be padded with zeros and added.
        q, k = both.split((self.config.heads, both.shape[2] - self.config.heads), dim=2)
        return q, k

    def _drop(self, x: torch.Tensor, plan: LayerPlan, seed: int, place: int) -> torch.Tensor:
        if not self.training or self.config.dropout == 0.0:
            return x  # before anything that differs between blocks is looked at: one graph serves them all
        site = 2 * self.index + place + 1
        return position_dropout(x, self.config.dropout, seed=seed, site=site, start=plan.start)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a projection is torch's own, its weights neither quantised nor anything else of another kind."""
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, torch.Tensor)


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
        error: LongNetError | None = None
        try:
            _check_tokens(tokens, self.config.vocab_size)
            if plan is None:
                plan = plan_of_one(self.config.pattern, tokens.shape[1], tokens.device)
            check_plan(plan, self.config.pattern, tokens.shape[1])
            if targets is not None:
                if targets.shape != tokens.shape:
                    raise ShapeError(f"targets must be shaped {tuple(tokens.shape)}, got {tuple(targets.shape)}")
                if targets.dtype not in _INTEGERS or not _must_fit(targets.dtype, self.config.vocab_size):
                    check_targets(targets, self.config.vocab_size)
        except LongNetError as caught:
            error = caught
        if plan is None:
            assert error is not None
            raise error
        facts: dict[str, object] = {}
        if error is None:
            wants_grad = torch.is_grad_enabled()
            facts = {
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
        plan.agree(facts, error)
        return plan

    def computed_in(self, device: torch.device) -> torch.dtype:
        """Return the dtype that blocks compute in: that of autocast, where it is on, or of the weights."""
        autocast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self.embedding.weight.dtype

    def _hidden(
        self, tokens: torch.Tensor, plan: Plan, dropout_seed: int, *, for_product: bool = False
    ) -> torch.Tensor:
        config = self.config
        computed_in, device = self.computed_in(tokens.device), tokens.device
        scale = math.sqrt(config.embed_dim)
        if self.half_residual and not torch.is_grad_enabled():  # nothing in the size of all tokens but the result
            x = F.embedding(tokens.long(), (self.embedding.weight * scale).to(computed_in))
        else:
            x = self.embedding(tokens.long()) * scale
        rotation = POSITIONS[config.positions](
            plan.start, plan.local_len, plan.seq_len, config.head_dim, config.rotary_base, computed_in, device
        )
        probability = config.dropout if self.training else 0.0
        if probability == 0.0:
            dropout_seed = 0  # a graph would be made for every seed
        x = position_dropout(x, probability, seed=dropout_seed, site=0, start=plan.start)
        if self.half_residual:
            x = x.to(computed_in)
        recomputed: Recomputed = "nothing"
        if self.activation_checkpointing and torch.is_grad_enabled():
            recomputed = "all but attention" if self.keep_attention else "all"
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


def check_plan(plan: Plan, pattern: Pattern, local_len: int) -> None:
    """Raise ShapeError unless a plan has the pattern of a model and the tokens that this rank has."""
    if plan.pattern != pattern:
        raise ShapeError(f"the plan has pattern {_in_words(plan.pattern)}, not the model's {_in_words(pattern)}")
    if local_len != plan.local_len:
        raise ShapeError(f"this rank owns {plan.local_len} tokens of the plan, got {local_len}")


def _in_words(pattern: Pattern) -> str:
    return f"w = {list(pattern.segment_lengths)}, r = {list(pattern.dilation_rates)}"


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
