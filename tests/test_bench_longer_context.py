"""What the benchmark of a longer context says of losses, and that its record says the same of its own."""

from pathlib import Path

import pytest

from longnet_hpc.record import check_record, read_records

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def longer_context(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import longer_context

    return longer_context


def losses_of(names, values):
    return {name: {"loss": loss, "loss_by_context": [], "tokens": 7} for name, loss in zip(names, values, strict=True)}


@pytest.mark.parametrize(
    ("losses", "passed"),  # dense before, dilated, dilated at the long length, dense continued
    [
        ((1.0, 1.009, 0.98, 0.99), True),
        ((1.0, 1.011, 0.98, 0.99), False),  # forgot
        ((1.0, 0.97, 0.975, 0.99), False),  # longer contexts do not help
        ((1.0, 1.0, 0.99, 0.98), True),  # dense attention and short contexts are better, which is told, no more
    ],
)
def test_check_fails_for_each_of_its_parts(longer_context, losses, passed):
    assert longer_context.is_as_it_should_be(longer_context.compared(losses_of(longer_context.NAMES, losses))) is passed


def test_changes_are_relative_to_what_they_are_compared_with(longer_context):
    results = longer_context.compared(losses_of(longer_context.NAMES, (1.0, 0.8, 0.6, 0.5)))
    changes = ("change_at_short", "change_by_context", "over_dense_continued_at_short", "long_over_dense_continued")
    assert [results[name] for name in changes] == pytest.approx([-0.2, -0.25, 0.6, 0.2])


def test_committed_record_says_of_its_losses_what_the_benchmark_says(longer_context):
    (record,) = read_records(BENCH / "records" / "longer_context.jsonl")
    check_record(record)
    results = record["results"]
    losses = {
        name: {part: results[f"{name}_{part}"] for part in ("loss", "loss_by_context")}
        | {"tokens": results["held_out_tokens"]}
        for name in longer_context.NAMES
    }
    assert results == longer_context.compared(losses)
    assert record["check"] == {"name": longer_context.CHECK, "passed": longer_context.is_as_it_should_be(results)}
    assert record["check"]["passed"]
