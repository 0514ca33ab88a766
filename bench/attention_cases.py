"""What `attention.py` measures, case by case: the paper's pattern at two widths, and the sweeps."""

import re
from dataclasses import dataclass

from longnet_hpc import Pattern
from longnet_hpc.model_config import PAPER_DILATION_RATES, PAPER_SEGMENT_LENGTHS

__all__ = ["SWEEPS", "Case", "cases_of"]

PAPER = Pattern.from_lists(PAPER_SEGMENT_LENGTHS, PAPER_DILATION_RATES)
SHORTEST = 8192
"""Tokens of the shortest sequence of the sweeps over lengths."""
SWEEPS = {
    "none": ["12x64", "16x128"],
    "seq": ["12x64", "16x128"],
    "head_dim": ["24x32", "12x64", "8x96", "6x128", "3x256"],
    "pattern": ["12x64", "16x128"],
    "small": ["12x64"],
    "linear": ["2x64"],
}
"""The shapes (heads x head_dim) of each sweep."""
ALL_PASSES = ("forward", "both")
"""What can be timed, the shorter first."""
PASSES = {"small": ("forward",), "linear": ("both",)}
"""What is timed in a sweep, where it is not both."""
YARDSTICK_SEQUENCES = 2


@dataclass(frozen=True)
class Case:
    """One line of the benchmark, and one record."""

    sweep: str
    shape: str
    causal: bool
    dtype: str
    backend: str
    pattern_name: str
    pattern: Pattern
    batch: int
    seq_len: int
    yardstick: tuple[int, int]
    """Sequences, and tokens of each, that dense attention is timed on."""
    passes: tuple[str, ...]
    """What is timed: ``forward``, and ``both`` it and the backward pass."""

    @property
    def heads(self):
        return int(self.shape.split("x")[0])

    @property
    def head_dim(self):
        return int(self.shape.split("x")[1])

    @property
    def tokens(self):
        return self.batch * self.seq_len

    @property
    def flop(self):
        """Arithmetic of ours, forward."""
        return self.batch * self.pattern.flop(self.seq_len, self.heads, self.head_dim, causal=self.causal)

    @property
    def compact_bytes(self):
        """Bytes of what all branches compute, row by row of their grids and no more, in half precision."""
        rows = 0
        for branch in self.pattern:
            w, r = branch.segment_length, branch.dilation_rate
            full, rest = divmod(self.seq_len, w)
            for offset in branch.offsets(self.heads):
                its_rows = sum(times * max(0, -(-(length - offset) // r)) for times, length in ((full, w), (1, rest)))
                rows += its_rows * len(branch.heads_at(offset, self.heads))
        return 2 * self.batch * rows * self.head_dim

    def dense_flop(self, sequences, seq_len):
        """Arithmetic of dense attention, forward."""
        whole = Pattern.from_lists([seq_len], [1])
        return sequences * whole.flop(seq_len, self.heads, self.head_dim, causal=self.causal)

    def config(self):
        """Return what was chosen, for a record."""
        return {
            **{key: getattr(self, key) for key in ("sweep", "shape", "causal", "dtype", "backend", "batch", "seq_len")},
            **{key: getattr(self, key) for key in ("heads", "head_dim", "pattern_name")},
            "segment_lengths": list(self.pattern.segment_lengths),
            "dilation_rates": list(self.pattern.dilation_rates),
            "passes": list(self.passes),
            "yardstick_sequences": self.yardstick[0],
            "yardstick_len": self.yardstick[1],
        }


def cases_of(options):
    """Return the cases that the command line asks for, and raise ValueError if it makes no sense."""
    shapes = options.shapes or SWEEPS[options.sweep]
    for shape in shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
            raise ValueError(f"a shape is heads x head_dim, as in 12x64, got {shape!r}")
    layouts = list(_layouts(options))
    if not layouts:
        raise ValueError(f"{options.tokens} tokens hold none of the sequences that were asked for")
    chosen = options.passes or PASSES.get(options.sweep, ALL_PASSES)
    passes = tuple(name for name in ALL_PASSES if name in chosen)
    cases = []
    for dtype in options.dtype:
        for shape in shapes:
            for name, pattern, batch, seq_len in layouts:
                yardstick = (YARDSTICK_SEQUENCES, options.yardstick_len)
                if options.sweep == "small":
                    yardstick = (1, seq_len)
                for causal in (False, True):
                    cases += [
                        Case(
                            *(options.sweep, shape, causal, dtype, backend, name, pattern, batch, seq_len, yardstick),
                            passes=passes,
                        )
                        for backend in options.backends
                    ]
    return cases


def _layouts(options):
    """Yield name and branches of a pattern, sequences, and tokens of each."""
    if options.sweep == "linear":
        for seq_len in _doublings(options.longest):
            yield "geometric", Pattern.geometric(seq_len, 2048, 4), 1, seq_len
    elif options.sweep == "seq":
        for seq_len in _doublings(options.tokens):
            yield "paper", PAPER, options.tokens // seq_len, seq_len
    elif options.sweep == "small":
        yield "paper", PAPER, 1, options.seq_len or SHORTEST
    else:
        seq_len = options.seq_len or 32768
        patterns = {"paper": PAPER}
        if options.sweep == "pattern":
            patterns["geometric"] = Pattern.geometric(seq_len, 2048, 4)
            patterns["one dense segment"] = Pattern.from_lists([2048], [1])
            patterns["no dense branch"] = Pattern(PAPER.branches[1:])
        if options.tokens >= seq_len:
            for name, pattern in patterns.items():
                yield name, pattern, options.tokens // seq_len, seq_len


def _doublings(longest):
    seq_len = SHORTEST
    while seq_len <= longest:
        yield seq_len
        seq_len *= 2
