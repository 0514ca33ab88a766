"""Put dilated attention in the place of `torch.nn.MultiheadAttention`, weights included.

    python docs/examples/attention_drop_in.py

Where one segment holds the whole sequence, without dilation, the result is that of dense attention. On a long sequence
the layer takes time in proportion to the length.
"""

import argparse
import time

import torch
from torch import nn

from longnet_hpc import DilatedAttention


def replace_attention(module, segment_lengths, dilation_rates):
    """Replace every `nn.MultiheadAttention` within a module by dilated attention with the same weights."""
    for name, child in module.named_children():
        if type(child) is nn.MultiheadAttention:
            new = DilatedAttention(
                child.embed_dim, child.num_heads, bias=child.in_proj_bias is not None, batch_first=child.batch_first,
                segment_lengths=segment_lengths, dilation_rates=dilation_rates,
            )  # fmt: skip
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            replace_attention(child, segment_lengths, dilation_rates)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=int, default=32768, help="tokens of the longest sequence (default: 32768)")
    options = parser.parse_args()

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(1, 1024, 128)
    mask = nn.Transformer.generate_square_subsequent_mask(1024)
    dense = encoder(x, mask=mask, is_causal=True)

    replace_attention(encoder, [1024], [1])  # one segment that holds everything
    torch.testing.assert_close(encoder(x, mask=mask, is_causal=True), dense, rtol=1e-4, atol=1e-5)
    print("one segment without dilation: the result is that of dense attention")

    attention = DilatedAttention(128, 4, segment_lengths=[512, 4096, 32768], dilation_rates=[1, 8, 64]).eval()
    length = 2048
    while length <= options.longest:
        x = torch.randn(1, length, 128)
        begin = time.perf_counter()
        attention(x, x, x, is_causal=True)
        seconds = time.perf_counter() - begin
        print(f"{length:9,} tokens: {seconds:.3f} s, {1e6 * seconds / length:.2f} microseconds a token")
        length *= 4


if __name__ == "__main__":
    main()
