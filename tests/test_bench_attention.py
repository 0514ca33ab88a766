"""The benchmark of attention, on a CPU: what it compares, its records, its tables and its picture."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longnet_hpc import Pattern, dilated_attention
from longnet_hpc.record import check_record, read_records

BENCH = Path(__file__).parents[1] / "bench"
TINY = ["--tokens", "256", "--seq-len", "128", "--yardstick-len", "64", "--repeats", "2", "--device", "cpu"]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import attention
    import attention_check
    import attention_report
    import attention_ways
    import timing

    return SimpleNamespace(
        main=attention, check=attention_check, report=attention_report, ways=attention_ways, timing=timing
    )


def run(*words):
    command = [sys.executable, str(BENCH / "attention.py"), *TINY, *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_backends_on_a_cpu_leave_records_a_table_and_a_picture(tmp_path):
    path, picture = tmp_path / "new" / "attention.jsonl", tmp_path / "pictures" / "attention.png"
    words = ["--shapes", "2x8", "--backends", "hopper", "library", "--table", "--profile"]
    answer = run(*words, "--out", str(path), "--picture", str(picture))
    assert answer.returncode == 0, answer.stderr
    assert "2x8 full bfloat16 hopper: not done: backend hopper cannot compute" in answer.stdout
    assert '(8, True, "bfloat16"): "library"' in answer.stdout
    assert "aten::_scaled_dot_product_flash_attention_for_cp" in answer.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    records = read_records(path)
    assert [record["what"]["config"]["causal"] for record in records] == [False, True]
    for record in records:
        check_record(record)
        results = record["results"]
        assert record["check"]["passed"]
        assert 0 < results["worst_error_ratio"] < 2
        for name in ("forward", "both"):
            low, high = results[f"{name}_of_floor_range"]
            assert low <= results[f"{name}_of_floor"] <= high
            assert results[f"gather_attend_scatter_{name}_seconds"] > 0
        assert results["compact_bytes"] == 2 * 2 * 8 * (256 + 128 + 64 + 44 + 22)  # bytes, sequences, head_dim, rows


def test_long_sequences_on_a_cpu_get_a_time_a_token(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.check, "LARGEST", 0)  # so that rows are sampled
    path = tmp_path / "linear.jsonl"
    words = ["--sweep", "linear", "--longest", "8192", "--shapes", "2x8", "--yardstick-len", "64", "--repeats", "1"]
    bench.main.main([*words, "--device", "cpu", "--out", str(path)])
    assert capsys.readouterr().out.count("ns a token") == 2
    for record in read_records(path):
        results = record["results"]
        assert results["seconds_per_token"] == results["both_seconds"] / 8192
        assert max(results["relative_errors"]) < 0.01


def test_passes_may_come_in_any_order_and_old_records_have_none(bench, tmp_path):
    path = tmp_path / "linear.jsonl"
    words = ["--sweep", "linear", "--longest", "8192", "--shapes", "2x8", "--yardstick-len", "64", "--repeats", "1"]
    bench.main.main([*words, "--passes", "both", "forward", "--device", "cpu", "--out", str(path)])
    records = read_records(path)
    for record in records:
        assert record["results"]["seconds_per_token"] == record["results"]["both_seconds"] / 8192
        assert record["what"]["config"].pop("passes") == ["forward", "both"]
    bench.main.draw(records, tmp_path / "linear.png")
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")


def test_case_that_is_out_of_memory_is_skipped_and_wrong_results_end_in_an_error(bench, capsys, monkeypatch):
    def measure(case, device, options):
        if case.causal:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB\nmore")
        return {**results, "passed": False}

    words = [*TINY, "--shapes", "2x8", "--sweep", "head_dim"]
    options, cases = bench.main.arguments(words)
    results = bench.main.measure(cases[0], torch.device("cpu"), options)
    monkeypatch.setattr(bench.main, "measure", measure)
    with pytest.raises(SystemExit, match="attention was wrong"):
        bench.main.main(words)
    printed = capsys.readouterr().out
    assert "2x8 causal bfloat16 auto: out of memory: CUDA out of memory. Tried to allocate 99 GiB\n" in printed
    assert "WRONG" in printed


def test_no_case_starts_after_the_limit(bench, capsys):
    bench.main.main([*TINY, "--shapes", "2x8", "--limit", "0"])
    assert capsys.readouterr().out.count("not run: 0 s have passed") == 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_sampled_rows_show_an_error_in_any_tensor(bench, monkeypatch, causal, name):
    pattern = Pattern.from_lists([16, 32, 96], [1, 2, 6])
    torch.manual_seed(0)
    leaves = [torch.randn(2, 96, 4, 8, requires_grad=True) for _ in range(3)]
    dout = torch.randn(2, 96, 4, 8)
    monkeypatch.setattr(bench.check, "LARGEST", 0)
    assert max(bench.check.errors_of_ours(pattern, causal, "library", leaves, dout)) < 1e-5
    number = bench.check.TENSORS.index(name)
    grad = torch.autograd.grad

    def wrong_grad(*arguments):
        return [1.1 * x if number == place else x for place, x in enumerate(grad(*arguments), start=1)]

    def wrong_ours(*arguments, **options):
        def attend(*inputs):
            out, lse = right(*arguments, **options)(*inputs)
            return (1.1 * out if name == "out" else out), lse

        return attend

    right = bench.check.ours
    monkeypatch.setattr(bench.check, "ours", wrong_ours)
    monkeypatch.setattr(torch.autograd, "grad", wrong_grad)
    errors = bench.check.errors_of_ours(pattern, causal, "library", leaves, dout)
    assert errors[number] == pytest.approx(0.1, rel=1e-3)


def test_result_that_is_not_finite_is_wrong_and_fits_a_record(bench):
    pattern = Pattern.from_lists([16], [1])
    leaves = [torch.full((1, 32, 1, 8), torch.nan, requires_grad=True) for _ in range(3)]
    errors = bench.check.errors_of_ours(pattern, False, "library", leaves, torch.ones(1, 32, 1, 8))
    assert errors == [bench.check.NOT_FINITE] * 4


@pytest.mark.parametrize("causal", [False, True])
def test_gather_attend_scatter_gives_the_mixture_where_some_queries_are_on_no_grid(bench, causal):
    pattern = Pattern.from_lists([16, 32], [2, 3])
    q, k, v = torch.randn(3, 2, 64, 4, 8)
    out = bench.ways.gather_attend_scatter(pattern, causal)(q, k, v)
    lists = pattern.segment_lengths, pattern.dilation_rates
    torch.testing.assert_close(out, dilated_attention(q, k, v, *lists, causal=causal))


def test_functions_are_timed_in_turn(bench):
    calls = []
    functions = [lambda: calls.append("yardstick"), lambda: calls.append("ours")]
    times = bench.timing.interleaved_seconds(functions, 3, torch.device("cpu"))
    assert calls == ["yardstick", "ours"] * (bench.timing.WARMUP + 3)
    assert [len(seconds) for seconds in times] == [3, 3]
    assert bench.timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, 1.0, 3.0)


def test_table_of_the_fastest_is_a_dict_and_leaves_out_who_did_less(bench):
    def result(case_backend, head_dim, both, forward):
        case = SimpleNamespace(backend=case_backend, head_dim=head_dim, causal=True, dtype="float16")
        return case, {"both_of_floor": both, "forward_of_floor": forward}

    results = [
        result("cudnn", 64, 0.4, 0.9),
        result("cudnn", 64, 0.4, 0.9),
        result("library", 64, 0.3, 0.9),
        result("library", 64, 0.3, 0.9),
        result("hopper", 64, 0.9, 0.9),
        result("library", 96, 0.6, 0.9),
    ]
    names = {}
    exec(bench.report.fastest_table(results), names)
    assert names["FASTEST"] == {(64, True, "float16"): "cudnn", (96, True, "float16"): "library"}


def test_sweeps_have_the_cases_that_were_asked_for(bench):
    def cases(*words):
        return bench.main.arguments(list(words))[1]

    assert [case.shape for case in cases("--sweep", "head_dim")][::2] == ["24x32", "12x64", "8x96", "6x128", "3x256"]
    lengths = sorted({case.seq_len for case in cases("--sweep", "seq")})
    assert (lengths[0], lengths[-1], len(lengths)) == (8192, 524288, 7)
    assert {case.tokens for case in cases("--sweep", "seq")} == {524288}
    linear = cases("--sweep", "linear")
    assert (linear[0].seq_len, linear[-1].seq_len, linear[-1].shape) == (8192, 1 << 24, "2x64")
    assert {case.pattern.segment_lengths[-1] >= case.seq_len for case in linear} == {True}
    (small, _) = cases("--sweep", "small")
    assert (small.batch, small.seq_len, small.yardstick, small.passes) == (1, 8192, (1, 8192), ("forward",))
    patterns = {case.pattern_name: case.pattern.dilation_rates for case in cases("--sweep", "pattern")}
    assert patterns["one dense segment"] == (1,)
    assert patterns["no dense branch"] == (2, 4, 6, 12)
    assert len(cases()) == 4


def test_shape_that_is_none_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main.arguments(["--shapes", "12 heads"])
    assert "a shape is heads x head_dim, as in 12x64, got '12 heads'" in capsys.readouterr().err
