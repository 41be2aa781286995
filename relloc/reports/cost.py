"""What the card costs: for each of its rows the measured hours, and whether we have its numbers."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from relloc.reports.compare import ReportEntry
from relloc.reports.hours import PRETRAINING, MeasuredHours, measured_hours
from relloc.reports.missing import FILL_CARD
from relloc.reports.published import CARD_DATASET, PUBLISHED_MODEL, card_parts
from relloc.terminal import quantity

COST_TITLE = "What the card costs"
COST_COLUMNS = ("hours", "measured on", "limited by", "our numbers")
COST_CAPTION = (
    "Hours of the whole schedule on all images, from rates that were measured over seconds: "
    "python benchmarks/card.py measures them. Where nothing stands nobody has. Of the numbers, "
    f"{FILL_CARD} measures those that are missing, eval=ROW those of one row; the pretraining is "
    "python -m relloc.train experiment=card2022."
)
_MEASURED, _MISSING, _NOT_BUILT = "measured", "missing", "not built"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostLine:
    """A row of the card with its cost.

    `texts` are those of `COST_COLUMNS`, "" where nothing is known; `details` say where the hours
    come from.
    """

    label: str
    texts: tuple[str, ...]
    details: str = ""


def cost_lines(entries: Sequence[ReportEntry]) -> list[CostLine]:
    """Returns the pretraining, each evaluation of the card, and the sums of what was measured.

    `entries` are our numbers. There is a sum for each hardware, as hours on several don't add up.
    """
    lines = [_line(PRETRAINING, _MEASURED if _is_pretrained(entries) else _MISSING)]
    filled = {(each.result.table, each.result.column) for each in entries if each.fills_card}
    for part in card_parts():
        cells = {(part.table, column) for column in part.columns}
        if not part.evaluation:
            lines.append(CostLine(label=part.table, texts=("", "", "", _NOT_BUILT)))
            continue
        lines.append(_line(part.evaluation, _MEASURED if cells & filled else _MISSING))
    n_built = sum(line.texts[-1] != _NOT_BUILT for line in lines)
    by_hardware: dict[str, list[MeasuredHours]] = defaultdict(list)
    for each in measured_hours().values():
        by_hardware[each.hardware].append(each)
    for hardware, measured in by_hardware.items():
        total = sum(each.hours for each in measured)
        n_partial = sum(bool(each.leaves_out) for each in measured)
        note = f", of {n_partial} only what their rows say" if n_partial else ""
        label = f"sum of {len(measured)} of {quantity(n_built, 'row')}{note}"
        lines.append(CostLine(label=label, texts=(_hours(total), hardware, "", "")))
    return lines


def _line(row: str, state: str) -> CostLine:
    measured = measured_hours().get(row)
    if measured is None:
        return CostLine(label=row, texts=("", "", "", state))
    measured_on = f"{measured.hardware}, {measured.date}"
    if measured.leaves_out:
        measured_on += f", without {measured.leaves_out}"
    return CostLine(
        label=row,
        texts=(_hours(measured.hours), measured_on, measured.limited_by, state),
        details=measured.source,
    )


def _hours(hours: float) -> str:
    return f"{hours:.2f}"


def _is_pretrained(entries: Sequence[ReportEntry]) -> bool:
    """Returns whether a number is of a pretraining of the card's network on the card's images."""
    card = (PUBLISHED_MODEL, CARD_DATASET)
    for entry in entries:
        row = entry.result
        if row.kind == "pretext" and (row.model, row.dataset) == card:
            return True
    return False
