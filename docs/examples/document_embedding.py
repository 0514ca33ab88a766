"""Embed long documents: a bidirectional LongNet reads each at full length, and a table says which are alike.

    python docs/examples/document_embedding.py my_texts/*.txt
    mpirun -n 4 python docs/examples/document_embedding.py book.txt other.txt         # ranks share each document
    python docs/examples/document_embedding.py book.txt other.txt --weights encoder.pth --config encoder.json

The embedding of a document is the mean over its bytes, each of which has seen what the branches offer of the whole.
Without weights the encoder has random ones, which show how, but have learned nothing. `--weights` takes those of an
encoder that torchscale has trained, a state dict with `encoder.*` and `embed_tokens.weight` for the 256 bytes, and
`--config` its EncoderConfig in JSON. `--torchscale` attends exactly as torchscale does, on one rank, not as the paper
says.
"""

import argparse
import inspect
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from longnet_hpc import EncoderConfig, LongNetEncoder, Partition, Pattern, SequencePlan
from longnet_hpc.comm import all_reduce_sum
from longnet_hpc.comm.launch import start
from longnet_hpc.integrations.torchscale import TorchscalePlan, load_encoder
from longnet_hpc.integrations.weights import read_weights


def random_encoder(longest):
    """Return a small encoder for documents of up to ``longest`` bytes, and embeddings of bytes."""
    torch.manual_seed(0)
    pattern = Pattern.geometric(longest, base=256, ratio=4)
    config = EncoderConfig(
        layers=2, embed_dim=128, heads=4, ffn_dim=512, positions="rotary",
        segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
    )  # fmt: skip
    return LongNetEncoder(config), torch.randn(256, config.embed_dim)


@torch.no_grad()
def embedding_of(document, encoder, embed_bytes, launch, as_torchscale):
    """Return the mean over the bytes of a document, of which each rank reads a slice."""
    if as_torchscale:
        own, plan = document, TorchscalePlan(encoder.config.pattern, len(document))
    else:
        owned = Partition.even(len(document), launch.size).slice_of(launch.rank)
        own = document[owned.start : owned.stop]
        plan = SequencePlan.build(encoder.config.pattern, len(own), comm=launch.comm, device=launch.device)
    x = F.embedding(torch.tensor(list(own), device=launch.device).long(), embed_bytes)[None]
    return all_reduce_sum(launch.comm, encoder(x, plan).sum(1)[0]) / len(document)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="*", help="files (default: three modules of Python)")
    parser.add_argument("--weights", type=Path, help="state dict of an encoder of torchscale, .pth or .safetensors")
    parser.add_argument("--config", type=Path, help="its EncoderConfig, JSON")
    parser.add_argument("--torchscale", action="store_true", help="attend exactly as torchscale does")
    parser.add_argument("--output", type=Path, help="file for the embeddings, .pt")
    options = parser.parse_args(words)
    if (options.weights is None) != (options.config is None):
        parser.error("--weights and --config belong together")
    launch = start()
    if options.torchscale and launch.size > 1:
        parser.error(f"--torchscale attends on one rank, got {launch.size}")

    paths = options.documents or [Path(inspect.getsourcefile(module)) for module in (argparse, inspect, json)]
    documents = {str(path): data for path in paths if (data := path.read_bytes())}
    if options.weights:
        weights = read_weights(options.weights)
        encoder = load_encoder(weights, json.loads(options.config.read_text()), prefix="encoder.")
        embed_bytes = weights["embed_tokens.weight"].float()
    else:
        encoder, embed_bytes = random_encoder(max(len(data) for data in documents.values()))
    encoder, embed_bytes = encoder.to(launch.device), embed_bytes.to(launch.device)

    embeddings = {
        name: embedding_of(document, encoder, embed_bytes, launch, options.torchscale).cpu()
        for name, document in documents.items()
    }
    if launch.rank == 0:
        together = F.normalize(torch.stack(list(embeddings.values())), dim=-1)
        print("cosines of embeddings")
        for (name, document), cosines in zip(documents.items(), together @ together.T, strict=True):
            print(*(f"{cosine:7.4f}" for cosine in cosines.tolist()), f"  {name} ({len(document):,} bytes)")
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            torch.save(embeddings, options.output)


if __name__ == "__main__":
    main()
