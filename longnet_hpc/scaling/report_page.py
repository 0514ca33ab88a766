"""The page of a report: one HTML file with its style and pictures in it, and no address outside of it.

Everything that comes from records passes through `element`, which escapes it; a page has no scripts, and forbids them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files

from longnet_hpc.scaling.report_data import Found, Row
from longnet_hpc.scaling.report_draw import Picture, say, to_svg
from longnet_hpc.scaling.report_pictures import SECTIONS
from longnet_hpc.words import joined, number_in_words, plural, runs_of, short

__all__ = ["Html", "element", "page_of"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_OPEN_UP_TO = 12
"""Tables of more lines are closed at first."""
_MOST_LINES = 400
"""Of a table on the page; the rest is in its CSV file."""
_PLACE = (
    ("host", "host"),
    ("processor", "cpu"),
    ("processors usable", "cpu_count"),
    ("GPU", "gpu"),
    ("MPI library", "mpi_library"),
    ("started by", "launcher"),
    ("transport", "transport"),
)


class Html(str):
    """Text that is markup, and escaped where it must be."""


def element(name: str, *children: str, **attributes: str) -> Html:
    """Return an element; children that are not `Html`, and all attributes, are escaped."""
    inside = "".join(child if isinstance(child, Html) else html.escape(child) for child in children)
    its = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{its}>{inside}</{name}>")


def page_of(title: str, found: Found, pictures: Sequence[Picture], made: str) -> str:
    """Return the whole page.

    Parameters
    ----------
    title : str
        Heading.
    found : Found
        Records and failures.
    pictures : sequence of Picture
        In the order of sections.
    made : str
        When, and from which commit.
    """
    style = files("longnet_hpc.scaling").joinpath("report.css").read_text(encoding="utf-8")
    sections = _sections(pictures)
    heads = [("summary", "Summary"), *((key, SECTIONS[key]) for key, _ in sections)]
    heads += [("failed", "What failed"), ("provenance", "Where every number is from")]
    body = [
        element("h1", title),
        element("p", _lead(found, made), class_="lead"),
        element("nav", *(element("a", words, href=f"#{key}") for key, words in heads), aria_label="Sections"),
        _section("summary", "Summary", [_summary(found, pictures)]),
        *(_section(key, SECTIONS[key], its) for key, its in sections),
        _section("failed", "What failed", [_failed(found)]),
        _section("provenance", "Where every number is from", list(_provenance(found.rows))),
    ]
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Html(style)),
    ]
    return f'<!DOCTYPE html>\n<html lang="en">\n{element("head", *head)}\n{element("body", *body)}\n</html>\n'


def _lead(found: Found, made: str) -> str:
    modelled = sum(row.is_modelled for row in found.rows)
    words = [f"{plural(len(found.rows) - modelled, 'measured record')} and {modelled:,} modelled"]
    words.append(f"from {plural(len(found.files), 'file')}. {made}")
    return f"{' '.join(words)} Filled and solid is measured; hollow or pale, and dashed, is modelled."


def _sections(pictures: Sequence[Picture]) -> list[tuple[str, list[Html]]]:
    sections: dict[str, list[Html]] = {}
    for picture in pictures:
        sections.setdefault(picture.section, []).append(_figure(picture))
    return list(sections.items())


def _section(key: str, heading: str, parts: Iterable[Html]) -> Html:
    return element("section", element("h2", heading), *parts, id=key)


def _summary(found: Found, pictures: Sequence[Picture]) -> Html:
    sentences = [(words, picture) for picture in pictures for words in picture.sentences]
    lines = [
        element(
            "li", words, " ", element("a", "Picture", href=f"#{picture.name}", aria_label=f"Picture: {picture.title}")
        )
        for words, picture in sentences
    ]
    wrong = sum(failure.row is not None for failure in found.failures)
    skipped = len(found.failures) - wrong
    if found.failures:
        words = [plural(wrong, "record") + " did not pass the check, and no picture uses them"] if wrong else []
        words += [f"{plural(skipped, 'kind')} of lines or files could not be read"] if skipped else []
        lines.append(element("li", f"{'; '.join(words)}. ", element("a", "What failed", href="#failed")))
    else:
        lines.append(element("li", "Every record passed the check that ran beside it, and every line could be read."))
    return element("ul", *lines, class_="summary")


def _figure(picture: Picture) -> Html:
    parts = [element("h3", picture.title)]
    files_of = [element("a", "CSV", href=f"{picture.name}.csv")]
    if picture.figure is not None:
        parts.append(element("div", Html(to_svg(picture)), class_="drawing", tabindex="0"))
        files_of.insert(0, element("a", "PNG", href=f"{picture.name}.png"))
    links: list[str] = []
    for words in files_of:
        links += [" · ", words] if links else [words]
    parts.append(
        element(
            "figcaption",
            element("p", picture.caption),
            element("p", "From ", *_links(picture.rows), ". ", *links),
        )
    )
    table = element("div", _table(picture), class_="wide", tabindex="0")
    is_open = {"open": ""} if len(picture.lines) <= _OPEN_UP_TO else {}
    parts.append(element("details", element("summary", f"The numbers ({len(picture.lines):,})"), table, **is_open))
    return element("figure", *parts, id=picture.name)


def _links(rows: Sequence[Row]) -> list[str]:
    """Return links to records, those with consecutive numbers in one."""
    runs = runs_of([row.number for row in rows])
    links: list[str] = [f"{plural(len(rows), 'record')}: "]
    for place, (first, last) in enumerate(runs[:12]):
        words = f"R{first}" if first == last else f"R{first} to R{last}"
        links += [", "] if place else []
        links.append(element("a", words, href=f"#R{first}"))
    if len(runs) > 12:
        links.append(f" and {len(runs) - 12} more")
    return links


def _table(picture: Picture) -> Html:
    used = [key for key in picture.columns if any(line.values.get(key) is not None for line in picture.lines)]
    are_numbers = {
        key: all(
            isinstance(line.values.get(key), int | float) for line in picture.lines if line.values.get(key) is not None
        )
        for key in used
    }
    head = element(
        "tr",
        element("th", "kind"),
        *(element("th", picture.columns[key], **_class(are_numbers[key])) for key in used),
        element("th", "record"),
    )
    body = []
    for line in picture.lines[:_MOST_LINES]:
        marks: list[str] = []
        for row in line.rows:
            marks += (
                [" ", element("a", row.mark, href=f"#{row.mark}")]
                if marks
                else [element("a", row.mark, href=f"#{row.mark}")]
            )
        cells = [element("td", say(key, line.values.get(key)), **_class(are_numbers[key])) for key in used]
        name = "both" if " " in line.kind else line.kind
        body.append(
            element(
                "tr",
                element("td", element("span", line.kind, class_=f"kind {name}")),
                *cells,
                element("td", *marks),
                class_=name,
            )
        )
    if len(picture.lines) > _MOST_LINES:
        words = f"{plural(len(picture.lines) - _MOST_LINES, 'further line')} in the CSV file"
        body.append(element("tr", element("td", words, colspan=str(len(used) + 2))))
    return element("table", element("thead", head), element("tbody", *body))


def _class(is_number: bool) -> dict[str, str]:
    return {"class_": "number"} if is_number else {}


def _failed(found: Found) -> Html:
    notes = [element("p", f"Passed over: {joined(found.notes, 12)}.", class_="lead")] if found.notes else []
    if not found.failures:
        return Html(element("p", "Nothing: every check passed, and every line was a record.") + "".join(notes))
    head = element("tr", *(element("th", words) for words in ("where", "what", "record")))
    lines = []
    for failure in found.failures[:_MOST_LINES]:
        row = failure.row
        what = [element("span", failure.reason, class_="bad")]
        if row is not None:
            what.append(Html(html.escape(f" ({short(row.name, 40)}, {row.record['kind']}, {short(row.time, 30)})")))
        link = element("a", row.mark, href=f"#{row.mark}") if row else Html("")
        lines.append(
            element("tr", element("td", element("code", failure.place)), element("td", *what), element("td", link))
        )
    if len(found.failures) > _MOST_LINES:
        lines.append(element("tr", element("td", f"and {len(found.failures) - _MOST_LINES:,} more", colspan="3")))
    table = element("table", element("thead", head), element("tbody", *lines))
    return Html(element("div", table, class_="wide") + "".join(notes))


def _provenance(rows: Sequence[Row]) -> Iterable[Html]:
    """Yield each machine with its versions once, and the records made there."""
    places: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        versions = row.where.get("versions")
        its = versions if isinstance(versions, dict) else {}
        key = (
            *(number_in_words(row.where[key]) if row.where.get(key) is not None else "" for _, key in _PLACE),
            ", ".join(f"{name} {version}" for name, version in its.items()),
            str(row.record["what"]["git_commit"] or "unknown"),
        )
        places.setdefault(key, []).append(row)
    for number, (key, made_there) in enumerate(places.items(), start=1):
        heads = (*(words for words, _ in _PLACE), "versions", "commit")
        entries = [
            Html(element("dt", words) + element("dd", value)) for words, value in zip(heads, key, strict=True) if value
        ]
        parts = [element("h3", f"Machine and software {number}"), element("dl", *entries, class_="place")]
        yield element(
            "section", *parts, element("div", _records(made_there), class_="wide", tabindex="0"), id=f"place-{number}"
        )


def _records(rows: Sequence[Row]) -> Html:
    heads = ("record", "kind", "what", "when", "how", "check", "command, and where it is")
    lines = []
    for row in rows:
        how, where = row.record["how"], row.where
        point = ", ".join(f"{key} {say(key, value)}" for key, value in row.point.items())
        times = (
            f"{how['statistic']}{',' if ' ' in how['statistic'] else ''} of {how['repeats']}"
            if how["repeats"] != 1
            else str(how["statistic"])
        )
        times += f", {how['warmup']} before" if how["warmup"] else ""
        times += f"; {plural(where['ranks'], 'rank')}, {where['ranks_per_node']} a node" if where["ranks"] > 1 else ""
        kind = str(row.record["kind"])
        check = row.record["check"]
        passed = element("span", "passed: " if row.passed else "DID NOT PASS: ", class_="" if row.passed else "bad")
        lines.append(
            element(
                "tr",
                element("td", element("strong", row.mark)),
                element("td", element("span", kind, class_=f"kind {kind}")),
                element("td", short(row.name, 60) + (f" ({short(point, 120)})" if point else "")),
                element("td", short(row.time, 40).replace("T", " ").replace("+00:00", " UTC")),
                element("td", short(times, 120)),
                element("td", passed, short(str(check["name"]), 300)),
                element(
                    "td",
                    element("code", short(str(row.record["what"]["command"]), 400)),
                    Html("<br>"),
                    element("code", row.place),
                ),
                id=row.mark,
                class_=kind,
            )
        )
    head = element("tr", *(element("th", words) for words in heads))
    return element("table", element("thead", head), element("tbody", *lines), class_="records")
