"""Pictures of one GPU at work: the kernels of a step, and attention's rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from longnet_hpc.scaling.report_bars import Bar, picture_of
from longnet_hpc.scaling.report_data import Row, as_number
from longnet_hpc.scaling.report_draw import PALETTE, Picture
from longnet_hpc.words import percent, seconds_in_words, short, tokens_in_words

__all__ = ["draw_kernels", "draw_rates"]


def draw_kernels(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield what a step on one GPU is made of, by kind of kernel."""
    newest: dict[str, Bar] = {}
    kinds: dict[str, str] = {}
    for row in rows:
        its = row.results.get("seconds_by_kind")
        if row.name != "step" or not isinstance(its, Mapping):
            continue
        parts = {short(str(kind), 30): value for kind, raw in its.items() if (value := as_number(raw, 0)) is not None}
        total, tokens = sum(parts.values()), as_number(row.config.get("tokens"), 1)
        if total > 0 and tokens:
            label = f"{short(str(row.config.get('preset', 'model')), 20)}, {tokens_in_words(tokens)} tokens"
            shares = {kind: value / total for kind, value in parts.items()}
            values = {"seconds": row.positive("seconds"), **{f"{kind}_share": share for kind, share in shares.items()}}
            newest[label] = Bar(label, row, shares, seconds_in_words(row.positive("seconds") or total), values=values)
            for kind in shares:
                kinds.setdefault(kind, PALETTE[len(kinds) % len(PALETTE)])
    if newest:
        columns = {"point": "step", "seconds": "time", **{f"{kind}_share": kind for kind in kinds}}
        words = "Time on the GPU by kind of kernel, of one step of training on one GPU."
        yield picture_of(
            *(list(newest.values()), "kernels_of_a_step", "shares", "What a step on one GPU is made of", words),
            *(columns, kinds, lambda value: f"{100 * value:.0f}%"),
            title="Share of the time on the GPU",
        )


def draw_rates(rows: Sequence[Row]) -> Iterable[Picture]:
    """Yield attention's rate, as a share of that of dense attention on as many FLOP."""
    newest: dict[str, Bar] = {}
    for row in rows:
        config = row.config
        if row.name != "attention" or config.get("sweep") in ("linear", "seq"):
            continue
        for way, words in (("forward", "forward"), ("both", "forward + backward")):
            share, rate = row.positive(f"{way}_of_floor"), row.positive(f"{way}_flop_per_second")
            if share is None or rate is None:
                continue
            used = short(str(row.results.get("backend_used", "?")), 12)
            mask = "causal" if config.get("causal") else "full"
            tokens = tokens_in_words(as_number(config.get("seq_len"), 1) or 0)
            shape = short(str(config.get("shape", "?")), 12).replace("x", " heads of ")
            label = f"{shape}, {mask}, {tokens}, {used}: {words}"
            spread = row.results.get(f"{way}_of_floor_range")
            low_high = (
                tuple(as_number(its, 0) for its in spread) if isinstance(spread, list) and len(spread) == 2 else ()
            )
            bar = Bar(label, row, {words: share}, f"{percent(share)} · {rate / 1e12:.0f} TFLOP/s")
            bar.values = {"dense_share": share, "flop_per_second": rate}
            if len(low_high) == 2 and None not in low_high:
                bar.spread = (low_high[0] or 0.0, low_high[1] or 0.0)
            newest[label] = bar
    if not newest:
        return
    # Those that were chosen by themselves come first, whatever their rate: the picture must not be one of the best.
    bars = sorted(newest.values(), key=lambda bar: (bar.row.config.get("backend") != "auto", bar.label))
    by_rate = sorted(
        [bar for bar in bars if bar.row.config.get("backend") == "auto"] or bars,
        key=lambda bar: bar.values["dense_share"],
    )
    picture = picture_of(
        bars,
        "rate_of_attention",
        "lengths",
        "Attention's rate against dense attention",
        "Heads and their features, mask, tokens in a sequence, backend. 100% is the rate of the fastest dense "
        "attention of the library; whiskers span all rounds.",
        {"point": "attention", "dense_share": "of the dense rate", "flop_per_second": "rate"},
        {"forward": PALETTE[0], "forward + backward": PALETTE[2]},
        lambda value: f"{100 * value:.0f}%",
        title="Share of the rate of dense attention",
    )
    least, most = by_rate[0], by_rate[-1]
    picture.sentences = [
        f"Dilated attention runs at {percent(least.values['dense_share'])} ({least.label}) to "
        f"{percent(most.values['dense_share'])} ({most.label}) of the rate of dense attention."
    ]
    yield picture
