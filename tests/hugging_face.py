"""Small random models of `transformers`, without any download, and attention by the oracle under a name of theirs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

import oracle
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # so that attention is far from uniform
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, heads of their own": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama, rope of llama 3": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama, yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1}),
    "gemma2": (Gemma2Config, {"attn_logit_softcapping": None, "sliding_window": 9}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma2, no window": (Gemma2Config, {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2}),
    "gemma3, no window": (Gemma3TextConfig, {"layer_types": ["full_attention"] * 2}),
    "mistral": (MistralConfig, {"sliding_window": 9}),
    "mistral, no window": (MistralConfig, {"sliding_window": None}),
}
"""Class of the config, and what differs in it."""
WITHOUT_WINDOWS = [family for family in FAMILIES if family not in ("gemma2", "gemma3", "mistral")]


def config_of(family, **changes):
    kind, its_own = FAMILIES[family]
    return kind(**{**SIZES, **its_own, **changes})


def model_of(family, implementation="longnet", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation=implementation)


def tokens(batch, seq, seed=0):
    return torch.randint(3, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def register_oracle(segment_lengths, dilation_rates):
    """Let "oracle" be dilated attention by its definition."""

    def attend(module, query, key, value, attention_mask, scaling=None, **others):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, _ = oracle.attention(q, k, v, segment_lengths, dilation_rates, True, scaling)
        return out.to(query.dtype), None

    AttentionInterface.register("oracle", attend)


def loss_and_gradients(model, **inputs):
    """Return loss, logits, and the gradient of each parameter."""
    model.zero_grad()
    answer = model(**inputs)
    answer.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return answer.loss.detach(), answer.logits.detach(), gradients


def assert_same(got, wanted, tolerance=1e-5):
    """Fail unless losses, logits and gradients agree; gradients relative to the largest of each."""
    torch.testing.assert_close(got[0], wanted[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], wanted[1], atol=tolerance, rtol=tolerance)
    for name, gradient in wanted[2].items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(got[2][name] / scale, gradient / scale, atol=tolerance, rtol=0, msg=name)
