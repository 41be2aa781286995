"""A report as CSV in long form: a line a number, with all that is known of it."""

import csv
import dataclasses
import io
from collections.abc import Mapping

from relloc.reports.entries import MARK_WORDS, Entry
from relloc.reports.groups import CARD_GROUP
from relloc.reports.places import Place, place
from relloc.reports.published import Published
from relloc.reports.table import Report
from relloc.results import Result
from relloc.terminal import escaped

_RESULT = tuple(field.name for field in dataclasses.fields(Result))
COLUMNS = (
    *("origin", "group", "section", "row", "column", "setting", "images"),
    *(name for name in _RESULT if name != "column"),
    *("run", "folder", "commit", "source", "edition"),
    *("beside", "published", "tolerance", "mark", "best", "why", "replaces"),
)


def as_csv(report: Report) -> str:
    """All published and all our numbers, those that no table shows included.

    `origin` is "published" or "ours". `mark` is inside, above or below `tolerance` around
    `published`, the numbers of the row `beside`; several values are separated by " / ".
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(_published(number)) for number in report.published)
    writer.writerows(cells(_ours(entry)) for entry in report.entries)
    return text.getvalue()


def cells(line: Mapping[str, object]) -> dict[str, object]:
    """The cells of a line, text among them such that it is nothing but text: see `as_text`."""
    return {name: as_text(value) if isinstance(value, str) else value for name, value in line.items()}


def as_text(text: str) -> str:
    """Text that a spreadsheet takes for no formula, as it does what begins with = + - or @, and a terminal for text."""
    text = escaped(text, keep="\n")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _published(number: Published) -> Mapping[str, object]:
    return _placed(place(number.evaluation, number.layer, number.metric)) | {
        "origin": "published",
        "group": CARD_GROUP,
        "row": number.row,
        "eval": number.evaluation,
        "dataset": number.dataset,
        "split": number.split,
        "layer": number.layer,
        "metric": number.metric,
        "value": number.printed,
        "tolerance": number.tolerance,
        "edition": number.edition,
        "source": number.source,
    }


def _ours(entry: Entry) -> Mapping[str, object]:
    run, older = entry.measured.run, entry.measured.older
    beside = {
        "beside": entry.beside[0].row if entry.beside else "",
        "published": " / ".join(each.printed for each in entry.beside),
        "tolerance": entry.beside[0].tolerance if entry.beside else "",
        "mark": MARK_WORDS.get(entry.mark, ""),
    }
    origin = {"origin": "ours", "group": entry.group, "row": entry.label, "best": "yes" if entry.best else ""}
    source = {"run": run.name, "folder": str(run.folder), "commit": run.commit, "why": entry.why}
    source["images"] = entry.measured.digest
    replaces = {"replaces": " / ".join(f"{each.result.value!r} of {each.run.name}" for each in older)}
    result = dataclasses.asdict(entry.result)
    listed = {name: "; ".join(result[name]) for name in ("deviations", "details")}
    return result | listed | _placed(entry.place) | origin | source | beside | replaces


def _placed(where: Place | None) -> dict[str, object]:
    return dataclasses.asdict(where) if where else {}
