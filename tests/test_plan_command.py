"""The plan command as a user meets it: its table, machine files, what it refuses, and calibrate."""

import json
import re
import resource
import tomllib
from pathlib import Path

import pytest
from launching import ROOT, run_python, slowness

from longnet_hpc.record import check_record, read_records
from longnet_hpc.run import main
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import load_machine, machine_names
from longnet_hpc.scaling.model import forecast


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--preset 2.7b --ranks 64 512 4096", "what would fit on 4,096:"),  # all ways to fit are forecast, too
        ("--stream --task eval --chunk-len 4194304 --ranks 1 2 4 8 16 32 64", "chunks of a stream"),
    ],
)
def test_plan_needs_neither_torch_nor_mpi_and_answers_at_once(words, shown):
    words = ["--seq-len", "1000000000", "--geometric", "2048", "4", *words.split()]
    code = (
        "import sys\nfrom longnet_hpc.run import main\n"
        f"assert main({['plan', *words]!r}) == 0\nassert not {{'torch', 'mpi4py'}} & sys.modules.keys()"
    )
    seconds = []
    while len(seconds) < 3 and not any(its < 2 for its in seconds):  # others may slow this core down
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = run_python("-c", code)
        seconds.append((resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before) / slowness())
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
    assert min(seconds) < 2


def test_table_says_what_to_change_and_records_say_the_same(tmp_path, capsys):
    words = ["plan", "--preset", "125m", "--seq-len", "16777216", "--ranks", "16", "64"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^ +16 +2 .* NO .*s +\d", shown, re.MULTILINE)
    found = re.search(
        r"^  (--half-residual --shard-optimizer --activation-checkpointing): (\d+\.\d) GB a rank", shown, re.MULTILINE
    )
    assert found
    assert main([*words, *found[1].split(), "--output", str(tmp_path / "plan.jsonl")]) == 0
    sixteen, sixty_four = read_records(tmp_path / "plan.jsonl")
    for record in (sixteen, sixty_four):
        check_record(record)
        assert record["kind"] == "modelled"
        memory = record["results"]["memory_bytes"]
        in_host_memory = memory["host"] + memory["host_checkpoint"]
        assert memory["total"] == sum(memory.values()) - memory["total"] - in_host_memory
        assert record["results"]["fits"] == (memory["total"] <= record["results"]["capacity_bytes"])
    assert sixty_four["results"]["memory_bytes"]["total"] / 1e9 == pytest.approx(float(found[2]), abs=0.06)
    capsys.readouterr()
    assert main([*words, "--output", "-"]) == 0
    assert [json.loads(line)["what"]["config"]["point"]["ranks"] for line in capsys.readouterr().out.splitlines()] == [
        16, 64,
    ]  # fmt: skip


def test_machines_that_come_along_are_whole_and_say_where_their_numbers_come_from():
    assert {"h100", "h200", "gh200", "mi250x"} <= set(machine_names())
    for name in machine_names():
        machine = load_machine(name)
        assert len(machine.source) > 40
        assert machine.within.bytes_per_second >= machine.between.bytes_per_second


def h100_text(old="", new=""):
    text = Path(ROOT / "longnet_hpc/scaling/machines/h100.toml").read_text()
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (h100_text("overlap = 0.9\n"), "machine.toml: no overlap"),
        (h100_text("latency_seconds = 5e-6\n"), ": no between.latency_seconds"),
        (h100_text("[within]\nlatency_seconds = 1e-5\nbytes_per_second = 3.6e11\n"), ": no within|: no table within"),
        (h100_text("overlap = 0.9", "overlap = 1.5"), "overlap must be 0 to 1, got 1.5"),
        (h100_text("overlap = 0.9", "overlap = 0.9\nspeed = 3"), "speed"),
        (h100_text("memory_bytes = 85_000_000_000", "memory_bytes = 0"), "memory_bytes must be above 0"),
        (h100_text("3.6e11", "nan"), "machine.toml: .*within.bytes_per_second must be a finite number, got nan"),
        (h100_text("[4.15e14, 5.4e14]", "[4.15e14]"), "attention needs 2 rates each, got 1"),
        (h100_text("head_dims = [64, 128]", "head_dims = [128, 64]"), "sizes of attention must ascend"),
        (h100_text('device = "cuda"', 'device = "tpu"'), "device"),
        ("name = ", "machine.toml"),
    ],
)
def test_wrong_machine_file_is_one_clear_line(tmp_path, capsys, text, words):
    path = tmp_path / "machine.toml"
    path.write_text(text)
    assert main(["plan", "--machine", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error), error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "0"], "ranks must be at least 1, got 0"),
        (["--ranks", "8", "--seq-len", "4"], "ranks must be at most seq_len, 4, got 8"),
        (["--chunk-len", "4"], "give --stream"),
        (["--stream", "--chunk-len", "2", "--ranks", "4"], "chunk_len must be at least the number of ranks, 4, got 2"),
        (["--stream", "--batch-size", "2"], "batch_size must be 1, got 2"),
        (["--machine", "cray-1"], "machine must be one of .*h100.*, got 'cray-1'"),
        (["--output", "/dev/null/x.json"], "cannot write /dev/null/x.json"),
    ],
)
def test_nonsense_is_one_clear_line(capsys, options, words):
    assert main(["plan", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(words, error), error


def test_run_that_fits_nowhere_is_told_so(capsys):
    model, machine = ["--preset", "2.7b", "--model.layers", "96"], ["--machine", "mi250x", "--ranks", "64"]
    assert main(["plan", *model, *machine, "--seq-len", "10000000", "--geometric", "2048", "4"]) == 0
    said = "of which weights, gradients and optimizer are 76.5 GB, the former two whole on every rank"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        [
            "--seq-len",
            "1048576",
            "--stream",
            "--chunk-len",
            "64",
            "--ranks",
            "64",
        ],  # no more ranks than a chunk has tokens
        ["--seq-len", "131072", "--stream", "--chunk-len", "131072", "--ranks", "65536"],
        ["--seq-len", "1", "--task", "eval", "--half-residual", "--stream"],  # nothing is left to be changed
    ],
)
def test_run_that_fits_nowhere_is_told_so_at_the_ends_of_what_can_be_changed(tmp_path, capsys, options):
    path = tmp_path / "machine.toml"
    path.write_text(h100_text("memory_bytes = 85_000_000_000", "memory_bytes = 1_000_000"))
    assert main(["plan", "--machine", str(path), *options]) == 0
    assert "nothing of this kind: still" in capsys.readouterr().out


def test_chunk_that_is_chosen_is_told_as_an_option_of_the_run(capsys):
    words = ["plan", "--preset", "125m", "--seq-len", "268435456", "--stream", "--ranks", "2"]
    assert main(words) == 0
    found = re.search(r"give --chunk-len (\d+) to the run", capsys.readouterr().out)
    assert found
    assert main([*words, "--chunk-len", found[1]]) == 0
    shown = capsys.readouterr().out
    assert f"{int(found[1]):,} tokens over all ranks\n" in shown


def test_sizes_in_the_table_are_never_powers_of_ten(tmp_path, capsys):
    path = tmp_path / "machine.toml"
    path.write_text(h100_text("memory_bytes = 85_000_000_000", "memory_bytes = 999_700_000_000"))
    assert main(["plan", "--machine", str(path)]) == 0
    assert re.search(r" of +1 TB ", capsys.readouterr().out)


def test_residual_stream_that_has_no_half_is_not_halved(tmp_path, capsys):
    path = tmp_path / "machine.toml"
    path.write_text(h100_text('device = "cuda"', 'device = "cpu"'))
    assert main(["plan", "--preset", "125m", "--machine", str(path), "--seq-len", "16777216", "--ranks", "16"]) == 0
    shown = capsys.readouterr().out
    assert "  --shard-optimizer --activation-checkpointing" in shown
    assert "--half-residual" not in shown


@pytest.mark.parametrize(("memory", "word"), [(0.9, "NO"), (1.01, "tight"), (1.2, "yes")])
def test_run_that_fits_barely_is_told_so(tmp_path, capsys, memory, word):
    needed = forecast(PlanConfig(seq_len=65536), load_machine("h100"), 1).memory.total
    path = tmp_path / "machine.toml"
    path.write_text(h100_text("memory_bytes = 85_000_000_000", f"memory_bytes = {int(memory * needed)}"))
    assert main(["plan", "--seq-len", "65536", "--machine", str(path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^ +1 +1 .* {word} ", shown, re.MULTILINE)
    assert ("tight: it fits by less" in shown) == (word == "tight")


def test_machines_are_listed(capsys):
    assert main(["plan", "--machine", "list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(machine_names())


def test_calibrate_writes_a_file_that_plan_reads(tmp_path):
    path = tmp_path / "m.toml"
    small = tmp_path / "small.py"  # the same with shapes that take no time
    small.write_text(
        "import sys\n"
        "from longnet_hpc.run import main\n"
        "from longnet_hpc.scaling import calibrate\n"
        "calibrate.SIZES['cpu'] = calibrate.Sizes((64, 128), (16, 32), 256, 4096, 2, 512, 1)\n"
        "sys.exit(main(['calibrate', '--device', 'cpu', '--output', *sys.argv[1:]]))\n"
    )
    done = run_python(small, path, ranks=2)
    assert done.returncode == 0, done.stderr
    table = tomllib.loads(path.read_text())
    assert table["numbers"] == "estimated"
    assert "one node" in table["source"]
    machine = load_machine(str(path))
    assert machine.device == "cpu"
    assert machine.within == machine.between
    assert machine.blocks.embed_dims == (64, 128)
    assert 1e8 < min(machine.blocks.forward_flop_per_second) <= max(machine.blocks.forward_flop_per_second) < 1e13
    assert 0 <= machine.overlap <= 1
    assert main(["plan", "--machine", str(path), "--seq-len", "65536", "--ranks", "2"]) == 0
    again = run_python(small, path)
    assert again.returncode == 2
    assert "give --overwrite" in again.stderr
