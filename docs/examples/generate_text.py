"""Go on with a text by a trained model, token by token, in Python.

    python docs/examples/generate_text.py                           # trains a small model for some seconds first
    python docs/examples/generate_text.py --checkpoint runs/mine --prompt "Once upon a time" --new-tokens 500

The prompt is read once, in chunks, for all samples. What a token takes depends on the segments that are open, not on
how much came before.
"""

import argparse
import inspect
from pathlib import Path

import torch

from longnet_hpc import LongNet, LongNetConfig, load_model
from longnet_hpc.generate import generate


def trained_model(steps):
    """Return a small model that has seen a module of Python, byte by byte."""
    torch.manual_seed(0)
    text = torch.tensor(list(Path(inspect.getsourcefile(argparse)).read_bytes()))
    model = LongNet(
        LongNetConfig(layers=2, embed_dim=64, heads=4, segment_lengths=(64, 512), dilation_rates=(1, 8))
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        start = int(torch.randint(len(text) - 1025, ()))
        window = text[start : start + 1025].unsqueeze(0)
        loss = model.loss(window[:, :-1], window[:, 1:]) / 1024
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"trained for {steps} steps: {loss.item():.3f} nats a token\n")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of a model over bytes, or the folder of a run")
    parser.add_argument("--prompt", default="    def __init__(self", help="text to go on with")
    parser.add_argument("--new-tokens", type=int, default=80, help="tokens of each sample (default: 80)")
    parser.add_argument("--samples", type=int, default=2, help="samples (default: 2)")
    parser.add_argument("--steps", type=int, default=40, help="steps of training without a checkpoint (default: 40)")
    options = parser.parse_args()

    model = load_model(options.checkpoint) if options.checkpoint else trained_model(options.steps)
    prompt = torch.tensor([list(options.prompt.encode())])
    made = generate(
        model, prompt, options.new_tokens, samples=options.samples, temperature=0.7, top_p=0.95,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    samples = torch.stack(list(made), dim=1)  # (samples, new_tokens); each token came as soon as it was made
    for number, sample in enumerate(samples.tolist(), 1):
        print(f"--- {number} of {options.samples}\n{options.prompt}{bytes(sample).decode(errors='replace')}\n")


if __name__ == "__main__":
    main()
