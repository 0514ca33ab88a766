"""Traces of steps against the counts of geometry, and their replay by SimGrid against what is worked out by hand."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from longnet_hpc.errors import ConfigError
from longnet_hpc.model import LongNetConfig
from longnet_hpc.partition import Partition
from longnet_hpc.record import check_record, read_records
from longnet_hpc.run import main
from longnet_hpc.scaling.config import SimulateConfig
from longnet_hpc.scaling.machine import Attention, Blocks, Link, load_machine
from longnet_hpc.scaling.model import forecast
from longnet_hpc.scaling.platforms import write_hostfile, write_platform
from longnet_hpc.scaling.simulate import find_smpirun, run_smpirun, simulate, why_not
from longnet_hpc.scaling.traces import MAX_MESSAGE_BYTES, count_messages, rank_trace
from longnet_hpc.scaling.work import attention_work

needs_smpirun = pytest.mark.skipif(
    shutil.which("smpirun") is None, reason="SimGrid's smpirun is not installed (Debian: libsimgrid-dev)"
)
MACHINE = replace(load_machine("h100"), within=Link(1e-3, 1e9), between=Link(4e-3, 1e8), overlap=1.0)
MODEL = LongNetConfig(
    layers=3, embed_dim=24, heads=6, kv_heads=2, segment_lengths=(16, 40, 1000), dilation_rates=(1, 3, 7)
)


def traces(config, partition, ranks_per_node=2, machine=MACHINE):
    """The actions of each rank, without its number."""
    return [
        [
            line.split()[1:]
            for line in "".join(rank_trace(config, machine, partition, rank, ranks_per_node)).splitlines()
        ]
        for rank in range(partition.size)
    ]


@pytest.mark.parametrize("options", [{}, {"task": "eval"}, {"activation_checkpointing": True, "keep_attention": False}])
@pytest.mark.parametrize("bounds", [(0, 50, 100, 150, 200, 250), (0, 7, 90, 91, 180, 201), (0, 300)])
def test_traces_send_the_bytes_that_geometry_counts(options, bounds):
    config = SimulateConfig(model=MODEL, seq_len=bounds[-1], batch_size=2, **options)
    partition = Partition(bounds)
    forward, backward = (1, 0) if config.task == "eval" else (1 + bool(options), 1)
    row_bytes = 2 * MODEL.head_dim * 2 * config.batch_size
    sent, received = Counter(), Counter()
    for rank, actions in enumerate(traces(config, partition)):
        work = attention_work(MODEL.pattern, partition, rank, MODEL.heads, MODEL.kv_heads)
        total = Counter()
        for name, *words in actions:
            if name in ("isend", "irecv"):
                other, tag, size = map(int, words)
                total[name] += size
                key = (rank, other, tag, size) if name == "isend" else (other, rank, tag, size)
                (sent if name == "isend" else received)[key] += 1
        there, back = work.sent, work.received
        assert total["isend"] == MODEL.layers * row_bytes * (forward * there + backward * back)
        assert total["irecv"] == MODEL.layers * row_bytes * (forward * back + backward * there)
        in_flight = set()
        for name, *words in actions:
            if name == "isend":
                in_flight.add((rank, int(words[0]), int(words[1])))
            elif name == "irecv":
                in_flight.add((int(words[0]), rank, int(words[1])))
            elif name == "wait":
                in_flight.remove(tuple(map(int, words)))
        assert not in_flight
    assert sent == received


@pytest.mark.parametrize("parameters", ["one bucket", "three buckets"])
def test_the_sum_of_gradients_sends_each_of_them_there_and_back(parameters):
    model = MODEL if parameters == "one bucket" else replace(MODEL, layers=14, embed_dim=480)
    config = SimulateConfig(model=model, seq_len=210)
    actions = traces(config, Partition.even(210, 3))
    counts = [[list(map(int, words)) for name, *words in of_rank if name == "alltoallv"] for of_rank in actions]
    assert len(counts[0]) == (2 if parameters == "one bucket" else 6)
    for of_ranks in zip(*counts, strict=True):  # one collective
        for rank, (total, *sends) in enumerate(words[:4] for words in of_ranks):
            assert (total, sends[rank]) == (sum(sends), 0)
            assert sends == [of_ranks[other][5 + rank] for other in range(3)]
    received = sum(words[4] for words in counts[1])
    assert received == pytest.approx(forecast(config, MACHINE, 3).gradient_bytes, abs=64 * len(counts[1]))


@pytest.mark.parametrize("options", [{}, {"task": "eval"}, {"activation_checkpointing": True, "keep_attention": False}])
def test_traces_compute_as_long_as_the_forecast(options):
    config = SimulateConfig(model=MODEL, seq_len=4096, ranks_per_node=16, **options)  # two ranks share a GPU
    slow = {"forward_flop_per_second": (2e9,), "backward_flop_per_second": (1e9,)}
    attention, blocks = Attention((64,), **slow, wasted_keys=64), Blocks((256,), **slow)
    machine = replace(load_machine("h100"), attention=attention, blocks=blocks, overlap=1.0)
    seconds = [
        sum(float(words[0]) for name, *words in actions if name == "compute") / 1e9
        for actions in traces(config, Partition.even(4096, 32), 16, machine)
    ]
    expected = forecast(config, machine, 32)
    assert expected.attention_seconds > 0.1 * expected.compute_seconds
    assert max(seconds) == pytest.approx(expected.compute_seconds, rel=1e-5)
    driven = replace(machine, overlap=0.0)
    more = [
        sum(float(words[0]) for name, *words in actions if name == "compute") / 1e9
        for actions in traces(config, Partition.even(4096, 32), 16, driven)
    ]
    assert sum(more) > sum(seconds)


@pytest.mark.parametrize("options", [{}, {"task": "eval"}, {"activation_checkpointing": True, "keep_attention": False}])
def test_messages_are_counted_before_they_are_written(options):
    config = SimulateConfig(model=MODEL, seq_len=250, **options)
    partition = Partition.even(250, 5)
    actions = [name for of_rank in traces(config, partition) for name, *_ in of_rank]
    assert actions.count("isend") > 0
    assert count_messages(config, 5) == actions.count("isend") + 4 * actions.count("alltoallv")


def replayed(folder, lines, ranks, ranks_per_node=1, topology="fat-tree"):
    """Replay what some ranks do; the others do nothing."""
    write_platform(folder / "platform.xml", MACHINE, ranks, ranks_per_node, topology)
    write_hostfile(folder / "hosts", ranks)
    for rank in range(ranks):
        own = [f"{rank} {line}\n" for line in ("init", *lines.get(rank, ()), "finalize")]
        (folder / f"trace{rank}").write_text("".join(own))
    (folder / "traces").write_text("".join(f"trace{rank}\n" for rank in range(ranks)))
    return run_smpirun(find_smpirun(), folder, ranks)


def send(rank, other):
    return [f"isend {other} 0 50000000", f"wait {rank} {other} 0"]


def receive(rank, other):
    return [f"irecv {rank} 0 50000000", f"wait {rank} {other} 0"]


@needs_smpirun
@pytest.mark.parametrize(("ranks_per_node", "seconds"), [(2, 1e-3 + 0.05), (1, 4e-3 + 0.5), (16, 1e-3 + 2 * 0.05)])
def test_a_message_takes_latency_and_bytes_over_rate(tmp_path, ranks_per_node, seconds):
    lines = {0: send(0, 1), 1: receive(0, 1)}
    assert replayed(tmp_path, lines, 2, ranks_per_node).seconds == pytest.approx(seconds, rel=1e-4)


@needs_smpirun
def test_messages_share_links_that_they_have_in_common(tmp_path):
    for topology, others, share in (
        ("fat-tree", (32, 33), 1),  # of another leaf, by different spines
        ("fat-tree", (32, 64), 2),  # by the same, since the receiver decides
        ("dragonfly", (32, 64), 1),
    ):
        lines = {rank: send(rank, other) for rank, other in enumerate(others)}
        lines |= {other: receive(rank, other) for rank, other in enumerate(others)}
        assert replayed(tmp_path, lines, 65, 1, topology).seconds == pytest.approx(4e-3 + 0.5 * share, rel=1e-4)
    lines = {0: send(0, 1) + receive(1, 0), 1: receive(0, 1) + send(1, 0)}
    for actions in lines.values():
        actions.sort()  # both ways at once
    assert replayed(tmp_path, lines, 2).seconds == pytest.approx(4e-3 + 0.5, rel=1e-4)
    lines = {0: send(0, 2), 1: send(1, 2), 2: [*receive(0, 2), *receive(1, 2)]}
    lines[2].sort()  # both start before one is waited for
    assert replayed(tmp_path, lines, 3).seconds == pytest.approx(4e-3 + 1.0, rel=1e-4)


@needs_smpirun
@pytest.mark.parametrize(("computing", "total"), [(0.1, 0.504), (0.9, 0.9)])
def test_an_exchange_goes_on_while_ranks_compute(tmp_path, computing, total):
    lines = {0: send(0, 1), 1: receive(0, 1)}
    for actions in lines.values():
        actions.insert(1, f"compute {computing * 1e9}")
    result = replayed(tmp_path, lines, 2)
    assert result.seconds == pytest.approx(total, rel=1e-4)
    assert result.wait_seconds == pytest.approx(total - computing, abs=1e-4)


@needs_smpirun
def test_rows_of_more_than_two_gib_arrive_in_pieces(tmp_path):
    model = LongNetConfig(layers=1, embed_dim=6144, heads=48, segment_lengths=(1 << 20,), dilation_rates=(1,))
    config = SimulateConfig(model=model, seq_len=1 << 18, task="eval")
    partition = Partition.even(1 << 18, 2)
    actions = traces(config, partition, 2)
    sizes = [int(words[2]) for name, *words in actions[0] if name == "isend"]
    assert sum(sizes) == (1 << 17) * 6144 * 4
    assert len(sizes) > 2
    assert max(sizes) <= MAX_MESSAGE_BYTES
    lines = {
        rank: [" ".join(words) for words in of_rank if words[0] in ("isend", "irecv", "wait")]
        for rank, of_rank in enumerate(actions)
    }
    assert replayed(tmp_path, lines, 2, 2).seconds == pytest.approx(1e-3 + sum(sizes) / 1e9, rel=1e-4)


@needs_smpirun
def test_simgrid_and_the_forecast_agree_within_20_percent_at_16_and_64_ranks(tmp_path, capsys):
    weak = ["--preset", "125m", "--ranks", "16", "64", "--seq-len", str(64 << 20)]
    strong = ["--preset", "125m", "--ranks", "16", "64", "--seq-len", str(1 << 20), "--model.layers", "2"]
    for number, arguments in enumerate((weak, [*strong, "--geometric", "2048", "4"])):
        path = tmp_path / f"{number}.jsonl"
        assert main(["simulate", *arguments, "--output", str(path)]) == 0
        records = read_records(path)
        assert [record["what"]["config"]["point"]["ranks"] for record in records] == [16, 64]
        for record in records:
            check_record(record)
            results = record["results"]
            assert (record["kind"], record["what"]["name"]) == ("modelled", "simulate")
            assert 0.8 < results["simulated_over_forecast"] < 1.2
            assert results["forecast_seconds"] == pytest.approx(results["seconds"] / results["simulated_over_forecast"])
            parts = [results[f"{part}_seconds"] for part in ("compute", "wait", "gradient")]
            assert sum(parts) == pytest.approx(results["seconds"], rel=0.02)
            assert results["messages"] == count_messages(
                SimulateConfig(**settings_of(record)), record["what"]["config"]["point"]["ranks"]
            )
    assert results["wait_seconds"] > 0
    assert "replayed by SimGrid on a fat-tree" in capsys.readouterr().out


def settings_of(record):
    config = record["what"]["config"]
    model = {key: tuple(value) if isinstance(value, list) else value for key, value in config["model"].items()}
    return {"model": LongNetConfig(**model), "seq_len": config["seq_len"], "task": config["task"]}


@needs_smpirun
def test_files_are_left_only_where_they_are_wanted(tmp_path, monkeypatch, capsys):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    kept = tmp_path / "what is kept"
    config = SimulateConfig(ranks=(2,), seq_len=4096, topology="dragonfly")
    simulate(config)
    assert not list((tmp_path / "temporary").iterdir())
    simulate(replace(config, keep_files=kept))
    names = {path.name for path in (kept / "2-ranks").iterdir()}
    assert names == {"platform.xml", "hosts", "traces", "trace0", "trace1", "output"}
    assert capsys.readouterr().out.count("SimGrid on a dragonfly") == 2


@needs_smpirun
def test_what_simgrid_says_against_a_trace_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="smpirun failed with status .* on 2 ranks and said: .") as raised:
        replayed(tmp_path, {0: ["dance"]}, 2)
    assert "\n" not in str(raised.value)


@needs_smpirun
def test_a_step_that_is_too_large_or_a_stream_is_forecast_alone(tmp_path, capsys):
    arguments = ["simulate", "--ranks", "2", "1024", "--seq-len", str(1 << 20), "--output", "-"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["what"]["config"]["point"]["ranks"] for line in shown.out.splitlines()] == [2]
    assert shown.err.splitlines() == [
        "1,024 ranks: at most 512 ranks are replayed; the forecast stands alone",
    ]
    config = SimulateConfig(seq_len=1 << 26, geometric=(2048, 4), ranks=(512,))
    assert "messages, and at most" in why_not(config, 512)
    assert "stream" in why_not(replace(config, stream=True), 2)
    assert why_not(config, 16) is None


def test_without_smpirun_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["simulate", "--seq-len", "4096"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert "libsimgrid-dev" in line


def test_links_of_a_platform_are_those_of_the_machine(tmp_path):
    write_platform(tmp_path / "platform.xml", MACHINE, 40, 4, "fat-tree")
    text = (tmp_path / "platform.xml").read_text()
    assert text.count("<host ") == 40
    assert text.count("<route ") == 40 * 39
    names = [part.split('"')[0] for part in text.split('<link id="')[1:]]
    assert len(set(names)) == len(names)
    assert all(f'<link_ctn id="{name}"' in text for name in names)
    assert 'bandwidth="100000000.0Bps" latency="0.002s"' in text  # half of it at each end
    assert text.rindex("<link ") < text.index("<route ")
