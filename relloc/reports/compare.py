"""Our numbers made comparable: each with its line, its group, and the published numbers it stands beside."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from relloc.reports.lines import group_of, label_lines, set_apart, tell_images_apart
from relloc.reports.load import Line, Measured, newest
from relloc.reports.published import (
    BEST_LAYER,
    CARD,
    CARD_GROUP,
    CARD_OSS,
    PUBLISHED_MODEL,
    RANDOM,
    SUPERVISED,
    Published,
    accepted,
    foreign_view,
    parts_of,
    published_numbers,
)
from relloc.results import LAYERS, Result

INSIDE, ABOVE, BELOW = "≈", "+", "\N{MINUS SIGN}"
MARK_WORDS = {INSIDE: "inside", ABOVE: "above", BELOW: "below"}
# With which published row a line of ours is compared: the first that has the number
_COMPARED_WITH = {"random": (RANDOM,), "torchvision": (SUPERVISED,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of ours.

    `group` is `CARD_GROUP` or names the other images it was measured on. `is_shown` says whether a table shows it.
    `beside` are the published numbers it is compared with, `is_best` whether none of ours in its column is better.
    `why` says how the layer was chosen, where one was. `spread` has the std, min or max over draws, where an evaluation
    gave these beside the number.
    """

    measured: Measured
    label: str
    group: str
    is_shown: bool
    beside: tuple[Published, ...] = ()
    is_best: bool = False
    why: str = ""
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def result(self) -> Result:
        return self.measured.result

    @property
    def setting(self) -> str:
        """What sets the line apart from others of its label: its variant, and on the card other views and images."""
        row = self.result
        on_card = (foreign_view(row), self.measured.images) if self.group == CARD_GROUP else ()
        return ", ".join(filter(None, (row.variant, *on_card)))

    @property
    def fills_card(self) -> bool:
        """Whether it fills a cell that the published model has on the card."""
        row = self.result
        is_as_published = row.variant in ("", LAYERS[-1]) and not foreign_view(row)
        return (
            self.is_shown
            and self.group == CARD_GROUP
            and row.model == PUBLISHED_MODEL
            and is_as_published
        )

    @property
    def mark(self) -> str:
        """`INSIDE`, `ABOVE` or `BELOW` the tolerance of the published numbers; "" without one."""
        if not self.beside:
            return ""
        low, high = accepted(self.beside)
        value, rounding = self.result.value, 1e-9
        return BELOW if value < low - rounding else ABOVE if value > high + rounding else INSIDE


def make_entries(measured: Iterable[Measured]) -> list[Entry]:
    """All numbers, the newest of those measured alike, lines in the order in which tables show them."""
    kept = set_apart(tell_images_apart(newest(measured)))
    labels = label_lines({each.line for each in kept})
    order = list(labels)
    best = [each for each in kept if each.result.column == BEST_LAYER and not each.result.variant]
    spreads: dict[tuple[object, ...], dict[str, float]] = {}
    for each in kept:
        if each.result.spread:
            spreads.setdefault(_key_of_spread(each), {})[each.result.spread] = each.result.value
    entries = []
    for each in sorted(kept, key=lambda each: order.index(each.line)):
        spread = {} if each.result.variant else spreads.get(_key_of_spread(each), {})
        entries.append(_entry(each, labels[each.line], best, spread))
    return _mark_best(entries)


def _key_of_spread(each: Measured) -> tuple[object, ...]:
    """What a number and its std, min and max over draws have in common."""
    row = each.result
    return (
        each.line,
        row.eval,
        row.layer,
        row.column,
        row.view,
        row.dataset,
        row.split,
        row.n,
        each.images,
    )


def _entry(
    each: Measured, label: str, best: Sequence[Measured], spread: Mapping[str, float]
) -> Entry:
    """`best` are the best layers of all lines and tables."""
    row, group = each.result, group_of(each)
    is_shown, why = bool(row.table), ""
    if source := next(
        (part.layer_best_in for part in parts_of(row.table) if part.layer_best_in), ""
    ):
        alike = [
            one
            for one in best
            if (one.result.table, one.result.view) == (source, row.view)
            and (one.line.whole, group_of(one)) == (each.line.whole, group)
        ]
        layer, why = _layer_of(each, alike)
        is_shown = row.layer == layer
    beside = published_beside(each.line, row) if is_shown and group == CARD_GROUP else ()
    return Entry(
        measured=each,
        label=label,
        group=group,
        is_shown=is_shown,
        beside=beside,
        why=why,
        spread=spread,
    )


def _layer_of(each: Measured, best: Sequence[Measured]) -> tuple[str, str]:
    """The layer at which a table is shown that has none of its own, and why.

    It is the best layer of the run that measured the number, else the newest of the line, else the published one.
    """
    if same_run := [one for one in best if one.run == each.run]:
        layer = same_run[0].result.layer
        return layer, f"at {layer}, the best layer of the same run"
    if best:
        layer = best[-1].result.layer
        return layer, f"at {layer}, the best layer of run {best[-1].run.name}"
    published = (
        one for one in published_numbers() if (one.row, one.table) == (CARD, each.result.table)
    )
    layer = next(published).layer
    return layer, f"at {layer} as on the published card, no best layer being known"


def published_beside(line: Line, row: Result) -> tuple[Published, ...]:
    """The published numbers that a number on the card is compared with: of the published model, view and layer."""
    if line.model != PUBLISHED_MODEL or foreign_view(row):
        return ()
    for name in _COMPARED_WITH.get(line.checkpoint, (CARD, CARD_OSS)):
        found = tuple(
            each
            for each in published_numbers()
            if (each.row, each.table, each.column) == (name, row.table, row.column)
            and (row.variant not in LAYERS or row.variant == each.layer)
        )
        if found:
            return found
    return ()


def _mark_best(entries: Sequence[Entry]) -> list[Entry]:
    """Marks the best of several lines of ours in a column and setting, supervised weights aside."""
    contests: dict[tuple[object, ...], list[float]] = {}
    for each in entries:
        contests.setdefault(_contest(each), []).append(_goodness(each.result))
    contests[()] = []
    best = {contest: max(values) for contest, values in contests.items() if len(values) > 1}
    return [
        dataclasses.replace(each, is_best=best.get(_contest(each)) == _goodness(each.result))
        for each in entries
    ]


def _goodness(row: Result) -> float:
    return row.value if row.higher_is_better else -row.value


def _contest(entry: Entry) -> tuple[object, ...]:
    """Who competes: the same column and setting; layers that are lines of one column compete with each other.

    Empty of numbers that compete with none.
    """
    row = entry.result
    if not entry.is_shown or row.checkpoint == "torchvision" or row.higher_is_better is None:
        return ()
    variant = "" if row.variant == row.layer else row.variant
    on_card = entry.measured.images if entry.group == CARD_GROUP else ""
    return entry.group, row.table, row.column, variant, foreign_view(row), on_card
