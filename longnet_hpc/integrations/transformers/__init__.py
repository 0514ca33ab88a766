"""LongNet for Hugging Face `transformers`: dilated attention for its decoders, and LongNet as one of its models."""

from longnet_hpc.integrations.transformers.attention import register
from longnet_hpc.integrations.transformers.model import LongNetForCausalLM, LongNetPretrainedConfig
from longnet_hpc.integrations.transformers.slices import own_slice

__all__ = ["LongNetForCausalLM", "LongNetPretrainedConfig", "own_slice", "register"]
