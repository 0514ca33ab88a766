"""Scaling runs on one rank: points, rounds and their median, records, what a second call measures, wrong results."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from longnet_hpc import LongNetConfig
from longnet_hpc.comm.launch import start
from longnet_hpc.errors import ConfigError, StoppedError
from longnet_hpc.record import check_record, read_records
from longnet_hpc.run import main
from longnet_hpc.scaling import bench_attention
from longnet_hpc.scaling.bench import bench, points_of
from longnet_hpc.scaling.bench_steps import Steps, point_model
from longnet_hpc.scaling.bench_table import efficiencies
from longnet_hpc.scaling.config import BenchConfig
from longnet_hpc.scaling.report_data import load
from longnet_hpc.scaling.report_points import points_of as points_of_report
from longnet_hpc.scaling.rounds import Rounds, median_interval
from longnet_hpc.sequence_plan import SequencePlan
from longnet_hpc.stopping import StopRequest
from longnet_hpc.trace import Trace, use

MODEL = LongNetConfig(
    vocab_size=64, layers=2, embed_dim=32, heads=4, kv_heads=2, segment_lengths=(48, 300), dilation_rates=(1, 4)
)
LAUNCH = start(device="cpu")


def config(folder, **changes):
    return BenchConfig(**{"model": MODEL, "tokens": 500, "repeats": 2, "output": folder, **changes})


@pytest.fixture
def rounds_taken(monkeypatch):
    """The rounds that are taken of all points, whether they count or not."""
    taken = []
    take = Rounds.take

    def counted(self, work, *, timed):
        taken.append(timed)
        take(self, work, timed=timed)

    monkeypatch.setattr(Rounds, "take", counted)
    return taken


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8, 9, 12])
def test_median_interval_holds_the_median_in_95_of_100_cases(count):
    """Each value lies on either side of the true median: count the cases in which the interval holds it, one by one."""
    values = [(7 * place) % count + 0.5 for place in range(count)]
    ordered = sorted(values)
    below = [sum(sides) for sides in product((0, 1), repeat=count)]  # how many values lie below the true median

    def share(cut):
        return sum(cut < its < count - cut for its in below) / len(below)

    middle, low, high = median_interval(values)
    cut = ordered.index(low)
    assert high == ordered[count - 1 - cut]
    assert middle == (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    assert share(cut) >= 0.95 or cut == 0
    assert share(cut + 1) < 0.95


def test_points_of_each_sweep():
    def points(size, *keys, launch=LAUNCH, **changes):
        its = points_of(BenchConfig(model=MODEL, **changes), replace(launch, size=size))
        return [tuple(point[key] for key in keys) for point in its]

    assert points(5, "ranks", "tokens", sweep="strong", tokens=999) == [(1, 999), (2, 999), (4, 999), (5, 999)]
    assert points(4, "ranks", "tokens", sweep="weak", tokens=10) == [(1, 10), (2, 20), (4, 40)]
    assert points(4, "ranks", "tokens", sweep="weak", tokens=10, ranks=(3, 1, 3)) == [(1, 10), (3, 30)]
    for sweep in ("attention", "step"):
        assert points(2, "ranks", "tokens", sweep=sweep, tokens=20000) == [(2, 8192), (2, 16384), (2, 20000)]
        assert points(2, "tokens", sweep=sweep, tokens=16384, ranks=(1,)) == [(8192,), (16384,)]
        assert points(1, "tokens", sweep=sweep, tokens=100) == [(100,)]
    exchanges = points(4, "ranks", "operation", "transport", "bytes", sweep="exchange", max_bytes=20000)
    operations = ["rows", "rows_back", "allgather", "alltoall", "sum", "mpi_allgather", "mpi_alltoall", "copy"]
    assert exchanges == list(product((2, 4), operations, ("host",), (1024, 4096, 16384)))


@pytest.mark.parametrize(
    ("sweep", "task", "points"),
    [("strong", "train", 1), ("weak", "eval", 1), ("step", "train", 1), ("attention", "train", 1)],
)
def test_records_say_what_was_measured(tmp_path, sweep, task, points):
    records = bench(config(tmp_path, sweep=sweep, task=task, batch_size=2), LAUNCH)
    assert records == read_records(tmp_path / f"{sweep}.jsonl")
    assert len(records) == points
    for record in records:
        check_record(record)
        results, its = record["results"], record["what"]["config"]
        assert record["what"]["name"] == f"bench {sweep}"
        assert record["check"]["passed"]
        assert record["how"] == {
            "warmup": 1,
            "repeats": 2,
            "statistic": "median of the slowest rank, and its 95% confidence interval",
        }
        assert (record["where"]["ranks"], record["where"]["threads"]) == (1, torch.get_num_threads())
        assert (its["point"], its["task"]) == ({"ranks": 1, "tokens": 500}, task)
        assert its["model"]["segment_lengths"] == [48, 300]
        assert 0 < results["seconds_low"] <= results["seconds"] <= results["seconds_high"]
        assert results["tokens"] == 1000
        assert results["tokens_per_second"] == pytest.approx(1000 / results["seconds"])
        assert results["compute_seconds"] == pytest.approx(results["seconds"], rel=0.2)
        assert results["bytes_received"] == results["bytes_received_minimum"] == 0
        assert 10**7 < results["peak_memory_bytes"] < 10**10
    assert len(points_of_report(load([str(tmp_path)]).rows)) == (0 if sweep == "attention" else points)


def test_pattern_of_a_point_reaches_over_its_sequence(tmp_path):
    (record,) = bench(config(tmp_path, geometric=(64, 2), sweep="weak"), LAUNCH)
    assert record["what"]["config"]["model"]["segment_lengths"] == [64, 128, 256, 512]


def test_points_of_all_patterns_have_the_same_weights(tmp_path):
    its = config(tmp_path, geometric=(64, 2))
    steps = Steps(its, torch.device("cpu"))
    one, other = (steps.model(point_model(its, tokens), compiled=False) for tokens in (100, 1000))
    assert one.config.pattern != other.config.pattern
    assert all(ours is theirs for ours, theirs in zip(one.parameters(), other.parameters(), strict=True))


def test_second_call_measures_only_what_is_not_there(tmp_path, rounds_taken, capsys):
    first = bench(config(tmp_path, sweep="step", tokens=8192), LAUNCH)
    assert rounds_taken == [False, True, True]
    assert bench(config(tmp_path, sweep="step", tokens=8192), LAUNCH) == first
    assert len(rounds_taken) == 3
    more = bench(config(tmp_path, sweep="step", tokens=9000), LAUNCH)
    assert len(rounds_taken) == 6
    assert more[0] == first[0]
    assert [record["what"]["config"]["point"]["tokens"] for record in more] == [8192, 9000]
    assert "8,192" in capsys.readouterr().out.splitlines()[-3]


@pytest.mark.parametrize(
    "change",
    [
        lambda its, record: replace(its, model=replace(MODEL, layers=1)),
        lambda its, record: replace(its, task="eval"),
        lambda its, record: replace(its, repeats=3),
        lambda its, record: replace(its, tokens=501),
        lambda its, record: record["where"].update(cpu="another") or its,
        lambda its, record: record["where"]["versions"].update(torch="another") or its,
        lambda its, record: record["where"].update(threads=99) or its,
        lambda its, record: record["check"].update(passed=False) or its,
        lambda its, record: record.pop("schema") and its,
    ],
    ids=["model", "task", "repeats", "tokens", "processor", "versions", "threads", "failed", "no record"],
)
def test_another_config_or_place_is_measured_again(tmp_path, rounds_taken, change):
    path = tmp_path / "weak.jsonl"
    (record,) = bench(config(tmp_path), LAUNCH)
    changed = change(config(tmp_path), record)
    path.write_text(json.dumps(record) + "\n")
    rounds_taken.clear()
    (again,) = bench(changed, LAUNCH)
    assert len(rounds_taken) == 1 + changed.repeats
    assert again["time"] >= record["time"]
    assert len(path.read_text().splitlines()) == 2  # what was there stays


@pytest.mark.parametrize(("sweep", "task"), [("weak", "train"), ("weak", "eval"), ("attention", "eval")])
def test_wrong_results_are_kept_and_reported(tmp_path, monkeypatch, sweep, task, capsys):
    attention = SequencePlan.attention
    monkeypatch.setattr(SequencePlan, "attention", lambda *args, causal: attention(*args, causal=False))
    with pytest.raises(ConfigError, match="results are wrong, so their times mean nothing: 1 rank, 500 tokens"):
        bench(config(tmp_path, sweep=sweep, task=task, model=replace(MODEL, layers=1)), LAUNCH)
    (record,) = read_records(tmp_path / f"{sweep}.jsonl")
    assert not record["check"]["passed"]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("leaves", [("keys",), ("values",), ("queries", "keys")], ids=" and ".join)
def test_wrong_gradient_of_attention_is_reported(tmp_path, monkeypatch, leaves):
    work = bench_attention.AttentionPoint._work

    def wrong(self):
        work(self)
        for leaf in leaves:
            self._leaves[("queries", "keys", "values").index(leaf)].grad *= 1.01

    monkeypatch.setattr(bench_attention.AttentionPoint, "_work", wrong)
    with pytest.raises(ConfigError, match="results are wrong"):
        bench(config(tmp_path, sweep="attention"), LAUNCH)


def test_efficiency_is_the_rate_of_a_rank_over_that_of_the_fewest_ranks():
    def record(ranks, tokens, seconds):
        point = {"ranks": ranks, "tokens": tokens}
        return {"what": {"config": {"point": point}}, "results": {"tokens_per_second": tokens / seconds}}

    strong = [record(4, 1000, 1.0), record(1, 1000, 3.0), record(2, 1000, 2.0)]
    assert efficiencies(strong) == pytest.approx([0.75, 1.0, 0.75])
    weak = [record(2, 2000, 3.0), record(4, 4000, 4.0), record(8, 8000, 2.5)]
    assert efficiencies(weak) == pytest.approx([1.0, 0.75, 1.2])
    assert efficiencies([]) == []


def test_stop_leaves_what_is_measured_for_the_next_call(tmp_path, monkeypatch, rounds_taken):
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "asked", lambda self, comm: len(rounds_taken) == 4)  # within the second point
        with pytest.raises(StoppedError, match=r"left before 1 rank, 9,000 tokens; .* goes on with .*step\.jsonl"):
            bench(config(tmp_path, sweep="step", tokens=9000), LAUNCH)
    assert len(read_records(tmp_path / "step.jsonl")) == 1
    assert len(bench(config(tmp_path, sweep="step", tokens=9000), LAUNCH)) == 2
    assert len(rounds_taken) == 4 + 3


def test_round_is_timed_without_what_lies_beside_it():
    with use(Trace()):
        rounds = Rounds(LAUNCH)
        block = torch.ones(1 << 24)  # 64 MB, there before
        for timed in (False, True, True):
            rounds.take(lambda: (block + 1).sum(), timed=timed)
    assert len(rounds.timed) == 2
    for its in rounds.timed:
        assert 0 < its.seconds < 1
        assert all(seconds == 0 for seconds in its.by_category.values())


def test_trace_of_a_bench_has_its_rounds(tmp_path):
    words = ["--model.layers", "1", "--model.embed-dim", "32", "--tokens", "300", "--repeats", "2"]
    trace = tmp_path / "trace.json"
    assert main(["bench", *words, "--output", str(tmp_path), "--trace", str(trace)]) == 0
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("backward") == 3


NONSENSE = {
    ("--sweep", "exchange"): "an exchange needs at least 2 ranks: use mpirun or srun",
    ("--sweep", "wek"): "invalid choice 'wek' for argument '--sweep'. Expected one of",
    ("--tokens", "0"): "tokens must be at least 1, got 0",
    ("--tokens", str(10**12)): "1 rank, 1,000,000,000,000 tokens need more than 2,048,000 GB a rank, cpu has",
    ("--ranks", "2"): "ranks must be at most the 1 that run, got 2",
    ("--ranks", "0"): "ranks must be at least 1, got 0",
    ("--repeats", "0"): "repeats must be at least 1, got 0",
    ("--warmup", "-1"): "warmup must be at least 0, got -1",
    ("--max-bytes", "0"): "max_bytes must be at least 1, got 0",
    ("--geometric", "64", "1"): "ratio of a geometric pattern must be at least 2, got 1",
    ("--output", "/proc/bench"): "cannot write records to /proc/bench: ",
    ("weak",): "bench takes options only, got 'weak'",
}


@pytest.mark.parametrize(("words", "said"), NONSENSE.items())
def test_nonsense_gets_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [line for line in lines if said in line]
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert not list(tmp_path.rglob("*.jsonl"))
