"""Prepare a corpus, train a small model on it, and evaluate it, as the commands of the same names do.

    python docs/examples/train_on_your_own_text.py                                  # a module of Python, in seconds
    python docs/examples/train_on_your_own_text.py my_texts/ --seq-len 65536 --steps 500
    mpirun -n 4 python docs/examples/train_on_your_own_text.py my_texts/            # each rank a quarter of a sequence

Everything lies in the folder of the run: config, metrics, checkpoints, records, pictures.
"""

import argparse
import inspect
from datetime import datetime
from pathlib import Path

from longnet_hpc import LongNetConfig
from longnet_hpc.comm import broadcast_object
from longnet_hpc.comm.launch import start
from longnet_hpc.config import EvalConfig, OptimizerConfig, TrainConfig
from longnet_hpc.data import prepare
from longnet_hpc.evaluate import evaluate, write_evaluation
from longnet_hpc.train import train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files, folders, archives (default: a module of Python)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--steps", type=int, default=12, help="training steps (default: 12)")
    options = parser.parse_args()

    launch = start()  # MPI, where a launcher asks for it, and the device of this rank
    stamp = broadcast_object(launch.comm, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder = Path("runs") / f"example-{stamp}"
    corpus = prepare(options.texts or [inspect.getsourcefile(argparse)], folder.with_suffix(".h5"), comm=launch.comm)

    model = LongNetConfig.preset("tiny", layers=2, segment_lengths=(256, 2048), dilation_rates=(1, 8))
    config = TrainConfig(
        folder=folder, model=model, seq_len=options.seq_len, steps=options.steps,
        optimizer=OptimizerConfig(warmup_steps=options.steps // 10),
    )  # fmt: skip
    result = train(config, launch, corpus)

    evaluation = evaluate(EvalConfig(max_batches=4), launch, result.folder, corpus)
    write_evaluation(evaluation, launch)
    if launch.rank == 0:
        print(f"loss {result.loss:.3f} nats a token at the end of {result.steps} steps")
        print(f"evaluation: {evaluation.results['bits_per_byte']:.3f} bits a byte, on the training corpus")
        print(f"results: {evaluation.folder} and {result.folder}")


if __name__ == "__main__":
    main()
