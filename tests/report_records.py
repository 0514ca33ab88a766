"""Records of every kind that a report takes, made up, and reports of them, for its tests."""

import json

import pytest

from longnet_hpc.record import make_record, where
from longnet_hpc.scaling.config import ReportConfig
from longnet_hpc.scaling.report import report

MODEL = {"layers": 4, "embed_dim": 128, "heads": 4, "segment_lengths": [128, 1024], "dilation_rates": [1, 8]}


def place(**changes):
    its = {
        **where(),
        "host": "node7",
        "cpu": "Processor 9000",
        "gpu": None,
        "mpi_library": "MPICH 5",
        "launcher": "mpirun",
    }
    return {**its, **changes}


def step(name, ranks, tokens, seconds, *, kind="measured", changes=None, passed=True, results=None, **config):
    """Return the record of a point of a sweep, or of a forecast."""
    given = {"preset": "tiny", "model": MODEL, "task": "train", "point": {"ranks": ranks, "tokens": tokens}, **config}
    if kind == "measured":
        measured = {"seconds_low": 0.97 * seconds, "seconds_high": 1.04 * seconds, "peak_memory_bytes": 10**9 // ranks}
        measured |= {"bytes_received_minimum": 10**6 * (ranks - 1), "rest_seconds": 0.02 * seconds}
        measured |= {"slowest_rank": ranks - 1, "slowest_rank_wait_seconds": 0.03 * seconds}
    else:
        given = {"machine": "machines/cpu.toml", **given}
        measured = {"capacity_bytes": 16 * 10**8, "fits": True}
        measured["memory_bytes"] = {
            "weights": 10**8,
            "activations": 9 * 10**8 // ranks,
            "total": 10**8 + 9 * 10**8 // ranks,
        }
    figures = {
        "seconds": seconds,
        "compute_seconds": 0.8 * seconds,
        "exchange_seconds": 0.1 * seconds,
        "wait_seconds": 0.02 * seconds,
        "gradient_seconds": 0.1 * seconds,
        "input_seconds": 0.01 * seconds,
        "bytes_received": 1_100_000 * (ranks - 1),
        **measured,
        **(results or {}),
    }
    check = ("loss agrees with that of one rank", passed)
    return make_record(name, config=given, results=figures, place=place(**(changes or {})), check=check, kind=kind)


def scaling():
    """Return points of strong and weak scaling, with forecasts, on 1, 2 and 4 ranks."""
    records = []
    for ranks, strong, weak in ((1, 8.0, 8.0), (2, 4.2, 8.3), (4, 2.4, 8.9)):
        for sweep, tokens, seconds in (("strong", 65536, strong), ("weak", 65536 * ranks, weak)):
            records.append(step(f"bench {sweep}", ranks, tokens, seconds))
            if ranks == 1 and sweep == "weak":
                continue  # the same point as that of strong scaling
            records.append(step("plan", ranks, tokens, 0.95 * seconds, kind="modelled"))
            records.append(step("simulate", ranks, tokens, 0.98 * seconds, kind="modelled"))
    return records


def all_kinds():
    """Return records that every section of a report speaks of."""
    records = scaling()
    for power in range(13, 21):
        records.append(step("bench step", 1, 1 << power, 1e-6 * (1 << power)))
        attention = step("bench attention", 1, 1 << power, 2e-7 * (1 << power))
        records.append(attention)
    for power in range(10, 26, 2):
        for transport, rate in (("host", 2e9), ("staged", 1e9)):
            point = {"operation": "rows", "transport": transport, "bytes": 1 << power, "ranks": 2}
            seconds = 2e-6 + (1 << power) / rate
            its = {"seconds": seconds, "bytes_per_second": (1 << power) / seconds}
            check = ("bytes arrive as they were", True)
            records.append(
                make_record("bench exchange", config={"point": point}, results=its, place=place(), check=check)
            )
    for power in range(13, 31):
        for attention in ("dilated", "dense"):
            each = 1e-9 if attention == "dilated" else 1e-13 * (1 << power)
            config = {"attention": attention, "seq_len": 1 << power, "heads": 4, "head_dim": 64, "dtype": "bfloat16"}
            its = {"seconds": each * 2**30, "seconds_per_token": each, "tokens": 2**30}
            kind = "modelled" if attention == "dense" and power > 20 else "measured"
            gpu = place(gpu="NVIDIA H100 80GB HBM3")
            records.append(
                make_record("billion", config=config, results=its, place=gpu, check=("float64", True), kind=kind)
            )
    bins = [
        {
            f"first_{what}": 2**n // 2 + 1,
            f"last_{what}": 2**n,
            "tokens": 2**n,
            "loss": 4.0 - n / 10,
            "standard_error": 0.3 / (n + 1),
        }
        for what in ("position",)
        for n in range(18)
    ]
    its = {"loss_nats_per_token": 3.0, "seq_len": 1 << 17, "step": 300, "corpus": "books.h5", "loss_by_position": bins}
    records.append(make_record("eval", config={"stream": True}, results=its, place=place(), check=("finite", True)))
    its = {"steps": 300, "loss_nats_per_token": 2.9, "tokens_per_second": 9243.3, "peak_memory_bytes": 970706944}
    records.append(make_record("train", config={}, results=its, place=place(), check=("same weights", True)))
    return records


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(tmp_path, records, **options):
    source = write(tmp_path / "records" / "deep" / "some.jsonl", records)
    report(ReportConfig(sources=(str(tmp_path / "records"),), output=tmp_path / "report", **options))
    return source, (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report of every section, with a record that failed, and a damaged line."""
    folder = tmp_path_factory.mktemp("full")
    records = [*all_kinds(), step("bench weak", 8, 8 * 65536, 9.9, passed=False)]
    write(folder / "records" / "damaged.jsonl", []).write_text('{"schema": 1, "ti\n')
    return folder, make(folder, records)[1]
