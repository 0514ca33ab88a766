"""What a person reads of the results of `attention.py` in a terminal."""

__all__ = ["failure_line", "fastest_table", "linear_summary", "lines_of"]

NAMES = {"forward": "forward", "both": "with backward"}
STEADY_FROM = 65536
"""Tokens from which the time a token takes should stay the same."""
KERNEL_SHARE, MOST_KERNELS = 0.002, 20
"""Least share of a kernel in the time that is shown, and most kernels."""


def failure_line(case, words):
    return f"{_title(case)}: {words}"


def lines_of(case, result):
    """Return the lines of one case: times, rates and their share of the yardstick's, errors, and what else there is."""
    backend = result["backend_used"]
    lines = [_title(case) + (f" ({backend})" if backend != case.backend else "")]
    for name in case.passes:
        lines.append(_timing(NAMES[name], name, result))
        if case.sweep == "small":
            lines[-1] += f"; dense takes {result['forward_dense_over_ours']:.2f} times as long"
    if result.get("graph_failure"):
        lines.append(f"  no CUDA graph: {result['graph_failure']}")
    elif "graph_forward_seconds" in result:
        graph = {**result, **{key.removeprefix("graph_"): value for key, value in result.items() if "graph_" in key}}
        lines.append(_timing("as a graph", "forward", graph))
        lines[-1] += f"; dense takes {graph['forward_dense_over_ours']:.2f} times as long"
    if case.sweep == "linear":
        lines[-1] += f"; {result['seconds_per_token'] * 1e9:.3f} ns a token"
    lines.append(_errors(result))
    if case.sweep == "none":
        lines += _beside(result)
    if not result["passed"]:
        lines.append("  WRONG, so the times mean nothing")
    shown = result.get("kernels", ())[:MOST_KERNELS]
    return lines + [_kernel(line) for line in shown if line["share"] >= KERNEL_SHARE]


def _title(case):
    words = [case.shape, "causal" if case.causal else "full", case.dtype, case.backend]
    if case.sweep in ("seq", "linear", "small"):
        words.append(f"{case.seq_len:,} tokens")
    return " ".join(words) + (f", {case.pattern_name}" if case.sweep == "pattern" else "")


def _timing(words, name, result):
    low, high = result[f"{name}_of_floor_range"]
    return (
        f"  {words:<14}{_milliseconds(result[f'{name}_seconds'])} {_rate(result[f'{name}_flop_per_second'])} "
        f"{result[f'{name}_of_floor']:6.1%} ({low:.1%} to {high:.1%}) of dense {result['yardstick']}, "
        f"{_rate(result[f'dense_{name}_flop_per_second']).strip()}"
    )


def _milliseconds(seconds):
    return f"{seconds * 1e3:10.3f} ms"


def _rate(flop_per_second):
    tera = flop_per_second >= 1e11
    return f"{flop_per_second / (1e12 if tera else 1e9):6.1f} {'T' if tera else 'G'}FLOP/s"


def _errors(result):
    ratios = " ".join(f"{value:.2f}" for value in result["error_ratios"])
    return (
        f"  {'errors':<14}" + " ".join(f"{error:.1e}" for error in result["relative_errors"]) + " of out, dq, dk, dv; "
        f"times those of dense flash: {ratios}"
    )


def _beside(result):
    """Return the lines of what stands beside the yardstick, and of memory."""
    lines = [
        f"  dense {line['way']:<5} {line['tokens']:>6,} tokens:"
        + ",".join(
            f" {words} {_rate(line[f'{name}_flop_per_second'])} {line[f'{name}_of_yardstick']:6.1%}"
            for name, words in NAMES.items()
        )
        for line in result["dense"]
    ]
    usual = [
        f" {words} {_milliseconds(seconds).strip()} {result[f'gather_attend_scatter_{name}_of_floor']:.1%}"
        for name, words in NAMES.items()
        if (seconds := result[f"gather_attend_scatter_{name}_seconds"]) is not None
    ]
    lines.append("  gather, attend, scatter:" + (",".join(usual) or " not run"))
    if result["peak_extra_bytes"] is not None:
        forward, backward, compact = (
            f"{result[key] / 1e9:.2f} GB"
            for key in ("forward_peak_extra_bytes", "backward_peak_extra_bytes", "compact_bytes")
        )
        lines.append(
            f"  memory: forward {forward}, backward {backward} more, compact parts {compact}; "
            f"{result['output_sized_buffers']:.2f} buffers of the size of the output beside these and the results"
        )
    return lines


def _kernel(line):
    launches = line["launches"]
    each = " + ".join(f"{seconds * 1e3:.3f}" for seconds in launches[:4]) + (" + ..." if len(launches) > 4 else "")
    return (
        f"  {_milliseconds(line['seconds'])} {line['share']:6.1%} {len(launches):>4} x {line['name'][:48]:<48} {each}"
    )


def linear_summary(results):
    """Return one line a mask: how much the time a token varies once sequences are long.

    Parameters
    ----------
    results : list of tuple of Case and dict
        Cases that ran, with their results.
    """
    lines = []
    for causal in (False, True):
        steady = [
            (case.seq_len, result["seconds_per_token"])
            for case, result in results
            if case.causal == causal and case.seq_len >= STEADY_FROM
        ]
        if len(steady) > 1:
            lengths, seconds = zip(*steady, strict=True)
            lines.append(
                f"{'causal' if causal else 'full'}: from {min(lengths):,} to {max(lengths):,} tokens the time a token "
                f"takes stays within {max(seconds) / min(seconds) - 1:.1%} (target: 10%)"
            )
    return lines


def fastest_table(results):
    """Return a Python dict from (head_dim, causal, dtype) to the backend that comes closest to the floor.

    Parameters
    ----------
    results : list of tuple of Case and dict
        Cases that ran and were right. A backend that did less than others of a key does not count.
    """
    shares = {}
    for case, result in results:
        key = (case.head_dim, case.causal, case.dtype)
        share = [result.get(f"{name}_of_floor") for name in ("both", "forward")]
        shares.setdefault(key, {}).setdefault(case.backend, []).append(share)
    lines = ["FASTEST = {", "    # (head_dim, causal, dtype): backend, by share of the floor with backward"]
    for key, by_backend in sorted(shares.items()):
        most = max(map(len, by_backend.values()))
        means = {
            backend: [sum(column) / most for column in zip(*rows, strict=True) if None not in column]
            for backend, rows in by_backend.items()
            if len(rows) == most
        }
        ranked = sorted(means, key=lambda backend: -means[backend][0])
        figures = ", ".join(f"{backend} " + "/".join(f"{x:.0%}" for x in means[backend]) for backend in ranked)
        head_dim, causal, dtype = key
        lines.append(f'    ({head_dim}, {causal}, "{dtype}"): "{ranked[0]}",  # {figures} (with backward/forward)')
    return "\n".join([*lines, "}"])
