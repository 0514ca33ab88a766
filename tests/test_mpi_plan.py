"""Bytes that a forecast promises against those that ranks receive."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import tokens
from test_stream import chunked_cases, model_of, stream_of

from longnet_hpc.carry_store import RowStore
from longnet_hpc.chunk import chunk_bounds
from longnet_hpc.partition import Partition
from longnet_hpc.scaling.config import PlanConfig
from longnet_hpc.scaling.machine import load_machine
from longnet_hpc.scaling.model import forecast
from longnet_hpc.sequence_plan import SequencePlan
from longnet_hpc.sweep import GradientSweep, slice_of_chunk

pytestmark = pytest.mark.mpi(min_size=2)

MACHINE = replace(load_machine("h100"), device="cpu")  # float32 numbers, as these models have


def promised(comm, model, seq_len, **options):
    config = PlanConfig(model=model.config, seq_len=seq_len, ranks=(comm.size,), **options)
    return forecast(config, MACHINE, comm.size).bytes_received


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"task": "eval"}])
def test_bytes_received_are_those_promised_at_once(comm, options):
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(drawn=chunked_cases(), keep_attention=st.booleans())
    def check(drawn, keep_attention):
        case, _ = drawn
        if case.seq < comm.size:
            return
        model = model_of(case, torch.float32)
        model.activation_checkpointing = options.get("activation_checkpointing", False)
        model.keep_attention = keep_attention
        its = Partition.even(case.seq, comm.size).slice_of(comm.rank)
        plan = SequencePlan.build(model.config.pattern, len(its), comm=comm)
        before = plan.bytes_received  # of other examples, where the plan is theirs
        x, y = (tokens(case.seq, seed=seed)[:1, its.start : its.stop] for seed in (0, 1))
        if options.get("task") == "eval":
            with torch.no_grad():
                model.token_losses(x, y, plan)
        else:
            model.loss(x, y, plan).backward()
        received = max(comm.allgather(plan.bytes_received - before))
        assert received == promised(comm, model, case.seq, keep_attention=keep_attention, **options)

    check()


def test_bytes_received_are_those_promised_in_chunks(comm):
    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(drawn=chunked_cases(), chunk_len=st.integers(1, 40))
    def check(drawn, chunk_len):
        case, _ = drawn
        chunk_len = max(chunk_len, comm.size)
        if case.seq < comm.size:
            return
        model, bounds = model_of(case, torch.float32), chunk_bounds(case.seq, chunk_len)
        x, y = (tokens(case.seq, seed=seed)[:1] for seed in (0, 1))
        stream = stream_of(model, case.seq, comm)
        with torch.no_grad():
            for ends in zip(bounds, bounds[1:], strict=False):
                its = slice_of_chunk(range(*ends), comm.rank, comm.size)
                with stream.next_chunk(len(its)) as plan:
                    model.token_losses(x[:, its.start : its.stop], y[:, its.start : its.stop], plan)
        options = {"stream": True, "chunk_len": chunk_len}
        stream.settle()
        received = max(comm.allgather(stream.bytes_received))
        assert received == promised(comm, model, case.seq, task="eval", **options)

        stream = stream_of(model, case.seq, comm)
        sweep = GradientSweep(
            *(model, stream, RowStore(model.config.pattern, case.seq), bounds), rank=comm.rank, size=comm.size
        )
        while sweep.done < sweep.total:
            sweep.advance(lambda its: (x[:, its.start : its.stop], y[:, its.start : its.stop]))
        stream.settle()
        received = max(comm.allgather(stream.bytes_received))
        assert received == promised(comm, model, case.seq, **options)

    check()
