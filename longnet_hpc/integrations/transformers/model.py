"""LongNet as a model of `transformers`: its config, its causal language model, and both ways to our checkpoints.

Importing this registers both with the auto classes: ``AutoModelForCausalLM.from_pretrained`` then reads a folder that
`LongNetForCausalLM.save_pretrained` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from longnet_hpc.block import Block
from longnet_hpc.checkpoint import Checkpoint, DataOrder, save_checkpoint
from longnet_hpc.config_file import to_table
from longnet_hpc.continued import ContinuedPlan
from longnet_hpc.errors import ConfigError
from longnet_hpc.integrations.transformers.attention import padding_error
from longnet_hpc.load import load_model
from longnet_hpc.model import LongNet
from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS, LongNetConfig
from longnet_hpc.positions import longest_xpos
from longnet_hpc.sequence_plan import Plan, SequencePlan

__all__ = ["LongNetForCausalLM", "LongNetPretrainedConfig"]

_OF_LOSS = ("shift_labels", "num_items_in_batch", "ignore_index")
"""Arguments of a model that go to the loss of `transformers`."""


class LongNetPretrainedConfig(PreTrainedConfig):
    """`LongNetConfig` as `transformers` keeps it; the fields are those of that class.

    ``tie_head`` is called ``tie_word_embeddings`` here, and ``hidden_size``, ``num_hidden_layers`` and
    ``num_attention_heads`` are other names of ``embed_dim``, ``layers`` and ``heads``.
    """

    model_type = "longnet_hpc"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embed_dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    vocab_size: int = 256
    layers: int = 12
    embed_dim: int = 768
    heads: int = 12
    kv_heads: int | None = None
    ffn_ratio: int = 4
    segment_lengths: list[int] | tuple[int, ...] = PAPER_SEGMENT_LENGTHS
    dilation_rates: list[int] | tuple[int, ...] = PAPER_DILATION_RATES
    positions: str = "rotary"
    rotary_base: float | int = 10000.0
    dropout: float | int = 0.0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **others: Any) -> None:
        super().__post_init__(**others)
        self.to_longnet()

    @classmethod
    def from_longnet(cls, config: LongNetConfig, **others: Any) -> LongNetPretrainedConfig:
        """Return the config of a `LongNet`; ``others`` are fields of `transformers`."""
        table = asdict(config)
        table["tie_word_embeddings"] = table.pop("tie_head")
        return cls(**table, **others)

    def to_longnet(self) -> LongNetConfig:
        """Return the config that `LongNet` takes.

        Raises
        ------
        ConfigError
            If a value is outside its limits.
        """
        return LongNetConfig(
            vocab_size=self.vocab_size,
            layers=self.layers,
            embed_dim=self.embed_dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            ffn_ratio=self.ffn_ratio,
            segment_lengths=tuple(self.segment_lengths),
            dilation_rates=tuple(self.dilation_rates),
            positions=self.positions,  # type: ignore[arg-type]  # looked at there
            rotary_base=float(self.rotary_base),
            dropout=float(self.dropout),
            tie_head=self.tie_word_embeddings,
        )


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """`LongNet` as a causal language model of `transformers`.

    Parameters
    ----------
    config : LongNetPretrainedConfig
        Sizes, pattern, positions.

    Attributes
    ----------
    longnet : LongNet
        The model itself.
    """

    config_class = LongNetPretrainedConfig
    base_model_prefix = "longnet"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"longnet.head.weight": "longnet.embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LongNetPretrainedConfig) -> None:
        super().__init__(config)
        self.longnet = LongNet(config.to_longnet())
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what no file had, as `LongNet` does; `transformers` spares what was loaded."""
        for block in self.longnet.blocks:
            if any(module is layer for layer in block.children()):
                assert isinstance(block, Block)
                block.draw(module)
                return
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=self.config.embed_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.longnet.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.longnet.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the output projection."""
        return self.longnet.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output projection."""
        assert isinstance(value, nn.Linear)
        self.longnet.head = value

    def resize_token_embeddings(self, *arguments: Any, **named: Any) -> nn.Embedding:
        """Change the size of the vocabulary, as `PreTrainedModel.resize_token_embeddings` does."""
        embedding = super().resize_token_embeddings(*arguments, **named)
        self.longnet.config = self.config.to_longnet()
        return embedding

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        plan: SequencePlan | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and with labels the loss. Collective over the ranks of a plan.

        Parameters
        ----------
        input_ids : torch.Tensor
            Tokens ``(batch, seq)``; with a plan this rank's slice, see `own_slice`.
        attention_mask : torch.Tensor, optional
            0 at padding, which may be on the right only, ``(batch, tokens so far)``.
        position_ids : torch.Tensor, optional
            Must count on from the tokens before.
        cache : Cache, optional
            Keys and values of the tokens before.
        labels : torch.Tensor, optional
            Label i for token i, which is predicted from those before it; -100 is left out.
        use_cache : bool, optional
            Whether to return a cache; by default that of the config, in evaluation.
        logits_to_keep : int or torch.Tensor
            For how many of the last positions, or for which, logits are computed; 0 for all.
        plan : SequencePlan, optional
            Who owns which tokens, where ranks share a sequence; `own_slice` makes one of a pattern.
        **others
            What the loss of `transformers` takes: ``shift_labels``, ``num_items_in_batch``, ``ignore_index``.

        Raises
        ------
        ConfigError
            If an argument cannot be honoured, or is not known and neither None nor False. All ranks of a plan raise it.
        ShapeError
            If the tokens are not two-dimensional integers within the vocabulary.
        """
        wants_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and wants_cache and plan is None:
            cache = DynamicCache(config=self.config)
        its_plan: Plan | None = plan
        error = _refusal(input_ids, attention_mask, labels, others)
        if error is None and cache is not None:
            try:
                its_plan = self._plan_of(cache, input_ids, plan)
            except ConfigError as caught:
                error = caught
        if error is None:
            error = _misplaced(position_ids, 0 if its_plan is None else its_plan.start, input_ids.shape[-1])
        if error is not None:
            if plan is not None:  # other ranks learn of it where they agree with this one
                plan.agree({}, error)
            raise error
        self.longnet.activation_checkpointing = self.gradient_checkpointing and self.training
        seed = int(torch.randint(2**31, ())) if self.training and self.config.dropout > 0 else 0
        hidden = self.longnet.hidden(input_ids, its_plan, dropout_seed=seed)
        logits = self.longnet.logits(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            of_loss = {name: others[name] for name in _OF_LOSS if name in others}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _plan_of(self, cache: Cache, input_ids: torch.Tensor, plan: SequencePlan | None) -> ContinuedPlan:
        """Return the plan of tokens that follow those of a cache."""
        if plan is not None:
            raise ConfigError("ranks that share a sequence have no cache: pass use_cache=False")
        start, new = cache.get_seq_length(), input_ids.shape[-1]
        if not isinstance(start, int) or cache.is_compileable:
            raise ConfigError("LongNet needs a cache that grows with the sequence: use the default DynamicCache")
        seq_len = start + new
        if self.config.positions == "xpos":  # whose scale must have one origin in all calls
            seq_len = longest_xpos(self.longnet.computed_in(input_ids.device))
            if start + new > seq_len:
                raise ConfigError(
                    f"xPos with a cache reaches {seq_len} tokens, got {start + new}; pass use_cache=False"
                )
        return ContinuedPlan(self.longnet.config.pattern, start, new, cache.update, seq_len=seq_len)

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> LongNetForCausalLM:
        """Return the model of a checkpoint of ours: a file, or the latest in the folder of a run.

        Raises
        ------
        CheckpointError
            If it is missing, damaged, or no checkpoint of this version.
        """
        ours = load_model(path)
        model = cls(LongNetPretrainedConfig.from_longnet(ours.config))
        model.longnet.load_state_dict(ours.state_dict())
        model.eval()
        return model

    def save_checkpoint(self, folder: Path | str) -> Path:
        """Write the weights as a checkpoint of ours, for `eval` and `generate`, and return its file.

        It stands for no training: it has no optimizer state and no place in a corpus, so `train` cannot resume it.

        Parameters
        ----------
        folder : Path or str
            Folder of a run, which may be new.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        weights = {f"weight.{name}": parameter.detach() for name, parameter in self.longnet.named_parameters()}
        config = self.longnet.config
        order = DataOrder(
            corpus_tokens=0, corpus_hash="", seq_len=max(config.segment_lengths), batch_size=1, seed=0, shuffle=False
        )
        return save_checkpoint(Path(folder), Checkpoint(0, 0, order, to_table(config), weights))


def _refusal(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    others: Mapping[str, Any],
) -> ConfigError | None:
    """Return what is wrong with the arguments of a model, if anything is."""
    for name, given in others.items():
        if name not in _OF_LOSS and given is not None and given is not False:
            return ConfigError(f"{name} is not supported by LongNetForCausalLM")
    for name, targets in (("labels", labels), ("shift_labels", others.get("shift_labels"))):
        if targets is not None and targets.shape != input_ids.shape:
            return ConfigError(f"{name} must be shaped {tuple(input_ids.shape)}, got {tuple(targets.shape)}")
    return None if attention_mask is None else padding_error(attention_mask)


def _misplaced(position_ids: torch.Tensor | None, start: int, new: int) -> ConfigError | None:
    """Return what is wrong with positions, which have to count on from ``start``."""
    if position_ids is None:
        return None
    expected = torch.arange(start, start + new, device=position_ids.device)
    if position_ids.shape[-1] == new and bool((position_ids == expected).all()):
        return None
    first = int(position_ids.flatten()[0]) if position_ids.numel() else "nothing"
    return ConfigError(
        f"position_ids must be the {new} that count from {start} on, the tokens before, but begin at {first} here or "
        "do not count on; packing is not supported, and ranks that share a sequence need plan=, see own_slice"
    )


AutoConfig.register(LongNetPretrainedConfig.model_type, LongNetPretrainedConfig, exist_ok=True)
AutoModelForCausalLM.register(LongNetPretrainedConfig, LongNetForCausalLM, exist_ok=True)
