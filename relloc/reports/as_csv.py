"""Writes a report as CSV in long form: one line for each number, with all that is known of it."""

import csv
import dataclasses
import io
import re
from collections.abc import Collection, Mapping

from relloc.reports.compare import MARK_WORDS, ReportEntry
from relloc.reports.hours import measured_hours
from relloc.reports.parts import Report
from relloc.reports.published import CARD_GROUP, Published, part_with, published_variant
from relloc.results import Result
from relloc.terminal import escaped

# The beginnings by which a spreadsheet takes a text for a formula; signed numbers are none
_FORMULA = re.compile(r"[=@]|[+-](?!(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|inf$|nan$)", re.IGNORECASE)
_RESULT_FIELDS = tuple(field.name for field in dataclasses.fields(Result))
COLUMNS = (
    # What the line is
    *("origin", "group", "row", "setting", "images"),
    *_RESULT_FIELDS,
    # Where it comes from
    *("run", "folder", "commit", "source", "edition"),
    # How it compares
    *("beside", "published", "tolerance", "mark", "best", "why", "replaces"),
    # Of a published number: whether we have it, too
    *("state", "evaluation", "hours", "hours_measured_on"),
)


def as_csv(report: Report) -> str:
    """Returns all published numbers and all of ours as CSV, with those that no table shows.

    Columns that need a word:
        origin: "published" or "ours".
        mark: Whether our number is inside, above or below `tolerance` around `published`, which are
            the numbers of the row `beside`, separated by " / ".
        state: Whether our number for a published one is "measured", "missing" or "not built".
        evaluation, hours: What measures it, and how long that takes on one GPU.
        hours_measured_on: The hardware on which, and the date at which, these hours were measured;
            empty where they are an estimate.
    """
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        COLUMNS,
        restval="",
        extrasaction="ignore",
        lineterminator="\n",
    )
    writer.writeheader()
    # The cells of the card that we have measured
    measured = set()
    for entry in report.entries:
        row = entry.result
        if entry.group == CARD_GROUP:
            measured.add((row.table, row.column, published_variant(row)))
    lines = [_published_line(number, measured) for number in report.published]
    lines += [_our_line(entry) for entry in report.entries]
    for line in lines:
        writer.writerow({name: as_text(value) for name, value in line.items()})
    return text.getvalue()


def as_text(value: object) -> object:
    """Returns a text that neither a spreadsheet nor a terminal takes for anything but text.

    A spreadsheet would take what begins with = + - or @ for a formula; such a text gets an
    apostrophe. Values that are no texts are returned as they are.
    """
    if not isinstance(value, str):
        return value
    text = escaped(value, keep="\n")
    return f"'{text}" if _FORMULA.match(text) else text


def _published_line(
    number: Published, measured: Collection[tuple[str, str, str]]
) -> Mapping[str, object]:
    """Returns the line of a published number; `measured` are the cells of the card that we have."""
    part = part_with(number.table, number.column)
    state = "missing" if part.evaluation else "not built"
    if (number.table, number.column, number.variant) in measured:
        state = "measured"
    hours: object = part.hours
    measured_on = ""
    if of_evaluation := measured_hours().get(part.evaluation):
        hours = of_evaluation.hours
        measured_on = f"{of_evaluation.hardware}, {of_evaluation.date}"
    return {
        **dataclasses.asdict(number),
        # The column has the kind of an evaluation, not that of a published row
        "kind": "",
        "origin": "published",
        "group": CARD_GROUP,
        "eval": number.evaluation,
        "value": number.printed,
        "state": state,
        "hours": hours,
        "hours_measured_on": measured_on,
        "evaluation": part.evaluation,
    }


def _our_line(entry: ReportEntry) -> Mapping[str, object]:
    """Returns the line of one of our numbers."""
    measured = entry.measured
    run = measured.run
    result = dataclasses.asdict(entry.result)
    line: dict[str, object] = {
        **result,
        "deviations": "; ".join(result["deviations"]),
        "details": "; ".join(result["details"]),
        "published": " / ".join(number.printed for number in entry.compared_with),
        "origin": "ours",
        "group": entry.group,
        "row": entry.label,
        "setting": entry.setting,
        "images": measured.digest,
        "run": run.name,
        "folder": str(run.folder),
        "commit": run.commit,
        "mark": MARK_WORDS.get(entry.mark, ""),
        "best": "yes" if entry.is_best else "",
        "why": entry.layer_reason,
    }
    # Several published numbers beside it are editions of one row, which have one tolerance
    if entry.compared_with:
        line["beside"] = entry.compared_with[0].row
        line["tolerance"] = entry.compared_with[0].tolerance
    replaced = (f"{old.result.value!r} of {old.run.name}" for old in measured.older)
    line["replaces"] = " / ".join(replaced)
    return line
