"""Evaluation: loss, perplexity and bits per byte of a corpus, and the loss by how much context was available."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longnet_hpc.checkpoint import FOLDER, Checkpoint, DataOrder, find_checkpoint, load_checkpoint
from longnet_hpc.comm import agreed, all_reduce_sum
from longnet_hpc.comm.launch import Launch
from longnet_hpc.compute import Compute
from longnet_hpc.config import EvalConfig
from longnet_hpc.config_file import CONFIG_NAME, flat_table, to_table, write_toml
from longnet_hpc.data import Corpus, SequenceReader
from longnet_hpc.errors import CheckpointError, CorpusError
from longnet_hpc.files import check_writable, naming_errors, replace_file
from longnet_hpc.model import LongNet
from longnet_hpc.optimizer import load_weights
from longnet_hpc.progress import steps_bar
from longnet_hpc.record import append_record, make_record, where
from longnet_hpc.trace import span
from longnet_hpc.train import RECORD_NAME

__all__ = ["RESULT_NAME", "Evaluation", "Subject", "evaluate", "write_evaluation"]

_PATHS = ("checkpoint", "corpus", "output")
"""Fields that may differ between ranks: what matters is what the files hold."""

RESULT_NAME, PICTURE_NAME, POSITION_PICTURE_NAME = "result.json", "loss_by_context.png", "loss_by_position.png"
"""Files in the folder of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """What came out of an evaluation."""

    config: EvalConfig
    """How it was made, checkpoint and corpus by their absolute paths."""
    model: dict[str, Any]
    """Config of the model."""
    folder: Path
    """Folder for the results."""
    results: dict[str, Any]
    """Figures: ``loss`` (nats a token), ``perplexity``, ``bits_per_token``, ``bits_per_byte``, ``tokens``, ``seconds``,
    ``corpus_seen_in_training`` (whether it is the corpus that the model was trained on), and ``loss_by_context``: for
    bins of 1, 2, 3-4, 5-8, ... tokens of context, how many tokens, their mean loss, and its standard error as if they
    were independent. A stream has ``loss_by_position``, too, ``loss_by_context`` by the tokens since the start of the
    widest segment, and what `evaluate_stream.Streamed.results` names."""


def evaluate(config: EvalConfig, launch: Launch, checkpoint_path: Path, corpus_path: Path) -> Evaluation:
    """Evaluate a checkpoint on a corpus; `write_evaluation` keeps the results. Collective.

    That they can be kept is made sure of first.

    Parameters
    ----------
    config : EvalConfig
        How much of the corpus, in which sequences.
    launch : Launch
        This rank.
    checkpoint_path : Path
        Checkpoint file, or the folder of a run for its latest one.
    corpus_path : Path
        Corpus file; sequences are taken in its order.

    Returns
    -------
    Evaluation
        The same on all ranks.

    Raises
    ------
    LongNetError or OSError
        If checkpoint, corpus, config and ranks do not fit together, the folder for the results cannot be written, or
        the loss is not finite; the same on all ranks.
    """
    with ExitStack() as stack:
        subject = _open(config, launch, checkpoint_path, corpus_path, stack)
        subject.compute.warn_of_reach()
        subject.model.to(subject.compute.device).eval()
        begin, longest = time.perf_counter(), subject.seq_len
        more: dict[str, Any] = {}
        if config.stream:
            from longnet_hpc.evaluate_stream import sum_stream

            streamed = sum_stream(config, launch, subject)
            totals, more = streamed.by_context, streamed.results()
            more["loss_by_position"] = _bins(streamed.by_position, longest, "position")
            longest = min(longest, max(subject.model.config.segment_lengths))
        else:
            totals = _sum_by_context(config, launch, subject)
        seconds = more.pop("seconds", time.perf_counter() - begin)
        corpus = subject.corpus
        results = _results(totals, corpus.num_tokens / corpus.num_bytes)
        results["loss_by_context"] = _bins(totals, longest)
        if not math.isfinite(results["perplexity"]):
            raise CheckpointError(f"{subject.path} is of no use: its loss is {results['loss']:.4g} nats a token")
    results |= {
        "seq_len": subject.seq_len,
        "seconds": seconds,
        "tokens_per_second": results["tokens"] / seconds,
        **more,
        "corpus": str(corpus_path),
        "corpus_seen_in_training": subject.seen,
        "checkpoint": str(subject.path),
        "step": subject.checkpoint.step,
    }
    config = replace(config, checkpoint=subject.path.resolve(), corpus=corpus_path.resolve())
    return Evaluation(config, dict(subject.checkpoint.model), subject.folder, results)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on what."""

    path: Path
    """Checkpoint file."""
    checkpoint: Checkpoint
    """What it holds."""
    seq_len: int
    """Length of a sequence, in tokens."""
    compute: Compute
    """Where and how."""
    corpus: Corpus
    """Where the tokens are."""
    order: DataOrder
    """In which order they are taken."""
    model: LongNet
    """The model, with its weights."""
    folder: Path
    """For the results."""

    @property
    def seen(self) -> bool:
        """Whether the model was trained on this corpus."""
        return self.order.same_corpus(self.checkpoint.order)


def _open(config: EvalConfig, launch: Launch, checkpoint_path: Path, corpus_path: Path, stack: ExitStack) -> Subject:
    """Read and check everything that is needed; the stack closes it. Collective."""
    facts: dict[str, object] = {}
    with agreed(launch.comm, facts=facts):
        path = find_checkpoint(checkpoint_path)
        checkpoint = load_checkpoint(path, weights_only=True)
        corpus = stack.enter_context(Corpus(corpus_path, config.read_retry_seconds))
        longest = corpus.num_tokens - 1
        seq_len = config.seq_len or (longest if config.stream else checkpoint.order.seq_len)
        if config.stream and not 0 < seq_len <= longest:
            raise CorpusError(f"corpus has {corpus.num_tokens} tokens, too few for one sequence of {seq_len}")
        compute = Compute(config, launch, checkpoint.model_config, seq_len)
        compute.check_vocabulary(corpus.vocab_size)
        order = DataOrder.of(corpus, **_reading(config, seq_len))
        model = LongNet(checkpoint.model_config)
        load_weights(model, checkpoint.tensors)
        model.half_residual = config.half_residual
        folder = config.output or _folder_of(path, corpus_path, checkpoint.step)
        if launch.rank == 0:
            with naming_errors(f"cannot write results to {folder}"):
                check_writable(folder)
        facts.update({key: value for key, value in flat_table(config).items() if key not in _PATHS})
        facts.update(order.facts())
        facts["step of the checkpoint"] = checkpoint.step
    return Subject(path, checkpoint, seq_len, compute, corpus, order, model, folder)


def _reading(config: EvalConfig, seq_len: int) -> dict[str, Any]:
    return {"seq_len": seq_len, "batch_size": config.batch_size, "seed": 0, "shuffle": False}


def write_evaluation(evaluation: Evaluation, launch: Launch) -> None:
    """Write the results with their config, record and picture into their folder, made if need be. Collective.

    Raises
    ------
    OSError
        If they cannot be written; the same on all ranks.
    """
    with agreed(launch.comm), naming_errors(f"cannot write results to {evaluation.folder}"):
        if launch.rank == 0:
            _write(evaluation, launch)


def _folder_of(checkpoint: Path, corpus: Path, step: int) -> Path:
    """Return the folder of results by default: in that of the run, or beside a checkpoint that is in none."""
    beside = checkpoint.parent.parent if checkpoint.parent.name == FOLDER else checkpoint.parent
    return beside / f"eval-{corpus.stem}-step-{step}"


def _sum_by_context(config: EvalConfig, launch: Launch, subject: Subject) -> torch.Tensor:
    """Return tokens, summed losses and summed squares over all ranks, by the binary logarithm of the context."""
    compute, model = subject.compute, subject.model
    with agreed(launch.comm):
        reader = SequenceReader(subject.corpus, slice_of=compute.slice_of, **_reading(config, subject.seq_len))
    batches = min(reader.batches_per_epoch, config.max_batches or reader.batches_per_epoch)
    plan = compute.plan()
    contexts = torch.arange(compute.slice_of.start + 1, compute.slice_of.stop + 1, device=compute.device)
    bins = torch.frexp((contexts - 1).double()).exponent.long()  # exact, unlike a logarithm
    totals = torch.zeros((3, plan.seq_len.bit_length() + 1), dtype=torch.float64, device=compute.device)
    done = 0
    with reader, steps_bar(launch.rank, "eval", batches, unit="batch") as update:
        for _ in range(batches):
            with agreed(launch.comm), span("input", "tokens"):
                inputs, targets = (part.to(compute.device) for part in next(reader))
            with compute.autocast(), span("compute", "forward"):
                losses = model.token_losses(inputs, targets, plan)
            wide = losses.double()
            totals[0] += inputs.shape[0] * torch.bincount(bins, minlength=totals.shape[1])
            totals[1].index_add_(0, bins, wide.sum(0))
            totals[2].index_add_(0, bins, wide.square().sum(0))
            done += inputs.shape[0] * plan.seq_len
            update(f"{done:,} tokens")
    return all_reduce_sum(launch.comm, totals).cpu()


def _results(totals: torch.Tensor, tokens_per_byte: float) -> dict[str, Any]:
    """Return the figures of all tokens together."""
    counts, sums, _ = totals.tolist()
    tokens = int(sum(counts))
    loss = math.fsum(sums) / tokens
    bits = loss / math.log(2)
    return {
        "loss": loss,
        "perplexity": float(np.exp(np.float64(loss))),
        "bits_per_token": bits,
        # By the whole corpus's tokens a byte: exact for bytes, and up to its last, unfilled sequence for others.
        "bits_per_byte": bits * tokens_per_byte,
        "tokens": tokens,
    }


def _bins(totals: torch.Tensor, longest: int, what: str = "context") -> list[dict[str, Any]]:
    """Return the figures of bins that grow by powers of two, of context or of position, in tokens from 1 on."""
    return [
        {
            f"first_{what}": 2 ** (exponent - 1) + 1 if exponent else 1,
            f"last_{what}": min(2**exponent, longest),
            "tokens": int(count),
            "loss": total / count,
            "standard_error": math.sqrt(max(0.0, squares / count - (total / count) ** 2) / count),
        }
        for exponent, (count, total, squares) in enumerate(totals.T.tolist())
        if count
    ]


def _write(evaluation: Evaluation, launch: Launch) -> None:
    from longnet_hpc.picture import draw_context_curve

    folder, config, results = evaluation.folder, evaluation.config, evaluation.results
    folder.mkdir(parents=True, exist_ok=True)
    heading = "Resolved config of this evaluation; python -m longnet_hpc.run eval --config reads it."
    replace_file(folder / CONFIG_NAME, lambda partial: write_toml(partial, config, heading))
    replace_file(folder / RESULT_NAME, lambda partial: partial.write_text(json.dumps(results, indent=2) + "\n"))
    figures = {"loss_nats_per_token" if key == "loss" else key: value for key, value in results.items()}
    record = make_record(
        "eval",
        config=to_table(config) | {"model": evaluation.model},
        place=where(launch),
        results=figures,
        check=(
            "every bin of context has a finite loss",
            all(math.isfinite(b["loss"]) for b in results["loss_by_context"]),
        ),
    )
    append_record(folder / RECORD_NAME, record)
    title = f"Step {results['step']:,}: {results['bits_per_byte']:.3f} bits a byte of {results['tokens']:,} tokens"
    if results["corpus_seen_in_training"]:
        title += ", on the training corpus"
    draw_context_curve(results["loss_by_context"], title, folder / PICTURE_NAME)
    if "loss_by_position" in results:
        draw_context_curve(results["loss_by_position"], title, folder / POSITION_PICTURE_NAME, what="position")
