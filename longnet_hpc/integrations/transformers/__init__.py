"""LongNet for Hugging Face `transformers`: dilated attention for its decoders, and LongNet as one of its models."""

try:
    import transformers
    from packaging.version import Version  # which transformers needs itself
except ModuleNotFoundError as error:
    raise ImportError("this needs the package transformers: pip install 'longnet-hpc[transformers]'") from error
if Version(transformers.__version__) < Version("5.24"):
    raise ImportError(
        f"this needs transformers 5.24 or later, found {transformers.__version__}: "
        "pip install 'longnet-hpc[transformers]'"
    )

from longnet_hpc.integrations.transformers.attention import register
from longnet_hpc.integrations.transformers.model import LongNetForCausalLM, LongNetPretrainedConfig
from longnet_hpc.integrations.transformers.slices import own_slice

__all__ = ["LongNetForCausalLM", "LongNetPretrainedConfig", "own_slice", "register"]
