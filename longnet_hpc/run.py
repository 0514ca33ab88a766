"""The command line: ``python -m longnet_hpc.run COMMAND``, alone, under mpirun, or under srun.

Parsing needs neither torch nor MPI, so the help comes at once; the rooms are entered only when there is work.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from longnet_hpc.command_line import parse
from longnet_hpc.config import ComputeConfig, EvalConfig, GenerateConfig, PrepareConfig, TrainConfig
from longnet_hpc.errors import ConfigError, LongNetError, StoppedError
from longnet_hpc.launcher import environment_rank, environment_size
from longnet_hpc.scaling.config import BenchConfig, CalibrateConfig, PlanConfig, ReportConfig, SimulateConfig

if TYPE_CHECKING:
    from pathlib import Path

    from longnet_hpc.comm.launch import Launch
    from longnet_hpc.comm.meeting import Meeting
    from longnet_hpc.train import TrainResult

__all__ = ["main"]

_STOPPED = 75
"""Exit code of a job that has kept what it did and is to be called again: EX_TEMPFAIL of BSD's sysexits."""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    words : sequence of str, optional
        The command line without the program; that of this process by default.

    Returns
    -------
    int
        Exit code: 0; 75 from a job that stopped early, as it was to, and can be gone on with; or 2 after an error that
        the user can mend, which is told in one line on rank 0. Any other exception passes through; on several ranks it
        then ends all of them.
    """
    mistake: LongNetError | None = None
    command, config = "", None
    try:
        command, config = parse(sys.argv[1:] if words is None else words, console=environment_rank() == 0)
    except LongNetError as error:
        mistake = error
        if environment_size() == 1:
            return _tell(error)
    if command in _ALONE:  # no need of torch and MPI: rank 0 does it, if there are ranks
        return 0 if environment_rank() else _run_alone(_ALONE[command], config)

    from longnet_hpc.comm import agree
    from longnet_hpc.comm.launch import start
    from longnet_hpc.comm.meeting import Meeting
    from longnet_hpc.comm.watchdog import watched
    from longnet_hpc.trace_file import traced

    try:
        if isinstance(config, ComputeConfig):
            launch = start(device=config.device, transport=config.transport)
        else:
            launch = start(device="cpu")
    except LongNetError as error:
        if environment_rank() == 0:
            return _tell(error)
        time.sleep(2)  # some launchers end all ranks at the first exit code but 0, and rank 0 has a line to say
        return 2
    meeting = Meeting(launch.comm)
    _log_on(launch)
    try:
        agree(launch.comm, mistake)
        patience = getattr(config, "watchdog_seconds", 0.0)
        with watched(launch.comm, patience), traced(getattr(config, "trace", None), launch):
            _COMMANDS[command](config, launch)
    except StoppedError as stopped:
        if launch.rank == 0:
            _say(("stopped", str(stopped)))
        return _STOPPED
    except (LongNetError, OSError) as error:
        return _end_together(error, launch, meeting)
    return 0


def _tell(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return 2


def _run_alone(command: Callable[[Any], object], config: Any) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        command(config)
    except (LongNetError, OSError) as error:
        return _tell(error)
    return 0


def _end_together(error: Exception, launch: Launch, meeting: Meeting) -> int:
    """End with one line if all ranks have an error; one rank's own, not agreed on, is a defect and ends the job."""
    if launch.rank == 0:
        _tell(error)
    if not meeting.all_arrive():
        raise error
    return 2


def _log_on(launch: Launch) -> None:
    """Let rank 0 say what happens, a line an event, and the others only what is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("longnet_hpc").setLevel(logging.INFO if launch.rank == 0 else logging.WARNING)


def _prepare(config: PrepareConfig, launch: Launch) -> None:
    from longnet_hpc.corpora import prepare_corpus
    from longnet_hpc.data import Corpus

    path = prepare_corpus(config, launch)
    if launch.rank == 0:
        with Corpus(path) as corpus:
            print(f"{path}: {corpus.num_tokens:,} tokens of {corpus.num_documents:,} documents")


def _train(config: TrainConfig, launch: Launch) -> TrainResult:
    from longnet_hpc.corpora import embedded_corpus
    from longnet_hpc.train import RUNS, train

    corpus = config.corpus or embedded_corpus(launch, "train", RUNS / "corpus")
    result = train(config, launch, corpus)
    if launch.rank == 0:
        _say(
            ("trained", f"{result.parameter_count:,} parameters, {result.steps:,} steps, ranks: {launch.size}"),
            ("loss", f"{result.loss:.4f} nats a token at the end"),
            ("speed", f"{result.tokens_per_second:,.0f} tokens/s, {result.seconds:,.0f} s in all"),
            ("results", f"{result.folder}{os.sep}: loss.png, metrics.jsonl, record.jsonl, checkpoints, config.toml"),
        )
    return result


def _eval(config: EvalConfig, launch: Launch) -> None:
    if config.checkpoint is None:
        raise ConfigError("eval needs --checkpoint: a checkpoint file or the folder of a run")
    _evaluate(config, launch, config.checkpoint)


def _evaluate(config: EvalConfig, launch: Launch, checkpoint: Path) -> None:
    from longnet_hpc.corpora import embedded_corpus
    from longnet_hpc.evaluate import evaluate, write_evaluation
    from longnet_hpc.train import RUNS

    corpus = config.corpus or embedded_corpus(launch, "valid", RUNS / "corpus")
    evaluation = evaluate(config, launch, checkpoint, corpus)
    results = evaluation.results
    if launch.rank == 0:  # before they are written: a disk that is full by now does not take them along
        seen = ", on the training corpus" if results["corpus_seen_in_training"] else ""
        _say(
            ("evaluated", f"{results['tokens']:,} tokens of {corpus}{seen}"),
            ("loss", f"{results['loss']:.4f} nats a token, perplexity {results['perplexity']:.3f}"),
            ("bits a byte", f"{results['bits_per_byte']:.4f}"),
            ("speed", f"{results['tokens_per_second']:,.0f} tokens/s, {results['seconds']:,.0f} s in all"),
        )
    write_evaluation(evaluation, launch)
    if launch.rank == 0:
        _say(("results", f"{evaluation.folder}{os.sep}: loss_by_context.png, result.json, config.toml"))


def _generate(config: GenerateConfig, launch: Launch) -> None:
    from longnet_hpc.generate import write_text

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know all characters
    try:
        made = write_text(config, launch, write)
    except BrokenPipeError:  # the reader of the text has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    speed = f", {made.tokens_per_second:,.1f} tokens/s" if made.later_tokens else ""
    print(
        f"{made.new_tokens:,} new tokens{speed}; prefill of {made.prompt_tokens:,} in {made.prefill_seconds:.3f} s",
        file=sys.stderr,
        flush=True,
    )


def _plan(config: PlanConfig) -> None:
    from longnet_hpc.scaling.plan import plan

    plan(config)


def _simulate(config: SimulateConfig) -> None:
    from longnet_hpc.scaling.simulate import simulate

    simulate(config)


def _report(config: ReportConfig) -> None:
    from longnet_hpc.scaling.report import report

    report(config)


def _calibrate(config: CalibrateConfig, launch: Launch) -> None:
    from longnet_hpc.scaling.calibrate import calibrate

    calibrate(config, launch)


def _bench(config: BenchConfig, launch: Launch) -> None:
    from longnet_hpc.scaling.bench import bench

    bench(config, launch)


def _main_job(config: TrainConfig, launch: Launch) -> None:
    """Train, then evaluate: on the files that the embedded corpus leaves out, or on the very corpus that was given."""
    from longnet_hpc.corpora import embedded_path
    from longnet_hpc.train import RUNS

    result = _train(config, launch)
    embedded = config.corpus is None or config.corpus.resolve() == embedded_path("train", RUNS / "corpus").resolve()
    alike: dict[str, Any] = {"max_batches": 40}
    names = ["device", "dtype", "backend", "transport", "half_residual", "deterministic"]
    if config.stream:  # what one chunk needs is there; what a whole sequence needs may not be
        alike, names = {}, [*names, "compile", "stream", "seq_len", "chunk_len"]
    alike |= {name: getattr(config, name) for name in names}
    evaluation = EvalConfig(checkpoint=result.folder, corpus=None if embedded else config.corpus, **alike)
    _evaluate(evaluation, launch, result.folder)


def _say(*lines: tuple[str, str]) -> None:
    print("\n".join(f"{name:>12}  {text}" for name, text in lines), flush=True)


_COMMANDS: dict[str, Callable[[Any, Launch], object]] = {
    "main": _main_job,
    "prepare": _prepare,
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "calibrate": _calibrate,
    "bench": _bench,
}
_ALONE: dict[str, Callable[[Any], object]] = {"plan": _plan, "simulate": _simulate, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
