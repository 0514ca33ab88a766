"""A Hugging Face model of Llama's architecture with dilated attention against its own (sdpa), on one device.

    python bench/llama.py --out bench/records/llama.jsonl
    python bench/llama.py --geometric 2048 4 --tokens 131072
    python bench/llama.py --preset tiny --tokens 2048 --device cpu

Random weights, one sequence. Two things are timed: the forward pass over the whole sequence, with the logits of its
last token (as a prompt is read), and that of one more token with a cache of keys and values. The ways take turns:
`longnet`, `sdpa` as transformers calls it, `sdpa_cudnn`, the same with cuDNN as the only kernel, where that can be had,
and `rest`, the model with attention left out, which none can be faster than. Beside the timing stands a check: one
segment without dilation gives the logits of sdpa, a token after a cache those of the whole sequence, and all logits are
finite.
"""

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from timing import WARMUP, interleaved_seconds, ratio
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers import __version__ as transformers_version

from longnet_hpc import Pattern
from longnet_hpc.attention import choose_backend
from longnet_hpc.integrations.transformers import register
from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.record import append_record, make_record, where

PRESETS = {
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {  # Llama 3.1 8B
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 128, "vocab_size": 256,
    },
}  # fmt: skip
WAYS = ("longnet", "sdpa", "sdpa_cudnn", "rest")
CHECKED_TOKENS = 4096
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""Largest difference of right logits, in units of their norm."""


def model_of(options, device, dtype):
    torch.manual_seed(0)
    longest = max(options.tokens) + 1
    config = LlamaConfig(**PRESETS[options.preset], max_position_embeddings=longest, rope_theta=500000.0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def without_attention(module, query, key, value, attention_mask, **others):
    """Return the queries in the place of attention."""
    return query.transpose(1, 2), None


class Forward:
    """The forward pass of a model by one of the `WAYS`."""

    def __init__(self, model, way, tokens, cache=None):
        self.model, self.tokens, self.cache = model, tokens, cache
        self.name = "sdpa" if way == "sdpa_cudnn" else way
        self.only_cudnn = way == "sdpa_cudnn"

    @torch.no_grad()
    def __call__(self):
        """Return the logits of the last token, `(1, 1, vocab_size)`."""
        self.model.set_attn_implementation(self.name)
        before = self.cache.get_seq_length() if self.cache is not None else 0
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.only_cudnn else nullcontext():
            logits = self.model(
                self.tokens, cache=self.cache, use_cache=self.cache is not None, logits_to_keep=1
            ).logits
        if before:
            self.cache.crop(-self.tokens.shape[1])  # so that the same token can follow again
        return logits


def ways_that_work(model, tokens):
    """Return the ways that this machine has kernels for."""
    ways = []
    for way in WAYS:
        try:
            Forward(model, way, tokens[:, :256])()
        except RuntimeError as error:
            if way != "sdpa_cudnn":
                raise
            print(f"no {way} here: {str(error).splitlines()[0]}", flush=True)
            continue
        ways.append(way)
    return ways


def logits_differ_by(model, tokens):
    """Return how far logits are from others, relative to these.

    Those of one segment from those of sdpa, of a cached token from those of the whole; and, to show what that is
    worth, those of the model without attention from those of sdpa.
    """
    with torch.no_grad():
        logits = {}
        for name in ("rest", "sdpa", "one_segment", "longnet"):
            model.set_attn_implementation(name)
            logits[name] = model(tokens, use_cache=False).logits[:, -1].double()
        cache = DynamicCache(config=model.config)
        model(tokens[:, :-1], cache=cache, logits_to_keep=1)
        cached = model(tokens[:, -1:], cache=cache).logits[:, -1].double()
    pairs = ((logits["one_segment"], logits["sdpa"]), (cached, logits["longnet"]), (logits["rest"], logits["sdpa"]))
    return [float((got - wanted).norm() / wanted.norm()) for got, wanted in pairs]


def seconds_of(name, forwards, repeats, device, *, queued):
    """Return the median of each way, and how many times ours is faster than each other."""
    seconds = interleaved_seconds(list(forwards.values()), repeats, device, queued=queued)
    by_way = dict(zip(forwards, seconds, strict=True))
    result = {f"{way}_{name}_seconds": statistics.median(its) for way, its in by_way.items()}
    for way in list(by_way)[1:]:
        compared = ratio(by_way[way], by_way["longnet"])
        result[f"{way}_over_longnet_{name}"] = compared.median
        result[f"{way}_over_longnet_{name}_range"] = [compared.low, compared.high]
    return result


def peak_bytes(function, device):
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(model, pattern, seq_len, options, device):
    """Return the results at one length."""
    tokens = torch.randint(0, model.config.vocab_size, (1, seq_len + 1), device=device)
    whole, next_token = tokens[:, :seq_len], tokens[:, seq_len:]
    checked = whole[:, :CHECKED_TOKENS]
    register(pattern.segment_lengths, pattern.dilation_rates, backend=options.backend)
    register([checked.shape[1]], [1], backend=options.backend, name="one_segment")
    ways = ways_that_work(model, whole)
    differences = logits_differ_by(model, checked)
    forwards = {way: Forward(model, way, whole) for way in ways}
    result = {
        "backend_used": choose_backend(options.backend, device, model.dtype, model.config.head_dim).name,
        "model_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checked_tokens": checked.shape[1],
        "one_segment_relative_difference": differences[0],
        "cached_token_relative_difference": differences[1],
        "without_attention_relative_difference": differences[2],
    }
    is_finite = all(bool(torch.isfinite(forwards[way]()).all()) for way in ways)
    result |= seconds_of("forward", forwards, options.repeats, device, queued=True)
    result |= {f"{way}_peak_memory_bytes": peak_bytes(forward, device) for way, forward in forwards.items()}
    attention = {way: result[f"{way}_forward_seconds"] - result["rest_forward_seconds"] for way in ways}
    result |= {f"{way}_attention_seconds": attention[way] for way in ways if way != "rest"}
    cache = DynamicCache(config=model.config)
    Forward(model, "longnet", whole, cache)()
    cached = {way: Forward(model, way, next_token, cache) for way in ways if way != "sdpa_cudnn"}
    result |= seconds_of("token", cached, max(11, options.repeats), device, queued=False)
    result["cache_bytes"] = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    tolerance = TOLERANCE[model.dtype]
    result["passed"] = is_finite and max(differences[:2]) < tolerance and differences[2] > 2 * tolerance
    return result


def line_of(seq_len, result):
    parts = []
    for way in WAYS:
        if f"{way}_forward_seconds" in result:
            peak = result[f"{way}_peak_memory_bytes"]
            memory = f" ({peak / 1e9:.1f} GB)" if peak else ""
            parts.append(f"{way} {result[f'{way}_forward_seconds']:.4f} s{memory}")
    best = min(result[key] for way in ("sdpa", "sdpa_cudnn") if (key := f"{way}_over_longnet_forward") in result)
    return (
        f"{seq_len:>8,} tokens: {', '.join(parts)}; {best:.2f} times as fast as the best sdpa; one more token "
        f"{result['longnet_token_seconds'] * 1e3:.2f} ms, sdpa {result['sdpa_token_seconds'] * 1e3:.2f} ms; "
        f"off by {result['one_segment_relative_difference']:.1e} and {result['cached_token_relative_difference']:.1e}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1 << 15, 1 << 17], help="of a sequence")
    parser.add_argument("--geometric", nargs=2, type=int, help="first w (tokens) and ratio; else the paper's pattern")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--backend", default="auto", help="attention backend (default: auto)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, of which the median counts")
    parser.add_argument("--out", type=Path, help="file that the records are appended to")
    options = parser.parse_args()
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, dtype = torch.device(name), torch.bfloat16 if name == "cuda" else torch.float32
    AttentionInterface.register("rest", without_attention)
    model = model_of(options, device, dtype)
    wrong = False
    for seq_len in sorted(options.tokens):
        pattern = Pattern.from_lists(PAPER_SEGMENT_LENGTHS, PAPER_DILATION_RATES)
        if options.geometric:
            pattern = Pattern.geometric(seq_len, *options.geometric)
        try:
            result = measure(model, pattern, seq_len, options, device)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{seq_len:>8,} tokens: out of memory: {str(error).splitlines()[0]}", flush=True)
            continue
        passed = result.pop("passed")
        wrong |= not passed
        print(line_of(seq_len, result), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            place = {**where(), "gpu": torch.cuda.get_device_name() if name == "cuda" else None}
            place["versions"]["transformers"] = transformers_version
            config = {
                "preset": options.preset, **PRESETS[options.preset], "tokens": seq_len, "backend": options.backend,
                "segment_lengths": list(pattern.segment_lengths), "dilation_rates": list(pattern.dilation_rates),
                "device": name, "dtype": str(dtype).removeprefix("torch."),
            }  # fmt: skip
            record = make_record(
                "llama",
                config=config,
                results=result,
                place=place,
                check=(
                    "one segment gives the logits of sdpa, a cached token those of the whole; all are finite",
                    passed,
                ),
                warmup=WARMUP,
                repeats=options.repeats,
                statistic="median",
            )
            append_record(options.out, record)
    if wrong:
        raise SystemExit("error: logits were wrong, so the times mean nothing")


if __name__ == "__main__":
    main()
