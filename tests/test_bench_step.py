"""The benchmark of training steps, on a CPU: its arithmetic, its records, and what becomes of a case that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.record import check_record, read_records

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import step

    return step


def case(bench, **changes):
    return {
        "preset": "tiny",
        "tokens": 256,
        "geometric": None,
        "checkpointing": "auto",
        "float32_residual": False,
        "compile": "auto",
        "device": "cpu",
        "backend": "auto",
        "repeats": 1,
        "peak_tflops": 0.5,
        "trace": None,
    } | changes


def test_one_case_on_a_cpu_leaves_a_record_and_a_trace(tmp_path):
    record_path, trace = tmp_path / "records" / "step.jsonl", tmp_path / "trace.json"
    words = ["--presets", "tiny", "--tokens", "256", "--device", "cpu", "--repeats", "1", "--peak-tflops", "0.5"]
    command = [sys.executable, str(BENCH / "step.py"), *words, "--out", str(record_path), "--trace", str(trace)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    assert "tiny       256 tokens" in answer.stdout
    assert "attention" in answer.stdout.split("\n  ")[1]  # the table by kind
    assert json.loads(trace.read_text())["traceEvents"]
    (record,) = read_records(record_path)
    check_record(record)
    results = record["results"]
    assert record["check"]["passed"]
    assert results["relative_difference"] < 1e-5
    assert results["checkpointing"] == "attention"
    rate = results["model_flop"] / results["seconds"]
    assert results["model_flop_utilisation"] == pytest.approx(rate / 0.5e12)
    assert 0 < results["attention_of_time"] < 1
    assert results["seconds_by_kind"]["matmul"] > 0
    assert results["time_per_token_ratio"] == 1


def test_flop_of_a_step_are_six_a_weight_and_token_and_attention_counts_its_backward_in_full(bench):
    config = LongNetConfig.preset("tiny")
    weights = config.layers * (4 + 2 * config.ffn_ratio) * config.embed_dim**2 + config.vocab_size * config.embed_dim
    visible = 256 // 128 * 128 * 129 // 2 * 4  # w = 128, r = 1
    visible += sum(rows * (rows + 1) // 2 for rows in [256 // 8] * 4)  # w = 1024, r = 8
    visible += sum(rows * (rows + 1) // 2 for rows in [256 // 64] * 4)  # w = 8192, r = 64
    attention = 3.5 * config.layers * 4 * config.head_dim * visible
    assert bench.model_flop(LongNet(config), 256) == (6 * weights * 256 + attention, attention)


def test_case_that_runs_out_of_memory_or_time_is_reported_and_takes_no_other_along(bench, monkeypatch):
    def fail(case):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB. GPU 0 has\nmore")

    monkeypatch.setattr(bench, "measure", fail)
    result = bench.answer(case(bench))
    failure = "out of memory: Tried to allocate 99 GiB."
    assert result == {"failure": failure, "checkpointing": "attention"}
    assert bench.with_less_kept(case(bench), result)["checkpointing"] == "all"
    assert bench.with_less_kept(case(bench, checkpointing="attention"), result) is None  # not ours to change
    assert bench.with_less_kept(case(bench), {**result, "checkpointing": "all"}) is None
    assert bench.with_less_kept(case(bench), {"seconds": 1.0}) is None
    assert bench.in_a_process(case(bench), 0.05) == {"failure": "not done after 0.05 s"}


def test_peak_of_an_unknown_device_must_be_given(bench):
    with pytest.raises(SystemExit, match="the peak of a CPU is unknown, give --peak-tflops"):
        bench.measure(case(bench, peak_tflops=None))


@pytest.mark.parametrize("change", [{"relative_difference": 0.2}, {"losses": [5.0, 5.5]}])
def test_check_fails_if_gradients_differ_or_losses_rise(bench, monkeypatch, change):
    monkeypatch.setattr(bench, "gradients_differ_by", lambda *_: change.get("relative_difference", 0.0))
    losses = iter(change.get("losses", [5.5, 5.0]) * 2)
    step = bench.Steps.step
    monkeypatch.setattr(bench.Steps, "step", lambda steps: (step(steps), next(losses))[1])
    monkeypatch.setattr(bench, "WARMUP", 1)
    assert not bench.measure(case(bench))["passed"]


def test_kernels_of_a_gpu_are_sorted_by_where_they_were_launched(tmp_path, bench):
    def event(cat, name, ts, dur, correlation=None, tid=1):
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    launched = [  # scope, operator, kernel, its time
        ("longnet_hpc::mixture", "aten::add", "elementwise_kernel", 1),
        ("CompiledFunctionBackward", "longnet_hpc::mixture_backward", "backward_kernel", 2),
        ("_SummedCrossEntropyBackward", "aten::mm", "nvjet_tst_128x256", 4),
        ("optimizer", "aten::cat", "CatArrayBatchedCopy", 8),
        ("CompiledFunction", "aten::addmm", "nvjet_tst_128x256", 16),
        ("CompiledFunction", "triton_red_fused_native_layer_norm_0", "triton_red_fused_native_layer_norm_0", 32),
        ("aten::to", "aten::copy_", "unrolled_elementwise_kernel", 64),
    ]
    events = [{"ph": "M", "name": "process_name"}]
    for number, (scope, operator, kernel, dur) in enumerate(launched):
        events += [
            event("cpu_op", operator, 100 * number + 1, 50),
            event("cuda_runtime", "cudaLaunchKernel", 100 * number + 2, 3, number),
            event("cpu_op", scope, 100 * number, 90),
            event("kernel", kernel, 5000 + 100 * number, dur, number, tid=7),
        ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    kinds, kernels = bench.seconds_by_kind(path, on_gpu=True)
    microseconds = {kind: round(seconds * 1e6) for kind, seconds in kinds.items()}
    assert microseconds == {
        "attention": 3,
        "cross-entropy": 4,
        "optimizer": 8,
        "matmul": 16,
        "elementwise and norm": 32,
        "copies": 64,
    }
    assert kernels[0] == (pytest.approx(64e-6), "copies", "unrolled_elementwise_kernel")


def test_trace_without_kernels_is_an_error_not_a_table_of_zeros(tmp_path, bench):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": []}))
    with pytest.raises(ValueError, match="shows no kernels of a GPU"):
        bench.seconds_by_kind(path, on_gpu=True)
