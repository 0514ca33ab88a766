"""Walk through one long sequence chunk by chunk: memory stays the same, and so does the result.

    python docs/examples/stream_a_long_sequence.py
    python docs/examples/stream_a_long_sequence.py --seq-len 4194304 --chunk-len 65536

Of what is past, each layer carries only the sparse keys and values of segments that are still open. With gradients,
`train --stream` does the same, there and back.
"""

import argparse

import torch

from longnet_hpc import LongNet, LongNetConfig, Pattern
from longnet_hpc.stream import SequenceStream


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=16384, help="tokens of the sequence (default: 16384)")
    parser.add_argument("--chunk-len", type=int, default=2048, help="tokens of a chunk (default: 2048)")
    options = parser.parse_args()

    torch.manual_seed(0)
    pattern = Pattern.geometric(options.seq_len, base=256, ratio=4)
    lists = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    model = LongNet(LongNetConfig(layers=2, embed_dim=64, heads=4, **lists)).eval()
    tokens = torch.randint(0, 256, (1, options.seq_len + 1))

    stream = SequenceStream(pattern, options.seq_len, layers=model.config.layers)
    total = torch.zeros((), dtype=torch.float64)
    while stream.position < options.seq_len:
        start = stream.position
        stop = min(start + options.chunk_len, options.seq_len)
        with stream.next_chunk(stop - start) as plan:
            total += model.loss(tokens[:, start:stop], tokens[:, start + 1 : stop + 1], plan)
        carried = sum(rows.numel() * rows.element_size() for carry in stream.carries for rows in carry.rows.values())
        print(f"after {stop:9,} tokens: {total / stop:.4f} nats a token, {carried:,} bytes carried")

    if options.seq_len <= 65536:  # short enough to compare with the sequence in one piece
        whole = model.loss(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(total, whole.double())
        print(f"in one piece:             {whole / options.seq_len:.4f} nats a token")


if __name__ == "__main__":
    main()
