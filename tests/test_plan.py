"""Forecasts worked out by hand, and against what was measured on a GPU."""

import statistics
from dataclasses import fields, replace

import numpy as np
import pytest
from launching import ROOT

from longnet_hpc.model_config import PRESETS, LongNetConfig
from longnet_hpc.record import read_records
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import Attention, Blocks, Link, load_machine
from longnet_hpc.scaling.memory import memory_of_rank
from longnet_hpc.scaling.model import forecast

MACHINE = replace(
    load_machine("h100"),
    device="cpu", devices_per_node=4, memory_bytes=10**9, process_bytes=10**6,
    blocks=Blocks((8,), (1e9,), (5e8,)), attention=Attention((4,), (2e9,), (1e9,), 3.0),
    logit_seconds=1e-9, parameter_seconds=1e-9, step_seconds=1e-3,
    within=Link(1e-4, 1e6), between=Link(1e-3, 1e5), overlap=0.0, input_bytes_per_second=1e9,
)  # fmt: skip
MODEL = LongNetConfig(vocab_size=16, layers=1, embed_dim=8, heads=2, segment_lengths=(8,), dilation_rates=(1,))
BLOCK = 2 * (4 * 8 * 8 + 2 * 4 * 8 * 8)
"""FLOP of a block, for a token: queries, keys, values and output, and both layers of the feed-forward part."""
HEAD = 2 * 8 * 16
PAIRS = 2 * 8 * 9 // 2
"""Of two heads, over one segment of 8 tokens."""


def test_step_on_one_rank_is_the_sum_of_its_parts():
    one = forecast(PlanConfig(model=MODEL, seq_len=8), MACHINE, 1)
    attention = 4 * 4 * (PAIRS + 3 * 16) / 2e9
    blocks, head = 8 * BLOCK / 1e9, 8 * HEAD / 1e9
    fixed = 1e-3 + MODEL.parameter_count * 1e-9
    assert one.attention_seconds == pytest.approx(attention * (1 + 2 * 2))
    expected = attention * 5 + blocks * (1 + 2 * 2) + head * 5 + 8 * 16 * 1e-9 + fixed
    assert one.seconds == pytest.approx(expected)
    assert (one.exchange_seconds, one.gradient_seconds, one.bytes_received, one.gradient_bytes) == (0, 0, 0, 0)
    assert one.efficiency == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "forward", "blocks", "backward"),
    [
        ({"task": "eval"}, 1, 1, 0),
        ({"activation_checkpointing": True}, 1, 2, 1),
        ({"activation_checkpointing": True, "keep_attention": False}, 2, 2, 1),
        ({"stream": True, "chunk_len": 4}, 1.5, 1.5, 1),
        ({"stream": True, "chunk_len": 6}, 14 / 8, 14 / 8, 1),  # on its way there it omits the last chunk, of 2
        ({"stream": True, "chunk_len": 5}, 14 / 8, 14 / 8, 1),  # the last of 5, 1 and 2
        ({"stream": True, "chunk_len": 8, "activation_checkpointing": True}, 1, 2, 1),
    ],
)
def test_passes_are_those_that_the_step_makes(options, forward, blocks, backward):
    base, longer = (
        forecast(PlanConfig(model=replace(MODEL, layers=layers), seq_len=8, **options), MACHINE, 1) for layers in (1, 2)
    )
    attention = 4 * 4 * (PAIRS + 3 * 16) / 2e9
    assert base.attention_seconds == pytest.approx(attention * (forward + 4 * backward))
    of_a_layer = longer.compute_seconds - base.compute_seconds
    parameters = replace(MODEL, layers=2).parameter_count - MODEL.parameter_count
    update = 0 if "task" in options else parameters * 1e-9
    expected = base.attention_seconds + 8 * BLOCK / 1e9 * (blocks + 4 * backward) + update
    assert of_a_layer == pytest.approx(expected)


@pytest.mark.parametrize(("per_node", "link"), [(2, MACHINE.within), (1, MACHINE.between)])
def test_exchange_is_latency_and_bytes_over_the_rate(per_node, link):
    two = forecast(PlanConfig(model=MODEL, seq_len=8, ranks_per_node=per_node), MACHINE, 2)
    row_bytes = 2 * 4 * 4  # keys and values of 4 numbers
    once = link.latency_seconds + 4 * 2 * row_bytes / link.bytes_per_second
    assert two.exchange_seconds == pytest.approx(2 * once)  # rows there, gradients back
    assert two.wait_seconds == pytest.approx(2 * once)
    assert two.bytes_received == 4 * 2 * row_bytes  # by the one in the forward pass, by the other in the backward pass
    assert two.gradient_bytes == 2 * 4 * MODEL.parameter_count // 2
    gradient = 2 * link.latency_seconds + two.gradient_bytes / link.bytes_per_second
    assert two.gradient_seconds == pytest.approx(gradient)
    assert two.nodes == 2 // per_node


def test_each_chunk_of_a_stream_waits_for_its_own_messages():
    no_bytes = replace(MACHINE, within=Link(1e-4, 1e30))
    config = PlanConfig(model=MODEL, seq_len=64, ranks_per_node=2, task="eval", stream=True, chunk_len=8)
    assert forecast(config, no_bytes, 2).exchange_seconds == pytest.approx(8 * 1e-4)


def test_gradients_are_summed_in_as_many_parts_as_they_have():
    model = replace(MODEL, vocab_size=1 << 22)  # 64 M parameters and some, in parts of 16 M
    no_bytes = replace(MACHINE, within=Link(1e-4, 1e30))
    two = forecast(PlanConfig(model=model, seq_len=8), no_bytes, 2)
    assert two.gradient_seconds == pytest.approx(2 * 1e-4 * -(-model.parameter_count // (1 << 24)))


@pytest.mark.parametrize(("vocab_size", "token_bytes"), [(256, 1), (257, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_tokens_are_read_in_the_bytes_that_a_corpus_stores(vocab_size, token_bytes):
    config = PlanConfig(model=replace(MODEL, vocab_size=vocab_size), seq_len=64)
    slow = replace(MACHINE, input_bytes_per_second=1.0)
    one = forecast(config, slow, 2)
    assert one.seconds == one.input_seconds == 32 * token_bytes
    assert np.min_scalar_type(vocab_size - 1).itemsize == token_bytes  # as a tokenizer does


def test_computing_hides_its_share_of_an_exchange():
    config = PlanConfig(model=MODEL, seq_len=8, ranks_per_node=2)
    none, half = (forecast(config, replace(MACHINE, overlap=overlap), 2) for overlap in (0.0, 0.5))
    assert none.wait_seconds - half.wait_seconds == pytest.approx(0.5 * half.attention_seconds)  # which is shorter


@pytest.mark.parametrize(("chunk_len", "open_branches"), [(16, 1), (8, 2), (64, 0)])
def test_stream_keeps_rows_of_segments_open_between_chunks(chunk_len, open_branches):
    model = replace(MODEL, layers=3, segment_lengths=(8, 16, 32), dilation_rates=(1, 2, 4))
    memory = forecast(PlanConfig(model=model, seq_len=64, stream=True, chunk_len=chunk_len), MACHINE, 1).memory
    row_bytes = 2 * 8 * 4  # keys and values of all heads
    assert memory.rows == open_branches * 8 * row_bytes * 2 * 3  # and gradients
    assert memory.host == row_bytes * 3 * [0, 16, 16 + 32][open_branches]


def test_stream_of_no_given_chunk_has_the_host_memory_of_the_chunk_chosen():
    config = PlanConfig(model=PRESETS["125m"], geometric=(2048, 4), seq_len=1 << 28, stream=True)
    chosen = forecast(config, load_machine("h100"), 8)
    given = forecast(replace(config, chunk_len=chosen.chunk_len), load_machine("h100"), 8)
    assert chosen.chunk_len < config.seq_len
    assert chosen.memory == given.memory
    assert chosen.memory.host > 0


@pytest.mark.parametrize("ranks", [1, 4])
def test_optimizer_in_shards_takes_its_part_of_the_memory_and_no_time(ranks):
    config = PlanConfig(model=MODEL, seq_len=64)
    whole, parts = (forecast(replace(config, shard_optimizer=sharded), MACHINE, ranks) for sharded in (False, True))
    assert whole.memory.optimizer == 8 * MODEL.parameter_count
    assert parts.memory.optimizer == 8 * MODEL.parameter_count // ranks
    assert whole.memory.checkpoint == 12 * MODEL.parameter_count
    assert parts.memory.checkpoint == 4 * MODEL.parameter_count + 8 * MODEL.parameter_count // ranks
    same = {"optimizer": 0, "buffers": 0, "checkpoint": 0}
    assert replace(parts.memory, **same) == replace(whole.memory, **same)
    assert (parts.seconds, parts.gradient_bytes) == (whole.seconds, whole.gradient_bytes)


def test_copy_of_a_checkpoint_counts_where_the_device_is_the_cpu_alone():
    config = PlanConfig(model=MODEL, seq_len=64)
    cpu, gpu = (
        memory_of_rank(config, 32, 0, 64, ranks=2, itemsize=4, process_bytes=0, on_cpu=on_cpu)
        for on_cpu in (True, False)
    )
    assert cpu.checkpoint == gpu.host_checkpoint == 12 * MODEL.parameter_count
    assert cpu.total == gpu.total + cpu.checkpoint
    assert replace(cpu, checkpoint=0) == replace(gpu, host_checkpoint=0)
    evaluation = forecast(replace(config, task="eval"), MACHINE, 2).memory
    assert evaluation.checkpoint == evaluation.host_checkpoint == 0


def test_slowest_rank_decides_where_work_is_uneven():
    model = replace(MODEL, segment_lengths=(64,))
    no_links = replace(MACHINE, within=Link(0.0, 1e30), step_seconds=0.0, parameter_seconds=0.0)
    one, four = (forecast(PlanConfig(model=model, seq_len=64), no_links, ranks) for ranks in (1, 4))
    assert four.efficiency == pytest.approx(one.seconds / 4 / four.seconds)
    last = sum(min(64, position + 1) for position in range(48, 64)) / sum(range(1, 65))
    share = (2 * 64 * 65 // 2 * last + 3 * 32) / (64 * 65 + 3 * 128)
    assert four.attention_seconds == pytest.approx(one.attention_seconds * share)


def test_ranks_that_share_a_device_share_its_speed_and_memory():
    config = PlanConfig(model=MODEL, seq_len=64, ranks_per_node=8)
    alone, shared = forecast(config, MACHINE, 4), forecast(config, MACHINE, 8)
    assert shared.capacity_bytes == alone.capacity_bytes // 2
    assert shared.nodes == 1
    assert shared.compute_seconds > 0.9 * alone.compute_seconds  # half the tokens at half the speed


def h100_cases():
    """Yield what ran on one H100 as a config, with seconds and bytes that were measured."""
    known = {field.name for field in fields(LongNetConfig)}
    for name in ("step", "step_repeat", "stream_step", "stream_eval"):
        for record in read_records(ROOT / f"bench/records/{name}.jsonl"):
            its, results = record["what"]["config"], record["results"]
            if record["where"]["ranks"] > 1 or results.get("seq_len", 1 << 30) < 1 << 26:
                continue  # the short stream is there for its memory: it took most of its time to compile
            if name.startswith("step"):
                kept = results["checkpointing"]
                config = PlanConfig(
                    model=PRESETS[its["preset"]], seq_len=its["tokens"], half_residual=not its["float32_residual"],
                    activation_checkpointing=kept != "off", keep_attention=kept == "attention",
                )  # fmt: skip
            else:
                model = {key: tuple(v) if isinstance(v, list) else v for key, v in its["model"].items() if key in known}
                config = PlanConfig(
                    model=LongNetConfig(**model), seq_len=results.get("seq_len", its.get("seq_len")),
                    task="eval" if record["what"]["name"] == "eval" else "train", stream=its["stream"],
                    chunk_len=results.get("chunk_len", 1 << 20) if its["stream"] else None, half_residual=True,
                )  # fmt: skip
            yield config, config.seq_len / results["tokens_per_second"], results["peak_memory_bytes"]


def test_memory_measured_on_a_gpu_is_as_forecast():
    for config, _, measured in h100_cases():
        memory = forecast(config, load_machine("h100"), 1).memory
        assert memory.total - memory.process == pytest.approx(measured, rel=0.05)


def test_time_measured_on_a_gpu_is_as_forecast():
    # The machine file knows rates of attention and blocks from the profiles of some of these steps, not their times.
    errors = [forecast(config, load_machine("h100"), 1).seconds / seconds - 1 for config, seconds, _ in h100_cases()]
    assert statistics.median(map(abs, errors)) < 0.1
    assert max(map(abs, errors)) < 0.15


def measured_steps(name):
    """Yield steps that were measured as the configs of their forecasts, with their results."""
    known = {field.name for field in fields(LongNetConfig)}
    options = ("task", "half_residual", "activation_checkpointing", "keep_attention")
    for record in read_records(ROOT / f"bench/records/{name}.jsonl"):
        its, (sweep, *_) = record["what"]["config"], record["what"]["name"].split()[1:] or [None]
        if record["kind"] != "measured" or sweep not in ("step", "strong", "weak"):
            continue
        model = {key: tuple(v) if isinstance(v, list) else v for key, v in its["model"].items() if key in known}
        ranks, place = its["point"]["ranks"], record["where"]
        config = PlanConfig(
            model=LongNetConfig(**model), seq_len=its["point"]["tokens"], ranks=(ranks,), ranks_per_node=ranks,
            **{key: its[key] for key in options},
        )  # fmt: skip
        machine = "cpu_2_cores" if place["gpu"] is None else {"H100": "h100_x1", "H200": "h200_x2"}[place["gpu"][7:11]]
        yield machine, config, record["results"]


@pytest.mark.parametrize("name", ["forecast_check", "scaling_h200x2"])
def test_forecasts_of_what_was_measured_are_as_good_as_documented(name):
    errors = {}
    for machine_name, config, measured in measured_steps(name):
        machine = load_machine(str(ROOT / f"bench/records/machines/{machine_name}.toml"))
        one = forecast(config, machine, *config.ranks)
        assert one.bytes_received == measured["bytes_received"]
        if machine.device == "cuda":
            assert one.memory.total - one.memory.process == pytest.approx(measured["peak_memory_bytes"], rel=0.07)
        errors.setdefault((machine_name, *config.ranks), []).append(one.seconds / measured["seconds"] - 1)
    assert {len(its) for its in errors.values()} == ({5, 6} if name == "scaling_h200x2" else {6, 9})
    for (machine_name, ranks), its in errors.items():
        if machine_name != "h100_x1" or ranks == 1:  # ranks that share a GPU lose time that the model does not know
            assert statistics.median(map(abs, its)) < 0.15
