"""A picture of the records of `attention.py`: how close attention comes to the rate of dense attention.

    python bench/attention_picture.py bench/records/attention.jsonl attention.png

Of several records of one case the newest counts. Sweeps over the length of sequences are drawn below, if there are any.
"""

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from longnet_hpc.files import replace_file
from longnet_hpc.record import read_records

__all__ = ["draw"]

BLUE, PALE, GREY, SAND, INK = "#1f5fa8", "#a9c6e8", "#666666", "#c9c4b8", "#222222"
TARGET = "#c8501e"
TARGETS = {("forward", False): 95, ("forward", True): 88, ("both", False): 90, ("both", True): 80}
"""Percent of the yardstick's rate, by pass and whether attention is causal."""
TITLES = {"forward": "Forward", "both": "Forward + backward"}
MASKS = {False: "full", True: "causal"}
BAR, SIDE = 0.42, 0.16
"""Widths of our bar and of those beside it, where the groups are 1 apart."""


def draw(records, path):
    """Draw records as PNG.

    Parameters
    ----------
    records : list of dict
        Those of a file; others than attention's are passed over.
    path : Path
        File to make or replace.
    """
    by_sweep = _newest(records)
    below = [name for name in ("seq", "linear") if by_sweep.get(name)]
    main = by_sweep.get("none", [])
    rows = bool(main) + bool(below)
    if not rows:
        raise SystemExit("error: there is no record of attention to draw")
    figure = Figure(figsize=(11.5, 0.9 + 4.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1, hspace=0.05)
    grid = figure.add_gridspec(rows, 2)
    newest = max((record for name in by_sweep for record in by_sweep[name]), key=lambda record: record["time"])
    _head(figure, newest)
    if main:
        left = None
        for column, name in enumerate(TITLES):
            left = figure.add_subplot(grid[0, column], sharey=left)
            _draw_shares(left, name, main)
        figure.legend(handles=_legend(main), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    for column, name in enumerate(below):
        axes = figure.add_subplot(grid[rows - 1, column] if len(below) > 1 else grid[rows - 1, :])
        {"seq": _draw_lengths, "linear": _draw_linear}[name](axes, by_sweep[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=130, format="png", facecolor="white"))


def _newest(records):
    """Return the newest record of each case, by sweep, of the dtype and backend that each sweep had last."""
    by_sweep = {}
    for record in records:
        config = record["what"]["config"]
        if record["what"]["name"] != "attention" or "sweep" not in config:
            continue
        key = config["shape"], config["causal"], config["seq_len"], config["pattern_name"]
        kind = config["dtype"], config["backend"]
        last_kind, cases = by_sweep.get(config["sweep"], (kind, {}))
        by_sweep[config["sweep"]] = kind, {**(cases if last_kind == kind else {}), key: record}
    return {sweep: list(cases.values()) for sweep, (_, cases) in by_sweep.items()}


def _head(figure, record):
    config, place = record["what"]["config"], record["where"]
    figure.suptitle(
        "Dilated attention against dense attention", x=0.012, ha="left", fontsize=15, fontweight="bold", color=INK
    )
    figure.text(
        *(0.99, 0.985, f"{place['gpu'] or place['cpu']}   ·   {config['dtype']}   ·   {record['time'][:10]}"),
        ha="right",
        va="top",
        fontsize=9.5,
        color=GREY,
    )


def _draw_shares(axes, name, records):
    """Draw ours, dense flash attention and the usual way of each shape, in percent of the yardstick's rate."""
    records = sorted(records, key=lambda record: (record["what"]["config"]["head_dim"], _causal(record)))
    ceiling = 108.0
    for place, record in enumerate(records):
        result = record["results"]
        share = 100 * result[f"{name}_of_floor"]
        low, high = (100 * x for x in result[f"{name}_of_floor_range"])
        ceiling, target = max(ceiling, high + 8), TARGETS[name, _causal(record)]
        middle = place - SIDE
        axes.bar(middle, share, BAR, color=BLUE, zorder=2)
        axes.vlines(middle + 0.36 * BAR, low, high, color=INK, linewidth=1.2, zorder=4)
        axes.text(
            *(middle, min(share, target) - 2.5, f"{share:.0f}%"),
            ha="center",
            va="top",
            fontsize=13,
            fontweight="bold",
            color="white",
            zorder=5,
        )
        axes.text(
            *(middle, 2, f"{result[f'{name}_flop_per_second'] / 1e12:.0f}\nTFLOP/s"),
            ha="center",
            va="bottom",
            fontsize=8,
            color="white",
            zorder=5,
        )
        beside = middle + BAR / 2 + SIDE / 2 + 0.02
        for value, color in ((_flash(record, name), PALE), (result[f"gather_attend_scatter_{name}_of_floor"], SAND)):
            if value is not None:
                axes.bar(beside, 100 * value, SIDE, color=color, zorder=2)
                axes.text(beside, 100 * value + 1, f"{100 * value:.0f}", ha="center", fontsize=8, color=GREY)
            beside += SIDE + 0.02
        axes.hlines(target, middle - 0.6 * BAR, middle + 0.6 * BAR, color=TARGET, linewidth=2, zorder=3.5)
        axes.text(middle - 0.64 * BAR, target, target, ha="right", va="center", fontsize=8.5, color=TARGET)
    axes.axhline(100, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xticks(range(len(records)), [_label(record) for record in records], fontsize=9.5)
    axes.set_xlim(-0.65, len(records) - 0.35)
    axes.set_ylim(0, ceiling)
    _plain(axes, TITLES[name])
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    if name == "forward":
        axes.set_ylabel("rate, percent of dense attention's")


def _draw_lengths(axes, records):
    """Draw the share of the yardstick's rate, forward and backward, over the length of a sequence."""
    for shape, causal, color, marker in _series(records):
        its = sorted((r for r in records if _shape(r) == shape and _causal(r) == causal), key=_seq_len)
        shares = [100 * r["results"]["both_of_floor"] for r in its]
        style = {"color": color, "marker": marker, "linestyle": "--" if causal else "-", "linewidth": 2}
        axes.plot([_seq_len(r) for r in its], shares, label=f"{_spaced(shape)}, {MASKS[causal]}", **style)
    for causal, words in MASKS.items():
        target = TARGETS["both", causal]
        axes.axhline(target, color=TARGET, linewidth=1, linestyle="--" if causal else "-", zorder=1)
        axes.annotate(
            *(f"target,\n{words}", (1, target)),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=TARGET,
        )
    axes.set_ylim(0, 108)
    axes.set_ylabel("rate, percent of dense attention's")
    _over_tokens(axes, "Forward + backward, 524,288 tokens cut into sequences")


def _draw_linear(axes, records):
    """Draw the time a token takes over the length of one sequence, with a band of 10 percent from the least up."""
    highest = 0.0
    for shape, causal, color, marker in _series(records):
        its = sorted((r for r in records if _shape(r) == shape and _causal(r) == causal), key=_seq_len)
        times = [1e9 * r["results"]["seconds_per_token"] for r in its]
        steady = [x for x, r in zip(times, its, strict=True) if _seq_len(r) >= 1 << 16] or times
        axes.axhspan(min(steady), 1.1 * min(steady), color=color, alpha=0.12, linewidth=0)
        style = {"color": color, "marker": marker, "linestyle": "--" if causal else "-", "linewidth": 2}
        # Records from before there was a choice of passes are of both.
        only = "" if "both" in its[0]["what"]["config"].get("passes", ["both"]) else ", forward"
        axes.plot([_seq_len(r) for r in its], times, label=f"{_spaced(shape)}, {MASKS[causal]}{only}", **style)
        highest = max(highest, *times)
    axes.set_ylim(0, 1.12 * highest)
    axes.set_ylabel("time a token (ns)")
    _over_tokens(axes, "One long sequence, with backward where not said otherwise (bands: 10%)", "upper right")


def _over_tokens(axes, title, place="lower right"):
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(int(value)))
    axes.set_xlabel("tokens a sequence")
    axes.legend(frameon=False, fontsize=9, loc=place, handlelength=3.5)
    _plain(axes, title)


def _plain(axes, title):
    axes.set_title(title, fontsize=11.5, loc="left", color=INK)
    axes.grid(alpha=0.22, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(records):
    config, yardstick = records[0]["what"]["config"], records[0]["results"]["yardstick"]
    yardstick = "cuDNN" if yardstick == "cudnn" else yardstick
    dash = (0, (4, 3))
    return [
        Patch(color=BLUE, label=f"ours, sequences of {config['seq_len']:,} (whisker: all rounds)"),
        Patch(color=PALE, label="dense flash attention"),
        Patch(color=SAND, label="gather, attend, scatter"),
        Line2D([], [], color=TARGET, linewidth=2, label="target"),
        Line2D([], [], color=INK, linestyle=dash, label=f"dense {yardstick}, {config['yardstick_len']:,} tokens"),
    ]


def _flash(record, name):
    """Return the share of dense flash attention at the yardstick's length, if it was timed."""
    length = record["what"]["config"]["yardstick_len"]
    lines = [x for x in record["results"]["dense"] if x["way"] == "flash" and x["tokens"] == length]
    return lines[0][f"{name}_of_yardstick"] if lines else None


def _series(records):
    """Yield shape, mask, colour and marker of each line."""
    shapes = sorted({_shape(record) for record in records}, key=lambda shape: int(shape.split("x")[1]))
    for number, shape in enumerate(shapes):
        for causal in MASKS:
            yield shape, causal, (BLUE, "#3d8f6e", "#8a5aa8", GREY)[number % 4], "os^D"[number % 4]


def _label(record):
    return f"{_spaced(_shape(record))}\n{MASKS[_causal(record)]}"


def _spaced(shape):
    return " heads of ".join(shape.split("x"))


def _tokens(number):
    for unit, words in ((1 << 20, "M"), (1 << 10, "K")):
        if number >= unit:
            return f"{number / unit:g}{words}"
    return f"{number}"


def _shape(record):
    return record["what"]["config"]["shape"]


def _causal(record):
    return record["what"]["config"]["causal"]


def _seq_len(record):
    return record["what"]["config"]["seq_len"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="file of records")
    parser.add_argument("picture", type=Path, help="PNG to make or replace")
    options = parser.parse_args()
    draw(read_records(options.records), options.picture)


if __name__ == "__main__":
    main()
