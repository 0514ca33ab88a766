"""A model trained with dense attention on short contexts, continued with dilated attention on long ones.

    python bench/longer_context.py --train train.h5 --held-out other.h5 --out bench/records/longer_context.jsonl
    python bench/longer_context.py --quick

Corpora are made by `longnet_hpc prepare`. One segment without dilation as long as the context is dense attention. Two
runs start from its weights, with as many tokens a step, the same learning rates, and an order of the corpus that is new
to both: one with dilated attention (the paper's branches) on long contexts, and, for comparison, one with dense
attention on short ones as before. Losses are of text that none has seen.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS
from longnet_hpc.record import append_record, make_record

SHORT, LONG = 2048, 32768
DILATED = list(zip(PAPER_SEGMENT_LENGTHS, PAPER_DILATION_RATES, strict=True))
NAMES = ("dense_at_short", "dilated_at_short", "dilated_at_long", "dense_continued_at_short")
TOLERANCE = 0.01
"""How much larger, relatively, the loss of short contexts may be after the model was continued on long ones."""
CHECK = (
    f"with dilated attention the loss of short contexts is at most {TOLERANCE:.0%} larger than before, "
    "and that of long ones is smaller"
)


def run(*arguments):
    command = [sys.executable, "-m", "longnet_hpc", *map(str, arguments)]
    print("$ longnet_hpc", *arguments, flush=True)
    subprocess.run(command, check=True)


def pattern(branches):
    lengths, rates = zip(*branches, strict=True)
    return ["--model.segment-lengths", *lengths, "--model.dilation-rates", *rates]


class Runs:
    """Trainings and evaluations of one model, each in a folder of its own."""

    def __init__(self, options):
        self.options, self.folder = options, options.folder
        scale = options.scale
        self.short, self.long = SHORT // scale, LONG // scale
        self.dense = pattern([(self.short, 1)])
        self.dilated = pattern([(w // scale, r) for w, r in DILATED])

    def train(self, name, attention, seq_len, *, steps, learning_rate, seed=0, start_from=None):
        options = self.options
        run(
            "train", "--folder", self.folder / name, *self._corpus(options.train), *attention,
            "--model.layers", options.layers, "--model.embed-dim", options.embed_dim, "--model.heads", options.heads,
            "--seq-len", seq_len, "--batch-size", options.tokens_a_step // seq_len, "--steps", steps,
            "--save-every", steps, "--seed", seed, "--optimizer.learning-rate", learning_rate,
            "--optimizer.warmup-steps", max(1, steps // 20),
            *(["--start-from", self.folder / start_from] if start_from else []),
        )  # fmt: skip

    def evaluate(self, name, seq_len):
        """Return the loss in nats a token, and that by context."""
        output, options = self.folder / f"{name}-{seq_len}", self.options
        run(
            "eval", "--checkpoint", self.folder / name, *self._corpus(options.held_out), "--seq-len", seq_len,
            "--batch-size", options.tokens_a_step // seq_len,
            "--max-batches", max(1, options.held_out_tokens // options.tokens_a_step), "--output", output,
        )  # fmt: skip
        return json.loads((output / "result.json").read_text())

    def place(self):
        """Return where the runs took place, as that of the dilated model says."""
        first_line, *_ = (self.folder / "dilated" / "record.jsonl").read_text().splitlines()
        return json.loads(first_line)["where"]

    @staticmethod
    def _corpus(path):
        return ["--corpus", path] if path else []


def compared(losses):
    """Return what the record says: losses, their bins by context, and relative changes."""
    results = {f"{name}_loss": its["loss"] for name, its in losses.items()}
    results |= {f"{name}_loss_by_context": its["loss_by_context"] for name, its in losses.items()}
    before, after, long, dense = (losses[name]["loss"] for name in NAMES)
    return results | {
        "change_at_short": after / before - 1,
        "change_by_context": long / after - 1,
        "over_dense_continued_at_short": after / dense - 1,
        "long_over_dense_continued": long / dense - 1,
        "held_out_tokens": losses["dilated_at_long"]["tokens"],
    }


def is_as_it_should_be(results):
    """Return whether what `CHECK` says is true of the results of a record."""
    before, after, long, _ = (results[f"{name}_loss"] for name in NAMES)
    return after <= before * (1 + TOLERANCE) and long < after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="corpus (default: Python's standard library)")
    parser.add_argument("--held-out", type=Path, help="corpus that the losses are of")
    parser.add_argument("--folder", type=Path, default=Path("runs/longer_context"), help="of all runs, must not exist")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000, help="with dense attention")
    parser.add_argument("--more-steps", type=int, default=600, help="of each run that goes on from there")
    parser.add_argument("--tokens-a-step", type=int, default=1 << 17)
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="with dense attention; ends with a tenth of it"
    )
    parser.add_argument("--more-learning-rate", type=float, default=1e-4, help="of each run that goes on from there")
    parser.add_argument("--held-out-tokens", type=int, default=1 << 23)
    parser.add_argument("--scale", type=int, default=1, help="divides all lengths")
    parser.add_argument("--quick", action="store_true", help="a minute on a CPU, to see it work")
    parser.add_argument("--out", type=Path, help="file that the record is appended to")
    options = parser.parse_args()
    if options.quick:
        options.scale, options.layers, options.embed_dim, options.heads = 16, 2, 64, 2
        options.steps, options.more_steps, options.tokens_a_step, options.held_out_tokens = 40, 20, 1 << 12, 1 << 15
    if options.folder.exists():
        raise SystemExit(f"error: {options.folder} is there already")
    runs = Runs(options)
    runs.train("dense", runs.dense, runs.short, steps=options.steps, learning_rate=options.learning_rate)
    more = {"steps": options.more_steps, "learning_rate": options.more_learning_rate, "seed": 1, "start_from": "dense"}
    runs.train("dilated", runs.dilated, runs.long, **more)
    runs.train("dense_continued", runs.dense, runs.short, **more)
    losses = {}
    for name in NAMES:
        run_name, length = name.split("_at_")
        losses[name] = runs.evaluate(run_name, runs.short if length == "short" else runs.long)
    results = compared(losses)
    passed = is_as_it_should_be(results)
    print(
        f"loss at {runs.short:,} tokens {results['dense_at_short_loss']:.4f} nats with dense attention, continued with "
        f"dilated {results['dilated_at_short_loss']:.4f} ({results['change_at_short']:+.2%}), with dense "
        f"{results['dense_continued_at_short_loss']:.4f} (dilated {results['over_dense_continued_at_short']:+.2%} off "
        f"that); at {runs.long:,} tokens, of the same text, "
        f"{results['dilated_at_long_loss']:.4f} ({results['change_by_context']:+.2%}, and "
        f"{results['long_over_dense_continued']:+.2%} off dense attention at {runs.short:,})"
    )
    if options.out:
        config = {name: str(its) if isinstance(its, Path) else its for name, its in vars(options).items()}
        config |= {"short": runs.short, "long": runs.long, "dilated": [(w // options.scale, r) for w, r in DILATED]}
        record = make_record(
            "longer_context",
            config=config,
            results=results,
            place=runs.place(),
            check=(CHECK, passed),
            warmup=0,
            repeats=1,
            statistic="single",
        )
        append_record(options.out, record)
    if not passed:
        raise SystemExit(f"error: this is not so: {CHECK}")


if __name__ == "__main__":
    main()
