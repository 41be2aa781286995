"""A report as CSV in long form: a line a number, with all that is known of it."""

import csv
import dataclasses
import io
import re
from collections.abc import Collection, Mapping

from relloc.reports.compare import MARK_WORDS, Entry
from relloc.reports.published import CARD_GROUP, Published, parts_of
from relloc.reports.table import Report
from relloc.results import Result
from relloc.terminal import escaped

_FORMULA = re.compile(
    r"[=@]|[+-](?!(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|inf$|nan$)", re.IGNORECASE
)  # unlike numbers
_RESULT = tuple(field.name for field in dataclasses.fields(Result))
COLUMNS = (
    *("origin", "group", "row", "setting", "images"),
    *_RESULT,
    *("run", "folder", "commit", "source", "edition"),
    *("beside", "published", "tolerance", "mark", "best", "why", "replaces"),
    *("state", "evaluation", "hours"),
)


def as_csv(report: Report) -> str:
    """All published and all our numbers, those that no table shows included.

    `origin` is "published" or "ours". `mark` is inside, above or below `tolerance` around
    `published`, the numbers of the row `beside`; several values are separated by " / ". `state` of a published number
    says whether ours is measured, missing or not built, `evaluation` and `hours` what measures it and how long that
    takes.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    ours = {
        (each.result.table, each.result.column)
        for each in report.entries
        if each.group == CARD_GROUP
    }
    for line in (
        *(_published(number, ours) for number in report.published),
        *map(_ours, report.entries),
    ):
        writer.writerow({name: as_text(value) for name, value in line.items()})
    return text.getvalue()


def as_text(value: object) -> object:
    """Text such that a spreadsheet takes it for no formula, as it does what begins with = + - or @, and a terminal for
    text; any other value as it is.
    """
    if not isinstance(value, str):
        return value
    text = escaped(value, keep="\n")
    return f"'{text}" if _FORMULA.match(text) else text


def _published(number: Published, ours: Collection[tuple[str, str]]) -> Mapping[str, object]:
    part = next(part for part in parts_of(number.table) if number.column in part.columns)
    missing = "missing" if part.evaluation else "not built"
    return {
        **dataclasses.asdict(number),
        "kind": "",  # which is that of an evaluation
        "origin": "published",
        "group": CARD_GROUP,
        "eval": number.evaluation,
        "value": number.printed,
        "state": "measured" if (number.table, number.column) in ours else missing,
        "hours": part.hours,
        "evaluation": part.evaluation,
    }


def _ours(entry: Entry) -> Mapping[str, object]:
    measured, run, beside, result = (
        entry.measured,
        entry.measured.run,
        entry.beside,
        dataclasses.asdict(entry.result),
    )
    return {
        **result,
        **{name: "; ".join(result[name]) for name in ("deviations", "details")},
        **({"beside": beside[0].row, "tolerance": beside[0].tolerance} if beside else {}),
        "published": " / ".join(each.printed for each in beside),
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
        "why": entry.why,
        "replaces": " / ".join(
            f"{each.result.value!r} of {each.run.name}" for each in measured.older
        ),
    }
