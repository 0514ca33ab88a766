"""Dilated attention in the place of `torch.nn.MultiheadAttention`: same arguments, same parameters, same state dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from longnet_hpc.errors import ConfigError, LongNetError, ShapeError
from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.packed import Integers
from longnet_hpc.padding import attend_without, check_padding
from longnet_hpc.parallel import agreed_attention
from longnet_hpc.pattern import Pattern

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["DilatedAttention"]


class DilatedAttention(nn.MultiheadAttention):
    """Self-attention over long sequences that can replace `torch.nn.MultiheadAttention` (LongNet, Section 3).

    Parameters and their initialisation are those of `torch.nn.MultiheadAttention`, so state dicts load both ways.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, device, dtype
        As in `torch.nn.MultiheadAttention`. ``add_bias_kv`` and ``add_zero_attn`` must be False: such a key has no
        position. ``dropout``, on attention weights, may be above 0 in evaluation only: the weights never exist.
    batch_first : bool
        Whether inputs are ``(batch, seq, embed_dim)`` rather than ``(seq, batch, embed_dim)``; unlike there, True.
    segment_lengths, dilation_rates : sequence of int
        One w and one r per branch, in tokens; the paper's by default.
    softmax_scale : float, optional
        Factor on the scores; ``head_dim ** -0.5`` by default.
    comm : mpi4py.MPI.Comm, optional
        Ranks that share the sequence; ``seq`` is then this rank's slice, and every call is collective. A copy of the
        module shares it.
    backend : str
        Backend of attention, see `longnet_hpc.dilated_attention`.

    Raises
    ------
    ConfigError
        If an argument cannot be honoured.
    PatternError
        If w or r is below 1 or the lists differ in length.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int] = PAPER_SEGMENT_LENGTHS,
        dilation_rates: Sequence[int] = PAPER_DILATION_RATES,
        softmax_scale: float | None = None,
        comm: MPI.Comm | None = None,
        backend: str = "auto",
    ) -> None:
        if add_bias_kv or add_zero_attn:
            raise ConfigError(
                "add_bias_kv and add_zero_attn must be False: dilated attention has no place for such keys"
            )
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ConfigError(f"num_heads must divide embed_dim, got {num_heads} heads for width {embed_dim}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.pattern = Pattern.from_lists(segment_lengths, dilation_rates)
        self.softmax_scale = softmax_scale
        self.backend = backend
        self._shared_comm = _Shared(comm)

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # In evaluation nn.TransformerEncoderLayer computes dense attention itself from the parameters of a module whose
        # packed projection it trusts; this keeps it from going around `forward`.
        self._qkv_same_embed_dim = False

    @property
    def comm(self) -> MPI.Comm | None:
        """Ranks that share the sequence."""
        return self._shared_comm.comm

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """Attend. Collective over the ranks of ``comm``, forward and backward.

        Parameters
        ----------
        query, key, value : torch.Tensor
            ``(batch, seq, embed_dim)`` (key ``kdim``, value ``vdim`` wide), ``(seq, batch, embed_dim)`` without
            ``batch_first``, or ``(seq, embed_dim)``; all of the same length.
        key_padding_mask : torch.Tensor, optional
            ``(batch, seq)``, or ``(seq,)``, True or minus infinity for tokens that are left out: each sequence is then
            attended to as if it had been cut without them, and what stands after them moves up. With a communicator it
            is that of the slice, given on all ranks or on none, and sequences are computed one by one.
        need_weights : bool
            Must be False (the default here): the weights never exist.
        attn_mask : torch.Tensor, optional
            None or the causal mask ``(seq, seq)``, True or minus infinity above the diagonal. With a communicator it is
            that of the slice and stands for causality over the whole sequence.
        average_attn_weights : bool
            Without effect, since there are no weights.
        is_causal : bool
            Whether a query sees only keys at or before its own global position, with or without ``attn_mask``.

        Returns
        -------
        out : torch.Tensor
            Shaped as ``query``. A token that is left out gets what a query on no grid gets: the bias of ``out_proj``.
        None
            In the place of the weights.

        Raises
        ------
        ConfigError
            If an argument cannot be honoured.
        ShapeError
            If the shapes do not fit together.
        """
        error: LongNetError | None = None
        q, k, v, causal, padding, facts = query, key, value, False, None, {}
        try:
            causal = self._check(query, key, value, need_weights, attn_mask, is_causal)
            q, k, v = self._project(query, key, value)
            if key_padding_mask is not None:
                padding = check_padding(key_padding_mask, *q.shape[:2])
            facts = {"key_padding_mask": "none" if padding is None else "given", "sequences": q.shape[0]}
        except LongNetError as caught:
            error = caught

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: Integers | None = None
        ) -> torch.Tensor:
            return agreed_attention(
                *(q, k, v, self.pattern),
                causal=causal,
                softmax_scale=self.softmax_scale,
                comm=self.comm,
                cu_seqlens=cu_seqlens,
                backend=self.backend,
                error=error,
                facts=facts,
            )[0]

        if error is None and padding is not None and len(padding):
            mixed = attend_without(attend, q, k, v, padding, self.comm)
        else:
            mixed = attend(q, k, v)
        out: torch.Tensor = self.out_proj(mixed.flatten(2))
        if query.dim() == 2:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values as attention takes them, ``(batch, seq, heads, head_dim)``."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Return whether to be causal; raise if something cannot be honoured."""
        inputs = (query, key, value)
        if not all(isinstance(x, torch.Tensor) for x in inputs):
            raise ShapeError(f"query, key and value must be tensors, got {', '.join(type(x).__name__ for x in inputs)}")
        if any(x.is_nested for x in inputs):
            raise ShapeError(
                "nested tensors are not supported: make nn.TransformerEncoder with enable_nested_tensor=False"
            )
        if query.dim() not in (2, 3) or any(x.shape[:-1] != query.shape[:-1] for x in inputs):
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ShapeError(f"query, key and value must be of equal length, 2- or 3-dimensional, got {shapes}")
        for x, name, width in zip(
            inputs, ("query", "key", "value"), (self.embed_dim, self.kdim, self.vdim), strict=True
        ):
            if x.shape[-1] != width:
                raise ShapeError(f"{name} must be {width} wide, got {x.shape[-1]}")
            if x.dtype != self.out_proj.weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise ShapeError(f"{name} must be {self.out_proj.weight.dtype} as the weights are, got {x.dtype}")
        if need_weights:
            raise ConfigError("need_weights=True is not supported: the weights of dilated attention never exist")
        if self.training and self.dropout > 0.0:
            raise ConfigError(f"dropout of attention weights is not supported in training, got {self.dropout}")
        if attn_mask is None:
            return is_causal
        seq = query.shape[-2] if query.dim() == 2 or self.batch_first else query.shape[0]
        hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        zero_elsewhere = attn_mask.dtype == torch.bool or not attn_mask.masked_fill(hidden, 0).any()
        if not zero_elsewhere or not torch.equal(hidden, _causal_mask(seq, attn_mask.device)):
            raise ConfigError(f"attn_mask must be None or the causal mask ({seq}, {seq}), got {tuple(attn_mask.shape)}")
        return True


def _causal_mask(seq: int, device: torch.device) -> torch.Tensor:
    return torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)


class _Shared:
    """Holds a communicator, which cannot be copied, so that copies of a module share it."""

    def __init__(self, comm: MPI.Comm | None) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self
