"""Reports: what is read, what is told apart, and that nothing of a record becomes markup."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import pytest
from launching import run_python
from report_records import full, make, place, scaling, step, write  # noqa: F401 - with a fixture

from longnet_hpc.errors import ConfigError
from longnet_hpc.record import make_record
from longnet_hpc.scaling.config import ReportConfig
from longnet_hpc.scaling.report import report
from longnet_hpc.scaling.report_data import load
from longnet_hpc.scaling.report_points import matched, points_of
from longnet_hpc.words import (
    bytes_in_words,
    percent,
    runs_of,
    seconds_in_words,
    tokens_in_words,
)

# ruff: noqa: F811 - the fixture that tests take

HOSTILE = "<script>alert(1)</script>\"'&$x_{$ </svg></style>\u202e\ud800\x00"
NO_CHILDREN = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements of a page, its text, ids and links; refuses elements that are not closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.names, self.ids, self.links, self.words, self.attributes, self._open = [], [], [], [], set(), []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes |= {key for key, _ in attrs}
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in NO_CHILDREN:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def table_of(tmp_path, name):
    with (tmp_path / "report" / f"{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_page_has_every_section_and_each_link_leads_somewhere(full):
    folder, text = full
    page = Page(text)
    for key in (
        "summary",
        "scaling",
        "lengths",
        "shares",
        "exchange",
        "bytes",
        "memory",
        "loss",
        "simulated",
        "slowest",
    ):
        assert key in page.ids
    assert {"other", "failed", "provenance"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link == "data:," or (link[0] == "#" and link[1:] in page.ids) or (folder / "report" / link).is_file(), (
            link
        )


def test_page_asks_for_nothing_outside_of_itself(full):
    _, text = full
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "form"} & set(page.names)
    assert not any(name.startswith("on") for name in page.attributes)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "url(" not in text.replace("url(#", "")


def test_pictures_are_told_apart_by_filling_and_dashes(tmp_path):
    _, text = make(tmp_path, scaling())
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert "measured: filled, solid" in drawing
    assert "modelled: hollow, dashed" in drawing
    lines = re.findall(r'style="fill: none; stroke-dasharray: ([^;]+);[^"]*stroke: var\(--c1\)', drawing)
    assert any(not dashes.startswith("1.") for dashes in lines)  # dashes, besides the dots of what is ideal
    markers = set(re.findall(r'style="(fill: var\(--[a-z0-9]+\)|fill: [^;"]*); stroke: var\(--c1\)', drawing))
    assert "fill: var(--paper)" in markers
    assert "fill: var(--c1)" in markers


def test_measured_records_alone_have_no_legend_of_modelled_ones(tmp_path):
    _, text = make(tmp_path, [record for record in scaling() if record["kind"] == "measured"])
    assert "measured: filled, solid" in text
    assert "modelled: hollow" not in text
    assert 'id="simulated"' not in text
    assert 'id="forecast_accuracy"' not in text


def test_tables_name_the_kind_of_each_line(full):
    folder, text = full
    lines = table_of(folder, "weak_scaling")
    assert {line["kind"] for line in lines} == {"measured", "modelled"}
    assert 'class="kind modelled"' in text
    assert 'class="kind measured"' in text


def test_csv_has_all_digits_of_the_records(tmp_path):
    seconds = {1: 8.123456789012345, 2: 4.4, 4: 2.7}
    records = [step("bench strong", ranks, 65536, its) for ranks, its in seconds.items()]
    make(tmp_path, records)
    lines = table_of(tmp_path, "strong_scaling")
    assert {int(line["ranks"]): float(line["seconds"]) for line in lines} == seconds
    for line in lines:
        ranks = int(line["ranks"])
        assert math.isclose(float(line["efficiency"]), seconds[1] / ranks / seconds[ranks])
        assert float(line["seconds_low"]) == records[[1, 2, 4].index(ranks)]["results"]["seconds_low"]
        assert math.isclose(float(line["tokens_per_second"]), 65536 / seconds[ranks])


def test_bytes_and_memory_are_compared_with_forecasts(tmp_path):
    make(tmp_path, scaling())
    lines = [line for line in table_of(tmp_path, "bytes_received") if "measured" in line["kind"]]
    assert (
        {line["received_bytes"] for line in lines}
        == {line["forecast_bytes"] for line in lines}
        == {"1100000", "3300000"}
    )
    assert all(math.isclose(float(line["over_the_minimum_bytes_ratio"]), 1.1) for line in lines)
    four = next(
        line
        for line in table_of(tmp_path, "memory_of_a_rank")
        if "measured" in line["kind"] and "4 ranks" in line["point"]
    )
    assert math.isclose(float(four["difference"]), 325 / 250 - 1)


def test_memory_of_a_gpu_is_compared_without_that_of_its_processes(tmp_path):
    memory = {"process": 1000, "activations": 1500, "total": 2500}
    its = {"peak_memory_bytes": 1500}
    for device, changes, expected in (("cpu", {}, 2500), ("h100", {"gpu": "NVIDIA H100 80GB HBM3"}, 1500)):
        folder = tmp_path / device
        forecast = step("plan", 2, 65536, 1.1, kind="modelled", machine=device, results={"memory_bytes": memory})
        make(folder, [step("bench strong", 2, 65536, 1.0, changes=changes, results=its), forecast])
        (line,) = (line for line in table_of(folder, "memory_of_a_rank") if line["forecast_bytes"])
        assert int(line["forecast_bytes"]) == expected


def test_forecasts_of_what_is_kept_are_lines_of_their_own(tmp_path):
    kept = {"activation_checkpointing": True, "kind": "modelled", "machine": "h100"}
    records = [
        step("plan", ranks, 65536, seconds / ranks, keep_attention=keep, **kept)
        for ranks in (1, 2)
        for keep, seconds in ((True, 8.0), (False, 9.0))
    ]
    make(tmp_path, records)
    lines = table_of(tmp_path, "strong_scaling")
    assert sorted(float(line["seconds"]) for line in lines) == [4.0, 4.5, 8.0, 9.0]
    assert len({line["case"] for line in lines}) == 2
    assert any("checkpointed with attention" in line["case"] for line in lines)


def test_newer_record_of_a_point_replaces_the_older(tmp_path):
    old, new, other = (
        step("bench strong", 1, 65536, 9.0),
        step("bench strong", 1, 65536, 8.0),
        step("bench strong", 2, 65536, 4.0),
    )
    old["time"], new["time"] = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    _, text = make(tmp_path, [new, other, old])
    assert sorted(float(line["seconds"]) for line in table_of(tmp_path, "strong_scaling")) == [4.0, 8.0]
    assert "9 s" not in text[text.index('id="strong_scaling"') : text.index("</figure>")]


def test_points_match_only_where_the_same_is_computed_on_the_same_device(tmp_path):
    gpu = {"gpu": "NVIDIA H100 80GB HBM3"}
    rows = [
        step("bench strong", 2, 65536, 1.0, changes=gpu),
        step("plan", 2, 65536, 1.1, kind="modelled", machine="h100"),
        step("plan", 2, 65536, 0.9, kind="modelled", machine="mi250x"),
        step("plan", 2, 65536, 1.3, kind="modelled", machine="runs/machine.toml"),
        step("plan", 2, 65536, 1.5, kind="modelled", machine="h100", activation_checkpointing=True),
        step("plan", 2, 65536, 1.55, kind="modelled", machine="h100", keep_attention=False),
        step("plan", 2, 65536, 1.57, kind="modelled", machine="h100", stream=True, chunk_len=32768),
        step("plan", 2, 65536, 1.6, kind="modelled", machine="h100", task="eval"),
        step("plan", 2, 32768, 1.7, kind="modelled", machine="h100"),
        step("plan", 4, 65536, 1.8, kind="modelled", machine="h100"),
    ]
    found = load([str(write(tmp_path / "a.jsonl", rows))])
    assert sorted(forecast.seconds for _, forecast in matched(points_of(found.sound))) == [1.1, 1.3]


def test_hostile_strings_are_text_everywhere(tmp_path):
    changes = dict.fromkeys(("host", "cpu", "mpi_library", "launcher", "gpu", "transport"), HOSTILE)
    changes["versions"] = {HOSTILE: HOSTILE}
    records = [
        step(name, ranks, 65536, 8.0 / ranks, changes=changes, preset=HOSTILE, machine=HOSTILE, kind=kind)
        for ranks in (1, 2)
        for name, kind in (("bench strong", "measured"), ("plan", "modelled"), ("simulate", "modelled"))
    ]
    records += [
        make_record(HOSTILE, config={}, results={HOSTILE: 1.0}, place=place(**changes), check=(HOSTILE, passed))
        for passed in (True, False)
    ]
    bins = [{"first_position": 1, "last_position": 9, "loss": 1.0}]
    its = {"loss_by_position": bins, "corpus": HOSTILE, "step": HOSTILE}
    records.append(make_record("eval", config={}, results=its, place=place(), check=("x", True)))
    for record in records:
        record["time"] = record["what"]["command"] = record["what"]["git_commit"] = record["how"]["statistic"] = HOSTILE
    _, text = make(tmp_path, records, title=HOSTILE)
    page = Page(text)
    assert "script" not in page.names
    assert page.names.count("style") == 1
    assert sum("<script>alert(1)</script>" in words for words in page.words) > 20
    assert not {"\u202e", "\x00", "\ud800"} & set(text)


def test_cells_of_csv_are_no_formulas(tmp_path):
    make(tmp_path, [step("bench strong", ranks, 65536, 1.0, preset="=HYPERLINK(1)") for ranks in (1, 2)])
    assert {line["case"] for line in table_of(tmp_path, "strong_scaling")} == {"'=HYPERLINK(1) training"}


def test_damaged_and_foreign_lines_are_listed_and_do_not_end_the_report(tmp_path, capsys):
    records = [step("bench strong", ranks, 65536, 8.0 / ranks) for ranks in (1, 2)]
    source = write(tmp_path / "records" / "a.jsonl", records)
    lines = [
        json.dumps(records[0])[:100],
        "[" * 100_000,
        '{"x": ' + "9" * 5000 + "}",
        '{"schema": 1}',
        "3",
        json.dumps(records[0]).replace('"seconds": 8.0', '"seconds": NaN'),
    ]
    with source.open("ab") as stream:
        stream.write("\n".join(lines).encode() + b"\n\xff\xfe\x00\n")
    (tmp_path / "records" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' * 3)
    report(ReportConfig(sources=(str(tmp_path / "records"),), output=tmp_path / "report"))
    said, text = capsys.readouterr().out, (tmp_path / "report" / "index.html").read_text()
    failed = text[text.index('id="failed"') : text.index('id="provenance"')]
    first = len(records) + 1
    for number in range(first, first + 6):
        assert f"a.jsonl:{number}" in failed, number
    assert "NaN is no number" in failed
    assert "nested too deeply" in failed
    assert "3 lines of the steps of a run" in failed
    assert f"{len(records)} records in 1 file: 2 measured, 0 modelled" in said
    assert 'id="strong_scaling"' in text


def test_results_of_the_wrong_type_are_left_out(tmp_path):
    wrong = (None, "8", [], {}, True, -1.0, 0, 10**400)
    records = [step("bench strong", ranks, 65536, 8.0 / ranks) for ranks in (1, 2, 4)]
    records += [*(step("bench strong", 8, 65536, 1.0, results={"seconds": its}) for its in wrong)]
    names = (
        "compute_seconds",
        "bytes_received",
        "peak_memory_bytes",
        "memory_bytes",
        "slowest_rank",
        "loss_by_position",
    )
    records += [step("bench strong", 16, 65536, 1.0, results=dict.fromkeys(names, its)) for its in wrong]
    records += [step("bench strong", 32, 65536, 1.0, point=its, model=its, batch_size=its) for its in wrong]
    make(tmp_path, records)
    ranks = {int(line["ranks"]) for line in table_of(tmp_path, "strong_scaling")}
    assert ranks == {1, 2, 4, 16}


def test_records_whose_check_failed_are_named_and_in_no_picture(tmp_path):
    records = [step("bench strong", ranks, 65536, 8.0 / ranks) for ranks in (1, 2)]
    records.append(step("bench strong", 8, 65536, 1.2345, passed=False))
    _, text = make(tmp_path, records)
    assert "8" not in {line["ranks"] for line in table_of(tmp_path, "strong_scaling")}
    assert "check did not pass: loss agrees with that of one rank" in text
    assert "1 record did not pass the check" in text


def test_provenance_says_where_each_number_is_from(tmp_path):
    source, text = make(
        tmp_path, [step("bench strong", ranks, 65536, 8.0 / ranks, changes={"gpu": "GPU 1"}) for ranks in (1, 2)]
    )
    its = text[text.index('id="provenance"') :]
    record = json.loads(source.read_text().splitlines()[1])
    for words in ("node7", "Processor 9000", "GPU 1", "MPICH 5", "mpirun", "numpy", f"{source}:2"):
        assert words in its
    assert record["what"]["git_commit"] is None or record["what"]["git_commit"] in its
    assert record["time"][:10] in its
    assert {line["records"] for line in table_of(tmp_path, "strong_scaling")} == {"R1", "R2"}
    assert '<tr id="R2"' in its


def test_no_records_are_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.jsonl").write_text("nonsense\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no record in runs; 1 line or file could not be read, the first: .*a\.jsonl:1"
    ):
        report(ReportConfig())
    with pytest.raises(ConfigError, match="'nowhere': there is no such file"):
        report(ReportConfig(sources=("nowhere",)))


def test_sources_left_out_are_the_folder_runs(tmp_path, monkeypatch, capsys):
    write(tmp_path / "runs" / "bench" / "strong.jsonl", scaling())
    monkeypatch.chdir(tmp_path)
    report(ReportConfig())
    assert (tmp_path / "runs" / "report" / "index.html").is_file()
    assert "16 records in 1 file: 6 measured, 10 modelled" in capsys.readouterr().out


def test_report_needs_neither_torch_nor_mpi(tmp_path):
    write(tmp_path / "runs" / "a.jsonl", scaling()[:4])
    program = (
        "import sys; from pathlib import Path; sys.modules['torch'] = sys.modules['mpi4py'] = None\n"
        "from longnet_hpc.scaling.config import ReportConfig; from longnet_hpc.scaling.report import report\n"
        f"report(ReportConfig(sources=({str(tmp_path)!r},), output=Path({str(tmp_path / 'r')!r})))"
    )
    done = run_python("-c", program, timeout=180)
    assert done.returncode == 0, done.stderr


def test_numbers_in_words():
    assert [seconds_in_words(its) for its in (0, 3e-9, 4.2e-5, 0.0123, 0.9999, 59.94, 3600.0, 86400.0 * 9)] == [
        *("0 s", "3 ns", "42 µs", "12.3 ms", "1 s", "59.9 s", "60 min", "9 days")
    ]
    assert [bytes_in_words(its) for its in (0, 999, 1000, 1_100_000, 85e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.1 MB",
        "85 GB",
    ]
    assert [tokens_in_words(its) for its in (8192, 1 << 20, 1 << 30, 1000, 65537)] == [
        "8K",
        "1M",
        "1B",
        "1,000",
        "65,537",
    ]
    assert [percent(its) for its in (0.031, 0.9, 1.1)] == ["3.1%", "90%", "110%"]
    assert runs_of([3, 1, 2, 7]) == [(1, 3), (7, 7)]
