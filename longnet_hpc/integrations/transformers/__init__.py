"""LongNet for Hugging Face `transformers`: dilated attention for its decoders, and LongNet as one of its models."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("this needs the package transformers: pip install 'longnet-hpc[transformers]'") from error

from longnet_hpc.integrations.transformers.attention import register
from longnet_hpc.integrations.transformers.model import LongNetForCausalLM, LongNetPretrainedConfig
from longnet_hpc.integrations.transformers.slices import own_slice

__all__ = ["LongNetForCausalLM", "LongNetPretrainedConfig", "own_slice", "register"]
