"""Each fault that a training may meet: what is said, the exit code, what is on disk, and what ``--resume`` does.

Tested here: what `faults` makes happen on one rank of a real training, and full disks. The others have tests already:

==============================  ==================================================================================
exception on one rank           test_bad_input: test_failure_of_one_rank_alone_ends_all_with_its_traceback
SIGKILL at any moment           test_kills: test_training_that_is_killed_again_and_again_ends_as_if_it_never_was
SIGSTOP, a rank that hangs      test_watchdog: test_training_is_watched, test_rank_that_hangs_is_named_...
gradient that is not finite     test_mpi_guard: test_gradient_that_is_not_finite_is_named_with_rank_and_tensor
weights that differ on a rank   test_mpi_guard: test_bit_that_flips_on_one_rank_ends_the_run_at_a_good_checkpoint
bit flip in a checkpoint        test_checkpoint: test_checkpoint_with_a_flipped_bit_is_refused
checkpoint cut short            test_train: test_damaged_checkpoint_is_passed_over_for_the_one_before
bit flip in a corpus, at start  test_bad_input: test_damaged_chunk_on_the_second_rank_alone
corpus that changes, and how    test_data_guard
full disk while evaluating      test_run: test_figures_are_shown_even_if_the_results_can_no_longer_be_written
==============================  ==================================================================================
"""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from faults import FILLER, REPLACEMENT, fill
from launching import MODEL, patience, run_python
from report_records import step as record_of_a_step

from longnet_hpc.data import prepare
from longnet_hpc.record import append_record, read_records
from longnet_hpc.run import main

FAULTS = Path(__file__).with_name("faults.py")
RANKS, STEPS, SEQ_LEN = 2, 6, 512
CODES_OF_A_KILL = (9, 137)
"""What MPICH's and Open MPI's mpirun end with when a rank is killed."""
SHARDED = ("--shard-optimizer",)
COMMON = ("--device", "cpu", "--read-retry-seconds", "1")


class Done(NamedTuple):
    code: int
    said: str
    folder: Path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n} of the text\n" for n in range(1000)))
    return path


@pytest.fixture
def corpus(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    prepare([other], tmp_path / REPLACEMENT, chunk_tokens=64)
    return prepare([text], tmp_path / "corpus.h5", chunk_tokens=64)


def train(corpus, folder, fault="nothing", rank=0, step=0, more=()):
    words = ("train", "--corpus", corpus, "--folder", folder, *MODEL, *COMMON, "--seq-len", SEQ_LEN, "--no-shuffle")
    words += ("--steps", STEPS, "--save-every", "2", "--optimizer.warmup-steps", "2", *more)
    done = run_python(FAULTS, fault, rank, step, *words, ranks=RANKS)
    return Done(done.returncode, done.stderr + done.stdout, folder)


def steps_in(folder):
    """Return the steps and losses of the metrics, every line of which must be whole."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def saved_in(folder):
    """Return the steps of the checkpoints, after making sure that nothing is half-written."""
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    whole = {name.partition(".")[0] for name in names if name.count(".") == 1}
    shards = Counter(name.partition(".")[0] for name in names if name.count(".") == 2)
    assert shards.keys() <= whole
    assert set(shards.values()) <= {RANKS}
    return sorted(int(name.removeprefix("step-")) for name in whole)


def resume(folder, capsys, more=()):
    """Go on in this process, on one rank."""
    capsys.readouterr()
    code = main(["train", "--resume", str(folder), *COMMON, *more])
    return Done(code, capsys.readouterr().err, folder)


def assert_goes_on(folder, healthy, capsys):
    """Make sure that a resumption ends as if nothing had been."""
    done = resume(folder, capsys)
    assert done.code == 0, done.said
    assert steps_in(folder) == pytest.approx(healthy, rel=1e-4)
    assert saved_in(folder) == [4, 6]


@pytest.fixture(scope="module")
def healthy(text, tmp_path_factory):
    """The losses of a training in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("healthy")
    done = train(prepare([text], folder / "corpus.h5", chunk_tokens=64), folder / "run")
    assert done.code == 0, done.said
    assert saved_in(done.folder) == [4, 6]
    return steps_in(done.folder)


ENDS = {  # on which rank, before which step; exit code, what is said once, steps of the checkpoints
    "signalled": (1, 3, 75, r"stopped  left after step 3 of 6; train --resume .* goes on", [2, 3]),
    "nan_loss": (1, 4, 2, r"error: training diverged in step 4: .*; rank 1: loss, .*step-00000002", [2]),
    "failing_disk": (1, 3, 2, r"error: cannot read .*h5: Input/output error; it was tried \d+ times in 1 s", [2]),
}


@pytest.mark.parametrize("fault", ENDS)
def test_training_that_a_fault_ends_goes_on_from_what_it_saved(corpus, tmp_path, healthy, capsys, fault):
    rank, step, code, said, saved = ENDS[fault]
    done = train(corpus, tmp_path / "run", fault, rank, step)
    assert done.code == code, done.said
    assert len(re.findall(said, done.said)) == 1, done.said
    assert "Traceback" not in done.said
    assert saved_in(done.folder) == saved
    assert_goes_on(done.folder, healthy, capsys)


def test_crash_between_the_rename_of_a_checkpoint_and_its_sync_costs_no_more_than_the_steps_since_the_one_before(
    corpus, tmp_path, healthy, capsys
):
    # Before step 4, the checkpoint of step 2 being on the disk: the next is that of step 4.
    done = train(corpus, tmp_path / "run", "killed_between_rename_and_sync", 0, 4)
    assert done.code in CODES_OF_A_KILL, done.said
    assert saved_in(done.folder) == [2, 4]
    forgotten = tmp_path / "forgotten"  # a rename that never came to the disk
    shutil.copytree(done.folder, forgotten)
    latest = max((forgotten / "checkpoints").glob("step-*"))
    latest.rename(latest.with_name(f".{latest.name}.partial"))
    assert_goes_on(done.folder, healthy, capsys)
    assert_goes_on(forgotten, healthy, capsys)


GOES_ON = {  # on which rank; what is said, how often; what a later resumption says
    "slow": (1, "rank 1", 0, ""),
    "slow_disk": (0, "rank 0", 0, ""),
    "failing_reads": (1, r"warning: cannot read .*corpus.h5: Input/output error, on .*; failure (\d),", 3, ""),
    "corpus_removed": (0, r"corpus.h5 was removed or renamed while .* reads it", RANKS, "error: .* No such file"),
}


@pytest.mark.parametrize("fault", GOES_ON)
def test_training_that_a_fault_does_not_end_is_that_without(corpus, tmp_path, healthy, capsys, fault):
    rank, said, times, said_later = GOES_ON[fault]
    done = train(corpus, tmp_path / "run", fault, rank, 2, more=("--watchdog-seconds", patience(6)))
    assert done.code == 0, done.said
    assert steps_in(done.folder) == healthy
    assert len(re.findall(said, done.said)) == times, done.said
    later = resume(done.folder, capsys, more=("--steps", "7"))
    assert later.code == (2 if said_later else 0)
    assert re.search(said_later, later.said)


def test_disk_that_hangs_ends_a_training_with_the_place(corpus, tmp_path):
    done = train(corpus, tmp_path / "run", "hung_disk", 1, 2, more=("--watchdog-seconds", patience(2), *SHARDED))
    assert done.code in (1, *CODES_OF_A_KILL), done.said
    words = r"rank 1 of 2 .* has not advanced for \d+ s, last seen: train, step 3, .* _wait"
    assert re.search(words, done.said), done.said


def test_corpus_that_is_replaced_under_a_training_ends_it_and_is_not_resumed_with(corpus, tmp_path, capsys):
    done = train(corpus, tmp_path / "run", "corpus_replaced", 0, 3)
    assert done.code == 2, done.said
    assert len(re.findall(r"error: .*corpus.h5 was changed while it was read: it is another file now", done.said)) == 1
    assert saved_in(done.folder) == [2]
    again = resume(done.folder, capsys)
    assert again.code == 2
    assert "checkpoint is of a training on other batches: its corpus_" in again.said


@pytest.mark.parametrize("more", [(), SHARDED])
def test_bit_flip_in_a_corpus_ends_the_training_where_a_rank_meets_it(corpus, tmp_path, healthy, capsys, text, more):
    stored, position = corpus.read_bytes(), 4 * SEQ_LEN + 450  # of the fifth sequence, which rank 1 reads
    damaged = bytearray(stored)
    damaged[stored.index(text.read_bytes()[position : position + 40])] ^= 1
    corpus.write_bytes(damaged)
    done = train(corpus, tmp_path / "run", more=more)
    assert done.code == 2, done.said
    chunk = position // 64
    assert len(re.findall(rf"error: .*corpus.h5: chunk {chunk}, tokens .* is damaged: its checksum", done.said)) == 1
    assert saved_in(done.folder) == [2, 4]
    again = resume(done.folder, capsys)
    assert again.code == 2
    assert f"chunk {chunk}, tokens" in again.said
    corpus.write_bytes(stored)
    assert_goes_on(done.folder, healthy, capsys)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs to mount a tmpfs")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def leave_free(disk, size):
    """Fill a disk but for some bytes; of pages, which are what a tmpfs hands out."""
    filler = disk / FILLER
    fill(filler)
    os.truncate(filler, filler.stat().st_size - size)


@pytest.mark.parametrize("more", [(), SHARDED])
def test_disk_that_is_full_ends_a_training_with_whole_files(corpus, small_disk, healthy, capsys, more):
    done = train(corpus, small_disk / "run", "disk_full", 0, 4, more)
    assert done.code == 2, done.said
    assert len(re.findall("error: cannot write .*: No space left on device", done.said)) == 1
    assert "Traceback" not in done.said
    assert saved_in(done.folder) == [2]
    assert set(steps_in(done.folder)) >= {1, 2}
    (small_disk / FILLER).unlink()
    assert_goes_on(done.folder, healthy, capsys)


def is_refused_for_space(words, capsys):
    """Run a command in this process; return whether the disk was too full for it, which it must say in one line."""
    capsys.readouterr()
    code = main([*map(str, words)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(said)) in ((0, 0), (2, 1))
    assert all(line.endswith("No space left on device") for line in said)
    return code == 2


def test_disk_that_is_full_leaves_nothing_of_a_corpus(text, small_disk, capsys):
    codes = []
    for size in range(0, 600_000, 50_000):
        leave_free(small_disk, size)
        codes.append(
            is_refused_for_space(("prepare", text, "--chunk-tokens", "4096", "--output", small_disk / "c.h5"), capsys)
        )
        made = {path.name for path in small_disk.iterdir()} - {FILLER}
        assert made in (set(), {"c.h5.record.jsonl", "c.h5"}, {"c.h5"})
        assert not codes[-1] or made <= {"c.h5"}
        for name in made:
            (small_disk / name).unlink()
    assert codes[0]
    assert not codes[-1]


def test_corpus_whose_record_cannot_be_written_is_said_to_be_whole(text, tmp_path, capsys):
    (tmp_path / "c.h5.record.jsonl").mkdir()
    assert main(["prepare", str(text), "--output", str(tmp_path / "c.h5")]) == 2
    said = f"error: {tmp_path}/c.h5 is whole, but cannot write its record {tmp_path}/c.h5.record.jsonl: Is a directory"
    assert said in capsys.readouterr().err


def test_disk_that_is_full_leaves_only_whole_files_of_a_report(tmp_path, small_disk, capsys):
    records = tmp_path / "strong.jsonl"
    for ranks in (1, 2, 4):
        append_record(records, record_of_a_step("bench strong", ranks, 4096, 1.0 / ranks))
    whole, folder = tmp_path / "whole", small_disk / "report"
    assert main(["report", str(records), "--output", str(whole)]) == 0
    codes = []
    for size in (0, 60_000, 2_000_000):
        leave_free(small_disk, size)
        codes.append(is_refused_for_space(("report", records, "--output", folder), capsys))
        for path in folder.glob("*") if folder.exists() else ():
            assert path.stat().st_size == (whole / path.name).stat().st_size, path.name
        assert codes[-1] or {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
        shutil.rmtree(folder, ignore_errors=True)
    assert codes == [True, True, False]


def test_disk_that_is_full_leaves_nothing_of_a_forecast(small_disk, capsys):
    leave_free(small_disk, 0)
    output = small_disk / "plan.jsonl"
    assert is_refused_for_space(("plan", "--machine", "h100", "--output", output), capsys)
    assert not output.exists()


def test_line_that_a_full_disk_cuts_off_is_taken_back(small_disk):
    path = small_disk / "records.jsonl"
    append_record(path, {"a": 1})
    fill(small_disk / FILLER)
    with pytest.raises(OSError, match="No space left"):
        append_record(path, {"b": "x" * 100_000})
    (small_disk / FILLER).unlink()
    append_record(path, {"c": 2})
    assert read_records(path) == [{"a": 1}, {"c": 2}]
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'
