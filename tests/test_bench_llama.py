"""The benchmark of a Hugging Face model, on a CPU: its record, and that its check can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from longnet_hpc.record import check_record, read_records

BENCH = Path(__file__).parents[1] / "bench"
WORDS = ["--preset", "tiny", "--tokens", "256", "--device", "cpu", "--repeats", "1", "--geometric", "64", "2"]


def call(tmp_path, script):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{BENCH}:{BENCH.parent}"}
    command = [sys.executable, "-c", script, *WORDS, "--out", str(tmp_path / "records" / "llama.jsonl")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_one_case_on_a_cpu_leaves_a_record(tmp_path):
    answer = call(tmp_path, "import llama; llama.main()")
    assert answer.returncode == 0, answer.stderr
    assert "256 tokens: longnet" in answer.stdout
    (record,) = read_records(tmp_path / "records" / "llama.jsonl")
    check_record(record)
    results, config = record["results"], record["what"]["config"]
    assert record["check"]["passed"]
    assert (config["segment_lengths"], config["dilation_rates"]) == ([64, 128, 256], [1, 2, 4])
    assert results["sdpa_over_longnet_forward"] == pytest.approx(
        results["sdpa_forward_seconds"] / results["longnet_forward_seconds"]
    )
    assert results["cache_bytes"] == 2 * 2 * 256 * 2 * 16 * 4  # layers, keys and values, tokens, heads, head_dim, bytes


def test_attention_that_is_wrong_is_an_error(tmp_path):
    spoilt = (
        "import llama, longnet_hpc.integrations.transformers.attention as attention\n"
        "right = attention.agreed_attention\n"
        "attention.agreed_attention = lambda q, k, v, *others, **named: right(q, k, v.flip(1), *others, **named)\n"
        "llama.main()"
    )
    answer = call(tmp_path, spoilt)
    assert answer.returncode == 1
    assert "logits were wrong" in answer.stderr
    (record,) = read_records(tmp_path / "records" / "llama.jsonl")
    assert not record["check"]["passed"], json.dumps(record["results"])
