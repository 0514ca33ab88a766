"""A picture of the records of `billion.py`: the time of a billion tokens over the length of a sequence.

    python bench/billion_picture.py bench/records/billion.jsonl billion.png

Of several records of one length the newest counts, among those that were made as the last one was.
"""

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from longnet_hpc.files import replace_file
from longnet_hpc.record import read_records

__all__ = ["draw"]

BLUE, RED, GREY, INK = "#1f5fa8", "#c8501e", "#666666", "#222222"
SAME = ("heads", "head_dim", "dtype", "causal", "total_tokens", "tokens_per_call")
"""What records of one picture have in common."""
DURATIONS = (
    (2 * 365.25 * 86400, 365.25 * 86400, "years"),
    (2 * 86400, 86400, "days"),
    (2 * 3600, 3600, "h"),
    (120, 60, "min"),
    (1, 1, "s"),
    (0, 1e-3, "ms"),
)
"""From how many seconds on a unit is used, its seconds, and its name."""


def draw(records, path):
    """Draw records as PNG.

    Parameters
    ----------
    records : list of dict
        Those of a file; others than those of `billion.py` are passed over.
    path : Path
        File to make or replace.
    """
    dilated, dense = _newest(records)
    figure = Figure(figsize=(11.5, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1, hspace=0.04)
    grid = figure.add_gridspec(2, 1, height_ratios=(2.1, 1))
    _head(figure, dilated[-1])
    above = figure.add_subplot(grid[0])
    _draw_seconds(above, dilated, dense)
    below = figure.add_subplot(grid[1], sharex=above)
    _draw_a_token(below, dilated)
    for axes in (above, below):
        _over_tokens(axes, dilated)
    below.set_xlabel("tokens a sequence")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda partial: figure.savefig(partial, dpi=130, format="png", facecolor="white"))


def _newest(records):
    """Return the newest record of each length, in order, of dilated and of dense attention."""
    records = [record for record in records if record["what"]["name"] == "billion"]
    ours = [record for record in records if record["what"]["config"]["attention"] == "dilated"]
    if not ours:
        raise SystemExit("error: there is no record of a billion tokens to draw")
    kinds = [[record["what"]["config"][key] for key in SAME] for record in records]
    kind = kinds[records.index(ours[-1])]
    newest = {}
    for record, its_kind in zip(records, kinds, strict=True):
        if its_kind == kind:
            newest[record["what"]["config"]["attention"], _seq_len(record)] = record
    ordered = [newest[key] for key in sorted(newest, key=lambda key: key[1])]
    return [[x for x in ordered if x["what"]["config"]["attention"] == name] for name in ("dilated", "dense")]


def _head(figure, record):
    config, place = record["what"]["config"], record["where"]
    figure.suptitle(
        f"Attention over {_tokens(config['total_tokens'])} tokens, cut into sequences of growing length",
        x=0.012,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    figure.supxlabel(
        f"{config['dtype']}   ·   {place['gpu'] or place['cpu']}   ·   {record['time'][:10]}",
        x=0.99,
        ha="right",
        fontsize=9.5,
        color=GREY,
    )


def _draw_seconds(axes, dilated, dense):
    """Draw the time of all tokens; dense attention is dashed where it was not measured."""
    all_tokens = f"{_tokens(dilated[0]['what']['config']['total_tokens'])} tokens"
    axes.set_yscale("log")
    if dense:
        is_measured = [record["kind"] == "measured" for record in dense]
        # The dashes start at the last point that was measured.
        first = max(0, is_measured.index(False) - 1) if False in is_measured else len(dense)
        x, y = _points(dense, "seconds")
        axes.plot(x[first:], y[first:], color=RED, linewidth=2, linestyle=(0, (4, 2.5)), zorder=2)
        for flag, face, words in ((True, RED, "measured"), (False, "white", "extrapolated")):
            its_x, its_y = _points([r for r, its in zip(dense, is_measured, strict=True) if its == flag], "seconds")
            style = {"color": RED, "linewidth": 2, "marker": "s", "markerfacecolor": face, "markeredgewidth": 1.5}
            axes.plot(its_x, its_y, **style, linestyle="-" if flag else "none", zorder=3)
            if its_x:
                axes.plot([], [], **style, linestyle="-" if flag else (0, (4, 2.5)), label=f"dense attention, {words}")
    x, y = _points(dilated, "seconds")
    axes.plot(x, y, color=BLUE, linewidth=2.6, marker="o", markersize=7, label="dilated attention (ours)", zorder=4)
    low, high = min(y), max(y + (_points(dense, "seconds")[1] if dense else []))
    axes.set_ylim(low / 4, high * 6)
    _mark_ends(axes, dilated, dense)
    axes.set_ylabel(f"time of {all_tokens} (s)")
    axes.legend(frameon=False, fontsize=10, loc="upper left", handlelength=3.2)
    _plain(axes, f"Forward, {_shape(dilated[0])}")


def _mark_ends(axes, dilated, dense):
    """Write times in words at both ends, and how far apart the ways are where sequences are longest."""
    for record, its_place in ((dilated[0], (4, -18)), (dilated[-1], (-4, -18))):
        _say(axes, record, BLUE, its_place, "left" if record is dilated[0] and len(dilated) > 1 else "right")
    if not dense:
        return
    _say(axes, dense[-1], RED, (-4, 12), "right")
    x, upper, lower = _seq_len(dense[-1]), _seconds(dense[-1]), _seconds(dilated[-1])
    if x == _seq_len(dilated[-1]) and upper > 20 * lower:
        style = {"arrowstyle": "<->", "color": GREY, "linewidth": 1.2, "shrinkA": 9, "shrinkB": 9}
        axes.annotate("", (x, lower), (x, upper), arrowprops=style, zorder=1)
        axes.annotate(
            *(f"{_round(upper / lower)}\ntimes as long", (x, (upper * lower) ** 0.5)),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=12,
            fontweight="bold",
            color=INK,
        )


def _say(axes, record, color, place, side):
    axes.annotate(
        *(
            _duration(_seconds(record)) + (" (extrapolated)" if record["kind"] == "modelled" else ""),
            (_seq_len(record), _seconds(record)),
        ),
        xytext=place,
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=10.5,
        fontweight="bold",
        color=color,
    )


def _draw_a_token(axes, dilated):
    """Draw the time a token takes, with whiskers over all rounds."""
    x, y = _points(dilated, "seconds_per_token")
    rounds = [[_seconds(r, key) / r["results"]["tokens"] for r in dilated] for key in ("lowest", "highest")]
    axes.plot(x, [1e9 * its for its in y], color=BLUE, linewidth=2.6, marker="o", markersize=7, zorder=4)
    axes.vlines(x, *([1e9 * its for its in bound] for bound in rounds), color=INK, linewidth=1.2, zorder=5)
    axes.set_ylim(0, 1.25e9 * max(y + rounds[1]))
    axes.set_ylabel("time a token (ns)")
    _plain(axes, "Dilated attention: time a token (whiskers: all rounds)")


def _over_tokens(axes, dilated):
    """Set up the axis of lengths, and shade those that are streamed."""
    all_x = [_seq_len(record) for record in dilated]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(all_x) / 1.5, max(all_x) * 1.5)
    axes.xaxis.set_major_locator(FixedLocator(all_x))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _tokens(round(value)))
    axes.tick_params(axis="x", labelsize=9)
    limit = dilated[-1]["what"]["config"]["tokens_per_call"]
    if max(all_x) > limit:
        axes.axvspan(limit * 2**0.5, max(all_x) * 1.5, color=BLUE, alpha=0.06, linewidth=0, zorder=0)
        if axes.get_yscale() != "log":  # once is enough
            axes.text(
                *(limit * 1.5, 0.05, f"streamed through time, {_tokens(limit)} at once"),
                transform=axes.get_xaxis_transform(),
                fontsize=9.5,
                color=GREY,
            )


def _plain(axes, title):
    axes.set_title(title, fontsize=11.5, loc="left", color=INK)
    axes.grid(alpha=0.22, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _points(records, key):
    return [_seq_len(record) for record in records], [record["results"][key] for record in records]


def _seq_len(record):
    return record["what"]["config"]["seq_len"]


def _shape(record):
    config = record["what"]["config"]
    return f"{config['heads']} heads of {config['head_dim']}, {'causal' if config['causal'] else 'full'}"


def _seconds(record, which=None):
    return record["results"][f"{which}_seconds" if which else "seconds"]


def _duration(seconds):
    """Return a time as a person would say it."""
    return next(f"{_round(seconds / size)} {unit}" for least, size, unit in DURATIONS if seconds >= least)


def _round(number):
    """Return a number with two digits that count, at most one of them behind the point."""
    return f"{number:,.1f}" if number < 9.95 else f"{float(f'{number:.2g}'):,.0f}"


def _tokens(number):
    for unit, words in ((1 << 30, "B"), (1 << 20, "M"), (1 << 10, "K")):
        if number >= unit:
            return f"{number / unit:g}{words}"
    return f"{number}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="file of records")
    parser.add_argument("picture", type=Path, help="PNG to make or replace")
    options = parser.parse_args()
    draw(read_records(options.records), options.picture)


if __name__ == "__main__":
    main()
