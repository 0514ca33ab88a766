"""A block, and what a decoder and an encoder do alike before and around their blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import longnet_hpc.stream  # noqa: F401  registers an operator that is named below
from longnet_hpc.dropout import position_dropout
from longnet_hpc.encoder_config import EncoderConfig
from longnet_hpc.errors import LongNetError, ShapeError
from longnet_hpc.gelu_norm import gelu_norm
from longnet_hpc.model_config import LongNetConfig
from longnet_hpc.one_process import plan_of_one
from longnet_hpc.pattern import Pattern
from longnet_hpc.positions import POSITIONS, Rotation
from longnet_hpc.sequence_plan import LayerPlan, Plan

__all__ = ["Block", "Recomputed", "agreed_plan", "enter_blocks", "recomputed_if"]

Recomputed = Literal["nothing", "all but attention", "all"]
_keeping_attention = partial(
    create_selective_checkpoint_contexts,
    [
        torch.ops.longnet_hpc.mixture.default,
        torch.ops.longnet_hpc.stream_mixture.default,
        torch.ops.longnet_hpc.dilated_attention.default,
    ],
)


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


def recomputed_if(activation_checkpointing: bool, keep_attention: bool) -> Recomputed:
    """Return what blocks compute again in the backward pass: nothing, unless there is one and it is asked for."""
    if not (activation_checkpointing and torch.is_grad_enabled()):
        return "nothing"
    return "all but attention" if keep_attention else "all"


def enter_blocks(
    x: torch.Tensor,
    plan: Plan,
    config: LongNetConfig | EncoderConfig,
    dtype: torch.dtype,
    *,
    dropout: float,
    dropout_seed: int,
) -> tuple[torch.Tensor, Rotation]:
    """Return what the first block takes, the embeddings after dropout, and the rotation that all of them share.

    Parameters
    ----------
    x : torch.Tensor
        Embeddings, ``(batch, local_len, embed_dim)``.
    plan : Plan
        Which tokens these are.
    config : LongNetConfig or EncoderConfig
        Kind of positions.
    dtype : torch.dtype
        That blocks compute in.
    dropout : float
        Probability, 0 unless training.
    dropout_seed : int
        Chooses the masks.
    """
    rotation = POSITIONS[config.positions](
        plan.start, plan.local_len, plan.seq_len, config.head_dim, config.rotary_base, dtype, x.device
    )
    return position_dropout(x, dropout, seed=dropout_seed, site=0, start=plan.start), rotation


def agreed_plan(
    plan: Plan | None,
    pattern: Pattern,
    x: torch.Tensor,
    check: Callable[[], None],
    facts: Callable[[], dict[str, object]],
) -> Plan:
    """Check what a caller passed, agree with the other ranks on it, and return the plan. Collective over its ranks.

    Parameters
    ----------
    plan : Plan or None
        None for a sequence that one process owns.
    pattern : Pattern
        Of the model.
    x : torch.Tensor
        Tokens or embeddings of this rank, ``(batch, local_len, ...)``.
    check : callable
        Raises a `LongNetError` if something else is wrong.
    facts : callable
        Returns what must be alike on all ranks; called if nothing is wrong.
    """
    error: LongNetError | None = None
    try:
        check()
        if plan is None:
            plan = plan_of_one(pattern, x.shape[1], x.device)
        _check_plan(plan, pattern, x.shape[1])
    except LongNetError as caught:
        error = caught
    if plan is None:
        assert error is not None
        raise error
    plan.agree(facts() if error is None else {}, error)
    return plan


def _check_plan(plan: Plan, pattern: Pattern, local_len: int) -> None:
    """Raise ShapeError unless a plan has the pattern of a model and the tokens that this rank has."""
    if plan.pattern != pattern:
        raise ShapeError(f"the plan has pattern {_in_words(plan.pattern)}, not the model's {_in_words(pattern)}")
    if local_len != plan.local_len:
        raise ShapeError(f"this rank owns {plan.local_len} tokens of the plan, got {local_len}")


def _in_words(pattern: Pattern) -> str:
    return f"w = {list(pattern.segment_lengths)}, r = {list(pattern.dilation_rates)}"
