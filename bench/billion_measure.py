"""Times and errors of attention over sequences of one length, for `billion.py`."""

import random
import statistics
from functools import partial
from typing import NamedTuple

import torch
from attention_check import NOT_FINITE
from attention_ways import best_dense, dense, ours
from timing import interleaved_seconds

from longnet_hpc import Pattern
from longnet_hpc.attention import choose_backend
from longnet_hpc.stream import SequenceStream

__all__ = ["TOLERANCE", "Tensors", "extrapolated", "measure", "pattern_of", "repeats_of", "run_streamed"]

BASE = 2048
"""Segment length of the first branch; the others have as many rows a segment, since r = w / 2048."""
DENSE_TOKENS = {"cuda": 1 << 22, "cpu": 1 << 13}
"""Most tokens of a call of dense attention, unless one sequence is longer: enough to keep a device busy."""
LONG = 1 << 26
"""Tokens of a sequence above which fewer rounds are timed."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02}
"""Largest relative error of a right output."""
SAMPLES = 48
"""Rows of the output that are computed in float64, in turn from the grids of all branches."""


class Tensors:
    """Random queries, keys and values, on which every length finds its sequences.

    The chunks of a sequence that is longer than a call start one token later each: they take no more memory than one,
    and still no two are alike, or the check could not tell one from another.
    """

    def __init__(self, options):
        torch.manual_seed(0)
        self.tokens_per_call = options.tokens_per_call
        chunks = max(1, options.longest // options.tokens_per_call)
        shape = (options.tokens_per_call + chunks - 1, options.heads, options.head_dim)
        dtype, device = getattr(torch, options.dtype), options.device
        self._flat = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]

    def sequences(self, count, seq_len):
        """Return q, k and v of whole sequences, `(count, seq_len, heads, head_dim)`."""
        return [x[: count * seq_len].view(count, seq_len, *x.shape[1:]) for x in self._flat]

    def chunk(self, number):
        """Return q, k and v of a chunk of one long sequence, `(1, tokens_per_call, heads, head_dim)`."""
        return [x[number : number + self.tokens_per_call].unsqueeze(0) for x in self._flat]

    def rows_of_last(self, count, seq_len, positions, head):
        """Return rows of q, k and v of one head, at positions of the last of these sequences."""
        rows = (count - 1) * seq_len + positions
        return [x[rows, head] for x in self._flat]

    def rows_of_chunks(self, positions, head):
        """Return the same of the one sequence that the chunks make."""
        rows = positions % self.tokens_per_call + positions // self.tokens_per_call
        return [x[rows, head] for x in self._flat]


class Way(NamedTuple):
    """One way of attention, checked and ready to be timed."""

    run: object
    """What is timed, a function of nothing."""
    tokens: int
    """Tokens of all sequences that it computes."""
    pattern: Pattern
    results: dict
    """What is known of it without timing."""


def pattern_of(seq_len, tokens_per_call):
    """Return the paper's branches: w = 2,048, the tokens of a rank, the sequence; r = w / 2,048."""
    segment_lengths = sorted({min(w, seq_len) for w in (BASE, tokens_per_call, seq_len)})
    return Pattern.from_lists(segment_lengths, [max(1, w // BASE) for w in segment_lengths])


def repeats_of(seq_len, options):
    """Return how many rounds are timed at a length."""
    return min(options.repeats, options.long_repeats) if seq_len > LONG else options.repeats


def run_streamed(pattern, seq_len, tensors, options, receive=None):
    """Compute attention of one sequence that is longer than a call, chunk by chunk through time.

    Parameters
    ----------
    pattern : Pattern
        The branches.
    seq_len : int
        Tokens of the sequence, a multiple of those of a call.
    tensors : Tensors
        Whose `chunk` gives queries, keys and values of each chunk.
    options
        Those of the command line: ``causal``, ``backend``, ``tokens_per_call``.
    receive : callable, optional
        Takes the position of the first token of each chunk, and its output, `(1, tokens, heads, head_dim)`.
    """
    stream = SequenceStream(pattern, seq_len, layers=1, backend=options.backend, device=options.device)
    for number in range(seq_len // options.tokens_per_call):
        with stream.next_chunk(options.tokens_per_call) as plan:
            out = plan.of_layer(0).attention(*tensors.chunk(number), causal=options.causal)
        if receive:
            receive(plan.start, out)


def measure(seq_len, tensors, options, *, with_dense):
    """Return the results of dilated attention at one length, and of dense attention if it is wanted, else None.

    Both are timed in turn, so that they meet the same clocks.
    """
    ways = [_dilated(seq_len, tensors, options)]
    if with_dense:
        ways.append(_dense(seq_len, tensors, options))
    repeats, device = repeats_of(seq_len, options), torch.device(options.device)
    times = interleaved_seconds([torch.no_grad()(way.run) for way in ways], repeats, device)
    results = [_figures(way, seconds, seq_len, options) for way, seconds in zip(ways, times, strict=True)]
    return results[0], results[1] if with_dense else None


def extrapolated(results, measured_len, seq_len):
    """Return results of dense attention as those at a shorter length predict them: time a token grows as the length."""
    factor = seq_len / measured_len
    return {
        "tokens": results["tokens"],
        "seconds": results["seconds"] * factor,
        "seconds_per_token": results["seconds_per_token"] * factor,
        "extrapolated_from_seq_len": measured_len,
        "backend_used": results["backend_used"],
        "relative_error": results["relative_error"],
        "passed": results["passed"],
    }


def _dilated(seq_len, tensors, options):
    pattern = pattern_of(seq_len, options.tokens_per_call)
    count = options.tokens_per_call // seq_len
    q, k, v = inputs = tensors.sequences(count, seq_len) if count else tensors.chunk(0)
    backend = choose_backend(options.backend, q.device, q.dtype, options.head_dim).name
    rows = _sampled_rows(pattern, seq_len, options.heads)
    _start_peak(options)
    # The check comes first: it also loads, compiles and plans whatever is done once.
    if count:
        function = ours(pattern, options.causal, options.backend)
        run, tokens = partial(function, q, k, v), options.tokens_per_call
        found, values = _sampled(run(), rows), partial(tensors.rows_of_last, count, seq_len)
    else:
        run, tokens = partial(run_streamed, pattern, seq_len, tensors, options), seq_len
        found, values = _sampled_chunks(run, rows), tensors.rows_of_chunks
    results = {
        "backend_used": backend,
        "sequences_per_call": count or 1,
        "chunks_per_sequence": 1 if count else seq_len // options.tokens_per_call,
        "tensor_bytes": sum(x.numel() * x.element_size() for x in inputs),
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
        **_compared(pattern, seq_len, rows, found, values, options),
    }
    calls = options.total_tokens // tokens
    if options.whole and calls > 1:
        return Way(partial(_repeat, run, calls), calls * tokens, pattern, {**results, "calls": calls})
    return Way(run, tokens, pattern, {**results, "calls": calls})


def _dense(seq_len, tensors, options):
    count = max(1, min(DENSE_TOKENS[options.device], options.tokens_per_call) // seq_len)
    q, k, v = tensors.sequences(count, seq_len)
    way = best_dense(q, k, v, options.causal)
    run, pattern = partial(dense(way, options.causal), q, k, v), Pattern.from_lists([seq_len], [1])
    rows = _sampled_rows(pattern, seq_len, options.heads)
    _start_peak(options)
    found, values = _sampled(run(), rows), partial(tensors.rows_of_last, count, seq_len)
    results = {
        "backend_used": way,
        "sequences_per_call": count,
        "calls": options.total_tokens // (count * seq_len),
        "tensor_bytes": sum(x.numel() * x.element_size() for x in (q, k, v)),
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
        **_compared(pattern, seq_len, rows, found, values, options),
    }
    return Way(run, count * seq_len, pattern, results)


def _start_peak(options):
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _repeat(run, calls):
    for _ in range(calls):
        run()


def _figures(way, seconds, seq_len, options):
    """Return the results of a way: what was timed, times the rest that is alike."""
    total, timed = options.total_tokens, way.tokens
    mean = statistics.fmean(seconds) * total / timed
    flop = total // seq_len * way.pattern.flop(seq_len, options.heads, options.head_dim, causal=options.causal)
    return {
        **way.results,
        "tokens": total,
        "timed_tokens": timed,
        "timed": "all tokens" if timed == total else "one call, its time multiplied",
        "seconds": mean,
        "median_seconds": statistics.median(seconds) * total / timed,
        "lowest_seconds": min(seconds) * total / timed,
        "highest_seconds": max(seconds) * total / timed,
        "seconds_per_token": mean / total,
        "flop": flop,
        "flop_per_second": flop / mean,
    }


def _sampled_rows(pattern, seq_len, heads):
    """Return pairs of position and head on the grids of all branches in turn, the same each time, and the last."""
    choose, branches = random.Random(0), list(pattern)
    rows = [(seq_len - 1, head) for head in range(min(heads, SAMPLES))]
    while len(rows) < SAMPLES:
        branch, head = branches[len(rows) % len(branches)], choose.randrange(heads)
        w, r = branch.segment_length, branch.dilation_rate
        position = choose.randrange(-(-seq_len // w)) * w + head % r + choose.randrange(-(-w // r)) * r
        if position < seq_len and (position % w) % r == head % r:
            rows.append((position, head))
    return rows


def _sampled(out, rows):
    """Return these rows of the last sequence of an output."""
    return torch.stack([out[-1, position, head] for position, head in rows])


def _sampled_chunks(run, rows):
    """Return these rows of one sequence whose output comes in chunks."""
    found = {}

    def receive(start, out):
        for position, head in rows:
            if start <= position < start + out.shape[1]:
                found[position, head] = out[0, position - start, head].clone()

    run(receive=receive)
    return torch.stack([found[row] for row in rows])


def _compared(pattern, seq_len, rows, found, values, options):
    """Return the error of rows relative to float64, Euclidean, and whether they are right.

    ``values`` gives rows of q, k and v at positions of one head.
    """
    exact = torch.stack([_exact_row(pattern, seq_len, *row, values, options) for row in rows])
    error = ((found.double() - exact).norm() / exact.norm()).nan_to_num(NOT_FINITE, NOT_FINITE).item()
    return {"relative_error": error, "passed": error < TOLERANCE[options.dtype]}


def _exact_row(pattern, seq_len, position, head, values, options):
    """Return one row of the output in float64: one softmax over the keys of all branches that the row lies on."""
    stop, seen = (position + 1 if options.causal else seq_len), []
    for branch in pattern:
        w, r = branch.segment_length, branch.dilation_rate
        if (position % w) % r == head % r:
            start = position - position % w
            seen.append(torch.arange(start + head % r, min(start + w, stop), r, device=options.device))
    query = values(torch.tensor([position], device=options.device), head)[0][0].double()
    _, keys, its_values = (x.double() for x in values(torch.cat(seen), head))
    return torch.softmax(keys @ query * options.head_dim**-0.5, dim=0) @ its_values
