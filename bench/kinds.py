"""Where the time of a profiled step went, by kind of work, from a Chrome trace of `torch.profiler`.

On a GPU kernels count, each by its own name and by the operators that were running where it was launched; on a CPU the
operators themselves, less those within them.
"""

import json
import re

__all__ = ["KINDS", "seconds_by_kind"]

KINDS = ("attention", "matmul", "elementwise and norm", "copies", "cross-entropy", "optimizer")
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
SCOPES = ("cpu_op", "user_annotation")
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitk", re.IGNORECASE)
PRODUCT_OPERATORS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"}
COPY_OPERATORS = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy", "aten::cat", "aten::fill_"}


def seconds_by_kind(path, *, on_gpu):
    """Return seconds for each of `KINDS`, and the name of each kernel (or operator) with its seconds and kind.

    Parameters
    ----------
    path : Path
        Trace of one step, as `torch.profiler.profile.export_chrome_trace` writes it.
    on_gpu : bool
        Whether kernels count, or operators.

    Raises
    ------
    ValueError
        If the trace has none of them.
    """
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    work = list(_kernels(events) if on_gpu else _operators(events))
    if not work:
        raise ValueError(f"{path} shows no {'kernels of a GPU' if on_gpu else 'operators'}, so no kinds of work")
    kinds, names = dict.fromkeys(KINDS, 0.0), {}
    for name, scopes, microseconds in work:
        kind = _kind(name, scopes)
        kinds[kind] += microseconds / 1e6
        names[name, kind] = names.get((name, kind), 0.0) + microseconds / 1e6
    return kinds, sorted(((seconds, kind, name) for (name, kind), seconds in names.items()), reverse=True)


def _kind(name, scopes):
    if any(scope.startswith("longnet_hpc::mixture") for scope in scopes):
        return "attention"
    if "optimizer" in scopes:
        return "optimizer"
    if any("SummedCrossEntropy" in scope for scope in scopes):
        return "cross-entropy"
    if PRODUCTS.search(name) or not PRODUCT_OPERATORS.isdisjoint(scopes[-2:]):
        return "matmul"
    if name.startswith(("Memcpy", "Memset")) or not COPY_OPERATORS.isdisjoint(scopes[-1:]):
        return "copies"
    return "elementwise and norm"


def _kernels(events):
    """Yield name, scopes at the launch, outermost first, and microseconds of everything that ran on a GPU."""
    launches = [event for event in events if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})]
    scopes = {id(event): its_scopes for event, its_scopes, _ in _nested(events, launches)}
    by_correlation = {event["args"]["correlation"]: scopes[id(event)] for event in launches}
    for event in events:
        if event.get("cat") in ON_GPU:
            yield event["name"], by_correlation.get(event["args"].get("correlation"), ()), event["dur"]


def _operators(events):
    for event, scopes, own in _nested(events, ()):
        if event["cat"] == "cpu_op":
            yield event["name"], (*scopes, event["name"]), own


def _nested(events, others):
    """Yield scopes and others, thread by thread, with the names around each and the time that none within it took."""
    events = [event for event in events if event.get("cat") in SCOPES] + list(others)
    stack, done = [], []
    for event in sorted(events, key=lambda event: (str(event["tid"]), event["ts"], -event["dur"])):
        while stack and (stack[-1][0]["tid"] != event["tid"] or _end(stack[-1][0]) <= event["ts"]):
            done.append(stack.pop())
        if stack:
            stack[-1][2] -= event["dur"]
        stack.append([event, tuple(outer["name"] for outer, _, _ in stack), event["dur"]])
    yield from done + stack


def _end(event):
    return event["ts"] + event["dur"]
