"""Times, memory, errors and kernels of one case of `attention.py`."""

import statistics

import torch
from attention_check import errors_of_dense, errors_of_ours
from attention_ways import DENSE, best_dense, dense, gather_attend_scatter, ours
from timing import interleaved_seconds, ratio
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from longnet_hpc.attention import choose_backend
from longnet_hpc.errors import LongNetError

__all__ = ["measure", "measure_graphs"]

BACKWARD = 2.5
"""Arithmetic of a backward pass over that of a forward pass: five products instead of two."""
ARITHMETIC = {"forward": 1.0, "both": 1.0 + BACKWARD}
SHORT = 2048
"""Tokens of the dense sequences that see about as many keys as a query of the pattern does."""
OTHERS_REPEATS = 3
"""Most rounds of what is only shown beside: other ways of dense attention, and gather, attend, scatter."""
TOLERANCE = 0.02
"""Largest relative error of a right result in half precision."""


class Tensors:
    """Random queries, keys, values and gradients of outputs, on which every way finds its sequences."""

    def __init__(self, case, device):
        torch.manual_seed(0)
        tokens = max(case.tokens, case.yardstick[0] * case.yardstick[1])
        shape = (tokens, case.heads, case.head_dim)
        self._flat = [torch.randn(shape, device=device, dtype=getattr(torch, case.dtype)) for _ in range(4)]

    def sequences(self, count, seq_len):
        """Return leaves q, k and v, `(count, seq_len, heads, head_dim)`, and the gradient of their output."""
        *leaves, dout = (x[: count * seq_len].view(count, seq_len, *x.shape[1:]) for x in self._flat)
        return [x.detach().requires_grad_() for x in leaves], dout


def measure(case, device, options):
    """Return the results of one case.

    Parameters
    ----------
    case : Case
        What to run.
    device : torch.device
        Where.
    options
        Those of the command line: ``repeats``, ``usual`` and ``profile``.
    """
    tensors = Tensors(case, device)
    leaves, dout = tensors.sequences(case.batch, case.seq_len)
    few, few_dout = tensors.sequences(*case.yardstick)
    way = best_dense(*few, case.causal)
    function, yardstick = ours(case.pattern, case.causal, case.backend), dense(way, case.causal)
    result = {
        "backend_used": choose_backend(case.backend, device, leaves[0].dtype, case.head_dim).name,
        "yardstick": way,
        "tensor_bytes": leaves[0].numel() * leaves[0].element_size(),
    }
    # The check comes first: it also loads, compiles and plans whatever is done once.
    result.update(errors(case, tensors, leaves, dout))
    yardstick_flop = case.dense_flop(*case.yardstick)
    for name in case.passes:
        runs = [_run(name, yardstick, few, few_dout), _run(name, function, leaves, dout)]
        times = interleaved_seconds(runs, options.repeats, device, queued=case.sweep != "small")
        result.update(_compared(name, *times, case.flop, yardstick_flop))
    if case.sweep == "none":
        result.update(others(case, tensors, options, device, result))
    result.update(memory(case, function, leaves, dout))
    if options.profile:
        result["kernels"] = kernels(_run("both", function, leaves, dout), device)
    return result


def measure_graphs(case, device, options):
    """Return times of the forward pass replayed from CUDA graphs, which take no launching, or why there are none."""
    tensors = Tensors(case, device)
    inputs = tensors.sequences(case.batch, case.seq_len)
    few = tensors.sequences(*case.yardstick)
    ways = dense(best_dense(*few[0], case.causal), case.causal), ours(case.pattern, case.causal, case.backend)
    runs = [_run("forward", way, *its) for way, its in zip(ways, (few, inputs), strict=True)]
    try:
        graphs = [_captured(run, device) for run in runs]
    except (RuntimeError, LongNetError) as error:
        return {"graph_failure": (str(error).splitlines() or [repr(error)])[0][:200]}
    for run, (graph, out) in zip(runs, graphs, strict=True):
        graph.replay()
        if not torch.allclose(out, run(), atol=1e-2, rtol=1e-2):
            return {"graph_failure": "a replay gives other results"}
    times = interleaved_seconds([graph.replay for graph, _ in graphs], options.repeats, device)
    figures = _compared("forward", *times, case.flop, case.dense_flop(*case.yardstick))
    return {"graph_failure": None, **{f"graph_{key}": value for key, value in figures.items()}}


def _captured(run, device):
    """Return a CUDA graph of a run, and the output that a replay fills."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is done once must not be part of a graph
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def errors(case, tensors, leaves, dout):
    """Return relative errors of ours, of dense flash attention over about as many keys, and their ratios."""
    found = errors_of_ours(case.pattern, case.causal, case.backend, leaves, dout)
    short = min(SHORT, case.tokens)
    dense_found = errors_of_dense("flash", case.causal, *tensors.sequences(1, short))
    ratios = [a / b for a, b in zip(found, dense_found, strict=True)]
    return {
        "relative_errors": found,
        "dense_relative_errors": dense_found,
        "error_ratios": ratios,
        "worst_error_ratio": max(ratios),
        "passed": max(found) < TOLERANCE,
    }


def others(case, tensors, options, device, result):
    """Return the rates of other ways of dense attention, and gather, attend, scatter, beside the yardstick."""
    few, few_dout = tensors.sequences(*case.yardstick)
    ways, runs = [], []
    short = min(SHORT, case.tokens)
    for way in DENSE if device.type == "cuda" else ["flash"]:
        for count, seq_len in ((case.tokens // short, short), case.yardstick):
            inputs, grad = tensors.sequences(count, seq_len)
            known = way == result["yardstick"] and seq_len == case.yardstick[1]
            if not known and (way != "cudnn" or best_dense(*inputs, case.causal) == "cudnn"):
                ways.append((way, seq_len, case.dense_flop(count, seq_len)))
                runs.append((dense(way, case.causal), inputs, grad))
    lines = [{"way": way, "tokens": seq_len} for way, seq_len, _ in ways]
    usual, repeats = {}, min(OTHERS_REPEATS, options.repeats)
    yardstick = dense(result["yardstick"], case.causal)
    yardstick_flop = case.dense_flop(*case.yardstick)
    for name in case.passes:
        functions = [_run(name, yardstick, few, few_dout), *(_run(name, *run) for run in runs)]
        its_seconds, *seconds = interleaved_seconds(functions, repeats, device)
        for line, its, (_, _, flop) in zip(lines, seconds, ways, strict=True):
            line[f"{name}_flop_per_second"] = flop * ARITHMETIC[name] / statistics.median(its)
            line[f"{name}_of_yardstick"] = flop / yardstick_flop * ratio(its_seconds, its).median
        usual[f"gather_attend_scatter_{name}_seconds"] = usual[f"gather_attend_scatter_{name}_of_floor"] = None
        if options.usual and all(
            case.seq_len % min(case.seq_len, branch.segment_length) == 0 for branch in case.pattern
        ):
            function = gather_attend_scatter(case.pattern, case.causal)
            run = _run(name, function, *tensors.sequences(case.batch, case.seq_len))
            try:
                its_seconds, seconds = interleaved_seconds([functions[0], run], repeats, device)
            except torch.cuda.OutOfMemoryError:
                continue
            usual[f"gather_attend_scatter_{name}_seconds"] = statistics.median(seconds)
            of_floor = case.flop / yardstick_flop * ratio(its_seconds, seconds).median
            usual[f"gather_attend_scatter_{name}_of_floor"] = of_floor
    return {"dense": lines, **usual}


def memory(case, function, leaves, dout):
    """Return the most bytes beside what was there before, forward and backward; None on a CPU, which does not tell.

    ``output_sized_buffers`` is what is left of the peak of both passes without what is returned, output and three
    gradients, and without one set of compact partial results (`compact_bytes`), in units of the output. It counts
    whatever the backward pass holds beyond one set, as a second set of partials.
    """
    names = ("peak_extra_bytes", "forward_peak_extra_bytes", "backward_peak_extra_bytes")
    buffers = ("output_sized_buffers", "forward_output_sized_buffers")
    result = {**dict.fromkeys(names + buffers), "compact_bytes": case.compact_bytes}
    if not dout.is_cuda:
        return result
    size = dout.numel() * dout.element_size()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = function(*leaves)
    forward, between = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated()
    peak, backward = forward, None
    if "both" in case.passes:
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(out, leaves, dout)
        backward = torch.cuda.max_memory_allocated() - between
        peak = max(forward, backward + between - before)
        result["output_sized_buffers"] = (peak - 4 * size - case.compact_bytes) / size
    result["forward_output_sized_buffers"] = (forward - size - case.compact_bytes) / size
    return {**result, **dict(zip(names, (peak, forward, backward), strict=True))}


def kernels(run, device):
    """Return what a run spends its time on: name, seconds, share, and seconds of each launch in their order."""
    on_gpu = device.type == "cuda"
    run()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu, acc_events=True) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    launches = {}
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if on_gpu == (event.device_type == DeviceType.CUDA) and not getattr(event, "is_user_annotation", False):
            microseconds = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            launches.setdefault(event.name, []).append(microseconds / 1e6)
    total = sum(map(sum, launches.values())) or 1.0
    lines = [
        {"name": name[:120], "seconds": sum(seconds), "share": sum(seconds) / total, "launches": seconds}
        for name, seconds in launches.items()
    ]
    return sorted(lines, key=lambda line: -line["seconds"])


def _run(name, function, leaves, dout):
    """Return a function of nothing that runs the forward pass, or both."""
    if name == "both":
        return lambda: torch.autograd.grad(function(*leaves), leaves, dout)
    return torch.no_grad()(lambda: function(*leaves))


def _compared(name, yardstick_seconds, seconds, flop, yardstick_flop):
    """Return ours beside the yardstick; that of the floor is the median of what it is in each round."""
    rounds = ratio(yardstick_seconds, seconds)
    median, arithmetic = statistics.median(yardstick_seconds), ARITHMETIC[name]
    return {
        f"dense_{name}_seconds": median,
        f"dense_{name}_flop_per_second": yardstick_flop * arithmetic / median,
        f"{name}_seconds": statistics.median(seconds),
        f"{name}_flop_per_second": flop * arithmetic / statistics.median(seconds),
        f"{name}_floor_seconds": flop / yardstick_flop * median,
        f"{name}_of_floor": flop / yardstick_flop * rounds.median,
        f"{name}_of_floor_range": [flop / yardstick_flop * x for x in (rounds.low, rounds.high)],
        f"{name}_dense_over_ours": rounds.median,
    }
