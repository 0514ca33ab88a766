"""torchscale's LongNet in float64, written from a description of what it computes, to compare our integration with.

It shares no code with the package. Attention goes position by position; nothing is clever.
"""

import math

import torch
from torch.nn import functional as F


def state_dict(config, kind, seed=0):
    """Return random weights in torchscale's names and shapes, for a config in torchscale's words."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = config[f"{kind}_embed_dim"], config[f"{kind}_ffn_embed_dim"]
    weights = {}

    def linear(name, rows, columns):
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        weights[f"{name}.bias"] = torch.randn(rows, generator=generator) / 4

    def norm(name, features):
        weights[f"{name}.weight"] = 1 + torch.randn(features, generator=generator) / 4
        weights[f"{name}.bias"] = torch.randn(features, generator=generator) / 4

    if kind == "decoder":
        weights["embed_tokens.weight"] = torch.randn(config["vocab_size"], width, generator=generator)
        weights["output_projection.weight"] = torch.randn(config["vocab_size"], width, generator=generator) / 4
        if config.get("share_decoder_input_output_embed"):
            weights["output_projection.weight"] = weights["embed_tokens.weight"]
    for index in range(config[f"{kind}_layers"]):
        layer = f"layers.{index}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{layer}.self_attn.{projection}", width, width)
        if has_inner_norms(config):
            norm(f"{layer}.self_attn.inner_attn_ln", width)
            norm(f"{layer}.ffn.ffn_layernorm", inner)
        if config.get("xpos_rel_pos"):
            head_dim = width // config[f"{kind}_attention_heads"]
            weights[f"{layer}.self_attn.xpos.scale"] = (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (
                1.4 * head_dim
            )
        norm(f"{layer}.self_attn_layer_norm", width)
        linear(f"{layer}.ffn.fc1", inner, width)
        linear(f"{layer}.ffn.fc2", width, inner)
        norm(f"{layer}.final_layer_norm", width)
    if comes_before(config, kind) and config.get("normalize_output", True):
        norm("layer_norm", width)
    return weights


def has_inner_norms(config):
    return config.get("subln", True) and not config.get("deepnorm", False)


def comes_before(config, kind):
    return not config.get("deepnorm", False) and (
        config.get("subln", True) or config.get(f"{kind}_normalize_before", True)
    )


def attention(q, k, v, segment_lengths, dilation_rates, causal):
    """Attend as torchscale does, `(batch, seq, heads, head_dim)`, one query at a time."""
    batch, seq, heads, head_dim = q.shape
    outs, lses = [], []
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        w = min(w, seq)
        rows_of_segment = -(-w // r)  # rows that are not there are zeros: queries, keys and values alike
        offset_of = [head // -(-heads // r) for head in range(heads)]
        slots = -(-seq // w) * rows_of_segment * r  # what all segments fill, each a multiple of r
        out, lse = torch.zeros(batch, slots, heads, head_dim).double(), torch.full((batch, slots, heads), -1e8).double()
        for segment in range(-(-seq // w)):
            for head in range(heads):
                positions = []
                for row in range(rows_of_segment):
                    within = row * r + offset_of[head]
                    there = within < w and segment * w + within < seq
                    positions.append(segment * w + within if there else None)
                zero = q[:, 0, head] * 0
                rows = [
                    torch.stack([zero if p is None else x[:, p, head] for p in positions], dim=1) for x in (q, k, v)
                ]
                for row in range(rows_of_segment):
                    seen = row + 1 if causal else rows_of_segment
                    scores = (rows[0][:, row, None] * rows[1][:, :seen]).sum(-1) / math.sqrt(head_dim)
                    slot = segment * rows_of_segment * r + row * r + offset_of[head]
                    out[:, slot, head] = (scores.softmax(-1)[..., None] * rows[2][:, :seen]).sum(1)
                    total = scores.logsumexp(-1).detach()
                    lse[:, slot, head] = torch.where(total == 0, torch.full_like(total, -1e8), total)
        outs.append(out[:, :seq])
        lses.append(lse[:, :seq])
    weights = torch.stack(lses).softmax(0)
    return (weights[..., None] * torch.stack(outs)).sum(0)


def xpos(x, downscale):
    """Rotate and scale `(batch, seq, heads, head_dim)` as torchscale's XPOS."""
    seq, head_dim = x.shape[1], x.shape[3]
    out = torch.empty_like(x)
    for position in range(seq):
        for pair in range(head_dim // 2):
            angle = position / 10000 ** (pair / (head_dim // 2))
            scale = ((2 * pair + 0.4 * head_dim) / (1.4 * head_dim)) ** ((position - (seq + 1) // 2) / 512)
            scale = 1 / scale if downscale else scale
            a, b = x[:, position, :, 2 * pair], x[:, position, :, 2 * pair + 1]
            out[:, position, :, 2 * pair] = scale * (a * math.cos(angle) - b * math.sin(angle))
            out[:, position, :, 2 * pair + 1] = scale * (b * math.cos(angle) + a * math.sin(angle))
    return out


def stack(x, weights, config, kind, attend):
    """Return the input and what each layer gives, and the last state as the model gives it, in float64.

    `attend(q, k, v, w, r, causal)` is the attention between the projections.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    heads, eps = config[f"{kind}_attention_heads"], config.get("layernorm_eps", 1e-5)
    activate = {"gelu": F.gelu, "relu": F.relu}[config.get("activation_fn", "gelu")]
    before = comes_before(config, kind)
    alpha = (2 * config[f"{kind}_layers"]) ** 0.25 if config.get("deepnorm", False) else 1.0

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = x.double()
    states = [x]
    for index in range(config[f"{kind}_layers"]):
        layer = f"layers.{index}"
        residual = x
        y = norm(x, f"{layer}.self_attn_layer_norm") if before else x
        q, k, v = (
            linear(y, f"{layer}.self_attn.{name}").unflatten(-1, (heads, -1)) for name in ("q_proj", "k_proj", "v_proj")
        )
        if config.get("xpos_rel_pos"):
            q, k = xpos(q, False), xpos(k, True)
        y = attend(q, k, v, config["segment_length"], config["dilated_ratio"], kind == "decoder").flatten(2)
        if has_inner_norms(config):
            y = norm(y, f"{layer}.self_attn.inner_attn_ln")
        x = residual * alpha + linear(y, f"{layer}.self_attn.out_proj")
        x = x if before else norm(x, f"{layer}.self_attn_layer_norm")
        residual = x
        y = norm(x, f"{layer}.final_layer_norm") if before else x
        y = activate(linear(y, f"{layer}.ffn.fc1"))
        if has_inner_norms(config):
            y = norm(y, f"{layer}.ffn.ffn_layernorm")
        x = residual * alpha + linear(y, f"{layer}.ffn.fc2")
        x = x if before else norm(x, f"{layer}.final_layer_norm")
        states.append(x)
    if "layer_norm.weight" in weights:
        x = norm(x, "layer_norm")
    return states, x


def logits(tokens, weights, config, attend):
    """Return what a decoder says of tokens."""
    scale = 1.0 if config.get("no_scale_embedding", True) else math.sqrt(config["decoder_embed_dim"])
    _, x = stack(weights["embed_tokens.weight"].double()[tokens] * scale, weights, config, "decoder", attend)
    return x @ weights["output_projection.weight"].double().T
